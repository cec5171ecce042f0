"""One HTML page of a T-GRPO run's completions: frames in order and shuffled, completions with their rewards and advantages.

    python -m tools.rollouts runs/toy/tgrpo/rollouts.jsonl                   # writes rollouts.html beside the file
    python -m tools.rollouts runs/toy/tgrpo/rollouts.jsonl --step 0 99       # these steps only

The run must have been started with `save_rollouts: true`. Records, data root and frames are those of the run's config.yaml,
beside the file; --records and --data_root name other places. The page is the gallery of report.py: filter by step, by
problem type, by whether all, some or none of a prompt's completions are correct, and by whether the order of frames helped.
"""

import argparse
import time
from dataclasses import fields
from pathlib import Path

from report import evenly, write_page
from rewards import CORRECT, accuracy_reward, extract_answer
from settings import SharedConfig, UserError, print_utf8, read_jsonl, read_rows, read_yaml

# what a row of rollouts.jsonl tells besides numbers
TEXTS = ("problem_id", "path", "frames", "text", "frame_order", "step")


def read_rollouts(path, steps=()):
    """Rows of a rollouts.jsonl, those of `steps` if any are given. UserError if there are none, or they are something else."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; a run writes it with save_rollouts: true")
    try:
        rows = read_jsonl(path)
    except ValueError as error:
        raise UserError(f"{path}: not a rollouts.jsonl: {error}") from None
    for number, row in enumerate(rows, 1):
        missing = [name for name in ("step", "problem_id", "path", "frames", "text") if not isinstance(row, dict) or name not in row]
        if missing:
            raise UserError(f"{path}, line {number}: no rollout: {', '.join(missing)} missing")
    there = sorted({row["step"] for row in rows})
    rows = [row for row in rows if not steps or row["step"] in steps]
    if not rows:
        raise UserError(f"{path}: no rollouts" + (f" of step {', '.join(map(str, steps))}; there are {there[0]} to {there[-1]}" if there else ""))
    return rows


def run_config(folder, records, data_root):
    """SharedConfig of the run in `folder`, from the config.yaml it wrote; `records` and `data_root` replace its own if given."""
    path = Path(folder) / "config.yaml"
    written = read_yaml(path).get("tgrpo", {}) if path.is_file() else {}
    known = {f.name for f in fields(SharedConfig)}
    values = {name: value for name, value in written.items() if name in known}
    cfg = SharedConfig(**values)
    cfg.records = records or cfg.records
    cfg.data_root = data_root or cfg.data_root
    if not cfg.records:
        raise UserError(f"{path}: not there, so --records and --data_root must say where the run's records and media are")
    return cfg


def prompts_of(rows):
    """The rows of each prompt of each step, as lists, by step."""
    groups = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        groups.setdefault((row["step"], str(row["problem_id"]), row["path"]), []).append(row)
    return list(groups.values())


def shown_completion(row, record):
    """A completion as the page shows it. Of shuffled frames no reward is written, so its accuracy is computed here."""
    score = row.get("accuracy")
    if score is None:
        score = accuracy_reward(row["text"], record["solution"], record["problem_type"])
    numbers = {name: round(value, 3) for name, value in row.items() if name not in TEXTS}
    return {"frames": row["frames"], "text": row["text"], "score": score, "read": extract_answer(row["text"]) is not None, "terms": numbers}


def share_correct(completions, frames):
    """Share of correct completions with their frames in this order; None if there are none."""
    scores = [c["score"] > CORRECT for c in completions if c["frames"] == frames]
    return sum(scores) / len(scores) if scores else None


def shown_prompt(rows, record):
    """A prompt and its completions as report.py's gallery shows a question."""
    completions = [shown_completion(row, record) for row in rows]
    p, p_shuffled = share_correct(completions, "ordered"), share_correct(completions, "shuffled")
    helped = None
    if p is not None and p_shuffled is not None:
        helped = (p > p_shuffled) - (p < p_shuffled)
    result = {None: "none in order", 0: "none correct", 1: "all correct"}.get(p, "some correct")
    return {
        "benchmark": str(rows[0]["step"]),
        "id": str(record["problem_id"]),
        "task": record["problem_type"],
        "problem": record["problem"],
        "options": record.get("options") or [],
        "solution": str(record["solution"]),
        "error": None,
        "answers": completions,
        "result": result,
        "helped": helped,
    }


def write_rollouts(path, out, steps=(), records="", data_root=""):
    """Write the page `out` of the rollouts in `path`."""
    rows = read_rollouts(path, steps)
    cfg = run_config(Path(path).parent, records, data_root)
    known = {(str(record["problem_id"]), record["path"]): record for record in read_rows(cfg.records)}
    prompts = prompts_of(rows)
    chosen = evenly(prompts)
    questions, media = [], []
    for group in chosen:
        record = known.get((str(group[0]["problem_id"]), group[0]["path"]))
        if record is None:
            raise UserError(f"{cfg.records}: holds no record {group[0]['problem_id']!r} on {group[0]['path']}; --records names the run's records")
        orders = [row["frame_order"] for row in group if row.get("frame_order")]
        questions.append(shown_prompt(group, record))
        media.append(record | {"frame_order": orders[0] if orders else None})
    title = f"Rollouts of {Path(path).parent}, {time.strftime('%Y-%m-%d')}"
    made_with = {name: str(value) for name, value in vars(cfg).items()}
    write_page(out, title, questions, media, len(prompts), cfg, made_with, group="step", kind="problem type", item="prompt", prefix="step ")


def main(argv=None):
    print_utf8()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="rollouts.jsonl")
    parser.add_argument("--step", type=int, nargs="+", default=[], help="only these steps; default: all, evenly spread if they are many")
    parser.add_argument("--records", default="", help="records of the run; default: as its config.yaml says")
    parser.add_argument("--data_root", default="", help="folder of their media; default: as its config.yaml says")
    parser.add_argument("--out", help="page to write; default: rollouts.html beside the file")
    args = parser.parse_args(argv)
    out = args.out or Path(args.file).with_suffix(".html")
    write_rollouts(args.file, out, args.step, args.records, args.data_root)
    print(f"page: {out}")


if __name__ == "__main__":
    main()
