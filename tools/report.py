"""Writes an HTML page about one or more evaluations: scores, and a gallery of questions with the frames the model saw.

    python -m tools.report runs/toy/eval/tgrpo/predictions.jsonl --data_root runs/toy/world
    python -m tools.report SFT/predictions.jsonl TGRPO/predictions.jsonl --data_root DIR      # side by side
    python -m tools.report predictions.jsonl --annotations DIR      # for rows without solutions, as in score.py

Side by side are the orders of frames of one evaluation, or several evaluations, each in its first order (a second table
has all orders). Differences are from the first column, paired by question, with a 95 % interval clustered by video; a
filter shows the questions whose answers changed. The page is one file that loads nothing else. Jinja escapes every
value, so HTML written by a model or a data set is shown as text and never runs.
"""

import base64
import io
import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from tqdm import tqdm

from benchmarks import join_annotations, orders
from benchmarks.answers import benchmarks_in, score_benchmark, scored_rows
from benchmarks.score import ANSWER_COLUMNS, notes_of
from benchmarks.shared import with_error
from data import Unusable, load_media
from rewards import CORRECT
from support import parsing, record_files, settings, storage
from tools import shared

# the most that a page shows: questions of a gallery, and frames of a strip
MAX_QUESTIONS = 300
MAX_FRAMES = 16
# in pixels; report.html has the same number
FRAME_HEIGHT = 72
# fields of a prediction that a card prints
REWARDS = ("accuracy", "format", "length", "temporal", "total", "n_tokens", "truncated")


def write_report(path, runs, cfg):
    """Write the page about `runs`, {label: rows of a predictions.jsonl}, to `path`; media are in cfg.data_root."""
    scored = {label: scored_rows(rows) for label, rows in runs.items()}
    columns = columns_of(scored)
    by_question = {}
    for label, rows in columns.items():
        for row in rows:
            by_question.setdefault((row["benchmark"], str(row["id"])), {})[label] = row
    questions = [question_card(rows) for rows in by_question.values()]
    made_with = {json.dumps(row.get("settings")): row.get("settings") or {} for row in chain(*runs.values())}
    models = sorted({str(used.get("model") or "unnamed model") for used in made_with.values()})
    benchmarks = benchmarks_in(list(chain(*columns.values())))
    title = f"{', '.join(models)}: {', '.join(benchmarks)}"
    words = {"group": "benchmark", "kind": "task", "item": "question"}
    tables = [score_table(columns, benchmarks)]
    shown = list(orders.rows_by_order(list(chain(*scored.values()))))
    if len(runs) > 1 and len(shown) > 1:
        tables.append(orders_table(scored, benchmarks, shown))
    write_page(path, title, words, questions, cfg, list(made_with.values()), tables)


def columns_of(runs):
    """{label: scored rows} of what the page compares: the orders of one run, or several runs in their first order."""
    if len(runs) == 1:
        return orders.rows_by_order(*runs.values())
    columns = {}
    for label, rows in runs.items():
        order, asked = next(iter(orders.rows_by_order(rows).items()))
        columns[label if order == "ordered" else f"{label}, {order}"] = asked
    return columns


def write_page(path, title, words, questions, cfg, made_with, tables=()):
    """Render report.html with at most MAX_QUESTIONS of the questions.

    words: what the page calls a question (`item`), its `group` and `kind`. tables: see score_table.
    """
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    shown = evenly_spaced(questions, MAX_QUESTIONS)
    for question in tqdm(shown, desc="frames", unit=words["item"]):
        question.update(film_strip(question["record"], cfg))
    page = pages.get_template("report.html").render(
        title=title,
        words=words,
        questions=shown,
        total=len(questions),
        settings=json.dumps(made_with, indent=1),
        tables=tables,
    )
    # half of a surrogate pair, which JSON may hold, becomes "?"
    storage.write_atomic(path, page.encode("utf-8", "replace").decode())


def evenly_spaced(items, most):
    """At most `most` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[i * (len(items) - 1) // (most - 1)] for i in range(most)]


def question_card(rows):
    """The card of one question, given its scored row in each column, {label: row}."""
    answers = []
    for label, row in rows.items():
        score, readable = row["result"] or (None, None)
        rewards = {name: row[name] for name in REWARDS if isinstance(row.get(name), int | float)}
        # a question that could not be asked has an error
        text = row.get("prediction") or row.get("error") or ""
        answers.append(answer_card(label, text, score, readable, rewards))
    # the row of a shuffled clip has the order of its frames, too
    record = next((row for row in rows.values() if row.get("frame_order")), rows[answers[0]["label"]])
    return card(record, record["benchmark"], record.get("task"), answers, answers[0]["verdict"], changes_of(answers))


def card(record, group, kind, answers, result, changes):
    """What the gallery shows of a question. answers: see answer_card; the filters use the texts group to changes."""
    return {
        "group": group,
        "kind": kind or "",
        "id": str(record["id"]),
        "problem": record.get("problem") or "",
        "options": parsing.lettered(record.get("options") or []),
        "solution": str(record.get("solution") or ""),
        "answers": answers,
        "result": result,
        "changes": changes,
        "record": record,
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


def answer_card(label, text, score, readable, rewards):
    """What the gallery shows of one completion. score: in 0..1, or None if the benchmark has no rule for it."""
    reasoning, end, answer = text.rpartition("</think>")
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


def film_strip(record, cfg):
    """The frames of a record side by side in one WebP picture.

    Returns {"strip": data URI, "width": of a frame in pixels, "frames": how many, "frames_seen": how many the model
    saw, "shuffled": order of the shuffled strip}; or {"no_frames": reason}.
    """
    if not record.get("path"):
        return {"no_frames": "this prediction names no media"}
    used = record.get("settings") or {}
    frame_settings = {name: used[name] for name in ("max_frames", "video_reader") if name in used}
    try:
        media, _ = load_media(record, replace(cfg, **frame_settings))
    # load_media raises ValueError if the path leaves the data root.
    except (Unusable, ValueError) as error:
        return {"no_frames": f"frames not available: {error}"}
    frames = [media] if record["data_type"] == "image" else [Image.fromarray(frame) for frame in media]
    shown = evenly_spaced(range(len(frames)), MAX_FRAMES)
    width = round(FRAME_HEIGHT * min(max(frames[0].width / frames[0].height, 0.1), 3))
    picture = Image.new("RGB", (width * len(shown), FRAME_HEIGHT))
    for position, index in enumerate(shown):
        picture.paste(frames[index].resize((width, FRAME_HEIGHT)), (position * width, 0))
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=70)
    return {
        "strip": "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode(),
        "width": width,
        "frames": len(shown),
        "frames_seen": len(frames),
        "shuffled": [shown.index(index) for index in record.get("frame_order") or [] if index in shown],
    }


def score_table(columns, benchmarks):
    """The score of each column by benchmark and task, how it differs from the first, and how the answers ended.

    {"headings": [text], "rows": [{"style", "label", "cells"}]}
    """
    rows = []
    for name in benchmarks:
        of_columns = [[row for row in column if row["benchmark"] == name] for column in columns.values()]
        parts = [score_benchmark(name, column) for column in of_columns]
        differences = [orders.paired_difference(column, of_columns[0]) for column in of_columns[1:]]
        rows.append({"style": "benchmark", "label": name, "cells": score_cells(parts, differences)})
        for task in sorted(set().union(*(part["by_task"] for part in parts))):
            rows.append({"style": "task", "label": task, "cells": score_cells(parts, differences, task)})
        for key, ending in ANSWER_COLUMNS.items():
            shares = ["–" if part[key] is None else f"{part[key]:.1%}" for part in parts]
            rows.append({"style": "note", "label": f"answers {ending}", "cells": ["", *shares]})
        rows += [{"style": "note", "label": note, "cells": []} for note in notes_of(parts[0])]
    return {"headings": ["questions", *(f"{label}, %" for label in columns)], "rows": rows}


def orders_table(runs, benchmarks, shown):
    """The scores of each run, {label: scored rows}, in the `shown` orders, as a table like that of score_table.

    For each run but the first, a second row: by how much its differences from the first order exceed the first run's.
    """
    rows = []
    for name in benchmarks:
        first = None
        for label, scored in runs.items():
            by_order = orders.rows_by_order([row for row in scored if row["benchmark"] == name])
            columns = {order: by_order.get(order, []) for order in shown}
            rows.append(score_table(columns, [name])["rows"][0] | {"label": f"{name}, {label}"})
            if first:
                gains = [orders.paired_rows(columns[order], first[order]) for order in shown]
                changes = [orders.paired_difference(gain, gains[0]) for gain in gains[1:]]
                rows.append({"style": "note", "label": "change", "cells": score_cells([{}] * len(shown), changes)})
            first = first or columns
    return {"headings": ["questions", *(f"{order}, %" for order in shown)], "rows": rows}


def score_cells(parts, differences, task=None):
    """How many questions, and the score of each column with its difference from the first; "" if a column has none."""
    parts = [orders.of_task(part, task) for part in parts]
    differences = [orders.of_task(difference, task) for difference in differences]
    cells = [parts[0].get("n", "")]
    for part, difference in zip(parts, [None, *differences]):
        score = with_error(part["score"], part["se"]) if part.get("n") else ""
        cells.append(f"{score}\n{orders.interval_text(difference)}".strip())
    return cells


def main(argv=None):
    parser = shared.parser(__doc__)
    parser.add_argument("predictions", nargs="+", help="predictions.jsonl of an evaluation, or of several to compare")
    parser.add_argument("--data_root", help="folder of the media; default: that of the last evaluation")
    parser.add_argument("--annotations", help="folder of the benchmarks' files, for rows without a solution")
    parser.add_argument("--out", help="page to write; default: report.html beside the last predictions")
    args = parser.parse_args(argv)
    # the page calls a run by its folder
    runs = {path.removesuffix("/predictions.jsonl"): record_files.read_rows(path) for path in args.predictions}
    last_row = list(runs.values())[-1][0]
    data_root = args.data_root or last_row.get("settings", {}).get("data_root", ".")
    if args.annotations:
        runs = {label: join_annotations(rows, args.annotations) for label, rows in runs.items()}
    out = args.out or Path(args.predictions[-1]).with_name("report.html")
    write_report(out, runs, settings.SharedConfig(data_root=data_root))
    print(f"page: {out}")


if __name__ == "__main__":
    main()
