"""The files of an evaluation that may be killed and resumed.

Each process appends its rows to predictions.<process>.jsonl. At the end, and when a run is resumed, one process merges
these files. A row has `index` (of its question), `frames` (their order), `question_rows` (how many rows its question
has, because a kill may cut off the last ones) and `settings` (all that the answers depend on).
"""

import re
from pathlib import Path

from accelerate.utils import gather_object

from support import settings, storage

MERGED = "predictions.jsonl"


def files(folder):
    """The files of this evaluation: predictions.jsonl and predictions.<process>.jsonl, no others."""
    found = sorted(Path(folder).glob("predictions*.jsonl"))
    return [file for file in found if re.fullmatch(r"predictions(\.\d+)?\.jsonl", file.name)]


def answered_before(accelerator, folder, records, made_with):
    """{index: rows} of the questions that were answered before. Those whose media could not be read are asked again."""
    answered = {}
    for index, rows in read_answers(folder, records, made_with).items():
        if not any("error" in row for row in rows):
            answered[index] = rows
    if answered:
        accelerator.print(f"{len(answered)} of {len(records)} questions were answered before, by the same weights")
    return answered


def start(accelerator, folder, answered):
    """Collect the answers of earlier runs in one file. Collective: no process writes before all have read."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        merge_files(folder, "predictions.0.jsonl", answered)
    accelerator.wait_for_everyone()


def finish(accelerator, folder, records, made_with, written):
    """All rows on the main process, None on the others. UserError if a question in `written`, on any rank, is lost."""
    # a question without rows has none of the orders asked for: a picture, or a clip of one frame
    written = gather_object(written)
    if not accelerator.is_main_process:
        return None
    answered = read_answers(folder, records, made_with)
    lost = set(written) - set(answered)
    if lost:
        raise settings.UserError(f"{folder}: {len(lost)} of {len(records)} answers are missing; start again")
    return merge_files(folder, MERGED, answered)


def read_answers(folder, records, made_with):
    """{index: rows} of the questions with all rows, from the files of all processes. UserError for other files."""
    found = {}
    for file in files(folder):
        try:
            for row in storage.read_jsonl(file):
                check_same_evaluation(folder, row, records[row["index"]], made_with)
                found.setdefault(row["index"], {})[row.get("frames")] = row
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise settings.UserError(f"{file}: no answers of this evaluation; choose another --output_dir") from None
    answered = {}
    for index, by_order in found.items():
        rows = list(by_order.values())
        if len(rows) == rows[0].get("question_rows"):
            answered[index] = rows
    return answered


def check_same_evaluation(folder, row, record, made_with):
    """Raise UserError if a row was made with other settings, or from another question."""
    changed = [f"{name} {value!r}" for name, value in row["settings"].items() if made_with.get(name) != value]
    if changed:
        raise settings.UserError(f"{folder}: has answers made with {', '.join(changed)}; choose another --output_dir")
    if any(row.get(name) != value for name, value in record.items() if name != "process"):
        raise settings.UserError(f"{folder}: has answers to other questions; choose another --output_dir")


def merge_files(folder, name, answered):
    """Write all rows, in the order of the questions, into one file, and remove the other ones. Returns the rows."""
    rows = []
    for index in sorted(answered):
        rows += answered[index]
    storage.write_atomic(folder / name, "".join(map(storage.json_line, rows)))
    for file in files(folder):
        if file.name != name:
            file.unlink()
    return rows
