"""Writes an HTML page about a T-GRPO run's completions: each text with its frames, rewards and advantage.

    python -m tools.rollouts runs/toy/tgrpo/rollouts.jsonl                   # writes rollouts.html beside the file
    python -m tools.rollouts runs/toy/tgrpo/rollouts.jsonl --step 0 99       # only these steps

A run writes the file if it is started with `save_rollouts: true`. Records, media and the number of frames are those in
the run's config.yaml, beside the file; --records and --data_root override them. The page is the gallery of
tools/report.py. Its filters are the step, the problem type, whether all, some or none of a prompt's completions with
frames in order are correct, and whether the frame order helped.
"""

from pathlib import Path

from rewards import CORRECT, accuracy_reward
from support import parsing, record_files
from support.settings import SharedConfig, UserError, load_config
from tools import report, shared

# Every row of rollouts.jsonl has these fields; the others are rewards, the advantage, or the order of the frames.
NEEDED = ("step", "problem_id", "path", "frames", "text")
# what the page says of the share of a prompt's completions that are correct; any other share: "some correct"
RESULTS = {None: "none in order", 0: "none correct", 1: "all correct"}


def run_config(folder, records, data_root):
    """SharedConfig of the run in `folder`, from its config.yaml; `records` and `data_root` override it if given."""
    path = folder / "config.yaml"
    arguments = ["--config", str(path)] if path.is_file() else []
    for name, value in (("records", records), ("data_root", data_root)):
        if value:
            arguments += [f"--{name}", value]
    return load_config(SharedConfig, "tgrpo", arguments, partial=True, required=("records",))


def prompt_cards(rows, cfg):
    """What the gallery shows of each prompt and step, by step. UserError if the run's records do not have a prompt."""
    groups = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        groups.setdefault((row["step"], str(row["problem_id"]), row["path"]), []).append(row)
    records = {(str(record["problem_id"]), record["path"]): record for record in record_files.read_rows(cfg.records)}
    cards = []
    for (_, problem_id, clip), group in groups.items():
        if (problem_id, clip) not in records:
            raise UserError(f"{cfg.records}: no record {problem_id!r} on {clip}; --records names the run's records")
        cards.append(prompt_card(group, records[problem_id, clip]))
    return cards


def prompt_card(rows, record):
    """What the gallery shows of a prompt and its completions."""
    completions = [completion_card(row, record) for row in rows]
    p = share_correct(completions, "in order")
    p_shuffled = share_correct(completions, "shuffled")
    effects = []
    if p is not None and p_shuffled is not None:
        effect = "helped" if p > p_shuffled else "hurt"
        effects = [f"order: {effect if p != p_shuffled else 'no difference'}"]
    orders = [row["frame_order"] for row in rows if row.get("frame_order")]
    return {
        "group": f"step {rows[0]['step']}",
        "kind": record["problem_type"],
        "id": str(record["problem_id"]),
        "problem": record["problem"],
        "options": parsing.lettered(record.get("options") or []),
        "solution": str(record["solution"]),
        "error": "",
        "answers": completions,
        "result": RESULTS.get(p, "some correct"),
        "changes": effects,
        "record": record | {"frame_order": orders[0] if orders else None},
    }


def completion_card(row, record):
    """What the gallery shows of a completion."""
    score = row.get("accuracy")
    # A run logs no rewards for completions from shuffled frames.
    if score is None:
        score = accuracy_reward(row["text"], record["solution"], record["problem_type"])
    rewards = {name: value for name, value in row.items() if name not in (*NEEDED, "frame_order")}
    is_readable = parsing.extract_answer(row["text"]) is not None
    label = report.ORDER_NAMES.get(row["frames"], row["frames"])
    return report.answer_card(label, row["text"], score, is_readable, rewards)


def share_correct(completions, frames):
    """Share of correct completions among those with this frame order; None if there are none."""
    correct = [completion["score"] > CORRECT for completion in completions if completion["label"] == frames]
    return sum(correct) / len(correct) if correct else None


def main(argv=None):
    parser = shared.parser(__doc__)
    parser.add_argument("file", metavar="rollouts.jsonl")
    parser.add_argument("--step", type=int, nargs="+", help="only these steps; default: all")
    parser.add_argument("--records", help="records of the run; default: as in its config.yaml")
    parser.add_argument("--data_root", help="folder of their media; default: as in its config.yaml")
    parser.add_argument("--out", help="page to write; default: rollouts.html beside the file")
    args = parser.parse_args(argv)
    path = Path(args.file)
    rows = shared.read_log(path, NEEDED)
    chosen = [row for row in rows if not args.step or row["step"] in args.step]
    if not chosen:
        steps = f"it holds steps {rows[0]['step']} to {rows[-1]['step']}"
        raise UserError(f"{path}: no rollouts of step {', '.join(map(str, args.step))}; {steps}")
    cfg = run_config(path.parent, args.records, args.data_root)
    out = args.out or path.with_suffix(".html")
    words = {"group": "step", "kind": "problem type", "item": "prompt"}
    report.write_page(out, f"Rollouts of {path.parent}", words, prompt_cards(chosen, cfg), cfg, vars(cfg))
    print(f"page: {out}")


if __name__ == "__main__":
    main()
