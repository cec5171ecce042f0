"""Writes an HTML page about a T-GRPO run's completions: each text with its frames, rewards and advantage.

    python -m tools.rollouts runs/toy/tgrpo/rollouts.jsonl                   # writes rollouts.html beside the file
    python -m tools.rollouts runs/toy/tgrpo/rollouts.jsonl --step 0 99       # only these steps

A run writes the file if it is started with `save_rollouts: true`. Records, media and the number of frames are those in
the run's config.yaml, beside the file; --records and --data_root override them. The page is the gallery of
tools/report.py. Its filters are the step, the problem type, whether all, some or none of a prompt's completions with
frames in order are correct, and whether the frame order helped.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from rewards import CORRECT, accuracy_reward
from support.parsing import extract_answer, lettered
from support.record_files import read_rows
from support.settings import SharedConfig, UserError, read_yaml
from support.storage import read_jsonl
from tools.report import MAX_QUESTIONS, ORDER_NAMES, answer_card, evenly_spaced, write_page

# Every row of rollouts.jsonl has these fields.
NEEDED = ("step", "problem_id", "path", "frames", "text")
# All other fields of a row are rewards, the advantage or the credit.
NOT_A_REWARD = (*NEEDED, "frame_order")


def read_rollouts(path, steps=()):
    """Rows of a rollouts.jsonl, only those of `steps` if given.

    Raises UserError if there are none or if one lacks a field.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; a run writes it with save_rollouts: true")
    try:
        rows = read_jsonl(path)
    except ValueError as error:
        raise UserError(f"{path}: not a rollouts.jsonl: {error}") from None
    for number, row in enumerate(rows, 1):
        missing = [name for name in NEEDED if not isinstance(row, dict) or name not in row]
        if missing:
            raise UserError(f"{path}, line {number}: not a rollout, it lacks {', '.join(missing)}")
    if not rows:
        raise UserError(f"{path}: no rollouts in this file")
    chosen = [row for row in rows if not steps or row["step"] in steps]
    if not chosen:
        wanted = ", ".join(str(step) for step in steps)
        raise UserError(f"{path}: no rollouts of step {wanted}; it holds steps {rows[0]['step']} to {rows[-1]['step']}")
    return chosen


def run_config(folder, records="", data_root=""):
    """SharedConfig of the run in `folder`, from its config.yaml; `records` and `data_root` override it if given."""
    path = Path(folder) / "config.yaml"
    run_settings = read_yaml(path).get("tgrpo", {}) if path.is_file() else {}
    shared = {field.name for field in fields(SharedConfig)}
    cfg = SharedConfig(**{name: value for name, value in run_settings.items() if name in shared})
    cfg.records = records or cfg.records
    cfg.data_root = data_root or cfg.data_root
    if not cfg.records:
        raise UserError(f"{path}: no such file, so --records and --data_root must name the run's data")
    return cfg


def group_by_prompt(rows):
    """Lists of rows, one per prompt and step, sorted by step."""
    groups = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        prompt = (row["step"], str(row["problem_id"]), row["path"])
        groups.setdefault(prompt, []).append(row)
    return list(groups.values())


def completion_card(row, record):
    """What the gallery shows of a completion."""
    score = row.get("accuracy")
    # A run logs no rewards for completions from shuffled frames.
    if score is None:
        score = accuracy_reward(row["text"], record["solution"], record["problem_type"])
    rewards = {name: value for name, value in row.items() if name not in NOT_A_REWARD}
    return answer_card(
        ORDER_NAMES.get(row["frames"], row["frames"]),
        row["text"],
        score,
        extract_answer(row["text"]) is not None,
        rewards,
    )


def share_correct(completions, frames):
    """Share of correct completions among those with this frame order; None if there are none."""
    correct = [completion["score"] > CORRECT for completion in completions if completion["label"] == frames]
    return sum(correct) / len(correct) if correct else None


def order_effect(p, p_shuffled):
    """[how the order of frames changed the share of correct completions]; [] if one of the two is missing."""
    if p is None or p_shuffled is None:
        return []
    if p == p_shuffled:
        return ["order: no difference"]
    return ["order: helped" if p > p_shuffled else "order: hurt"]


def prompt_card(rows, record):
    """What the gallery shows of a prompt and its completions."""
    completions = [completion_card(row, record) for row in rows]
    p = share_correct(completions, "in order")
    p_shuffled = share_correct(completions, "shuffled")
    results = {None: "none in order", 0: "none correct", 1: "all correct"}
    orders = [row["frame_order"] for row in rows if row.get("frame_order")]
    return {
        "group": f"step {rows[0]['step']}",
        "kind": record["problem_type"],
        "id": str(record["problem_id"]),
        "problem": record["problem"],
        "options": lettered(record.get("options") or []),
        "solution": str(record["solution"]),
        "error": "",
        "answers": completions,
        "result": results.get(p, "some correct"),
        "changes": order_effect(p, p_shuffled),
        "record": record | {"frame_order": orders[0] if orders else None},
    }


def write_rollouts(path, out, steps=(), records="", data_root=""):
    """Write the page `out` about the rollouts in `path`. Raises UserError if the run's records do not include them."""
    path = Path(path)
    if path.is_dir():
        path = path / "rollouts.jsonl"
    groups = group_by_prompt(read_rollouts(path, steps))
    cfg = run_config(path.parent, records, data_root)
    by_prompt = {(str(record["problem_id"]), record["path"]): record for record in read_rows(cfg.records)}
    questions = []
    for rows in evenly_spaced(groups, MAX_QUESTIONS):
        problem_id = rows[0]["problem_id"]
        clip = rows[0]["path"]
        record = by_prompt.get((str(problem_id), clip))
        if record is None:
            raise UserError(f"{cfg.records}: no record {problem_id!r} on {clip}; --records names the run's records")
        questions.append(prompt_card(rows, record))
    words = {"group": "step", "kind": "problem type", "item": "prompt"}
    write_page(out, f"Rollouts of {path.parent}", words, questions, len(groups), cfg, made_with=vars(cfg))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="rollouts.jsonl")
    parser.add_argument("--step", type=int, nargs="+", default=[], help="only these steps; default: all")
    parser.add_argument("--records", default="", help="records of the run; default: as in its config.yaml")
    parser.add_argument("--data_root", default="", help="folder of their media; default: as in its config.yaml")
    parser.add_argument("--out", help="page to write; default: rollouts.html beside the file")
    args = parser.parse_args(argv)
    out = args.out or Path(args.file).with_suffix(".html")
    write_rollouts(args.file, out, args.step, args.records, args.data_root)
    print(f"page: {out}")


if __name__ == "__main__":
    main()
