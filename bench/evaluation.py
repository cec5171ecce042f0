"""Times an evaluation with its questions grouped by length, and in the order of the file.

    python bench/evaluation.py --run runs/toy           # a finished run of toy.py; about a minute

Every other test question of the toy gets a long text. The two ways take turns, so that a slow minute affects both; the
median of their ratios is printed, and how many answers differ (greedy decoding).
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from accelerate.state import AcceleratorState

import evaluate
from support.record_files import read_rows
from support.settings import load_config
from support.storage import read_jsonl

FILLER = " The clip was made by a program that draws a shape on a coloured background." * 12


def answers(run, records, folder, order):
    """(seconds, answers in the order of the questions) of one evaluation whose questions are asked in `order`."""
    arguments = ["--config", "configs/toy.yaml", "--model", f"{run}/tgrpo/final", "--data_root", f"{run}/world"]
    arguments += ["--records", str(records), "--output_dir", str(folder), "--orders", "ordered", "--num_workers", "0"]
    cfg = load_config(evaluate.EvalConfig, "evaluate", arguments)
    evaluate.by_length = order
    AcceleratorState._reset_state(reset_partial_state=True)
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        evaluate.answer(cfg)
    seconds = time.perf_counter() - begin
    return seconds, [row["prediction"] for row in read_jsonl(folder / "predictions.jsonl")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/toy", help="folder of a finished run of toy.py; default: runs/toy")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    questions = read_rows(f"{args.run}/world/test.json")
    for question in questions[::2]:
        question["problem"] += FILLER
    orders = {"grouped": evaluate.by_length, "in the order of the file": lambda records: range(len(records))}
    seconds = {name: [] for name in orders}
    texts = {}
    with tempfile.TemporaryDirectory() as folder:
        records = Path(folder) / "mixed.json"
        records.write_text(json.dumps(questions), encoding="utf-8")
        # the first round warms up
        for number in range(args.rounds + 1):
            for name, order in orders.items():
                elapsed, texts[name] = answers(args.run, records, Path(folder) / f"{name} {number}", order)
                seconds[name].append(elapsed)
    ratios = [b / a for a, b in zip(*(times[1:] for times in seconds.values()))]
    grouped, plain = texts.values()
    differ = sum(a != b for a, b in zip(grouped, plain, strict=True))
    for name, times in seconds.items():
        print(f"{name}: {statistics.median(times[1:]):.1f} s")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"{differ} of {len(plain)} answers differ")


if __name__ == "__main__":
    main()
