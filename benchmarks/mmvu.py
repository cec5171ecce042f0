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
    # an open-ended question has empty choices
    options = [f"{letter}. {choice}" for letter, choice in (row.get("choices") or {}).items() if choice]
    yield make_record(
        text_field(row, "id"),
        text_field(metadata, "subject"),
        text_field(row, "question"),
        text_field(row, "answer"),
        "videos/" + text_field(row, "video").split("videos/")[-1],
        options,
        "multiple choice" if kind == "multiple-choice" else "free-form",
    )


def is_unscored(row):
    return row.get("problem_type") not in (None, "multiple choice")


def extra_scores(rows, by_task):
    return {"note": "multiple choice only; open-ended questions need a judge and are listed as unscored"}
