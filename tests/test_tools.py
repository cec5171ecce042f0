"""tools/: curves and rollouts of any run, as a user asks for them; each test names the bug it guards."""

import json

import numpy as np
import pytest
from PIL import Image
from test_report import in_browser, needs_browser, questions_in

from settings import UserError
from tools import plot, rollouts, toy_table


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rl_row(step, reward=1.0):
    return {
        "step": step,
        "reward/total": reward,
        "policy/kl": 0.01 * step,
        "completion/length": 20 + step,
        "loss": -0.1,
        "temporal/gap": 0.2,
    }


@pytest.fixture(scope="module")
def colours():
    """The RGB colours of matplotlib's first two lines."""
    return {"first": (31, 119, 180), "second": (255, 127, 14)}


def count(path, colour):
    """Number of pixels of this colour in a picture."""
    return int((np.abs(np.asarray(Image.open(path).convert("RGB")).astype(int) - colour).max(-1) < 8).sum())


# ---------------------------------------------------------------------------------------------------------- curves


def test_curves_are_written_beside_the_metrics(tmp_path, colours, capsys):
    """Guards: a stage whose picture is empty; a temporary file left behind."""
    sft = write_rows(tmp_path / "sft/metrics.jsonl", [{"step": i, "loss": 2 - i / 10} for i in range(20)])
    rl = write_rows(tmp_path / "rl/metrics.jsonl", [rl_row(i) for i in range(20)])
    for file in (sft, rl):
        plot.main([str(file)])
        assert f"curves: {file.with_name('metrics.png')}" in capsys.readouterr().out
        assert sorted(p.name for p in file.parent.iterdir()) == ["metrics.jsonl", "metrics.png"]
    assert 0 < count(sft.with_suffix(".png"), colours["first"]) < count(rl.with_suffix(".png"), colours["first"])


def test_panels_follow_the_metrics_of_the_run():
    """Guards: the meaningless loss of T-GRPO; an empty panel for a metric that the run does not have."""
    drawn = [name for name, *_ in plot.PANELS if name in plot.metrics_in([rl_row(0)])]
    assert drawn == ["reward/total", "temporal/gap", "policy/kl", "completion/length"]
    plain = {name: value for name, value in rl_row(0).items() if name != "temporal/gap"}
    assert "temporal/gap" not in plot.metrics_in([plain]) and "loss" in plot.metrics_in([{"step": 0, "loss": 1.0}])


def test_two_runs_have_two_colours_in_one_picture(tmp_path, colours):
    """Guards: a second file that is ignored or has the first one's colour; a row without a metric that stops the plot."""
    first = write_rows(tmp_path / "a/metrics.jsonl", [rl_row(i) for i in range(20)])
    rows = [rl_row(i, reward=2.0) for i in range(30)]
    del rows[3]["temporal/gap"], rows[4]["reward/total"]
    second = write_rows(tmp_path / "b/metrics.jsonl", rows)
    plot.main([str(first), str(second), "--out", str(tmp_path / "both.png")])
    assert (
        count(tmp_path / "both.png", colours["first"]) > 500 and count(tmp_path / "both.png", colours["second"]) > 500
    )


@pytest.mark.parametrize(
    "text, line",
    [
        (None, "metrics.jsonl: no such file"),
        ("", "metrics.jsonl: no metrics in this file"),
        ("{\n{\n", "not a metrics.jsonl"),
        ('{"loss": 1}\n', "line 1: not a row of metrics"),
        ('{"step": 1, "lr": 1}\n', "none of loss, reward/total"),
    ],
)
def test_wrong_metrics_file_is_one_clear_line(tmp_path, text, line):
    """Guards: a traceback or an empty picture for a mistyped path or another kind of file."""
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=line) as error:
        plot.main([str(tmp_path / "metrics.jsonl")])
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*.png"))


# -------------------------------------------------------------------------------------------------------- rollouts


@pytest.fixture(scope="module")
def rl_run(world, tmp_path_factory):
    """Folder of a run: config.yaml and rollouts.jsonl with 3 steps of 2 prompts, 3 + 2 completions each."""
    folder = tmp_path_factory.mktemp("run")
    records = json.loads((world / "world/rl.json").read_text())
    videos = [r for r in records if r["data_type"] == "video"][:2]
    order = [7, 6, 5, 4, 3, 2, 1, 0]
    rows = []
    for step in (0, 1, 12):
        for number, record in enumerate(videos):
            said = {"step": step, "problem_id": record["problem_id"], "path": record["path"]}
            right, wrong = f"<think>t</think>\n{record['solution']}", "<think>t</think>\n<answer>Z</answer>"
            for i in range(3):
                is_right = i < (step, 3)[number]
                rows.append(
                    said
                    | {
                        "frames": "ordered",
                        "text": right if is_right else wrong,
                        "accuracy": float(is_right),
                        "format": 1.0,
                        "length": 0.0,
                        "temporal": 0.15,
                        "advantage": 0.5 - i,
                    }
                )
            for i in range(2):
                rows.append(said | {"frames": "shuffled", "text": wrong if i else right, "frame_order": order})
    write_rows(folder / "rollouts.jsonl", rows)
    config = {
        "records": str(world / "world/rl.json"),
        "data_root": str(world / "world"),
        "max_frames": 8,
        "num_workers": 0,
        "alpha": 0.3,
    }
    (folder / "config.yaml").write_text(json.dumps({"tgrpo": config}))
    return folder


def test_a_page_of_rollouts_needs_only_the_run(rl_run):
    """Guards: completions of two steps in one group; shuffled ones without their order; rewards left out."""
    rollouts.main([str(rl_run / "rollouts.jsonl")])
    questions = questions_in(rl_run / "rollouts.html")
    assert [q["benchmark"] for q in questions] == ["0", "0", "1", "1", "12", "12"]
    assert [q["result"] for q in questions] == [
        "none correct",
        "all correct",
        "some correct",
        "all correct",
        "all correct",
        "all correct",
    ]
    assert [q["helped"] for q in questions] == [-1, 1, -1, 1, 1, 1]
    first = questions[0]
    assert [a["frames"] for a in first["answers"]] == ["ordered"] * 3 + ["shuffled"] * 2
    assert first["answers"][1]["terms"] == {
        "accuracy": 0.0,
        "format": 1.0,
        "length": 0.0,
        "temporal": 0.15,
        "advantage": -0.5,
    }
    assert [a["score"] for a in first["answers"]] == [0, 0, 0, 1, 0] and first["answers"][3]["terms"] == {}
    assert first["frames"] == 8 and first["order"] == [7, 6, 5, 4, 3, 2, 1, 0] and first["problem"]


def test_steps_can_be_chosen_and_wrong_ones_are_said(rl_run, tmp_path):
    """Guards: a page of 7B that shows every hundredth step and never the one that went wrong."""
    rollouts.main([str(rl_run / "rollouts.jsonl"), "--step", "12", "--out", str(tmp_path / "page.html")])
    assert {q["benchmark"] for q in questions_in(tmp_path / "page.html")} == {"12"}
    with pytest.raises(UserError, match="no rollouts of step 5; there are 0 to 12"):
        rollouts.main([str(rl_run / "rollouts.jsonl"), "--step", "5"])


@pytest.mark.parametrize(
    "break_it, line",
    [
        (lambda folder: (folder / "rollouts.jsonl").unlink(), "no such file; a run writes it with save_rollouts: true"),
        (
            lambda folder: (folder / "rollouts.jsonl").write_text('{"step": 1}\n'),
            "line 1: no rollout: problem_id, path, frames, text missing",
        ),
        (lambda folder: (folder / "config.yaml").unlink(), "--records and --data_root must say"),
        (
            lambda folder: (folder / "config.yaml").write_text('tgrpo: {records: "examples/records.json"}'),
            "--records names the run's records",
        ),
    ],
)
def test_what_no_page_can_be_made_of_is_one_line(rl_run, tmp_path, break_it, line):
    """Guards: a traceback, or a page without questions, where a run's file is missing or belongs to another run."""
    for name in ("rollouts.jsonl", "config.yaml"):
        (tmp_path / name).write_text((rl_run / name).read_text())
    break_it(tmp_path)
    with pytest.raises(UserError, match=line) as error:
        rollouts.main([str(tmp_path / "rollouts.jsonl")])
    assert "\n" not in str(error.value) and not (tmp_path / "rollouts.html").exists()


@needs_browser
def test_the_page_of_rollouts_in_a_browser(rl_run):
    """Guards: a step filter that shows the other steps; an advantage that is not on the page; strips in one order."""
    rollouts.main([str(rl_run / "rollouts.jsonl")])
    said = in_browser(
        rl_run / "rollouts.html",
        """
        const out = {title: document.title, cards: cards().length};
        out.steps = [...document.getElementById("benchmark").options].map(o => o.textContent);
        out.kinds = [...document.getElementById("result").options].map(o => o.value);
        set("benchmark", "1"); out.ids = cards().length;
        const card = cards()[0];
        out.marks = [...card.querySelectorAll(".answer span")].map(s => s.textContent);
        out.terms = card.querySelector(".terms").textContent;
        const place = frame => Math.round(-parseFloat(frame.style.backgroundPositionX) / frame.offsetWidth);
        out.places = [...card.querySelectorAll(".strip")].map(strip => [...strip.children].map(place));
        out.head = card.querySelector("header b").textContent;
        out.label = document.getElementById("benchmark").parentNode.textContent.slice(0, 4);
        set("benchmark", ""); set("result", "none correct"); out.none = cards().length;
        return out;""",
    )
    assert said["title"].startswith("Rollouts of ") and said["cards"] == 6 and said["ids"] == 2 and said["none"] == 1
    assert said["steps"] == ["all", "0", "1", "12"] and said["label"] == "step" and said["head"] == "step 1"
    assert said["kinds"] == ["", "all correct", "none correct", "some correct"] and said["marks"] == [
        "right",
        "wrong",
        "wrong",
        "right",
        "wrong",
    ]
    assert said["terms"] == "accuracy 1 · format 1 · length 0 · temporal 0.15 · advantage 0.5"
    assert said["places"] == [list(range(8)), list(range(7, -1, -1))]


# ------------------------------------------------------------------------------------------------- the toy's table


def test_seeds_table_is_mean_and_range(tmp_path):
    """Guards: a number of the README typed by hand; one seed counted twice; a folder without results."""
    for seed, shift in ((0, 0.0), (1, 0.06)):
        scores = {"ordered": 0.6 + shift, "shuffled": 0.5, "gap": 0.1 + shift, "conflict": 0.2}
        summary = {"seed": seed, "sft": scores, "tgrpo": scores}
        (tmp_path / f"{seed}").mkdir()
        (tmp_path / f"{seed}/summary.json").write_text(json.dumps(summary))
    lines = toy_table.seeds_table([tmp_path / "0", tmp_path / "1"]).split("\n")
    cells = [cell.strip() for cell in lines[3].split("|")[1:-1]]
    assert cells == ["T-GRPO", "63.0 (60 to 66)", "50.0 (50 to 50)", "13.0 (10 to 16)", "20.0 (20 to 20)"]
    assert lines[-1] == "mean and range of seeds 0, 1"
    with pytest.raises(UserError, match="seed 0 twice"):
        toy_table.seeds_table([tmp_path / "0", tmp_path / "0"])
    with pytest.raises(UserError, match="no summary.json in"):
        toy_table.seeds_table([tmp_path])


def test_options_without_letters_have_those_of_the_prompt_on_the_page():
    """Guards: "truth: C" beside three options of which none is called C."""
    record = {
        "problem_id": 1,
        "problem": "How many?",
        "problem_type": "multiple choice",
        "options": ["3", "2", "0"],
        "solution": "C",
    }
    rows = [
        {
            "step": 1,
            "problem_id": 1,
            "path": "a.mp4",
            "frames": "ordered",
            "text": "<answer>C</answer>",
            "accuracy": 1.0,
        }
    ]
    assert rollouts.shown_prompt(rows, record)["options"] == ["A. 3", "B. 2", "C. 0"]
