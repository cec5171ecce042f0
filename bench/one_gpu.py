"""Runs sft.py, tgrpo.py and evaluate.py on one GPU with configs/3b_one_gpu.yaml, from random weights of the 3B shape.

    python bench/one_gpu.py                  # a GPU of 24 GB, 30 GB of temporary disk space
    python bench/one_gpu.py --stages evaluate
    python bench/one_gpu.py --shape tiny     # also on a CPU: does the script run?

The checkpoint has the hub's layout, the clips are 10 seconds of 640 x 360 pixels. Prints the seconds of each stage and,
for each step of training, its seconds, peak memory and sampled tokens per second. Random weights of the 3B shape almost
never end an answer, so nearly every completion has the full length.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

import torch
from hub_checkpoint import TINY_TEXT, TINY_VISION, write_hub_checkpoint
from real_width import QUESTION, SHAPES, write_clip

from support.storage import read_jsonl

# what the published config.json has beside the widths
LAYERS = {"num_hidden_layers": 36}
STAGES = ("sft", "tgrpo", "evaluate")
METRICS = ("time/train", "time/rollout", "time/update", "rollout/tokens_per_s", "completion/length", "memory/peak_gb")


def make_files(folder, shape):
    """folder/model, folder/records.json with 16 questions, and two clips."""
    for name in ("a.mp4", "b.mp4"):
        write_clip(folder / name, 10)
    records = []
    for i in range(16):
        records.append({**QUESTION, "problem_id": i, "data_type": "video", "path": "ab"[i % 2] + ".mp4"})
    (folder / "records.json").write_text(json.dumps(records))
    text, vision = (TINY_TEXT, TINY_VISION) if shape == "tiny" else ({**SHAPES[shape], **LAYERS}, {})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        write_hub_checkpoint(folder / "model", [" ".join(map(str, QUESTION.values()))] * 9, True, text, vision)


def run(script, folder, model, **settings):
    """Run one stage; print its metrics of each step."""
    name = script.removesuffix(".py")
    settings = {
        "model": folder / model,
        "records": folder / "records.json",
        "data_root": folder,
        "output_dir": folder / name,
        **settings,
    }
    command = [sys.executable, script, "--config", "configs/3b_one_gpu.yaml"]
    for key, value in settings.items():
        command += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    begin = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    print(f"{script}: {time.perf_counter() - begin:.0f} s in all")
    metrics = folder / name / "metrics.jsonl"
    if metrics.exists():
        for row in read_jsonl(metrics):
            numbers = {metric: round(row[metric], 2) for metric in METRICS if metric in row}
            print(f"    step {row['step']}: {numbers}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["3b", "tiny"], default="3b", help="default: 3b")
    parser.add_argument("--max_new_tokens", type=int, default=768, help="length of every completion; default: 768")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all, in this order")
    args = parser.parse_args()
    settings = {
        "sft": {"steps": 3},
        "tgrpo": {"steps": 3, "max_new_tokens": args.max_new_tokens},
        "evaluate": {"orders": ["ordered", "shuffled"], "benchmarks": [], "max_new_tokens": args.max_new_tokens},
    }
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        begin = time.perf_counter()
        make_files(folder, args.shape)
        print(f"checkpoint and clips: {time.perf_counter() - begin:.0f} s", flush=True)
        model = "model"
        for stage in STAGES:
            if stage in args.stages:
                run(f"{stage}.py", folder, model, **settings[stage])
                model = f"{stage}/final"
    print("done")


if __name__ == "__main__":
    main()
