"""Video-R1's own files eval_<benchmark>.json, which are read if a benchmark's official files are not there.

Their rows are records already. Their paths start at the folder that has the file.
"""

from pathlib import Path

from benchmarks.shared import text_field


def records(row, number, file, base):
    problem_type = text_field(row, "problem_type")
    task = row.get("original_question_type") or problem_type
    if file.stem == "eval_mmvu":
        # only the path names the subject
        task = Path(text_field(row, "path")).parent.name
    row_id = text_field(row, "problem_id")
    yield {**row, "id": row_id, "task": task, "options": row.get("options") or [], "path": text_field(row, "path")}
