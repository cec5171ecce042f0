"""tools/: the curves of any run and the table of the toy; each test names the bug it guards."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from support.settings import UserError
from tools import check_data, plot, toy_table


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path, tree):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")


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


def test_panels_follow_the_metrics_of_the_run(tmp_path, monkeypatch):
    """Guards: the meaningless loss of T-GRPO; an empty panel for a metric that the run does not have."""
    figures = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, out: figures.append(figure))
    plain = {name: value for name, value in rl_row(0).items() if name != "temporal/gap"}
    for row in (rl_row(0), plain, {"step": 0, "loss": 1.0}):
        plot.main([str(write_rows(tmp_path / "metrics.jsonl", [row]))])
    titles = [[axis.get_title() for axis in figure.axes] for figure in figures]
    assert [title.split("(")[1] for title in titles[0]] == [
        "reward/total)",
        "temporal/gap)",
        "policy/kl)",
        "completion/length)",
    ]
    assert (len(titles[1]), titles[2]) == (3, ["SFT loss (loss)"])


def test_axes_have_whole_steps_of_the_log_and_no_scale_for_a_flat_line(tmp_path, monkeypatch):
    """Guards: ticks at step 1.2; steps that count from 1, unlike those of the log; a line of zeros between ±0.04."""
    figures = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, out: figures.append(figure))
    rows = [rl_row(i) | {"policy/kl": 0.0} for i in range(2)]
    plot.main([str(write_rows(tmp_path / "metrics.jsonl", rows))])
    reward, gap, kl, length = figures[0].axes
    assert length.lines[0].get_xdata().tolist() == [0, 1]
    assert [tick for tick in length.get_xticks() if 0 <= tick <= 1] == [0, 1]
    assert [axis.get_yticks().tolist() for axis in (reward, gap, kl)] == [[1.0], [0.2], [0.0]]
    assert len(length.get_yticks()) > 3


def test_two_runs_have_two_colours_in_one_picture(tmp_path, colours):
    """Guards: a second file that is ignored or has the first one's colour; a missing metric that stops the plot."""
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
        (None, "metrics.jsonl: no such file, or no row in it"),
        ("", "metrics.jsonl: no such file, or no row in it"),
        ("{\n{\n", "metrics.jsonl: no such file, or no row in it"),
        ('{"loss": 1}\n', "line 1: this row lacks step"),
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


# ------------------------------------------------------------------------------------------------- the toy's table


def test_seeds_table_is_mean_and_range(tmp_path):
    """Guards: a number of the README typed by hand; one seed counted twice; a folder without results; a mean over two
    families, or over settings of training or of evaluation.
    """
    for seed, shift in ((0, 0.0), (1, 0.06)):
        scores = {"ordered": 0.6 + shift, "shuffled": 0.5, "reversed": 0.1 + shift, "conflict": 0.2}
        scores |= {"single": 0.4, "blind": 0.3}
        summary = {"seed": seed, "sft": scores, "tgrpo": scores}
        write_json(tmp_path / f"{seed}/summary.json", summary)
        write_json(tmp_path / f"{seed}/base/config.json", {"model_type": "qwen2_5_vl"})
        for stage in ("sft", "tgrpo"):
            write_json(
                tmp_path / f"{seed}/{stage}/run.json", {"settings": {"seed": seed, "lr": 0.1}, "schedule_steps": 9}
            )
            answered = {"settings": {"seed": seed, "temperature": 0.0, "model": f"{seed}/final"}}
            write_json(tmp_path / f"{seed}/eval/{stage}/summary.json", answered)
    lines = toy_table.seeds_table([tmp_path / "0", tmp_path / "1"]).split("\n")
    cells = [cell.strip() for cell in lines[3].split("|")[1:-1]]
    assert cells[:4] == ["T-GRPO", "63.0 (60.0 to 66.0)", "50.0 (50.0 to 50.0)", "13.0 (10.0 to 16.0)"]
    assert cells[4:] == ["40.0 (40.0 to 40.0)", "30.0 (30.0 to 30.0)", "20.0 (20.0 to 20.0)"]
    assert lines[-1] == "mean and range of seeds 0, 1"
    with pytest.raises(UserError, match="seed 0 twice"):
        toy_table.seeds_table([tmp_path / "0", tmp_path / "0"])
    for name, content, line in (
        ("base/config.json", {"model_type": "qwen3_vl"}, "model_type is 'qwen3_vl'"),
        ("tgrpo/run.json", {"settings": {"lr": 0.2}, "schedule_steps": 9}, "tgrpo/run.json: lr is 0.2"),
        ("sft/run.json", {"settings": {"lr": 0.1}, "schedule_steps": 8}, "sft/run.json: steps is 8"),
        ("eval/sft/summary.json", {"settings": {"temperature": 1.0}}, "eval/sft/summary.json: temperature is 1.0"),
    ):
        before = (tmp_path / "1" / name).read_text()
        write_json(tmp_path / "1" / name, content)
        with pytest.raises(UserError, match=f"1: not made like .*0: {line}$"):
            toy_table.seeds_table([tmp_path / "0", tmp_path / "1"])
        (tmp_path / "1" / name).write_text(before)
    with pytest.raises(UserError, match="no config.json in"):
        toy_table.seeds_table([tmp_path])


@pytest.mark.parametrize("config, stage, records", [("3b", "evaluate", "test"), ("credit", "tgrpo", "rl")])
def test_records_are_checked_with_every_shipped_config(world, monkeypatch, capsys, config, stage, records):
    """Guards: records that are sought in the folder of the config's benchmarks; an experiment's setting refused; a bar
    that ends one clip before its end.
    """
    paths = ["--records", f"{world}/world/{records}.json", "--data_root", f"{world}/world"]
    argv = ["check_data", "--config", f"configs/{config}.yaml", "--stage", stage, "--num_workers", "0", *paths]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as end:
        check_data.main()
    assert end.value.code == 0
    assert re.search(r"reading media: 100%.* (\d+)/\1 ", capsys.readouterr().err)
