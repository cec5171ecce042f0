"""The SFT model of this world knows both a shortcut and the skill. Which of the two does RL reinforce?

    python -m experiments.two_rationales              # one seed, T-GRPO; results in runs/two_rationales
    python -m experiments.two_rationales --seed 1 --out runs/two1
    python -m experiments.two_rationales --world object --out runs/object

worlds.py describes the worlds. Before any RL, `check_sft` checks that the SFT model leaves RL a choice.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import shlex
import sys
from pathlib import Path

from experiments.worlds import WORLDS
from settings import UserError, mean_and_se, print_utf8, read_jsonl, table
from toy import ROOT, check_seed, make_model, make_world, stage

# the first part of SFT runs until the model reaches this accuracy, but at most so many times
SKILL = 0.9
MAX_SKILL_PARTS = 3
# settings of evaluate.py, for greedy and for sampled answers
BOTH_ORDERS = ("--orders", "ordered", "shuffled")
SAMPLED = ("--temperature", 1, "--orders", "ordered")
# The check samples this often: a single time, about 110 answers use the skill, and chance decides which seeds pass.
CHECKS = 4
# the columns of the results, as `scores` returns them
MEASURES = {
    "ordered": "frames in order",
    "conflict": "misleading shortcut",
    "gap": "gap",
    "conflict_sampled": "misleading shortcut, sampled",
    "static": "shortcut reasons",
}
# Stages run in forks of a process that has imported them: importing takes as long as 20 steps of RL.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["sft", "tgrpo", "evaluate", "experiments.variants"])


# --------------------------------------------------------------------------------------------- the stages of one seed


def run_script(arguments, log):
    """Run a script of this repository, as `python ARGUMENTS` would, with all output in the file `log`."""
    os.chdir(ROOT)
    # back to the default: otherwise each data worker would come from a second, unprepared forkserver
    multiprocessing.set_start_method(None, force=True)
    if log:
        with open(log, "a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    print(f"\n$ python {shlex.join(arguments)}", flush=True)
    if arguments[0] == "-m":
        arguments = arguments[1:]
    sys.argv = arguments
    importlib.import_module(arguments[0].removesuffix(".py")).main()


def launch(arguments, result, log=None):
    """Run a script in a process of its own, unless its `result` exists. Raises UserError if it fails."""
    if result.exists():
        return
    # read by torch when the first of these processes imports it
    os.environ["OMP_NUM_THREADS"] = "1"
    process = FORKS.Process(target=run_script, args=(arguments, log))
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        raise
    if process.exitcode:
        raise UserError(f"this command failed with status {process.exitcode}: python {shlex.join(arguments)}")


def answers(world):
    """Settings for the length of a world's answers: those of configs/toy.yaml, stretched."""
    return ("--max_new_tokens", 40 * world.stretch)


def evaluate(out, world, seed, model, name, settings=BOTH_ORDERS, log=None):
    """Answers of the model `out`/`model` to the test questions, in `out`/eval/`name`."""
    arguments = stage("evaluate.py", out, seed, model, "test.json", f"eval/{name}", *answers(world), *settings)
    launch(arguments, out / f"eval/{name}/summary.json", log)


def train_sft(out, world, seed, log=None):
    """World, random model, and both parts of SFT; greedy and sampled answers of the SFT model."""
    folder = out / "world"
    if not folder.exists():
        with open(log or os.devnull, "a", encoding="utf-8") as file:
            make_world(folder, seed, n_other=0, rules=world.rules, log=file if log else None)
    if not (out / "base").exists():
        make_model(out / "base", json.loads((folder / "sft.json").read_text(encoding="utf-8")), seed)
    model = "base"
    for part in range(1, MAX_SKILL_PARTS + 1):
        name = f"skill{part}"
        launch(stage("sft.py", out, seed, model, "skill.json", name), out / name / "final", log)
        model = f"{name}/final"
        evaluate(out, world, seed, model, name, ("--orders", "ordered"), log)
        if skill(out) >= SKILL:
            break
    arguments = stage("sft.py", out, seed, model, "sft.json", "sft", "--steps", 120, "--lr", 1e-3)
    launch(arguments, out / "sft/final", log)
    evaluate(out, world, seed, "sft/final", "sft", log=log)
    for i in range(CHECKS):
        evaluate(out, world, seed + 1000 * i, "sft/final", f"sft_sampled{i}", SAMPLED, log)


def reinforce(out, world, seed, name, settings=(), variant="", log=None):
    """50 steps of RL from the SFT model, in `out`/`name`; greedy and sampled answers. `variant`: see variants.py."""
    limits = ("--steps", 50, "--save_rollouts", "true", "--save_every", 0, "--num_workers", 1)
    lengths = (*answers(world), "--length_min", 12 * world.stretch, "--length_max", 30 * world.stretch)
    arguments = stage("tgrpo.py", out, seed, "sft/final", "rl.json", name, *limits, *lengths, *settings)
    if variant:
        arguments = ["-m", "experiments.variants", "--variant", variant, *arguments[1:]]
    launch(arguments, out / name / "final", log)
    evaluate(out, world, seed, f"{name}/final", name, log=log)
    evaluate(out, world, seed, f"{name}/final", f"{name}_sampled", SAMPLED, log)


# ---------------------------------------------------------------------------------------------------- what is measured


def mean(values):
    return mean_and_se(values)[0]


def skill(out):
    """Greedy accuracy on the test clips after the last run of the first part of SFT."""
    last = sorted((out / "eval").glob("skill*/predictions.jsonl"))[-1]
    return mean([row["accuracy"] for row in read_jsonl(last) if row["frames"] == "ordered"])


def check_sft(out, world):
    """({name: value}, [what is wrong]) of an SFT model. Uses nothing that comes after it.

    It must have the skill before the second part (greedy). After it, sampled, it must give both reasons, and be right
    more often than by chance where it uses the skill; otherwise RL has no choice to make.
    """
    sampled = []
    for i in range(CHECKS):
        sampled += read_jsonl(out / f"eval/sft_sampled{i}/predictions.jsonl")
    skilled = [row["accuracy"] for row in sampled if not world.is_static(row["prediction"])]
    measured = {
        "skill": skill(out),
        "static_share": mean([world.is_static(row["prediction"]) for row in sampled]),
        "skill_right": mean(skilled) if skilled else 0.0,
    }
    bounds = {"skill": (SKILL, 1.0), "static_share": (0.4, 0.8), "skill_right": (0.57, 1.0)}
    faults = []
    for name, (low, high) in bounds.items():
        if not low <= measured[name] <= high:
            faults.append(f"{name} is {measured[name]:.2f}, not {low} to {high}")
    return measured, faults


def scores(out, world, name):
    """Results of one model on the test clips, from 0 to 1, with the names of MEASURES.

    gap: greedy accuracy with the frames in order minus with the frames shuffled. static: share of the greedy answers
    that reason with the shortcut.
    """
    greedy = read_jsonl(out / f"eval/{name}/predictions.jsonl")
    sampled = read_jsonl(out / f"eval/{name}_sampled{0 if name == 'sft' else ''}/predictions.jsonl")
    ordered = [row for row in greedy if row["frames"] == "ordered"]
    shuffled = [row for row in greedy if row["frames"] == "shuffled"]
    accuracy = mean([row["accuracy"] for row in ordered])
    return {
        "ordered": accuracy,
        "conflict": mean([row["accuracy"] for row in ordered if row["cue"] == "misleads"]),
        "gap": accuracy - mean([row["accuracy"] for row in shuffled]),
        "conflict_sampled": mean([row["accuracy"] for row in sampled if row["cue"] == "misleads"]),
        "static": mean([world.is_static(row["prediction"]) for row in ordered]),
    }


def main():
    print_utf8()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/two_rationales", help="folder for all results")
    parser.add_argument("--world", choices=WORLDS, default="background", help="default: background")
    parser.add_argument("--seed", type=int, default=0, help="seed of world, model and training; default: 0")
    args = parser.parse_args()
    out = args.out.resolve()
    world = WORLDS[args.world]
    check_seed(out, args.seed)
    train_sft(out, world, args.seed)
    measured, faults = check_sft(out, world)
    print("\nthe SFT model: " + ", ".join(f"{name} {value:.2f}" for name, value in measured.items()))
    if faults:
        raise UserError(f"this SFT model leaves RL no choice ({'; '.join(faults)}): try another --seed and --out")
    reinforce(out, world, args.seed, "tgrpo")
    rows = []
    for name, label in (("sft", "SFT model"), ("tgrpo", "T-GRPO")):
        rows.append([label, *(f"{100 * value:.1f}" for value in scores(out, world, name).values())])
    print("\nTest clips, percent:\n")
    print(table(["", *MEASURES.values()], rows))


if __name__ == "__main__":
    main()
