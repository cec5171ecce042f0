"""The toy world: only the order of the frames gives the temporal answers. And toy.py as a user runs it."""

import importlib
import inspect
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate.state import AcceleratorState

import rewards
import toy
from support import model_files, parsing, record_files
from support.settings import SharedConfig, UserError
from support.storage import read_jsonl

SPLITS = ("sft", "rl", "test")
# settings that make each stage short
SHORT = {
    "sft.py": ["--steps", "2", "--batch_size", "4", "--micro_batch_size", "4"],
    "tgrpo.py": ["--steps", "2", "--batch_size", "2"],
    "evaluate.py": ["--max_new_tokens", "4"],
}


@pytest.fixture
def without_pixels(monkeypatch, tmp_path):
    """Records in a fraction of the time: every frame is the same black one, and no clip is encoded."""
    black = np.zeros((toy.SIZE, toy.SIZE, 3), np.uint8)
    monkeypatch.setattr(toy, "draw", lambda *_, **__: black)
    monkeypatch.setattr(toy, "write_clip", lambda path, frames: path.touch())
    (tmp_path / "media").mkdir()


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
        frames = render(Fixed(seed, answer), agreement=0.5, neutral=1).frames
        opposite = render(Fixed(seed, toy.OPPOSITE[answer]), agreement=0.5, neutral=1).frames
        assert np.array_equal(frames, opposite[::-1])


def test_ordered_frames_show_the_answer():
    """Guards: clips from which nobody could learn the answer."""

    def shape_in(frame):
        """Row and column of its centre, and its area, in pixels."""
        grey = frame.mean(2)
        bright = np.argwhere(grey > grey.min() + 60)
        return np.array([*bright.mean(0), len(bright)])

    for i in range(60):
        question = (toy.direction, toy.size)[i % 2](random.Random(i), 0.5, 0.3)
        dy, dx, growth = shape_in(question.frames[-1]) - shape_in(question.frames[0])
        change = {"right": dx, "left": -dx, "down": dy, "up": -dy, "grows": growth / 10, "shrinks": -growth / 10}
        assert question.answer == max(change, key=change.get)


@pytest.mark.parametrize("split, agreement", [("rl", 0.8), ("test", 0.5)])
def test_backgrounds_letters_and_kinds_have_the_given_rates(without_pixels, tmp_path, split, agreement):
    """Guards: a background that never misleads (then the shortcut cannot be told from the skill), or a test split that
    rewards the shortcut; a correct letter that is often A; records sorted by answer or kind; a rare kind of question.
    """
    sources = toy.draw_sources(toy.RULES, split, 7, n_training=1200, n_temporal=800, n_other=400)
    records = [toy.make_record(tmp_path, toy.RULES, split, 7, i, source) for i, source in enumerate(sources)]
    cues = Counter(record["cue"] for record in records if record["data_source"] in toy.TEMPORAL)
    assert cues["neutral"] / cues.total() == pytest.approx(0.3, abs=0.05)
    assert cues["agrees"] / (cues["agrees"] + cues["misleads"]) == pytest.approx(agreement, abs=0.06)
    letters = [record["solution"][8] for record in records if record["options"]]
    assert letters.count("A") / len(letters) == pytest.approx(0.5, abs=0.08)
    changes = [first != second for first, second in zip(letters, letters[1:])]
    assert np.mean(changes) == pytest.approx(0.5, abs=0.08)
    for part in (sources[:600], sources[600:]):
        shares = [part.count(source) / 600 for source in toy.SOURCES]
        assert shares == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 6], abs=0.06)


def test_only_sft_records_are_wrong_on_80_percent_of_misleading_backgrounds(without_pixels, tmp_path):
    """Guards: wrong solutions in the RL or test split, where accuracy is measured against them; another teacher."""
    wrong = {}
    for split in SPLITS:
        for i in range(1000):
            source = toy.TEMPORAL[i % 2]
            record = toy.make_record(tmp_path, toy.RULES, split, 3, i, source)
            record_files.check_record(rewards.parse_solution, record, tmp_path, need_process=split == "sft")
            render, _ = toy.SOURCES[source]
            answer = render(random.Random(f"3/{split}/{i}"), toy.RULES.agreement[split], toy.RULES.neutral).answer
            taught = record["options"]["AB".index(record["solution"][8])][3:]
            assert record["process"] == "" if split != "sft" else taught in record["process"]
            wrong.setdefault((split, record["cue"]), []).append(taught != answer)
    assert np.mean(wrong.pop(("sft", "misleads"))) == pytest.approx(0.8, abs=0.1)
    assert not any(map(any, wrong.values()))


def test_every_file_depends_on_the_seed_and_on_nothing_else_and_no_name_gives_an_answer_away(tmp_path, world):
    """Guards: a world, and so a result, that cannot be reproduced; a name, or a file shared by two records, that goes
    with the answer.
    """
    toy.make_world(tmp_path / "same", 0, n_sft=12, n_rl=12, n_temporal=8, n_other=4)
    media = sorted((world / "world/media").iterdir())
    assert len(media) == 36
    for file in [*media, *(world / "world").glob("*.json")]:
        assert (tmp_path / "same" / file.relative_to(world / "world")).read_bytes() == file.read_bytes()
    for file in media:
        assert len(file.stem) == 16
        int(file.stem, 16)
    toy.make_world(tmp_path / "other", 1, n_sft=12, n_rl=2, n_temporal=2, n_other=0)
    assert (tmp_path / "other/sft.json").read_bytes() != (world / "world/sft.json").read_bytes()


def test_clips_do_not_depend_on_uninitialised_memory(tmp_path):
    """Guards: an encoder that reads uninitialised memory, so that the same seed gives other files."""
    frames = [toy.size(random.Random(f"0/sft/{i}"), 0.8, 0.3).frames for i in (124, 141, 146, 163)]
    np.save(tmp_path / "frames.npy", np.array(frames))
    # only the function under test: importing toy.py takes seconds
    code = f"import av, sys, numpy\nfrom fractions import Fraction\nSIZE, FPS = {toy.SIZE}, {toy.FPS}\n"
    code += inspect.getsource(toy.write_clip)
    code += "for i, frames in enumerate(numpy.load('frames.npy')):\n    write_clip(f'{sys.argv[1]}-{i}.mp4', frames)\n"
    # the byte that fills fresh memory
    for fill in ("0", "170"):
        memory = os.environ | {"MALLOC_PERTURB_": fill}
        subprocess.run([sys.executable, "-c", code, fill], cwd=tmp_path, env=memory, check=True)
    for i in range(4):
        assert (tmp_path / f"0-{i}.mp4").read_bytes() == (tmp_path / f"170-{i}.mp4").read_bytes()


def test_tokenizer_is_lossless_and_tags_are_single_tokens(world):
    """Guards: letters or tags that are split into bytes."""
    tokenizer = model_files.load_processor(SharedConfig(model=str(world / "base"))).tokenizer
    for text in ("<think>the disc moves left.</think>\n<answer>B</answer>", "é 漢 unseen!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    for tag in parsing.TAGS:
        assert len(tokenizer(f"{tag}B")["input_ids"]) == 2


# ------------------------------------------------------------------------------------------------------- the command


def test_another_seed_in_the_same_folder_is_one_clear_line(world, monkeypatch):
    """Guards: one seed's model trained on another seed's world."""
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(world), "--seed", "5"])
    monkeypatch.setattr(toy, "launch", lambda *_: pytest.fail("a stage was started"))
    with pytest.raises(UserError, match="^.* holds seed 0, not 5; choose another --out, or delete it$"):
        toy.main()


def test_another_family_in_the_same_folder_is_one_clear_line(world, monkeypatch):
    """Guards: results of Qwen2.5-VL shown as those of Qwen3-VL."""
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(world), "--model_family", "qwen3_vl"])
    monkeypatch.setattr(toy, "launch", lambda *_: pytest.fail("a stage was started"))
    with pytest.raises(
        UserError, match="^.* holds model_type qwen2_5_vl, not qwen3_vl; choose another --out, or delete it$"
    ):
        toy.main()


@pytest.mark.parametrize("program, status", [("false", 1), ("true", 0)])
def test_stage_without_result_is_one_line_with_its_command(tmp_path, monkeypatch, program, status):
    """Guards: a stage that fails, or is stopped (with status 0), while the next one runs; a traceback of toy.py."""
    monkeypatch.setattr(toy.sys, "executable", program)
    line = rf"did not finish \(status {status}\): accelerate launch --num_processes 1 sft.py --steps 1$"
    with pytest.raises(UserError, match=line):
        toy.launch(["sft.py", "--steps", "1"], tmp_path / "final")


def test_ctrl_c_while_rendering_is_one_line_and_leaves_no_half_world(tmp_path, monkeypatch, capfd):
    """Guards: tracebacks of the workers, which Ctrl-C reaches, too; a run on the clips that happened to be finished."""
    make_world = toy.make_world
    after_ctrl_c = []

    def interrupted(rendered, **_):
        yield next(rendered)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
        after_ctrl_c.extend(rendered)
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "tqdm", interrupted)
    monkeypatch.setattr(toy, "make_world", lambda folder, seed: make_world(folder, seed, n_sft=50, processes=1))
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="130"):
        toy.main()
    assert len(after_ctrl_c) == 49
    assert capfd.readouterr() == ("\nstopped; the same command continues from here\n", "")
    assert not (tmp_path / "world").exists()


def test_every_stage_of_the_toy_runs_as_its_command(tmp_path, monkeypatch, capfd):
    """Guards: a first command that fails on a fresh machine; a summary without the promised numbers; a second run that
    runs the stages again; the launcher's warning about values that were not passed.
    """
    stages, make_world, run = toy.stages, toy.make_world, subprocess.run

    def short_stages(out, seed):
        for arguments, result in stages(out, seed):
            yield [*arguments, *SHORT[arguments[0]], "--num_workers", "0"], result

    def run_command(command, **options):
        """The first stage by its command; the others in this process, because importing torch takes so long."""
        if "sft.py" in command or command[0] == "git":
            return run(command, **options)
        script = next(argument for argument in command if argument in SHORT)
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
        for script in SHORT:
            assert (f"$ accelerate launch --num_processes 1 {script} --config configs/toy.yaml" in printed) != rerun
        assert printed.count("exists: skipped") == (4 if rerun else 0)
        assert "misleading background" in printed
        assert "was set to a value" not in errors
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"seed", "sft", "tgrpo"}
    assert set(summary["sft"]) == set(summary["tgrpo"]) == set(toy.HEADINGS)
    assert (tmp_path / "learning_curves.png").read_bytes()[1:4] == b"PNG"
    assert len(read_jsonl(tmp_path / "tgrpo/rollouts.jsonl")) > 16
