"""evaluate.py as a user runs it: all benchmarks with rendered media, killed runs, two processes, saved answers, bad
files.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_benchmarks import (
    HOLMES,
    MMVU,
    MVBENCH,
    TEMPCOMPASS,
    TIMEBLIND,
    TOMATO,
    TVBENCH,
    VIDEOMME,
    VIDEOMMMU,
    VSI,
    row,
    write,
)
from test_data import numbers, write_video
from test_sharded import QUIET, ROOT

import benchmarks
import data
import evaluate
from benchmarks import NAMES, ORDERS, load_benchmark
from evaluate import EvalConfig, by_length, clustered_mean, summarise
from support import model_files
from support.settings import SharedConfig, UserError
from support.storage import read_jsonl

# in the annotation files of make_six
N_QUESTIONS = 30
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29657"]


def make_six(root):
    """The annotation files of all benchmarks, and the videos that they name (see test_data.write_video)."""
    write(root / "vsibench/test.jsonl", VSI)
    write(root / "vsibench/test_debiased.jsonl", VSI)
    for task, rows in TVBENCH.items():
        write(root / f"tvbench/json/{task}.json", rows)
    for task, table in TOMATO.items():
        write(root / f"tomato/data/{task}.json", table)
    write(root / "timeblind/data.jsonl", TIMEBLIND)
    write(root / "videoholmes/test_Video-Holmes.json", HOLMES)
    for task, rows in MVBENCH.items():
        write(root / f"mvbench/json/{task}.json", rows)
    for form, table in TEMPCOMPASS.items():
        write(root / f"tempcompass/questions/{form}.json", table)
    for track, table in VIDEOMMMU.items():
        write(root / f"videommmu/data/{track}_video.json", table)
    write(root / "mmvu/validation.json", MMVU)
    write(root / "videomme/test.jsonl", VIDEOMME)
    (root / "videommmu/question_only").mkdir(parents=True)
    for record in (r for name in NAMES for r in load_benchmark(name, root)):
        path = root / record["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        if record["data_type"] == "frame":
            path.mkdir()
            for i in range(12):
                Image.new("RGB", (56, 56), (10 + 20 * i,) * 3).save(path / f"{i + 1:05}.jpg", quality=95)
        elif not path.exists():
            write_video(path, 12, fps=1)
    return root


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    return make_six(tmp_path_factory.mktemp("six"))


def command(world, root, output, *launcher):
    return [
        str(x)
        for x in (
            *(launcher or [sys.executable]),
            "evaluate.py",
            "--config",
            "configs/toy.yaml",
            "--model",
            world / "base",
            "--benchmarks",
            *NAMES,
            "--root",
            root,
            "--output_dir",
            output,
            "--batch_size",
            4,
            "--max_new_tokens",
            4,
            "--num_workers",
            0,
        )
    ]


def finish(arguments):
    done = subprocess.run(arguments, cwd=ROOT, env=QUIET, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def whole(world, six, tmp_path_factory):
    """(output folder, stdout, stderr) of one uninterrupted process."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, *finish(command(world, six, folder))


def files(folder):
    return {p.name: p.read_bytes() for p in folder.glob("[!.]*")}


# ------------------------------------------------------------------------------------------------ answering all six


def test_six_benchmarks_in_one_command(whole, six):
    """Guards: a benchmark that evaluate.py cannot read; a score without the settings of its answers."""
    out, said, progress = whole
    rows = read_jsonl(out / "predictions.jsonl")
    summary = json.loads((out / "summary.json").read_text())
    records = [r for name in NAMES for r in load_benchmark(name, six)]
    assert len(records) == N_QUESTIONS
    for order in ORDERS:
        assert [r["id"] for r in rows if r["frames"] == order] == [r["id"] for r in records]
    assert {
        "benchmark",
        "id",
        "prediction",
        "solution",
        "problem_type",
        "options",
        "task",
        "settings",
    } <= set.intersection(*map(set, rows))
    assert all(r["settings"] == summary["settings"] for r in rows)
    assert {
        "model",
        "max_frames",
        "max_pixels",
        "prompt",
        "temperature",
        "max_new_tokens",
        "seed",
        "clip_segments",
    } <= summary["settings"].keys()
    assert {name: summary[name]["n"] for name in NAMES} == {
        "vsibench": 2,
        "videommmu": 4,
        "mvbench": 3,
        "tempcompass": 5,
        "mmvu": 1,
        "videomme": 2,
        "tvbench": 2,
        "tomato": 1,
        "timeblind": 4,
        "vsibench_debiased": 2,
        "videoholmes": 1,
    }
    assert (
        summary["mmvu"]["unscored"] == ["validation_1"]
        and "delta_knowledge" in summary["videommmu"]
        and summary["mvbench"]["clipped"] == 2
        and summary["tvbench"]["clipped"] == 1
        and summary["timeblind"]["instances"] == 1
    )
    for name in NAMES:
        assert {"score", "se", "n", "answered", "unparsed", "lenient", "truncated", "by_task"} <= summary[name].keys()
        assert list(summary[name]["orders"]) == list(ORDERS[1:])
        # in the tables of scores, of answers and of orders
        assert said.count(f"\n| {name} ") == 3
    assert "(published" in said and "95 % interval" in said
    assert (
        f"{N_QUESTIONS}/{N_QUESTIONS} [" in progress.replace(".0/", "/").replace(".0 ", " ")
        and "question/s" in progress
        and "<" in progress.split("question/s")[0]
    )


def test_two_processes_and_a_killed_run_give_the_same_files(world, six, whole, tmp_path):
    """Guards: questions that are answered twice or never; a resumed run that averages only the new answers."""
    finish(
        [*command(world, six, tmp_path / "two", *TORCHRUN), "--fsdp", "full_shard"]
        # as in configs/7b.yaml: no weights are sharded
    )
    assert files(tmp_path / "two") == files(whole[0])
    killed = tmp_path / "killed"
    run = subprocess.Popen(
        command(world, six, killed, *TORCHRUN),
        cwd=ROOT,
        env=QUIET,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answered():
        return sum(len(read_jsonl(p)) for p in killed.glob("predictions.?.jsonl"))

    while not answered():
        assert run.poll() is None
        time.sleep(0.005)
    for pid in (
        run.pid,
        *map(int, Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()),
        # the launcher first
    ):
        os.kill(pid, signal.SIGKILL)
    run.wait()
    before = answered()
    assert 0 < before < 5 * N_QUESTIONS and not (killed / "summary.json").exists()
    # a line that the kill cut off
    with open(next(killed.glob("predictions.?.jsonl")), "a") as file:
        file.write('{"benchmark": "vsi')
    # one process continues the work of two
    _, progress = finish(command(world, six, killed))
    assert files(killed) == files(whole[0])
    # it only answers what was missing
    assert f"{N_QUESTIONS}/{N_QUESTIONS} [" not in progress.replace(".0/", "/").replace(".0 ", " ")


def test_missing_media_are_listed_counted_and_asked_in_a_later_run(world, tmp_path, run, capsys):
    """Guards: a score over fewer questions without a message; media that are downloaded later and never asked."""
    root = make_six(tmp_path / "six")
    (root / "videomme/data/yt1.mp4").rename(tmp_path / "yt1.mp4")

    def again():
        return run("evaluate", benchmarks="videomme", root=root, batch_size=2)

    summary = json.loads((again() / "summary.json").read_text())
    said = capsys.readouterr().out
    assert (
        "1 of 2 questions cannot be asked; these files are missing:\nvideomme/data/yt1.mp4\n" in said
        and "1 unusable, not in n" in said
        and re.search(r"\| videomme +\| +1 \|.*\| +1 \|\n", said)
    )
    assert (summary["videomme"]["n"], summary["videomme"]["unusable"]) == (1, ["001-1"])
    (tmp_path / "yt1.mp4").rename(root / "videomme/data/yt1.mp4")
    out = again()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["videomme"]["n"], summary["videomme"]["unusable"]) == (
        2,
        [],
    ) and "cannot be asked" not in capsys.readouterr().out
    # the same settings, other questions
    write(root / "videomme/test.jsonl", VIDEOMME[::-1])
    with pytest.raises(UserError, match="answers to other questions"):
        again()
    for text in ('{"benchmark": "mine", "id": 1}\n', "{nope\n", "3\n"):
        (out / "predictions.jsonl").write_text(text)
        with pytest.raises(UserError, match="has no answers of this evaluation"):
            again()


def test_records_that_cannot_be_scored_are_an_error_before_answering(run, world, tmp_path):
    """Guards: hours of answers to a file named vsibench.json that cannot be scored."""
    (tmp_path / "vsibench.json").write_bytes((world / "world/test.json").read_bytes())
    with pytest.raises(UserError, match="row 1: task: expected one of"):
        run("evaluate", records=tmp_path / "vsibench.json")


def test_clipped_videos_frame_folders_and_question_images_are_shown_correctly(six, world):
    """Guards: the whole video instead of its part; stills without their 3 fps; a missing question image."""

    def see(record, **values):
        return data.load_media(record, SharedConfig(data_root=str(six), **values))

    # 1.5 to 9 s of 12 frames, one per second
    sequence, _, stills = load_benchmark("mvbench", six)
    frames, times = see(sequence, max_frames=4)
    # on display at 2.44, 4.31, 6.19 and 8.06 s
    assert numbers(frames) == [2, 4, 6, 8]
    assert times.sampled_fps == pytest.approx(4 / 7.5)
    assert numbers(see(load_benchmark("mvbench", six, clip_segments=False)[0], max_frames=4)[0]) == [1, 4, 7, 10]
    frames, times = see(stills, max_frames=16)
    assert (
        numbers(frames) == list(range(12)) and times.sampled_fps == 3
        # 0 to 4 s at 3 per second: the first twelve stills
    )
    adaptation = next(r for r in load_benchmark("videommmu", six) if r["task"] == "Adaptation")
    # the last frame is the question's image
    assert numbers(see(adaptation, max_frames=3)[0]) == [2, 6, 11]
    Image.new("RGB", (200, 100), (250, 0, 0)).save(six / "image.png")
    frames, times = see({**adaptation, "image_path": "image.png"} | {"last_frame": False}, max_frames=4)
    assert (
        len(frames) == 4
        and frames[-1, 28, 28].tolist() == [250, 0, 0]
        and times.frames_indices == sorted(times.frames_indices)
    )
    cfg = SharedConfig(
        model=str(world / "base"), data_root=str(six), max_frames=4, prompt="{problem}", min_pixels=784, max_pixels=3136
    )
    orders = [
        data.Samples(
            [{**adaptation, "id": i} for i in range(6)],
            model_files.load_processor(cfg),
            cfg,
            ("shuffled",),
            shuffle=False,
        )[i].frame_order
        for i in range(6)
    ]
    # shuffling leaves it at the end
    assert all(order[-1] == 3 and order[:3] != [0, 1, 2] for order in orders)


# -------------------------------------------------------------------------------------------------- the temporal gap


def both_orders(benchmark, marks, **extra):
    """Rows of {(task, clip): (right in order, right shuffled)}, one a question, letters: B is right."""
    return [
        row(benchmark, "B" if right else "A", "B", task=task, row_id=f"{task}/{i}", path=clip, frames=order, **extra)
        for i, ((task, clip), pair) in enumerate(marks.items())
        for order, right in zip(("ordered", "shuffled"), pair)
    ]


def test_difference_between_orders_computed_by_hand():
    """Guards: accuracies of different questions that are subtracted; open answers and stills that are counted."""
    rows = both_orders(
        "mvbench", {("order", "a"): (1, 0), ("order", "b"): (1, 0), ("colour", "c"): (1, 1), ("colour", "d"): (0, 0)}
    )
    rows += [
        row("mvbench", "A", "B", task="order", row_id="alone", frames="ordered")
        # shown in order only: not in the pair
    ]
    part = summarise(rows)["mvbench"]
    shuffled = part["orders"]["shuffled"]
    assert (part["score"], part["n"], shuffled["score"], part["frames"]) == (60, 5, 25, "ordered")
    difference = shuffled["difference"]
    assert (difference["mean"], difference["n"], difference["clips"]) == (-50, 4, 4)
    # each clip deviates by ± 50 from the mean: the standard error is sqrt(4 / 3 · 4 · 50² / 4²)
    assert difference["low"] == pytest.approx(-50 - 1.96 * 28.8675, abs=1e-3)
    assert difference["high"] == pytest.approx(-50 + 1.96 * 28.8675, abs=1e-3)
    assert difference["by_task"]["order"] == {"mean": -100, "low": -100, "high": -100, "n": 2, "clips": 2}
    assert difference["by_task"]["colour"]["mean"] == 0
    open_ended = [
        row("mmvu", "heat", "heat", "free-form", "Physics", "o", frames=order) for order in ("ordered", "shuffled")
    ]
    stills = both_orders("videommmu", {("question_only", "q"): (1, 0)})
    summary = summarise(open_ended + stills)
    for name in ("mmvu", "videommmu"):
        assert summary[name]["orders"]["shuffled"]["difference"] is None


def test_the_interval_of_the_gap_is_paired_and_clustered_by_clip():
    """Guards: an interval for independent samples (too wide), or for independent questions on one clip (too narrow)."""
    rng = np.random.default_rng(0)
    differences = rng.choice([-1.0, 0.0, 0.0, 1.0], size=400)
    alone = clustered_mean(differences, range(400))
    assert alone["high"] - alone["low"] == pytest.approx(2 * 1.96 * differences.std() / 20, rel=0.01)
    # four questions on a clip that all have the same answer are worth one
    fours = clustered_mean(np.repeat(differences, 4), np.repeat(np.arange(400), 4))
    assert fours["high"] - fours["low"] == pytest.approx(alone["high"] - alone["low"], rel=1e-6)
    assert alone["low"] < alone["mean"] < alone["high"]
    # of independent samples, and of clips drawn again (bootstrap)
    rng = np.random.default_rng(1)
    drawn = [differences[rng.integers(400, size=400)].mean() for _ in range(2000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert alone["low"] == pytest.approx(low, abs=0.02) and alone["high"] == pytest.approx(high, abs=0.02)


def test_scores_of_shuffled_frames_are_labelled(tmp_path):
    """Guards: a score of shuffled frames without a label, or one that is lost beside another benchmark."""
    rows = both_orders("mvbench", {("t", "a"): (1, 0)}) + [row("mine", "B", "B", frames="shuffled")]
    summary = summarise(rows)
    assert summary["mine"]["frames"] == "shuffled" and summary["mine"]["score"] == 100 and not summary["mine"]["orders"]
    # a question whose media are missing was not asked in order either
    gone = {**row("mine", "", "B", row_id="gone"), "error": "no file"}
    del gone["prediction"]
    part = summarise(rows + [gone])["mine"]
    assert (part["frames"], part["n"], part["unusable"], part["orders"]) == ("shuffled", 1, ["gone"], {})


@pytest.mark.parametrize(
    "name, now", [("shuffle_frames", "--orders shuffled"), ("temporal_gap", "--orders ordered sh")]
)
def test_settings_of_older_versions_say_what_to_write_now(tmp_path, monkeypatch, name, now):
    """Guards: "no such setting" for a config that worked last week."""
    (tmp_path / "old.yaml").write_text(f"evaluate:\n  {name}: true\n")
    for arguments in (["--config", tmp_path / "old.yaml"], [f"--{name}"], [f"--{name}", "true"], [f"--{name}=true"]):
        with pytest.raises(UserError, match=f"{name} is now {now}") as error:
            score(monkeypatch, *arguments)
        assert "\n" not in str(error.value)


def test_root_is_the_folder_of_media_only_for_benchmarks():
    """Guards: own records whose clips are looked for in the benchmarks' folder, because the config has `root` too."""
    own = EvalConfig(records="mine.json", data_root="mine", root="benchmarks")
    assert own.data_root == "mine"
    assert EvalConfig(benchmarks=["mvbench"], data_root="mine", root="benchmarks").data_root == "benchmarks"


def test_orders_are_asked_once_and_in_one_order():
    """Guards: a column that appears twice; rows whose first order depends on how a user wrote the list."""
    assert EvalConfig(orders=["blind", "ordered", "blind"]).orders == ["ordered", "blind"]
    with pytest.raises(UserError, match="orders: empty; choose from ordered, shuffled, reversed, single, blind"):
        EvalConfig(orders=[])


def test_answers_are_counted_as_cut_off_and_as_read_leniently(capsys):
    """Guards: a score that hides that half of the answers were cut off, or that other harnesses could not read them."""
    texts = {
        "strict": "<think>x</think><answer>B</answer>",
        "bracket": "<answer>(B)</answer>",
        "bare": "B",
        "unread": "<answer>A or B</answer>",
    }
    rows = [row("mvbench", text, "B", row_id=name, truncated=name == "bare") for name, text in texts.items()]
    rows.append(row("mvbench", None, "B", row_id="gone", error="no file"))
    del rows[-1]["prediction"]
    part = summarise(rows)["mvbench"]
    assert (part["score"], part["lenient"], part["unparsed"], part["truncated"]) == (75, 0.5, 0.25, 0.25)
    evaluate.print_table({"mvbench": part})
    assert re.search(r"\| mvbench +\| +4 \| +25.0% +\| +50.0% \| +25.0% \| +1 \|", capsys.readouterr().out)
    numbers = {"4.0": False, "4": False, "<answer>4.5</answer>": True, "<answer>4 m</answer>": False}
    for text, is_strict in numbers.items():
        assert benchmarks.is_strict(row("mine", text, "4", "numerical")) == is_strict


def test_questions_of_one_length_are_asked_together(run, world, tmp_path):
    """Guards: a batch padded to one long question; answers that depend on which questions share a batch."""
    records = json.loads((world / "world/test.json").read_text())
    for number, record in enumerate(records):
        if number % 2:
            record["problem"] += " in this picture or clip" * 20
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    settings = dict(records=tmp_path / "mixed.json", orders="ordered", batch_size=4, max_new_tokens=12)
    rows = read_jsonl(run("evaluate", "grouped", **settings) / "predictions.jsonl")
    assert [row["index"] for row in rows] == list(range(len(records)))
    order = by_length(rows)
    lengths = [len(rows[i]["problem"]) > 400 for i in order if rows[i]["data_type"] == "video"]
    assert lengths == sorted(lengths)
    alone = read_jsonl(run("evaluate", "alone", **settings | {"batch_size": 1}) / "predictions.jsonl")
    assert [row["prediction"] for row in alone] == [row["prediction"] for row in rows]


# ------------------------------------------------------------------------------------------------------ saved answers


def score(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


def test_scoring_loads_no_torch(tmp_path):
    """Guards: slow imports before a second of work."""
    file = tmp_path / "predictions.jsonl"
    write(file, [row("mvbench", "<think>x</think><answer>B</answer>", "B", row_id=i) for i in range(3000)])
    program = (
        f"import sys, evaluate; sys.argv = ['evaluate.py', '--score', {str(file)!r}]; evaluate.main(); "
        "heavy = {'torch', 'transformers', 'decord', 'PIL', 'accelerate'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["mvbench"]["score"] == 100 and summary["mvbench"]["n"] == 3000


def test_bare_answers_are_joined_with_the_official_files(six, tmp_path, monkeypatch, capsys):
    """Guards: a join by position; other scores than for rows that have their solutions."""
    full = [
        {**r, "prediction": r["solution"] if i % 2 else "A"}
        for name in NAMES
        for i, r in enumerate(load_benchmark(name, six))
    ]
    bare = [{k: r[k] for k in ("benchmark", "id", "prediction")} for r in reversed(full)]
    for name, rows in (("full", full), ("bare", bare)):
        write(tmp_path / name / "predictions.jsonl", rows)
        score(
            monkeypatch,
            "--score",
            tmp_path / name / "predictions.jsonl",
            *(["--annotations", six] if name == "bare" else []),
        )
    a, b = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("full", "bare"))
    assert (
        a == {**b, "mmvu": a["mmvu"]}
        and len(a) == len(NAMES)
        and capsys.readouterr().out.count("published scores:") == 2
    )
    joined = [{**r, "solution": "", "options": None} for r in full]
    write(tmp_path / "nulls/predictions.jsonl", joined)
    score(monkeypatch, "--score", tmp_path / "nulls/predictions.jsonl", "--annotations", six)
    assert json.loads((tmp_path / "nulls/summary.json").read_text()) == a


GOOD = row("mvbench", "B", "B", row_id="x")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no records in this file"),
        (b"\xe9\xff\n", "not UTF-8"),
        ('{"a": 1}\n{nope\n', "line 2: not JSON"),
        ("[" * 100_000, "not JSON"),
        ([GOOD, GOOD], "row 2: mvbench 'x' is used twice, first in row 1"),
        ([3, None, ["x"], "y"], "4 of 4 predictions are bad"),
        ([{**GOOD, "benchmark": ["a"]}], "benchmark: expected text"),
        ([{**GOOD, "task": 3}], "task: expected text, got 3"),
        ([{**GOOD, "task": {"a": 1}}], "task: expected text"),
        ([{**GOOD, "prediction": {"a": 1}}], "prediction: expected text"),
        ([{**GOOD, "options": 5}], "options: expected a list"),
        ([{**GOOD, "frames": "sideways"}], "frames: expected one of ordered, shuffled, reversed, single, blind"),
        ([{**GOOD, "problem_type": "maths"}], "no problem type 'maths'"),
        ([{**GOOD, "solution": 4}], "solution: expected text"),
        ([{"benchmark": "mvbench", "id": 1, "prediction": "B"}], "join the official files with --annotations"),
        ([{k: v for k, v in GOOD.items() if k != "id"}], "id: missing"),
        ([{**GOOD, "path": 7}], "path: expected text"),
        (
            [{**GOOD, "frames": "ordered"}, {**GOOD, "frames": "shuffled"}, {**GOOD, "frames": "shuffled"}],
            "row 3: mvbench 'x' is used twice",
        ),
    ],
)
def test_bad_prediction_files_are_one_clear_error(tmp_path, monkeypatch, content, message):
    """Guards: a traceback; a row that is silently dropped or counted twice; wrong row numbers."""
    file = tmp_path / "predictions.jsonl"
    file.write_bytes(
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else "".join(json.dumps(r) + "\n" for r in content)).encode()
    )
    with pytest.raises(UserError) as error:
        score(monkeypatch, "--score", file)
    assert message in str(error.value) and not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--score", "nowhere.jsonl"], "nowhere.jsonl: cannot read"),
        (["--benchmarks", "activitynet", "--root", "."], "expected one of vsibench"),
        (["--benchmarks", "mvbench"], "root: missing"),
        (["--annotations", "."], "only goes with --score"),
        (["--model", "m", "--output_dir", "o", "--benchmarks", "mvbench", "--root", "/nowhere"], "looked for json/"),
        (["--model", "m", "--output_dir", "o"], "records: missing"),
    ],
)
def test_incomplete_commands_are_one_clear_error(monkeypatch, arguments, message):
    """Guards: a traceback if a setting is missing."""
    with pytest.raises(UserError, match=message):
        score(monkeypatch, *arguments)


def test_bare_rows_of_an_unknown_benchmark_are_an_error(tmp_path, monkeypatch):
    """Guards: a traceback, or a search in the files of another benchmark."""
    write(tmp_path / "predictions.jsonl", [{"benchmark": "mine", "id": 1, "prediction": "B"}, {"id": 2}])
    with pytest.raises(UserError, match="no benchmark None, mine: vsibench"):
        score(monkeypatch, "--score", tmp_path / "predictions.jsonl", "--annotations", tmp_path)


def test_knowledge_gain_has_a_standard_error():
    """Guards: a gain of 20 % without its error of 60."""
    rows = [
        row("videommmu", "B" if right else "A", "B", task=task, row_id=f"{task}/{i}")
        for task, marks in (("Adaptation", [1, 1, 0, 0]), ("question_only", [1, 0, 0, 0]))
        for i, right in enumerate(marks)
    ]
    # after 50 ± 28.87, before 25 ± 25
    part = summarise(rows)["videommmu"]
    assert part["delta_knowledge"] == pytest.approx(100 * 25 / 75)
    assert part["se_delta_knowledge"] == pytest.approx(100 / 75 * math.hypot(28.8675, 25 * 50 / 75), abs=1e-3)


def test_the_report_setting_names_the_new_command(monkeypatch):
    """Guards: a command of an older version that ends in argparse's usage."""
    with pytest.raises(UserError, match="--report is now a command of its own: python -m tools.report PREDICTIONS"):
        score(monkeypatch, "--score", "predictions.jsonl", "--report", "page.html")
