"""The evening before a long run: 20 steps, killed after 10 and resumed, then 20 questions; ends with a verdict.

    python -m tools.rehearse --config configs/7b.yaml --stage tgrpo --out runs/rehearsal [--name value ...]

Further settings are those of the stage, such as --model for T-GRPO before there is an SFT model. Everything is written
into --out, which must not exist.
"""

import argparse
import atexit
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch

import data
from support import model_files, settings, storage, tables
from tools import plan_memory

STEPS = 20
QUESTIONS = 20


def start(script, *arguments):
    """`accelerate launch script ...` in a process group of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", script, *map(str, arguments)]
    print("\n$ accelerate launch", *command[3:], flush=True)
    process = subprocess.Popen(command, start_new_session=True)
    # Ctrl-C reaches only this process
    atexit.register(kill, process)
    return process


def kill(process):
    """Kill a command and all of its processes."""
    if process.poll() is None:
        # torch's launcher gives each rank a session of its own
        ranks = psutil.Process(process.pid).children(recursive=True)
        for one in [psutil.Process(process.pid), *ranks]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
        psutil.wait_procs(ranks)


def finish(process, result):
    """Wait for a command to end. Raises UserError if it has not made `result`."""
    if process.wait() or not result.exists():
        raise settings.UserError(f"rehearsal: the last command ended without {result}; nothing later was tried")


def train(args, rest, run):
    """20 steps that are killed after the first checkpoint, and resumed."""
    words = [f"{args.stage}.py", "--config", args.config, *rest]
    words += ["--output_dir", run, "--steps", STEPS, "--save_every", STEPS // 2, "--resume", "true"]
    if args.stage == "tgrpo":
        words += ["--save_rollouts", "true"]
    killed = start(*words)
    checkpoint = run / f"checkpoint-{STEPS // 2}"
    while killed.poll() is None and not checkpoint.exists():
        time.sleep(0.1)
    if killed.poll() is not None:
        raise settings.UserError(f"rehearsal: {args.stage}.py ended before {checkpoint}")
    kill(killed)
    finish(start(*words), run / "final")


def ask(args, cfg, run, out):
    """Ask the trained model questions of the training records. Returns the seconds, loading included."""
    questions = out / "questions.json"
    records, _ = data.load_records(cfg.records, cfg.data_root, cfg.max_unreadable)
    # from the whole file, which may be sorted by source
    spread = records[:: max(1, len(records) // QUESTIONS)][:QUESTIONS]
    storage.write_atomic(questions, json.dumps(spread))
    begin = time.perf_counter()
    words = ["--model", run / "final", "--records", questions, "--benchmarks"]
    for name in ("data_root", "bf16", "vision_attention", "num_workers"):
        words += [f"--{name}", getattr(cfg, name)]
    finish(
        start("evaluate.py", "--config", args.config, *words, "--output_dir", out / "eval"), out / "eval/summary.json"
    )
    return time.perf_counter() - begin


def size(folder):
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def verdict(args, cfg, run, seconds_of_questions):
    """What the rehearsal says about the whole run, as a table."""
    log = storage.read_jsonl(run / "metrics.jsonl")
    if [row["step"] for row in log] != list(range(STEPS)):
        raise settings.UserError(f"rehearsal: {run}/metrics.jsonl has not one row for each of {STEPS} steps")
    # the first step after each start compiles, and fills caches
    usual = [row for row in log if row["step"] not in (0, STEPS // 2)]
    parts = sorted(name for name in log[0] if name.startswith("time/"))
    medians = {name: statistics.median(row[name] for row in usual) for name in parts}
    rows = [[name, f"{seconds:.1f} s"] for name, seconds in medians.items()]
    step = sum(medians.values())
    rows.append([f"whole run: {cfg.steps} steps of {step:.1f} s", f"{cfg.steps * step / 3600:.1f} h"])
    rows.append([f"{QUESTIONS} questions, with loading", f"{seconds_of_questions:.0f} s"])
    peak = max(row.get("memory/peak_gb", 0) for row in log)
    rows.append(["peak memory per GPU", f"{peak:.1f} GB" if peak else "not on a GPU"])
    plan = plan_memory.sft_plan if args.stage == "sft" else plan_memory.memory_plan
    _, planned = plan(cfg, plan_memory.model_shape(cfg.model), args.gpus)
    rows.append([f"its plan for {args.gpus} GPUs, longest texts", f"{planned / 1e9:.1f} GB"])
    # one more checkpoint than is kept while it is written
    needed = size(run / f"checkpoint-{STEPS // 2}") * (cfg.keep_checkpoints + 1) + size(run / "final")
    rows.append(["disk for checkpoints and final", f"{needed / 1e9:.1f} GB"])
    rows.append([f"disk free at {args.out}", f"{shutil.disk_usage(args.out).free / 1e9:.1f} GB"])
    skipped = log[-1]["data/skipped"]
    rows.append([f"records skipped, of {STEPS * cfg.batch_size} drawn", f"{skipped:.0f}"])
    return tables.table(["after a kill and a resume", ""], rows)


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--stage", choices=("sft", "tgrpo"), default="tgrpo")
    parser.add_argument("--config", required="--help" not in sys.argv)
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"))
    # for the plan of its memory
    parser.add_argument("--gpus", type=int, default=max(1, torch.cuda.device_count()))
    args, rest = parser.parse_known_args()
    config = ["--config", args.config, *rest] if args.config else rest
    cls = plan_memory.CONFIGS[args.stage]
    cfg = settings.load_config(cls, args.stage, config, __doc__, required=("model", "records"))
    model_files.check_model(cfg, args.stage)
    if args.out.exists():
        raise settings.UserError(f"--out: {args.out} exists; choose another folder, or delete it")
    run = args.out / args.stage
    train(args, rest, run)
    print("\n" + verdict(args, cfg, run, ask(args, cfg, run, args.out)))


if __name__ == "__main__":
    main()
