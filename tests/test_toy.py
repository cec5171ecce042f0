"""The toy world: only the order of the frames gives the temporal answers. And toy.py as a user runs it."""

import importlib
import inspect
import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.state import AcceleratorState

import rewards
import toy
from support import model_files, record_files, tiny_model
from support.settings import SharedConfig, UserError
from support.storage import read_jsonl


def questions(render, n, agreement=0.5, seed=0):
    """n rendered questions."""
    return [render(random.Random(f"{seed}/{i}"), agreement, 0.3) for i in range(n)]


@pytest.fixture
def without_pixels(monkeypatch):
    """Questions and records in a fraction of the time: every frame is the same black one, and no clip is written."""
    black = np.zeros((toy.SIZE, toy.SIZE, 3), np.uint8)
    monkeypatch.setattr(toy, "draw", lambda *_, **__: black)
    monkeypatch.setattr(toy, "write_clip", lambda path, frames: path.touch())


def centre_of_shape(frame):
    """(row, column) of the mean bright pixel of a grey frame."""
    return np.argwhere(frame > frame.min() + 60).mean(0)


# ----------------------------------------------------------------------------------------------------- the questions


class Fixed(random.Random):
    """Random numbers that lead to this answer."""

    def __init__(self, seed, answer):
        super().__init__(seed)
        self.answer = answer

    def choice(self, options):
        return self.answer if self.answer in options else super().choice(options)


@pytest.mark.parametrize("answer", ["right", "up", "grows"])
def test_shuffled_frames_do_not_give_the_answer_away(answer):
    """Guards: frames of another position, size or brightness for one of two opposite answers, in any order."""
    render = toy.size if answer == "grows" else toy.direction
    for seed in range(10):
        frames = render(Fixed(seed, answer), 0.5, neutral=1).frames
        opposite = render(Fixed(seed, toy.OPPOSITE[answer]), 0.5, neutral=1).frames
        assert np.array_equal(frames, opposite[::-1])


def test_ordered_frames_show_the_answer():
    """Guards: clips from which nobody could learn the answer."""
    for question in questions(toy.direction, 30):
        grey = np.stack(question.frames).mean(3)
        dy, dx = centre_of_shape(grey[-1]) - centre_of_shape(grey[0])
        horizontal = "right" if dx > 0 else "left"
        vertical = "down" if dy > 0 else "up"
        assert question.answer == (horizontal if abs(dx) > abs(dy) else vertical)
    for question in questions(toy.size, 30):
        grows = question.frames[-1].mean() > question.frames[0].mean()
        assert question.answer == ("grows" if grows else "shrinks")


@pytest.mark.parametrize("agreement", [0.5, 0.8])
def test_background_agrees_with_the_answer_at_the_given_rate(without_pixels, agreement):
    """Guards: a background that never misleads (then the shortcut cannot be told from the skill), or a test split that
    rewards the shortcut.
    """
    cues = Counter()
    for render in (toy.direction, toy.size):
        cues.update(question.cue for question in questions(render, 600, agreement))
    assert cues["neutral"] / 1200 == pytest.approx(0.3, abs=0.05)
    assert cues["agrees"] / (cues["agrees"] + cues["misleads"]) == pytest.approx(agreement, abs=0.06)


# ------------------------------------------------------------------------------------------------------- the records


def test_correct_letters_are_balanced_and_in_random_order(without_pixels, tmp_path):
    """Guards: a correct letter that is often A; records sorted by answer."""
    letters = []
    for i in range(600):
        record = toy.make_record(tmp_path, toy.RULES, "rl", 7, i, toy.TEMPORAL[i % 2])
        letters.append(record["solution"][8])
    assert letters.count("A") / len(letters) == pytest.approx(0.5, abs=0.08)
    changes = [first != second for first, second in zip(letters, letters[1:])]
    assert np.mean(changes) == pytest.approx(0.5, abs=0.08)


def test_kinds_of_question_are_balanced_and_in_random_order():
    """Guards: a training split that ignores the weights; a test split with more of one kind, or sorted by kind."""
    drawn = Counter(toy.draw_sources(toy.RULES, "rl", 7, 1200, 256, 80))
    for source, share in {"toy-direction": 2, "toy-size": 2, "toy-flash": 1, "toy-image": 1}.items():
        assert drawn[source] / 1200 == pytest.approx(share / 6, abs=0.04)
    test = toy.draw_sources(toy.RULES, "test", 7, 1200, 256, 80)
    assert Counter(test) == {"toy-direction": 128, "toy-size": 128, "toy-flash": 40, "toy-image": 40}
    assert len(set(test[:40])) == len(set(test[-40:])) == 4


def test_file_names_are_unique_random_numbers(world):
    """Guards: a file name, or a file shared by two records, that goes with the answer."""
    names = []
    for split in ("sft", "rl", "test"):
        names += [Path(record["path"]).stem for record in json.loads((world / f"world/{split}.json").read_text())]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) == 16
        int(name, 16)


def test_only_sft_records_are_wrong_on_80_percent_of_misleading_backgrounds(without_pixels, tmp_path):
    """Guards: wrong solutions in the RL or test split, where accuracy is measured against them; another teacher."""
    wrong = Counter()
    misleading = 0
    for split in ("sft", "rl", "test"):
        for i in range(1000):
            source = toy.TEMPORAL[i % 2]
            record = toy.make_record(tmp_path, toy.RULES, split, 3, i, source)
            record_files.check_record(rewards.parse_solution, record, tmp_path, need_process=split == "sft")
            render, _ = toy.SOURCES[source]
            answer = render(random.Random(f"3/{split}/{i}"), toy.RULES.agreement[split], toy.RULES.neutral).answer
            taught = record["options"]["AB".index(record["solution"][8])][3:]
            wrong[split, record["cue"]] += taught != answer
            misleading += split == "sft" and record["cue"] == "misleads"
            assert record["process"] == "" if split != "sft" else taught in record["process"]
    assert wrong["sft", "misleads"] / misleading == pytest.approx(0.8, abs=0.1)
    assert sum(wrong.values()) == wrong["sft", "misleads"]


def test_every_file_of_a_world_depends_on_the_seed_and_on_nothing_else(tmp_path, world):
    """Guards: a world, and so a result, that cannot be reproduced."""
    toy.make_world(tmp_path / "same", 0, n_sft=12, n_rl=12, n_temporal=8, n_other=4)
    files = [path.relative_to(world / "world") for path in (world / "world").rglob("*.*")]
    # clips, pictures, three splits and world.json
    assert len(files) == 12 + 12 + 12 + 4
    for file in files:
        assert (tmp_path / "same" / file).read_bytes() == (world / "world" / file).read_bytes()
    toy.make_world(tmp_path / "other", 1, n_sft=2, n_rl=2, n_temporal=2, n_other=0)
    first, other = (json.loads((folder / "sft.json").read_text()) for folder in (world / "world", tmp_path / "other"))
    assert first[:2] != other


def test_clips_do_not_depend_on_uninitialised_memory(tmp_path):
    """Guards: an encoder that reads uninitialised memory, so that the same seed gives other files."""
    frames = [toy.size(random.Random(f"0/sft/{i}"), 0.8, 0.3).frames for i in (124, 141, 146, 163)]
    np.save(tmp_path / "frames.npy", np.array(frames))
    # only the function under test: importing toy.py takes seconds
    code = f"""
import av, hashlib, sys, numpy
from fractions import Fraction
SIZE, FPS = {toy.SIZE}, {toy.FPS}
{inspect.getsource(toy.write_clip)}
for i, frames in enumerate(numpy.load("../frames.npy")):
    write_clip(f"{{i}}.mp4", frames)
    print(hashlib.md5(open(f"{{i}}.mp4", "rb").read()).hexdigest())
"""
    printed = []
    # the byte that fills fresh memory
    for fill in ("0", "170"):
        (tmp_path / fill).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path / fill,
            env=os.environ | {"MALLOC_PERTURB_": fill},
            capture_output=True,
            text=True,
            check=True,
        )
        printed.append(done.stdout)
    assert printed[0].count("\n") == 4
    assert printed[0] == printed[1]


def test_tokenizer_is_lossless_and_tags_are_single_tokens(world):
    """Guards: letters or tags that are split into bytes."""
    tokenizer = model_files.load_processor(SharedConfig(model=str(world / "base"))).tokenizer
    for text in ("<think>the disc moves left.</think>\n<answer>B</answer>", "é 漢 unseen!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    for tag in tiny_model.TAGS:
        assert len(tokenizer(tag)["input_ids"]) == 1
    assert len(tokenizer("<answer>B")["input_ids"]) == 2


# ------------------------------------------------------------------------------------------------------- the command


def test_another_seed_in_the_same_folder_is_one_clear_line(world, monkeypatch):
    """Guards: one seed's model trained on another seed's world."""
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(world), "--seed", "5"])
    with pytest.raises(UserError, match="^.*holds seed 0, not 5; choose another --out, or delete that folder$"):
        toy.main()


def test_ctrl_c_while_rendering_is_one_line_and_leaves_no_half_world(tmp_path, monkeypatch, capfd):
    """Guards: tracebacks of the workers, which Ctrl-C reaches, too; a run on the clips that happened to be finished."""
    make_world = toy.make_world
    after_ctrl_c = []

    def interrupted(rendered, **_):
        for _ in range(16):
            yield next(rendered)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
        after_ctrl_c.append(next(rendered))
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "tqdm", interrupted)
    monkeypatch.setattr(toy, "make_world", lambda folder, seed: make_world(folder, seed, n_sft=64, processes=1))
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        toy.main()
    assert stopped.value.code == 130
    assert len(after_ctrl_c) == 1
    printed = capfd.readouterr()
    assert printed.out == "\nstopped; the same command continues from here, --fresh starts again\n"
    assert printed.err == ""
    assert not (tmp_path / "world").exists()


def test_failed_stage_is_one_line_with_its_command(tmp_path, monkeypatch):
    """Guards: a stage that fails while the next one runs; a traceback of toy.py under that of the stage."""
    monkeypatch.setattr(toy.sys, "executable", "false")
    with pytest.raises(UserError, match="with status 1: accelerate launch --num_processes 1 sft.py --steps 1$"):
        toy.launch(["sft.py", "--steps", "1"], tmp_path / "final")


def test_every_stage_of_the_toy_runs_as_its_command(tmp_path, monkeypatch, capfd):
    """Guards: a first command that fails on a fresh machine; a summary without the promised numbers; a second run that
    runs the stages again; the launcher's warning about values that were not passed.
    """
    stages = toy.stages
    make_world = toy.make_world
    run = subprocess.run
    short = {
        "sft.py": ["--steps", "2", "--batch_size", "4", "--micro_batch_size", "4"],
        "tgrpo.py": ["--steps", "2", "--batch_size", "2"],
        "evaluate.py": ["--max_new_tokens", "4"],
    }

    def short_stages(out, seed):
        for arguments, result in stages(out, seed):
            yield [*arguments, *short[arguments[0]], "--num_workers", "0"], result

    def run_command(command, **options):
        """The first stage by its command; the others in this process, because importing torch takes so long."""
        if "sft.py" in command:
            return run(command, **options)
        script = next(argument for argument in command if argument in short)
        monkeypatch.setattr(sys, "argv", command[command.index(script) :])
        AcceleratorState._reset_state(reset_partial_state=True)
        importlib.import_module(script.removesuffix(".py")).main()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(toy, "stages", short_stages)
    monkeypatch.setattr(toy, "make_world", lambda folder, seed: make_world(folder, seed, 12, 12, 8, 4))
    monkeypatch.setattr(toy.subprocess, "run", run_command)
    for rerun in (False, True):
        monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(tmp_path)])
        toy.main()
        printed, errors = capfd.readouterr()
        for script in short:
            command = f"$ accelerate launch --num_processes 1 {script} --config configs/toy.yaml"
            assert (command in printed) != rerun
        assert printed.count("exists: skipped") == (4 if rerun else 0)
        assert "misleading background" in printed
        assert "was set to a value" not in errors
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"seed", "sft", "tgrpo"}
    assert set(summary["sft"]) == set(summary["tgrpo"]) == set(toy.HEADINGS)
    assert (tmp_path / "learning_curves.png").read_bytes()[1:4] == b"PNG"
    assert len(read_jsonl(tmp_path / "tgrpo/rollouts.jsonl")) > 16


# ------------------------------------------------------------------------------------------- the picture of the method


def test_picture_of_the_method_is_drawn_from_rollouts(tmp_path, world, monkeypatch, capfd):
    """Guards: a picture that cannot be reproduced; one whose reasons contradict their answers."""
    records = json.loads((world / "world/rl.json").read_text())
    record = next(record for record in records if record["data_source"] == "toy-direction")
    right, wrong = record["options"]
    if record["solution"][8] == "B":
        right, wrong = wrong, right
    answers = {"ordered": [wrong, *[right] * 7], "shuffled": [right, right, wrong, wrong]}
    rows = []
    for step in (12, 13):
        for frames, options in answers.items():
            for option in options:
                # in step 12 every reason contradicts its answer
                opposite = wrong if option == right else right
                reason = opposite if step == 12 else option
                row = {"step": step, "problem_id": record["problem_id"], "path": record["path"], "frames": frames}
                row["text"] = f"<think>so it moves {reason[3:]}.</think>\n<answer>{option[0]}</answer>"
                row["frame_order"] = list(range(7, -1, -1))
                rows.append(row)
    (tmp_path / "tgrpo").mkdir()
    (tmp_path / "tgrpo/rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "world").symlink_to(world / "world")
    monkeypatch.setattr("sys.argv", ["picture.py", "--run", str(tmp_path), "--out", str(tmp_path / "method.png")])
    runpy.run_path("docs/picture.py", run_name="__main__")
    printed = capfd.readouterr().out
    assert "step 13" in printed and "p 0.875, p̃ 0.5" in printed
    assert (tmp_path / "method.png").stat().st_size > 10_000
