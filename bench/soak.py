"""A long run that is killed over and over must end as one never touched. Not a test of the suite: it takes about 10 minutes.

    python bench/soak.py [--steps 200] [--kills 20] [--seed 0]

Two sharded CPU processes train the toy's cold start (made by `python toy.py`) with T-GRPO. At random moments every process
gets SIGKILL, and the same command starts again. At the end metrics.jsonl (times aside) and the weights must be equal.
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
    """The two processes, in a process group of their own."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(random.randint(20000, 40000)),
        "tgrpo.py",
        "--config",
        "configs/toy.yaml",
        "--output_dir",
        str(output),
        "--fsdp",
        "full_shard",
        "--steps",
        str(steps),
        "--batch_size",
        "4",
        "--micro_batch_size",
        "2",
        "--num_generations",
        "4",
        "--save_every",
        "5",
        "--num_workers",
        "1",
        "--print_every",
        "0",
    ]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        begin = time.perf_counter()
        if start(whole, args.steps).wait():
            sys.exit("the undisturbed run failed")
        print(f"undisturbed: {args.steps} steps in {time.perf_counter() - begin:.0f} s", flush=True)
        kills = 0
        while True:
            run = start(killed, args.steps)
            # the k-th kill comes once the log has passed its share of the steps, then a random moment later
            target = args.steps * (kills + 1) / (args.kills + 1) if kills < args.kills else float("inf")
            while run.poll() is None and len(without_times(killed)) < target:
                time.sleep(0.05)
            time.sleep(random.uniform(0, 1.5))
            if run.poll() is not None:
                break
            os.killpg(run.pid, signal.SIGKILL)
            subprocess.run(["pkill", "-9", "-f", str(killed)])  # data workers are in other groups
            run.wait()
            kills += 1
            print(
                f"kill {kills} at step {len(without_times(killed))}, checkpoints {sorted(p.name for p in killed.glob('*checkpoint*'))}",
                flush=True,
            )
        if run.returncode:
            sys.exit(f"the killed run ended with status {run.returncode}")
        a, b = (load_file(f / "final/model.safetensors") for f in (whole, killed))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), "the weights differ"
        assert without_times(whole) == without_times(killed), "the logs differ"
        print(f"killed {kills} times: {len(without_times(killed))} steps of log and every weight equal, bit for bit")


if __name__ == "__main__":
    main()
