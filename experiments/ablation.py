"""Which completions should get the temporal reward? Twelve ways of rewarding, many seeds, a tiny world with a shortcut.

    python -m experiments.ablation                # seeds 0 to 20, 2 processes at a time; see README.md for the time
    python -m experiments.ablation --world object --seeds 0 1 2 3 4 --arms grpo credit credit_shuffled credit_noise

What is finished is not run again. Each seed has its own world (worlds.py) and its own SFT model. If the SFT model fails
its check, the seed is listed and left out; the check uses nothing from RL. Every arm starts from the same SFT model and
sees the same prompts. Writes WORLD.json (all numbers), WORLD.md (the tables), WORLD.png and WORLD_farming.png into
runs/ablation.
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

from experiments.two_rationales import MEASURES, check_sft, reinforce, scores, stop_stages_on_sigterm, train_sft
from experiments.worlds import WORLDS
from support.settings import UserError
from support.storage import read_jsonl, write_atomic
from support.tables import table
from tools.plot import save_figure
from toy import ROOT


@dataclass
class Arm:
    """One way of rewarding. `settings` are those of tgrpo.py; `variant` is one of variants.VARIANTS, or empty."""

    label: str
    settings: tuple
    colour: str
    variant: str = ""


# the rule of configs/credit.yaml
CREDIT = ("--temporal_rule", "credit", "--temporal_target", "reward", "--advantage_std", "none")
CREDIT += ("--alpha", 1, "--shuffled_generations", 0)
TARO = ("--temporal_rule", "credit", "--temporal_target", "reward", "--credit_shuffles", 1)
TARO += ("--shuffled_generations", 0)
PUBLISHED = ("--temporal_rule", "paper", "--temporal_target", "reward")
MARGIN = ("--temporal_target", "reward", "--alpha", 1, "--advantage_std", "none")
ARMS = {
    "grpo": Arm("GRPO, group std", ("--temporal_rule", "none"), "tab:gray"),
    "grpo_no_std": Arm("GRPO, no std", ("--temporal_rule", "none", "--advantage_std", "none"), "black"),
    "published": Arm("T-GRPO as published", PUBLISHED, "tab:orange"),
    "published_gdpo": Arm("T-GRPO as published, GDPO", PUBLISHED, "tab:brown", "gdpo"),
    "margin_advantage": Arm("T-GRPO, in the advantage (default)", (), "tab:red"),
    "margin_no_std": Arm("T-GRPO, in the reward, α = 1, no std", MARGIN, "tab:pink"),
    "taro": Arm("TaRO's reward", TARO, "tab:purple", "taro"),
    "credit": Arm("credit", CREDIT, "tab:blue"),
    "credit_k1": Arm("credit, K = 1", (*CREDIT, "--credit_shuffles", 1), "deepskyblue"),
    "credit_relative": Arm("credit, relative to the largest", CREDIT, "navy", "relative"),
    "credit_shuffled": Arm("shuffled credit", CREDIT, "tab:cyan", "shuffled"),
    "credit_noise": Arm("noise of equal mean and spread", CREDIT, "tab:green", "noise"),
}
# metrics that are kept for each step of RL
STEPS = ("temporal/credit_correct", "temporal/credit_wrong", "temporal/credit_clamped", "completion/length")
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom
T_QUANTILES = [
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
]


# --------------------------------------------------------------------------------------------------------- the runs


def run_sft(folder, world, seed):
    """World and SFT model of one seed. Returns its results, which are also kept in folder/sft.json."""
    result_file = folder / "sft.json"
    if not result_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        train_sft(folder, world, seed, folder / "log.txt")
        measured, faults = check_sft(folder, world)
        result = {"seed": seed, "check": measured, "faults": faults, "sft": scores(folder, world, "sft")}
        write_atomic(result_file, json.dumps(result))
    return json.loads(result_file.read_text(encoding="utf-8"))


def run_arm(folder, world, seed, name):
    """One arm of one seed. Returns its results, which are also kept in folder/NAME.json."""
    result_file = folder / f"{name}.json"
    if not result_file.exists():
        arm = ARMS[name]
        reinforce(folder, world, seed, name, arm.settings, arm.variant, folder / f"{name}.log")
        result = {"arm": described(arm)} | scores(folder, world, name) | curves(folder, world, name)
        result["credit"] = credit_of_reasons(folder, world, name)
        write_atomic(result_file, json.dumps(result))
    return read_arm(result_file, name)


def described(arm):
    """What a result is kept with, so that one of an earlier definition of the arm is noticed."""
    return " ".join(map(str, [*arm.settings, *(["--variant", arm.variant] if arm.variant else [])]))


def read_arm(file, name):
    result = json.loads(file.read_text(encoding="utf-8"))
    if result["arm"] != described(ARMS[name]):
        raise UserError(f"{file}: of the settings {result['arm']!r}, now they are {described(ARMS[name])!r}: remove it")
    return result


def curves(folder, world, name):
    """What one run of RL logged: {"steps": {name: a list with one value per step}}.

    names_shortcut: share of the sampled completions whose reason is the shortcut. The others are metrics of tgrpo.py.
    """
    texts = {}
    for row in read_jsonl(folder / name / "rollouts.jsonl"):
        if row["frames"] == "ordered":
            texts.setdefault(row["step"], []).append(row["text"])
    steps = {"names_shortcut": []}
    for step in sorted(texts):
        steps["names_shortcut"].append(np.mean([world.names_shortcut(text) for text in texts[step]]))
    metrics = read_jsonl(folder / name / "metrics.jsonl")
    for metric in STEPS:
        if metric in metrics[0]:
            steps[metric] = [row.get(metric) for row in metrics]
    rounded = {}
    for metric, values in steps.items():
        rounded[metric] = [None if value is None else float(f"{value:.3g}") for value in values]
    return {"steps": rounded}


def credit_of_reasons(folder, world, name):
    """Mean credit, in nats, of the correct completions of the first ten steps: {"skill": ..., "shortcut": ...}.

    A reason without a correct completion, or an arm without credits, is left out.
    """
    credits = {"skill": [], "shortcut": []}
    for row in read_jsonl(folder / name / "rollouts.jsonl"):
        if row.get("credit") is None:
            continue
        if row["step"] < 10 and row["accuracy"] > 0.5:
            credits["shortcut" if world.names_shortcut(row["text"]) else "skill"].append(row["credit"])
    return {reason: statistics.fmean(values) for reason, values in credits.items() if values}


def collect(out, arms):
    """Results of all seeds, in their order, with those of these arms that are finished."""
    results = []
    for folder in sorted(out.glob("seed*"), key=lambda folder: int(folder.name.removeprefix("seed"))):
        if not (folder / "sft.json").exists():
            continue
        result = json.loads((folder / "sft.json").read_text(encoding="utf-8")) | {"arms": {}}
        for name in arms:
            if (folder / f"{name}.json").exists():
                result["arms"][name] = read_arm(folder / f"{name}.json", name)
        if result["arms"] or result["faults"]:
            results.append(result)
    return results


def passed(results):
    """Results of the seeds whose SFT model passed its check."""
    return [r for r in results if not r["faults"]]


def arms_of(results):
    """Names of the arms that some seed has, in the order of ARMS."""
    return [name for name in ARMS if any(name in r["arms"] for r in results)]


def of_arm(results, name):
    """The results of one arm, of the seeds that have it."""
    return [r["arms"][name] for r in results if name in r["arms"]]


# ------------------------------------------------------------------------------------------------------- the tables


def mean_interval(values):
    """(mean, half the width of its 95 % interval by Student's t; NaN for one or two values).

    Two values would give an interval 13 times as wide as their standard error, which says nothing. From 31 degrees of
    freedom on the quantile of 30 is used, which makes the interval slightly too wide.

    >>> mean, half = mean_interval([0.0, 1.0] * 5)
    >>> mean, round(half, 3)
    (0.5, 0.377)
    """
    n = len(values)
    if n < 3:
        return statistics.fmean(values), math.nan
    t = T_QUANTILES[min(n - 1, 30) - 1]
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n)


def cell(values, scale=100, digits=0):
    """Mean and interval as text, in percent or another scale; without an interval for one or two values."""
    mean, half = mean_interval(values)
    interval = "" if math.isnan(half) else f" ± {scale * half:.{digits}f}"
    return f"{scale * mean:.{digits}f}{interval}"


def results_table(valid):
    """The results of each arm, one row per arm."""

    def row(label, finished):
        cells = []
        for column in MEASURES:
            cells.append(cell([scores[column] for scores in finished]))
        return [label, *cells, len(finished)]

    rows = [row("SFT model", [r["sft"] for r in valid])]
    for name in arms_of(valid):
        rows.append(row(ARMS[name].label, of_arm(valid, name)))
    return table(["", *MEASURES.values(), "seeds"], rows)


def differences_table(valid):
    """Paired differences: credit minus each other arm, over the seeds that have both."""
    columns = ("ordered", "conflict", "conflict_sampled")
    rows = []
    for name in arms_of(valid):
        both = [r["arms"] for r in valid if name in r["arms"] and "credit" in r["arms"]]
        if name == "credit" or not both:
            continue
        cells = []
        for column in columns:
            cells.append(cell([arms["credit"][column] - arms[name][column] for arms in both]))
        rows.append([ARMS[name].label, *cells, len(both)])
    return table(["", *(MEASURES[column] for column in columns), "seeds"], rows)


def tables(results):
    """The results as Markdown: means with intervals, paired differences, and the seeds that were left out."""
    valid = passed(results)
    paragraphs = [
        "Test clips, percent; mean over the seeds that have the arm, and half of its 95 % interval (Student's t).",
        results_table(valid),
    ]
    if of_arm(valid, "credit"):
        paragraphs += ["Paired differences, credit minus the other, in points:", differences_table(valid)]
    credits = [scores["credit"] for scores in of_arm(valid, "credit") if len(scores["credit"]) == 2]
    if credits:
        means = []
        for reason in ("skill", "shortcut"):
            mean = cell([credit[reason] for credit in credits], scale=1, digits=2)
            means.append(f"{mean} with the {reason}")
        paragraphs.append(
            f"Credit of correct completions in the first ten steps, in nats: {', '.join(means)} as reason."
        )
    for r in results:
        if r["faults"]:
            paragraphs.append(
                f"Left out: seed {r['seed']}, whose SFT model failed its check ({'; '.join(r['faults'])})."
            )
    return "\n\n".join(paragraphs) + "\n"


# ----------------------------------------------------------------------------------------------------- the pictures


def start_figure(rows, columns, size, **settings):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **settings)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def mean_curve(valid, arm, metric):
    """Mean over the seeds of a metric at each step of RL; NaN where no seed has it."""
    values = np.array([scores["steps"][metric] for scores in of_arm(valid, arm)], dtype=float)
    with np.errstate(all="ignore"):
        counts = np.isfinite(values).sum(0)
        return np.nansum(values, 0) / np.where(counts, counts, np.nan)


def plot(results, path):
    """How many completions name the shortcut over the steps of RL; test accuracies, one dot per seed."""
    valid = passed(results)
    arms = arms_of(valid)
    figure, (axes,) = start_figure(1, 4, (15, 6.5), width_ratios=(1.8, 1, 1, 1))
    for name in arms:
        axes[0].plot(mean_curve(valid, name, "names_shortcut"), color=ARMS[name].colour, label=ARMS[name].label)
    axes[0].set(title="completions that name the shortcut\n(sampled in RL, mean of seeds)")
    axes[0].set(xlabel="step of RL", ylabel="share", ylim=(-0.02, 1.02))
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)

    panels = {
        "ordered": "accuracy,\nframes in order",
        "conflict": "accuracy,\nmisleading shortcut",
        "gap": "accuracy in order\nminus shuffled",
    }
    for axis, (column, title) in zip(axes[1:], panels.items()):
        for y, name in enumerate(reversed(arms)):
            values = [scores[column] for scores in of_arm(valid, name)]
            heights = y + np.linspace(-0.25, 0.25, len(values))
            axis.plot(values, heights, "o", color=ARMS[name].colour, alpha=0.5, markersize=4)
            axis.plot(np.mean(values), y, "|", color=ARMS[name].colour, markersize=20, markeredgewidth=3)
        axis.set(title=title, yticks=range(len(arms)), yticklabels=[], xlim=(-0.07, 1.03))
    axes[1].set_yticklabels([ARMS[name].label for name in reversed(arms)])
    figure.suptitle(f"up to {len(valid)} seeds, test clips, greedy. Dots: one seed; bars: the mean", fontsize=10)
    save_figure(figure, path)


def plot_farming(results, path):
    """Does order-dependent text pay by itself? Credit of correct and of wrong completions, and their length."""
    valid = passed(results)
    arms = arms_of(valid)
    panels = {
        "temporal/credit_correct": "credit of correct completions, nats",
        "temporal/credit_wrong": "credit of wrong completions, nats",
        "temporal/credit_clamped": "share of correct ones with 1 nat or more",
        "completion/length": "length of a completion, tokens",
    }
    figure, (axes,) = start_figure(1, 4, (15, 5))
    for axis, (metric, title) in zip(axes, panels.items()):
        for name in arms:
            # TaRO's credit is per token
            if metric in of_arm(valid, name)[0]["steps"] and (name != "taro" or metric == "completion/length"):
                axis.plot(mean_curve(valid, name, metric), color=ARMS[name].colour, label=ARMS[name].label)
        axis.set(title=title, xlabel="step of RL")
    handles, labels = axes[3].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(f"sampled in RL, mean of up to {len(valid)} seeds", fontsize=10)
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------------ main


def ablate(out, world_name, seeds, arms, jobs):
    """Run what is missing, `jobs` processes at a time, and write the results of the finished seeds."""
    world = WORLDS[world_name]
    folders = {seed: out / world_name / f"seed{seed}" for seed in seeds}

    def sft(seed):
        return run_sft(folders[seed], world, seed)

    def arm(job):
        seed, name = job
        run_arm(folders[seed], world, seed, name)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            checked = list(tqdm(pool.map(sft, seeds), total=len(seeds), desc="SFT", unit="seed"))
            todo = [(result["seed"], name) for result in checked if not result["faults"] for name in arms]
            for _ in tqdm(pool.map(arm, todo), total=len(todo), desc="RL", unit="arm"):
                pass
        except (KeyboardInterrupt, SystemExit) as stop:
            pool.shutdown(cancel_futures=True)
            message = f"{stop}\nstopped; the same command continues from here. See the logs in {out / world_name}"
            raise SystemExit(message) from stop
    report(out, world_name, arms)


def report(out, world_name, arms):
    """Write the tables, the numbers and the figures of all finished seeds."""
    results = collect(out / world_name, arms)
    if not passed(results):
        raise SystemExit(f"no finished seed passed the check of its SFT model: see {out / world_name}/seed*/sft.json")
    write_atomic(out / f"{world_name}.json", json.dumps(results))
    write_atomic(out / f"{world_name}.md", tables(results))
    plot(results, out / f"{world_name}.png")
    plot_farming(results, out / f"{world_name}_farming.png")
    print(f"\n{tables(results)}\nplots: {out / world_name}.png, {out / world_name}_farming.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/ablation", help="folder for all results")
    parser.add_argument("--world", choices=WORLDS, default="background", help="default: background")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(21)), help="default: 0 to 20")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes that train at the same time; default: 2")
    parser.add_argument("--report", action="store_true", help="only write the results of what is finished")
    args = parser.parse_args()
    out = args.out.resolve()
    if args.report:
        report(out, args.world, args.arms)
    else:
        stop_stages_on_sigterm()
        ablate(out, args.world, args.seeds, args.arms, args.jobs)


if __name__ == "__main__":
    main()
