"""VideoMMMU: lectures, and questions about them in three tracks. Score: the mean of the tracks.

    files    data/<track>_video.json or <Track>/test-*.parquet
    videos   <Discipline>/<id>.mp4

Letters are scored by equality, open answers by MMMU's lenient rule. In the Adaptation track the question's image is the
last frame. (The authors' knowledge gain, from a second run without the lecture, is not computed.)
"""

import re
from itertools import product
from pathlib import Path

from benchmarks.shared import make_record, mean_of_parts, one_of, text_field
from support.parsing import extract_answer

TRACKS = ("Perception", "Comprehension", "Adaptation")
FILES = [[f"data/{track.lower()}_video.json" for track in TRACKS], [f"{track}/test-*.parquet" for track in TRACKS]]
KEYS = ("track", "number")
# folder of the videos: its subjects
DISCIPLINES = {
    "Art": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Humanities": "History Literature Sociology Psychology",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
    "Mechanical_Engineering",
}
DISCIPLINE_OF = {}
for folder, subjects in DISCIPLINES.items():
    DISCIPLINE_OF |= dict.fromkeys(subjects.split(), folder)


def records(row, number, file, base):
    track = one_of("track", row.get("track") or file.parent.name, TRACKS)
    name = text_field(row, "id")
    subject = one_of("subject in id", "_".join(name.split("_")[1:-1]), DISCIPLINE_OF)
    question = text_field(row, "question")
    answer = text_field(row, "answer")
    options = row.get("options") or ()
    record = make_record(f"{track}/{name}", track, question, answer, f"{DISCIPLINE_OF[subject]}/{name}.mp4", options)
    if track == "Adaptation":
        # in a parquet file, an object with the path
        image = row["image"].get("path") if isinstance(row.get("image"), dict) else row.get("image")
        if image and Path(base, image).is_file():
            record["image_path"] = image
        else:
            record["last_frame"] = True
    yield record


def score_answer(row, answer, truth):
    """(score, True) of an open answer; None for a letter, which has the general rule."""
    if row["problem_type"] == "multiple choice":
        return None
    return mmmu_open(answer, extract_answer(row["solution"])), True


# The phrases after which VideoMMMU's evaluation (MMMU's, with more of them) looks for an open answer.
LEADS = (
    "could be ,so ,is ,thus ,therefore ,final ,answer ,result ,are ,in total ,total ,identify ,recognize ,"
    "calculated as ,counted as ,measured as ,observed as ,concluded as ,found to be ,equals ,determined to be ,"
    "number of ,value is ,adds up to ,have ,has "
).split(",")
# MMMU's three patterns: 1,000 · 1e3 · 12.5
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def comparable_forms(text):
    """MMMU's comparable forms: a number to two decimals, else lower case; a single letter needs a space beside it."""
    text = text.strip().lower()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        pass
    if len(text) == 1:
        return [f" {text}", f"{text} "]
    return [text]


def closing_phrase(sentence, leads):
    """The shortest text after one of the leads; an empty one is replaced by the next, as in the original."""
    phrase = ""
    for lead in leads:
        if lead in sentence:
            found = sentence.split(lead)[-1].strip()
            if not phrase or len(found) < len(phrase):
                phrase = found
    return phrase


def mmmu_open(answer, truth):
    """MMMU's lenient rule for open answers: 1 if any number or closing phrase of the answer meets the truth.

    A truth that is a list in text form (one row of VideoMMMU) is met by any of its entries (ours).

    >>> mmmu_open("4, not 5", "5"), mmmu_open("x = 3.429", "3.43"), mmmu_open("3.5", "5")
    (1.0, 1.0, 0.0)
    """
    whole = answer.strip().strip(".").lower()
    sentences = whole.split("\n")
    phrases = []
    for number, sentence in enumerate(sentences, 1):
        phrase = closing_phrase(sentence, [*LEADS, "="] if number == len(sentences) else LEADS)
        if phrase and phrase not in list(":,.!?;'"):
            phrases.append(phrase)
    guesses = []
    for phrase in phrases or [whole]:
        guesses += comparable_forms(phrase)
        for pattern in NUMBERS:
            for match in re.findall(pattern, phrase):
                guesses += comparable_forms(match)
    entries = [truth]
    if truth.startswith("["):
        entries = [entry.strip(" []'\"") for entry in truth.split(",")]
    truths = []
    for entry in entries:
        if entry:
            truths += comparable_forms(entry)
    for guess, form in product(guesses, truths):
        # equal numbers, or a text that contains the truth
        if guess == form or (isinstance(guess, str) and isinstance(form, str) and form in guess):
            return 1.0
    return 0.0


def extra_scores(rows, by_task):
    """Mean of the tracks; the plain mean of all questions if a row names no track."""
    tracks = [by_task[track] for track in TRACKS if track in by_task]
    return mean_of_parts(tracks) if sum(track["n"] for track in tracks) == len(rows) else {}
