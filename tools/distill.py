"""Turns the good answers of a large model into chains of thought for sft.py.

python -m tools.distill predictions.jsonl --out cot.json --data_root DIR

The predictions are those of evaluate.py. For each question the most accurate answer is kept, the first of equals: its
think block becomes `process`, and `solution` stays the truth. An answer must have the right format, a thought, frames
in order, and an accuracy above rewards.CORRECT.
"""

import json
from collections import Counter

from rewards import CORRECT, accuracy_reward, format_reward, parse_solution
from support import record_files, storage
from support.settings import UserError
from tools import shared

# fields of a prediction that its record keeps
FIELDS = ("problem_id", "problem", "data_type", "problem_type", "options", "solution", "path", "data_source")
FIELDS += ("start", "end", "fps")


def distill(rows, data_root):
    """(records for sft.py, Counter of why the others were dropped). UserError for a row that is not a prediction."""
    # question -> (accuracy, record)
    best = {}
    dropped = Counter()
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict) and row.get("error"):
            dropped["media unusable"] += 1
            continue
        try:
            record_files.check_record(parse_solution, row, data_root, need_process=False)
        except ValueError as error:
            raise UserError(f"row {number} of the predictions: {error}") from None
        completion = row.get("prediction") or ""
        thought = completion.partition("<think>")[2].partition("</think>")[0].strip()
        accuracy = accuracy_reward(completion, row["solution"], row["problem_type"])
        question = (row.get("benchmark"), row.get("id"), row["problem"], row["path"], row["solution"])
        if row.get("frames", "ordered") != "ordered":
            dropped["frames were not in order"] += 1
        elif row.get("image_path") or row.get("last_frame"):
            # records cannot ask for these
            dropped["a question about a picture of its own, or about the last frame"] += 1
        elif not format_reward(completion):
            dropped["not one think block and one answer"] += 1
        elif not thought:
            dropped["no thought"] += 1
        elif accuracy <= CORRECT:
            dropped["answer not accurate enough"] += 1
        else:
            if question in best:
                dropped["another answer to the same question"] += 1
            if question not in best or accuracy > best[question][0]:
                record = {name: row[name] for name in FIELDS if name in row}
                best[question] = (accuracy, record | {"process": f"<think>{thought}</think>"})
    return [record for _, record in best.values()], dropped


def main(argv=None):
    parser = shared.parser(__doc__)
    parser.add_argument("predictions", metavar="predictions.jsonl")
    parser.add_argument("--out", required=True, help="JSON file of records to write")
    parser.add_argument("--data_root", default=".", help="folder that the paths of the predictions are relative to")
    args = parser.parse_args(argv)
    storage.refuse_existing(args.out)
    rows = record_files.read_rows(args.predictions)
    records, dropped = distill(rows, args.data_root)
    for reason, count in dropped.most_common():
        print(f"{count} dropped: {reason}")
    if not records:
        raise UserError(f"{args.predictions}: no answer can be kept, {args.out} is not written")
    storage.write_atomic(args.out, json.dumps(records, indent=1, ensure_ascii=False))
    print(f"{len(records)} of {len(rows)} answers kept: {args.out}")


if __name__ == "__main__":
    main()
