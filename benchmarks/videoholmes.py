"""Video-Holmes: multiple choice about short suspense films, whose clues are spread over time. Score: correct / total.

files    test_Video-Holmes.json
videos   videos_cropped/<video ID>.mp4
"""

from benchmarks.shared import choice_field, make_record, text_field

FILES = [["test_Video-Holmes.json"]]


def records(row, number, file, base):
    video = text_field(row, "video ID")
    options = row.get("Options")
    if not isinstance(options, dict) or not options:
        raise ValueError(f"Options: expected {{letter: text}}, got {options!r:.80}")
    letters = sorted(options)
    if letters != [chr(ord("A") + i) for i in range(len(letters))]:
        raise ValueError(f"Options: expected letters from A on, got {', '.join(letters)}")
    yield make_record(
        f"{video}/{row.get('Question ID', number - 1)}",
        text_field(row, "Question Type"),
        text_field(row, "Question"),
        choice_field(row, "Answer", letters),
        f"videos_cropped/{video}.mp4",
        [f"{letter}. {options[letter]}" for letter in letters],
    )
