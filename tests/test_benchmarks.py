"""benchmarks/: files in the official schemas (our own rows), scores computed by hand; each test names its bug."""

import json
import math
from pathlib import Path

import pytest

import benchmarks
from benchmarks import (
    answer_of,
    benchmarks_in,
    join_annotations,
    load_benchmark,
    missing_media,
    print_table,
    score_answer,
    score_benchmark,
    scored_rows,
)
from benchmarks.videommmu import mmmu_open
from rewards import accuracy_reward
from support.record_files import check_record
from support.settings import UserError


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


VSI = [
    {
        "id": 0,
        "dataset": "scannet",
        "scene_name": "scene0999_00",
        "question_type": "object_counting",
        "question": "How many lamps?",
        "ground_truth": "4",
        "options": None,
    },
    {
        "id": 1,
        "dataset": "arkitscenes",
        "scene_name": "777",
        "question_type": "object_rel_direction_hard",
        "question": "Where is the lamp?",
        "ground_truth": "C",
        "options": ["A. left", "B. right", "C. behind"],
    },
]

MVBENCH = {
    "action_sequence": [
        {
            "video": "AB9CD.mp4",
            "question": "What came first?",
            "candidates": ["He sat.", "He ran."],
            "answer": "He ran.",
            "start": 1.5,
            "end": 9.0,
        }
    ],
    "counterfactual_inference": [
        {"video": "v1.mp4", "question": "Which one?", "candidates": ["only this"], "answer": "only this"}
    ],
    "episodic_reasoning": [
        {
            "video": "show_s01",
            "question": "Why?",
            "candidates": ["a", "b", "c"],
            "answer": "c",
            "start": 0.0,
            "end": 4.0,
            "fps": 3,
            "show_name": "x",
            "subtitle": "",
        }
    ],
}

TVBENCH = {
    "moving_direction": [
        {"video": "m1.mp4", "question": "Which way does it move?", "candidates": ["Down", "Up"], "answer": "Up"}
    ],
    "action_localization": [
        {
            "video": "l1.mp4",
            "question": "When?",
            "candidates": ["early", "late"],
            "answer": "late",
            "start": 1,
            "end": 9,
        }
    ],
}

TOMATO = {
    "shape&trend": {
        "40": {
            "question": "What is drawn?",
            "options": ["A circle.", "A square.", "A line."],
            "answer": 1,
            "key": "0215-06",
            "demonstration_type": "human",
            "motion_type": "shape&trend",
            "variation": {"composite": 0},
        }
    }
}

TIMEBLIND = [
    {
        "index": index,
        "video_path": f"TimeBlind/videos/vid_0_{index % 2}.mp4",
        "question": question,
        "answer": answer,
        "type": kind,
    }
    for index, (kind, question, answer) in enumerate(
        [
            ("yes_no", "Does he sit first?", "Yes"),
            ("yes_no", "Does he sit first?", "No"),
            ("multiple_choice", "What is first? A: sit. B: run.", "B"),
            ("multiple_choice", "What is first? A: sit. B: run.", "A"),
        ]
    )
]

HOLMES = [
    {
        "video ID": "dGS48",
        "Question ID": "3",
        "Question Type": "SR",
        "Question": "Who is he?",
        "Options": {"A": "a brother", "B": "a thief", "C": "nobody"},
        "Answer": "B",
        "Explanation": "x",
    }
]

TEMPCOMPASS = {
    "multi-choice": {
        "11": {
            "action": [{"question": "What happens?\nA. it falls\nB. it flies", "answer": "B. it flies"}],
            "speed": [{"question": "How fast?\nA. slow\nB. fast\nC. both", "answer": "A. slow"}],
        }
    },
    "yes_no": {
        "11": {"action": [{"question": "Does it fly?", "answer": "yes"}, {"question": "Does it fall?", "answer": "no"}]}
    },
    "caption_matching": {
        "11": {
            "order": [
                {
                    "question": "Which caption fits?\nOption 1: It falls.\nOption 2: It flies.",
                    "answer": "Option 2: It flies.",
                }
            ]
        }
    },
    "captioning": {"11": {"action": [{"question": "Describe it.", "answer": "B. it flies"}]}},
}

VIDEOMMMU = {
    "perception": {
        "Perception": {
            "0": {
                "id": "validation_Biology_901",
                "link_selected": "url",
                "question": "Which cell?",
                "options": ["a root", "a leaf"],
                "answer": "B",
            }
        }
    },
    "comprehension": {
        "Comprehension": {
            "0": {
                "id": "validation_Biology_901",
                "link_selected": "url",
                "question": "What grows?",
                "options": [f"option {i}" for i in range(14)],
                "answer": "N",
            }
        }
    },
    "adaptation": {
        "Adaptation": {
            "0": {
                "id": "validation_Art_Theory_7",
                "link_selected": "url",
                "question": "Who? <image 1>",
                "options": ["he", "she"],
                "answer": "A",
                "question_type": "multiple-choice",
            },
            "1": {
                "id": "validation_Math_15",
                "link_selected": "url",
                "question": "How many? <image 1>",
                "options": [],
                "answer": "3.5",
                "question_type": "open",
            },
        }
    },
}

MMVU = [
    {
        "id": "validation_0",
        "video": "https://example.org/resolve/main/videos/Physics/3.mp4",
        "youtube_url": "",
        "question_type": "multiple-choice",
        "metadata": {"subject": "Physics", "textbook": "", "rationale": "", "knowledge": []},
        "question": "Which law?",
        "choices": {"A": "first", "B": "second", "C": "third", "D": "none", "E": "all"},
        "answer": "E",
    },
    {
        "id": "validation_1",
        "video": "https://example.org/resolve/main/videos/Physics/4.mp4",
        "youtube_url": "",
        "question_type": "open-ended",
        "metadata": {"subject": "Physics"},
        "question": "Why?",
        "answer": "friction",
        "choices": {"A": "", "B": "", "C": "", "D": "", "E": ""},
    },
]

VIDEOMME = [
    {
        "video_id": "001",
        "duration": "short",
        "domain": "Sports",
        "sub_category": "Tennis",
        "url": "",
        "videoID": f"yt{i}",
        "question_id": f"001-{i}",
        "task_type": "Counting",
        "question": "How many?",
        "options": ["A. one.", "B. two.", "C. three.", "D. four."],
        "answer": "D",
    }
    for i in (1, 2)
]


@pytest.fixture
def root(tmp_path):
    """All benchmarks' annotation files, in folders of their names."""
    write(tmp_path / "vsibench/test.jsonl", VSI)
    write(tmp_path / "vsibench/test_debiased.jsonl", VSI[1:])
    for task, rows in TVBENCH.items():
        write(tmp_path / f"tvbench/json/{task}.json", rows)
    for task, table in TOMATO.items():
        write(tmp_path / f"tomato/data/{task}.json", table)
    write(tmp_path / "timeblind/data.jsonl", TIMEBLIND)
    write(tmp_path / "videoholmes/test_Video-Holmes.json", HOLMES)
    for task, rows in MVBENCH.items():
        write(tmp_path / f"mvbench/json/{task}.json", rows)
    for form, table in TEMPCOMPASS.items():
        write(tmp_path / f"tempcompass/questions/{form}.json", table)
    for track, table in VIDEOMMMU.items():
        write(tmp_path / f"videommmu/data/{track}_video.json", table)
    write(tmp_path / "mmvu/validation.json", MMVU)
    write(tmp_path / "videomme/test.jsonl", VIDEOMME)
    return tmp_path


# ----------------------------------------------------------------------------------------------- files to records


@pytest.mark.parametrize(
    "name, n", [("vsibench", 2), ("mvbench", 3), ("tempcompass", 5), ("videommmu", 4), ("mmvu", 2), ("videomme", 2)]
)
def test_records_of_every_benchmark_pass_the_checks_of_data(root, name, n):
    """Guards: a reader whose records data.py rejects, or that drops rows or repeats ids."""
    records = load_benchmark(name, root)
    assert len(records) == n == len({r["id"] for r in records})
    for record in records:
        check_record(record, root, need_process=False)
        assert record["benchmark"] == name and isinstance(record["id"], str) and record["problem_id"] == record["id"]
        # relative to root, whichever folder held the file
        assert record["path"].startswith(name + "/")
        if not record.get("unscored"):
            # the truth answers its own question
            answer = record["solution"]
            assert score_prediction({**record, "prediction": answer}) == 1


def test_vsibench_types_and_paths(root):
    """Guards: numbers asked as letters; media in the wrong folder."""
    number, letter = load_benchmark("vsibench", root)
    assert (number["id"], number["problem_type"], number["options"], number["path"]) == (
        "0",
        "regression",
        [],
        "vsibench/scannet/scene0999_00.mp4",
    )
    assert (letter["task"], letter["problem_type"], letter["solution"], letter["path"]) == (
        "object_rel_direction_hard",
        "multiple choice",
        "<answer>C</answer>",
        "vsibench/arkitscenes/777.mp4",
    )


def test_mvbench_letters_clips_and_folders(root):
    """Guards: the answer's text used as its letter; whole videos instead of their parts."""
    sequence, single, frames = load_benchmark("mvbench", root)
    assert (sequence["id"], sequence["task"], sequence["options"], sequence["solution"]) == (
        "action_sequence/0",
        "action_sequence",
        ["A. He sat.", "B. He ran."],
        "<answer>B</answer>",
    )
    assert (sequence["start"], sequence["end"], sequence["path"]) == (
        1.5,
        9.0,
        "mvbench/video/star/Charades_v1_480/AB9CD.mp4",
    )
    assert single["options"] == ["A. only this"] and "start" not in single
    assert (frames["data_type"], frames["path"]) == ("frame", "mvbench/video/tvqa/frames_fps3_hq/show_s01")
    whole = load_benchmark("mvbench", root, clip_segments=False)
    assert not any("start" in r or "end" in r for r in whole)


def test_tempcompass_formats(root):
    """Guards: captioning scored without a judge model; options asked twice; two questions with one id."""
    records = load_benchmark("tempcompass", root)
    assert [r["id"] for r in records] == [
        "multi-choice/11/action/0",
        "multi-choice/11/speed/0",
        "yes_no/11/action/0",
        "yes_no/11/action/1",
        "caption_matching/11/order/0",
    ]
    choice, _, yes, _, caption = records
    assert (choice["problem"], choice["options"], choice["solution"], choice["dim"], choice["path"]) == (
        "What happens?",
        ["A. it falls", "B. it flies"],
        "<answer>B</answer>",
        "action",
        "tempcompass/videos/11.mp4",
    )
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
    table = json.loads(json.dumps(VIDEOMMMU["adaptation"]))
    table["Adaptation"]["0"]["image"] = "images/q.png"
    write(root / "videommmu/data/adaptation_video.json", table)
    record = load_benchmark("videommmu", root)[2]
    assert record["image_path"] == "videommmu/images/q.png" and "last_frame" not in record


def test_mmvu_and_videomme(root):
    """Guards: open questions scored as letters; missing group keys; .MP4 and .mkv files that are not found."""
    choice, open_ended = load_benchmark("mmvu", root)
    assert (choice["options"][4], choice["solution"], choice["task"], choice["path"]) == (
        "E. all",
        "<answer>E</answer>",
        "Physics",
        "mmvu/videos/Physics/3.mp4",
    )
    assert open_ended["unscored"] and open_ended["options"] == [] and "unscored" not in choice
    touch(root / "videomme/data/yt2.mkv")
    first, second = load_benchmark("videomme", root)
    assert (first["path"], second["path"]) == ("videomme/data/yt1.mp4", "videomme/data/yt2.mkv")
    assert [first[k] for k in ("task", "duration", "domain", "sub_category")] == [
        "Counting",
        "short",
        "Sports",
        "Tennis",
    ]


def test_parquet_gives_the_same_records(root, tmp_path):
    """Guards: parquet rows that are read differently from JSON rows."""
    other = tmp_path / "parquet"
    write_parquet(other / "vsibench/test-00000-of-00001.parquet", VSI)
    write_parquet(other / "videomme/videomme/test-00000-of-00001.parquet", VIDEOMME)
    for form in ("multi-choice", "yes_no", "caption_matching", "captioning"):
        rows = [
            {"video_id": v, "dim": d, **r}
            for v, dims in TEMPCOMPASS[form].items()
            for d, part in dims.items()
            for r in part
        ]
        write_parquet(other / f"tempcompass/{form}/test-00000-of-00001.parquet", rows)
    for table in VIDEOMMMU.values():
        [(track, rows)] = table.items()
        rows = [{**r, "image": {"bytes": b"x", "path": "q.png"}} for r in rows.values()]
        write_parquet(other / f"videommmu/{track}/test-00000-of-00001.parquet", rows)
    for name in ("vsibench", "videomme", "tempcompass", "videommmu"):
        assert load_benchmark(name, other) == load_benchmark(name, root)


def test_video_r1_eval_json_is_read_without_official_files(tmp_path):
    """Guards: null options; paths without their folder."""
    row = {
        "problem_id": 1,
        "problem": "Which?",
        "data_type": "frame",
        "problem_type": "multiple choice",
        "original_question_type": "episodic_reasoning",
        "options": ["A. x", "B. y"],
        "process": "",
        "solution": "<answer>B</answer>",
        "path": "./Evaluation/MVBench/a",
        "data_source": "",
    }
    number = {
        **row,
        "problem_id": 2,
        "options": None,
        "problem_type": "numerical",
        "data_type": "video",
        "solution": "<answer>3.0</answer>",
    }
    write(tmp_path / "eval_mvbench.json", [row, number])
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
        ("mvbench", "json/action_sequence.json", {"answer": "He flew."}, "not among the candidates"),
        ("mvbench", "json/action_sequence.json", {"start": "soon"}, "could not convert"),
        ("mmvu", "validation.json", {"answer": "F"}, "answer F is not among the options"),
        ("mmvu", "validation.json", {"choices": ["x"]}, "list"),
        ("videomme", "test.jsonl", {"duration": ""}, "duration: missing"),
        ("videomme", "test.jsonl", {"question_id": "001-2"}, "id '001-2' is used twice, first in"),
    ],
)
def test_bad_rows_are_named_all_at_once(root, name, file, change, message):
    """Guards: a bad annotation that is skipped; an error that only names the first of several."""
    rows = {"vsibench": VSI, "mvbench": MVBENCH["action_sequence"], "mmvu": MMVU, "videomme": VIDEOMME}[name]
    write(root / name / file, [{**rows[0], **change}, rows[-1] | {"id": "z", "question_id": "001-2"}, ["not a row"]])
    with pytest.raises(UserError) as error:
        load_benchmark(name, root)
    assert message in str(error.value) and f"{file}, row 3: expected an object" in str(error.value)


def test_records_of_the_benchmarks_made_for_time(root):
    """Guards: an answer that is one option off; videos of MVBench's folders; a pair that is taken apart."""
    localization, direction = load_benchmark("tvbench", root)
    assert (direction["path"], direction["solution"]) == (
        "tvbench/video/moving_direction/m1.mp4",
        "<answer>B</answer>",
    )
    assert (localization["start"], localization["end"], localization["id"]) == (1.0, 9.0, "action_localization/0")
    (shape,) = load_benchmark("tomato", root)
    assert (shape["id"], shape["task"], shape["solution"]) == ("shape&trend/40", "shape&trend", "<answer>B</answer>")
    assert (shape["path"], shape["options"][1]) == ("tomato/videos/human/0215-06.mp4", "B. A square.")
    blind = load_benchmark("timeblind", root)
    assert [record["path"] for record in blind] == [f"timeblind/videos/vid_0_{i % 2}.mp4" for i in range(4)]
    answers = [record["solution"] for record in blind]
    assert answers == [f"<answer>{answer}</answer>" for answer in ("yes", "no", "B", "A")]
    assert {record["instance"] for record in blind} == {0} and blind[0]["problem"].endswith("Answer yes or no.")
    (film,) = load_benchmark("videoholmes", root)
    assert (film["id"], film["task"], film["path"]) == ("dGS48/3", "SR", "videoholmes/videos_cropped/dGS48.mp4")
    assert film["options"] == ["A. a brother", "B. a thief", "C. nobody"]
    # the files of VSI-Bench and of its debiased part lie in one folder
    (debiased,) = load_benchmark("vsibench_debiased", root)
    assert (debiased["path"], debiased["benchmark"]) == ("vsibench/arkitscenes/777.mp4", "vsibench_debiased")
    assert len(load_benchmark("vsibench", root)) == 2


@pytest.mark.parametrize(
    "name, file, content, message",
    [
        ("tvbench", "json/moving_count.json", TVBENCH["moving_direction"], "no task of TVBench is called"),
        ("tvbench", "json/moving_direction.json", [{**TVBENCH["moving_direction"][0], "answer": "x"}], "not among"),
        ("tomato", "data/count.json", {"1": {**TOMATO["shape&trend"]["40"], "answer": 3}}, "the number of an option"),
        ("tomato", "data/count.json", {"1": {**TOMATO["shape&trend"]["40"], "answer": "B"}}, "the number of an option"),
        ("tomato", "data/count.json", [1], "not in this benchmark's format"),
        ("timeblind", "data.jsonl", [{**TIMEBLIND[0], "type": "open"}], "type: expected one of yes_no"),
        ("timeblind", "data.jsonl", [{**TIMEBLIND[0], "answer": "maybe"}], "answer: expected one of yes, no"),
        ("timeblind", "data.jsonl", [{**TIMEBLIND[0], "index": "first"}], "row 1: "),
        ("videoholmes", "test_Video-Holmes.json", [{**HOLMES[0], "Answer": "D"}], "Answer: expected one of A, B, C"),
        ("videoholmes", "test_Video-Holmes.json", [{**HOLMES[0], "Options": ["x"]}], "Options: expected {letter"),
        ("videoholmes", "test_Video-Holmes.json", [{**HOLMES[0], "Options": {"B": "x"}}], "letters from A on"),
    ],
)
def test_bad_rows_of_the_benchmarks_made_for_time_are_named(tmp_path, name, file, content, message):
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


def test_files_in_another_format_and_no_files(root, tmp_path):
    """Guards: a traceback instead of the file's name."""
    write(root / "tempcompass/questions/yes_no.json", {"11": ["no dimensions"]})
    for name, folder in (("tempcompass", root), ("mmvu", tmp_path / "empty"), ("activitynet", root)):
        with pytest.raises(
            UserError, match="yes_no.json|looked for validation.json, eval_mmvu.json|no benchmark 'activitynet'"
        ):
            load_benchmark(name, folder)


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


def test_unusable_media_are_counted_beside_the_score():
    """Guards: an unanswered question that counts as wrong or is not counted."""
    summary = benchmark_scores(
        rows_of("mvbench", {"t": [1]}) + [{"benchmark": "mvbench", "id": 9, "error": "cannot be read"}]
    )["mvbench"]
    assert (summary["score"], summary["n"], summary["unusable"]) == (100, 1, ["9"])


def test_bad_predictions_are_an_error():
    """Guards: one question counted twice; bad rows scored 0."""
    good = row("mvbench", "B", "B", row_id=1)
    bad = [
        {**good, "id": "1"},
        {**good, "id": 2, "solution": ""},
        {**good, "id": 3, "prediction": 4},
        {**good, "id": 4, "solution": "<answer>B"},
        {"id": 5},
    ]
    with pytest.raises(UserError) as error:
        benchmark_scores([good, *bad])
    for part in (
        "5 of 6",
        "row 2: mvbench '1' is used twice",
        "row 3: solution: missing",
        "row 4: prediction: expected text",
        "row 5: no answer in",
        "row 6: benchmark: missing",
    ):
        assert part in str(error.value)
    # same id, another benchmark
    assert benchmark_scores([good, {**good, "benchmark": "mine"}])["mine"]["n"] == 1


# --------------------------------------------------------------------------------------------------- join and table


def test_join_fills_bare_rows(root):
    """Guards: bare rows scored with another question's solution; unknown ids that are ignored."""
    bare = [
        {"benchmark": "vsibench", "id": 0, "prediction": "3"},
        {"benchmark": "tempcompass", "id": "yes_no/11/action/1", "prediction": "no"},
        {"benchmark": "videommmu", "id": "question_only/validation_Math_15", "prediction": "3.5"},
        {"benchmark": "videommmu", "id": "validation_Math_15", "task": "Adaptation", "prediction": "1"},
        {"benchmark": "mmvu", "id": "validation_1", "prediction": "friction"},
        row("mine", "B", "B"),
    ]
    joined = join_annotations(bare, root)
    assert joined[-1] == bare[-1] and joined[0]["prediction"] == "3" and joined[0]["task"] == "object_counting"
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
        join_annotations([bare[0], {**bare[0], "id": 77}, {**bare[0], "id": "x"}], root)


def test_caption_answers_that_name_the_other_line_are_read(root):
    """Guards: a wrong answer counted as unreadable."""
    rows = [
        {"benchmark": "tempcompass", "id": "caption_matching/11/order/0", "prediction": text}
        for text in ("1", "neither")
    ]
    assert [benchmark_scores(join_annotations([r], root))["tempcompass"]["unparsed"] for r in rows] == [0, 1]


def test_table_marks_published_scores(capsys):
    """Guards: published numbers without a label; a table that fails for an empty or unknown benchmark."""
    rows = (
        rows_of("vsibench", {"route_planning": [1, 0]})
        + rows_of("mine", {"t": [1]})
        + [row("mmvu", "x", "y", "free-form", "Physics")]
    )
    print_table(benchmark_scores(rows) | {"settings": {"seed": 0}})
    out = capsys.readouterr().out
    assert (
        "published" in out.splitlines()[0] and "34.6/35.8/37.1" in out and "1 of 8 tasks" in out and "1 unscored" in out
    )
    line = next(line for line in out.splitlines() if line.startswith("| vsibench"))
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["2", "50.0 ± 50.0"]
    assert benchmarks.PUBLISHED["GPT-4o"]["videomme"] == (71.9,)
