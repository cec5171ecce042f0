"""Kills a training run again and again and checks that it ends like an undisturbed one. Takes about 10 minutes.

    python bench/soak.py [--steps 200] [--kills 20] [--seed 0]

Two sharded CPU processes train the toy's SFT model (made by `python toy.py`) with T-GRPO. At random moments every
process gets SIGKILL and the same command starts again. At the end metrics.jsonl (except for times) and the weights must
be equal.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from naive import without_times
from safetensors.torch import load_file


def start(output, steps):
    """Start the two processes, in a process group of their own."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", random.randint(20000, 40000)]
    settings = {
        "config": "configs/toy.yaml",
        "output_dir": output,
        "fsdp": "full_shard",
        "steps": steps,
        "batch_size": 4,
        "micro_batch_size": 2,
        "num_generations": 4,
        "save_every": 5,
        "num_workers": 1,
        "print_every": 0,
    }
    command = [sys.executable, *launcher, "tgrpo.py"]
    for name, value in settings.items():
        command += [f"--{name}", value]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def run_with_kills(output, steps, kills):
    """Run the command until it ends by itself, killing it `kills` times on the way. Returns (status, times killed)."""
    killed = 0
    while True:
        run = start(output, steps)
        # Kill number k comes after its share of the steps, and then at a random moment.
        target = steps * (killed + 1) / (kills + 1) if killed < kills else float("inf")
        while run.poll() is None and len(without_times(output)) < target:
            time.sleep(0.05)
        time.sleep(random.uniform(0, 1.5))
        if run.poll() is not None:
            return run.returncode, killed
        os.killpg(run.pid, signal.SIGKILL)
        # Data workers are in other process groups.
        subprocess.run(["pkill", "-9", "-f", str(output)])
        run.wait()
        killed += 1
        checkpoints = sorted(path.name for path in output.glob("*checkpoint*"))
        print(f"kill {killed} at step {len(without_times(output))}, checkpoints {checkpoints}", flush=True)


def check_equal(first, second):
    """Raises AssertionError unless two runs have the same weights and the same log."""
    first_weights = load_file(first / "final/model.safetensors")
    second_weights = load_file(second / "final/model.safetensors")
    assert first_weights.keys() == second_weights.keys(), "the weights have other names"
    for name, tensor in first_weights.items():
        assert torch.equal(tensor, second_weights[name]), f"{name} differs"
    assert without_times(first) == without_times(second), "the logs differ"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(folder) / "undisturbed"
        killed = Path(folder) / "killed"
        begin = time.perf_counter()
        if start(undisturbed, args.steps).wait() != 0:
            sys.exit("the undisturbed run failed")
        print(f"undisturbed: {args.steps} steps in {time.perf_counter() - begin:.0f} s", flush=True)
        status, n_kills = run_with_kills(killed, args.steps, args.kills)
        if status != 0:
            sys.exit(f"the killed run ended with status {status}")
        check_equal(undisturbed, killed)
        print(f"killed {n_kills} times: {len(without_times(killed))} logged steps and all weights are bitwise equal")


if __name__ == "__main__":
    main()
