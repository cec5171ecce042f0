"""Draws docs/method.png, one prompt of one step of T-GRPO, from what `python toy.py` left in runs/toy. Nothing in it is made up.

python docs/picture.py [--run runs/toy] [--step 12]
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

import data
from rewards import CORRECT, accuracy_reward, temporal_reward
from settings import SharedConfig, read_jsonl
from tgrpo import group_advantages

RIGHT, WRONG = "#2a7d46", "#b3402e"


def choose(rows, records, step):
    """The first group from `step` on that shows the idea: a lying background, p > p̃ > 0 by a quarter, and some completions wrong."""
    for now in sorted({r["step"] for r in rows if r["step"] >= step}):
        for problem_id in dict.fromkeys(r["problem_id"] for r in rows if r["step"] == now):
            group = [r for r in rows if (r["step"], r["problem_id"]) == (now, problem_id)]
            ordered, shuffled = ([r for r in group if r["frames"] == order] for order in ("ordered", "shuffled"))
            record = records[problem_id]
            right = lambda part: [
                accuracy_reward(r["text"], record["solution"], record["problem_type"]) > CORRECT for r in part
            ]
            p, q = (sum(right(part)) / max(1, len(part)) for part in (ordered, shuffled))
            if record["cue"] == "lies" and 0 < q <= p - 0.25 and p < 1:
                return now, record, ordered, right(ordered), shuffled, right(shuffled)
    sys.exit("no group from this step on shows the idea; try another --step")


def draw(run, step, path):
    records = {r["problem_id"]: r for r in json.loads((run / "world/rl.json").read_text(encoding="utf-8"))}
    now, record, ordered, right_G, shuffled, right_S = choose(read_jsonl(run / "tgrpo/rollouts.jsonl"), records, step)
    frames, _ = data.load_media(record, SharedConfig(data_root=str(run / "world"), max_frames=8))
    p, q = np.mean(right_G), np.mean(right_S)
    r_t = temporal_reward(p, q)
    rewards_G = torch.tensor([r["accuracy"] + r["format"] + r["length"] for r in ordered], dtype=torch.float64)
    grpo_G = group_advantages(rewards_G)

    figure = plt.figure(figsize=(13, 6.4))
    figure.text(
        0.5,
        0.965,
        f"{record['problem']}   {'   '.join(record['options'])}   (truth: {record['solution'][8]})",
        ha="center",
        fontsize=13,
        weight="bold",
    )
    for x, order, group, right, title in (
        (0.03, range(8), ordered, right_G, "G = 8 completions, frames in order"),
        (
            0.535,
            shuffled[0]["frame_order"],
            shuffled,
            right_S,
            "S = 4 completions, frames shuffled (only asked, never trained)",
        ),
    ):
        figure.text(x, 0.905, title, fontsize=11.5)
        axis = figure.add_axes((x, 0.765, 0.435, 0.125))
        axis.imshow(
            np.concatenate([np.pad(frames[i], ((0, 0), (0, 3), (0, 0)), constant_values=255) for i in order], 1)
        )
        axis.axis("off")
        for i, (r, ok) in enumerate(zip(group, right)):
            thought = re.sub(r"</?think>", "", r["text"].split("\n")[0])
            answer = r["text"].split("<answer>")[-1].split("</answer>")[0]
            y = 0.725 - 0.047 * i
            figure.text(x, y, f"{thought}  → {answer}", fontsize=8.7, color=RIGHT if ok else WRONG)
            figure.text(
                x + 0.438, y, "right" if ok else "wrong", fontsize=8.7, color=RIGHT if ok else WRONG, ha="right"
            )
    figure.text(0.03, 0.315, f"p = {sum(right_G)}/{len(right_G)}", fontsize=13)
    figure.text(0.535, 0.315, f"p̃ = {sum(right_S)}/{len(right_S)}", fontsize=13)
    figure.text(
        0.5,
        0.225,
        f"the temporal term, for the correct ones in order:   r_t = α (p − p̃) = 0.3 × ({p:g} − {q:g}) = {r_t:g}",
        ha="center",
        fontsize=13,
    )
    lines = [("advantage, correct", right_G.index(True), True), ("advantage, wrong", right_G.index(False), False)]
    for i, (label, g, ok) in enumerate(lines):
        value = grpo_G[g].item()
        figure.text(
            0.5,
            0.15 - 0.06 * i,
            f"{label}:   {value:+.2f} (GRPO)" + (f"  + {r_t:g}  =  {value + r_t:+.2f}" if ok else "   unchanged"),
            ha="center",
            fontsize=12,
            color=RIGHT if ok else WRONG,
        )
    figure.text(
        0.5,
        0.022,
        f"step {now} of the toy run; the background says {'A' if record['solution'][8] == 'B' else 'B'}, and lies. "
        "Advantages are those of the first correct and the first wrong completion.",
        ha="center",
        fontsize=9,
        color="gray",
    )
    figure.savefig(path, dpi=110)
    print(f"{path}: step {now}, problem {record['problem_id']}, p {p:g}, p̃ {q:g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path(__file__).parent.parent / "runs/toy")
    parser.add_argument("--step", type=int, default=12, help="look from this step on")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "method.png")
    args = parser.parse_args()
    draw(args.run, args.step, args.out)
