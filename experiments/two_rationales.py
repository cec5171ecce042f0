"""The SFT model of this world knows both a shortcut and the skill. Which of the two does RL reinforce?

    python -m experiments.two_rationales              # one seed, T-GRPO; results in runs/two_rationales/background
    python -m experiments.two_rationales --seed 1 --out runs/two1
    python -m experiments.two_rationales --world object

worlds.py describes the worlds. Before any RL, `check_sft` checks that the SFT model leaves RL a choice.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from pathlib import Path

from experiments.worlds import WORLDS
from support.settings import UserError
from support.storage import read_jsonl
from support.tables import mean_and_se, table
from toy import ROOT, check_seed, make_model, make_world, stage

# the first part of SFT runs until the model reaches this accuracy, but at most so many times
SKILL = 0.9
MAX_SKILL_PARTS = 4
# settings of evaluate.py, for greedy and for sampled answers
BOTH_ORDERS = ("--orders", "ordered", "shuffled")
SAMPLED = ("--temperature", 1, "--orders", "ordered")
# The check samples so many times. Of one sample only about 110 answers use the skill: chance would decide what passes.
CHECKS = 4
# the columns of the results, as `scores` returns them
MEASURES = {
    "ordered": "frames in order",
    "conflict": "misleading shortcut",
    "gap": "gap",
    "conflict_sampled": "misleading shortcut, sampled",
    "names_shortcut": "names the shortcut",
}
# Stages run in forks of a process that has imported them: importing takes as long as 20 steps of RL.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["sft", "tgrpo", "evaluate", "experiments.variants"])
# torch's random numbers belong to the process, so only one thread at a time may make a model from a seed
MAKING = threading.Lock()
# set by SIGTERM: no stage and no rendering starts any more
STOPPED = threading.Event()


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
    """Run a script in a process of its own, unless its `result` exists. Raises UserError if it leaves no result."""
    if result.exists():
        return
    raise_if_stopped()
    # read by torch when the first of these processes imports it
    os.environ["OMP_NUM_THREADS"] = "1"
    process = FORKS.Process(target=run_script, args=(arguments, log))
    process.start()
    try:
        process.join()
    except BaseException:
        process.terminate()
        raise
    # not by the status: a run that was stopped saves a checkpoint and ends with 0
    if not result.exists():
        raise UserError(f"this command left no {result}: python {shlex.join(arguments)}")


def stop_stages_on_sigterm():
    """From now on SIGTERM ends the running stages, too, starts no others, and then acts like Ctrl-C.

    Without this, the stages would train on alone and keep their folders locked.
    """

    def stop(*_):
        STOPPED.set()
        for process in multiprocessing.active_children():
            process.terminate()
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


def raise_if_stopped():
    if STOPPED.is_set():
        raise UserError("stopped")


def longest_answer(world):
    """Setting of a world's evaluation and RL: a third more than the longest answer of SFT."""
    return ("--max_new_tokens", world.length[1] * 4 // 3)


def evaluate(out, world, seed, model, name, settings=BOTH_ORDERS, log=None):
    """Answers of the model `out`/`model` to the test questions, in `out`/eval/`name`."""
    arguments = stage("evaluate.py", out, seed, model, "test.json", f"eval/{name}", *longest_answer(world), *settings)
    launch(arguments, out / f"eval/{name}/summary.json", log)


def train_sft(out, world, seed, log=None):
    """World, random model, and both parts of SFT; greedy and sampled answers of the SFT model."""
    folder = out / "world"
    with MAKING:
        raise_if_stopped()
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
        if skill(out, name) >= SKILL:
            break
    arguments = stage("sft.py", out, seed, model, "sft.json", "sft", "--steps", world.sft_steps, "--lr", 1e-3)
    launch(arguments, out / "sft/final", log)
    evaluate(out, world, seed, "sft/final", "sft", log=log)
    for i in range(CHECKS):
        evaluate(out, world, seed + 1000 * i, "sft/final", f"sft_sampled{i}", SAMPLED, log)


def reinforce(out, world, seed, name, settings=(), variant="", log=None):
    """50 steps of RL from the SFT model, in `out`/`name`; greedy and sampled answers. `variant`: see variants.py."""
    limits = ("--steps", 50, "--save_rollouts", "true", "--save_every", 0, "--num_workers", 1)
    lengths = (*longest_answer(world), "--length_min", world.length[0], "--length_max", world.length[1])
    arguments = stage("tgrpo.py", out, seed, "sft/final", "rl.json", name, *limits, *lengths, *settings)
    if variant:
        arguments = ["-m", "experiments.variants", "--variant", variant, *arguments[1:]]
    launch(arguments, out / name / "final", log)
    evaluate(out, world, seed, f"{name}/final", name, log=log)
    evaluate(out, world, seed, f"{name}/final", f"{name}_sampled", SAMPLED, log)


# ---------------------------------------------------------------------------------------------------- what is measured


def mean(values):
    return mean_and_se(values)[0]


def skill(out, name):
    """Greedy accuracy on the test clips of a model of the first part of SFT."""
    return mean([row["accuracy"] for row in read_jsonl(out / f"eval/{name}/predictions.jsonl")])


def check_sft(out, world):
    """({name: value}, [what is wrong]) of an SFT model. Uses nothing that comes after it.

    It must have the skill before the second part (greedy). After it, sampled, it must give both reasons. With the skill
    as reason it must be right more often than by chance. With the shortcut as reason it must follow the shortcut, so it
    must be right more often where that agrees than where it misleads. Otherwise RL has no choice to make.
    """
    sampled = []
    for i in range(CHECKS):
        sampled += read_jsonl(out / f"eval/sft_sampled{i}/predictions.jsonl")
    skill_right = []
    shortcut_right = {"agrees": [], "misleads": []}
    for row in sampled:
        if world.names_shortcut(row["prediction"]):
            shortcut_right[row["cue"]].append(row["accuracy"])
        else:
            skill_right.append(row["accuracy"])
    last_part = max((out / "eval").glob("skill*"), key=lambda folder: int(folder.name.removeprefix("skill")))
    measured = {
        "skill": skill(out, last_part.name),
        "shortcut_share": 1 - len(skill_right) / len(sampled),
        "skill_right": mean(skill_right or [0.0]),
        "shortcut_followed": mean(shortcut_right["agrees"] or [0.0]) - mean(shortcut_right["misleads"] or [0.0]),
    }
    bounds = {
        "skill": (SKILL, 1.0),
        "shortcut_share": (0.4, 0.8),
        "skill_right": (0.57, 1.0),
        "shortcut_followed": (0.5, 1.0),
    }
    faults = []
    for name, (low, high) in bounds.items():
        if not low <= measured[name] <= high:
            faults.append(f"{name} is {measured[name]:.3f}, not {low} to {high}")
    return measured, faults


def scores(out, world, name):
    """Results of one model on the test clips, from 0 to 1, with the names of MEASURES.

    gap: greedy accuracy with the frames in order minus with the frames shuffled. names_shortcut: share of the greedy
    answers whose reason is the shortcut; `conflict` shows whether they follow it.
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
        "names_shortcut": mean([world.names_shortcut(row["prediction"]) for row in ordered]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for all results; default: runs/two_rationales/WORLD")
    parser.add_argument("--world", choices=WORLDS, default="background", help="default: background")
    parser.add_argument("--seed", type=int, default=0, help="seed of world, model and training; default: 0")
    args = parser.parse_args()
    out = (args.out or ROOT / "runs/two_rationales" / args.world).resolve()
    world = WORLDS[args.world]
    check_seed(out, args.seed)
    stop_stages_on_sigterm()
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
