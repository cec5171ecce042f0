"""evaluate.py as a user runs it: the benchmarks with rendered media, killed runs, two processes, files that changed."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import time

import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from processes import free_port
from test_benchmarks import ANNOTATIONS, N_QUESTIONS, VIDEOMME, write
from test_data import numbers, write_video

import data
import evaluate
from benchmarks import load_benchmark
from benchmarks.shared import ORDERS
from evaluate import ANSWER_SETTINGS, EvalConfig, by_length
from support import model_files
from support.settings import SharedConfig, UserError
from support.storage import read_jsonl

# Processes fork from a server that has imported everything: three times the imports would be most of the work.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["evaluate", "pytest"])
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "ACCELERATE_USE_CPU": "true"}
N = sum(N_QUESTIONS.values())


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """The annotation files, and the videos that they name (see test_data.write_video)."""
    root = shutil.copytree(ANNOTATIONS, tmp_path_factory.mktemp("media") / "root")
    for name in N_QUESTIONS:
        for record in load_benchmark(name, root):
            path = root / record["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if record["data_type"] == "frame":
                path.mkdir()
                for i in range(12):
                    Image.new("RGB", (56, 56), (10 + 20 * i,) * 3).save(path / f"{i + 1:05}.jpg", quality=95)
            elif not path.exists():
                write_video(path, 12, fps=1)
    return root


def arguments(world, media, output):
    values = {
        "config": "configs/toy.yaml",
        "model": world / "base",
        "root": media,
        "output_dir": output,
        "batch_size": 4,
        "max_new_tokens": 4,
        "num_workers": 0,
    }
    words = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return [*words, "--benchmarks", *N_QUESTIONS]


def in_this_process(words):
    """(stdout, stderr) of evaluate.py, without a second of imports."""
    AcceleratorState._reset_state(reset_partial_state=True)
    out = io.StringIO()
    progress = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *words])
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(progress):
            evaluate.main()
    return out.getvalue(), progress.getvalue()


# of this suite: two may run on one machine
PORT = free_port()


def start(words, log, rank=0, ranks=1):
    """Start evaluate.py in a process of its own: one of `ranks` that work together."""
    environment = dict(ENVIRONMENT)
    if ranks > 1:
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT}
    process = PROCESSES.Process(target=evaluate_there, args=(words, log, environment))
    process.start()
    return process


def evaluate_there(words, log, environment):
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    sys.argv = ["evaluate.py", *words]
    evaluate.main()


@pytest.fixture(scope="module")
def whole(world, media, tmp_path_factory):
    """(output folder, stdout, progress) of one uninterrupted process."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, *in_this_process(arguments(world, media, folder))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


# --------------------------------------------------------------------------------------------- answering the benchmarks


def test_all_benchmarks_in_one_command(whole, media):
    """Guards: a benchmark that evaluate.py cannot read; a score without the settings of its answers."""
    out, said, progress = whole
    rows = read_jsonl(out / "predictions.jsonl")
    summary = json.loads((out / "summary.json").read_text())
    ids = [record["id"] for name in N_QUESTIONS for record in load_benchmark(name, media)]
    assert len(ids) == N
    for order in ORDERS:
        assert [row["id"] for row in rows if row["frames"] == order] == ids
    fields = {"benchmark", "prediction", "solution", "problem_type", "options", "task"}
    assert all(fields <= row.keys() and row["settings"] == summary["settings"] for row in rows)
    settings = {"model", "weights", "max_frames", "max_pixels", "prompt", "temperature", "max_new_tokens", "seed"}
    assert settings <= summary["settings"].keys()
    # MMVU's open question is not scored
    assert {name: summary[name]["n"] for name in N_QUESTIONS} == N_QUESTIONS | {"mmvu": 1}
    assert summary["mmvu"]["unscored"] == ["validation_1"] and summary["timeblind"]["instances"] == 1
    assert (summary["mvbench"]["clipped"], summary["tvbench"]["clipped"]) == (2, 1)
    for name in N_QUESTIONS:
        assert {"score", "se", "answered", "unparsed", "lenient", "truncated", "by_task"} <= summary[name].keys()
        assert list(summary[name]["orders"]) == list(ORDERS[1:])
        # in the tables of scores, of answers and of orders
        assert said.count(f"\n| {name} ") == 3
    assert "(published" in said and "95 % interval" in said
    assert re.search(rf" {N}(\.0)?/{N}(\.0)? \[", progress) and "question/s" in progress


def test_an_evaluation_that_cannot_start_leaves_the_answers(run, monkeypatch):
    """Guards: predictions.jsonl, and which media could not be read, gone at a second start on a full GPU."""
    out = run("evaluate", orders="ordered")
    before = files(out)
    monkeypatch.setattr(evaluate.policy, "load_policy", None)
    with pytest.raises(TypeError):
        run("evaluate", orders="ordered")
    assert "predictions.jsonl" in before and files(out) == before


def test_two_processes_continue_a_killed_one_to_the_same_files(world, media, whole, tmp_path):
    """Guards: questions that are answered twice or never; a resumed run that averages only the new answers."""
    folder = tmp_path / "killed"
    words = arguments(world, media, folder)
    killed = start(words, tmp_path / "killed.log")
    while not read_jsonl(folder / "predictions.0.jsonl"):
        assert killed.is_alive(), (tmp_path / "killed.log").read_text()
        time.sleep(0.005)
    killed.kill()
    killed.join()
    assert len(read_jsonl(folder / "predictions.0.jsonl")) < 5 * N and not (folder / "summary.json").exists()
    # as in configs/7b.yaml: no weights are sharded
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = [start([*words, "--fsdp", "full_shard"], logs[rank], rank, 2) for rank in range(2)]
    for process in ranks:
        process.join(timeout=600)
    assert [process.exitcode for process in ranks] == [0, 0], [log.read_text()[-3000:] for log in logs]
    assert "questions were answered before" in logs[0].read_text()
    assert files(folder) == files(whole[0])


def test_one_process_continues_the_files_of_two(world, media, whole, tmp_path):
    """Guards: rows of the other process that are lost; a question whose last rows were cut off and never repeated."""
    lines = (whole[0] / "predictions.jsonl").read_text().splitlines(keepends=True)
    folder = tmp_path / "out"
    # of the seventh question two rows are missing, and one is cut off
    folder.mkdir()
    (folder / "predictions.0.jsonl").write_text("".join(lines[:32]) + lines[32][:40])
    (folder / "predictions.1.jsonl").write_text("".join(lines[40:]))
    said, progress = in_this_process(arguments(world, media, folder))
    assert f"{N - 2} of {N} questions were answered before" in said and " 2.00/2.00 [" in progress
    assert files(folder) == files(whole[0])


def test_missing_media_are_listed_counted_and_asked_in_a_later_run(media, tmp_path, run, capsys):
    """Guards: a score over fewer questions without a message; media that are downloaded later and never asked."""
    root = tmp_path / "root"
    write(root / "videomme/test.jsonl", VIDEOMME)
    for name in ("yt1.mp4", "yt2.mp4"):
        shutil.copy(media / "videomme/data" / name, tmp_path / name)
    (root / "videomme/data").mkdir()
    (tmp_path / "yt2.mp4").rename(root / "videomme/data/yt2.mp4")

    def again():
        out = run("evaluate", benchmarks="videomme", root=root, batch_size=2, max_new_tokens=4)
        part = json.loads((out / "summary.json").read_text())["videomme"]
        return out, (part["n"], part["unusable"]), capsys.readouterr().out

    _, counts, said = again()
    assert counts == (1, ["001-1"]) and "1 unusable, not in n" in said
    assert "1 of 2 questions cannot be asked; these files are missing:\nvideomme/data/yt1.mp4\n" in said
    assert re.search(r"\| videomme +\| +1 \|.*\| +1 \|\n", said)
    (tmp_path / "yt1.mp4").rename(root / "videomme/data/yt1.mp4")
    out, counts, said = again()
    assert counts == (2, []) and "cannot be asked" not in said
    # the same settings, other questions
    write(root / "videomme/test.jsonl", VIDEOMME[::-1])
    with pytest.raises(UserError, match="answers to other questions"):
        again()
    (out / "predictions.jsonl").write_text('{"benchmark": "mine", "id": 1}\n')
    with pytest.raises(UserError, match="no answers of this evaluation"):
        again()


def test_clipped_videos_frame_folders_and_question_images_are_shown_correctly(media, world):
    """Guards: the whole video instead of its part; stills without their 3 fps; a missing question image."""

    def see(record, **values):
        return data.load_media(record, SharedConfig(data_root=str(media), **values))

    # 1.5 to 9 s of 12 frames, one per second
    sequence, _, stills = load_benchmark("mvbench", media)
    frames, times = see(sequence, max_frames=4)
    # on display at 2.44, 4.31, 6.19 and 8.06 s
    assert numbers(frames) == [2, 4, 6, 8]
    assert times.sampled_fps == pytest.approx(4 / 7.5)
    assert numbers(see(load_benchmark("mvbench", media, clip_segments=False)[0], max_frames=4)[0]) == [1, 4, 7, 10]
    # 0 to 4 s at 3 per second: the first twelve stills
    frames, times = see(stills, max_frames=16)
    assert numbers(frames) == list(range(12)) and times.sampled_fps == 3
    adaptation = next(record for record in load_benchmark("videommmu", media) if record["task"] == "Adaptation")
    # the last frame is the question's image
    assert numbers(see(adaptation, max_frames=3)[0]) == [2, 6, 11]
    Image.new("RGB", (200, 100), (250, 0, 0)).save(media / "image.png")
    frames, times = see(adaptation | {"image_path": "image.png", "last_frame": False}, max_frames=4)
    assert len(frames) == 4 and frames[-1, 28, 28].tolist() == [250, 0, 0]
    assert times.frames_indices == sorted(times.frames_indices)
    pixels = {"min_pixels": 784, "max_pixels": 3136}
    cfg = SharedConfig(model=str(world / "base"), data_root=str(media), max_frames=4, prompt="{problem}", **pixels)
    questions = [{**adaptation, "id": i} for i in range(6)]
    samples = data.Samples(questions, model_files.load_processor(cfg), cfg, ("shuffled",), in_file_order=True)
    # shuffling leaves it at the end
    for i in range(6):
        assert samples[i].frame_order[-1] == 3 and samples[i].frame_order[:3] != [0, 1, 2]


def test_questions_of_one_length_are_asked_together(run, world, tmp_path):
    """Guards: a batch padded to one long question; answers that depend on which questions share a batch."""
    records = json.loads((world / "world/test.json").read_text())[:8]
    for record in records[::2]:
        record["problem"] += " in this picture or clip" * 20
    write(tmp_path / "mixed.json", records)
    values = dict(records=tmp_path / "mixed.json", orders="ordered", max_new_tokens=12)
    rows = read_jsonl(run("evaluate", "grouped", batch_size=4, **values) / "predictions.jsonl")
    assert [row["index"] for row in rows] == list(range(len(records)))
    lengths = [len(rows[i]["problem"]) > 400 for i in by_length(rows) if rows[i]["data_type"] == "video"]
    assert lengths == sorted(lengths) and len(set(lengths)) == 2
    alone = read_jsonl(run("evaluate", "alone", batch_size=1, **values) / "predictions.jsonl")
    assert [row["prediction"] for row in alone] == [row["prediction"] for row in rows]


# ------------------------------------------------------------------------------------------------------------- settings


def test_answers_name_every_setting_that_they_depend_on():
    """Guards: a new setting that may change when an evaluation is resumed, so that its answers are mixed."""
    no_effect = {"output_dir", "root", "max_unreadable", "num_workers", "fsdp", "gradient_checkpointing"}
    assert {field.name for field in dataclasses.fields(EvalConfig)} == no_effect | set(ANSWER_SETTINGS)


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


@pytest.mark.parametrize(
    "words, message",
    [
        ("--benchmarks activitynet --root .", "expected one of vsibench"),
        ("--benchmarks mvbench", "root: missing"),
        ("--model m --output_dir o --benchmarks mvbench --root /nowhere", "looked for json/"),
        ("--model m --output_dir o", "records: missing"),
    ],
)
def test_incomplete_commands_are_one_clear_error(monkeypatch, words, message):
    """Guards: a traceback if a setting is missing."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words.split()])
    with pytest.raises(UserError, match=message):
        evaluate.main()


def test_ctrl_c_of_an_evaluation_is_one_line(monkeypatch, run):
    """Guards: a traceback through torch, after which nobody knows whether answers were lost."""

    def interrupted(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "answer", interrupted)
    with pytest.raises(UserError, match="^stopped; the same command continues"):
        run("evaluate")
