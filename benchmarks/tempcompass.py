"""TempCompass: temporal concepts, asked in three formats. Score: all questions pooled.

    files    questions/<format>.json or <format>/test-*.parquet
    videos   videos/<video_id>.mp4

The fourth format, captioning, needs a judge model and is left out. Letters have the authors' strict rule: "B", or a
text that begins with "B." or "B)".
"""

import re

from benchmarks.shared import make_record, mean_score_by, one_of, text_field

FORMATS = ("multi-choice", "yes_no", "caption_matching")
FILES = [[f"questions/{name}.json" for name in FORMATS], [f"{name}/test-*.parquet" for name in FORMATS]]
KEYS = ("video_id", "dim", "index")
GROUPS = ("dim",)


def records(row, number, file, base):
    """Multi-choice options are lines of the question; the other two formats are answered in words."""
    form = file.stem if file.suffix == ".json" else file.parent.name
    video = text_field(row, "video_id")
    dim = text_field(row, "dim")
    question = text_field(row, "question")
    answer = text_field(row, "answer")
    options = []
    if form == "multi-choice":
        lines = question.split("\n")
        options = [line for line in lines[1:] if re.match(r"[A-D][.)]", line)]
        question = "\n".join(line for line in lines if line not in options)
        if re.match(r"[A-D][.)]", answer):
            answer = answer[:1]
    elif form == "yes_no":
        answer = one_of("answer", answer.lower(), ("yes", "no"))
        question += "\nAnswer yes or no."
    else:
        one_of("answer", answer, question.split("\n")[1:])
        question += "\nAnswer with the label of the one that matches."
    row_id = f"{form}/{video}/{dim}/{row['index']}"
    problem_type = "multiple choice" if form == "multi-choice" else "free-form"
    yield make_record(row_id, form, question, answer, f"videos/{video}.mp4", options, problem_type, dim=dim)


def is_unscored(row):
    return row.get("task") == "captioning"


def score_answer(row, answer, truth):
    """(score, whether the answer could be read) by the authors' rules without a judge model; None for other formats."""
    if row["problem_type"] == "multiple choice":
        match = re.match(r"([A-D])(?:[.)]|$)", answer)
        letter = match[1] if match else None
        return float(letter == truth), letter is not None
    if row.get("task") == "yes_no":
        # as in the official rule, "Not sure" begins with no
        word = next((word for word in ("yes", "no") if answer.lower().startswith(word)), None)
        return float(word == truth), word is not None
    if row.get("task") == "caption_matching":
        lines = [line for line in (row.get("problem") or truth).split("\n") if ": " in line]
        return float(names_caption(answer, truth)), any(names_caption(answer, line) for line in lines)
    return None


def names_caption(answer, line):
    """True if the answer is this line "Option 2: text", its text, its label, or its index alone."""
    label, _, sentence = line.partition(": ")
    labels = (label, label.split()[-1])
    if answer in (line, sentence, *labels) or answer.replace(".", "") in labels:
        return True
    return answer.split(") ")[1:2] == [sentence]


def extra_scores(rows, by_task):
    """Adds the scores by dimension to each format."""
    for task, part in by_task.items():
        part["by_dim"] = mean_score_by([row for row in rows if row["task"] == task], "dim")
    return {"note": f"pooled over {', '.join(FORMATS)}; captioning, which needs a judge, is left out"}
