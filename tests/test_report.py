"""The pages of tools/report.py and tools/rollouts.py, also in a real browser; each test names the bug it guards."""

import html
import json
import re
import shutil
import subprocess

import jinja2
import pytest
from test_data import write_video

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


def row_without_answer(i):
    answered = row(i, error="media/gone.mp4: cannot be read")
    return {name: value for name, value in answered.items() if name != "prediction"}


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
    (folder / "media").mkdir()
    write_video(folder / "media/clip.mp4", 12)
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
    render = jinja2.Template.render

    def record_and_render(self, **given):
        values.update(given)
        return render(self, **given)

    monkeypatch.setattr(jinja2.Template, "render", record_and_render)
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


def test_scores_have_errors_and_say_how_answers_ended(page, rendered):
    """Guards: a score without its standard error; "[+100.0, +100.0]" for questions on one clip; unread answers that are
    not counted.
    """
    rows = gap_rows(12)
    page(rows)
    part = summarise(rows)["mvbench"]
    table = rendered["table"]
    assert table["headings"] == ["questions", "in order, %", "shuffled, %"]
    labels = [line["label"] for line in table["rows"]]
    answers = ["answers unread", "answers read leniently", "answers cut off"]
    assert labels[:5] == ["mvbench", "action_sequence", *answers] and "Counting" in labels
    cells = {line["label"]: line["cells"] for line in table["rows"]}
    shuffled = part["orders"]["shuffled"]
    # all questions are on one clip
    expected = f"{shuffled['score']:.1f} ± {shuffled['se']:.1f}\n{shuffled['difference']['mean']:+.1f}"
    assert cells["mvbench"] == [4, f"{part['score']:.1f} ± {part['se']:.1f}", expected]
    assert cells["answers unread"] == ["", "0.0%", "0.0%"]


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
    write_video(root / "media/long.mp4", 64)
    record = row(0, path="media/long.mp4", frame_order=list(range(63, -1, -1)), settings={"max_frames": 64})
    strip = report.film_strip(record, SharedConfig(data_root=str(root)))
    assert (strip["frames"], strip["frames_seen"]) == (16, 64)
    assert strip["shuffled"] == list(range(15, -1, -1))


def test_page_holds_at_most_300_questions(page, rendered, monkeypatch):
    """Guards: a page that no browser opens; a page that hides how many questions were left out."""
    monkeypatch.setattr(report, "film_strip", lambda record, cfg: {"no_frames": "none"})
    path = page([row(i) for i in range(400)])
    assert len(rendered["questions"]) == 300
    assert (rendered["questions"][0]["id"], rendered["questions"][-1]["id"]) == ("q0", "q399")
    assert re.search(r"This page holds 300 of 400 questions, evenly spaced", path.read_text())


def test_long_text_loses_its_middle_only():
    """Guards: a page of hundreds of MB from one endless completion; a cut that hides the answer or itself."""
    text = "start " + "z" * 1_000_000 + " <answer>B</answer>"
    short = report.shorten(text)
    assert len(short) < report.MAX_CHARACTERS + 100
    assert short.startswith("start ") and short.endswith("<answer>B</answer>")
    assert "characters left out" in short
    assert report.shorten("y" * report.MAX_CHARACTERS) == "y" * report.MAX_CHARACTERS


# ---------------------------------------------------------------------------------------------- in a browser


def hostile_rows():
    rows = []
    for i, text in enumerate(HOSTILE):
        everywhere = {"problem": text, "task": text, "benchmark": text, "id": text, "error": text}
        rows.append(row(i, thought=text, options=["A. " + text, "B. x"], **everywhere))
    return rows


def test_hostile_text_is_escaped_everywhere(page):
    """Guards: one value of the template that is not escaped, on a machine without a browser."""
    text = page(hostile_rows()).read_text()
    tags = [tag.lower() for tag in re.findall(r"<(?:script|img|!--|/article|/body|/html)", text)]
    assert {tag: tags.count(tag) for tag in sorted(set(tags))} == {
        "</article": len(HOSTILE),
        "</body": 1,
        "</html": 1,
        "<script": 1,
    }
    assert '" onclick=' not in text


@needs_browser
def test_hostile_text_is_shown_and_never_runs(page):
    """Guards: a completion with <script>, </script> or <!-- that runs, ends the page, or hides the text after it; a
    table, a strip or a long word wider than a telephone.
    """
    cards, title, n_scripts, page_width, window_width = in_browser(
        page(hostile_rows()),
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
    table = rendered["table"]
    assert table["headings"] == ["questions", "sft, %", "tgrpo, %"]
    rows = {line["label"]: line["cells"] for line in table["rows"]}
    # of 10 questions of each benchmark, 2 are wrong before; after, all of mvbench's are wrong
    assert rows["mvbench"] == [10, "80.0 ± 13.3", "0.0 ± 0.0\n-80.0, -106.1 to -53.9"]
    assert rows["videomme"] == [10, "80.0 ± 13.3", "100.0 ± 0.0\n+20.0, -6.1 to +46.1"]
    changes = {card["id"]: card["changes"] for card in rendered["questions"]}
    assert (changes["q3"], changes["q5"], changes["q1"]) == (["tgrpo: lost"], ["tgrpo: gained"], ["tgrpo: same"])
    assert rendered["changes"] == ["tgrpo: gained", "tgrpo: lost", "tgrpo: same"]
    labels = [answer["label"] for answer in rendered["questions"][0]["answers"]]
    assert labels == ["sft", "tgrpo"]


def test_several_files_are_named_after_their_folders():
    """Guards: two columns with one name, of which one is lost."""
    assert list(report.run_labels(["a/sft/p.jsonl", "a/tgrpo/p.jsonl"])) == ["sft", "tgrpo"]
    assert list(report.run_labels(["a/sft/p.jsonl", "b/sft/p.jsonl"])) == ["a/sft/p.jsonl", "b/sft/p.jsonl"]


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
    text = (rl_run / "rollouts.html").read_text()
    assert "advantage -0.5" in text and ">Rollouts of " in text


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
        ("rollouts.jsonl", '{"step": 1}\n', "line 1: not a row of rollouts.jsonl, it lacks problem_id, path"),
        ("config.yaml", None, "tgrpo.records: missing; .* --records"),
        ("config.yaml", OTHER_RECORDS, "--records names the run's records"),
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


def test_options_without_letters_get_the_letters_of_the_prompt():
    """Guards: "solution: C" next to three options none of which is called C."""
    record = {"problem_id": 1, "problem": "How many?", "problem_type": "multiple choice", "solution": "C"}
    record["options"] = ["3", "2", "0"]
    row = {"step": 1, "problem_id": 1, "path": "a.mp4", "frames": "ordered", "text": "<answer>C</answer>"}
    assert rollouts.prompt_card([row], record)["options"] == ["A. 3", "B. 2", "C. 0"]
