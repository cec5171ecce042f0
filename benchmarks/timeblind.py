"""TimeBlind: pairs of videos that differ in time only, and two questions about both. Score: instances, all four right.

    files    data.jsonl
    videos   <video_path>, in the folder of the file

Rows 4k to 4k + 3 are one instance. An instance with a missing answer counts as wrong, as in the authors' code. The best
model of the paper answers 48.2 % of the instances, people 98.2 %.
"""

import re

from benchmarks.shared import choice_field, make_record, mean_percent, mean_score, one_of, text_field, with_error
from support.parsing import parse_letter

FILES = [["data.jsonl"]]
HINTS = {"yes_no": "Answer yes or no.", "multiple_choice": "Answer A or B."}


def records(row, number, file, base):
    kind = choice_field(row, "type", tuple(HINTS))
    index = int(text_field(row, "index"))
    answer = text_field(row, "answer").strip().lower()
    one_of("answer", answer, ("yes", "no") if kind == "yes_no" else ("a", "b"))
    yield make_record(
        str(index),
        kind,
        f"{text_field(row, 'question')}\n{HINTS[kind]}",
        answer if kind == "yes_no" else answer.upper(),
        text_field(row, "video_path").removeprefix("TimeBlind/"),
        problem_type="free-form",
        instance=index // 4,
    )


def score_answer(row, answer, truth):
    if row["task"] == "yes_no":
        words = re.findall(r"\b(yes|no)\b", answer.lower())
        # a text with both says neither
        found = words[0] if len(set(words)) == 1 else None
    else:
        found = parse_letter(answer)
    return float(found == truth), found is not None


def extra_scores(rows, by_task):
    """Share of the instances whose four answers are right; `accuracy` is that of single answers."""
    right = {}
    for row in rows:
        instance = row.get("instance", row["id"])
        right[instance] = right.get(instance, 0) + (row["result"][0] == 1)
    share = mean_percent([count == 4 for count in right.values()])
    accuracy = mean_score(rows)
    single = with_error(accuracy["score"], accuracy["se"])
    return {
        "score": share["score"],
        "se": share["se"],
        "instances": share["n"],
        "accuracy": accuracy["score"],
        "se_accuracy": accuracy["se"],
        "note": f"share of {len(right)} instances with all four right; single answers: {single}",
    }
