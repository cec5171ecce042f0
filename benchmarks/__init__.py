"""Eleven video benchmarks, one file each: their authors' files become records (see data.py), and answers become scores.

    benchmarks/<name>.py    one benchmark: its files, its rows, its rules
    __init__.py             the list of them; their files to records
    answers.py              answers to scores
    orders.py               the scores in each order of frames, and their differences
    score.py                the tables of scores, and the command that scores saved answers

To add a benchmark, write its file and add its name to NAMES. A benchmark's file has

    FILES        patterns of its annotation files. All patterns of the first list that finds a file are read
    records      a generator: one row of these files becomes records

and, where its authors do something else than the rewards, any of

    KEYS         fields for the keys of a JSON file that is not a list of rows, from the outermost key on
    FOLDER       the folder of its files, if that has another name
    score_answer (score, whether the answer could be read) of a row, its answer and its truth; None: the general rule
    is_unscored  whether a row needs a judge model
    check_row    raises ValueError for a row that cannot be scored
    extra_scores scores that replace the plain mean or are added to it, and a `note` to print below the table
    GROUPS       fields of its records by which scores are listed, too

Annotation files and media are in root/<name>/ or root/.
"""

import json
import os
from collections import Counter
from importlib import import_module
from itertools import chain
from pathlib import Path

from rewards import parse_solution
from support.record_files import check_record, read_rows
from support.settings import UserError

NAMES = (
    "vsibench videommmu mvbench tempcompass mmvu videomme "
    # made for time
    "tvbench tomato timeblind vsibench_debiased videoholmes"
).split()
MODULES = {name: import_module(f"benchmarks.{name}") for name in NAMES}

# Accuracy in percent, as published in the Video-R1 paper; three scores are those of 16, 32 and 64 frames. The score on
# Video-Holmes is from that benchmark's paper.
PUBLISHED = {
    "GPT-4o": {"vsibench": (34.0,), "videommmu": (61.2,), "mmvu": (75.4,), "videomme": (71.9,)},
    "Qwen2.5-VL-7B (CoT prompt)": {
        "vsibench": (27.7, 30.1, 31.4),
        "videommmu": (47.8, 48.1, 50.4),
        "mmvu": (59.2, 60.0, 60.0),
        "mvbench": (57.4, 59.0, 59.2),
        "tempcompass": (72.2, 72.6, 72.9),
        "videomme": (53.1, 56.6, 59.6),
    },
    "Video-R1-7B": {
        "vsibench": (34.6, 35.8, 37.1),
        "videommmu": (49.8, 52.3, 52.4),
        "mmvu": (64.2, 63.8, 63.8),
        "mvbench": (62.7, 63.9, 64.8),
        "tempcompass": (72.6, 73.2, 73.2),
        "videomme": (57.4, 59.3, 61.4),
        "videoholmes": (36.5,),
    },
}


def load_benchmark(name, root, clip_segments=True):
    """Records of one benchmark, in the order of its files, checked, with paths that are relative to `root`.

    With `clip_segments` false, MVBench's five tasks on a part of a video get the whole video. Raises UserError with
    every bad row, its file and number.
    """
    base, files = find_files(name, root)
    module = MODULES[name]
    found = []
    problems = []
    first_seen = {}
    for file in files:
        for number, row in enumerate(read_file(file, module), 1):
            where = f"{file}, row {number}"
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {row!r:.80}")
                for record in module.records(row, number, file, base):
                    record |= {"benchmark": name, "problem_id": record["id"]}
                    if not clip_segments:
                        record = {key: value for key, value in record.items() if key not in ("start", "end")}
                    for key in record.keys() & {"path", "image_path"}:
                        record[key] = os.path.normpath(os.path.join(os.path.relpath(base, root), record[key]))
                    check_record(parse_solution, record, root, need_process=False)
                    if record["id"] in first_seen:
                        raise ValueError(f"id {record['id']!r} is used twice, first in {first_seen[record['id']]}")
                    first_seen[record["id"]] = where
                    found.append(record)
            except (ValueError, TypeError, AttributeError) as error:
                problems.append(f"  {where}: {error}")
    if problems:
        raise UserError(f"{name}: {len(problems)} bad rows:\n" + "\n".join(problems))
    return found


def find_files(name, root):
    """(folder, annotation files in it). Raises UserError that names what was looked for."""
    if name not in MODULES:
        raise UserError(f"no benchmark {name!r}: {', '.join(NAMES)}")
    module = MODULES[name]
    for patterns in module.FILES:
        for base in dict.fromkeys((Path(root, name), Path(root, getattr(module, "FOLDER", name)), Path(root))):
            files = []
            for pattern in patterns:
                files += sorted(base.glob(pattern))
            if files:
                return base, files
    wanted = ", ".join(chain.from_iterable(module.FILES))
    raise UserError(f"{name}: no annotation files in {Path(root, name)} or {root}; looked for {wanted}")


def read_file(path, module):
    """Rows of a JSON, JSONL or parquet file. If the module has KEYS, its JSON files are nested: see flatten."""
    if path.suffix == ".parquet":
        return read_parquet(path)
    if not hasattr(module, "KEYS"):
        return read_rows(path)
    try:
        return flatten(json.loads(path.read_text(encoding="utf-8")), module.KEYS)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not in this benchmark's format: {error}") from None


def flatten(table, keys):
    """Rows of nested JSON objects and lists, with the keys that lead to a row as its fields `keys`.

    >>> flatten({"a": [{"question": "?"}]}, ("video", "index"))
    [{'question': '?', 'index': 0, 'video': 'a'}]
    """
    if not keys:
        return [table]
    rows = []
    for key, value in table.items() if isinstance(table, dict) else enumerate(table):
        rows += [row | {keys[0]: key} for row in flatten(value, keys[1:])]
    return rows


def read_parquet(path):
    """Rows of a parquet file, with the `index` that TempCompass's JSON lists give a question."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot read this parquet file: {error}") from None
    seen = Counter()
    for row in rows:
        key = (row.get("video_id"), row.get("dim"))
        row["index"] = seen[key]
        seen[key] += 1
    return rows


def missing_media(records, root):
    """Paths, relative to root, of the videos, frame folders and question images that do not exist; each once."""
    paths = chain.from_iterable((record["path"], record.get("image_path")) for record in records)
    return [path for path in dict.fromkeys(paths) if path and not os.path.exists(os.path.join(root, path))]


def join_annotations(rows, root):
    """The rows, with the fields of the official files in `root` added to those without a solution.

    What a row already has wins. Its id is the record's, or the part after "<task>/" if the row has the task. Raises
    UserError with every unknown id.
    """
    known = {}
    for name in sorted({str(row.get("benchmark")) for row in rows if is_bare(row)}):
        known[name] = {record["id"]: record for record in load_benchmark(name, root)}
    joined = []
    problems = []
    for row in rows:
        if is_bare(row):
            records = known[row["benchmark"]]
            record = records.get(str(row.get("id"))) or records.get(f"{row.get('task')}/{row.get('id')}")
            if record is None:
                problems.append(f"{row['benchmark']} {row.get('id')!r}")
                continue
            given = {key: value for key, value in row.items() if value}
            row = {**row, **record, **given}
        joined.append(row)
    if problems:
        raise UserError(f"{len(problems)} predictions are of no question in {root}: {', '.join(problems)}")
    return joined


def is_bare(row):
    """True for an answer without its solution."""
    return isinstance(row, dict) and not row.get("solution") and not row.get("error")
