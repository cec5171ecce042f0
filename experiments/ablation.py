"""Which completions should get the temporal reward? Eleven ways of rewarding, a tiny world with a shortcut.

    python -m experiments.ablation                                  # seeds 0 to 20; see README.md for the time
    python -m experiments.ablation --seeds 2 3 --arms grpo credit   # a part of it
    python -m experiments.ablation --seeds                          # only the tables of what is finished

What is finished is not run again. Each seed has its own world (world.py) and SFT model; every arm starts from it and
sees the same prompts. A seed whose SFT model fails its check is listed and left out. Writes background.json (numbers)
and background.md (tables). Two processes with different seeds may share the folder.
"""

import argparse
import json
import math
import signal
import statistics
from dataclasses import dataclass
from pathlib import Path

from experiments.world import RULES, names_shortcut
from support.settings import UserError
from support.storage import read_jsonl, write_atomic
from support.tables import table
from support.tiny_model import make_model
from toy import ROOT, launch, make_world, stage


@dataclass
class Arm:
    """One way of rewarding. `settings` are those of tgrpo.py; `variant` is one of variants.VARIANTS, or empty."""

    label: str
    variant: str = ""
    settings: tuple = ()


NO_STD = ("--advantage_std", "none")
PUBLISHED = ("--temporal_rule", "paper", "--temporal_target", "reward")
MARGIN = ("--temporal_target", "reward", "--alpha", 1, *NO_STD)
ARMS = {
    "grpo": Arm("GRPO, group std", settings=("--temporal_rule", "none")),
    "grpo_no_std": Arm("GRPO, no std", settings=("--temporal_rule", "none", *NO_STD)),
    "published": Arm("T-GRPO as published", settings=PUBLISHED),
    "published_gdpo": Arm("T-GRPO as published, GDPO", "gdpo", PUBLISHED),
    "margin_advantage": Arm("T-GRPO, in the advantage (default)"),
    "margin_no_std": Arm("T-GRPO, in the reward, α = 1, no std", settings=MARGIN),
    "taro": Arm("TaRO's reward", "taro"),
    "credit": Arm("credit", "credit"),
    "credit_k1": Arm("credit, K = 1", "credit", ("--credit_shuffles", 1)),
    "credit_shuffled": Arm("shuffled credit", "shuffled"),
    "credit_noise": Arm("noise of equal mean and spread", "noise"),
}
# the columns of the results, as `scores` returns them
MEASURES = {
    "ordered": "frames in order",
    "conflict": "misleading shortcut",
    "gap": "gap",
    "conflict_sampled": "misleading shortcut, sampled",
    "names_shortcut": "names the shortcut",
}
# the first part of SFT runs until the model reaches this accuracy, but at most so many times
SKILL = 0.9
MAX_SKILL_PARTS = 4
# The check samples so many times. Of one sample only about 110 answers use the skill: chance would decide what passes.
CHECKS = 4
# what an SFT model must reach: see check_sft
BOUNDS = {
    "skill": (SKILL, 1.0),
    "shortcut_share": (0.4, 0.8),
    "skill_right": (0.57, 1.0),
    "shortcut_followed": (0.5, 1.0),
}
# settings of evaluate.py, for greedy and for sampled answers
BOTH_ORDERS = ("--orders", "ordered", "shuffled")
SAMPLED = ("--temperature", 1, "--orders", "ordered")
# 97.5 % quantiles of Student's t for 1 to 20 degrees of freedom
T_QUANTILES = [
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
]


# -------------------------------------------------------------------------------------------------- the runs of a seed


def evaluate(out, seed, model, name, settings):
    """Answers of the model `out`/`model` to the test questions, in `out`/eval/`name`."""
    arguments = stage("evaluate.py", out, seed, f"{model}/final", "test.json", f"eval/{name}", *settings)
    launch(arguments, out / f"eval/{name}/summary.json")


def train_sft(out, seed):
    """World, random model, and both parts of SFT; greedy and sampled answers of the SFT model."""
    if not (out / "world").exists():
        make_world(out / "world", seed, n_other=0, rules=RULES)
    if not (out / "base").exists():
        records = json.loads((out / "world/sft.json").read_text(encoding="utf-8"))
        make_model(out / "base", records, seed)
    model = "base"
    for part in range(1, MAX_SKILL_PARTS + 1):
        name = f"skill{part}"
        launch(stage("sft.py", out, seed, model, "skill.json", name), out / name / "final")
        model = f"{name}/final"
        evaluate(out, seed, name, name, ("--orders", "ordered"))
        if accuracy(answers(out, name)) >= SKILL:
            break
    launch(stage("sft.py", out, seed, model, "sft.json", "sft", "--steps", 120, "--lr", 1e-3), out / "sft/final")
    evaluate(out, seed, "sft", "sft", BOTH_ORDERS)
    for i in range(CHECKS):
        evaluate(out, seed + 1000 * i, "sft", f"sft_sampled{i}", SAMPLED)


def reinforce(out, seed, name):
    """50 steps of RL from the SFT model, as the arm `name` does it; greedy and sampled answers."""
    limits = ("--steps", 50, "--save_rollouts", "true", "--save_every", 0, "--num_workers", 1)
    arm = ARMS[name]
    arguments = stage("tgrpo.py", out, seed, "sft/final", "rl.json", name, *limits, *arm.settings)
    if arm.variant:
        arguments = ["-m", "experiments.variants", "--variant", arm.variant, *arguments[1:]]
    launch(arguments, out / name / "final")
    evaluate(out, seed, name, name, BOTH_ORDERS)
    evaluate(out, seed, name, f"{name}_sampled0", SAMPLED)


# ---------------------------------------------------------------------------------------------------- what is measured


def answers(out, name, **fields):
    """Rows of eval/`name`/predictions.jsonl with these fields."""
    rows = read_jsonl(out / f"eval/{name}/predictions.jsonl")
    return [row for row in rows if all(row[field] == value for field, value in fields.items())]


def accuracy(rows):
    """Mean accuracy, 0 to 1; 0 without rows."""
    return statistics.fmean([row["accuracy"] for row in rows]) if rows else 0.0


def check_sft(out):
    """What is wrong with an SFT model, as a list of texts; without a choice to make, RL would show nothing.

    Before the second part it must have the skill (greedy). After it, sampled, it must give both reasons, be right more
    often than by chance with the skill as reason, and follow the shortcut that it gives as reason.
    """
    sampled = []
    for i in range(CHECKS):
        sampled += answers(out, f"sft_sampled{i}")
    shortcut = [row for row in sampled if names_shortcut(row["prediction"])]
    by_skill = [row for row in sampled if not names_shortcut(row["prediction"])]
    agreeing = accuracy([row for row in shortcut if row["cue"] == "agrees"])
    misled = accuracy([row for row in shortcut if row["cue"] == "misleads"])
    measured = {
        "skill": accuracy(answers(out, max(folder.name for folder in (out / "eval").glob("skill*")))),
        "shortcut_share": len(shortcut) / len(sampled),
        "skill_right": accuracy(by_skill),
        "shortcut_followed": agreeing - misled,
    }
    faults = []
    for name, (low, high) in BOUNDS.items():
        if not low <= measured[name] <= high:
            faults.append(f"{name} is {measured[name]:.3f}, not {low} to {high}")
    return faults


def scores(out, name):
    """{measure: 0 to 1} of one model on the test clips.

    gap: accuracy with the frames in order minus with the frames shuffled. names_shortcut: share of the greedy answers
    whose reason is the shortcut; `conflict` shows whether they follow it.
    """
    ordered = answers(out, name, frames="ordered")
    values = {
        "ordered": accuracy(ordered),
        "conflict": accuracy(answers(out, name, frames="ordered", cue="misleads")),
        "gap": accuracy(ordered) - accuracy(answers(out, name, frames="shuffled")),
        "conflict_sampled": accuracy(answers(out, f"{name}_sampled0", cue="misleads")),
        "names_shortcut": statistics.fmean(names_shortcut(row["prediction"]) for row in ordered),
    }
    return {name: round(value, 6) for name, value in values.items()}


def credit_of_reasons(rollouts):
    """{reason: mean credit, in nats, of its correct completions in the first ten steps}."""
    credits = {"skill": [], "shortcut": []}
    for row in read_jsonl(rollouts):
        if "credit" in row and row["step"] < 10 and row["accuracy"] > 0.5:
            credits["shortcut" if names_shortcut(row["text"]) else "skill"].append(row["credit"])
    return {reason: round(statistics.fmean(values), 6) for reason, values in credits.items() if values}


def collect(out):
    """Results of all seeds, in their order, with the arms that are finished."""
    results = []
    for folder in sorted(out.glob("seed*"), key=lambda folder: int(folder.name.removeprefix("seed"))):
        if not (folder / f"eval/sft_sampled{CHECKS - 1}/summary.json").exists():
            continue
        result = {"seed": int(folder.name.removeprefix("seed")), "faults": check_sft(folder)}
        result |= {"sft": scores(folder, "sft"), "arms": {}}
        for name in ARMS:
            if (folder / f"eval/{name}_sampled0/summary.json").exists():
                credit = credit_of_reasons(folder / name / "rollouts.jsonl")
                result["arms"][name] = scores(folder, name) | {"credit": credit}
        results.append(result)
    return results


# ---------------------------------------------------------------------------------------------------------- the tables


def cell(values, scale=100, digits=0):
    """Mean ± half of its 95 % interval by Student's t, in percent or another scale; no interval below three values.

    >>> cell([0.0, 1.0] * 5)
    '50 ± 38'
    """
    n = len(values)
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    if n < 3:
        return mean
    t = T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1]
    half = t * statistics.stdev(values) / math.sqrt(n)
    return f"{mean} ± {scale * half:.{digits}f}"


def of_arm(valid, name):
    """The results of one arm, of the seeds that have it."""
    return [result["arms"][name] for result in valid if name in result["arms"]]


def results_table(valid):
    """The results of the SFT models and of each arm, one row per arm."""
    models = {"SFT model": [result["sft"] for result in valid]}
    for name, arm in ARMS.items():
        models[arm.label] = of_arm(valid, name)
    rows = []
    for label, finished in models.items():
        if finished:
            cells = [cell([scores[measure] for scores in finished]) for measure in MEASURES]
            rows.append([label, *cells, len(finished)])
    return table(["", *MEASURES.values(), "seeds"], rows)


def differences_table(valid):
    """Paired differences: credit minus each other arm, over the seeds that have both."""
    columns = ("ordered", "conflict", "conflict_sampled")
    rows = []
    for name, arm in ARMS.items():
        both = [result["arms"] for result in valid if {name, "credit"} <= result["arms"].keys()]
        if name == "credit" or not both:
            continue
        cells = []
        for column in columns:
            cells.append(cell([arms["credit"][column] - arms[name][column] for arms in both]))
        rows.append([arm.label, *cells, len(both)])
    return table(["", *(MEASURES[column] for column in columns), "seeds"], rows)


def tables(results):
    """The results as Markdown: means with intervals, paired differences, and the seeds that were left out."""
    valid = [result for result in results if not result["faults"]]
    paragraphs = []
    if valid:
        paragraphs.append(results_table(valid))
    if of_arm(valid, "credit"):
        paragraphs += ["Paired differences, credit minus the other, in points:", differences_table(valid)]
    for reason in ("skill", "shortcut"):
        credits = [scores["credit"][reason] for scores in of_arm(valid, "credit") if reason in scores["credit"]]
        if credits:
            mean = cell(credits, scale=1, digits=2)
            paragraphs.append(f"Credit of correct completions in the first ten steps, {reason} as reason: {mean} nats.")
    failed = [f"seed {result['seed']} ({'; '.join(result['faults'])})" for result in results if result["faults"]]
    if failed:
        paragraphs.append(f"Left out, because the SFT model failed its check: {', '.join(failed)}.")
    return "\n\n".join(paragraphs) + "\n"


# ---------------------------------------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/ablation", help="folder for all results")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(21)), help="default: 0 to 20")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="default: all")
    args = parser.parse_args()
    out = args.out.resolve()
    # SIGTERM ends the running stage, too, as Ctrl-C does; alone it would train on, and its folder would be locked
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for seed in args.seeds:
            folder = out / f"seed{seed}"
            train_sft(folder, seed)
            if not check_sft(folder):
                for name in args.arms:
                    reinforce(folder, seed, name)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command continues from here") from None
    results = collect(out)
    write_atomic(out / "background.json", json.dumps(results))
    write_atomic(out / "background.md", tables(results))
    print(f"\n{tables(results)}\n{out / 'background.md'}")


if __name__ == "__main__":
    main()
