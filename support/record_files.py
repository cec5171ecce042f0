"""Files of records: reading them, and checking each record before anything starts.

A file that is not a list of records stops the run at once. A bad row is skipped, counted and named, up to the fraction
`max_unreadable` of the rows.
"""

import functools
import json
import os
import re
import unicodedata
from pathlib import Path

from support import parsing, settings

# The fields that every record has, with their types.
REQUIRED_FIELDS = {
    "problem_id": (str, int),
    "problem": str,
    "data_type": str,
    "problem_type": str,
    "solution": (str, int, float),
    "path": str,
}
# "frame" is a folder of numbered stills.
DATA_TYPES = ("video", "image", "frame")
# What benchmarks and evaluation write into records and answers. In a user's records these fields mean something else.
RESERVED = set(
    "benchmark id error image_path last_frame prediction frames frame_order index settings question_rows accuracy "
    "format answered n_tokens truncated status result duration domain sub_category dim".split()
)
# Tokens that mean pixels or turns to the model, not words.
CONTROL_TOKEN = re.compile(r"<\|\w+\|>")
# What to write instead of a solution that cannot be read.
WANTED = {"multiple choice": "one letter, as in B", "numerical": "digits, as in 3.5", "regression": "digits, as in 3.5"}
# Tags that are not written as the model has to write them.
ODD_TAG = re.compile(r"(?!</?answer>)(?i:(?:<|&lt;)\s*/?\s*answer)")
# How other formats mark the position of the pixels in a question; in the middle of it "[image]" and "<img>" are words.
MARK = r"[\[<]/?(?:video|vid|image|img)[ _]?\d*/?[\]>]\s*"
PLACEHOLDER = re.compile(rf"[ \t]*</?(?:video|image)[ _]?\d*/?>|\A\s*(?:{MARK})+|(?:{MARK})+\Z", re.IGNORECASE)


def load_records(parse_solution, path, data_root, max_unreadable=0.0, need_process=False):
    """(records, bad rows) of a JSON or JSONL file: a list of dicts in file order, and {"row 7": what is wrong}.

    Rows count from 1. Solutions have their answer tags. parse_solution is rewards.parse_solution. Raises UserError that
    lists the bad rows if they are more than the fraction `max_unreadable` of all rows.
    """
    rows = read_rows(path)
    refuse_conversations(path, rows)
    usable, reasons = split_rows(parse_solution, rows, data_root, need_process)
    bad_rows = {f"row {number}": reason for number, reason in reasons.items()}
    if len(bad_rows) > max_unreadable * len(rows) or not usable:
        bad = f"{len(bad_rows)} of {len(rows)} rows are bad"
        lines = [f"{path}: {bad}, more than max_unreadable {max_unreadable} allows:"]
        lines += [f"  {name}: {reason}" for name, reason in bad_rows.items()][:1000]
        lines.append("Raise it to train without them, or: python -m tools.check_data --config C --stage S --out FILE")
        raise settings.UserError("\n".join(lines))
    return list(usable.values()), bad_rows


def split_rows(parse_solution, rows, data_root, need_process=False):
    """({row number: record}, {row number: what is wrong}), numbers from 1. Solutions get their answer tags."""
    usable = {}
    reasons = {}
    for number, row in enumerate(rows, 1):
        try:
            check_record(parse_solution, row, data_root, need_process)
            usable[number] = own_fields(row) | {"solution": parsing.tagged_solution(row["solution"])}
        except ValueError as error:
            reasons[number] = str(error)
    return usable, reasons


def own_fields(row):
    """The row of a user's file. Fields that have a meaning inside this program are kept under another name."""
    return {f"their_{name}" if name in RESERVED else name: value for name, value in row.items()}


def refuse_conversations(path, rows):
    """Raises UserError, one line, for a file of conversations in the format of LLaVA and other chat data sets."""
    names = rows[0] if isinstance(rows[0], dict) else ()
    if ("conversations" in names or "messages" in names) and "problem" not in names:
        raise settings.UserError(f"{path}: row 1 is a conversation, not a record: see docs/own_clips.md")


def check_record(parse_solution, row, data_root, need_process):
    """Raises ValueError naming the first wrong field of `row` and its value."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a record, got {row!r:.80}")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair is not text: {error.object[error.start :][:40]!a}") from None
    check_question(row)
    for name in ("problem", "solution", "process"):
        check_text(name, row.get(name))
    if isinstance(row["solution"], str) and ODD_TAG.search(row["solution"]):
        raise ValueError(f"solution: tags are written <answer> and </answer>, got {row['solution']!r:.80}")
    options = row.get("options") or []
    for text in options:
        check_text("options", text)
    try:
        parse_solution(row["solution"], row["problem_type"], options)
    except ValueError as error:
        wanted = WANTED.get(row["problem_type"])
        raise ValueError(f"{error}; write {wanted}" if wanted else str(error)) from None
    if need_process:
        check_process(row.get("process"))
        solution = parsing.tagged_solution(row["solution"]).strip()
        if not (solution.startswith("<answer>") and solution.endswith("</answer>")):
            raise ValueError(f"solution: text outside of the answer block, which SFT would teach: {solution!r:.80}")
    check_times(row)
    media_path(row["path"], data_root)


def check_question(row):
    """Raises ValueError if a required field is missing or has the wrong type, or if the options are wrong."""
    for name, kind in REQUIRED_FIELDS.items():
        if row.get(name) in (None, ""):
            raise ValueError(f"{name}: missing")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"{name}: expected text, got {row[name]!r:.80}")
    if not plain_problem(row):
        raise ValueError(f"problem: missing, there is only {row['problem']!r:.80}")
    if row["data_type"] not in DATA_TYPES:
        raise ValueError(f"data_type: expected one of {', '.join(DATA_TYPES)}, got {row['data_type']!r:.80}")
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
        raise ValueError(f"options: expected a list of texts, got {options!r:.80}")
    if row["problem_type"] == "multiple choice" and not options:
        raise ValueError("options: a multiple choice question without options")
    check_labels(options)


def check_labels(options):
    """Raises ValueError for letters of options that the prompt would contradict, and for more than 26 options."""
    letters = [chr(ord("A") + i) for i in range(len(options))]
    if len(options) > 26:
        raise ValueError(f"options: {len(options)} of them, but only 26 letters")
    labels = [match[1] for match in map(parsing.OPTION_LABEL.match, options) if match]
    misplaced = labels and set(labels) <= set(letters) and labels != letters
    if misplaced and (len(labels) == len(options) or len(labels) > 1):
        raise ValueError(f"options: their letters are {', '.join(labels)}, expected {', '.join(letters)} or none")


def check_text(name, text):
    """Raises ValueError if the model would not read the text as words."""
    if not isinstance(text, str):
        return
    token = CONTROL_TOKEN.search(text)
    if token:
        raise ValueError(f"{name}: holds {token[0]}, a token that the model takes for pixels or the end of a turn")


def check_process(process):
    """Raises ValueError unless `process` is a chain of thought in one think block."""
    if not isinstance(process, str) or not process.strip():
        raise ValueError("process: missing; the SFT stage needs a chain of thought")
    tags = [tag for tag, _, _ in parsing.tags_in(process)]
    text = process.strip()
    if tags != ["<think>", "</think>"] or not (text.startswith("<think>") and text.endswith("</think>")):
        raise ValueError(f"process: expected one think block and nothing else, <think>…</think>, got {process!r:.80}")


def check_times(row):
    """Raises ValueError if `start` and `end` of a clip, or the rate of a folder of stills, make no sense."""
    start = row.get("start")
    end = row.get("end")
    if start is not None or end is not None:
        if not is_number(start) or not is_number(end):
            raise ValueError(f"start, end: expected two numbers of seconds, got {start!r:.40}, {end!r:.40}")
        if not 0 <= start < end:
            raise ValueError(f"start, end: {start} to {end} is no part of a clip")
    rate = row.get("fps")
    if row["data_type"] == "frame" and rate is not None:
        if not is_number(rate) or not 0.001 <= rate <= 1000:
            raise ValueError(f"fps: expected stills per second, got {rate!r:.40}")


def is_number(value):
    """Whether a value from JSON is a number that can be a time in seconds (NaN is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def media_path(path, data_root):
    """The absolute path of media. Raises ValueError if it escapes data_root (symlinks are allowed)."""
    root = os.path.abspath(data_root)
    absolute = os.path.abspath(os.path.join(root, path))
    # compared by folders: as text, /data/media2 starts with /data/media
    if "\0" in path or os.path.commonpath([root, absolute]) != root:
        raise ValueError(f"path: leaves the data root {data_root}: {path!r:.80}; data_root must be above all media")
    return absolute


def check_data_root(records, data_root):
    """Raise UserError if the media of no record exist: `data_root` is probably another folder than this one."""
    if any(os.path.lexists(media_path(record["path"], data_root)) for record in records):
        return
    path = records[0]["path"]
    try:
        existing_path(path, data_root)
    except ValueError as error:
        missing = f"none of the media is in {data_root}; for example, {path}: {error}"
        raise settings.UserError(f"data_root: {missing}") from None


def existing_path(path, data_root):
    """The absolute path of media that exist. Raises ValueError, if possible with the name that is meant."""
    absolute = media_path(path, data_root)
    if os.path.lexists(absolute):
        return absolute
    name = path.replace("\\", "/").strip()
    stem, suffix = os.path.splitext(name)
    forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    for similar in (name, *forms, name.lower(), stem + suffix.swapcase()):
        if os.path.exists(os.path.join(data_root, similar)):
            # ascii: a name in another Unicode form looks equal
            raise ValueError(f"no such file; did you mean {similar!a}?")
    raise ValueError("no such file")


def plain_problem(record):
    """The question without the placeholders for pixels that other formats use.

    >>> plain_problem({"problem": "<video>\\nWhat is in <image> and where?"})
    'What is in and where?'
    """
    return PLACEHOLDER.sub("", record["problem"]).strip()


def unique_keys(pairs):
    """A JSON object as a dict. Raises ValueError if a key occurs twice: Python would keep the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {max(names, key=names.count)!r} occurs twice in one object")
    return found


def read_rows(path):
    """The list in a JSON file, or the lines of a JSONL file. Raises UserError for any other or an empty file."""
    # a pipe could be read only once, and a resumed run compares the file
    if Path(path).exists() and not Path(path).is_file():
        raise settings.UserError(f"{path}: not a file")
    try:
        # utf-8-sig: Windows programs may begin a file with a byte order mark
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise settings.UserError(f"{path}: cannot read these records: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise settings.UserError(f"{path}: not UTF-8 text: {error}") from None
    # NaN, which pandas writes for a missing value, is read as one
    parse = functools.partial(json.loads, object_pairs_hook=unique_keys, parse_constant=lambda name: None)
    rows = []
    where = path
    try:
        if text.lstrip().startswith("["):
            rows = parse(text)
        else:
            for number, line in enumerate(text.split("\n"), 1):
                where = f"{path}, line {number}"
                if line.strip():
                    rows.append(parse(line))
    except (ValueError, RecursionError) as error:
        has_comma = re.search(r",\s*[\]}]$", getattr(error, "doc", "")[: getattr(error, "pos", 0) + 1])
        expected = "no comma before it" if has_comma else "a list, or one record per line"
        raise settings.UserError(f"{where}: not JSON: {error}; expected {expected}") from None
    if not rows:
        raise settings.UserError(f"{path}: no records in this file")
    return rows
