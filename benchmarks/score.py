"""Scores saved answers, without a model. evaluate.py prints the same tables.

    python -m benchmarks.score predictions.jsonl
    python -m benchmarks.score predictions.jsonl --annotations DIR      # rows without solutions

The rows have `benchmark`, `id` and `prediction`; those of evaluate.py also have the solution and the order of frames.
Without a solution, the official files in DIR are joined by id. summary.json is written beside the predictions:
{benchmark: {"score": percent, "se", "n", "answered", "by_task", "orders", …}, "settings": {…}}.
"""

import argparse
import json
from pathlib import Path

from benchmarks import PUBLISHED, join_annotations
from benchmarks.answers import GROUPS
from benchmarks.orders import print_orders, summarise
from benchmarks.shared import with_error
from support.record_files import read_rows
from support.storage import write_atomic
from support.tables import table

# what a reader of a score has to know about its answers: {key of score_benchmark: heading}
ANSWER_COLUMNS = {"unparsed": "unread", "lenient": "read leniently", "truncated": "cut off"}


def print_table(summary):
    """Print our scores with their standard errors, by task below, beside the published ones; then how answers ended."""
    header = ["percent", "n", "score", *(f"{model} (published)" for model in PUBLISHED)]
    rows = []
    answers = []
    notes = []
    for name, part in summary.items():
        published = ["/".join(map(str, scores.get(name, ()))) for scores in PUBLISHED.values()]
        rows.append([name, part["n"], with_error(part["score"], part["se"]), *published])
        for key in ("by_task", *(f"by_{group}" for group in GROUPS)):
            # "by_sub_category": "sub-category Tennis"
            kind = "" if key == "by_task" else f"{key[3:].replace('_', '-')} "
            for label, line in part.get(key, {}).items():
                score = with_error(line["score"], line["se"])
                rows.append([f"  {kind}{label}", line["n"], score, *[""] * len(PUBLISHED)])
        shares = ["–" if part[key] is None else f"{part[key]:.1%}" for key in ANSWER_COLUMNS]
        answers.append([name, part["n"], *shares, len(part["unusable"])])
        notes += [f"{name}: {note}" for note in notes_of(part)]
    print("\n".join([table(header, rows), "published scores: at 16/32/64 frames if there are three", *notes]))
    print("\n" + table(["answers", "n", *ANSWER_COLUMNS.values(), "media missing or bad"], answers))


def notes_of(part):
    """What the table does not show of a benchmark, one line each."""
    notes = [part["note"]] if "note" in part else []
    for status in ("unscored", "unusable"):
        if part[status]:
            notes.append(f"{len(part[status])} {status}, not in n")
    return notes


def write_summary(rows, predictions):
    """Score the rows of the file `predictions`, write summary.json beside it, and print the tables."""
    path = predictions.with_name("summary.json")
    summary = summarise(rows)
    distinct = list({json.dumps(row["settings"]): row["settings"] for row in rows if "settings" in row}.values())
    made_with = {"settings": distinct[0] if len(distinct) == 1 else distinct}
    write_atomic(path, json.dumps(summary | made_with if distinct else summary, indent=2))
    print_table(summary)
    print_orders(summary)
    print(f"every answer: {predictions}\nall numbers:  {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", help="JSON or JSONL file of answers")
    parser.add_argument("--annotations", help="folder of the benchmarks' files, for rows without a solution")
    args = parser.parse_args(argv)
    rows = read_rows(args.predictions)
    if args.annotations:
        rows = join_annotations(rows, args.annotations)
    write_summary(rows, Path(args.predictions))


if __name__ == "__main__":
    main()
