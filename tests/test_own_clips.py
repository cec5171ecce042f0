"""Training on one's own clips: the documented examples, distilled answers, the test set, other formats."""

import json
import random
import re
import sys
from pathlib import Path

import pytest

import data
from rewards import parse_solution
from support import record_files
from support.parsing import extract_answer
from support.settings import UserError
from support.storage import read_jsonl
from tools import check_data, distill, split

ROOT = Path(__file__).parent.parent
EXAMPLES = json.loads((ROOT / "examples/records.json").read_text(encoding="utf-8"))


def test_the_documented_records_are_the_examples():
    """Guards: a record edited in docs/own_clips.md only, which no test trains on."""
    page = (ROOT / "docs/own_clips.md").read_text(encoding="utf-8")
    documented = json.loads(re.search(r"```json\n(.*?)```", page, re.S)[1])
    assert documented == EXAMPLES


def test_the_examples_train_in_both_stages_and_are_answered(run, world, monkeypatch):
    """Guards: a documented example that training refuses, or whose media it skips unnoticed."""
    small = {
        "config": "examples/own.yaml",
        "records": ROOT / "examples/records.json",
        "data_root": ROOT / "examples",
        "max_frames": 4,
        "min_pixels": 784,
        "max_pixels": 3136,
        "gradient_checkpointing": "false",
    }
    sft = run("sft", "sft", batch_size=5, micro_batch_size=5, **small)
    tgrpo = run(
        "tgrpo",
        "tgrpo",
        model=sft / "final",
        batch_size=5,
        micro_batch_size=5,
        num_generations=2,
        max_new_tokens=8,
        **small,
    )
    evaluation = run("evaluate", "eval", model=tgrpo / "final", max_new_tokens=8, **small)
    for folder in (sft, tgrpo):
        rows = read_jsonl(folder / "metrics.jsonl")
        assert [row["step"] for row in rows] == [0, 1] and rows[-1]["data/skipped"] == 0
    # a batch holds all five, so the two steps have sampled for each of them
    assert {row["problem"] for row in read_jsonl(tgrpo / "rollouts.jsonl")} == {r["problem"] for r in EXAMPLES}
    answers = read_jsonl(evaluation / "predictions.jsonl")
    # the four clips in three orders, the picture in order and blind
    assert len(answers) == 14 and not any("error" in row for row in answers)


@pytest.mark.parametrize("stage", ["sft", "tgrpo"])
def test_the_examples_media_can_be_read(monkeypatch, stage):
    """Guards: a check of the user's files that fails on the documented files."""
    arguments = ("--records", ROOT / "examples/records.json", "--data_root", ROOT / "examples", "--num_workers", 0)
    arguments = ("check_data", "--config", "examples/own.yaml", "--stage", stage, *map(str, arguments))
    monkeypatch.setattr(sys, "argv", list(arguments))
    with pytest.raises(SystemExit) as done:
        check_data.main()
    assert not done.value.code


def answered(row, thought, answer):
    """The prediction `row` with another completion."""
    return {**row, "prediction": f"<think>{thought}</think>\n<answer>{answer}</answer>"}


def test_distilled_answers_train_the_sft_model(run, world, tmp_path, capsys):
    """Guards: records that sft.py cannot read; wrong, truncated, duplicate or blind answers among the
    records.
    """
    out = run("evaluate", records=world / "world/rl.json")
    rows = [row for row in read_jsonl(out / "predictions.jsonl") if row["frames"] == "ordered"]
    truths = [extract_answer(row["solution"]) for row in rows]
    good = [answered(rows[i], f"thought {i}", truths[i]) for i in range(6)]
    bad = [
        answered(rows[0], "a second thought", truths[0]),
        answered(rows[6], "", truths[6]),
        answered(rows[7], "wrong", "no"),
        {**rows[8], "prediction": f"<answer>{truths[8]}</answer>"},
        {**rows[9], "prediction": "<think>cut off"},
        {**answered(rows[10], "x", truths[10]), "frames": "shuffled"},
        {**answered(rows[11], "x", truths[11]), "frames": "blind"},
        {"benchmark": "rl", "id": "gone", "error": "cannot be read", "path": "x"},
    ]
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text("".join(json.dumps(row) + "\n" for row in good + bad))
    distill.main([str(predictions), "--out", str(tmp_path / "cot.json"), "--data_root", str(world / "world")])
    printed = capsys.readouterr().out
    for line in (
        "1 dropped: another answer to the same question",
        "1 dropped: no thought",
        "1 dropped: answer not accurate enough",
        "2 dropped: not one think block and one answer",
        "2 dropped: frames were not in order",
        "1 dropped: media unusable",
        "6 of 14 answers kept",
    ):
        assert line in printed, printed
    records = json.loads((tmp_path / "cot.json").read_text())
    assert [record["process"] for record in records] == [f"<think>thought {i}</think>" for i in range(6)]
    assert [record["solution"] for record in records] == [row["solution"] for row in rows[:6]]
    sft = run("sft", "sft", records=tmp_path / "cot.json", steps=1, batch_size=2, micro_batch_size=2)
    assert (sft / "final").exists()


def test_a_distilled_record_shows_the_same_part_of_its_clip():
    """Guards: a chain of thought about seconds 3 to 5 that is trained on the whole video."""
    row = EXAMPLES[0] | {
        "benchmark": "mine",
        "id": 1,
        "start": 3,
        "end": 5,
        "prediction": "<think>It moves.</think><answer>B</answer>",
    }
    [record], _ = distill.distill([row], ROOT / "examples")
    assert record["start"] == 3
    assert record["end"] == 5
    assert record["process"] == "<think>It moves.</think>"
    assert "fps" not in record


# ------------------------------------------------------------------------------------------------------ the test set


def rows_on(n_clips, per_clip):
    return [
        {"problem_id": f"{clip}/{i}", "path": f"{'./' if i % 2 else ''}clips/{clip}.mp4", "problem": "é?"}
        for i in range(per_clip)
        for clip in range(n_clips)
    ]


def test_no_clip_is_on_both_sides_of_a_split_and_no_row_is_lost():
    """Guards: a test question on a training clip, also if its path is spelt differently; a lost row."""
    rows = rows_on(20, 3)
    train, test = split.split(rows, 0.1, seed=0)
    clips = [{Path(row["path"]).name for row in side} for side in (train, test)]
    assert not clips[0] & clips[1] and len(clips[1]) == 2 and len(test) == 6
    assert sorted(map(str, train + test)) == sorted(map(str, rows))
    assert split.split(rows, 0.1, seed=0) == (train, test)
    # in another order of the rows a clip stays where it was
    shuffled = random.Random(1).sample(rows, len(rows))
    assert {row["problem_id"] for row in split.split(shuffled, 0.1, seed=0)[1]} == {row["problem_id"] for row in test}
    assert len({str(split.split(rows, 0.1, seed)[1]) for seed in range(5)}) > 1


@pytest.mark.parametrize("share, n_test", [(0.001, 1), (0.9, 2)])
def test_neither_side_of_a_split_is_empty(share, n_test):
    """Guards: an empty test set because there are few clips, or an empty training set."""
    train, test = split.split(rows_on(3, 1), share, seed=0)
    assert len(test) == n_test and len(train) == 3 - n_test


def test_a_split_is_written_whole_and_counted(tmp_path, capsys):
    """Guards: rows changed in the process; counts of rows printed as counts of clips."""
    rows = rows_on(10, 2)
    (tmp_path / "mine.json").write_text(json.dumps(rows), encoding="utf-8")
    split.main([str(tmp_path / "mine.json"), "--share", "0.2", "--out", str(tmp_path / "parts")])
    printed = capsys.readouterr().out
    assert (
        "train.json: 16 of 20 rows, on 8 of 10 clips" in printed
        and "test.json: 4 of 20 rows, on 2 of 10 clips" in printed
    )
    parts = [json.loads((tmp_path / f"parts/{name}.json").read_text(encoding="utf-8")) for name in ("train", "test")]
    assert sorted(map(str, parts[0] + parts[1])) == sorted(map(str, rows))
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["test.json", "train.json"]


@pytest.mark.parametrize(
    "rows, line",
    [
        ([{"path": "a.mp4"}, {"problem": "?"}], "row 2: path: missing"),
        ([{"path": "a.mp4"}, {"path": "./a.mp4"}], "all 2 rows are on one clip: nothing to split"),
        ([{"path": "a.mp4"}, {"path": "/media/a.mp4"}], "path: some are absolute, others relative"),
    ],
)
def test_an_impossible_split_gives_one_line(rows, line):
    """Guards: a traceback, or a test set that is the training set."""
    with pytest.raises(UserError, match=line):
        split.split(rows, 0.1, seed=0)


# -------------------------------------------------------------------------------------------------- other formats


@pytest.mark.parametrize(
    "row",
    [
        {
            "id": 1,
            "video": "a.mp4",
            "conversations": [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}],
        },
        {"messages": [{"role": "user", "content": "<video>What is it?"}], "videos": ["a.mp4"]},
    ],
)
def test_a_file_of_conversations_gives_one_line(tmp_path, row):
    """Guards: "problem_id: missing" a thousand times, for a file in LLaVA's format."""
    (tmp_path / "llava.json").write_text(json.dumps([row] * 1000))
    with pytest.raises(UserError, match="llava.json: row 1 is a conversation") as error:
        data.load_records(tmp_path / "llava.json", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "process", ["It moves right.", "<think>It moves", "</think>a<think>", "<think>a</think><think>b</think>"]
)
def test_a_chain_of_thought_without_one_think_block_is_named(process):
    """Guards: an SFT model that unlearns the tags, so that every format reward is 0 afterwards."""
    row = EXAMPLES[0] | {"process": process}
    with pytest.raises(ValueError, match="process: expected one think block"):
        record_files.check_record(parse_solution, row, ROOT / "examples", need_process=True)
    record_files.check_record(parse_solution, row, ROOT / "examples", need_process=False)
    record_files.check_record(parse_solution, EXAMPLES[0], ROOT / "examples", need_process=True)


def test_answers_of_which_none_can_be_kept_are_no_records(tmp_path):
    """Guards: an empty file of records and status 0, after which SFT fails."""
    (tmp_path / "predictions.jsonl").write_text(json.dumps({"error": "no such file"}) + "\n")
    with pytest.raises(UserError, match="no answer can be kept"):
        distill.main([str(tmp_path / "predictions.jsonl"), "--out", str(tmp_path / "cot.json")])
    assert not (tmp_path / "cot.json").exists()
