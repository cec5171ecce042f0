"""The pages of tools/report.py and tools/rollouts.py, also in a real browser; each test names the bug it guards."""

import html
import json
import re
import shutil
import subprocess
from fractions import Fraction

import av
import numpy as np
import pytest

from benchmarks.orders import summarise
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
]
ORDER = [3, 1, 0, 2, 7, 5, 4, 6]


def write_moving_square(path, n_frames=12, size=(160, 90)):
    """A white square that moves from left to right, so that a strip shows its order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(4))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(n_frames):
            frame = np.full((size[1], size[0], 3), (30, 60, 90), dtype=np.uint8)
            left = i * (size[0] - 24) // (n_frames - 1)
            frame[30:54, left : left + 24] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


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


def row_without_answer(i):
    unusable = row(i, error="media/gone.mp4: cannot be read")
    del unusable["prediction"]
    return unusable


def gap_rows(n):
    """n questions with both frame orders: every fifth is wrong in order, every third is wrong shuffled."""
    rows = []
    for i in range(n):
        rows.append(row(i, right=i % 5 != 0))
        rows.append(row(i, "shuffled", right=i % 3 != 0, frame_order=ORDER))
    return rows


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_moving_square(folder / "media/clip.mp4")
    return folder


@pytest.fixture
def page(root, tmp_path):
    """page(rows), or page({label: rows}), writes the report of one or several runs and returns its path."""

    def write(rows):
        runs = rows if isinstance(rows, dict) else {"run": rows}
        report.write_report(tmp_path / "report.html", runs, SharedConfig(data_root=str(root)))
        return tmp_path / "report.html"

    return write


@pytest.fixture
def rendered(monkeypatch):
    """What the template was given for the last page."""
    values = {}
    render = report.render

    def record_and_render(**given):
        values.update(given)
        return render(**given)

    monkeypatch.setattr(report, "render", record_and_render)
    return values


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
        const texts = (node, selector) => [...node.querySelectorAll(selector)].map(found => found.textContent);
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


# ------------------------------------------------------------------------------------------- without a browser


def test_command_writes_a_page_that_loads_nothing_else(root, tmp_path, capsys):
    """Guards: a page that is empty without its folder or network; a command that needs a model or a config."""
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text("".join(json.dumps(row) + "\n" for row in gap_rows(6)))
    report.main([str(predictions), "--data_root", str(root)])
    assert f"page: {tmp_path / 'report.html'}" in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text()
    assert not re.findall(r"(?:src|href)\s*=|url\((?!data:)|@import|https?://|fetch\(", text)
    assert text.count("data:image/webp;base64,") == 6
    assert re.search(r"<h1>runs/mine/final: mvbench, videomme, mine, \d{4}-\d\d-\d\d</h1>", text)
    assert "&#34;max_frames&#34;: 8" in text


def test_predictions_without_a_solution_are_one_clear_error(tmp_path):
    """Guards: a traceback, or half a page, for a file that cannot be scored."""
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text(json.dumps(row(0, solution=None)) + "\n")
    with pytest.raises(UserError, match="row 1: solution: missing; join the official files with --annotations DIR"):
        report.main([str(predictions)])
    assert not (tmp_path / "report.html").exists()


def test_scores_have_errors_and_published_scores_are_marked(page, rendered):
    """Guards: a score without its standard error; another paper's score that looks like ours."""
    rows = gap_rows(12)
    page(rows)
    part = summarise(rows)["mvbench"]
    table, answers = rendered["tables"]
    assert table["headings"] == ["questions", "in order, %", "shuffled, %"]
    scores = {line["label"]: line for line in table["rows"]}
    assert scores["mvbench"]["cells"][1] == f"{part['score']:.1f} ± {part['se']:.1f}"
    shuffled = part["orders"]["shuffled"]
    expected = f"{shuffled['score']:.1f} ± {shuffled['se']:.1f}\n{shuffled['difference']['mean']:+.1f}, "
    assert scores["mvbench"]["cells"][2].startswith(expected) or shuffled["difference"]["low"] is None
    assert scores["Video-R1-7B (published)"]["style"] == "published"
    assert [line["label"] for line in table["rows"][:4]] == [
        "mvbench",
        "Qwen2.5-VL-7B (CoT prompt) (published)",
        "Video-R1-7B (published)",
        "action_sequence",
    ]
    assert "Counting" in scores
    assert answers["rows"][0]["label"] == "mvbench, in order"
    assert answers["rows"][0]["cells"] == [4, "0.0%", "0.0%", "0.0%", "0"]


def test_interval_over_one_clip_is_a_dash(page, rendered):
    """Guards: "[+100.0, +100.0]" for two questions on one clip, which looks like certainty."""
    rows = [row(i, frames, right=frames == "ordered") for i in (0, 3) for frames in ("ordered", "shuffled")]
    page(rows)
    assert rendered["tables"][0]["rows"][0]["cells"][2] == "0.0 ± 0.0\n-100.0"


def test_card_has_the_completions_of_its_question(page, rendered):
    """Guards: the shuffled completion on the wrong question; an open answer of MMVU shown as scored."""
    open_ended = row(0, benchmark="mmvu", id="open", options=[], problem_type="free-form", prediction="heat")
    page(gap_rows(6) + [open_ended])
    cards = {card["id"]: card for card in rendered["questions"]}
    card = cards["q3"]
    assert [(answer["label"], answer["score"]) for answer in card["answers"]] == [("in order", 1), ("shuffled", 0)]
    changes = [cards[f"q{i}"]["changes"] for i in (3, 0, 1, 5)]
    assert changes == [["shuffled: lost"], ["shuffled: same"], ["shuffled: same"], ["shuffled: gained"]]
    assert card["answers"][0]["rewards"] == {"accuracy": 1, "format": 1, "n_tokens": 23, "truncated": 0}
    assert (card["frames"], card["frames_seen"], card["shuffled"]) == (8, 8, ORDER)
    assert cards["open"]["answers"][0]["verdict"] == "not scored"
    assert cards["open"]["changes"] == []


def test_questions_without_media_show_the_reason(page, rendered):
    """Guards: a traceback, or a missing question, if a file is gone, is outside the root, or was never named."""
    rows = [
        row(0, path="media/gone.mp4"),
        row(1, path="../../etc/x.mp4"),
        row(2, path=None),
        row(3, data_type="sound"),
        row_without_answer(4),
        row(5, settings="none"),
        row(6, settings={"max_frames": "x"}, frame_order=7),
        row(7, frame_order=["a", 99]),
    ]
    page(rows)
    cards = rendered["questions"]
    assert "not available: media/gone.mp4" in cards[0]["no_frames"]
    assert "leaves the data root" in cards[1]["no_frames"]
    assert cards[2]["no_frames"] == cards[3]["no_frames"] == "this prediction names no media"
    assert cards[4]["error"] == "media/gone.mp4: cannot be read"
    assert cards[4]["answers"] == []
    assert "strip" in cards[5]
    assert "not available" in cards[6]["no_frames"]
    assert cards[7]["shuffled"] == []


def test_strip_shows_at_most_sixteen_frames(root):
    """Guards: 64 frames too small to see; a shuffled strip of other frames than the ordered one."""
    write_moving_square(root / "media/long.mp4", n_frames=64)
    record = row(0, path="media/long.mp4", frame_order=list(range(63, -1, -1)), settings={"max_frames": 64})
    strip = report.film_strip(record, SharedConfig(data_root=str(root)))
    assert (strip["frames"], strip["frames_seen"]) == (16, 64)
    assert strip["shuffled"] == list(range(15, -1, -1))


def test_page_stays_below_its_size_limit(page, rendered, monkeypatch):
    """Guards: a page that no browser opens; a page that hides how many questions were left out."""
    monkeypatch.setattr(report, "film_strip", lambda record, cfg: {"no_frames": "none"})
    rows = [row(i) for i in range(1200)]
    path = page(rows)
    assert len(rendered["questions"]) == 300
    assert (rendered["questions"][0]["id"], rendered["questions"][-1]["id"]) == ("q0", "q1199")
    assert "This page holds 300 of 1200 questions, evenly spaced." in path.read_text()
    monkeypatch.setattr(report, "MAX_BYTES", path.stat().st_size // 3)
    path = page(rows)
    assert path.stat().st_size <= report.MAX_BYTES
    assert "This page holds 75 of 1200 questions, evenly spaced." in path.read_text()


def test_long_text_loses_its_middle_only():
    """Guards: a page of hundreds of MB from one endless completion; a cut that hides the answer or itself."""
    text = "start " + "z" * 1_000_000 + " <answer>B</answer>"
    short = report.shorten(text)
    assert len(short) < report.MAX_CHARACTERS + 100
    assert short.startswith("start ") and short.endswith("<answer>B</answer>")
    assert "characters left out" in short
    assert report.shorten("y" * report.MAX_CHARACTERS) == "y" * report.MAX_CHARACTERS


# ---------------------------------------------------------------------------------------------- in a browser


@needs_browser
def test_hostile_text_is_shown_and_never_runs(page):
    """Guards: a completion with <script>, </script> or <!-- that runs, ends the page, or hides the text after it."""
    rows = []
    for i, text in enumerate(HOSTILE):
        everywhere = {"problem": text, "task": text, "benchmark": text, "id": text, "error": text}
        rows.append(row(i, thought=text, options=["A. " + text, "B. x"], **everywhere))
    cards, title, n_scripts = in_browser(
        page(rows), "return [visible().map(card => card.textContent), document.title, document.scripts.length];"
    )
    assert title.startswith("runs/mine/final: ")
    # One script of the page and two of this test.
    assert n_scripts == 3
    assert len(cards) == len(HOSTILE)
    for text, card in zip(HOSTILE, cards):
        # in the header three times, in the problem, an option, and the reasoning
        assert card.count(text.replace("\ud800", "?")) == 6, (text, card)


@needs_browser
def test_filters_and_cards_in_a_browser(page):
    """Guards: a filter that shows the other cards; the shuffled strip in the ordered order; unfolded reasoning."""
    rows = gap_rows(60) + [row(61, prediction="no idea at all"), row_without_answer(65)]
    result = in_browser(
        page(rows),
        """
        const out = {};
        const ids = () => visible().map(card => card.querySelectorAll("header span")[1].textContent);
        const choices = {
          group: ["videomme"], kind: ["disc"], result: ["right", "wrong", "unread", "not answered"],
          change: ["shuffled: lost", "shuffled: gained", "shuffled: same"],
        };
        for (const [name, values] of Object.entries(choices)) {
          for (const value of values) {
            choose(name, value);
            out[value] = ids();
          }
          choose(name, "");
        }
        choose("group", "mine"); choose("change", "shuffled: gained");
        out.both = ids();
        out.count = document.getElementById("count").textContent;
        choose("group", ""); choose("change", "");

        const card = visible()[3];
        const strips = [...card.querySelectorAll(".strip")];
        const offset = frame => -parseFloat(getComputedStyle(frame).backgroundPositionX);
        const position = frame => Math.round(offset(frame) / frame.offsetWidth);
        out.positions = strips.map(strip => [...strip.children].map(position));
        out.drawn = getComputedStyle(strips[0].children[0]).backgroundImage.slice(0, 27);
        out.verdicts = texts(card, ".answer span");
        out.folded = card.querySelectorAll("details:not([open])").length;
        out.rewards = texts(card, ".rewards")[0].trim();
        out.answers = texts(card, "pre.text");
        return out;""",
    )

    def ids(chosen):
        return [f"q{i}" for i in range(60) if chosen(i)]

    assert result["videomme"] == ids(lambda i: i % 3 == 1) + ["q61"]
    assert result["disc"] == ids(lambda i: i % 3 == 2) + ["q65"]
    assert result["right"] == ids(lambda i: i % 5 != 0)
    assert result["wrong"] == ids(lambda i: i % 5 == 0)
    assert result["unread"] == ["q61"]
    assert result["not answered"] == ["q65"]
    assert result["shuffled: lost"] == ids(lambda i: i % 5 != 0 and i % 3 == 0)
    assert result["shuffled: gained"] == ids(lambda i: i % 5 == 0 and i % 3 != 0)
    assert result["shuffled: same"] == ids(lambda i: (i % 5 == 0) == (i % 3 == 0))
    assert result["both"] == ids(lambda i: i % 3 == 2 and i % 5 == 0)
    assert result["count"] == "4 shown"
    assert result["positions"] == [list(range(8)), ORDER]
    assert result["drawn"] == 'url("data:image/webp;base64'
    assert result["verdicts"] == ["right", "wrong"]
    assert result["folded"] == 2
    assert result["rewards"] == "accuracy 1 · format 1 · n_tokens 23 · truncated 0"
    assert result["answers"] == ["<answer>B</answer>", "<answer>A</answer>"]


@needs_browser
def test_page_is_no_wider_than_the_window(page):
    """Guards: a table, a strip or a long word that makes one scroll the whole page sideways."""
    wide = "word" * 200
    long_row = row(3, thought=wide, problem=wide, options=["A. " + wide, "B. x"], task=wide)
    page_width, window_width = in_browser(
        page(gap_rows(3) + [long_row]),
        """
        for (const fold of document.querySelectorAll("details")) fold.open = true;
        return [document.documentElement.scrollWidth, innerWidth];""",
        width=500,
    )
    assert page_width <= window_width


def two_runs(n):
    """Two runs of n questions: the first is wrong in every fifth, the second in every third."""
    before = [row(i, right=i % 5 != 0, settings={"model": "runs/sft/final"}) for i in range(n)]
    after = [row(i, right=i % 3 != 0, settings={"model": "runs/tgrpo/final"}) for i in range(n)]
    return {"sft": before, "tgrpo": after + [row(0, "shuffled", right=True)]}


def test_two_runs_are_compared_question_by_question(page, rendered):
    """Guards: an interval as of independent questions; a shuffled answer in the place of an ordered one."""
    runs = two_runs(30)
    for i, one in enumerate(runs["sft"] + runs["tgrpo"]):
        one["path"] = f"media/{one['id']}.mp4"
    page(runs)
    table, answers = rendered["tables"]
    assert table["headings"] == ["questions", "sft, %", "tgrpo, %"]
    rows = {line["label"]: line["cells"] for line in table["rows"]}
    # of 10 questions of each benchmark, 2 are wrong before; after, all of mvbench's are wrong
    assert rows["mvbench"] == [10, "80.0 ± 13.3", "0.0 ± 0.0\n-80.0, -106.1 to -53.9"]
    assert rows["videomme"] == [10, "80.0 ± 13.3", "100.0 ± 0.0\n+20.0, -6.1 to +46.1"]
    assert [line["label"] for line in answers["rows"][:2]] == ["mvbench, sft", "mvbench, tgrpo"]
    changes = {card["id"]: card["changes"] for card in rendered["questions"]}
    assert (changes["q3"], changes["q5"], changes["q1"]) == (["tgrpo: lost"], ["tgrpo: gained"], ["tgrpo: same"])
    assert rendered["changes"] == ["tgrpo: gained", "tgrpo: lost", "tgrpo: same"]
    labels = [answer["label"] for answer in rendered["questions"][0]["answers"]]
    assert labels == ["sft", "tgrpo"]


def test_several_files_are_named_after_their_folders(root, tmp_path, capsys):
    """Guards: two columns with one name, of which one is lost."""
    paths = []
    for name in ("sft", "tgrpo", "other/sft"):
        (tmp_path / name).mkdir(parents=True)
        paths.append(tmp_path / name / "predictions.jsonl")
        paths[-1].write_text("".join(json.dumps(one) + "\n" for one in two_runs(3)["sft"]))
    assert list(report.run_labels(paths[:2])) == ["sft", "tgrpo"]
    assert list(report.run_labels(paths)) == [str(path) for path in paths]
    report.main([*map(str, paths), "--data_root", str(root)])
    assert f"page: {tmp_path / 'other/sft/report.html'}" in capsys.readouterr().out


@needs_browser
@pytest.mark.parametrize("width", [1200, 500])
def test_the_questions_that_changed_in_a_browser(page, width):
    """Guards: a filter for changed questions that shows all of them; a page wider than a telephone."""
    result = in_browser(
        page(two_runs(30)),
        """
        const ids = () => visible().map(card => card.querySelectorAll("header span")[1].textContent);
        const out = {all: ids().length};
        for (const change of ["gained", "lost", "same"]) {
          choose("change", "tgrpo: " + change);
          out[change] = ids();
        }
        out.answers = texts(visible()[0], ".answer > div:first-child").map(text => text.replace(/\\s+/g, " ").trim());
        out.width = [document.documentElement.scrollWidth, innerWidth];
        return out;""",
        width=width,
    )
    assert result["all"] == 30
    assert result["gained"] == ["q5", "q10", "q20", "q25"]
    assert result["lost"] == [f"q{i}" for i in (3, 6, 9, 12, 18, 21, 24, 27)]
    assert len(result["same"]) == 18
    assert result["answers"] == ["sft: wrong", "tgrpo: wrong"]
    assert result["width"][0] <= result["width"][1]


# -------------------------------------------------------------------------------------------------------- rollouts


@pytest.fixture(scope="module")
def rl_run(world, tmp_path_factory):
    """Folder of a run: config.yaml and rollouts.jsonl with 3 steps of 2 prompts, 3 + 2 completions each."""
    folder = tmp_path_factory.mktemp("run")
    records = json.loads((world / "world/rl.json").read_text())
    videos = [record for record in records if record["data_type"] == "video"][:2]
    rows = []
    for step in (0, 1, 12):
        # of 3 completions of the first prompt, `step` are correct; all of the second prompt are
        for record, n_correct in zip(videos, (step, 3)):
            prompt = {"step": step, "problem_id": record["problem_id"], "path": record["path"]}
            right = f"<think>t</think>\n{record['solution']}"
            wrong = "<think>t</think>\n<answer>Z</answer>"
            for i in range(3):
                is_right = i < n_correct
                rewards = {"accuracy": float(is_right), "format": 1.0, "length": 0.0, "temporal": 0.15}
                text = right if is_right else wrong
                rows.append({**prompt, "frames": "ordered", "text": text, **rewards, "advantage": 0.5 - i})
            for text in (right, wrong):
                rows.append({**prompt, "frames": "shuffled", "text": text, "frame_order": [7, 6, 5, 4, 3, 2, 1, 0]})
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"records": f"{world}/world/rl.json", "data_root": f"{world}/world", "max_frames": 8, "alpha": 0.3}
    (folder / "config.yaml").write_text(json.dumps({"tgrpo": config}))
    return folder


def test_page_of_rollouts_needs_only_the_run_folder(rl_run, rendered):
    """Guards: completions of two steps in one group; shuffled ones without their order; rewards left out."""
    rollouts.main([str(rl_run / "rollouts.jsonl")])
    cards = rendered["questions"]
    assert [card["group"] for card in cards] == ["step 0", "step 0", "step 1", "step 1", "step 12", "step 12"]
    assert [card["result"] for card in cards[:3]] == ["none correct", "all correct", "some correct"]
    assert [card["result"] for card in cards[3:]] == ["all correct"] * 3
    effects = ["hurt", "helped", "hurt", "helped", "helped", "helped"]
    assert [card["changes"] for card in cards] == [[f"order: {effect}"] for effect in effects]
    first = cards[0]
    assert [answer["label"] for answer in first["answers"]] == ["in order"] * 3 + ["shuffled"] * 2
    rewards = {"accuracy": 0.0, "format": 1.0, "length": 0.0, "temporal": 0.15, "advantage": -0.5}
    assert first["answers"][1]["rewards"] == rewards
    assert [answer["score"] for answer in first["answers"]] == [0, 0, 0, 1, 0]
    assert first["answers"][3]["rewards"] == {}
    assert (first["frames"], first["shuffled"]) == (8, [7, 6, 5, 4, 3, 2, 1, 0])
    assert first["problem"]


def test_page_can_be_limited_to_some_steps(rl_run, rendered, tmp_path):
    """Guards: a page of a 7B run that shows every hundredth step and never the one that went wrong."""
    rollouts.main([str(rl_run / "rollouts.jsonl"), "--step", "12", "--out", str(tmp_path / "page.html")])
    assert {card["group"] for card in rendered["questions"]} == {"step 12"}
    with pytest.raises(UserError, match="no rollouts of step 5; it holds steps 0 to 12"):
        rollouts.main([str(rl_run / "rollouts.jsonl"), "--step", "5"])


OTHER_RECORDS = "tgrpo: {records: examples/records.json}"


@pytest.mark.parametrize(
    "file, text, line",
    [
        ("rollouts.jsonl", None, "no such file; a run writes it with save_rollouts: true"),
        ("rollouts.jsonl", '{"step": 1}\n', "line 1: not a rollout, it lacks problem_id, path, frames, text"),
        ("config.yaml", None, "--records and --data_root must name"),
        ("config.yaml", OTHER_RECORDS, "--records names the run's records"),
    ],
)
def test_missing_or_foreign_run_files_are_one_clear_line(rl_run, tmp_path, file, text, line):
    """Guards: a traceback, or a page without questions, if a run's file is missing or belongs to another run."""
    for name in ("rollouts.jsonl", "config.yaml"):
        (tmp_path / name).write_text((rl_run / name).read_text())
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=line) as error:
        rollouts.main([str(tmp_path / "rollouts.jsonl")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "rollouts.html").exists()


@needs_browser
def test_page_of_rollouts_in_a_browser(rl_run):
    """Guards: a step filter that shows the other steps; an advantage missing from the page; a wrong strip."""
    rollouts.main([str(rl_run / "rollouts.jsonl")])
    result = in_browser(
        rl_run / "rollouts.html",
        """
        const options = name => [...document.querySelectorAll(`[name=${name}] option`)].map(o => o.textContent);
        const out = {title: document.title, cards: visible().length};
        out.steps = options("group");
        out.results = options("result");
        choose("group", "step 1");
        out.step_1 = visible().length;
        const card = visible()[0];
        out.verdicts = texts(card, ".answer span");
        out.rewards = texts(card, ".rewards")[0].trim();
        const offset = frame => -parseFloat(getComputedStyle(frame).backgroundPositionX);
        const position = frame => Math.round(offset(frame) / frame.offsetWidth);
        out.positions = [...card.querySelectorAll(".strip")].map(strip => [...strip.children].map(position));
        out.label = document.querySelector("select[name=group]").parentNode.textContent.trim().slice(0, 4);
        choose("group", "");
        choose("result", "none correct");
        out.none_correct = visible().length;
        return out;""",
    )
    assert result["title"].startswith("Rollouts of ")
    assert (result["cards"], result["step_1"], result["none_correct"]) == (6, 2, 1)
    assert result["steps"] == ["all", "step 0", "step 1", "step 12"]
    assert result["results"] == ["all", "all correct", "none correct", "some correct"]
    assert result["label"] == "step"
    assert result["verdicts"] == ["right", "wrong", "wrong", "right", "wrong"]
    assert result["rewards"] == "accuracy 1 · format 1 · length 0 · temporal 0.15 · advantage 0.5"
    assert result["positions"] == [list(range(8)), list(range(7, -1, -1))]


def test_options_without_letters_get_the_letters_of_the_prompt():
    """Guards: "solution: C" next to three options none of which is called C."""
    record = {
        "problem_id": 1,
        "problem": "How many?",
        "problem_type": "multiple choice",
        "options": ["3", "2", "0"],
        "solution": "C",
    }
    row = {"step": 1, "problem_id": 1, "path": "a.mp4", "frames": "ordered", "text": "<answer>C</answer>"}
    assert rollouts.prompt_card([row], record)["options"] == ["A. 3", "B. 2", "C. 0"]
