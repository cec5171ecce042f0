"""Writes an HTML page about a T-GRPO run's completions: each text with its frames, rewards and advantage.

    python -m tools.rollouts runs/toy/tgrpo/rollouts.jsonl                   # writes rollouts.html beside the file
    python -m tools.rollouts runs/toy/tgrpo/rollouts.jsonl --step 0 99       # only these steps

A run writes the file if it is started with `save_rollouts: true`. Records, media and the number of frames are those in
the run's config.yaml, beside the file; --records, --data_root and the like override them. The gallery's filters are the
step, the problem type, how many of a prompt's completions with frames in order are correct (all, some or none), and
whether that share is higher (gained) or lower (lost) than with shuffled frames.
"""

from pathlib import Path

import data
from rewards import CORRECT, accuracy_reward
from support import parsing
from support.metrics import QUESTION
from support.settings import SharedConfig, UserError, load_config
from tools import report, shared

# Every row of rollouts.jsonl has these fields; the others are rewards, the advantage, or the order of the frames.
NEEDED = ("step", "problem_id", "path", "problem", "frames", "text")
# what the page says of the share of a prompt's completions that are correct; any other share: "some correct"
RESULTS = {None: "none ordered", 0: "none correct", 1: "all correct"}


def question_of(row):
    """The question of a row or of a record."""
    return tuple(row.get(name) for name in QUESTION)


def prompt_cards(rows, cfg):
    """What the gallery shows of each prompt and step, by step. UserError if the run's records do not have a prompt."""
    groups = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        groups.setdefault((row["step"], question_of(row)), []).append(row)
    records, _ = data.load_records(cfg.records, cfg.data_root, max_unreadable=1)
    records = {question_of(record): record for record in records}
    cards = []
    for (_, question), group in groups.items():
        if question not in records:
            raise UserError(f"{cfg.records}: no record {question!s:.200}; --records names the run's records")
        cards.append(prompt_card(group, records[question]))
    return cards


def prompt_card(rows, record):
    """What the gallery shows of a prompt and its completions."""
    completions = [completion_card(row, record) for row in rows]
    shuffled = {"label": "shuffled", "score": share_correct(completions, "shuffled")}
    ordered = {"label": "ordered", "score": share_correct(completions, "ordered")}
    frame_order = next((row["frame_order"] for row in rows if row.get("frame_order")), None)
    return report.card(
        record | {"id": record["problem_id"], "frame_order": frame_order},
        group=f"step {rows[0]['step']}",
        kind=record["problem_type"],
        answers=completions,
        result=RESULTS.get(ordered["score"], "some correct"),
        changes=report.changes_of([shuffled, ordered]),
    )


def completion_card(row, record):
    """What the gallery shows of a completion."""
    # computed again, as a run logs no rewards of completions from shuffled frames
    score = accuracy_reward(row["text"], record["solution"], record["problem_type"])
    hidden = (*NEEDED, *QUESTION, "frame_order")
    rewards = {name: value for name, value in row.items() if name not in hidden and value is not None}
    is_readable = parsing.extract_answer(row["text"]) is not None
    return report.answer_card(row["frames"], row["text"], score, is_readable, rewards)


def share_correct(completions, frames):
    """Share of correct completions among those with this frame order; None if there are none."""
    correct = [completion["score"] > CORRECT for completion in completions if completion["label"] == frames]
    return sum(correct) / len(correct) if correct else None


def main(argv=None):
    parser = shared.parser(__doc__)
    parser.add_argument("file", metavar="rollouts.jsonl")
    parser.add_argument("--step", type=int, nargs="+", help="only these steps; default: all")
    parser.add_argument("--out", help="page to write; default: rollouts.html beside the file")
    args, rest = parser.parse_known_args(argv)
    path = Path(args.file)
    rows = shared.read_log(path, NEEDED)
    chosen = [row for row in rows if not args.step or row["step"] in args.step]
    if not chosen:
        raise UserError(f"{path}: nothing of these steps; it holds steps {rows[0]['step']} to {rows[-1]['step']}")
    arguments = ["--config", str(path.with_name("config.yaml")), *rest]
    cfg = load_config(SharedConfig, "tgrpo", arguments, partial=True, required=["records"])
    out = args.out or path.with_suffix(".html")
    words = {"group": "step", "kind": "problem type", "item": "prompt"}
    report.write_page(out, f"Rollouts of {path.parent}", words, prompt_cards(chosen, cfg), cfg, vars(cfg))
    print(f"page: {out}")


if __name__ == "__main__":
    main()
