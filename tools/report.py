"""Writes an HTML page about one or more evaluations: scores, and a gallery of questions with the frames the model saw.

    python -m tools.report runs/toy/eval/tgrpo/predictions.jsonl --data_root runs/toy/world
    python -m tools.report SFT/predictions.jsonl TGRPO/predictions.jsonl --data_root DIR      # side by side
    python -m tools.report predictions.jsonl --annotations DIR      # for rows without solutions, as in evaluate.py

Side by side are the orders of frames of one evaluation, or several evaluations, each in its first order (`ordered` if
it has that). Differences are from the first of them, paired by question, with a 95 % interval clustered by video; a
filter shows the questions whose answers changed.

The page is a single file that loads nothing else. Its template is report.html, which tools/rollouts.py uses too. Jinja
escapes every value, so HTML written by a model or a data set is shown as text and never runs. A gallery holds at most
300 questions and a page at most 25 MB; the page states how many of the questions it shows.
"""

import argparse
import base64
import io
import json
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from tqdm import tqdm

from benchmarks import PUBLISHED, join_annotations, orders
from benchmarks.answers import GROUPS, benchmarks_in, score_benchmark, scored_rows
from benchmarks.score import ANSWER_COLUMNS, answer_cells, notes_of
from benchmarks.shared import with_error
from data import Unusable, load_media
from rewards import CORRECT
from support import record_files, settings, storage
from support.parsing import lettered
from support.record_files import DATA_TYPES

MAX_QUESTIONS = 300
MAX_BYTES = 25e6
# per text
MAX_CHARACTERS = 20_000
# per strip
MAX_FRAMES = 16
# in pixels; report.html has the same number
FRAME_HEIGHT = 72
# How the page names an order of frames.
ORDER_NAMES = {"ordered": "in order", "single": "middle frame", "blind": "no frame"}
# Fields of a prediction that a card prints.
REWARDS = ("accuracy", "format", "length", "temporal", "total", "n_tokens", "truncated")


# ------------------------------------------------------------------------------------------------------- page


def write_report(path, runs, cfg):
    """Write the page about `runs`, {label: rows of a predictions.jsonl}, to `path`.

    Media are read from cfg.data_root; a question without readable media shows the reason instead of frames.
    """
    columns = columns_of({label: scored_rows(rows) for label, rows in runs.items()})
    by_question = {}
    for label, rows in columns.items():
        for row in rows:
            by_question.setdefault((row["benchmark"], str(row["id"])), {})[label] = row
    questions = [question_card(rows) for rows in by_question.values()]
    shown = evenly_spaced(questions, MAX_QUESTIONS)
    all_rows = chain.from_iterable(runs.values())
    models = sorted({str(settings_of(row).get("model") or "unnamed model") for row in all_rows})
    benchmarks = benchmarks_in(list(chain.from_iterable(columns.values())))
    title = f"{', '.join(models)}: {', '.join(benchmarks)}"
    words = {"group": "benchmark", "kind": "task", "item": "question"}
    made_with = {label: distinct_settings(rows) for label, rows in runs.items()}
    tables = [score_table(columns, benchmarks), answer_table(columns, benchmarks)]
    write_page(path, title, words, shown, len(questions), cfg, made_with, tables)


def columns_of(runs):
    """{label: scored rows} of what the page compares: the orders of one run, or several runs in their first order."""
    columns = {}
    for label, rows in runs.items():
        asked = orders.rows_by_order(rows)
        if len(runs) == 1:
            return {ORDER_NAMES.get(order, order): asked[order] for order in asked}
        first = next(iter(asked))
        columns[label if first == "ordered" else f"{label}, {ORDER_NAMES.get(first, first)}"] = asked[first]
    return columns


def distinct_settings(rows):
    """The settings of a run's rows, each once."""
    return list({json.dumps(settings_of(row), sort_keys=True): settings_of(row) for row in rows}.values())


def write_page(path, title, words, questions, total, cfg, made_with, tables=()):
    """Render report.html.

    words: what the page calls a question (`item`), its `group` and its `kind`. total: the number of questions before
    any were left out. made_with: settings to print. tables: see score_table.
    """
    changes = sorted(set(chain.from_iterable(question["changes"] for question in questions)))
    for question in tqdm(questions, desc="frames", unit=words["item"]):
        question.update(film_strip(question["record"], cfg))
    title = f"{title}, {time.strftime('%Y-%m-%d')}"
    made_with = json.dumps(made_with, indent=1)
    fixed = {"title": title, "words": words, "total": total, "settings": made_with, "tables": tables}
    page = render(questions=questions, changes=changes, **fixed)
    while len(page) > MAX_BYTES and len(questions) > 1:
        questions = questions[::2]
        page = render(questions=questions, changes=changes, **fixed)
    storage.write_atomic(path, page.decode())


def render(**values):
    """The page as UTF-8. Half of a surrogate pair, which JSON may hold, becomes "?"."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html").render(**values).encode("utf-8", "replace")


def evenly_spaced(items, most):
    """At most `most` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


# -------------------------------------------------------------------------------------------------- questions


def settings_of(row):
    """The settings that a prediction was made with; {} if it names none."""
    return row["settings"] if isinstance(row.get("settings"), dict) else {}


def question_card(rows):
    """What the gallery shows of one question, given its scored row in each column, {label: row}."""
    first = next(iter(rows.values()))
    answers = [prediction_card(label, row) for label, row in rows.items() if row["status"] != "unusable"]
    errors = [row["error"] for row in rows.values() if row["status"] == "unusable"]
    # the row of a shuffled clip has the order of its frames, too
    records = [row for row in rows.values() if row.get("frame_order")]
    return {
        "group": first["benchmark"],
        "kind": first.get("task") or "",
        "id": str(first["id"]),
        "problem": shorten(first.get("problem") or ""),
        "options": [shorten(option) for option in lettered(first.get("options") or [])],
        "solution": shorten(first.get("solution") or ""),
        "error": errors[0] if errors else "",
        "answers": answers,
        "result": answers[0]["verdict"] if answers else "not answered",
        "changes": changes_of(answers),
        "record": records[0] if records else first,
    }


def changes_of(answers):
    """For each answer after the first, whether its score is higher (gained), lower (lost) or the same."""
    changes = []
    for answer in answers[1:]:
        before = answers[0]["score"]
        after = answer["score"]
        if before is None or after is None:
            continue
        change = "same"
        if before != after:
            change = "gained" if after > before else "lost"
        changes.append(f"{answer['label']}: {change}")
    return changes


def prediction_card(label, row):
    score, readable = row["result"] or (None, None)
    rewards = {name: row[name] for name in REWARDS if isinstance(row.get(name), int | float)}
    return answer_card(label, row.get("prediction") or "", score, readable, rewards)


def answer_card(label, text, score, readable, rewards):
    """What the gallery shows of one completion. score: in 0..1, or None if the benchmark has no rule for it."""
    reasoning, end, answer = shorten(text).rpartition("</think>")
    verdict = "wrong" if readable else "unread"
    if score is None:
        verdict = "not scored"
    elif score > CORRECT:
        verdict = "right"
    return {
        "label": label,
        "reasoning": reasoning + end,
        "text": answer.strip(),
        "score": score,
        "verdict": verdict,
        "rewards": {name: round(float(value), 3) for name, value in rewards.items()},
    }


def shorten(text):
    """The text without its middle if it has more than MAX_CHARACTERS characters."""
    extra = len(text) - MAX_CHARACTERS
    if extra <= 0:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n[{extra} characters left out]\n{text[-half:]}"


def film_strip(record, cfg):
    """The frames of a record side by side in one WebP picture.

    Returns {"strip": data URI, "width": of a frame in pixels, "frames": how many, "frames_seen": how many the model
    saw, "shuffled": order of the shuffled strip}; or {"no_frames": reason}.
    """
    if record.get("data_type") not in DATA_TYPES or not record.get("path"):
        return {"no_frames": "this prediction names no media"}
    frame_settings = {
        name: value for name, value in settings_of(record).items() if name in ("max_frames", "video_reader")
    }
    try:
        media, _ = load_media(record, replace(cfg, **frame_settings))
    # load_media raises ValueError if the path leaves the data root.
    except (Unusable, ValueError) as error:
        return {"no_frames": f"frames not available: {error}"}
    frames = [media] if record["data_type"] == "image" else [Image.fromarray(frame) for frame in media]
    shown = evenly_spaced(range(len(frames)), MAX_FRAMES)
    aspect = frames[0].width / frames[0].height
    width = round(FRAME_HEIGHT * min(max(aspect, 0.1), 3))
    picture = Image.new("RGB", (width * len(shown), FRAME_HEIGHT))
    for position, index in enumerate(shown):
        picture.paste(frames[index].resize((width, FRAME_HEIGHT)), (position * width, 0))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=70)
    order = record["frame_order"] if isinstance(record.get("frame_order"), list) else []
    return {
        "strip": "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode(),
        "width": width,
        "frames": len(shown),
        "frames_seen": len(frames),
        "shuffled": [shown.index(index) for index in order if index in shown],
    }


# ----------------------------------------------------------------------------------------------------- scores


def score_table(columns, benchmarks):
    """{"headings", "rows", "note"}: the score of each column by benchmark and task, and its difference from the first.

    A row is {"style", "label", "cells"}.
    """
    rows = []
    for name in benchmarks:
        column_rows = [rows_about(name, rows_of) for rows_of in columns.values()]
        parts = [score_benchmark(name, rows_of) for rows_of in column_rows]
        differences = [orders.paired_difference(rows_of, column_rows[0]) for rows_of in column_rows[1:]]
        rows.append(score_row("benchmark", name, parts, differences))
        for model, published in PUBLISHED.items():
            if name in published:
                score = " / ".join(str(value) for value in published[name])
                cells = ["", score, *[""] * len(differences)]
                rows.append({"style": "published", "label": f"{model} (published)", "cells": cells})
        for key in ("by_task", *(f"by_{group}" for group in GROUPS)):
            for label in sorted(set().union(*(part.get(key, {}) for part in parts))):
                of_label = [part.get(key, {}).get(label) for part in parts]
                by_task = [(difference or {}).get(key, {}).get(label) for difference in differences]
                if key != "by_task":
                    label = f"{key[3:].replace('_', '-')} {label}"
                rows.append(score_row("task", label, of_label, by_task))
        rows += [{"style": "note", "label": note, "cells": []} for note in notes_of(parts[0])]
    return {
        "headings": ["questions", *(f"{label}, %" for label in columns)],
        "rows": rows,
        "note": "Second lines: the paired difference from the first column and its 95 % interval, clustered by video. "
        "Scores marked “published” are not ours; three numbers are for 16, 32 and 64 frames.",
    }


def rows_about(benchmark, rows):
    return [row for row in rows if row["benchmark"] == benchmark]


def score_row(style, label, parts, differences):
    """A row of score_table. A column that has no such part is empty."""
    cells = [parts[0]["n"] if parts[0] else ""]
    for part, difference in zip(parts, [None, *differences]):
        cell = with_error(part["score"], part["se"]) if part else ""
        if difference:
            cell += f"\n{orders.interval_text(difference)}"
        cells.append(cell)
    return {"style": style, "label": label, "cells": cells}


def answer_table(columns, benchmarks):
    """{"headings", "rows", "note"}: how the answers of each column ended, by benchmark."""
    rows = []
    for name in benchmarks:
        for label, rows_of in columns.items():
            part = score_benchmark(name, rows_about(name, rows_of))
            rows.append({"style": "task", "label": f"{name}, {label}", "cells": [part["n"], *answer_cells(part)]})
    return {
        "headings": ["answers", *ANSWER_COLUMNS.values(), "media missing or bad"],
        "rows": rows,
        "note": "Read leniently: the answer is not written as asked, and a harness that compares strings counts it as "
        "wrong. Cut off: at max_new_tokens.",
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", nargs="+", help="predictions.jsonl of an evaluation, or of several to compare")
    parser.add_argument("--data_root", default=".", help="folder of the media; default: the current folder")
    parser.add_argument(
        "--annotations", default="", help="folder of the benchmarks' files, for rows without a solution"
    )
    parser.add_argument("--out", help="page to write; default: report.html beside the last predictions")
    args = parser.parse_args(argv)
    runs = {}
    for label, path in run_labels(args.predictions).items():
        runs[label] = record_files.read_rows(path)
        if args.annotations:
            runs[label] = join_annotations(runs[label], args.annotations)
    out = args.out or Path(args.predictions[-1]).with_name("report.html")
    write_report(out, runs, settings.SharedConfig(data_root=args.data_root))
    print(f"page: {out}")


def run_labels(paths):
    """{label: path}: the name of each file's folder or, if two have the same name, the whole path."""
    names = [Path(path).resolve().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    return dict(zip(names, paths))


if __name__ == "__main__":
    main()
