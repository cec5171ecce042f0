"""The toy world tells nothing away: the order of the frames is the only way to the temporal answers."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import data
import policy
import toy
from settings import SharedConfig

ROOT = Path(__file__).parent.parent


def clips(kind, n, agreement=0.5, seed=0):
    """n × (frames (F, H, W, C) as float, answer, cue) straight from the renderer."""
    for i in range(n):
        frames, _, answer, _, cue = kind(random.Random(f"{seed}/{i}"), agreement, 0.3)
        yield np.stack(frames).astype(float), answer, cue


@pytest.mark.parametrize("kind", [toy.direction, toy.size])
def test_both_answers_show_the_same_set_of_frames(kind):
    """Guards: a drift, a size or a brightness of the shuffled frames from which the answer can be guessed."""
    groups = {}
    for frames, answer, cue in clips(kind, 600):
        grey = frames.mean(3)
        bright = grey > grey.min() + 60
        middle = [np.argwhere(b).mean(0) for b in bright]
        order_free = [grey.mean(), grey.std(), bright.mean(), *np.mean(middle, 0), *np.std(middle, 0)]
        groups.setdefault(answer, []).append(order_free)
    for answer, values in groups.items():
        other = groups[toy.OPPOSITE[answer]]
        difference = np.mean(values, 0) - np.mean(other, 0)
        error = np.sqrt(np.var(values, 0) / len(values) + np.var(other, 0) / len(other))
        assert (np.abs(difference) < 3.5 * error + 0.02).all(), (answer, difference / error)


def test_the_order_of_frames_holds_the_answer():
    """Guards: clips from which nobody could learn the answer."""
    for frames, answer, _ in clips(toy.direction, 60):
        middle = [np.argwhere(f.mean(2) > f.mean(2).min() + 60).mean(0) for f in frames]
        dy, dx = middle[-1] - middle[0]
        assert answer == (("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up"))
    for frames, answer, _ in clips(toy.size, 60):
        assert (frames[-1].mean() > frames[0].mean()) == (answer == "grows")


@pytest.mark.parametrize("agreement", [0.5, 0.8])
def test_the_background_agrees_as_often_as_promised(agreement):
    """Guards: a cue that never lies (then nothing tells a shortcut from the skill), or a test split that rewards it."""
    cues = Counter(cue for kind in (toy.direction, toy.size) for _, _, cue in clips(kind, 600, agreement))
    cued = cues["agrees"] + cues["lies"]
    assert cues["neutral"] / 1200 == pytest.approx(0.3, abs=0.05)
    assert cues["agrees"] / cued == pytest.approx(agreement, abs=0.06)


def test_answers_are_balanced_and_nothing_beside_the_pixels_tells_them(world):
    """Guards: a right letter that is often A, sorted records, file names or sizes that go with the answer."""
    jobs = [(None, "rl", i, source, f"7/{i}") for i, source in enumerate(toy.plan("rl", 600, None, 7))]
    letters, order = Counter(), []
    for _, split, i, source, key in jobs:
        rng = random.Random(key)
        frames, problem, answer, thought, cue = toy.QUESTIONS[source][0](rng, 0.8, 0.3)
        answer, wrong = answer if isinstance(answer, tuple) else (answer, toy.OPPOSITE.get(answer))
        if wrong:
            letter = toy.two_options(rng, answer, wrong)[1]
            letters[letter] += 1
            order.append(letter == "A")
    n = sum(letters.values())
    assert letters["A"] / n == pytest.approx(0.5, abs=0.08)
    changes = sum(a != b for a, b in zip(order, order[1:])) / (n - 1)
    assert changes == pytest.approx(0.5, abs=0.08)  # no runs, no alternation
    names = [
        Path(r["path"]).name
        for split in ("sft", "rl", "test")
        for r in json.loads((world / f"world/{split}.json").read_text())
    ]
    assert len(set(names)) == len(names) and all(
        len(Path(name).stem) == 16 and int(Path(name).stem, 16) >= 0 for name in names
    )


def test_the_records_are_valid_and_the_teacher_lies_only_to_the_cold_start(tmp_path):
    """Guards: wrong truths in the RL or test split, where accuracy is measured against them."""
    wrong = Counter()
    (tmp_path / "media").mkdir()
    for split in ("sft", "rl"):
        for i in range(150):
            key = f"3/{i}"
            record = toy.make_record((str(tmp_path), "flawed_teacher", split, i, toy.TEMPORAL[i % 2], key))
            data.check_record(record, tmp_path, need_process=split == "sft")
            answer = toy.QUESTIONS[record["data_source"]][0](random.Random(key), 0.8, 0.3)[2]
            said = record["options"]["AB".index(record["solution"][8])][3:]
            wrong[split, record["cue"]] += said != answer
            assert split != "sft" or said in record["process"]
    assert wrong["sft", "lies"] > 5 and sum(wrong.values()) == wrong["sft", "lies"]


def test_the_same_seed_is_the_same_world(tmp_path, world):
    """Guards: a world, and so a result, that nobody can make again."""
    for name, seed in (("same", 0), ("other", 1)):
        toy.make_world(tmp_path / name, seed, n_sft=12, n_rl=12, n_temporal=8, n_other=4)
    read = lambda folder: [(folder / f"{split}.json").read_text() for split in ("sft", "rl", "test")]
    assert read(tmp_path / "same") == read(world / "world") and read(tmp_path / "other") != read(world / "world")


def test_the_same_seed_gives_the_same_files_to_the_byte(tmp_path):
    """Guards: an encoder that looks at memory nobody wrote, so that a seed's result cannot be made again."""
    code = (
        "import toy, random, hashlib; frames = [toy.size(random.Random(f'0/sft/{i}'), 0.8, 0.3)[0] for i in (124, 141, 146, 163)]\n"
        "for i, f in enumerate(frames): toy.write_clip(f'OUT/{i}.mp4', f); print(hashlib.md5(open(f'OUT/{i}.mp4', 'rb').read()).hexdigest())"
    )
    running = []
    for fill in ("0", "170"):  # what unwritten memory holds
        (tmp_path / fill).mkdir()
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", code.replace("OUT", str(tmp_path / fill))],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "MALLOC_PERTURB_": fill},
            )
        )
    said = [process.communicate()[0] for process in running]
    assert said[0].count("\n") == 4 and len(set(said)) == 1


def test_a_stopped_renderer_leaves_no_half_world(tmp_path, monkeypatch):
    """Guards: Ctrl-C while rendering, then a run on the clips that happened to be there."""
    monkeypatch.setattr(toy, "write_atomic", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        toy.make_world(tmp_path / "world", n_sft=2, n_rl=2, n_temporal=2, n_other=2, processes=1)
    assert not (tmp_path / "world").exists()


def test_tokenizer_and_prompt_are_small_and_lossless(world):
    """Guards: letters or tags that fall apart into bytes; a processor that blows tiny frames up."""
    processor = policy.load_processor(SharedConfig(model=str(world / "base")))
    for text in ("<think>the disc moves left.</think>\n<answer>B</answer>", "é 漢 unseen!"):
        ids = processor.tokenizer(text)["input_ids"]
        assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text
    for tag in ("<think>", "</think>", "<answer>", "</answer>", "<answer>B"):
        assert len(processor.tokenizer(tag)["input_ids"]) == 1 + (tag == "<answer>B")


@pytest.mark.parametrize("arguments, said", [(["--seed", "5"], "holds seed 0, not 5"), (["--help"], "--fresh")])
def test_the_command_line_explains_itself(world, monkeypatch, capsys, arguments, said):
    """Guards: one seed's model trained on another seed's world."""
    monkeypatch.setattr("sys.argv", ["toy.py", "--out", str(world), *arguments])
    with pytest.raises(SystemExit) as exit:
        toy.main()
    assert said in capsys.readouterr().out + str(exit.value.code)
