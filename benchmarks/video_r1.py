"""Video-R1's own files eval_<benchmark>.json, which are read if a benchmark's official files are not there.

Their rows are records already. Their paths start at the folder that has the file.
"""

from pathlib import Path

from benchmarks.shared import text_field


def records(row, number, file, base):
    row_id = text_field(row, "problem_id")
    path = text_field(row, "path")
    task = row.get("original_question_type") or text_field(row, "problem_type")
    if file.stem == "eval_mmvu":
        # only the path names the subject
        task = Path(path).parent.name
    yield {**row, "id": row_id, "task": task, "options": row.get("options") or []}
