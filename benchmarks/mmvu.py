"""MMVU: expert questions about videos of 27 subjects. Score: multiple choice only.

    files    validation.json
    videos   videos/<Subject>/<n>.mp4

Open-ended questions need a judge model: they are kept and listed as unscored.
"""

from benchmarks.shared import choice_field, make_record, text_field

FILES = [["validation.json"]]


def records(row, number, file, base):
    kind = choice_field(row, "question_type", ("multiple-choice", "open-ended"))
    metadata = row["metadata"] if isinstance(row.get("metadata"), dict) else {}
    subject = text_field(metadata, "subject")
    path = "videos/" + text_field(row, "video").split("videos/")[-1]
    question = (text_field(row, "id"), subject, text_field(row, "question"), text_field(row, "answer"), path)
    if kind == "open-ended":
        yield make_record(*question, (), "free-form", unscored=True)
        return
    options = [f"{letter}. {choice}" for letter, choice in (row.get("choices") or {}).items() if choice]
    yield make_record(*question, options, "multiple choice")


def is_unscored(row):
    return row.get("problem_type") not in (None, "multiple choice")


def extra_scores(rows, by_task):
    return {"note": "multiple choice only; open-ended questions need a judge and are listed as unscored"}
