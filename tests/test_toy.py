"""The toy world: only the order of the frames gives the temporal answers. And toy.py as a user runs it."""

import inspect
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import toy
from benchmarks.shared import ORDERS
from support import model_files, record_files
from support.settings import SharedConfig, UserError
from support.storage import read_jsonl

ROOT = Path(__file__).parent.parent


def questions(render, n, agreement=0.5, seed=0):
    """n rendered questions."""
    return [render(random.Random(f"{seed}/{i}"), agreement, 0.3) for i in range(n)]


@pytest.fixture
def without_pixels(monkeypatch):
    """Questions in a fraction of the time: every frame is the same black one."""
    black = np.zeros((toy.SIZE, toy.SIZE, 3), np.uint8)
    monkeypatch.setattr(toy, "draw", lambda *_, **__: black)


def centre_of_shape(frame):
    """(row, column) of the mean bright pixel of a grey frame."""
    return np.argwhere(frame > frame.min() + 60).mean(0)


# ----------------------------------------------------------------------------------------------------- the questions


@pytest.mark.parametrize("render", [toy.direction, toy.size])
def test_shuffled_frames_do_not_give_the_answer_away(render):
    """Guards: position, size or brightness statistics that differ between opposite answers, in any order of frames."""
    groups = {}
    for question in questions(render, 400):
        grey = np.stack(question.frames).mean(3)
        centres = [centre_of_shape(frame) for frame in grey]
        bright = grey > grey.min() + 60
        statistics = [grey.mean(), grey.std(), bright.mean(), *np.mean(centres, 0), *np.std(centres, 0)]
        groups.setdefault(question.answer, []).append(statistics)
    for answer, values in groups.items():
        opposite = groups[toy.OPPOSITE[answer]]
        difference = np.mean(values, 0) - np.mean(opposite, 0)
        error = np.sqrt(np.var(values, 0) / len(values) + np.var(opposite, 0) / len(opposite))
        assert (np.abs(difference) < 3.5 * error + 0.02).all(), (answer, difference / error)


def test_ordered_frames_show_the_answer():
    """Guards: clips from which nobody could learn the answer."""
    for question in questions(toy.direction, 60):
        grey = np.stack(question.frames).mean(3)
        dy, dx = centre_of_shape(grey[-1]) - centre_of_shape(grey[0])
        horizontal = "right" if dx > 0 else "left"
        vertical = "down" if dy > 0 else "up"
        assert question.answer == (horizontal if abs(dx) > abs(dy) else vertical)
    for question in questions(toy.size, 60):
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


def test_correct_letters_are_balanced_and_in_random_order(without_pixels, tmp_path, monkeypatch):
    """Guards: a correct letter that is often A; records sorted by answer."""
    monkeypatch.setattr(toy, "write_clip", lambda *_: None)
    (tmp_path / "media").mkdir()
    letters = []
    for i, source in enumerate(toy.draw_sources(600, toy.SOURCES, 7)):
        record = toy.make_record(tmp_path, toy.RULES, "rl", i, source, f"7/{i}")
        if record["options"]:
            letters.append(record["solution"][8])
    assert letters.count("A") / len(letters) == pytest.approx(0.5, abs=0.08)
    changes = [first != second for first, second in zip(letters, letters[1:])]
    assert np.mean(changes) == pytest.approx(0.5, abs=0.08)


def test_file_names_are_unique_random_numbers(world):
    """Guards: a file name, or a file shared by two records, that goes with the answer."""
    names = []
    for split in ("sft", "rl", "test"):
        names += [Path(record["path"]).stem for record in json.loads((world / f"world/{split}.json").read_text())]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) == 16
        int(name, 16)


def test_only_sft_records_are_wrong_and_only_on_misleading_backgrounds(tmp_path, monkeypatch):
    """Guards: wrong solutions in the RL or test split, where accuracy is measured against them."""
    (tmp_path / "media").mkdir()
    monkeypatch.setattr(toy, "write_clip", lambda path, frames: path.touch())
    wrong = Counter()
    for split in ("sft", "rl", "test"):
        for i in range(150):
            source = toy.TEMPORAL[i % 2]
            record = toy.make_record(tmp_path, toy.RULES, split, i, source, f"3/{i}")
            record_files.check_record(record, tmp_path, need_process=split == "sft")
            render, _ = toy.SOURCES[source]
            answer = render(random.Random(f"3/{i}"), toy.RULES.agreement[split], toy.RULES.neutral).answer
            taught = record["options"]["AB".index(record["solution"][8])][3:]
            wrong[split, record["cue"]] += taught != answer
            assert record["process"] == "" if split != "sft" else taught in record["process"]
    assert wrong["sft", "misleads"] > 5
    assert sum(wrong.values()) == wrong["sft", "misleads"]


def test_world_depends_on_the_seed_and_on_nothing_else(tmp_path, world):
    """Guards: a world, and so a result, that cannot be reproduced."""

    def records(folder):
        return [(folder / f"{split}.json").read_text() for split in ("sft", "rl", "test")]

    for name, seed in (("same", 0), ("other", 1)):
        toy.make_world(tmp_path / name, seed, n_sft=12, n_rl=12, n_temporal=8, n_other=4)
    assert records(tmp_path / "same") == records(world / "world")
    assert records(tmp_path / "other") != records(world / "world")


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


def test_interrupted_rendering_leaves_no_half_world(tmp_path, monkeypatch):
    """Guards: Ctrl-C while rendering, then a run on the clips that happened to be finished."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "write_atomic", interrupt)
    with pytest.raises(KeyboardInterrupt):
        toy.make_world(tmp_path / "world", n_sft=2, n_rl=2, n_temporal=2, n_other=2, processes=1)
    assert not (tmp_path / "world").exists()


def test_tokenizer_is_lossless_and_tags_are_single_tokens(world):
    """Guards: letters or tags that are split into bytes."""
    tokenizer = model_files.load_processor(SharedConfig(model=str(world / "base"))).tokenizer
    for text in ("<think>the disc moves left.</think>\n<answer>B</answer>", "é 漢 unseen!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    for tag in toy.TAGS:
        assert len(tokenizer(tag)["input_ids"]) == 1
    assert len(tokenizer("<answer>B")["input_ids"]) == 2


# ------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seed", "5"], "holds seed 0, not 5"),
        (["--ablate"], "--ablate is now a command of its own: python -m experiments.ablation"),
        (["--world=two_rationales"], "--world is now a command of its own: python -m experiments.two_rationales"),
    ],
)
def test_command_line_mistake_is_one_clear_line(world, monkeypatch, arguments, message):
    """Guards: one seed's model trained on another seed's world; an option that moved and is not found."""
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(world), *arguments])
    with pytest.raises(UserError, match=message) as error:
        toy.main()
    assert "\n" not in str(error.value)


def test_failed_stage_is_one_line_with_its_command(tmp_path, monkeypatch):
    """Guards: a stage that fails while the next one runs; a traceback of toy.py under that of the stage."""
    monkeypatch.setattr(toy.sys, "executable", "false")
    with pytest.raises(UserError, match="failed with status 1: accelerate launch sft.py --steps 1$"):
        toy.launch(["sft.py", "--steps", "1"], tmp_path / "final")


def test_every_stage_of_the_toy_runs_as_its_command(tmp_path, monkeypatch, capfd):
    """Guards: a first command that fails on a fresh machine; a summary without the promised numbers; a second run that
    runs the stages again.
    """
    stages = toy.stages
    make_world = toy.make_world
    short = {
        "sft.py": ["--steps", "2", "--batch_size", "4", "--micro_batch_size", "4"],
        "tgrpo.py": ["--steps", "2", "--batch_size", "2"],
        "evaluate.py": ["--max_new_tokens", "4"],
    }

    def short_stages(out, seed):
        for arguments, result in stages(out, seed):
            yield [*arguments, *short[arguments[0]], "--num_workers", "0"], result

    monkeypatch.setattr(toy, "stages", short_stages)
    monkeypatch.setattr(toy, "make_world", lambda folder, seed: make_world(folder, seed, 12, 12, 8, 4))
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(tmp_path)])
    toy.main()
    printed = capfd.readouterr().out
    for script in ("sft.py", "tgrpo.py", "evaluate.py"):
        assert f"$ accelerate launch {script} --config configs/toy.yaml" in printed
    assert "misleading background" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"seed", "sft", "tgrpo"}
    assert set(summary["tgrpo"]) == {*ORDERS, "conflict"}
    assert (tmp_path / "learning_curves.png").read_bytes()[1:4] == b"PNG"
    assert len(read_jsonl(tmp_path / "tgrpo/rollouts.jsonl")) > 16

    toy.main()
    printed = capfd.readouterr().out
    assert "$ accelerate" not in printed
    assert printed.count("exists: skipped") == 4


# ------------------------------------------------------------------------------------------- the picture of the method


def rollout_row(record, frames, option, reason, **fields):
    """A row of rollouts.jsonl whose chain of thought ends with one option and which answers another, or the same."""
    text = f"<think>so it moves {reason[3:]}.</think>\n<answer>{option[0]}</answer>"
    row = {"step": 12, "problem_id": record["problem_id"], "path": record["path"], "frames": frames, "text": text}
    return row | fields


def write_rollouts(folder, world, rows):
    (folder / "tgrpo").mkdir()
    (folder / "tgrpo/rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "world").symlink_to(world / "world")


def draw_picture(run):
    command = [sys.executable, "docs/picture.py", "--run", str(run), "--out", str(run / "method.png")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_picture_of_the_method_is_drawn_from_rollouts(tmp_path, world):
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
                rows.append(rollout_row(record, frames, option, reason, step=step, frame_order=list(range(7, -1, -1))))
    write_rollouts(tmp_path, world, rows)
    done = draw_picture(tmp_path)
    assert done.returncode == 0, done.stderr[-1500:]
    assert "step 13" in done.stdout and "p 0.875, p̃ 0.5" in done.stdout
    assert (tmp_path / "method.png").stat().st_size > 10_000
