"""One HTML page of a T-GRPO run's completions: frames in order and shuffled, each text with its rewards and advantage.

    python -m tools.rollouts runs/toy/tgrpo/rollouts.jsonl                   # writes rollouts.html beside the file
    python -m tools.rollouts runs/toy/tgrpo/rollouts.jsonl --step 0 99       # these steps only

A run writes the file if it is started with `save_rollouts: true`. Records, media and the number of frames are those of
the run's config.yaml, beside the file; --records and --data_root name other places. The page is report.py's gallery.
Its filters are the step, the problem type, whether all, some or none of a prompt's completions in order are correct,
and whether the order of frames helped.
"""

import argparse
import time
from dataclasses import fields
from pathlib import Path

from rewards import CORRECT, accuracy_reward, extract_answer, lettered
from settings import SharedConfig, UserError, print_utf8, read_jsonl, read_rows, read_yaml
from tools.report import evenly, write_page

# what every row of rollouts.jsonl has
NEEDED = ("step", "problem_id", "path", "frames", "text")
# all else in a row is a reward term, the advantage or the credit
NO_NUMBERS = (*NEEDED, "frame_order")


def read_rollouts(path, steps=()):
    """Rows of a rollouts.jsonl, of `steps` alone if any are given. UserError if there are none or one lacks a field."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; a run writes it with save_rollouts: true")
    try:
        rows = read_jsonl(path)
    except ValueError as error:
        raise UserError(f"{path}: not a rollouts.jsonl: {error}") from None
    for number, row in enumerate(rows, 1):
        missing = [name for name in NEEDED if not isinstance(row, dict) or name not in row]
        if missing:
            raise UserError(f"{path}, line {number}: no rollout: {', '.join(missing)} missing")
    if not rows:
        raise UserError(f"{path}: no rollouts in this file")
    chosen = [row for row in rows if not steps or row["step"] in steps]
    if not chosen:
        asked = ", ".join(str(step) for step in steps)
        raise UserError(f"{path}: no rollouts of step {asked}; there are {rows[0]['step']} to {rows[-1]['step']}")
    return chosen


def run_config(folder, records="", data_root=""):
    """SharedConfig of the run in `folder`, from its config.yaml; `records` and `data_root` replace its own if given."""
    path = Path(folder) / "config.yaml"
    written = read_yaml(path).get("tgrpo", {}) if path.is_file() else {}
    known = {f.name for f in fields(SharedConfig)}
    cfg = SharedConfig(**{name: value for name, value in written.items() if name in known})
    cfg.records = records or cfg.records
    cfg.data_root = data_root or cfg.data_root
    if not cfg.records:
        raise UserError(f"{path}: no such file, so --records and --data_root must say where the run's data are")
    return cfg


def group_by_prompt(rows):
    """The rows of each prompt of each step, as lists, by step."""
    groups = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        prompt = (row["step"], str(row["problem_id"]), row["path"])
        groups.setdefault(prompt, []).append(row)
    return list(groups.values())


def shown_completion(row, record):
    """A completion as the page shows it. Of shuffled frames no reward is written: their accuracy is computed here."""
    score = row.get("accuracy")
    if score is None:
        score = accuracy_reward(row["text"], record["solution"], record["problem_type"])
    return {
        "frames": row["frames"],
        "text": row["text"],
        "score": score,
        "read": extract_answer(row["text"]) is not None,
        "terms": {name: round(value, 3) for name, value in row.items() if name not in NO_NUMBERS},
    }


def share_correct(completions, frames):
    """Share of correct completions with their frames in this order; None if there are none."""
    correct = [c["score"] > CORRECT for c in completions if c["frames"] == frames]
    return sum(correct) / len(correct) if correct else None


def shown_prompt(rows, record):
    """A prompt and its completions, as report.py's gallery shows a question and its answers."""
    completions = [shown_completion(row, record) for row in rows]
    p = share_correct(completions, "ordered")
    p_shuffled = share_correct(completions, "shuffled")
    helped = None
    if p is not None and p_shuffled is not None:
        helped = (p > p_shuffled) - (p < p_shuffled)
    names = {None: "none in order", 0: "none correct", 1: "all correct"}
    return {
        "benchmark": str(rows[0]["step"]),
        "id": str(record["problem_id"]),
        "task": record["problem_type"],
        "problem": record["problem"],
        "options": lettered(record.get("options") or []),
        "solution": str(record["solution"]),
        "error": None,
        "answers": completions,
        "result": names.get(p, "some correct"),
        "helped": helped,
    }


def write_rollouts(path, out, steps=(), records="", data_root=""):
    """Write the page `out` of the rollouts in `path`. UserError if they are not of the run's records."""
    path = Path(path)
    if path.is_dir():
        path = path / "rollouts.jsonl"
    groups = group_by_prompt(read_rollouts(path, steps))
    cfg = run_config(path.parent, records, data_root)
    by_prompt = {(str(record["problem_id"]), record["path"]): record for record in read_rows(cfg.records)}
    questions = []
    media = []
    for rows in evenly(groups):
        name, clip = rows[0]["problem_id"], rows[0]["path"]
        record = by_prompt.get((str(name), clip))
        if record is None:
            raise UserError(f"{cfg.records}: no record {name!r} on {clip}; --records names the run's records")
        orders = [row["frame_order"] for row in rows if row.get("frame_order")]
        questions.append(shown_prompt(rows, record))
        media.append(record | {"frame_order": orders[0] if orders else None})
    title = f"Rollouts of {Path(path).parent}, {time.strftime('%Y-%m-%d')}"
    words = {"group": "step", "prefix": "step ", "kind": "problem type", "item": "prompt"}
    write_page(out, title, questions, media, len(groups), cfg, made_with=vars(cfg), **words)


def main(argv=None):
    print_utf8()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="rollouts.jsonl")
    parser.add_argument(
        "--step", type=int, nargs="+", default=[], help="these steps; default: all, or evenly spread ones"
    )
    parser.add_argument("--records", default="", help="records of the run; default: as its config.yaml says")
    parser.add_argument("--data_root", default="", help="folder of their media; default: as its config.yaml says")
    parser.add_argument("--out", help="page to write; default: rollouts.html beside the file")
    args = parser.parse_args(argv)
    out = args.out or Path(args.file).with_suffix(".html")
    write_rollouts(args.file, out, args.step, args.records, args.data_root)
    print(f"page: {out}")


if __name__ == "__main__":
    main()
