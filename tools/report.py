"""One self-contained HTML page of an evaluation: the scores, then a gallery of questions with the frames the model saw.

    accelerate launch evaluate.py --config configs/toy.yaml --report report.html
    python evaluate.py --score predictions.jsonl --report report.html --data_root DIR       # from saved answers
    python -m tools.rollouts runs/toy/tgrpo/rollouts.jsonl          # the same gallery, of a training run's completions

Everything a model or a data set wrote reaches the page as JSON and is shown by textContent: a completion that holds HTML is
shown, not run. Each clip is one WebP strip; the shuffled strip shows pieces of the same picture in the order the model saw them.
"""

import base64
import html
import io
import json
import re
import time
from dataclasses import replace

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

import settings
from benchmarks import GROUPS, PUBLISHED, judge_rows
from data import DATA_TYPES, Unusable, load_media, with_workers
from rewards import CORRECT, lettered

MAX_QUESTIONS, MAX_FRAMES = 1000, 16  # in the gallery; in a strip
MAX_BYTES, MAX_TEXT = 28e6, 14e6  # of the page; of the questions and completions in it
SIZES = ((72, 75), (72, 45), (56, 40), (40, 30), (24, 20))  # of a frame: height in pixels, quality
TERMS = (
    "accuracy",
    "format",
    "length",
    "temporal",
    "total",
    "n_tokens",
    "truncated",
)  # of a prediction row, for the page


def write_report(path, rows, summary, cfg):
    """Write the page of an evaluation. Media are looked for in cfg.data_root; a question whose frames are not there says so."""
    questions, records = gallery(judge_rows(rows))
    n = len({(r["benchmark"], str(r["id"])) for r in rows})
    write_page(
        path, title_of(rows, summary), questions, records, n, cfg, summary.get("settings", {}), scores_html(summary)
    )


def title_of(rows, summary):
    """Model, benchmarks and date, for the page's title."""
    models = sorted(
        {
            str(r["settings"]["model"])
            for r in rows
            if isinstance(r.get("settings"), dict) and r["settings"].get("model")
        }
    )
    names = [name for name, part in summary.items() if isinstance(part, dict) and "by_task" in part]
    return f"{', '.join(models) or 'unnamed model'}: {', '.join(names)}, {time.strftime('%Y-%m-%d')}"


def write_page(
    path,
    title,
    questions,
    rows,
    n,
    cfg,
    made_with,
    scores="",
    group="benchmark",
    kind="task",
    item="question",
    prefix="",
):
    """Write a gallery of `questions`, of which there are `n` in all; rows[i] says which media question i is about.

    group, kind, item: what the page calls a question's `benchmark`, its `task`, and the question itself. prefix: what
    stands before its `benchmark`.
    """
    shorten(questions)
    room = 0.75 * (MAX_BYTES - len(page_json(questions))) / max(1, len(questions))  # base64 takes 4/3
    strips = with_workers(Strips(rows, cfg, room), cfg, batch_size=None)
    for question, strip in zip(questions, tqdm(strips, total=len(questions), desc="report", unit=item)):
        question |= strip
    count = f"{len(questions)} of {n} {item}s, evenly spread" if n > len(questions) else f"{n} {item}s"
    parts = {
        "TITLE": html.escape(title),
        "SCORES": scores,
        "SETTINGS": html.escape(json.dumps(made_with, indent=1)),
        "COUNT": count,
        "GROUP": group,
        "KIND": kind,
        "ITEM": item,
        "PREFIX": prefix,
        "CORRECT": str(CORRECT),
        "DATA": page_json(questions).decode(),
    }
    page = re.sub(r"\{([A-Z]+)\}", lambda slot: parts[slot[1]], PAGE)  # in one go: a text may hold "{DATA}" itself
    settings.write_atomic(path, page.encode("utf-8", "replace").decode())


def evenly(items, most=MAX_QUESTIONS):
    """At most `most` of the items, evenly spread."""
    if len(items) <= most:
        return items
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, most)]


def page_json(questions):
    """The questions as UTF-8 JSON without "<": nothing in it ends the script element it stands in. Half a character becomes "?"."""
    return json.dumps(questions, ensure_ascii=False).replace("<", "\\u003c").encode("utf-8", "replace")


def gallery(rows):
    """(at most MAX_QUESTIONS questions with their answers: dicts of what the page shows; the row of each to load frames of)."""
    by_question = {}
    for row in rows:
        by_question.setdefault((row["benchmark"], str(row["id"])), []).append(row)
    chosen = evenly(list(by_question.values()))
    questions = []
    for rows in chosen:
        rows = sorted(rows, key=lambda r: r.get("frames") or "ordered")
        answers = [shown_answer(r) for r in rows if r["place"] != "unusable"]
        score = {a["frames"]: a["score"] for a in answers}
        both = len(score) == 2 and None not in score.values()
        questions.append(
            {
                "benchmark": rows[0]["benchmark"],
                "id": str(rows[0]["id"]),
                "task": rows[0].get("task") or "",
                "error": next((r["error"] for r in rows if r["place"] == "unusable"), None),
                "problem": rows[0].get("problem") or "",
                "options": lettered(rows[0].get("options") or []),
                "solution": rows[0].get("solution") or "",
                "answers": answers,
                "result": result_of(answers),
                "helped": (score["ordered"] > score["shuffled"]) - (score["ordered"] < score["shuffled"])
                if both
                else None,
            }
        )
    return questions, [
        rows[-1] for rows in chosen
    ]  # the last: "shuffled", which has the frame order, if there are both


def result_of(answers):
    """What the page's filter calls a question, by its first answer: the one with frames in order, if there is one."""
    if not answers:
        return "not answered"
    first = answers[0]
    if first["score"] is None:
        return "not scored"
    if first["score"] > CORRECT:
        return "right"
    return "wrong" if first["read"] else "unread"


def shown_answer(row):
    """A completion, its score (None if the benchmark has no rule for it), whether it could be read, and the reward terms it came with."""
    score, read = row["judged"] or (None, None)
    terms = {k: round(float(row[k]), 3) for k in TERMS if isinstance(row.get(k), int | float)}
    return {
        "frames": row.get("frames") or "ordered",
        "text": row.get("prediction") or "",
        "score": score,
        "read": read,
        "terms": terms,
    }


def shorten(questions):
    """Cut the middle out of long texts, in place, until all questions take at most MAX_TEXT bytes of the page."""
    cut = lambda text, limit: (
        text
        if len(text) <= limit
        else (f"{text[: limit * 2 // 3]}\n[{len(text) - limit} characters left out]\n{text[len(text) - limit // 3 :]}")
    )
    limit = 50_000
    while len(page_json(questions)) > MAX_TEXT and limit > 100:
        for question in questions:
            question["options"] = [cut(option, limit) for option in question["options"][:30]]
            for part, name in [
                (question, "problem"),
                (question, "solution"),
                *((answer, "text") for answer in question["answers"]),
            ]:
                part[name] = cut(part[name], limit)
        limit = limit * 2 // 3


class Strips(Dataset):
    """Item i: {"strip": data URI, "width": of one frame, "height", "frames": how many, "of": how many the model saw, "order": of the
    shuffled strip or None}, or {"why": there is none}.
    """

    def __init__(self, rows, cfg, room):
        self.rows, self.cfg, self.room = rows, cfg, room

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        if row.get("data_type") not in DATA_TYPES or not row.get("path"):
            return {"why": "this prediction names no media"}
        made_with = row["settings"] if isinstance(row.get("settings"), dict) else {}
        try:
            shown = {name: made_with[name] for name in ("max_frames", "video_reader") if name in made_with}
            media, _ = load_media(row, replace(self.cfg, **shown))
        except (Unusable, ValueError) as error:  # ValueError: the path leaves the data root
            return {"why": f"frames not at hand: {error}"}
        frames = [media] if row["data_type"] == "image" else [Image.fromarray(f) for f in media]
        shown = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MAX_FRAMES)).astype(int)).tolist()
        strip, width, height = picture([frames[i] for i in shown], self.room)
        if strip is None:
            return {"why": "frames left out: the page would be too large"}
        order = row.get("frame_order") if isinstance(row.get("frame_order"), list) else None
        return {
            "strip": strip,
            "width": width,
            "height": height,
            "frames": len(shown),
            "of": len(frames),
            "order": order and [shown.index(f) for f in order if f in shown],
        }


def picture(frames, room):
    """(data URI of the PIL frames side by side, width of one, height), as large and good as fits into `room` bytes; else Nones."""
    for height, quality in SIZES:
        width = max(1, min(4 * height, round(frames[0].width * height / frames[0].height)))
        strip = Image.new("RGB", (width * len(frames), height))
        for i, frame in enumerate(frames):
            strip.paste(frame.resize((width, height)), (i * width, 0))
        strip.save(file := io.BytesIO(), "WEBP", quality=quality)
        if file.tell() <= room:
            return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode(), width, height
    return None, None, None


def scores_html(summary):
    """The table of scores: ours with standard error, shuffled and gap where there are; published ones marked so."""
    number = lambda x, sign="": "–" if x is None else f"{x:{sign}.1f}"
    cells = lambda *values: "".join(f"<td>{v}</td>" for v in values)

    def interval(gap):
        """A gap and its interval, for which one clip is not enough."""
        if not gap:
            return "–"
        between = "–" if gap["low"] is None else f"{number(gap['low'], '+')} to {number(gap['high'], '+')}"
        return f"{number(gap['gap'], '+')} <small>({between})</small>"

    head = "".join(
        f"<th scope=col>{html.escape(h)}</th>"
        for h in (
            "questions",
            "score, %",
            *(f"{m} (published)" for m in PUBLISHED),
            "unread",
            "shuffled, %",
            "gap (95 %)",
        )
    )
    figures = lambda line: (line["n"], f"{number(line['score'])} ± {number(line['se'])}")
    subrow = lambda label, *values: f"<tr class=task><th scope=row>{html.escape(label)}</th>{cells(*values)}</tr>"
    body = []
    for name, part in summary.items():
        if not isinstance(part, dict) or "by_task" not in part:
            continue
        shuffled, gap = part.get("shuffled") or {}, part.get("gap") or {}
        published = ["/".join(map(str, scores.get(name, ()))) or "–" for scores in PUBLISHED.values()]
        body.append(
            f"<tbody><tr><th scope=row>{html.escape(name)}</th>"
            + cells(
                part["n"],
                f"{number(part['score'])} ± {number(part['se'])}",
                *published,
                "–" if part["unparsed"] is None else f"{part['unparsed']:.1%}",
                number(shuffled.get("score")),
                interval(gap),
            )
            + "</tr>"
        )
        for task, line in part["by_task"].items():
            again = (shuffled.get("by_task") or {}).get(task) or {}
            interval_here = interval((gap.get("by_task") or {}).get(task))
            body.append(
                subrow(task, *figures(line), *[""] * len(PUBLISHED), "", number(again.get("score")), interval_here)
            )
        for group in [g for g in GROUPS if f"by_{g}" in part]:
            body += [
                subrow(f"{group.replace('_', '-')} {label}", *figures(line), *[""] * (3 + len(PUBLISHED)))
                for label, line in part[f"by_{group}"].items()
            ]
        notes = [part["note"]] if "note" in part else []
        notes += [f"{part['clipped']} questions on a part of their video"] if "clipped" in part else []
        notes += [f"{len(part[key])} {key}, not in the score" for key in ("unscored", "unusable") if part[key]]
        if "delta_knowledge" in part:
            notes.append(f"knowledge gain: {number(part['delta_knowledge'])} ± {number(part['se_delta_knowledge'])} %")
        if "score_video_r1" in part:
            notes.append(
                f"mean of {part['tasks']} of 8 tasks; Video-R1's mean of letters and numbers: "
                f"{number(part['score_video_r1'])} ± {number(part['se_video_r1'])}"
            )
        body += [f"<tr class=note><td colspan={6 + len(PUBLISHED)}>{html.escape(note)}</td></tr>" for note in notes] + [
            "</tbody>"
        ]
    return (
        f"<table><thead><tr><th></th>{head}</tr></thead>{''.join(body)}</table>"
        "<p class=caption>Published: as the Video-R1 paper prints them; three numbers stand for 16, 32 and 64 frames.</p>"
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{TITLE}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --right: #2a7d46; --wrong: #b3402e; --soft: #8881 }
@media (prefers-color-scheme: dark) { :root { --right: #5fc483; --wrong: #ef8a76 } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1270px; padding: 1rem }
h1 { font-size: 1.4rem; overflow-wrap: anywhere } h2 { font-size: 1.1rem; margin-top: 2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th[scope=row] { white-space: normal; min-width: 9rem; max-width: 15rem; overflow-wrap: anywhere } th[scope=row], .note td { text-align: left } .task th { font-weight: normal; padding-left: 1.5rem } .note td { opacity: .75; white-space: normal }
thead th { vertical-align: bottom; white-space: normal; max-width: 7rem }
.bar { position: sticky; top: 0; background: Canvas; padding: .5rem 0; border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; z-index: 1 }
@media (max-width: 700px) { .bar { position: static } }
.bar label { font-size: .85rem } select, input, button { font: inherit; padding: .15rem .4rem; max-width: 14rem }
article { border: 1px solid var(--line); border-radius: 8px; padding: .8rem 1rem; margin: 1rem 0; scroll-margin-top: 6rem; overflow-wrap: anywhere }
article:focus { outline: 3px solid #4a90d9 }
article header { display: flex; flex-wrap: wrap; gap: .3rem 1rem; font-size: .85rem; opacity: .85 }
.problem { margin: .4rem 0; white-space: pre-wrap; font-weight: 600 } .options { margin: 0 0 .5rem; padding: 0; list-style: none }
.strip { display: flex; flex-wrap: wrap; gap: 2px; margin: .2rem 0 } .strip i { flex: none; background-image: var(--strip) }
.caption { font-size: .8rem; opacity: .75 }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: .8rem }
.answer { background: var(--soft); border-radius: 6px; padding: .5rem .7rem; min-width: 0 }
.answer pre { white-space: pre-wrap; font: inherit; margin: .3rem 0 } summary { cursor: pointer }
.right { color: var(--right); font-weight: 600 } .wrong { color: var(--wrong); font-weight: 600 } .terms { font-size: .8rem; opacity: .75 }
</style></head><body>
<h1>{TITLE}</h1>
<div class="wide">{SCORES}</div>
<details><summary>settings</summary><pre>{SETTINGS}</pre></details>
<h2>Gallery</h2>
<p class="caption">{COUNT}. Keys: <kbd>j</kbd> and <kbd>k</kbd> next and previous {ITEM}, <kbd>o</kbd> its reasoning, <kbd>n</kbd> and <kbd>p</kbd> next and previous page.</p>
<form class="bar" id="bar">
<label>{GROUP} <select id="benchmark"></select></label>
<label>{KIND} <select id="task"></select></label>
<label>answer <select id="result"></select></label>
<label>order of frames <select id="order"><option value="">all</option><option>helped</option><option>hurt</option><option>no difference</option></select></label>
<label>text <input id="search" type="search" placeholder="question or answer"></label>
<span id="count" role="status"></span>
<button type="button" id="back">previous</button><button type="button" id="forth">next</button>
</form>
<main id="gallery"></main>
<script type="application/json" id="data">{DATA}</script>
<script>
"use strict";
const questions = JSON.parse(document.getElementById("data").textContent), PAGE = 25, CORRECT = {CORRECT};
const at = id => document.getElementById(id);
let found = [], page = 0, current = -1;

function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node[name] = value;
  node.append(...children.filter(c => c !== null));
  return node;
}

function options(select, values) {
  const chosen = select.value;
  select.replaceChildren(new Option("all", ""), ...values.map(v => new Option(v, v)));
  if (values.includes(chosen)) select.value = chosen;
}

function strip(q, order, label) {
  const frames = order.map(k => {
    const frame = document.createElement("i");
    frame.style.cssText = `width:${q.width}px;height:${q.height}px;background-position:-${k * q.width}px 0`;
    return frame;
  });
  const box = element("div", {className: "strip"}, ...frames);
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", label);
  return element("div", {}, box, element("div", {className: "caption", textContent: label}));
}

function answer(a) {
  const end = a.text.indexOf("</think>"), cut = end < 0 ? 0 : end + 8;
  const mark = a.score === null ? "not scored" : a.score > CORRECT ? "right" : a.read ? "wrong" : "wrong (answer not read)";
  const value = a.score !== null && a.score > 0 && a.score < 1 ? ` ${a.score.toFixed(2)}` : "";
  const terms = Object.entries(a.terms).map(([k, v]) => `${k} ${v}`).join(" · ");
  return element("div", {className: "answer"},
    element("div", {}, a.frames === "ordered" ? "frames in order: " : "frames shuffled: ",
            element("span", {className: mark.split(" ")[0], textContent: mark + value})),
    cut ? element("details", {}, element("summary", {textContent: "reasoning"}), element("pre", {textContent: a.text.slice(0, cut)})) : null,
    element("pre", {textContent: a.text.slice(cut).trim() || (a.text ? "(nothing after the reasoning)" : "(empty)")}),
    element("div", {className: "terms", textContent: terms}));
}

function card(q) {
  const node = element("article", {tabIndex: -1},
    element("header", {}, element("b", {textContent: "{PREFIX}" + q.benchmark}), element("span", {textContent: q.task}), element("span", {textContent: q.id}),
            element("span", {textContent: q.helped === 1 ? "order helped" : q.helped === -1 ? "order hurt" : ""})),
    element("p", {className: "problem", textContent: q.problem}),
    element("ul", {className: "options"}, ...q.options.map(o => element("li", {textContent: o}))),
    element("p", {textContent: "truth: " + q.solution.replace(/<\\/?answer>/g, "")}));
  if (q.strip) {
    const seen = q.of > q.frames ? `${q.frames} of the ${q.of} frames` : q.frames === 1 ? "the picture" : `${q.frames} frames`;
    node.style.setProperty("--strip", `url(${q.strip})`);
    node.append(strip(q, [...Array(q.frames).keys()], q.frames === 1 ? seen : seen + ", in order"));
    if (q.order) node.append(strip(q, q.order, seen + ", as shuffled"));
  } else node.append(element("p", {className: "caption", textContent: q.error || q.why}));
  node.append(element("div", {className: "answers"}, ...q.answers.map(answer)));
  return node;
}

function show() {
  const shown = found.slice(page * PAGE, (page + 1) * PAGE);
  at("gallery").replaceChildren(...shown.map(card));
  at("count").textContent = found.length ? `${page * PAGE + 1} to ${page * PAGE + shown.length} of ${found.length}` : "no {ITEM}";
  at("back").disabled = page === 0;
  at("forth").disabled = (page + 1) * PAGE >= found.length;
  current = -1;
}

function filter() {
  const benchmark = at("benchmark").value, inside = questions.filter(q => !benchmark || q.benchmark === benchmark);
  options(at("task"), [...new Set(inside.map(q => q.task))].sort());
  const task = at("task").value, wanted = at("result").value, order = at("order").value, text = at("search").value.toLowerCase();
  const help = {"helped": 1, "hurt": -1, "no difference": 0}[order];
  found = inside.filter(q => (!task || q.task === task) && (!wanted || q.result === wanted) && (!order || q.helped === help)
    && (!text || (q.problem + " " + q.id + " " + q.answers.map(a => a.text).join(" ")).toLowerCase().includes(text)));
  page = 0;
  show();
}

function turn(by) {
  if (page + by < 0 || (page + by) * PAGE >= found.length) return false;
  page += by;
  show();
  at("bar").scrollIntoView();
  return true;
}

function focus(by) {
  const cards = at("gallery").children;
  if (!cards.length) return;
  current = Math.max(0, Math.min(cards.length - 1, current + by));
  cards[current].focus();
  cards[current].scrollIntoView();
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|SELECT/.test(event.target.tagName)) return;
  const actions = {j: () => focus(1), k: () => focus(-1), n: () => turn(1), p: () => turn(-1), o: () => {
    const folds = at("gallery").children[Math.max(0, current)]?.querySelectorAll("details") || [];
    const open = [...folds].some(f => !f.open);
    folds.forEach(f => { f.open = open; });
  }};
  if (actions[event.key]) { actions[event.key](); event.preventDefault(); }
});
at("bar").addEventListener("submit", event => event.preventDefault());
for (const id of ["benchmark", "task", "result", "order"]) at(id).addEventListener("change", filter);
at("search").addEventListener("input", filter);
at("back").addEventListener("click", () => turn(-1));
at("forth").addEventListener("click", () => turn(1));
options(at("benchmark"), [...new Set(questions.map(q => q.benchmark))]);
options(at("result"), [...new Set(questions.map(q => q.result))].sort());
filter();
</script></body></html>
"""
