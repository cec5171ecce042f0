"""Which completions should get the temporal reward? Seven ways of rewarding, many seeds, a tiny world with a shortcut.

    python -m experiments.ablation                # 10 seeds, 2 at a time; about 9 minutes per seed and core
    python -m experiments.ablation --seeds 20     # finished seeds are not run again

Each seed has its own world of two rationales (two_rationales.py) and its own SFT model. If the SFT model fails its
check, the seed is listed and left out; the check uses nothing from RL. Every arm starts from the same SFT model and
sees the same prompts. Writes ablation.json (all numbers), ablation.md (the tables) and ablation.png into runs/ablation.
"""

import argparse
import json
import math
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from experiments.two_rationales import MEASURES, check_sft, is_static, reinforce, scores, train_sft
from settings import print_utf8, read_jsonl, table, write_atomic
from tools.plot import save_figure
from toy import ROOT


@dataclass
class Arm:
    """One way of rewarding. `settings` are those of tgrpo.py; `control` is one of controls.CONTROLS, or empty."""

    label: str
    settings: tuple
    colour: str
    control: str = ""


# the rule of configs/credit.yaml
CREDIT = ("--temporal_rule", "credit", "--temporal_target", "reward", "--advantage_std", "none")
CREDIT += ("--alpha", 1, "--shuffled_generations", 0)
ARMS = {
    "grpo": Arm("GRPO, group std", ("--temporal_rule", "none"), "tab:gray"),
    "grpo_no_std": Arm("GRPO, no std", ("--temporal_rule", "none", "--advantage_std", "none"), "black"),
    "margin_reward": Arm("T-GRPO, in the reward (published)", ("--temporal_target", "reward"), "tab:orange"),
    "margin_advantage": Arm("T-GRPO, in the advantage (default)", (), "tab:red"),
    "credit": Arm("credit", CREDIT, "tab:blue"),
    "credit_shuffled": Arm("shuffled credit", CREDIT, "tab:cyan", control="shuffled"),
    "credit_noise": Arm("noise of equal mean and spread", CREDIT, "tab:green", control="noise"),
}
COLUMNS = MEASURES | {"seconds": "seconds per step"}
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom
T_QUANTILES = [
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
]


# --------------------------------------------------------------------------------------------------------- the runs


def run_seed(out, seed):
    """Run all arms of one seed in out/seedN. Returns the results, which are also kept in result.json there."""
    folder = out / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    result_file = folder / "result.json"
    if result_file.exists():
        result = json.loads(result_file.read_text(encoding="utf-8"))
        if result["faults"] or ARMS.keys() <= result["arms"].keys():
            return result
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        train_sft(folder, seed, log)
        measured, faults = check_sft(folder)
        result = {"seed": seed, "check": measured, "faults": faults}
        if not faults:
            result["sft"] = scores(folder, "sft")
            result["arms"] = {}
            for name, arm in ARMS.items():
                reinforce(folder, seed, name, arm.settings, arm.control, log)
                result["arms"][name] = scores(folder, name) | curves(folder, name)
    write_atomic(result_file, json.dumps(result))
    return result


def curves(folder, name):
    """Lists with one value per step of RL: share of background reasons, accuracy, accuracy on misleading backgrounds.

    A step without a misleading background has None. `seconds` is the median time of a step.
    """
    records = json.loads((folder / "world/rl.json").read_text(encoding="utf-8"))
    misleading = {record["problem_id"] for record in records if record["cue"] == "misleads"}
    steps = {}
    for row in read_jsonl(folder / name / "rollouts.jsonl"):
        if row["frames"] == "ordered":
            steps.setdefault(row["step"], []).append(row)
    result = {"static_steps": [], "accuracy_steps": [], "conflict_steps": []}
    for _, rows in sorted(steps.items()):
        conflict = [row for row in rows if row["problem_id"] in misleading]
        result["static_steps"].append(rounded_mean([is_static(row["text"]) for row in rows]))
        result["accuracy_steps"].append(rounded_mean([row["accuracy"] for row in rows]))
        result["conflict_steps"].append(rounded_mean([row["accuracy"] for row in conflict]))
    metrics = read_jsonl(folder / name / "metrics.jsonl")
    result["seconds"] = statistics.median(row["time/rollout"] + row["time/update"] for row in metrics)
    return result


def rounded_mean(values):
    return round(float(np.mean(values)), 4) if values else None


# ------------------------------------------------------------------------------------------------------- the tables


def mean_interval(values):
    """(mean, half the width of its 95 % interval by Student's t; NaN for one value).

    From 31 degrees of freedom on the quantile of 30 is used, which makes the interval slightly too wide.

    >>> mean, half = mean_interval([0.0, 1.0] * 5)
    >>> mean, round(half, 3)
    (0.5, 0.377)
    """
    n = len(values)
    if n < 2:
        return statistics.fmean(values), math.nan
    t = T_QUANTILES[min(n - 1, 30) - 1]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)


def cell(values, column):
    """Mean and interval as text: in percent, or in seconds."""
    mean, half = mean_interval(values)
    if column == "seconds":
        return f"{mean:.2f} ± {half:.2f}"
    return f"{100 * mean:.0f} ± {100 * half:.0f}"


def results_table(valid):
    """The results of each arm, one row per arm."""
    sft = [cell([r["sft"][name] for r in valid], name) for name in MEASURES]
    rows = [["SFT model", *sft, "", ""]]
    for name, arm in ARMS.items():
        cells = [cell([r["arms"][name][column] for r in valid], column) for column in COLUMNS]
        escaped = sum(r["arms"][name]["conflict"] > 0.5 for r in valid)
        rows.append([arm.label, *cells, f"{escaped} of {len(valid)}"])
    return table(["", *COLUMNS.values(), "escaped"], rows)


def differences_table(valid):
    """Paired differences per seed: credit minus each other arm."""
    columns = ("ordered", "conflict", "conflict_sampled")
    rows = []
    for name, arm in ARMS.items():
        if name == "credit":
            continue
        cells = []
        for column in columns:
            differences = [r["arms"]["credit"][column] - r["arms"][name][column] for r in valid]
            cells.append(cell(differences, column))
        rows.append([arm.label, *cells])
    return table(["", *(MEASURES[column] for column in columns)], rows)


def tables(results):
    """The results as Markdown: means with intervals, paired differences, and the seeds that were left out."""
    valid = [r for r in results if not r["faults"]]
    paragraphs = [
        f"{len(valid)} seeds; test clips, percent (seconds in the column 'seconds per step'); mean ± half of its 95 % "
        "interval over seeds (Student's t). Escaped: seeds with more than half right on misleading backgrounds.",
        results_table(valid),
        "Paired differences, credit minus the other, in points:",
        differences_table(valid),
    ]
    for r in results:
        if r["faults"]:
            paragraphs.append(
                f"Left out: seed {r['seed']}, whose SFT model failed its check ({'; '.join(r['faults'])})."
            )
    return "\n\n".join(paragraphs) + "\n"


# ------------------------------------------------------------------------------------------------------ the picture


def plot(results, path):
    """Share of background reasons over the steps of RL; test accuracies and seconds per step, one dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    valid = [r for r in results if not r["faults"]]
    figure, axes = plt.subplots(1, 5, figsize=(15, 5), width_ratios=(1.5, 1, 1, 1, 1), layout="constrained")
    for name, arm in ARMS.items():
        shares = np.array([r["arms"][name]["static_steps"] for r in valid])
        axes[0].plot(shares.T, color=arm.colour, alpha=0.12, linewidth=0.8)
        axes[0].plot(shares.mean(0), color=arm.colour, linewidth=2.5, label=arm.label)
    title = "completions that reason with\nthe background (sampled in RL)"
    axes[0].set(title=title, xlabel="step of RL", ylabel="share", ylim=(-0.02, 1.02))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)

    panels = {
        "ordered": "accuracy,\nframes in order",
        "conflict": "accuracy,\nmisleading background",
        "gap": "accuracy in order\nminus shuffled",
        "seconds": "seconds per step",
    }
    for axis, (column, title) in zip(axes[1:], panels.items()):
        for y, (name, arm) in enumerate(reversed(ARMS.items())):
            values = [r["arms"][name][column] for r in valid]
            heights = y + np.linspace(-0.25, 0.25, len(values))
            axis.plot(values, heights, "o", color=arm.colour, alpha=0.5, markersize=4)
            axis.plot(np.mean(values), y, "|", color=arm.colour, markersize=24, markeredgewidth=3)
        axis.set(title=title, yticks=range(len(ARMS)), yticklabels=[])
        axis.set_xlim(*((0, None) if column == "seconds" else (-0.07, 1.03)))
    axes[1].set_yticklabels([arm.label for arm in reversed(ARMS.values())])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{len(valid)} seeds, test clips, greedy. Thin lines and dots: one seed; thick lines and bars: the mean",
        fontsize=10,
    )
    save_figure(figure, path)
    plt.close(figure)


def ablate(out, seeds, jobs):
    """Run what is missing of all seeds, `jobs` at a time. After each seed, write the results so far."""
    pool = ThreadPoolExecutor(jobs)
    results = []
    try:
        runs = pool.map(lambda seed: run_seed(out, seed), range(seeds))
        for result in tqdm(runs, total=seeds, desc="ablation", unit="seed"):
            results.append(result)
            if any(not r["faults"] for r in results):
                write_atomic(out / "ablation.json", json.dumps(results))
                write_atomic(out / "ablation.md", tables(results))
                plot(results, out / "ablation.png")
    except (KeyboardInterrupt, SystemExit) as stop:
        pool.shutdown(cancel_futures=True)
        message = f"{stop}\nstopped; the same command continues from here. See {out}/seed*/log.txt"
        raise SystemExit(message) from stop
    if not any(not r["faults"] for r in results):
        raise SystemExit(f"no seed passed the check of its SFT model: see {out}/seed*/result.json")
    print(f"\n{tables(results)}\nplot: {out / 'ablation.png'}")


def main():
    print_utf8()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/ablation", help="folder for all results")
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds, starting at 0; default: 10")
    parser.add_argument(
        "--jobs", type=int, default=2, help="seeds that run at the same time, one core each; default: 2"
    )
    args = parser.parse_args()
    ablate(args.out.resolve(), args.seeds, args.jobs)


if __name__ == "__main__":
    main()
