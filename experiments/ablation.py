"""Does it matter where the temporal reward goes? Seven ways of rewarding, many seeds, one tiny world with a tempting shortcut.

    python toy.py --ablate                      # 10 seeds, 2 at a time: about 9 minutes a seed and core
    python toy.py --ablate --seeds 20           # goes on where it stopped: what is done is not done again

For each seed: the two-rationale world of toy.py and its cold start; a check that the cold start leaves RL a choice (seeds that
fail it are listed and left out; the check sees nothing of RL); then every arm from that same cold start, on the same prompts.
Writes ablation.json (all numbers), ablation.md (the tables) and ablation.png into its folder.
"""

import json
import math
import statistics
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from settings import read_jsonl, write_atomic
from toy import Stages, check_skill, is_static

CREDIT = ("--temporal_rule", "credit")
ARMS = {  # name: (label, settings of tgrpo.py, colour)
    "grpo": ("GRPO, group std", ("--temporal_rule", "none"), "tab:gray"),
    "grpo_no_std": ("GRPO, no std", ("--temporal_rule", "none", "--advantage_std", "none"), "black"),
    "margin_reward": ("T-GRPO, in the reward (published)", ("--temporal_target", "reward"), "tab:orange"),
    "margin_advantage": ("T-GRPO, in the advantage (default)", (), "tab:red"),
    "credit": ("credit", CREDIT, "tab:blue"),
    "credit_dealt": ("credit, dealt at random", (*CREDIT, "--credit_control", "dealt"), "tab:cyan"),
    "credit_noise": ("noise of equal spread", (*CREDIT, "--credit_control", "noise"), "tab:green"),
}
MEASURES = {
    "ordered": "in order",
    "conflict": "background lies",
    "gap": "gap",
    "conflict_sampled": "background lies, sampled",
    "static": "static reasons",
    "seconds": "seconds a step",
}


def run_seed(out, seed):
    """Everything of one seed, in out/seed<N>; returns its results, also kept in result.json there."""
    folder = out / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    result_file = folder / "result.json"
    if result_file.exists() and set(ARMS) <= set(json.loads(result_file.read_text(encoding="utf-8")).get("arms", ARMS)):
        return json.loads(result_file.read_text(encoding="utf-8"))
    with open(folder / "log.txt", "a", encoding="utf-8") as log:
        stages = Stages(folder, seed, "two_rationales", log)
        stages.cold_start()
        found, wrong = check_skill(folder)
        result = {"seed": seed, "check": found, "wrong": wrong}
        if not wrong:
            for name, (_, settings, _) in ARMS.items():
                stages.reinforce(name, *settings, "--save_rollouts", "true", "--save_every", 0, "--num_workers", 1)
                stages.evaluate(f"{name}_sampled", f"{name}/final", "--temperature", 1, "--temporal_gap", "false")
            result["cold_start"] = scores_of(folder, "cold_start")
            result["arms"] = {name: scores_of(folder, name) | curves_of(folder, name) for name in ARMS}
    write_atomic(result_file, json.dumps(result))
    return result


def scores_of(folder, name):
    """Accuracy on the test clips, greedy and sampled, as fractions; share of answers that reason with the background."""
    greedy, sampled = (read_jsonl(folder / "eval" / n / "predictions.jsonl") for n in (name, f"{name}_sampled"))
    share = lambda rows, value: float(np.mean([value(r) for r in rows]))
    ordered, shuffled = ([r for r in greedy if r["frames"] == order] for order in ("ordered", "shuffled"))
    accuracy, lies = lambda r: r["accuracy"], lambda rows: [r for r in rows if r["cue"] == "lies"]
    return {
        "ordered": share(ordered, accuracy),
        "conflict": share(lies(ordered), accuracy),
        "gap": share(ordered, accuracy) - share(shuffled, accuracy),
        "conflict_sampled": share(lies(sampled), accuracy),
        "static": share(ordered, lambda r: is_static(r["prediction"])),
    }


def curves_of(folder, name):
    """What happened step by step: share of static reasons, accuracy and accuracy where the background lies (None: no such clip)."""
    cue = {r["problem_id"]: r["cue"] for r in json.loads((folder / "world/rl.json").read_text(encoding="utf-8"))}
    steps = {}
    for row in read_jsonl(folder / name / "rollouts.jsonl"):
        if row["frames"] == "ordered":
            steps.setdefault(row["step"], []).append(row)
    mean = lambda values: round(float(np.mean(values)), 4) if values else None
    log = read_jsonl(folder / name / "metrics.jsonl")
    return {
        "seconds": statistics.median(r["time/rollout"] + r["time/update"] for r in log),
        "static_steps": [mean([is_static(r["text"]) for r in steps[s]]) for s in sorted(steps)],
        "accuracy_steps": [mean([r["accuracy"] for r in steps[s]]) for s in sorted(steps)],
        "conflict_steps": [
            mean([r["accuracy"] for r in steps[s] if cue[r["problem_id"]] == "lies"]) for s in sorted(steps)
        ],
    }


def mean_interval(values):
    """(mean, half the width of its 95 % interval by Student's t; NaN for one value).

    >>> mean_interval([0.0, 1.0] * 5)                     # t of 9 degrees of freedom: 2.262
    (0.5, 0.377)
    """
    n = len(values)
    if n < 2:
        return statistics.fmean(values), math.nan
    z, df = 1.959964, n - 1  # Cornish and Fisher's expansion of t's quantile about the normal one
    t = (
        z
        + (z**3 + z) / (4 * df)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    )
    return statistics.fmean(values), round(t * statistics.stdev(values) / math.sqrt(n), 3)


def tables(results):
    """The results as Markdown: means with intervals, paired differences to credit, seeds that were left out."""
    valid = [r for r in results if not r["wrong"]]
    show = lambda values, key: (
        lambda m, h: f"{m:.2f} ± {h:.2f}" if key == "seconds" else f"{100 * m:.0f} ± {100 * h:.0f}"
    )(*mean_interval(values))
    lines = [
        f"{len(valid)} seeds; test clips, percent (the last column in seconds), mean ± half of its 95 % interval over seeds (Student's t). "
        "Escaped: seeds with more than half right where the background lies.",
        "",
        f"| | {' | '.join(MEASURES.values())} | escaped |",
        "|" + "---|" * (len(MEASURES) + 2),
    ]
    cold = [
        show([r["cold_start"][key] for r in valid], key) if key in valid[0]["cold_start"] else "" for key in MEASURES
    ]
    lines.append(f"| cold start | {' | '.join(cold)} | |")
    for name, (label, *_) in ARMS.items():
        cells = [show([r["arms"][name][key] for r in valid], key) for key in MEASURES]
        escaped = sum(r["arms"][name]["conflict"] > 0.5 for r in valid)
        lines.append(f"| {label} | {' | '.join(cells)} | {escaped} of {len(valid)} |")
    lines += [
        "",
        "Paired differences, credit less the other, points:",
        "",
        "| | in order | background lies | background lies, sampled |",
        "|---|---|---|---|",
    ]
    for name, (label, *_) in ARMS.items():
        if name != "credit":
            cells = [
                show([r["arms"]["credit"][key] - r["arms"][name][key] for r in valid], key)
                for key in ("ordered", "conflict", "conflict_sampled")
            ]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    for r in results:
        if r["wrong"]:
            lines += ["", f"Left out: seed {r['seed']}, whose cold start failed its check ({'; '.join(r['wrong'])})."]
    return "\n".join(lines) + "\n"


def plot(results, path):
    """Share of static reasons over the steps of RL; accuracies on the test clips and seconds a step, a dot a seed and a bar their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    valid = [r for r in results if not r["wrong"]]
    figure, (curves, *dots) = plt.subplots(1, 5, figsize=(15, 4), width_ratios=(1.5, 1, 1, 1, 1), layout="constrained")
    for name, (_, _, colour) in ARMS.items():
        shares = np.array([r["arms"][name]["static_steps"] for r in valid])
        curves.plot(shares.T, color=colour, alpha=0.12, linewidth=0.8)
        curves.plot(shares.mean(0), color=colour, linewidth=2.5)
    curves.set(
        title="reasons with the background\n(sampled completions)",
        xlabel="step of RL",
        ylabel="share",
        ylim=(-0.02, 1.02),
    )
    for axis, key, title in zip(
        dots,
        ("ordered", "conflict", "gap", "seconds"),
        (
            "accuracy in order",
            "accuracy where\nthe background lies",
            "accuracy in order\nless shuffled",
            "seconds a step",
        ),
    ):
        for y, (name, (_, _, colour)) in enumerate(reversed(ARMS.items())):
            values = [r["arms"][name][key] for r in valid]
            axis.plot(values, y + np.linspace(-0.25, 0.25, len(values)), "o", color=colour, alpha=0.5, markersize=4)
            axis.plot(np.mean(values), y, "|", color=colour, markersize=24, markeredgewidth=3)
        axis.set(
            title=title,
            yticks=range(len(ARMS)),
            yticklabels=[label for label, *_ in reversed(ARMS.values())] if key == "ordered" else [],
        )
        axis.set_xlim(*((0, None) if key == "seconds" else (-0.07, 1.03)))
    for axis in (curves, *dots):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{len(valid)} seeds; test clips, greedy; thin lines and dots: seeds, thick: their mean", fontsize=10
    )
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def ablate(out, seeds, jobs):
    """Run what is missing of all seeds, `jobs` at a time, and write the results of those that are done."""
    pool, results = ThreadPoolExecutor(jobs), []
    try:
        for result in tqdm(
            pool.map(lambda seed: run_seed(out, seed), range(seeds)), total=seeds, desc="ablation", unit="seed"
        ):
            results.append(result)
            if not result["wrong"] and any(not r["wrong"] for r in results):
                write_atomic(out / "ablation.json", json.dumps(results))
                write_atomic(out / "ablation.md", tables(results))
                plot(results, out / "ablation.png")
    except (KeyboardInterrupt, SystemExit) as stop:
        pool.shutdown(cancel_futures=True)
        raise SystemExit(f"\nstopped; the same command goes on from here. {out}/seed*/log.txt tell more") from stop
    print(f"\n{tables(results)}\nplot: {out / 'ablation.png'}")
