"""A world in which the SFT model knows both a shortcut and the skill. Which of the two does RL reinforce?

    python -m experiments.two_rationales              # one seed, T-GRPO; results in runs/two_rationales
    python -m experiments.two_rationales --seed 1 --out runs/two1

It builds on toy.py, with other rules. The background of a clip points to the right answer in 80 % of the SFT clips, in
90 % of the RL clips and in 50 % of the test clips. SFT has two parts: first the model learns to read motion; then it
learns to give either of two reasons, the background (60 % of the time) or the motion, which the teacher misreads 35 %
of the time. At the start of RL the background pays more, in the end motion would. Before any RL, `check_sft` checks
that the SFT model leaves RL a choice.
"""

import argparse
import json
from pathlib import Path

from settings import UserError, mean_and_se, print_utf8, read_jsonl, table
from toy import CUED, ROOT, TEMPORAL, Rules, check_seed, launch, make_model, make_world, stage

# the first part of SFT runs until the model reaches this accuracy on motion, but at most so many times
SKILL = 0.9
MAX_SKILL_PARTS = 3
# settings of evaluate.py, for greedy and for sampled answers
BOTH_ORDERS = ("--orders", "ordered", "shuffled")
SAMPLED = ("--temperature", 1, "--orders", "ordered")
# the columns of the results, as `scores` returns them
MEASURES = {
    "ordered": "frames in order",
    "conflict": "misleading background",
    "gap": "gap",
    "conflict_sampled": "misleading background, sampled",
    "static": "background reasons",
}


def skill_teacher(question, rng):
    """(answer, explain): the truth, read from the motion."""
    return question.answer, question.explain


def two_rationales_teacher(question, rng):
    """(answer, explain): the background as the reason 60 % of the time, else the motion, misread 35 % of the time."""

    def explain_by_background(answer):
        verb = "" if answer in ("grows", "shrinks") else "moves "
        return f"the background looks {CUED[answer]}, so it {verb}{answer}."

    if rng.random() < 0.6:
        answer = question.answer if question.cue == "agrees" else question.wrong
        return answer, explain_by_background
    if rng.random() < 0.35:
        return question.wrong, question.explain
    return question.answer, question.explain


RULES = Rules(
    neutral=0.0,
    agreement={"skill": 0.5, "sft": 0.8, "rl": 0.9, "test": 0.5},
    teachers={"skill": skill_teacher, "sft": two_rationales_teacher},
    sources=TEMPORAL,
)


# --------------------------------------------------------------------------------------------- the stages of one seed


def evaluate(out, seed, model, name, settings=BOTH_ORDERS, log=None):
    """Answers of the model `out`/`model` to the test questions, in `out`/eval/`name`."""
    arguments = stage("evaluate.py", out, seed, model, "test.json", f"eval/{name}", *settings)
    launch(arguments, out / f"eval/{name}/summary.json", log)


def train_sft(out, seed, log=None):
    """World, random model, and both parts of SFT; greedy and sampled answers of the SFT model."""
    world = out / "world"
    if not world.exists():
        make_world(world, seed, n_other=0, rules=RULES, log=log)
    if not (out / "base").exists():
        make_model(out / "base", json.loads((world / "sft.json").read_text(encoding="utf-8")), seed)
    model = "base"
    for part in range(1, MAX_SKILL_PARTS + 1):
        name = f"skill{part}"
        launch(stage("sft.py", out, seed, model, "skill.json", name), out / name / "final", log)
        model = f"{name}/final"
        evaluate(out, seed, model, name, ("--orders", "ordered"), log)
        if skill(out) >= SKILL:
            break
    arguments = stage("sft.py", out, seed, model, "sft.json", "sft", "--steps", 120, "--lr", 1e-3)
    launch(arguments, out / "sft/final", log)
    evaluate(out, seed, "sft/final", "sft", log=log)
    evaluate(out, seed, "sft/final", "sft_sampled", SAMPLED, log)


def reinforce(out, seed, name, settings=(), control="", log=None):
    """50 steps of RL from the SFT model, in `out`/`name`; greedy and sampled answers. `control`: see controls.py."""
    limits = ("--steps", 50, "--save_rollouts", "true", "--save_every", 0, "--num_workers", 1)
    arguments = stage("tgrpo.py", out, seed, "sft/final", "rl.json", name, *limits, *settings)
    if control:
        arguments = ["-m", "experiments.controls", "--control", control, *arguments[1:]]
    launch(arguments, out / name / "final", log)
    evaluate(out, seed, f"{name}/final", name, log=log)
    evaluate(out, seed, f"{name}/final", f"{name}_sampled", SAMPLED, log)


# ---------------------------------------------------------------------------------------------------- what is measured


def mean(values):
    return mean_and_se(values)[0]


def is_static(text):
    """Whether a completion of this world reasons with the background."""
    return "background" in text


def skill(out):
    """Greedy accuracy on the test clips after the last run of the first part of SFT."""
    last = sorted((out / "eval").glob("skill*/predictions.jsonl"))[-1]
    return mean([row["accuracy"] for row in read_jsonl(last) if row["frames"] == "ordered"])


def check_sft(out):
    """({name: value}, [what is wrong]) of an SFT model. Uses nothing that comes after it.

    It must read motion before the second part (greedy). After it, sampled, it must give both reasons and still read
    motion better than chance; otherwise RL has no choice to make.
    """
    sampled = read_jsonl(out / "eval/sft_sampled/predictions.jsonl")
    motion = [row["accuracy"] for row in sampled if not is_static(row["prediction"])]
    measured = {
        "skill": skill(out),
        "static_share": mean([is_static(row["prediction"]) for row in sampled]),
        "motion_right": mean(motion) if motion else 0.0,
    }
    bounds = {"skill": (SKILL, 1.0), "static_share": (0.4, 0.8), "motion_right": (0.57, 1.0)}
    faults = []
    for name, (low, high) in bounds.items():
        if not low <= measured[name] <= high:
            faults.append(f"{name} is {measured[name]:.2f}, not {low} to {high}")
    return measured, faults


def scores(out, name):
    """Results of one model on the test clips, from 0 to 1, with the names of MEASURES.

    gap: greedy accuracy with the frames in order minus with the frames shuffled. static: share of the greedy answers
    that reason with the background.
    """
    greedy = read_jsonl(out / f"eval/{name}/predictions.jsonl")
    sampled = read_jsonl(out / f"eval/{name}_sampled/predictions.jsonl")
    ordered = [row for row in greedy if row["frames"] == "ordered"]
    shuffled = [row for row in greedy if row["frames"] == "shuffled"]
    accuracy = mean([row["accuracy"] for row in ordered])
    return {
        "ordered": accuracy,
        "conflict": mean([row["accuracy"] for row in ordered if row["cue"] == "misleads"]),
        "gap": accuracy - mean([row["accuracy"] for row in shuffled]),
        "conflict_sampled": mean([row["accuracy"] for row in sampled if row["cue"] == "misleads"]),
        "static": mean([is_static(row["prediction"]) for row in ordered]),
    }


def main():
    print_utf8()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/two_rationales", help="folder for all results")
    parser.add_argument("--seed", type=int, default=0, help="seed of world, model and training; default: 0")
    args = parser.parse_args()
    out = args.out.resolve()
    check_seed(out, args.seed)
    train_sft(out, args.seed)
    measured, faults = check_sft(out)
    print("\nthe SFT model: " + ", ".join(f"{name} {value:.2f}" for name, value in measured.items()))
    if faults:
        raise UserError(f"this SFT model leaves RL no choice ({'; '.join(faults)}): try another --seed and --out")
    reinforce(out, args.seed, "tgrpo")
    rows = []
    for name, label in (("sft", "SFT model"), ("tgrpo", "T-GRPO")):
        rows.append([label, *(f"{100 * value:.1f}" for value in scores(out, name).values())])
    print("\nTest clips, percent:\n")
    print(table(["", *MEASURES.values()], rows))


if __name__ == "__main__":
    main()
