"""report.py: what the page says, in its own words and in a real browser; each test names the bug it guards."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from evaluate import EvalConfig, summarise
from tools import report
from tools.report import shorten, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome in PATH")
HOSTILE = [
    "<script>document.title = 'ran'</script>",
    "</script><script>document.title = 'ran'</script>",
    "<!-- <script>",
    "<img src=x onerror=\"document.title = 'ran'\">",
    "{DATA} {SCORES}",
    "\ud800 line\u2028 end",
    "</think></body></html>",
]


def write_moving_square(path, n_frames=12, size=(160, 90)):
    """A white square that moves from left to right, so that a strip shows its order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(4))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(n_frames):
            frame = np.full((size[1], size[0], 3), (30, 60, 90), dtype=np.uint8)
            left = i * (size[0] - 24) // (n_frames - 1)
            frame[30:54, left : left + 24] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def row(i, frames="ordered", right=True, thought="It goes right.", **extra):
    benchmark, task = [("mvbench", "action_sequence"), ("videomme", "Counting"), ("mine", "disc")][i % 3]
    return {
        "benchmark": benchmark,
        "id": f"q{i}",
        "task": task,
        "data_type": "video",
        "problem_type": "multiple choice",
        "problem": f"Which way does square {i} move?",
        "options": ["A. left", "B. right"],
        "solution": "<answer>B</answer>",
        "path": "media/clip.mp4",
        "frames": frames,
        "prediction": f"<think>{thought}</think>\n<answer>{'B' if right else 'A'}</answer>",
        "accuracy": float(right),
        "format": 1.0,
        "n_tokens": 20 + i,
        "truncated": False,
        "settings": {"model": "runs/mine/final", "max_frames": 8, "seed": 0},
        **extra,
    }


TITLE = f"runs/mine/final: mvbench, videomme, mine, {time.strftime('%Y-%m-%d')}"


def gap_rows(n):
    """n questions both ways: every third is right only in order, every fifth wrong in order."""
    order = [3, 1, 0, 2, 7, 5, 4, 6]
    return [
        r for i in range(n) for r in (row(i, right=i % 5 != 0), row(i, "shuffled", right=i % 3 != 0, frame_order=order))
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_moving_square(folder / "media/clip.mp4")
    return folder


@pytest.fixture
def page(root, tmp_path):
    """page(rows) writes the report of these rows and returns its path."""

    def make(rows):
        write_report(tmp_path / "report.html", rows, summarise(rows), EvalConfig(data_root=str(root), num_workers=0))
        return tmp_path / "report.html"

    return make


def questions_in(path):
    """The questions as the page's own JSON."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def in_browser(path, script, width=1200):
    """What `script`, the body of a function, returns when it runs in the page. No error may come up on the page."""
    path = shutil.copy(path, path.with_name("in_browser.html"))
    text = path.read_text(encoding="utf-8")
    caught = "<script>addEventListener('error', e => { window.failure = e.message; });</script>"
    asked = (
        "<pre id='said'></pre><script>document.getElementById('said').textContent = JSON.stringify((() => { try {"
        "const press = key => (document.activeElement || document.body).dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));"
        "const set = (id, value, event = 'change') => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event(event)); };"
        "const cards = () => [...document.querySelectorAll('article')];"
        "const here = () => document.activeElement.closest('article')?.querySelector('header').textContent;"
        f"return [window.failure || null, (() => {{ {script} }})()]; }} catch (error) {{ return [String(error), null]; }} }})());</script>"
    )
    path.write_text(
        text.replace("<head>", "<head>" + caught, 1).replace("</body></html>\n", asked + "</body></html>"),
        encoding="utf-8",
    )
    profile = path.with_name("profile")
    shutil.rmtree(profile, ignore_errors=True)
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-sync",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={profile}",
            f"--window-size={width},900",
            "--virtual-time-budget=4000",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    said = re.search(r'<pre id="said">(.*?)</pre>', done.stdout, re.S)
    assert said and said[1], done.stderr[-2000:]
    failure, result = json.loads(html.unescape(said[1]))
    assert failure is None
    return result


# ------------------------------------------------------------------------------------------------- without a browser


def test_the_page_is_one_file_that_loads_nothing(page):
    """Guards: a page that is empty without its folder or without the network."""
    text = page(gap_rows(6)).read_text()
    links = re.findall(r"(?:src|href)\s*=|url\((?!\$)|@import|https?://|fetch\(", text)
    assert not links and "data:image/webp;base64," in text
    assert [line.split(">")[1] for line in re.findall(r"<h[12]>[^<]*", text)] == [TITLE, "Gallery"]


def test_scores_stand_above_with_error_gap_and_published_numbers_marked(page):
    """Guards: a score without its error; another paper's number that passes for ours."""
    rows = gap_rows(12)
    text, part = page(rows).read_text(), summarise(rows)["mvbench"]
    line = re.search(r"<th scope=row>mvbench</th>(.*?)</tr>", text)[1]
    assert (
        f"{part['score']:.1f} ± {part['se']:.1f}" in line
        and f"{part['gap']['gap']:+.1f}" in line
        and "62.7/63.9/64.8" in line
    )
    head = re.search(r"<thead>(.*?)</thead>", text)[1]
    assert all(f"{model} (published" in head for model in ("GPT-4o", "Qwen2.5-VL-7B (CoT prompt)", "Video-R1-7B"))
    assert "action_sequence" in text and "Counting" in text


def test_what_the_gallery_knows_of_a_question(page):
    """Guards: the shuffled completion beside the wrong question; open answers of MMVU shown as judged; true and false as text."""
    open_ended = row(
        0,
        benchmark="mmvu",
        task="Physics",
        problem_type="free-form",
        id="open",
        options=[],
        solution="<answer>heat</answer>",
    )
    questions = {q["id"]: q for q in questions_in(page(gap_rows(6) + [open_ended | {"prediction": "heat"}]))}
    both = questions["q3"]
    assert [(a["frames"], a["score"]) for a in both["answers"]] == [("ordered", 1), ("shuffled", 0)] and both[
        "helped"
    ] == 1
    assert [questions[f"q{i}"]["helped"] for i in (0, 1, 5)] == [0, 0, -1]
    assert both["answers"][0]["terms"] == {"accuracy": 1, "format": 1, "n_tokens": 23, "truncated": 0}
    assert (both["frames"], both["of"], both["order"]) == (8, 8, [3, 1, 0, 2, 7, 5, 4, 6])
    assert questions["open"]["answers"][0]["score"] is None and questions["open"]["helped"] is None


def test_missing_media_are_said(page):
    """Guards: a traceback, or a question that vanishes, where a file is gone, leaves the root, or was never named."""
    rows = [
        row(0, path="media/gone.mp4"),
        row(1, path="../../etc/x.mp4"),
        row(2, path=None),
        row(3, data_type="sound"),
        {k: v for k, v in row(4).items() if k != "prediction"} | {"error": "media/gone.mp4: cannot be read"},
        row(5, settings="none"),
        row(6, settings={"max_frames": "x"}, frame_order=7),
        row(7, frame_order=["a", 99]),
    ]
    questions = questions_in(page(rows))
    assert "not at hand: media/gone.mp4" in questions[0]["why"] and "leaves the data root" in questions[1]["why"]
    assert questions[2]["why"] == questions[3]["why"] == "this prediction names no media"
    assert (
        questions[4]["error"] == "media/gone.mp4: cannot be read"
        and questions[4]["answers"] == []
        and questions[4]["problem"]
    )
    assert "strip" in questions[5] and "not at hand" in questions[6]["why"] and questions[7]["order"] == []


def test_a_strip_has_sixteen_frames_at_most_and_says_of_how_many(page, root):
    """Guards: 64 frames in a strip nobody can see; a shuffled strip of other frames than the ordered one."""
    write_moving_square(root / "media/long.mp4", n_frames=64)
    order = list(range(63, -1, -1))
    [question] = questions_in(
        page([row(0, "shuffled", path="media/long.mp4", frame_order=order, settings={"max_frames": 64})])
    )
    assert (question["frames"], question["of"]) == (16, 64) and question["order"] == list(range(15, -1, -1))


def test_a_thousand_questions_stay_under_30_megabytes(page, monkeypatch):
    """Guards: a page that no browser opens; room counted without the texts, or without base64's third; more than a gallery can hold."""
    monkeypatch.setattr(report, "load_media", lambda row, cfg: (np.zeros((16, 8, 8, 3), dtype=np.uint8), None))
    monkeypatch.setattr(
        report, "picture", lambda frames, room: ("data:image/webp;base64," + "A" * int(room * 4 / 3), 8, 8)
    )  # all of it
    long = "".join(
        map(chr, np.random.default_rng(0).integers(0x4E00, 0x9FFF, 5000))
    )  # 5,000 Chinese characters of 3 bytes
    path = page([r | {"prediction": f"<think>{long}</think><answer>B</answer>"} for r in gap_rows(1200)])
    questions = questions_in(path)
    assert (
        20e6 < path.stat().st_size < 30e6
        and len(questions) == 1000
        and "1000 of 1200 questions, evenly spread" in path.read_text()
    )
    assert questions[0]["id"] == "q0" and questions[-1]["id"] == "q1199"
    assert all(q["answers"][0]["text"].endswith("<answer>B</answer>") for q in questions)  # cut in the middle


def test_a_picture_takes_no_more_room_than_there_is():
    """Guards: quality that ignores the page's limit; a picture dropped that would have fitted smaller."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 90, 160, 3), dtype=np.uint8)  # hardly compressible
    frames = [Image.fromarray(f) for f in noise]
    sizes = [report.picture(frames, room) for room in (1e6, 12_000, 5_000, 100)]
    assert [height for *_, height in sizes[:2]] == [72, 40] and sizes[3] == (None, None, None)
    for (uri, width, height), room in zip(sizes, (1e6, 12_000, 5_000)):
        raw = base64.b64decode(uri.split(",")[1])
        assert len(raw) <= room and Image.open(io.BytesIO(raw)).size == (16 * width, height)


def test_long_texts_are_cut_only_where_they_must_be():
    """Guards: completions cut though there is room; a cut that nobody is told of."""
    short, long = (
        {"problem": "p", "options": ["A. x"], "solution": "s", "answers": [{"text": t}]}
        for t in ("y" * 40_000, "z" * 20_000_000)
    )
    shorten(questions := [json.loads(json.dumps(short)), long])
    assert (
        questions[0] == short
        and "characters left out" in long["answers"][0]["text"]
        and len(long["answers"][0]["text"]) < 51_000
    )


# ---------------------------------------------------------------------------------------------------- in a browser


@needs_browser
def test_html_in_any_text_is_shown_not_run(page):
    """Guards: a completion with <script>, </script> or <!-- that runs, ends the page, or swallows what follows."""
    rows = [
        row(
            i,
            thought=text,
            problem=text,
            task=text,
            benchmark=text,
            options=["A. " + text, "B. x"],
            error=text,
            id=text,
        )
        for i, text in enumerate(HOSTILE)
    ]
    path = page(rows)
    shown, title, scripts = in_browser(
        path,
        """
        return [cards().map(c => c.querySelector(".answer pre").textContent + c.querySelector(".problem").textContent
                                + c.querySelector("li").textContent + c.querySelector("header").textContent),
                document.title, document.scripts.length]""",
    )
    assert title.startswith("runs/mine/final: ") and all(
        text.replace("\ud800", "?").replace("\u2028", " ") in title for text in HOSTILE[:3]
    )
    assert scripts == 4 and len(shown) == len(HOSTILE)  # ours: two, and the test's two
    for text, card in zip(HOSTILE, shown):
        assert card.count(text.replace("\ud800", "?")) >= 4, (text, card)


@needs_browser
def test_keys_walk_through_the_gallery(page):
    """Guards: keys that do nothing, run past the ends, or fire while one types a search."""
    said = in_browser(
        page(gap_rows(60)),
        """
        const out = [cards().length];
        press("k"); out.push(here());
        press("j"); press("j"); out.push(here());
        press("k"); out.push(here());
        out.push(cards()[1].querySelectorAll("details[open]").length);
        press("o"); out.push(cards()[1].querySelectorAll("details[open]").length, document.querySelectorAll("article details[open]").length);
        press("o"); out.push(cards()[1].querySelectorAll("details[open]").length);
        press("p"); out.push(document.getElementById("count").textContent);
        press("n"); out.push(document.getElementById("count").textContent);
        press("n"); press("n"); out.push(document.getElementById("count").textContent);
        press("j"); out.push(here());
        document.getElementById("search").focus(); press("p"); out.push(document.getElementById("count").textContent);
        return out;""",
    )
    assert said[0] == 25 and [
        said[i].removesuffix("order helped").removesuffix("order hurt") for i in (1, 2, 3, 11)
    ] == ["mvbenchaction_sequenceq0", "minediscq2", "videommeCountingq1", "minediscq50"]
    assert said[4:8] == [0, 2, 2, 0]
    assert said[8:11] == ["1 to 25 of 60", "26 to 50 of 60", "51 to 60 of 60"] and said[12] == "51 to 60 of 60"


@needs_browser
def test_filters_and_search_find_what_they_name(page):
    """Guards: a filter that shows the others; order-helped that shows order-hurt; a search blind to answers."""
    rows = gap_rows(60) + [
        row(60, thought="A zebra!"),
        row(61, prediction="no idea at all"),
        row(63, prediction="A or B"),
        {k: v for k, v in row(65).items() if k != "prediction"} | {"error": "cannot be read"},
    ]
    said = in_browser(
        page(rows),
        """
        const ids = () => questions.filter(q => found.includes(q)).map(q => q.id), out = {};
        const all = ["benchmark", "task", "result", "order"], clear = () => { all.forEach(id => set(id, "")); set("search", "", "input"); };
        set("benchmark", "videomme"); out.benchmark = ids(); out.tasks = [...document.getElementById("task").options].map(o => o.value); clear();
        set("task", "disc"); out.task = ids(); clear();
        for (const value of ["right", "wrong", "unread", "not answered"]) { set("result", value); out[value] = ids(); clear(); }
        for (const value of ["helped", "hurt", "no difference"]) { set("order", value); out[value] = ids(); clear(); }
        set("search", "ZEBRA", "input"); out.search = ids(); clear();
        set("search", "square 59", "input"); out.question = ids(); clear();
        set("benchmark", "mine"); set("order", "hurt"); out.two = ids(); clear();
        set("search", "nothing has this", "input"); out.none = document.getElementById("count").textContent; clear();
        out.cleared = ids().length;
        return out;""",
    )
    ids = lambda keep: [f"q{i}" for i in range(60) if keep(i)]
    assert said["benchmark"] == ids(lambda i: i % 3 == 1) + ["q61"] and said["tasks"] == ["", "Counting"]
    assert said["task"] == ids(lambda i: i % 3 == 2) + ["q65"]
    assert said["right"] == ids(lambda i: i % 5) + ["q60"] and said["wrong"] == ids(lambda i: i % 5 == 0)
    assert said["unread"] == ["q61", "q63"] and said["not answered"] == ["q65"]
    assert said["helped"] == ids(lambda i: i % 5 and i % 3 == 0) and said["hurt"] == ids(lambda i: i % 5 == 0 and i % 3)
    assert said["no difference"] == ids(lambda i: (i % 5 == 0) == (i % 3 == 0))
    assert (
        said["search"] == ["q60"]
        and said["question"] == ["q59"]
        and said["two"] == ids(lambda i: i % 3 == 2 and i % 5 == 0)
    )
    assert said["none"] == "no question" and said["cleared"] == 64


@needs_browser
def test_a_card_shows_both_strips_both_answers_and_folded_reasoning(page):
    """Guards: the shuffled strip in the ordered order; reasoning unfolded; a completion of booleans that breaks the page."""
    said = in_browser(
        page(gap_rows(4)),
        """
        const card = cards()[3], strips = [...card.querySelectorAll(".strip")];
        return {places: strips.map(s => [...s.children].map(f => Math.round(-parseFloat(f.style.backgroundPositionX) / f.offsetWidth))),
                labels: strips.map(s => s.getAttribute("aria-label")), drawn: getComputedStyle(strips[0].children[0]).backgroundImage.slice(0, 27),
                marks: [...card.querySelectorAll(".answer span")].map(s => s.textContent), folded: card.querySelectorAll("details:not([open])").length,
                terms: card.querySelector(".terms").textContent, helped: card.querySelector("header").textContent.includes("order helped"),
                answers: [...card.querySelectorAll(".answer > pre")].map(p => p.textContent)}""",
    )
    assert said["places"] == [list(range(8)), [3, 1, 0, 2, 7, 5, 4, 6]] and said["labels"] == [
        "8 frames, in order",
        "8 frames, as shuffled",
    ]
    assert (
        said["drawn"] == 'url("data:image/webp;base64' and said["marks"] == ["right", "wrong"] and said["folded"] == 2
    )
    assert said["terms"] == "accuracy 1 · format 1 · n_tokens 23 · truncated 0" and said["helped"]
    assert said["answers"] == ["<answer>B</answer>", "<answer>A</answer>"]


@needs_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_is_no_wider_than_the_window(page, width):
    """Guards: a table or a strip that makes one scroll the whole page sideways; text cut off at the right."""
    wide = "word" * 200
    said = in_browser(
        page(gap_rows(3) + [row(3, thought=wide, problem=wide, options=["A. " + wide, "B. x"], task=wide)]),
        """
        document.querySelectorAll("details").forEach(d => { d.open = true; });
        return [document.documentElement.scrollWidth, innerWidth]""",
        width,
    )
    assert said[0] <= said[1]


def wide_rows():
    """All six benchmarks, both orders of frames, with the longest names of their tasks."""
    tasks = {
        "vsibench": ("object_rel_direction_medium", "object_size_estimation"),
        "videommmu": ("Comprehension", "Perception"),
        "mvbench": ("counterfactual_inference", "egocentric_navigation"),
        "tempcompass": ("multi-choice", "caption_matching"),
        "mmvu": ("Diagnostics_and_Laboratory_Medicine", "Electrical_Engineering"),
        "videomme": ("Information Synopsis", "OCR Problems"),
        "mine": ("a_task_of_my_own_whose_name_is_longer_than_a_column_of_any_table_should_ever_be", "short"),
    }
    groups = {"domain": "Artistic Performance", "sub_category": "Literature & Art", "duration": "medium"}
    rows = []
    for benchmark, names in tasks.items():
        for i in range(8):
            for frames in ("ordered", "shuffled"):
                shown = row(i, frames, right=(i + (frames == "shuffled")) % 3 > 0)
                rows.append(
                    shown
                    | {"benchmark": benchmark, "task": names[i % 2], "path": f"{i}.mp4"}
                    | (groups if benchmark == "videomme" else {})
                )
                if names[i % 2] in ("object_size_estimation",):
                    rows[-1] |= {"problem_type": "regression", "options": [], "solution": "<answer>3</answer>"}
    return rows


@needs_browser
def test_published_scores_are_in_sight(page):
    """Guards: our own score without the published ones beside it, unless one scrolls sideways, in a window of 1,300 pixels."""
    said = in_browser(
        page(wide_rows()),
        """
        const heads = [...document.querySelectorAll("thead th")];
        const right = Math.min(innerWidth, document.querySelector(".wide").getBoundingClientRect().right);
        return {order: heads.slice(1).map(h => h.textContent), over: heads.filter(h => h.getBoundingClientRect().right > right).length,
                rows: document.querySelectorAll("tbody tr").length, width: innerWidth}""",
        width=1300,
    )
    assert said["over"] == 0 and said["rows"] > 20 and said["width"] <= 1300
    assert said["order"][1:4] == ["score, %"] + [
        f"{model} (published)" for model in ("GPT-4o", "Qwen2.5-VL-7B (CoT prompt)")
    ]


def test_an_interval_over_one_clip_is_a_dash(page):
    """Guards: "+100.0 to +100.0" of two questions on one clip, which reads like certainty."""
    rows = [row(i, frames, right=frames == "ordered") for i in (0, 3) for frames in ("ordered", "shuffled")]
    gap = summarise(rows)["mvbench"]["gap"]
    assert (gap["gap"], gap["low"], gap["high"], gap["clips"]) == (100, None, None, 1)
    assert "+100.0 <small>(–)</small>" in page(rows).read_text()
