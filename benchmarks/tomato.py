"""TOMATO: multiple choice about motion (count, direction, rotation, shape, speed, visual cues). Score: correct / total.

files    data/<task>.json
videos   videos/<demonstration type>/<key>.mp4

The authors show 16 frames.
"""

from benchmarks.shared import make_record, text_field

FILES = [["data/*.json"]]
KEYS = ("id",)


def records(row, number, file, base):
    options = [str(option) for option in row.get("options") or ()]
    answer = row.get("answer")
    if not isinstance(answer, int) or not 0 <= answer < len(options):
        raise ValueError(f"answer: expected the number of an option from 0, got {answer!r:.80}")
    yield make_record(
        f"{file.stem}/{text_field(row, 'id')}",
        file.stem,
        text_field(row, "question"),
        chr(ord("A") + answer),
        f"videos/{text_field(row, 'demonstration_type')}/{text_field(row, 'key')}.mp4",
        options,
    )
