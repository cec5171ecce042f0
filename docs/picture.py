"""Draws docs/method.png, one prompt of one step of T-GRPO, from the rollouts that `python toy.py` left in runs/toy.

python docs/picture.py --run runs/toy --step 12    # the first suitable group from step 12 on
"""

import argparse
import json
import sys
import textwrap
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
from rewards import CORRECT, accuracy_reward, temporal_reward
from support.parsing import extract_answer
from support.settings import SharedConfig, UserError
from support.storage import read_jsonl

ROOT = Path(__file__).parent.parent
ALPHA = 0.3
# distinct completions per column, and characters per line of their text
MAX_DISTINCT = 3
WIDTH = 46
CORRECT_COLOUR = "#2a7d46"
WRONG_COLOUR = "#b3402e"


def is_correct(row, record):
    return accuracy_reward(row["text"], record["solution"], record["problem_type"]) > CORRECT


def reason(row):
    """The chain of thought of a completion."""
    return row["text"].split("</think>")[0].removeprefix("<think>").strip()


def reason_agrees(row, record):
    """Whether the chain of thought ends with the option that the completion answers."""
    options = {option[0]: option[3:] for option in record["options"]}
    letter = extract_answer(row["text"])
    return letter in options and reason(row).endswith(f" {options[letter]}.")


def n_distinct(rows):
    return len({row["text"] for row in rows})


def choose(rows, records, first_step):
    """(step, record, ordered rows, shuffled rows) of the first group from this step on that shows the idea.

    The order of the frames helps (p > p̃ > 0, by at least 1/4), one ordered completion is wrong, all reasons agree with
    their answers, and the distinct completions fit into the picture. Raises UserError if there is no such group.
    """
    groups = {}
    for row in rows:
        if row["step"] >= first_step:
            groups.setdefault((row["step"], row["problem_id"]), []).append(row)
    for (step, problem_id), group in groups.items():
        record = records[problem_id]
        ordered = [row for row in group if row["frames"] == "ordered"]
        shuffled = [row for row in group if row["frames"] == "shuffled"]
        if not shuffled or not all(reason_agrees(row, record) for row in group):
            continue
        if max(n_distinct(ordered), n_distinct(shuffled)) > MAX_DISTINCT:
            continue
        p = np.mean([is_correct(row, record) for row in ordered])
        p_shuffled = np.mean([is_correct(row, record) for row in shuffled])
        if 0 < p_shuffled <= p - 0.25 and p < 1:
            return step, record, ordered, shuffled
    raise UserError(f"no group from step {first_step} on shows the idea; try another --step")


def draw_column(figure, x, title, frames, order, rows, record):
    """One strip of numbered frames, in this order, and below it the distinct completions with their counts."""
    figure.text(x, 0.845, title, fontsize=15, weight="bold")
    for position, i in enumerate(order):
        axis = figure.add_axes((x + 0.055 * position, 0.72, 0.052, 0.105))
        axis.imshow(frames[i])
        axis.axis("off")
        axis.set_title(str(i + 1), fontsize=12, y=-0.52)
    counts = Counter((is_correct(row, record), reason(row), extract_answer(row["text"])) for row in rows)
    # correct completions first, then the most frequent ones
    ranked = sorted(counts, key=lambda completion: (completion[0], counts[completion]), reverse=True)
    for i, completion in enumerate(ranked):
        correct, thought, letter = completion
        text = textwrap.fill(f"{thought} → {letter}", WIDTH)
        colour = CORRECT_COLOUR if correct else WRONG_COLOUR
        y = 0.635 - 0.115 * i
        figure.text(x, y, f"{counts[completion]} {'✓' if correct else '✗'}", fontsize=15, color=colour, va="top")
        figure.text(x + 0.052, y, text, fontsize=13, color=colour, va="top")


def draw(step, record, frames, ordered, shuffled, path):
    right = [is_correct(row, record) for row in ordered]
    right_shuffled = [is_correct(row, record) for row in shuffled]
    p = f"{sum(right)}/{len(right)}"
    p_shuffled = f"{sum(right_shuffled)}/{len(right_shuffled)}"
    bonus = temporal_reward(np.mean(right), np.mean(right_shuffled), ALPHA)

    figure = plt.figure(figsize=(10, 5.5))
    question = f"{record['problem']}   {'   '.join(record['options'])}   (truth: {extract_answer(record['solution'])})"
    figure.text(0.5, 0.93, question, fontsize=16, ha="center")
    draw_column(figure, 0.02, "Frames in order", frames, range(len(frames)), ordered, record)
    draw_column(figure, 0.515, "Frames shuffled", frames, shuffled[0]["frame_order"], shuffled, record)
    figure.text(0.25, 0.235, f"p = {p} correct", fontsize=16, ha="center")
    figure.text(0.75, 0.235, f"p̃ = {p_shuffled} correct", fontsize=16, ha="center")
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.axis("off")
    canvas.set(xlim=(0, 1), ylim=(0, 1))
    canvas.annotate("", (0.5, 0.17), (0.5, 0.285), arrowprops=dict(arrowstyle="-|>", linewidth=2.5, color="black"))
    formula = f"r = α (p − p̃) = {ALPHA} × ({p} − {p_shuffled}) = {bonus:.2f}"
    figure.text(0.5, 0.1, formula, fontsize=18, ha="center", weight="bold")
    target = "is added to the advantage of every correct completion with the frames in order"
    figure.text(0.5, 0.035, target, fontsize=14, ha="center")
    figure.savefig(path, dpi=160)
    plt.close(figure)
    print(f"{path}: step {step}, problem {record['problem_id']}, p {np.mean(right):g}, p̃ {np.mean(right_shuffled):g}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/toy", help="folder that toy.py wrote")
    parser.add_argument("--step", type=int, default=12, help="look from this step on")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/method.png")
    args = parser.parse_args()
    records = json.loads((args.run / "world/rl.json").read_text(encoding="utf-8"))
    records = {record["problem_id"]: record for record in records}
    step, record, ordered, shuffled = choose(read_jsonl(args.run / "tgrpo/rollouts.jsonl"), records, args.step)
    frames, _ = data.load_media(record, SharedConfig(data_root=str(args.run / "world"), max_frames=8))
    draw(step, record, frames, ordered, shuffled, args.out)


if __name__ == "__main__":
    main()
