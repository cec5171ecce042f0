"""The pages of tools/report.py and tools/rollouts.py, also in a real browser; each test names the bug it guards."""

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from unittest import mock

import jinja2
import pytest
from test_data import write_video

from support import metrics
from support.settings import SharedConfig, UserError
from tools import report, rollouts

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome in PATH")
HOSTILE = [
    "<script>document.title = 'ran'</script>",
    "</script><script>document.title = 'ran'</script>",
    "<!-- <script>",
    "<img src=x onerror=\"document.title = 'ran'\">",
    "{{ title }} {% raw %}",
    "\" onclick='x' \ud800 end",
    "</article></body></html>",
    "word" * 200,
]
ORDER = [3, 1, 0, 2, 7, 5, 4, 6]


def row(i, frames="ordered", right=True, thought="It goes right.", **extra):
    """A row of predictions.jsonl: question i, on one of three benchmarks."""
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


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rendered(write, *arguments):
    """What the template is given for the page that write(*arguments) writes."""
    real = jinja2.Template.render
    with mock.patch.object(jinja2.Template, "render", autospec=True, side_effect=real) as render:
        write(*arguments)
    return render.call_args.kwargs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "media").mkdir()
    write_video(folder / "media/clip.mp4", 12)
    return folder


@pytest.fixture(scope="module")
def gallery(root, tmp_path_factory):
    """(path of a page that the command wrote, what its template was given)."""
    # every fifth is wrong in order, every third is wrong shuffled
    rows = [row(i, right=i % 5 != 0) for i in range(60)]
    rows += [row(i, "shuffled", right=i % 3 != 0, frame_order=ORDER) for i in range(60)]
    rows.append(row(61, task="Other", prediction="no idea at all", options=["left", "right"]))
    rows.append(row(65, error="media/gone.mp4: cannot be read"))
    del rows[-1]["prediction"]
    rows.append(row(0, benchmark="mmvu", id="open", options=[], problem_type="free-form", prediction="heat"))
    path = write_rows(tmp_path_factory.mktemp("gallery") / "predictions.jsonl", rows)
    values = rendered(report.main, [str(path), "--data_root", str(root)])
    return path.with_name("report.html"), values


@pytest.fixture(scope="module")
def hostile_page(root, tmp_path_factory):
    rows = []
    for i, text in enumerate(HOSTILE):
        everywhere = {"problem": text, "task": text, "benchmark": text, "id": text}
        rows.append(row(i, thought=text, options=["A. " + text, "B. x"], **everywhere))
    path = tmp_path_factory.mktemp("hostile") / "report.html"
    report.write_report(path, {"run": rows}, SharedConfig(data_root=str(root)))
    return path


def in_browser(path, script, width=1200):
    """What `script`, the body of a function, returns when it runs in the page. Fails if the page has a script error."""
    catch = "<script>addEventListener('error', event => { window.failure = event.message; });</script>"
    run = (
        """<pre id="result"></pre><script>
        function choose(name, value) {
          const filter = document.querySelector(`select[name=${name}]`);
          filter.value = value;
          filter.dispatchEvent(new Event("change"));
        }
        const visible = () => [...document.querySelectorAll("article")].filter(card => card.offsetHeight > 0);
        let result = null;
        try { result = (() => { """
        + script
        + """ })(); } catch (error) { window.failure = String(error); }
        document.getElementById("result").textContent = JSON.stringify([window.failure || null, result]);
        </script>"""
    )
    text = path.read_text(encoding="utf-8")
    assert text.rstrip().endswith("</body>\n</html>")
    text = text.replace("<head>", "<head>" + catch, 1).rstrip().removesuffix("</body>\n</html>")
    copy = path.with_name("in_browser.html")
    copy.write_text(text + run + "</body></html>", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += [f"--user-data-dir={path.with_name('profile')}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *options, copy.as_uri()], capture_output=True, text=True, timeout=180)
    printed = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert printed and printed[1], done.stderr[-2000:]
    failure, result = json.loads(html.unescape(printed[1]))
    assert failure is None
    return result


def test_media_are_sought_where_the_evaluation_found_them(root, tmp_path, monkeypatch):
    """Guards: a page without frames and without a word, because it is made in another folder than the evaluation."""
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({"settings": {"data_root": str(root)}}) + "\n")
    asked = []
    monkeypatch.setattr(report, "write_report", lambda out, runs, cfg: asked.append(cfg.data_root))
    report.main([str(path)])
    report.main([str(path), "--data_root", "other"])
    assert asked == [str(root), "other"]


def test_page_loads_nothing_else(gallery):
    """Guards: a page that is empty without its folder or network."""
    text = gallery[0].read_text()
    assert not re.findall(r"(?:src|href)\s*=|url\((?!data:)|@import|https?://|fetch\(", text)
    assert text.count("data:image/webp;base64,") == 63
    assert "<h1>runs/mine/final: mvbench, mmvu, videomme, mine</h1>" in text
    assert "&#34;max_frames&#34;: 8" in text


def test_scores_have_errors_and_say_how_answers_ended(gallery):
    """Guards: a score without its standard error; an interval of width 0 for questions on one clip, or for answers that
    are all equal, which looks certain; unread answers that are not counted.
    """
    (table,) = gallery[1]["tables"]
    assert table["headings"] == ["questions", "ordered, %", "shuffled, %"]
    lines = [(line["label"], line["cells"]) for line in table["rows"]]
    place = lines.index(("videomme", [21, "76.2 ± 9.5", "100.0 ± –\n+20.0, –"]))
    assert lines[place + 1 : place + 5] == [
        ("Counting", [20, "80.0 ± 9.2", "100.0 ± –\n+20.0, –"]),
        ("Other", [1, "0.0 ± –", ""]),
        ("answers unread", ["", "4.8%", "0.0%"]),
        ("answers read leniently", ["", "0.0%", "0.0%"]),
    ]


def test_card_has_the_completions_of_its_question(gallery):
    """Guards: the shuffled completion on the wrong question; an open answer of MMVU shown as scored; "solution: B" next
    to options without letters.
    """
    cards = {card["id"]: card for card in gallery[1]["questions"]}
    card = cards["q3"]
    assert [(answer["label"], answer["score"]) for answer in card["answers"]] == [("ordered", 1), ("shuffled", 0)]
    assert card["answers"][0]["rewards"] == {"accuracy": 1, "format": 1, "n_tokens": 23, "truncated": 0}
    assert (card["frames"], card["frames_seen"], card["shuffled"]) == (8, 8, ORDER)
    assert cards["q61"]["options"] == ["A. left", "B. right"]
    for name, text in (("open", "heat"), ("q65", "media/gone.mp4: cannot be read")):
        (answer,) = cards[name]["answers"]
        assert (answer["verdict"], answer["text"], cards[name]["changes"]) == ("not scored", text, [])


@pytest.mark.parametrize(
    "extra, reason",
    [
        ({"path": "media/gone.mp4"}, "not available: media/gone.mp4"),
        ({"path": "../../etc/x.mp4"}, "leaves the data root"),
        ({"path": None}, "this prediction names no media"),
        ({"data_type": "image"}, "not available: media/clip.mp4"),
        ({"settings": {"max_frames": "x"}}, "not available"),
    ],
)
def test_questions_without_media_show_the_reason(root, tmp_path, extra, reason):
    """Guards: a traceback, or a missing question, if a file is gone, is outside the root, or was never named."""
    rows = [row(0), row(1, **extra)]
    cfg = SharedConfig(data_root=str(root))
    cards = rendered(report.write_report, tmp_path / "report.html", {"run": rows}, cfg)["questions"]
    assert "strip" in cards[0] and reason in cards[1]["no_frames"]
    assert reason in (tmp_path / "report.html").read_text()


def test_strip_shows_at_most_sixteen_frames(root):
    """Guards: 64 frames too small to see; a shuffled strip of other frames than the ordered one."""
    write_video(root / "media/long.mp4", 64)
    record = row(0, path="media/long.mp4", frame_order=list(range(63, -1, -1)), settings={"max_frames": 64})
    strip = report.film_strip(record, SharedConfig(data_root=str(root)))
    assert (strip["frames"], strip["frames_seen"]) == (16, 64)
    assert strip["shuffled"] == list(range(15, -1, -1))


def test_page_holds_at_most_300_questions(tmp_path, monkeypatch):
    """Guards: a page that no browser opens; a page that hides how many questions were left out."""
    monkeypatch.setattr(report, "film_strip", lambda record, cfg: {"no_frames": "none"})
    rows = [row(i) for i in range(400)]
    cards = rendered(report.write_report, tmp_path / "report.html", {"run": rows}, SharedConfig())["questions"]
    assert (len(cards), cards[0]["id"], cards[-1]["id"]) == (300, "q0", "q399")
    assert "This page holds 300 of 400 questions, evenly spaced" in (tmp_path / "report.html").read_text()


def test_two_runs_are_compared_question_by_question(tmp_path):
    """Guards: an interval as of independent questions; a shuffled answer in the place of an ordered one; two runs in
    folders of one name, of which one is lost.
    """
    # the first run is wrong in every fifth question, the second in every third
    before = [row(i, right=i % 5 != 0, path=f"media/q{i}.mp4") for i in range(30)]
    after = [row(i, right=i % 3 != 0, path=f"media/q{i}.mp4") for i in range(30)]
    after.append(row(0, "shuffled", right=True))
    sft = write_rows(tmp_path / "sft/eval/predictions.jsonl", before)
    rl = write_rows(tmp_path / "rl/eval/predictions.jsonl", after)
    values = rendered(report.main, [str(sft), str(rl)])
    labels = [str(sft.parent), str(rl.parent)]
    assert values["tables"][0]["headings"] == ["questions", f"{labels[0]}, %", f"{labels[1]}, %"]
    cells = {line["label"]: line["cells"] for line in values["tables"][0]["rows"]}
    # of 10 questions of each benchmark, 2 are wrong before; after, all of mvbench's are wrong
    assert cells["mvbench"] == [10, "80.0 ± 13.3", "0.0 ± –\n-80.0, -106.1 to -53.9"]
    assert cells["videomme"] == [10, "80.0 ± 13.3", "100.0 ± –\n+20.0, -6.1 to +46.1"]
    changes = {card["id"]: card["changes"] for card in values["questions"]}
    assert [changes[f"q{i}"] for i in (3, 5, 1)] == [[f"{labels[1]}: {word}"] for word in ("lost", "gained", "same")]
    options = re.findall(r"<option>(.*?)</option>", (rl.parent / "report.html").read_text())
    assert options[-3:] == [f"{labels[1]}: {word}" for word in ("gained", "lost", "same")]
    assert [answer["label"] for answer in values["questions"][0]["answers"]] == labels


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """(path of a page that compares two runs in up to three orders, what its template was given).

    Of ten questions of mvbench, the first run has all right in order and five shuffled; the second has eight in order,
    and of these none shuffled.
    """
    clips = range(0, 30, 3)
    before = [row(i, right=True, path=f"media/q{i}.mp4") for i in clips]
    before += [row(i, "shuffled", right=i < 15, path=f"media/q{i}.mp4") for i in clips]
    after = [row(i, right=i < 24, path=f"media/q{i}.mp4") for i in clips]
    after += [row(i, "shuffled", right=False, path=f"media/q{i}.mp4") for i in clips]
    # a question that the first run was not asked shuffled, an order that it was not asked, and another benchmark
    after += [row(33, order, path="media/q33.mp4") for order in ("ordered", "shuffled")]
    after += [row(0, "blind", path="media/q0.mp4"), row(1, id="q0")]
    folder = tmp_path_factory.mktemp("two") / ("a_run_with_a_long_name_" * 3)
    files = [write_rows(folder / name / "predictions.jsonl", rows) for name, rows in (("a", before), ("b", after))]
    values = rendered(report.main, [*map(str, files), "--data_root", str(folder)])
    return folder / "b/report.html", values


def test_orders_by_run_say_whether_the_need_for_order_grew(two_runs, tmp_path):
    """Guards: a comparison of two runs in order only; a change over questions that one run was not asked, or without
    its interval; questions of two benchmarks with one id; a second table that repeats the first.
    """
    table = two_runs[1]["tables"][1]
    assert table["headings"] == ["questions", "ordered, %", "shuffled, %", "blind, %"]
    lines = [[line["label"].replace(str(two_runs[0].parent.parent), "DIR"), *line["cells"]] for line in table["rows"]]
    assert lines[:3] == [
        ["mvbench, DIR/a", 10, "100.0 ± –", "50.0 ± 16.7\n-50.0, -82.7 to -17.3", ""],
        ["mvbench, DIR/b", 11, "81.8 ± 12.2", "9.1 ± 9.1\n-72.7, -100.3 to -45.1", "100.0 ± –\n+0.0, –"],
        # in the ten questions of both: -80 in place of -50; five clips -1, three 0, two +1
        ["change", "", "", "-30.0, -81.0 to +21.0", ""],
    ]
    assert [line[0] for line in lines[3:]] == ["videomme, DIR/a", "videomme, DIR/b", "change"]
    assert lines[4][1:] == [1, "100.0 ± –", "", ""]
    values = rendered(report.write_report, tmp_path / "page.html", {"a": [row(0)], "b": [row(0)]}, SharedConfig())
    assert len(values["tables"]) == 1


def test_the_page_says_what_an_interval_is_over(two_runs):
    """Guards: a difference that looks wrong, as it is not that of the two columns; an interval of three clips that
    looks as good as one of a thousand.
    """
    text = " ".join(two_runs[0].read_text().split())
    assert "too narrow for fewer than 30 videos" in text
    assert "over the questions asked in both columns (pictures are asked in order and blind only)" in text


@needs_browser
@pytest.mark.parametrize("width", [500, 1200])
def test_every_score_is_visible_at_any_width(two_runs, width):
    """Guards: the second run's column beyond the right edge; a score without its heading once columns are stacked."""
    right, window, named = in_browser(
        two_runs[0],
        """
        const cells = [...document.querySelectorAll("td")].filter(cell => cell.offsetHeight > 0);
        const right = Math.max(...cells.map(cell => cell.getBoundingClientRect().right));
        const named = cells.filter(cell => getComputedStyle(cell, "::before").content.includes(", %")).length;
        return [right, innerWidth, named];""",
        width=width,
    )
    assert right <= window
    assert (named > 0) == (width == 500)


def test_hostile_text_is_escaped_everywhere(hostile_page):
    """Guards: one value of the template that is not escaped, on a machine without a browser."""
    text = hostile_page.read_text()
    tags = [tag.lower() for tag in re.findall(r"<(?:script|img|!--|/article|/body|/html)", text)]
    assert Counter(tags) == {"</article": len(HOSTILE), "</body": 1, "</html": 1, "<script": 1}
    assert '" onclick=' not in text


@needs_browser
def test_hostile_text_is_shown_and_never_runs(hostile_page):
    """Guards: a completion with <script>, </script> or <!-- that runs, ends the page, or hides the text after it; a
    table, a strip or a long word wider than a telephone.
    """
    cards, title, n_scripts, page_width, window_width = in_browser(
        hostile_page,
        """
        for (const fold of document.querySelectorAll("details")) fold.open = true;
        const cards = visible().map(card => card.textContent);
        const root = document.documentElement;
        return [cards, document.title, document.scripts.length, root.scrollWidth, innerWidth];""",
        width=500,
    )
    assert title.startswith("runs/mine/final: ")
    # one script of the page and two of this test
    assert n_scripts == 3
    assert len(cards) == len(HOSTILE)
    for text, card in zip(HOSTILE, cards):
        # in the header three times, in the problem, an option, and the reasoning
        assert card.count(text.replace("\ud800", "?")) == 6, (text, card)
    assert page_width <= window_width


@needs_browser
def test_filters_and_cards_in_a_browser(gallery):
    """Guards: a filter that shows the other cards; the shuffled strip in the ordered order; unfolded reasoning."""
    result = in_browser(
        gallery[0],
        """
        const out = {};
        const ids = () => visible().map(card => card.querySelectorAll("header span")[1].textContent);
        for (const [name, value] of [["group", "mvbench"], ["kind", "disc"], ["result", "unread"]]) {
          choose(name, value);
          out[name] = ids();
          choose(name, "");
        }
        for (const value of ["shuffled: lost", "shuffled: gained"]) {
          choose("change", value);
          out[value] = ids();
        }
        choose("group", "mine");
        out.both = ids();
        out.count = document.getElementById("count").textContent;
        choose("group", ""); choose("change", "");

        const card = document.querySelector("[data-group=mvbench]");
        const strips = [...card.querySelectorAll(".strip")];
        const offset = frame => -parseFloat(getComputedStyle(frame).backgroundPositionX);
        const position = frame => Math.round(offset(frame) / frame.offsetWidth);
        out.positions = strips.map(strip => [...strip.children].map(position));
        out.drawn = getComputedStyle(strips[0].children[0]).backgroundImage.slice(0, 27);
        out.folded = card.querySelectorAll("details:not([open])").length;
        return out;""",
    )
    assert result["group"] == [f"q{i}" for i in range(0, 60, 3)]
    assert result["kind"] == [f"q{i}" for i in range(2, 60, 3)] + ["q65"]
    assert result["result"] == ["q61"]
    assert result["shuffled: lost"] == [f"q{i}" for i in range(60) if i % 5 and not i % 3]
    assert result["shuffled: gained"] == [f"q{i}" for i in range(60) if i % 3 and not i % 5]
    assert (result["both"], result["count"]) == (["q5", "q20", "q35", "q50"], "4 shown")
    assert (result["positions"], result["drawn"]) == ([list(range(8)), ORDER], 'url("data:image/webp;base64')
    assert result["folded"] == 2


@pytest.fixture(scope="module")
def rl_run(world, tmp_path_factory):
    """Folder of a run: config.yaml and rollouts.jsonl with 3 steps of 2 prompts, 3 + 2 completions each."""
    folder = tmp_path_factory.mktemp("run")
    records = json.loads((world / "world/rl.json").read_text())
    rows = []
    for step in (0, 1, 12):
        for record in [record for record in records if record["data_type"] == "video"][:2]:
            prompt = {"step": step} | {name: record[name] for name in metrics.QUESTION if name in record}
            texts = [f"<think>t</think>\n{record['solution']}", "<think>t</think>\n<answer>Z</answer>"]
            for i in range(3):
                # as many are correct as the step says
                scores = {"accuracy": float(i < step), "temporal": 0.15, "advantage": 0.5 - i}
                rows.append({**prompt, "frames": "ordered", "text": texts[i >= step], **scores})
            rows += [{**prompt, "frames": "shuffled", "text": text, "frame_order": ORDER} for text in texts]
    write_rows(folder / "rollouts.jsonl", rows)
    config = {"records": f"{world}/world/rl.json", "data_root": f"{world}/world", "max_frames": 8, "alpha": 0.3}
    (folder / "config.yaml").write_text(json.dumps({"tgrpo": config}))
    return folder


def test_page_of_rollouts_needs_only_the_run_folder(rl_run):
    """Guards: completions of two steps or prompts in one group; shuffled ones without their order; lost rewards."""
    cards = rendered(rollouts.main, [str(rl_run / "rollouts.jsonl")])["questions"]
    for place, step, result, change in ((0, 0, "none", "lost"), (2, 1, "some", "lost"), (4, 12, "all", "gained")):
        for card in cards[place : place + 2]:
            found = (card["group"], card["result"], card["changes"])
            assert found == (f"step {step}", f"{result} correct", [f"ordered: {change}"])
    assert len(cards) == 6 and cards[0]["id"] != cards[1]["id"]
    answers = cards[2]["answers"]
    assert [answer["label"] for answer in answers] == ["ordered"] * 3 + ["shuffled"] * 2
    assert [answer["score"] for answer in answers] == [1, 0, 0, 1, 0]
    assert answers[1]["rewards"] == {"accuracy": 0.0, "temporal": 0.15, "advantage": -0.5}
    assert (answers[3]["rewards"], cards[2]["frames"], cards[2]["shuffled"]) == ({}, 8, ORDER)
    text = (rl_run / "rollouts.html").read_text()
    assert "advantage -0.5" in text and ">Rollouts of " in text


def test_questions_with_one_id_on_one_clip_stay_apart(rl_run, tmp_path, world):
    """Guards: completions under the text, options and solution of another question."""
    record = json.loads((world / "world/rl.json").read_text())[0]
    records = [record | {"problem": "Which?"}, record | {"problem": "Who?"}]
    rows = []
    for row in records:
        rows.append({key: row[key] for key in metrics.QUESTION if key in row} | {"text": f"to {row['problem']}"})
    rows = [row | {"step": 0, "frames": "ordered"} for row in rows]
    write_rows(tmp_path / "rollouts.jsonl", rows)
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "config.yaml").write_text((rl_run / "config.yaml").read_text())
    arguments = [str(tmp_path / "rollouts.jsonl"), "--records", str(tmp_path / "records.json")]
    cards = rendered(rollouts.main, arguments)["questions"]
    found = [(card["problem"], card["answers"][0]["text"]) for card in cards]
    assert found == [("Which?", "to Which?"), ("Who?", "to Who?")]


def test_page_can_be_limited_to_some_steps(rl_run, tmp_path):
    """Guards: a page of a 7B run that shows every hundredth step and never the one that went wrong; a setting on the
    command line that is ignored.
    """
    arguments = [str(rl_run / "rollouts.jsonl"), "--step", "12", "--max_frames", "4"]
    cards = rendered(rollouts.main, [*arguments, "--out", str(tmp_path / "page.html")])["questions"]
    assert {(card["group"], card["frames"]) for card in cards} == {("step 12", 4)}
    with pytest.raises(UserError, match="nothing of these steps; it holds steps 0 to 12"):
        rollouts.main([str(rl_run / "rollouts.jsonl"), "--step", "5"])


@pytest.mark.parametrize(
    "file, text, line",
    [
        ("rollouts.jsonl", '{"step": 1}\n', "line 1: this row lacks problem_id, path"),
        ("config.yaml", None, "config.yaml: cannot read this config"),
        ("config.yaml", "tgrpo: {records: examples/records.json}", "--records names the run's records"),
    ],
)
def test_missing_or_foreign_run_files_are_one_clear_line(rl_run, tmp_path, file, text, line):
    """Guards: a traceback, or a page without questions, if a run's file is missing or belongs to another run."""
    for name in ("rollouts.jsonl", "config.yaml"):
        (tmp_path / name).write_text((rl_run / name).read_text())
    (tmp_path / file).unlink()
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=line) as error:
        rollouts.main([str(tmp_path / "rollouts.jsonl")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "rollouts.html").exists()
