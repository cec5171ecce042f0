"""benchmarks/: annotation files in the official layouts (our own rows), scores by hand; each test names its bug.

annotations/ has files of each benchmark that is tested here. A new benchmark needs none: no test reads all of NAMES.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import benchmarks
from benchmarks import join_annotations, load_benchmark, missing_media, tempcompass
from benchmarks.answers import benchmarks_in, is_strict, score_answer, score_benchmark, scored_rows
from benchmarks.orders import clustered_mean, print_orders, summarise
from benchmarks.score import main, print_table
from benchmarks.shared import answer_of
from rewards import accuracy_reward, parse_solution
from support.record_files import check_record
from support.settings import UserError

ROOT = Path(__file__).parent.parent
ANNOTATIONS = Path(__file__).parent / "annotations"
# questions of each benchmark in annotations/
N_QUESTIONS = {
    "vsibench": 2,
    "videommmu": 4,
    "mvbench": 3,
    "tempcompass": 5,
    "mmvu": 2,
    "videomme": 2,
    "tvbench": 2,
    "tomato": 1,
    "timeblind": 4,
    "vsibench_debiased": 1,
    "videoholmes": 1,
}


def read(path):
    """The content of an annotation file: the rows of a .jsonl file, or the JSON."""
    text = (ANNOTATIONS / path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.endswith(".jsonl") else json.loads(text)


VIDEOMME = read("videomme/test.jsonl")


def fields(record, names):
    return [record[name] for name in names.split()]


def score_prediction(row):
    return score_answer(row)[0]


def benchmark_scores(rows):
    scored = scored_rows(rows)
    names = benchmarks_in(scored)
    return {name: score_benchmark(name, [row for row in scored if row["benchmark"] == name]) for name in names}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))


def write_parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.fixture
def root(tmp_path):
    """A copy of the annotation files, to which a test may add."""
    return shutil.copytree(ANNOTATIONS, tmp_path / "annotations")


# ----------------------------------------------------------------------------------------------- files to records


@pytest.mark.parametrize("name", N_QUESTIONS)
def test_records_of_every_benchmark_pass_the_checks_of_data(name):
    """Guards: a reader whose records data.py rejects, or that drops rows or repeats ids."""
    records = load_benchmark(name, ANNOTATIONS)
    assert len(records) == N_QUESTIONS[name] == len({r["id"] for r in records})
    for record in records:
        check_record(parse_solution, record, ANNOTATIONS, need_process=False)
        assert record["benchmark"] == name and isinstance(record["id"], str) and record["problem_id"] == record["id"]
        # relative to root, whichever folder held the file
        assert record["path"].startswith(name.removesuffix("_debiased") + "/")
        # the truth answers its own question; no rule scores MMVU's open ones
        if not (name == "mmvu" and record["problem_type"] == "free-form"):
            assert score_prediction({**record, "prediction": record["solution"]}) == 1


def test_a_new_benchmark_is_one_file_and_one_name(tmp_path, monkeypatch, capsys):
    """Guards: steps on the page that no longer work; a second list to which a new benchmark must be added."""
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    module = ModuleType("gates")
    exec(re.search("```python\n(.*?)```", page, re.S)[1], vars(module))
    monkeypatch.setitem(benchmarks.MODULES, "gates", module)
    rows = [{"video": 7, "question": "Does it open?", "options": ["yes", "no"], "key": "B"}]
    write(tmp_path / "gates/gates.json", rows)
    (record,) = load_benchmark("gates", tmp_path)
    assert (record["path"], record["options"]) == ("gates/videos/7.mp4", ["A. yes", "B. no"])
    summary = summarise([{**record, "prediction": "B", "frames": order} for order in ("ordered", "blind")])
    print_table(summary)
    assert summary["gates"]["score"] == 100 and "| gates " in capsys.readouterr().out


STILLS = "mvbench/video/tvqa/frames_fps3_hq/show_s01"
FIRST = "vsibench/scannet/scene0999_00.mp4"
SEQUENCE = {"options": ["A. He sat.", "B. He ran."], "solution": "<answer>B</answer>", "start": 1.5, "end": 9.0}
CHOICE = {"problem": "What happens?", "options": ["A. it falls", "B. it flies"], "solution": "<answer>B</answer>"}
CAPTIONS = (
    "Which caption fits?\nOption 1: It falls.\nOption 2: It flies.\nAnswer with the label of the one that matches."
)
FILM_OPTIONS = ["A. a brother", "B. a thief", "C. nobody"]


@pytest.mark.parametrize(
    "name, row_id, expected",
    [
        # a number that is asked as a letter
        ("vsibench", "0", {"problem_type": "regression", "options": [], "path": FIRST}),
        ("vsibench", "1", {"task": "object_rel_direction_hard", "solution": "<answer>C</answer>"}),
        # the answer's text as its letter; the whole video instead of its part; stills
        ("mvbench", "action_sequence/0", SEQUENCE | {"path": "mvbench/video/star/Charades_v1_480/AB9CD.mp4"}),
        ("mvbench", "counterfactual_inference/0", {"options": ["A. only this"], "start": None}),
        ("mvbench", "episodic_reasoning/0", {"data_type": "frame", "path": STILLS}),
        # options that are asked twice; two questions with one id
        ("tempcompass", "multi-choice/11/action/0", CHOICE | {"dim": "action", "path": "tempcompass/videos/11.mp4"}),
        ("tempcompass", "yes_no/11/action/1", {"problem_type": "free-form", "solution": "<answer>no</answer>"}),
        ("tempcompass", "caption_matching/11/order/0", {"problem": CAPTIONS, "options": []}),
        # one id for three tracks; more options than ten
        ("videommmu", "Perception/validation_Biology_901", {"options": ["A. a root", "B. a leaf"], "last_frame": None}),
        ("videommmu", "Comprehension/validation_Biology_901", {"solution": "<answer>N</answer>"}),
        ("videommmu", "Adaptation/validation_Math_15", {"problem_type": "numerical", "last_frame": True}),
        ("videommmu", "Adaptation/validation_Art_Theory_7", {"path": "videommmu/Art/validation_Art_Theory_7.mp4"}),
        ("mmvu", "validation_0", {"solution": "<answer>E</answer>", "path": "mmvu/videos/Physics/3.mp4"}),
        ("mmvu", "validation_1", {"problem_type": "free-form", "options": []}),
        # the keys of its groups
        ("videomme", "001-1", {"task": "Counting", "duration": "short", "domain": "Sports", "sub_category": "Tennis"}),
        # a video in a folder of MVBench
        ("tvbench", "moving_direction/0", {"path": "tvbench/video/moving_direction/m1.mp4"}),
        ("tvbench", "action_localization/0", {"start": 1.0, "end": 9.0}),
        # an answer that is one option off
        ("tomato", "shape&trend/40", {"solution": "<answer>B</answer>", "path": "tomato/videos/human/0215-06.mp4"}),
        ("timeblind", "0", {"solution": "<answer>yes</answer>", "instance": 0, "path": "timeblind/videos/vid_0_0.mp4"}),
        ("timeblind", "3", {"solution": "<answer>A</answer>", "instance": 0, "path": "timeblind/videos/vid_0_1.mp4"}),
        ("videoholmes", "dGS48/3", {"options": FILM_OPTIONS, "path": "videoholmes/videos_cropped/dGS48.mp4"}),
        # the files of VSI-Bench and of its debiased part lie in one folder
        ("vsibench_debiased", "1", {"path": "vsibench/arkitscenes/777.mp4", "benchmark": "vsibench_debiased"}),
    ],
)
def test_records_have_the_fields_of_the_authors_rows(name, row_id, expected):
    """Guards: what the comments say of each benchmark, and media in the wrong folder."""
    records = {record["id"]: record for record in load_benchmark(name, ANNOTATIONS)}
    assert {field: records[row_id].get(field) for field in expected} == expected


def test_mvbench_shows_whole_videos_if_asked():
    """Guards: `clip_segments: false` without effect."""
    whole = load_benchmark("mvbench", ANNOTATIONS, clip_segments=False)
    assert not any("start" in record or "end" in record for record in whole)


def test_videommmu_shows_the_image_of_the_question(root):
    """Guards: an image file of the annotation that is not appended."""
    touch(root / "videommmu/images/q.png")
    table = read("videommmu/data/adaptation_video.json")
    table["Adaptation"]["0"]["image"] = "images/q.png"
    write(root / "videommmu/data/adaptation_video.json", table)
    records = load_benchmark("videommmu", root)
    assert records[2]["image_path"] == "videommmu/images/q.png" and "last_frame" not in records[2]


def test_videomme_finds_other_endings_and_missing_media_are_listed_once(root):
    """Guards: .MP4 and .mkv files that are not found; a score over fewer videos than stated."""
    touch(root / "videomme/data/yt2.mkv")
    records = load_benchmark("videomme", root)
    assert missing_media(records + records, root) == ["videomme/data/yt1.mp4"]


def test_parquet_gives_the_same_records(tmp_path):
    """Guards: parquet rows that are read differently from JSON rows."""
    other = tmp_path / "parquet"
    write_parquet(other / "vsibench/test-00000-of-00001.parquet", read("vsibench/test.jsonl"))
    write_parquet(other / "videomme/videomme/test-00000-of-00001.parquet", VIDEOMME)
    for form in ("multi-choice", "yes_no", "caption_matching", "captioning"):
        rows = benchmarks.flatten(read(f"tempcompass/questions/{form}.json"), tempcompass.KEYS)
        for row in rows:
            del row["index"]
        write_parquet(other / f"tempcompass/{form}/test-00000-of-00001.parquet", rows)
    for track in ("perception", "comprehension", "adaptation"):
        [(track, rows)] = read(f"videommmu/data/{track}_video.json").items()
        rows = [{**r, "image": {"bytes": b"x", "path": "q.png"}} for r in rows.values()]
        write_parquet(other / f"videommmu/{track}/test-00000-of-00001.parquet", rows)
    for name in ("vsibench", "videomme", "tempcompass", "videommmu"):
        assert load_benchmark(name, other) == load_benchmark(name, ANNOTATIONS)


@pytest.mark.parametrize(
    "name, file, change, message",
    [
        ("vsibench", "test.jsonl", {"question_type": "colour"}, "question_type: expected one of"),
        ("vsibench", "test.jsonl", {"scene_name": None}, "scene_name: missing"),
        ("vsibench", "test.jsonl", {"scene_name": "../../../up"}, "leaves the data root"),
        ("mvbench", "json/action_sequence.json", {"answer": "He flew."}, "answer: expected one of He sat."),
        ("mvbench", "json/action_sequence.json", {"start": "soon"}, "could not convert"),
        ("mmvu", "validation.json", {"answer": "F"}, "answer F is not among the options"),
        ("mmvu", "validation.json", {"choices": ["x"]}, "list"),
        ("videomme", "test.jsonl", {"question_id": "001-2"}, "id '001-2' is used twice, first in"),
    ],
)
def test_bad_rows_are_named_all_at_once(tmp_path, name, file, change, message):
    """Guards: a bad annotation that is skipped; an error that only names the first of several."""
    rows = read(f"{name}/{file}")
    write(tmp_path / name / file, [rows[0] | change, rows[-1] | {"id": "z", "question_id": "001-2"}, ["not a row"]])
    with pytest.raises(UserError) as error:
        load_benchmark(name, tmp_path)
    assert message in str(error.value) and f"{file}, row 3: expected an object" in str(error.value)


DIRECTION = read("tvbench/json/moving_direction.json")[0]
SHAPE = read("tomato/data/shape&trend.json")["40"]
PAIR = read("timeblind/data.jsonl")[0]
FILM = read("videoholmes/test_Video-Holmes.json")[0]


@pytest.mark.parametrize(
    "name, file, content, message",
    [
        ("tvbench", "json/moving_count.json", [DIRECTION], "task: expected one of action_antonym"),
        ("tomato", "data/count.json", {"1": SHAPE | {"answer": 3}}, "the number of an option"),
        ("tomato", "data/count.json", {"1": SHAPE | {"answer": "B"}}, "the number of an option"),
        ("tomato", "data/count.json", [1], "not in this benchmark's format"),
        ("tempcompass", "questions/yes_no.json", {"11": ["no dimensions"]}, "not in this benchmark's format"),
        ("timeblind", "data.jsonl", [PAIR | {"type": "open"}], "type: expected one of yes_no"),
        ("timeblind", "data.jsonl", [PAIR | {"answer": "maybe"}], "answer: expected one of yes, no"),
        ("timeblind", "data.jsonl", [PAIR | {"index": "first"}], "row 1: "),
        ("videoholmes", "test_Video-Holmes.json", [FILM | {"Answer": "D"}], "Answer: expected one of A, B, C"),
        ("videoholmes", "test_Video-Holmes.json", [FILM | {"Options": ["x"]}], "Options: expected {letter"),
        ("videoholmes", "test_Video-Holmes.json", [FILM | {"Options": {"B": "x"}}], "letters from A on"),
    ],
)
def test_files_in_another_format_are_named(tmp_path, name, file, content, message):
    """Guards: a traceback, or a wrong letter, for a file that is not what the authors published."""
    write(tmp_path / name / file, content)
    with pytest.raises(UserError) as error:
        load_benchmark(name, tmp_path)
    assert message in str(error.value) and Path(file).name in str(error.value)


def timeblind_rows(answers):
    """Rows of instances: one list of four answers each; the truth is yes, no, no, yes."""
    rows = []
    for instance, given in enumerate(answers):
        for i, (answer, truth) in enumerate(zip(given, ("yes", "no", "no", "yes"))):
            extra = {"instance": instance, "row_id": str(4 * instance + i)}
            rows.append(row("timeblind", answer, truth, "free-form", "yes_no", **extra))
    return rows


def test_timeblind_counts_instances_with_four_right_answers():
    """Guards: the accuracy of single answers, which is 50 % for a model that always says yes."""
    rows = timeblind_rows([["Yes.", "no", "No, he runs.", "yes"], ["yes"] * 4, ["yes", "no", "no", "yes or no"]])
    part = benchmark_scores(rows)["timeblind"]
    assert (part["score"], part["instances"], part["n"]) == (pytest.approx(100 / 3), 3, 12)
    assert part["accuracy"] == pytest.approx(100 * 9 / 12) and part["unparsed"] == pytest.approx(1 / 12)
    # an instance whose answers are not complete is wrong
    assert benchmark_scores(rows[:3])["timeblind"]["score"] == 0
    letter = row("timeblind", "The answer is B.", "B", "free-form", "multiple_choice", instance=0)
    assert score_answer(letter) == (1.0, True)


def test_without_files_the_message_names_them(tmp_path):
    """Guards: a traceback instead of what was looked for."""
    with pytest.raises(UserError, match="looked for validation.json$"):
        load_benchmark("mmvu", tmp_path)


# ----------------------------------------------------------------------------------------------------- one answer


def row(benchmark, prediction, truth, kind="multiple choice", task="t", row_id="1", **extra):
    return {
        "benchmark": benchmark,
        "id": row_id,
        "prediction": prediction,
        "solution": f"<answer>{truth}</answer>",
        "problem_type": kind,
        "options": [],
        "task": task,
        **extra,
    }


@pytest.mark.parametrize(
    "answer, predictions",
    [
        ("B", ["<think>A</think>\n<answer> B </answer>", " B\n"]),
        ("", ["", None, "<answer></answer>", "<think>it is B", "<think>B</think>", "<answer>B"]),
    ],
)
def test_the_answer_in_a_prediction(answer, predictions):
    """Guards: an unfinished chain of thought read as an answer; an answer without tags read as none."""
    assert [answer_of(prediction) for prediction in predictions] == [answer] * len(predictions)


@pytest.mark.parametrize(
    "score, truth, predictions",
    [
        (1.0, 4, ["4", "3.8", "<answer>4 chairs in the room</answer>"]),
        (0.6, 4, ["3"]),
        (0.1, 4, ["6"]),
        (0.1, 2, ["3"]),
        (0.0, 4, ["0", "four", "nan", ""]),
    ],
)
def test_vsi_numbers_and_ties(score, truth, predictions):
    """Guards: the rule for ties: |3-2|/2 = .5 counts for t = .50 (<=), with < it is 0; |3-4|/4 = .25 counts six times,
    with < five.
    """
    for prediction in predictions:
        assert score_prediction(row("vsibench", prediction, truth, "regression", "object_counting")) == score


@pytest.mark.parametrize("benchmark", ["vsibench", "mvbench", "mmvu", "videomme", "videommmu", "mine"])
def test_letters(benchmark):
    """Guards: MVBench's official rule, by which an empty answer is correct; Video-MME's, which reads A in After."""
    for prediction in ("B", "b", "(B) left", "<answer>B.</answer>"):
        assert score_prediction(row(benchmark, prediction, "B", task="object_rel_distance")) == 1
    for prediction in ("A", "A or B", "", None, "After B"):
        assert score_prediction(row(benchmark, prediction, "B", task="object_rel_distance")) == 0


OPTION = "Option 2: It flies."


@pytest.mark.parametrize(
    "form, truth, right, wrong, unread",
    [
        ("multi-choice", "B", ["B", "B. it flies", "B) it"], ["A."], ["(B)", "b", "Because"]),
        ("yes_no", "yes", ["Yes, it does"], ["no"], ["It does"]),
        ("yes_no", "no", ["no.", "Not sure"], ["yes"], ["It does not", ""]),
        ("caption_matching", OPTION, [OPTION, "It flies.", "Option 2", "2.", "2) It flies."], ["1", "Option 1"], []),
        ("caption_matching", OPTION, [], [], ["option 2", "(2)", "neither"]),
        ("caption_matching", "Caption B: It flies.", ["B"], [], []),
    ],
)
def test_tempcompass_rules(form, truth, right, wrong, unread):
    """Guards: rules that are more lenient than the official ones (case, brackets), or ROUGE instead of them; a wrong
    answer counted as unreadable.
    """
    kind = "multiple choice" if form == "multi-choice" else "free-form"
    problem = "Which caption fits?\nOption 1: It falls.\nOption 2: It flies.\nCaption B: It flies."
    for predictions, result in ((right, (1, True)), (wrong, (0, True)), (unread, (0, False))):
        for prediction in predictions:
            assert score_answer(row("tempcompass", prediction, truth, kind, form, problem=problem)) == result


@pytest.mark.parametrize(
    "truth, right, wrong",
    [
        ("3.5", ["3.5", "The answer is 3.5", "3.504"], ["3.51"]),
        ("5", ["4, not 5"], []),
        ("0.3", ["so .3 apples"], [".3"]),
        ("1000", ["1,000", "1e3 m"], []),
        ("12", ["x = 12"], []),
        ("2", [], ["12"]),
        ("4", [], ["-4", "", "nan"]),
        ("D", ["D", "it is D"], ["Dog"]),
        ("['3.429']", ["3.43"], ["7"]),
    ],
)
def test_mmmu_open_rule(truth, right, wrong):
    """Guards: open answers scored as strictly as letters; a number found inside another one."""
    kind = "numerical" if truth.replace(".", "").isdigit() else "free-form"
    for answer in right + wrong:
        assert score_prediction(row("videommmu", answer, truth, kind, "Adaptation")) == (answer in right)


@pytest.mark.parametrize(
    "kind, answer, truth",
    [("free-form", "a red cat", "the red cat"), ("regression", "3", "4"), ("OCR", "EXIT", "EXIT now")],
)
def test_other_benchmarks_are_scored_as_in_training(kind, answer, truth):
    """Guards: an accuracy that differs from that of rewards.py."""
    want = accuracy_reward(f"<answer>{answer}</answer>", f"<answer>{truth}</answer>", kind)
    assert 0 < want < 1 and score_prediction(row("mine", answer, truth, kind)) == want


# -------------------------------------------------------------------------------------------------------- summaries


def rows_of(benchmark, plan):
    """Rows of {task: [right or wrong]}, letters: B is right."""
    return [
        row(benchmark, "B" if right else "A", "B", task=task, row_id=f"{task}/{i}")
        for task, marks in plan.items()
        for i, right in enumerate(marks)
    ]


def test_vsi_is_the_mean_of_eight_tasks_and_nothing_else():
    """Guards: the mean over questions, ten question types instead of eight tasks, or Video-R1's mean of two."""
    plan = {
        "object_rel_distance": [1] * 4,
        "object_rel_direction_easy": [1],
        "object_rel_direction_medium": [0, 0],
        "object_rel_direction_hard": [0],
        "route_planning": [0, 1],
        "obj_appearance_order": [1],
    }
    rows = rows_of("vsibench", plan)
    # their scores are .6, 1, 0, and .1
    guesses = {"object_counting": 3, "object_abs_distance": 4, "object_size_estimation": "x", "room_size_estimation": 2}
    rows += [row("vsibench", str(guess), 4, "regression", task, task) for task, guess in guesses.items()]
    summary = benchmark_scores(rows)["vsibench"]
    # over all questions it would be 58.0, over ten types 52.0
    assert summary["score"] == pytest.approx((100 + 100 / 3 + 50 + 100 + 60 + 100 + 0 + 10) / 8)
    assert summary["score_video_r1"] == pytest.approx((100 * 7 / 11 + 100 * 1.7 / 4) / 2)
    assert (summary["n"], summary["tasks"], summary["answered"], summary["unparsed"]) == (15, 8, 15, 1 / 15)
    assert summary["by_task"]["object_rel_direction_medium"] == {"score": 0, "se": 0, "n": 2}


def test_vsi_subset_and_its_standard_error():
    """Guards: a KeyError if a direction level is absent (lmms-eval); a standard error of the pooled answers."""
    summary = benchmark_scores(
        rows_of("vsibench", {"object_rel_direction_hard": [1, 0], "route_planning": [1, 1, 0, 0]})
    )["vsibench"]
    # hard: 50 ± 50; route: 50 ± 57.7/2 = 28.87
    assert summary["score"] == 50 and summary["tasks"] == 2 and summary["score_video_r1"] is None
    assert summary["se"] == pytest.approx(math.sqrt(50**2 + 28.8675**2) / 2, abs=1e-3)
    with pytest.raises(UserError, match="task: expected one of"):
        benchmark_scores(rows_of("vsibench", {"colour": [1]}))


def test_mvbench_is_correct_over_total():
    """Guards: the mean of tasks of unequal sizes; a wrong standard error of a share."""
    summary = benchmark_scores(rows_of("mvbench", {"state_change": [1, 1, 1], "action_count": [0]}))["mvbench"]
    assert (summary["score"], summary["n"], summary["clipped"]) == (75, 4, 0)
    # sd 50, over the root of 4
    assert summary["se"] == pytest.approx(25)
    assert summary["by_task"]["action_count"] == {"score": 0, "n": 1, "se": None}


def test_tempcompass_is_pooled_over_three_formats():
    """Guards: captioning in the score or its denominator; the mean of formats instead of the pooled share."""
    rows = [
        row("tempcompass", "B", "B", task="multi-choice", row_id="1", dim="speed"),
        row("tempcompass", "no", "yes", "free-form", "yes_no", "2", dim="speed"),
        row("tempcompass", "yes", "yes", "free-form", "yes_no", "3", dim="order"),
        row("tempcompass", "1", "Option 1: x", "free-form", "caption_matching", "4", dim="order"),
        row("tempcompass", "It flies.", "B. it flies", "free-form", "captioning", "5", dim="order"),
    ]
    summary = benchmark_scores(rows)["tempcompass"]
    assert (summary["score"], summary["n"], summary["unscored"]) == (75, 4, ["5"]) and "captioning" in summary["note"]
    assert [part["score"] for part in summary["by_task"].values()] == [100, 100, 50]
    assert [part["score"] for part in summary["by_dim"].values()] == [100, 50]
    assert summary["by_task"]["yes_no"]["by_dim"]["speed"]["score"] == 0


def test_videommmu_is_the_mean_of_its_tracks():
    """Guards: the mean over questions, of which a track may have more; a track that a file does not name, left out."""
    plan = {"Perception": [1, 1], "Comprehension": [1, 0, 0, 0], "Adaptation": [1, 1, 0, 0]}
    summary = benchmark_scores(rows_of("videommmu", plan))["videommmu"]
    assert (summary["score"], summary["n"]) == (pytest.approx((100 + 25 + 50) / 3), 10)
    summary = benchmark_scores(rows_of("videommmu", plan | {"lectures": [1, 1]}))["videommmu"]
    assert (summary["score"], summary["n"]) == (pytest.approx(100 * 7 / 12), 12)


def test_videomme_breakdowns():
    """Guards: a breakdown by the wrong key."""
    rows = rows_of("videomme", {"Counting": [1, 0], "OCR": [1]})
    for answer, duration, kind in zip(rows, ("short", "long", "long"), "xxy"):
        answer |= {"duration": duration, "domain": "Sports", "sub_category": kind}
    summary = benchmark_scores(rows)["videomme"]
    expected = {
        "by_task": {"Counting": 50, "OCR": 100},
        "by_duration": {"short": 100, "long": 50},
        "by_domain": {"Sports": pytest.approx(200 / 3)},
        "by_sub_category": {"x": 50, "y": 100},
    }
    for key, scores in expected.items():
        assert {name: part["score"] for name, part in summary[key].items()} == scores


def test_answers_are_counted_as_cut_off_and_as_read_leniently(capsys):
    """Guards: a score that hides that half of the answers were cut off, or that other harnesses could not read them;
    empty or unreadable answers that are dropped (Video-MME, VideoMMMU, lmms-eval's MVBench); an unanswered question
    that counts as wrong or is not counted.
    """
    # written as asked, read leniently (two), and unread (five)
    texts = ["<think>x</think><answer>B</answer>", "<answer>(B)</answer>", "B"]
    texts += ["<answer>A or B</answer>", "hard to say", "", None, "<think>B"]
    rows = [row("mvbench", text, "B", row_id=i, truncated=text == "<think>B") for i, text in enumerate(texts)]
    summary = benchmark_scores([*rows, {"benchmark": "mvbench", "id": 9, "error": "cannot be read"}])
    part = summary["mvbench"]
    assert (part["score"], part["n"], part["answered"], part["unusable"]) == (37.5, 8, 5, ["9"])
    assert (part["lenient"], part["unparsed"], part["truncated"]) == (0.25, 0.625, 0.125)
    print_table(summary)
    assert re.search(r"\| mvbench +\| +8 \| +62.5% +\| +25.0% \| +12.5% \| +1 \|", capsys.readouterr().out)


@pytest.mark.parametrize(
    "text, strict", [("4.0", False), ("4", False), ("<answer>4.5</answer>", True), ("<answer>4 m</answer>", False)]
)
def test_a_number_is_written_as_asked_between_tags_and_alone(text, strict):
    """Guards: numbers that a harness which compares strings could not read, counted as strict."""
    assert is_strict(row("mine", text, "4", "numerical")) == strict


# --------------------------------------------------------------------------------------------------- join and table


def test_join_fills_bare_rows():
    """Guards: bare rows scored with another question's solution; unknown ids that are ignored."""
    # what a row has wins
    bare = {"benchmark": "vsibench", "id": 0, "prediction": "3", "data_source": "mine"}
    by_track = {"benchmark": "videommmu", "id": "validation_Math_15", "task": "Adaptation", "prediction": "1"}
    whole = row("mine", "B", "B")
    first, second, third = join_annotations([bare, by_track, whole], ANNOTATIONS)
    assert fields(first, "prediction data_source task") == ["3", "mine", "object_counting"]
    assert fields(second, "id solution") == ["validation_Math_15", "<answer>3.5</answer>"] and third == whole
    with pytest.raises(UserError, match="2 predictions are of no question in .*: vsibench 77, vsibench 'x'"):
        join_annotations([bare, {**bare, "id": 77}, {**bare, "id": "x"}], ANNOTATIONS)
    with pytest.raises(UserError, match="no benchmark 'None': vsibench"):
        join_annotations([{**bare, "benchmark": "mine"}, {"id": 2}], ANNOTATIONS)


def test_table_marks_published_scores(capsys):
    """Guards: published numbers without a label; a table that fails for an empty or unknown benchmark."""
    rows = rows_of("vsibench", {"route_planning": [1, 0]}) + rows_of("mine", {"t": [1]})
    rows.append(row("mmvu", "x", "y", "free-form", "Physics"))
    print_table(benchmark_scores(rows))
    out = capsys.readouterr().out
    assert "published" in out.splitlines()[0]
    for text in ("34.6/35.8/37.1", "1 of 8 tasks", "1 unscored"):
        assert text in out
    line = next(line for line in out.splitlines() if line.startswith("| vsibench"))
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["2", "50.0 ± 50.0"]


# --------------------------------------------------------------------------------------------------- orders of frames


def both_orders(benchmark, marks, **extra):
    """Rows of {(task, clip): (right in order, right shuffled)}, one per question, letters: B is right."""
    rows = []
    for number, ((task, clip), pair) in enumerate(marks.items()):
        for order, right in zip(("ordered", "shuffled"), pair):
            fields = {"task": task, "row_id": f"{task}/{number}", "path": clip, "frames": order}
            rows.append(row(benchmark, "B" if right else "A", "B", **fields, **extra))
    return rows


def test_difference_between_orders_computed_by_hand():
    """Guards: accuracies of different questions that are subtracted; open answers that are counted."""
    marks = {("order", "a"): (1, 0), ("order", "b"): (1, 0), ("colour", "c"): (1, 1), ("colour", "d"): (0, 0)}
    # shown in order only: not in a pair
    alone = row("mvbench", "A", "B", task="order", row_id="alone", frames="ordered")
    part = summarise([*both_orders("mvbench", marks), alone])["mvbench"]
    shuffled = part["orders"]["shuffled"]
    assert (part["score"], part["n"], shuffled["score"], part["frames"]) == (60, 5, 25, "ordered")
    difference = shuffled["difference"]
    assert (difference["mean"], difference["n"], difference["clips"]) == (-50, 4, 4)
    # each clip deviates by ± 50 from the mean: the standard error is sqrt(4 / 3 · 4 · 50² / 4²)
    assert difference["low"] == pytest.approx(-50 - 1.96 * 28.8675, abs=1e-3)
    assert difference["high"] == pytest.approx(-50 + 1.96 * 28.8675, abs=1e-3)
    assert difference["by_task"]["order"] == {"mean": -100, "low": -100, "high": -100, "n": 2, "clips": 2}
    assert difference["by_task"]["colour"]["mean"] == 0
    orders = ("ordered", "shuffled")
    open_ended = [row("mmvu", "heat", "heat", "free-form", "Physics", "o", frames=order) for order in orders]
    assert summarise(open_ended)["mmvu"]["orders"]["shuffled"]["difference"] is None


def test_the_table_of_orders_has_scores_and_differences(capsys):
    """Guards: a difference in the column of another order, or of another task; an order that was not asked as 0; a
    difference that looks wrong, as nothing says that it is over fewer questions than a column; two clips that agree as
    certainty.
    """
    rows = both_orders("mvbench", {("order", "a"): (1, 0), ("colour", "b"): (1, 1), ("order", "c"): (1, 0)})
    print_orders(summarise([*rows, row("mine", "B", "B", frames="ordered"), row("mine", "A", "B", frames="blind")]))
    lines = capsys.readouterr().out.splitlines()
    assert "over the questions asked in both orders (pictures are asked in order and blind only)" in lines[-1]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[3:7]]
    assert table == [
        ["mvbench", "100.0", "33.3 (-66.7, -132.0 to -1.3)", ""],
        ["colour", "100.0", "100.0 (+0.0, –)", ""],
        ["order", "100.0", "0.0 (-100.0, –)", ""],
        ["mine", "100.0", "", "0.0 (-100.0, –)"],
    ]


def test_the_interval_of_the_gap_is_paired_and_clustered_by_clip():
    """Guards: an interval for independent samples (too wide), or for independent questions on one clip (too narrow)."""
    rng = np.random.default_rng(0)
    differences = rng.choice([-1.0, 0.0, 0.0, 1.0], size=400)
    alone = clustered_mean(list(zip(differences, range(400))))
    assert alone["high"] - alone["low"] == pytest.approx(2 * 1.96 * differences.std() / 20, rel=0.01)
    # four questions on a clip that all have the same answer are worth one
    fours = clustered_mean(list(zip(np.repeat(differences, 4), np.repeat(np.arange(400), 4))))
    assert fours["high"] - fours["low"] == pytest.approx(alone["high"] - alone["low"], rel=1e-6)
    # of clips drawn again (bootstrap)
    drawn = [rng.choice(differences, size=400).mean() for _ in range(2000)]
    assert [alone["low"], alone["high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)


def test_scores_of_shuffled_frames_are_labelled():
    """Guards: a score of shuffled frames without a label, or one that is lost beside another benchmark."""
    rows = [*both_orders("mvbench", {("t", "a"): (1, 0)}), row("mine", "B", "B", frames="shuffled")]
    # a question whose media are missing was not asked in order either
    gone = {"benchmark": "mine", "id": "gone", "error": "no file"}
    for extra, unusable in (([], []), ([gone], ["gone"])):
        part = summarise(rows + extra)["mine"]
        assert (part["frames"], part["score"], part["n"], part["orders"]) == ("shuffled", 100, 1, {})
        assert part["unusable"] == unusable


# ------------------------------------------------------------------------------------------------------ saved answers


def test_scoring_loads_no_torch(tmp_path):
    """Guards: slow imports before a second of work."""
    file = tmp_path / "predictions.jsonl"
    write(file, [row("mvbench", "<think>x</think><answer>B</answer>", "B", row_id=i) for i in range(3000)])
    program = (
        f"import sys, runpy; sys.argv = ['score', {str(file)!r}]; "
        "runpy.run_module('benchmarks.score', run_name='__main__'); "
        "heavy = {'torch', 'transformers', 'decord', 'PIL', 'accelerate', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    part = json.loads((tmp_path / "summary.json").read_text())["mvbench"]
    assert (part["score"], part["n"]) == (100, 3000)


def test_bare_answers_are_joined_with_the_official_files(tmp_path, capsys):
    """Guards: a join by position; other scores than for rows that have their solutions."""
    full = []
    for name in N_QUESTIONS:
        for number, record in enumerate(load_benchmark(name, ANNOTATIONS)):
            full.append({**record, "prediction": record["solution"] if number % 2 else "A"})
    bare = [{key: answer[key] for key in ("benchmark", "id", "prediction")} for answer in reversed(full)]
    empty = [{**answer, "solution": "", "options": None} for answer in full]
    summaries = {}
    for name, rows in (("full", full), ("bare", bare), ("empty", empty)):
        write(tmp_path / name / "predictions.jsonl", rows)
        joined = ["--annotations", str(ANNOTATIONS)] if name != "full" else []
        main([str(tmp_path / name / "predictions.jsonl"), *joined])
        summaries[name] = json.loads((tmp_path / name / "summary.json").read_text())
    # the ids of MMVU's open questions are listed in the order of the rows
    assert summaries["full"] == summaries["empty"] == summaries["bare"] | {"mmvu": summaries["full"]["mmvu"]}
    assert len(summaries["full"]) == len(N_QUESTIONS) and capsys.readouterr().out.count("published scores:") == 3


GOOD = row("mvbench", "B", "B", row_id="x")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "predictions.jsonl: cannot read"),
        ("", "no records in this file"),
        (b"\xe9\xff\n", "not UTF-8"),
        ([GOOD | {"id": 1}, GOOD | {"id": "1"}], "row 2: mvbench '1' is used twice, first in row 1"),
        ([GOOD, 3, GOOD | {"task": 3}], "row 2: expected a prediction, got 3\n  row 3: task: expected text, got 3"),
        ([GOOD | {"benchmark": ["a"]}], "benchmark: expected text"),
        ([GOOD | {"prediction": {"a": 1}}], "prediction: expected text"),
        ([GOOD | {"options": 5}], "options: expected a list"),
        ([GOOD | {"frames": "sideways"}], "frames: expected one of ordered, shuffled, reversed, single, blind"),
        ([GOOD | {"problem_type": "maths"}], "problem_type: expected one of"),
        ([GOOD | {"solution": "<answer>B"}], "no answer in"),
        ([{"benchmark": "mvbench", "id": 1, "prediction": "B"}], "join the official files with --annotations"),
        ([{k: v for k, v in GOOD.items() if k != "id"}], "id: missing"),
        ([GOOD | {"frames": order} for order in ("ordered", "blind", "blind")], "row 3: mvbench 'x' is used twice"),
    ],
)
def test_bad_prediction_files_are_one_clear_error(tmp_path, content, message):
    """Guards: a traceback; a row that is silently dropped or counted twice; wrong row numbers."""
    file = tmp_path / "predictions.jsonl"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, str):
        file.write_text(content)
    elif content:
        write(file, content)
    with pytest.raises(UserError) as error:
        main([str(file)])
    assert message in str(error.value) and not (tmp_path / "summary.json").exists()
