"""Writes an HTML page about an evaluation: the scores, then a gallery of questions with the frames the model saw.

    python -m tools.report runs/toy/eval/tgrpo/predictions.jsonl --data_root runs/toy/world
    python -m tools.report predictions.jsonl --annotations DIR      # for rows without solutions, as in evaluate.py

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
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from tqdm import tqdm

import evaluate
import settings
from benchmarks import GROUPS, PUBLISHED, join_annotations, notes_of, scored_rows, with_error
from data import DATA_TYPES, Unusable, load_media
from rewards import CORRECT, lettered

MAX_QUESTIONS = 300
MAX_BYTES = 25e6
# per text
MAX_CHARACTERS = 20_000
# per strip
MAX_FRAMES = 16
# in pixels; report.html has the same number
FRAME_HEIGHT = 72
# Fields of a prediction that a card prints.
REWARDS = ("accuracy", "format", "length", "temporal", "total", "n_tokens", "truncated")


# ------------------------------------------------------------------------------------------------------- page


def write_report(path, rows, summary, cfg):
    """Write the page about `rows` of predictions.jsonl and their summary (evaluate.summarise) to `path`.

    Media are read from cfg.data_root; a question without readable media shows the reason instead of frames.
    """
    by_question = {}
    for row in scored_rows(rows):
        by_question.setdefault((row["benchmark"], str(row["id"])), []).append(row)
    questions = [question_card(rows) for rows in evenly_spaced(list(by_question.values()), MAX_QUESTIONS)]
    models = sorted({str(settings_of(row).get("model") or "unnamed model") for row in rows})
    title = f"{', '.join(models)}: {', '.join(scored_benchmarks(summary))}"
    words = {"group": "benchmark", "kind": "task", "item": "question"}
    write_page(path, title, words, questions, len(by_question), cfg, summary.get("settings", {}), score_rows(summary))


def write_page(path, title, words, questions, total, cfg, made_with, scores=()):
    """Render report.html.

    words: what the page calls a question (`item`), its `group` and its `kind`. total: the number of questions before
    any were left out. made_with: settings to print. scores: see score_rows.
    """
    for question in tqdm(questions, desc="frames", unit=words["item"]):
        question.update(film_strip(question["record"], cfg))
    title = f"{title}, {time.strftime('%Y-%m-%d')}"
    made_with = json.dumps(made_with, indent=1)
    page = render(title=title, words=words, questions=questions, total=total, settings=made_with, scores=scores)
    while len(page) > MAX_BYTES and len(questions) > 1:
        questions = questions[::2]
        page = render(title=title, words=words, questions=questions, total=total, settings=made_with, scores=scores)
    settings.write_atomic(path, page.decode())


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
    """What the gallery shows of one question, given its scored rows (one per frame order)."""
    rows = sorted(rows, key=lambda row: row.get("frames") or "ordered")
    answered = [row for row in rows if row["status"] != "unusable"]
    answers = [prediction_card(row) for row in answered]
    scores = {answer["frames"]: answer["score"] for answer in answers}
    errors = [row["error"] for row in rows if row["status"] == "unusable"]
    return {
        "group": rows[0]["benchmark"],
        "kind": rows[0].get("task") or "",
        "id": str(rows[0]["id"]),
        "problem": shorten(rows[0].get("problem") or ""),
        "options": [shorten(option) for option in lettered(rows[0].get("options") or [])],
        "solution": shorten(rows[0].get("solution") or ""),
        "error": errors[0] if errors else "",
        "answers": answers,
        # The filter uses the first answer: the one with frames in order, if there is one.
        "result": answers[0]["verdict"] if answers else "not answered",
        "order": order_effect(scores.get("ordered"), scores.get("shuffled")),
        # The last row names the media: if frames were shuffled, it also has their order.
        "record": rows[-1],
    }


def prediction_card(row):
    score, readable = row["result"] or (None, None)
    rewards = {name: row[name] for name in REWARDS if isinstance(row.get(name), int | float)}
    return answer_card(row.get("frames") or "ordered", row.get("prediction") or "", score, readable, rewards)


def answer_card(frames, text, score, readable, rewards):
    """What the gallery shows of one completion. score: in 0..1, or None if the benchmark has no rule for it."""
    reasoning, end, answer = shorten(text).rpartition("</think>")
    verdict = "wrong" if readable else "unread"
    if score is None:
        verdict = "not scored"
    elif score > CORRECT:
        verdict = "right"
    return {
        "frames": frames,
        "reasoning": reasoning + end,
        "text": answer.strip(),
        "score": score,
        "verdict": verdict,
        "rewards": {name: round(float(value), 3) for name, value in rewards.items()},
    }


def order_effect(ordered, shuffled):
    """How the frame order changed a score; "" if one of the two scores is missing."""
    if ordered is None or shuffled is None:
        return ""
    if ordered == shuffled:
        return "no difference"
    return "helped" if ordered > shuffled else "hurt"


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


def scored_benchmarks(summary):
    """{benchmark: its scores}: the summary without its settings."""
    return {name: part for name, part in summary.items() if isinstance(part, dict) and "by_task" in part}


def score_rows(summary):
    """Rows of the score table: {"style", "label", "cells"}."""
    rows = []
    for name, part in scored_benchmarks(summary).items():
        shuffled = part.get("shuffled") or {}
        gap = part.get("gap") or {}
        rows.append(score_row("benchmark", name, part, shuffled, gap))
        for model, published in PUBLISHED.items():
            if name in published:
                score = " / ".join(str(value) for value in published[name])
                rows.append({"style": "published", "label": f"{model} (published)", "cells": ["", score, "", "", ""]})
        for task, line in part["by_task"].items():
            task_shuffled = shuffled.get("by_task", {}).get(task, {})
            task_gap = gap.get("by_task", {}).get(task, {})
            rows.append(score_row("task", task, line, task_shuffled, task_gap))
        for group in GROUPS:
            for label, line in part.get(f"by_{group}", {}).items():
                rows.append(score_row("task", f"{group.replace('_', '-')} {label}", line))
        rows += [{"style": "note", "label": note, "cells": []} for note in notes_of(part)]
    return rows


def score_row(style, label, line, shuffled=None, gap=None):
    cells = [
        line["n"],
        with_error(line["score"], line["se"]),
        f"{line['unparsed']:.1%}" if line.get("unparsed") is not None else "",
        number(shuffled["score"]) if shuffled else "",
        f"{gap['gap']:+.1f} [{number(gap['low'], '+')}, {number(gap['high'], '+')}]" if gap else "",
    ]
    return {"style": style, "label": label, "cells": cells}


def number(value, sign=""):
    return "–" if value is None else f"{value:{sign}.1f}"


def main(argv=None):
    settings.print_utf8()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", help="predictions.jsonl of an evaluation")
    parser.add_argument("--data_root", default=".", help="folder of the media; default: the current folder")
    parser.add_argument(
        "--annotations", default="", help="folder of the benchmarks' files, for rows without a solution"
    )
    parser.add_argument("--out", help="page to write; default: report.html beside the predictions")
    args = parser.parse_args(argv)
    rows = settings.read_rows(args.predictions)
    if args.annotations:
        rows = join_annotations(rows, args.annotations)
    out = args.out or Path(args.predictions).with_name("report.html")
    cfg = settings.SharedConfig(data_root=args.data_root)
    write_report(out, rows, evaluate.summarise(rows), cfg)
    print(f"page: {out}")


if __name__ == "__main__":
    main()
