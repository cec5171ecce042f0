"""Eleven video benchmarks, one file each: their authors' files become records (see data.py), and answers become scores.

A benchmark's module has FILES (alternatives: of the first that finds a file, all patterns are read) and `records`, a
generator that turns a row of these files into records. If its authors score differently from the rewards, it also has
`score_answer`, `is_unscored`, `check_row`, `overall_score`, `extra_scores` or NOTE. This file has what they share.

Annotation files and media are in root/<name>/ or root/. JSON files are read before parquet files, which need pyarrow
(pip install pyarrow). If none is found, Video-R1's own eval_<name>.json is read. Ids are the authors' if they are
unique, else <track>/<id> (VideoMMMU), <task>/<row from 0> (MVBench, TVBench), <task>/<id> (TOMATO), <video>/<id>
(Video-Holmes) and <format>/<video_id>/<dim>/<number from 0> (TempCompass).

The prompt differs from the authors' harnesses. Answers are scored by their rules, except: the answer is the text of the
answer block, or all of a text without tags; a letter is read by rewards.parse_letter ("A or B" names none); and an
empty or unreadable answer is wrong (some harnesses drop it, MVBench's counts it as correct). Standard errors treat
questions as independent; they are too small if several questions share a video.
"""

import json
import math
import os
import re
from collections import Counter
from itertools import chain
from pathlib import Path

from benchmarks import (
    mmvu,
    mvbench,
    tempcompass,
    timeblind,
    tomato,
    tvbench,
    video_r1,
    videoholmes,
    videomme,
    videommmu,
    vsibench,
    vsibench_debiased,
)
from benchmarks.shared import ORDERS, answer_of, choice_field, mean_score, mean_score_by, text_field
from rewards import PROBLEM_TYPES, parse_solution
from support.parsing import extract_answer, number_or_nan, parse_letter
from support.record_files import read_rows
from support.settings import UserError
from support.tables import table

MODULES = {
    "vsibench": vsibench,
    "videommmu": videommmu,
    "mvbench": mvbench,
    "tempcompass": tempcompass,
    "mmvu": mmvu,
    "videomme": videomme,
    # made for time
    "tvbench": tvbench,
    "tomato": tomato,
    "timeblind": timeblind,
    "vsibench_debiased": vsibench_debiased,
    "videoholmes": videoholmes,
}
NAMES = tuple(MODULES)
# groups that are scored beside the tasks: TempCompass's, then Video-MME's
GROUPS = ("dim", "duration", "domain", "sub_category")
# fields of a prediction row that must be texts
TEXT_FIELDS = ("benchmark", "prediction", "solution", "problem_type", "problem", "task", "path", "error", *GROUPS)

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


# ----------------------------------------------------------------------------------------------------- files to records


def load_benchmark(name, root, clip_segments=True):
    """Records of one benchmark, in the order of its files. Raises UserError with every bad row, its file and number.

    With `clip_segments` false, MVBench's five tasks on a part of a video get the whole video. VideoMMMU's question-only
    records are there if their folder is.
    """
    # imported here because scoring needs no torch
    from support.record_files import media_path

    loaded = []
    for record in read_benchmark(name, root):
        if record["task"] == "question_only" and not os.path.isdir(os.path.dirname(media_path(record["path"], root))):
            continue
        if not clip_segments:
            record = {key: value for key, value in record.items() if key not in ("start", "end")}
        loaded.append(record)
    return loaded


def read_benchmark(name, root):
    """Every record in a benchmark's files, checked."""
    base, files, module = find_files(name, root)
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
                    found.append(checked_record(record, name, root, base))
                    if record["id"] in first_seen:
                        raise ValueError(f"id {record['id']!r} is used twice, first in {first_seen[record['id']]}")
                    first_seen[record["id"]] = where
            except (ValueError, TypeError, AttributeError) as error:
                problems.append(f"  {where}: {error}")
    if problems:
        raise UserError(f"{name}: {len(problems)} bad rows:\n" + "\n".join(problems))
    return found


def checked_record(record, name, root, base):
    """The record with its benchmark, and with paths that are relative to `root`. Raises ValueError if it is bad."""
    from support.record_files import check_record

    record = record | {"benchmark": name, "problem_id": record["id"]}
    for key in ("path", "image_path"):
        if key in record:
            record[key] = os.path.normpath(os.path.join(os.path.relpath(base, root), record[key]))
    check_record(parse_solution, record, root, need_process=False)
    return record


def find_files(name, root):
    """(folder, annotation files in it, module that reads them). Raises UserError that names what was looked for."""
    if name not in MODULES:
        raise UserError(f"no benchmark {name!r}: {', '.join(NAMES)}")
    alternatives = [(patterns, MODULES[name]) for patterns in MODULES[name].FILES]
    alternatives.append(([f"eval_{name}.json"], video_r1))
    for patterns, module in alternatives:
        folder = getattr(module, "FOLDER", name)
        for base in dict.fromkeys((Path(root, name), Path(root, folder), Path(root))):
            files = []
            for pattern in patterns:
                files += sorted(base.glob(pattern))
            if files:
                return base, files, module
    wanted = ", ".join(chain.from_iterable(patterns for patterns, _ in alternatives))
    raise UserError(f"{name}: no annotation files in {Path(root, name)} or {root}; looked for {wanted}")


def read_file(path, module):
    """Rows of a JSON, JSONL or parquet file; nested tables are flattened by the benchmark's module."""
    if path.suffix == ".parquet":
        return read_parquet(path)
    if path.parent.name != getattr(module, "NESTED_FOLDER", None):
        return read_rows(path)
    try:
        return module.flatten(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not in this benchmark's format: {error}") from None


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
    paths = []
    for record in records:
        paths.append(record["path"])
        if record.get("image_path"):
            paths.append(record["image_path"])
    return [path for path in dict.fromkeys(paths) if not os.path.exists(os.path.join(root, path))]


# ---------------------------------------------------------------------------------------------------- scoring an answer


def hook(benchmark, name, default):
    """A function of the benchmark's module, or the default."""
    return getattr(MODULES.get(benchmark), name, default)


def score_answer(row):
    """(score in [0, 1], whether the answer could be read) of a prediction. Raises ValueError if its solution is bad."""
    truth = parse_solution(row["solution"], row["problem_type"], row.get("options"))
    answer = answer_of(row["prediction"])
    if not answer:
        return 0.0, False
    result = hook(row["benchmark"], "score_answer", score_by_type)(row, answer, truth)
    if result is None:
        result = score_by_type(row, answer, truth)
    return result


def is_strict(row):
    """Whether the answer is written as asked: between answer tags, and a letter or a number alone if it should be one.

    Harnesses that compare strings, as Video-R1's does, read only such answers.
    """
    answer = extract_answer(row["prediction"] or "")
    if answer is None:
        return False
    if row["problem_type"] == "multiple choice":
        return re.fullmatch("[A-Z]", answer) is not None
    if row["problem_type"] in ("numerical", "regression"):
        return re.fullmatch(r"-?\d+(\.\d+)?", answer) is not None
    return True


def score_by_type(row, answer, truth):
    """The rule of most benchmarks: the accuracy reward of the problem type."""
    problem_type = row["problem_type"]
    if problem_type == "multiple choice":
        letter = parse_letter(answer)
        return float(letter == truth), letter is not None
    is_readable = problem_type not in ("numerical", "regression") or math.isfinite(number_or_nan(answer))
    return float(PROBLEM_TYPES[problem_type].accuracy(answer, truth)), is_readable


def scored_rows(rows):
    """The rows with their `status` (see status_of) and, if it is "scored", `result`: (score, whether it could be read).

    Raises UserError with the number of every row that is bad, or whose benchmark, id and frame order occurred before.
    """
    scored = []
    problems = []
    first_seen = {}
    for number, row in enumerate(rows, 1):
        try:
            status = status_of(row)
            key = (row["benchmark"], str(row["id"]), row.get("frames") or "ordered")
            if key in first_seen:
                raise ValueError(f"{key[0]} {key[1]!r} is used twice, first in row {first_seen[key]}")
            first_seen[key] = number
            result = score_answer(row) if status == "scored" else None
            scored.append({**row, "status": status, "result": result})
        except ValueError as error:
            problems.append(f"  row {number}: {error}")
    if problems:
        raise UserError(f"{len(problems)} of {len(rows)} predictions are bad:\n" + "\n".join(problems))
    return scored


def status_of(row):
    """Whether a row is "scored", "unscored" (it needs a judge model) or "unusable" (it has an error).

    Raises ValueError for a bad row.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected a prediction, got {row!r:.80}")
    for name in TEXT_FIELDS:
        if not isinstance(row.get(name), str | None):
            raise ValueError(f"{name}: expected text, got {row[name]!r:.80}")
    text_field(row, "benchmark")
    text_field(row, "id")
    if row.get("frames") is not None:
        choice_field(row, "frames", ORDERS)
    if row.get("error") and "prediction" not in row:
        return "unusable"
    is_unscored = hook(row["benchmark"], "is_unscored", None)
    if is_unscored and is_unscored(row):
        return "unscored"
    if not row.get("solution"):
        raise ValueError("solution: missing; join the official files with --annotations DIR")
    text_field(row, "problem_type")
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"options: expected a list of texts, got {options!r:.80}")
    if "prediction" not in row:
        raise ValueError("prediction: missing")
    check_row = hook(row["benchmark"], "check_row", None)
    if check_row:
        check_row(row)
    return "scored"


# -------------------------------------------------------------------------------------------------- scoring a benchmark


def benchmarks_in(rows):
    """Names of the rows' benchmarks: ours in their order, then others by name."""
    found = {row["benchmark"] for row in rows}
    return [name for name in NAMES if name in found] + sorted(found - set(NAMES))


def score_benchmark(name, rows):
    """{"score": percent, "se", "n", "answered", "unparsed", "by_task", …} of scored rows, one per question.

    Shares of the answers: `unparsed` could not be read, `lenient` were read although they are not written as asked (see
    is_strict), `truncated` were cut off at max_new_tokens (None if the rows do not say). Not counted in n, but listed:
    `unscored` (they need a judge model) and `unusable` (rows with an `error`, as for missing media).
    """
    scored = [row for row in rows if row["status"] == "scored"]
    by_task = mean_score_by(scored, "task")
    overall_score = hook(name, "overall_score", None)
    result = mean_score(scored)
    if overall_score:
        result |= overall_score(scored, by_task)
    extra_scores = hook(name, "extra_scores", None)
    if extra_scores:
        result |= extra_scores(scored, by_task)
    note = hook(name, "NOTE", None)
    if note:
        result["note"] = note
    result["answered"] = sum(answer_of(row["prediction"]) != "" for row in scored)
    result["unparsed"] = share(not row["result"][1] for row in scored)
    result["lenient"] = share(row["result"][1] and not is_strict(row) for row in scored)
    result["truncated"] = share(row["truncated"] for row in scored if "truncated" in row)
    result["by_task"] = by_task
    for group in GROUPS:
        if any(row.get(group) for row in scored):
            result[f"by_{group}"] = mean_score_by(scored, group)
    for status in ("unscored", "unusable"):
        result[status] = [str(row["id"]) for row in rows if row["status"] == status]
    return result


# ------------------------------------------------------------------------------------------------------ table and join


def scored_benchmarks(summary):
    """{benchmark: its scores}: the summary without its settings."""
    return {name: part for name, part in summary.items() if isinstance(part, dict) and "by_task" in part}


def share(values):
    """Share of the values that are true; None if there are none."""
    values = list(values)
    return sum(map(bool, values)) / len(values) if values else None


# what a reader of a score has to know about its answers: {key of score_benchmark: heading}
ANSWER_COLUMNS = {"unparsed": "unread", "lenient": "read leniently", "truncated": "cut off"}


def print_table(summary):
    """Print our scores with their standard errors, by task below, beside the published ones; then how answers ended."""
    header = ["percent", "n", "score", *(f"{model} (published)" for model in PUBLISHED)]
    rows = []
    answers = []
    notes = []
    for name, part in scored_benchmarks(summary).items():
        published = ["/".join(map(str, scores.get(name, ()))) for scores in PUBLISHED.values()]
        rows.append([name, part["n"], with_error(part["score"], part["se"]), *published])
        rows += group_rows(part)
        answers.append([name, part["n"], *answer_cells(part)])
        notes += [f"{name}: {note}" for note in notes_of(part)]
    print("\n".join([table(header, rows), "published scores: at 16/32/64 frames if there are three", *notes]))
    print()
    print(table(["answers", "n", *ANSWER_COLUMNS.values(), "media missing or bad"], answers))


def answer_cells(part):
    """The shares of ANSWER_COLUMNS, and how many questions could not be asked, as texts."""
    cells = ["-" if part.get(key) is None else f"{part[key]:.1%}" for key in ANSWER_COLUMNS]
    return [*cells, str(len(part["unusable"]))]


def with_error(score, se):
    """A score with its standard error; a missing number is "-"."""
    numbers = ["-" if value is None else f"{value:.1f}" for value in (score, se)]
    return " ± ".join(numbers)


def group_rows(part):
    """Rows of the table for the tasks and groups of a benchmark."""
    rows = []
    for key in ("by_task", *(f"by_{group}" for group in GROUPS)):
        for label, line in part.get(key, {}).items():
            if key != "by_task":
                label = f"{key[3:].replace('_', '-')} {label}"
            rows.append([f"  {label}", line["n"], with_error(line["score"], line["se"]), *[""] * len(PUBLISHED)])
    return rows


def notes_of(part):
    """What the table does not show of a benchmark, one line each."""
    notes = []
    if "score_video_r1" in part:
        video_r1 = with_error(part["score_video_r1"], part["se_video_r1"])
        notes.append(f"mean of {part['tasks']} of 8 tasks; Video-R1's mean of letters and numbers: {video_r1}")
    if "instances" in part:
        accuracy = with_error(part["accuracy"], part["se_accuracy"])
        notes.append(f"share of {part['instances']} instances with all four right; single answers: {accuracy}")
    if "delta_knowledge" in part:
        notes.append(f"knowledge gain: {with_error(part['delta_knowledge'], part['se_delta_knowledge'])}")
    if "note" in part:
        notes.append(part["note"])
    if "clipped" in part:
        notes.append(f"{part['clipped']} questions on a part of their video")
    for status in ("unscored", "unusable"):
        if part[status]:
            notes.append(f"{len(part[status])} {status}, not in n")
    return notes


def join_annotations(rows, root):
    """The rows, with the fields of the official files in `root` added to those without a solution.

    What a row already has wins. Its id is the record's, or the part after "<task>/" if the row has the task. Raises
    UserError with every unknown id.
    """
    bare = [row for row in rows if is_bare(row)]
    unknown = {str(row.get("benchmark")) for row in bare} - set(NAMES)
    if unknown:
        raise UserError(f"no benchmark {', '.join(sorted(unknown))}: {', '.join(NAMES)}")
    known = {}
    for name in benchmarks_in(bare):
        known |= {(name, record["id"]): record for record in read_benchmark(name, root)}
    joined = []
    problems = []
    for row in rows:
        if is_bare(row):
            record = known.get((row["benchmark"], str(row.get("id"))))
            record = record or known.get((row["benchmark"], f"{row.get('task')}/{row.get('id')}"))
            if record is None:
                problems.append(f"{row['benchmark']} {row.get('id')!r}")
                continue
            row = {**row, **record, **{key: value for key, value in row.items() if value}}
        joined.append(row)
    if problems:
        raise UserError(f"{len(problems)} predictions are of no question in {root}: {', '.join(problems)}")
    return joined


def is_bare(row):
    """True for an answer without its solution."""
    return isinstance(row, dict) and not row.get("solution") and not row.get("error")
