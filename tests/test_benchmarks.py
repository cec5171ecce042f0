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
from benchmarks.videommmu import mmmu_open
from rewards import accuracy_reward, parse_solution
from support.record_files import check_record
from support.settings import UserError

ROOT = Path(__file__).parent.parent
ANNOTATIONS = Path(__file__).parent / "annotations"
# questions of each benchmark in annotations/, without VideoMMMU's question-only ones
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
    return {
        name: score_benchmark(name, [r for r in scored if r["benchmark"] == name]) for name in benchmarks_in(scored)
    }


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


def test_vsibench_types_and_paths():
    """Guards: numbers asked as letters; media in the wrong folder."""
    number, letter = load_benchmark("vsibench", ANNOTATIONS)
    path = "vsibench/scannet/scene0999_00.mp4"
    assert fields(number, "id problem_type options path") == ["0", "regression", [], path]
    assert fields(letter, "task problem_type") == ["object_rel_direction_hard", "multiple choice"]
    assert fields(letter, "solution path") == ["<answer>C</answer>", "vsibench/arkitscenes/777.mp4"]


def test_mvbench_letters_clips_and_folders():
    """Guards: the answer's text used as its letter; whole videos instead of their parts."""
    sequence, single, frames = load_benchmark("mvbench", ANNOTATIONS)
    assert fields(sequence, "id task") == ["action_sequence/0", "action_sequence"]
    assert fields(sequence, "options solution") == [["A. He sat.", "B. He ran."], "<answer>B</answer>"]
    assert fields(sequence, "start end path") == [1.5, 9.0, "mvbench/video/star/Charades_v1_480/AB9CD.mp4"]
    assert single["options"] == ["A. only this"] and "start" not in single
    assert (frames["data_type"], frames["path"]) == ("frame", "mvbench/video/tvqa/frames_fps3_hq/show_s01")
    whole = load_benchmark("mvbench", ANNOTATIONS, clip_segments=False)
    assert not any("start" in r or "end" in r for r in whole)


def test_tempcompass_formats():
    """Guards: captioning scored without a judge model; options asked twice; two questions with one id."""
    records = load_benchmark("tempcompass", ANNOTATIONS)
    assert [r["id"] for r in records] == [
        "multi-choice/11/action/0",
        "multi-choice/11/speed/0",
        "yes_no/11/action/0",
        "yes_no/11/action/1",
        "caption_matching/11/order/0",
    ]
    choice, _, yes, _, caption = records
    assert fields(choice, "problem options") == ["What happens?", ["A. it falls", "B. it flies"]]
    assert fields(choice, "solution dim path") == ["<answer>B</answer>", "action", "tempcompass/videos/11.mp4"]
    assert (yes["problem_type"], yes["options"], yes["solution"]) == ("free-form", [], "<answer>yes</answer>")
    assert "Option 1: It falls." in caption["problem"] and caption["solution"] == "<answer>Option 2: It flies.</answer>"


def test_videommmu_tracks_and_question_image(root):
    """Guards: options without letters; one id for three tracks; a question image lost in sampling."""
    records = {r["id"]: r for r in load_benchmark("videommmu", root)}
    assert records["Perception/validation_Biology_901"]["options"] == ["A. a root", "B. a leaf"]
    assert records["Comprehension/validation_Biology_901"]["solution"] == "<answer>N</answer>"
    art = records["Adaptation/validation_Art_Theory_7"]
    maths = records["Adaptation/validation_Math_15"]
    assert (art["path"], art["last_frame"]) == ("videommmu/Art/validation_Art_Theory_7.mp4", True)
    assert (maths["path"], maths["problem_type"]) == ("videommmu/Science/validation_Math_15.mp4", "numerical")
    assert "last_frame" not in records["Perception/validation_Biology_901"]
    (root / "videommmu/question_only").mkdir()
    only = [r for r in load_benchmark("videommmu", root) if r["task"] == "question_only"]
    assert [r["path"] for r in only] == [
        "videommmu/question_only/validation_Art_Theory_7_image.mp4",
        "videommmu/question_only/validation_Math_15_image.mp4",
    ]


def test_videommmu_question_image_given_as_a_file(root):
    """Guards: an image file of the annotation that is not appended."""
    touch(root / "videommmu/images/q.png")
    table = read("videommmu/data/adaptation_video.json")
    table["Adaptation"]["0"]["image"] = "images/q.png"
    write(root / "videommmu/data/adaptation_video.json", table)
    record = load_benchmark("videommmu", root)[2]
    assert record["image_path"] == "videommmu/images/q.png" and "last_frame" not in record


def test_mmvu_and_videomme(root):
    """Guards: open questions scored as letters; missing group keys; .MP4 and .mkv files that are not found."""
    choice, open_ended = load_benchmark("mmvu", root)
    assert fields(choice, "solution task path") == ["<answer>E</answer>", "Physics", "mmvu/videos/Physics/3.mp4"]
    assert choice["options"][4] == "E. all"
    assert fields(open_ended, "problem_type options") == ["free-form", []]
    touch(root / "videomme/data/yt2.mkv")
    first, second = load_benchmark("videomme", root)
    assert (first["path"], second["path"]) == ("videomme/data/yt1.mp4", "videomme/data/yt2.mkv")
    assert fields(first, "task duration domain sub_category") == ["Counting", "short", "Sports", "Tennis"]


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


def test_video_r1_eval_json_is_read_without_official_files(tmp_path):
    """Guards: null options; paths without their folder."""
    shared = {"problem": "Which?", "data_type": "frame", "path": "./Evaluation/MVBench/a", "process": ""}
    letter = {"problem_type": "multiple choice", "original_question_type": "episodic_reasoning"}
    letter |= {"problem_id": 1, "options": ["A. x", "B. y"], "solution": "<answer>B</answer>"}
    number = {"problem_type": "numerical", "problem_id": 2, "options": None, "solution": "<answer>3.0</answer>"}
    write(tmp_path / "eval_mvbench.json", [shared | letter, shared | number])
    first, second = load_benchmark("mvbench", tmp_path)
    assert (first["id"], first["task"], first["path"]) == ("1", "episodic_reasoning", "Evaluation/MVBench/a")
    assert second["options"] == []


@pytest.mark.parametrize(
    "name, file, change, message",
    [
        ("vsibench", "test.jsonl", {"question_type": "colour"}, "question_type: expected one of"),
        ("vsibench", "test.jsonl", {"ground_truth": "many"}, "solution: not a number"),
        ("vsibench", "test.jsonl", {"scene_name": None}, "scene_name: missing"),
        ("vsibench", "test.jsonl", {"scene_name": "../../../up"}, "leaves the data root"),
        ("mvbench", "json/action_sequence.json", {"answer": "He flew."}, "answer: expected one of He sat."),
        ("mvbench", "json/action_sequence.json", {"start": "soon"}, "could not convert"),
        ("mmvu", "validation.json", {"answer": "F"}, "answer F is not among the options"),
        ("mmvu", "validation.json", {"choices": ["x"]}, "list"),
        ("videomme", "test.jsonl", {"duration": ""}, "duration: missing"),
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


def test_records_of_the_benchmarks_made_for_time():
    """Guards: an answer that is one option off; videos of MVBench's folders; a pair that is taken apart."""
    localization, direction = load_benchmark("tvbench", ANNOTATIONS)
    assert fields(direction, "path solution") == ["tvbench/video/moving_direction/m1.mp4", "<answer>B</answer>"]
    assert (localization["start"], localization["end"], localization["id"]) == (1.0, 9.0, "action_localization/0")
    (shape,) = load_benchmark("tomato", ANNOTATIONS)
    assert (shape["id"], shape["task"], shape["solution"]) == ("shape&trend/40", "shape&trend", "<answer>B</answer>")
    assert (shape["path"], shape["options"][1]) == ("tomato/videos/human/0215-06.mp4", "B. A square.")
    blind = load_benchmark("timeblind", ANNOTATIONS)
    assert [record["path"] for record in blind] == [f"timeblind/videos/vid_0_{i % 2}.mp4" for i in range(4)]
    answers = [record["solution"] for record in blind]
    assert answers == [f"<answer>{answer}</answer>" for answer in ("yes", "no", "B", "A")]
    assert {record["instance"] for record in blind} == {0} and blind[0]["problem"].endswith("Answer yes or no.")
    (film,) = load_benchmark("videoholmes", ANNOTATIONS)
    assert (film["id"], film["task"], film["path"]) == ("dGS48/3", "SR", "videoholmes/videos_cropped/dGS48.mp4")
    assert film["options"] == ["A. a brother", "B. a thief", "C. nobody"]
    # the files of VSI-Bench and of its debiased part lie in one folder
    (debiased,) = load_benchmark("vsibench_debiased", ANNOTATIONS)
    assert (debiased["path"], debiased["benchmark"]) == ("vsibench/arkitscenes/777.mp4", "vsibench_debiased")


DIRECTION = read("tvbench/json/moving_direction.json")[0]
SHAPE = read("tomato/data/shape&trend.json")["40"]
PAIR = read("timeblind/data.jsonl")[0]
FILM = read("videoholmes/test_Video-Holmes.json")[0]


@pytest.mark.parametrize(
    "name, file, content, message",
    [
        ("tvbench", "json/moving_count.json", [DIRECTION], "task: expected one of action_antonym"),
        ("tvbench", "json/moving_direction.json", [DIRECTION | {"answer": "x"}], "answer: expected one of"),
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


@pytest.mark.parametrize(
    "name, message",
    [("mmvu", "looked for validation.json, eval_mmvu.json"), ("activitynet", "no benchmark 'activitynet'")],
)
def test_without_files_the_message_names_them(tmp_path, name, message):
    """Guards: a traceback instead of what was looked for."""
    with pytest.raises(UserError, match=message):
        load_benchmark(name, tmp_path)


def test_missing_media_are_listed_once(root):
    """Guards: a score over fewer videos than stated."""
    records = load_benchmark("videomme", root)
    touch(root / "videomme/data/yt1.mp4")
    assert missing_media(records + records, root) == ["videomme/data/yt2.mp4"]


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
    "prediction, answer",
    [
        ("<think>A</think>\n<answer> B </answer>", "B"),
        (" B\n", "B"),
        ("3.5", "3.5"),
        ("", ""),
        (None, ""),
        ("<answer></answer>", ""),
        ("<think>it is B", ""),
        ("<think>B</think>", ""),
        ("<answer>B", ""),
    ],
)
def test_the_answer_in_a_prediction(prediction, answer):
    """Guards: an unfinished chain of thought read as an answer; an answer without tags read as none."""
    assert answer_of(prediction) == answer


@pytest.mark.parametrize(
    "prediction, truth, score",
    [
        ("3", 4, 0.6),
        ("3", 2, 0.1),
        ("4", 4, 1.0),
        ("<answer>4 chairs in the room</answer>", 4, 1.0),
        ("four", 4, 0.0),
        ("nan", 4, 0.0),
        ("", 4, 0.0),
        ("0", 4, 0.0),
        ("6", 4, 0.1),
        ("3.8", 4, 1.0),
    ],
)
def test_vsi_numbers_and_ties(prediction, truth, score):
    """Guards: the rule for ties: |3-2|/2 = .5 counts for t = .50 (<=), with < it is 0; |3-4|/4 = .25 counts six times,
    with < five.
    """
    assert score_prediction(row("vsibench", prediction, truth, "regression", "object_counting")) == score


@pytest.mark.parametrize("benchmark", ["vsibench", "mvbench", "mmvu", "videomme", "videommmu", "mine"])
@pytest.mark.parametrize(
    "prediction, score",
    [
        ("B", 1),
        ("b", 1),
        ("(B) left", 1),
        ("<answer>B.</answer>", 1),
        ("A", 0),
        ("A or B", 0),
        ("", 0),
        (None, 0),
        ("After B", 0),
    ],
)
def test_letters(benchmark, prediction, score):
    """Guards: MVBench's official rule, by which an empty answer is correct; Video-MME's, which reads A in After."""
    assert score_prediction(row(benchmark, prediction, "B", task="object_rel_distance")) == score


@pytest.mark.parametrize(
    "form, prediction, truth, score",
    [
        ("multi-choice", "B", "B", 1),
        ("multi-choice", "B. it flies", "B", 1),
        ("multi-choice", "B) it", "B", 1),
        ("multi-choice", "(B)", "B", 0),
        ("multi-choice", "b", "B", 0),
        ("multi-choice", "Because", "B", 0),
        ("multi-choice", "A.", "B", 0),
        ("yes_no", "Yes, it does", "yes", 1),
        ("yes_no", "no.", "no", 1),
        ("yes_no", "Not sure", "no", 1),
        ("yes_no", "It does", "yes", 0),
        ("yes_no", "It does not", "no", 0),
        ("yes_no", "", "no", 0),
        ("caption_matching", "Option 2: It flies.", "Option 2: It flies.", 1),
        ("caption_matching", "It flies.", "Option 2: It flies.", 1),
        ("caption_matching", "Option 2", "Option 2: It flies.", 1),
        ("caption_matching", "2.", "Option 2: It flies.", 1),
        ("caption_matching", "B", "Caption B: It flies.", 1),
        ("caption_matching", "2) It flies.", "Option 2: It flies.", 1),
        ("caption_matching", "option 2", "Option 2: It flies.", 0),
        ("caption_matching", "(2)", "Option 2: It flies.", 0),
        ("caption_matching", "1", "Option 2: It flies.", 0),
        ("caption_matching", "Option 1", "Option 2: It flies.", 0),
    ],
)
def test_tempcompass_rules(form, prediction, truth, score):
    """Guards: rules that are more lenient than the official ones (case, brackets), or ROUGE instead of them."""
    kind = "multiple choice" if form == "multi-choice" else "free-form"
    assert score_prediction(row("tempcompass", prediction, truth, kind, form)) == score


@pytest.mark.parametrize(
    "answer, truth, score",
    [
        ("3.5", "3.5", 1),
        ("The answer is 3.5", "3.5", 1),
        ("4, not 5", "5", 1),
        ("3.504", "3.5", 1),
        ("3.51", "3.5", 0),
        (".3", "0.3", 0),
        ("so .3 apples", "0.3", 1),
        ("1,000", "1000", 1),
        ("x = 12", "12", 1),
        ("1e3 m", "1000", 1),
        ("-4", "4", 0),
        ("", "4", 0),
        ("D", "D", 1),
        ("Dog", "D", 0),
        ("it is D", "D", 1),
        ("3.43", "['3.429']", 1),
        ("7", "['3.429']", 0),
        ("nan", "4", 0),
        ("12", "2", 0),
    ],
)
def test_mmmu_open_rule(answer, truth, score):
    """Guards: open answers scored as strictly as letters; a number found inside another one."""
    assert mmmu_open(answer, truth) == score
    kind = "numerical" if truth.replace(".", "").isdigit() else "free-form"
    assert score_prediction(row("videommmu", answer, truth, kind, "Adaptation")) == score


def test_other_benchmarks_are_scored_as_in_training():
    """Guards: an accuracy that differs from that of rewards.py."""
    for kind, answer, truth in (
        ("free-form", "a red cat", "the red cat"),
        ("regression", "3", "4"),
        ("OCR", "EXIT", "EXIT now"),
    ):
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
    for task, guess in (
        ("object_counting", "3"),
        ("object_abs_distance", "4"),
        ("object_size_estimation", "x"),
        ("room_size_estimation", "2"),
    ):
        # .6, 1, 0, and .1
        rows.append(row("vsibench", guess, 4, "regression", task, task))
    summary = benchmark_scores(rows)["vsibench"]
    # 56.67
    assert summary["score"] == pytest.approx((100 + 100 / 3 + 50 + 100 + 60 + 100 + 0 + 10) / 8)
    micro = 100 * (7 + 1.7) / 15
    ten = (100 + 100 + 0 + 0 + 50 + 100 + 60 + 100 + 0 + 10) / 10
    assert abs(summary["score"] - micro) > 1 and abs(summary["score"] - ten) > 1
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
    assert summary["by_task"] == {
        "action_count": {"score": 0, "n": 1, "se": None},
        "state_change": {"score": 100, "n": 3, "se": 0},
    }


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
    assert {t: p["score"] for t, p in summary["by_task"].items()} == {
        "caption_matching": 100,
        "multi-choice": 100,
        "yes_no": 50,
    }
    assert {d: p["score"] for d, p in summary["by_dim"].items()} == {"order": 100, "speed": 50}
    assert summary["by_task"]["yes_no"]["by_dim"]["speed"]["score"] == 0


def test_videommmu_tracks_and_knowledge_gain():
    """Guards: question-only answers in the score; a gain in points instead of a share of what was left."""
    plan = {"Perception": [1, 1], "Comprehension": [1, 0, 0, 0], "Adaptation": [1, 1, 0, 0]}
    summary = benchmark_scores(rows_of("videommmu", plan))["videommmu"]
    assert (
        summary["score"] == pytest.approx((100 + 25 + 50) / 3)
        and summary["n"] == 10
        and "delta_knowledge" not in summary
    )
    for before, gain in (([1, 0, 0, 0, 0], 100 * (50 - 20) / 80), ([1, 1, 1, 0], -100.0), ([1], None)):
        summary = benchmark_scores(rows_of("videommmu", plan | {"question_only": before}))["videommmu"]
        assert summary["delta_knowledge"] == (gain if gain is None else pytest.approx(gain))
        assert summary["score"] == pytest.approx(175 / 3) and summary["n"] == 10


def test_knowledge_gain_has_a_standard_error():
    """Guards: a gain of 20 % without its error of 60."""
    # after 50 ± 28.87, before 25 ± 25
    rows = rows_of("videommmu", {"Adaptation": [1, 1, 0, 0], "question_only": [1, 0, 0, 0]})
    part = benchmark_scores(rows)["videommmu"]
    assert part["delta_knowledge"] == pytest.approx(100 * 25 / 75)
    assert part["se_delta_knowledge"] == pytest.approx(100 / 75 * math.hypot(28.8675, 25 * 50 / 75), abs=1e-3)


def test_mmvu_lists_open_questions_as_unscored():
    """Guards: open answers in the denominator or scored by ROUGE."""
    rows = rows_of("mmvu", {"Physics": [1, 0]}) + [row("mmvu", "friction", "friction", "free-form", "Physics", "open")]
    summary = benchmark_scores(rows)["mmvu"]
    assert (summary["score"], summary["n"], summary["unscored"]) == (
        50,
        2,
        ["open"],
    ) and "multiple choice only" in summary["note"]


def test_videomme_breakdowns():
    """Guards: a breakdown by the wrong key."""
    rows = [
        {**r, "duration": d, "domain": "Sports", "sub_category": s}
        for r, d, s in zip(rows_of("videomme", {"Counting": [1, 0], "OCR": [1]}), ("short", "long", "long"), "xxy")
    ]
    summary = benchmark_scores(rows)["videomme"]

    def scores(key):
        return {k: p["score"] for k, p in summary[key].items()}

    assert summary["score"] == pytest.approx(200 / 3) and scores("by_task") == {"Counting": 50, "OCR": 100}
    assert scores("by_duration") == {"short": 100, "long": 50} and scores("by_sub_category") == {"x": 50, "y": 100}
    assert summary["by_domain"]["Sports"]["n"] == 3


def test_empty_answers_stay_in_the_denominator():
    """Guards: empty or unreadable answers that are dropped (Video-MME, VideoMMMU, lmms-eval's MVBench)."""
    rows = [
        row("videomme", text, "B", row_id=str(i)) for i, text in enumerate(["B", "", None, "<think>B", "hard to say"])
    ]
    summary = benchmark_scores(rows)["videomme"]
    assert (summary["score"], summary["n"], summary["answered"], summary["unparsed"]) == (20, 5, 2, 0.8)


def test_answers_are_counted_as_cut_off_and_as_read_leniently(capsys):
    """Guards: a score that hides that half of the answers were cut off, or that other harnesses could not read them; an
    unanswered question that counts as wrong or is not counted.
    """
    texts = {
        "strict": "<think>x</think><answer>B</answer>",
        "bracket": "<answer>(B)</answer>",
        "bare": "B",
        "unread": "<answer>A or B</answer>",
    }
    rows = [row("mvbench", text, "B", row_id=name, truncated=name == "bare") for name, text in texts.items()]
    summary = benchmark_scores([*rows, {"benchmark": "mvbench", "id": 9, "error": "cannot be read"}])
    part = summary["mvbench"]
    assert (part["score"], part["n"], part["unusable"]) == (75, 4, ["9"])
    assert (part["lenient"], part["unparsed"], part["truncated"]) == (0.5, 0.25, 0.25)
    print_table(summary)
    assert re.search(r"\| mvbench +\| +4 \| +25.0% +\| +50.0% \| +25.0% \| +1 \|", capsys.readouterr().out)


@pytest.mark.parametrize(
    "text, strict", [("4.0", False), ("4", False), ("<answer>4.5</answer>", True), ("<answer>4 m</answer>", False)]
)
def test_a_number_is_written_as_asked_between_tags_and_alone(text, strict):
    """Guards: numbers that a harness which compares strings could not read, counted as strict."""
    assert is_strict(row("mine", text, "4", "numerical")) == strict


# --------------------------------------------------------------------------------------------------- join and table


def test_join_fills_bare_rows():
    """Guards: bare rows scored with another question's solution; unknown ids that are ignored."""
    bare = [
        # what a row has wins
        {"benchmark": "vsibench", "id": 0, "prediction": "3", "data_source": "mine"},
        {"benchmark": "tempcompass", "id": "yes_no/11/action/1", "prediction": "no"},
        {"benchmark": "videommmu", "id": "question_only/validation_Math_15", "prediction": "3.5"},
        {"benchmark": "videommmu", "id": "validation_Math_15", "task": "Adaptation", "prediction": "1"},
        {"benchmark": "mmvu", "id": "validation_1", "prediction": "friction"},
        row("mine", "B", "B"),
    ]
    joined = join_annotations(bare, ANNOTATIONS)
    assert joined[-1] == bare[-1]
    assert fields(joined[0], "prediction data_source task") == ["3", "mine", "object_counting"]
    summary = benchmark_scores(joined)
    assert {name: part["score"] for name, part in summary.items()} == {
        "vsibench": 60,
        "tempcompass": 100,
        "videommmu": 0,
        "mmvu": None,
        "mine": 100,
    }
    assert summary["videommmu"]["delta_knowledge"] is None and summary["mmvu"]["unscored"] == ["validation_1"]
    with pytest.raises(UserError, match="2 predictions are of no question in .*: vsibench 77, vsibench 'x'"):
        join_annotations([bare[0], {**bare[0], "id": 77}, {**bare[0], "id": "x"}], ANNOTATIONS)


def test_caption_answers_that_name_the_other_line_are_read():
    """Guards: a wrong answer counted as unreadable."""
    rows = [
        {"benchmark": "tempcompass", "id": "caption_matching/11/order/0", "prediction": text}
        for text in ("1", "neither")
    ]
    assert [benchmark_scores(join_annotations([r], ANNOTATIONS))["tempcompass"]["unparsed"] for r in rows] == [0, 1]


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
    assert benchmarks.PUBLISHED["GPT-4o"]["videomme"] == (71.9,)


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
    """Guards: accuracies of different questions that are subtracted; open answers and stills that are counted."""
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
    summary = summarise(open_ended + both_orders("videommmu", {("question_only", "q"): (1, 0)}))
    for name in ("mmvu", "videommmu"):
        assert summary[name]["orders"]["shuffled"]["difference"] is None


def test_the_table_of_orders_has_scores_and_differences(capsys):
    """Guards: a difference in the column of another order, or of another task; an order that was not asked as 0."""
    rows = both_orders("mvbench", {("order", "a"): (1, 0), ("colour", "b"): (1, 1)})
    print_orders(summarise([*rows, row("mine", "B", "B", frames="ordered"), row("mine", "A", "B", frames="blind")]))
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[3:7]]
    assert table == [
        ["mvbench", "100.0", "50.0 (-50.0, -148.0 to +48.0)", ""],
        ["colour", "100.0", "100.0 (+0.0)", ""],
        ["order", "100.0", "0.0 (-100.0)", ""],
        ["mine", "100.0", "", "0.0 (-100.0)"],
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


def test_bare_rows_of_an_unknown_benchmark_are_an_error():
    """Guards: a traceback, or a search in the files of another benchmark."""
    with pytest.raises(UserError, match="no benchmark 'None': vsibench"):
        join_annotations([{"benchmark": "mine", "id": 1, "prediction": "B"}, {"id": 2}], ANNOTATIONS)


GOOD = row("mvbench", "B", "B", row_id="x")


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no records in this file"),
        (b"\xe9\xff\n", "not UTF-8"),
        ('{"a": 1}\n{nope\n', "line 2: not JSON"),
        ("[" * 100_000, "not JSON"),
        ([GOOD, GOOD], "row 2: mvbench 'x' is used twice, first in row 1"),
        ([GOOD | {"id": 1}, GOOD | {"id": "1"}], "row 2: mvbench '1' is used twice"),
        (
            [GOOD, 3, GOOD | {"task": 3}],
            "2 of 3 predictions are bad:\n  row 2: expected a prediction, got 3\n  row 3: ",
        ),
        ([GOOD | {"benchmark": ["a"]}], "benchmark: expected text"),
        ([GOOD | {"task": 3}], "task: expected text, got 3"),
        ([GOOD | {"prediction": {"a": 1}}], "prediction: expected text"),
        ([GOOD | {"options": 5}], "options: expected a list"),
        ([GOOD | {"frames": "sideways"}], "frames: expected one of ordered, shuffled, reversed, single, blind"),
        ([GOOD | {"problem_type": "maths"}], "problem_type: expected one of"),
        ([GOOD | {"solution": 4}], "solution: expected text"),
        ([GOOD | {"solution": ""}], "solution: missing"),
        ([GOOD | {"solution": "<answer>B"}], "no answer in"),
        ([GOOD | {"path": 7}], "path: expected text"),
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
    else:
        write(file, content)
    with pytest.raises(UserError) as error:
        main([str(file)])
    assert message in str(error.value) and not (tmp_path / "summary.json").exists()


def test_a_file_of_answers_that_is_not_there_is_one_clear_error():
    """Guards: a traceback."""
    with pytest.raises(UserError, match="nowhere.jsonl: cannot read"):
        main(["nowhere.jsonl"])
