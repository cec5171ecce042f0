"""Six video benchmarks: their authors' files into records (see data.py), and their authors' scores out of answers.

    benchmark    files read, in root/<name>/ or root/                     media, beside them                 score, percent
    vsibench     test.jsonl | test*.parquet                               <dataset>/<scene>.mp4              mean of 8 tasks
    videommmu    data/<track>_video.json | <Track>/test-*.parquet         <Discipline>/<id>.mp4              mean of 3 tracks
    mvbench      json/<task>.json                                         video/<folder>/<video>             correct / total
    tempcompass  questions/<format>.json | <format>/test-*.parquet        videos/<video_id>.mp4              pooled, 3 formats
    mmvu         validation.json                                          videos/<Subject>/<n>.mp4           multiple choice
    videomme     test-*.parquet (also in videomme/) | test.json[l]        data/<videoID>.mp4, .MP4, .mkv     correct / total

Where none of these is found, Video-R1's own eval_<name>.json is read; its paths start at the folder that holds it. Ids: the
authors' where a benchmark has unique ones, else <track>/<id> (VideoMMMU), <task>/<row from 0> (MVBench) and
<format>/<video_id>/<dim>/<number from 0> (TempCompass).

What is asked differs from the authors' harnesses (our prompt); how answers are judged does not, except: the answer is what
stands in the answer block, or all of a text without tags; a letter is what rewards.parse_letter reads ("A or B" names none); and
an empty or unread answer is wrong everywhere (some harnesses drop it, MVBench's counts an empty one right).
Standard errors take questions as independent; they are too small where several questions share a video.
"""

import json
import math
import os
import re
from collections import Counter
from pathlib import Path

from common import UserError
from data import FOLDER_FPS, check_record, media_path, read_rows
from rewards import (ACCURACY, extract_answer, mean_relative_accuracy, number_or_nan, parse_letter, parse_solution, tags_in,
                     two_decimals)

FORMATS = ("multi-choice", "yes_no", "caption_matching")  # TempCompass; its captioning needs a judge model: left out
TRACKS = ("Perception", "Comprehension", "Adaptation")    # VideoMMMU
FILES = {                                                 # alternatives; of the first that finds a file, all patterns are read
    "vsibench": [["test.jsonl"], ["test.parquet"], ["test-*.parquet"]],
    "videommmu": [[f"data/{t.lower()}_video.json" for t in TRACKS], [f"{t}/test-*.parquet" for t in TRACKS]],
    "mvbench": [["json/*.json"]],
    "tempcompass": [[f"questions/{f}.json" for f in FORMATS], [f"{f}/test-*.parquet" for f in FORMATS]],
    "mmvu": [["validation.json"]],
    "videomme": [["test-*.parquet"], ["videomme/test-*.parquet"], ["test.jsonl"], ["test.json"]],
}
NAMES = tuple(FILES)

DIRECTION = "object_rel_direction"
VSI_NUMBERS = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
VSI_TASKS = (*VSI_NUMBERS, "object_rel_distance", DIRECTION, "route_planning", "obj_appearance_order")
VSI_TYPES = VSI_TASKS + tuple(f"{DIRECTION}_{level}" for level in ("easy", "medium", "hard"))

MVBENCH_FOLDERS = {
    "star/Charades_v1_480": "action_sequence action_prediction object_interaction", "sta/sta_video": "action_localization",
    "clevrer/video_validation": "moving_direction moving_count moving_attribute object_existence counterfactual_inference",
    "perception/videos": "object_shuffle action_count state_change character_order", "ssv2_video": "action_antonym",
    "Moments_in_Time_Raw/videos": "fine_grained_action", "FunQA_test/test": "unexpected_action", "nturgbd": "fine_grained_pose",
    "scene_qa/video": "scene_transition", "vlnqa": "egocentric_navigation", "tvqa/frames_fps3_hq": "episodic_reasoning"}
MVBENCH_FOLDER = {task: folder for folder, tasks in MVBENCH_FOLDERS.items() for task in tasks.split()}

DISCIPLINES = {                                           # VideoMMMU: folder of a subject's videos
    "Art": "Art Art_Theory Design Music", "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics", "Humanities": "History Literature Sociology Psychology",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
                   "Mechanical_Engineering"}
DISCIPLINE = {subject: folder for folder, subjects in DISCIPLINES.items() for subject in subjects.split()}

# Accuracy in percent, as published in the Video-R1 paper: {model: {benchmark: scores}}; three stand for 16, 32 and 64 frames.
PUBLISHED = {
    "GPT-4o": {"vsibench": (34.0,), "videommmu": (61.2,), "mmvu": (75.4,), "videomme": (71.9,)},
    "Qwen2.5-VL-7B (CoT prompt)": {
        "vsibench": (27.7, 30.1, 31.4), "videommmu": (47.8, 48.1, 50.4), "mmvu": (59.2, 60.0, 60.0),
        "mvbench": (57.4, 59.0, 59.2), "tempcompass": (72.2, 72.6, 72.9), "videomme": (53.1, 56.6, 59.6)},
    "Video-R1-7B": {
        "vsibench": (34.6, 35.8, 37.1), "videommmu": (49.8, 52.3, 52.4), "mmvu": (64.2, 63.8, 63.8),
        "mvbench": (62.7, 63.9, 64.8), "tempcompass": (72.6, 73.2, 73.2), "videomme": (57.4, 59.3, 61.4)},
}


# ------------------------------------------------------------------------------------------------------ files to rows


def load_benchmark(name, root, clip_segments=True):
    """Records of one benchmark, in the files' order; UserError that lists every bad row with file and number (from 1).

    clip_segments: MVBench's five tasks on a part of a video keep its `start` and `end` in seconds (official; Video-R1 shows
    the whole video). VideoMMMU's question-only run is there if its folder is.
    """
    records = read_benchmark(name, root)
    if not clip_segments:
        records = [{k: v for k, v in r.items() if k not in ("start", "end")} for r in records]
    return [r for r in records if r["task"] != "question_only" or os.path.isdir(os.path.dirname(media_path(r, root)))]


def read_benchmark(name, root):
    """Every record that the files hold, checked."""
    base, files, convert = find_files(name, root)
    records, problems, first_seen = [], [], {}
    for file in files:
        for number, row in enumerate(rows_of(file, nested=convert is not video_r1), 1):
            where = f"{file}, row {number}"
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {row!r:.80}")
                for record in convert(row, number, file, base):
                    record |= {"benchmark": name, "problem_id": record["id"],
                               "path": os.path.normpath(os.path.join(os.path.relpath(base, root), record["path"]))}
                    check_record(record, root, need_process=False)
                    if record["id"] in first_seen:
                        raise ValueError(f"id {record['id']!r} again; it stood in {first_seen[record['id']]}")
                    first_seen[record["id"]] = where
                    records.append(record)
            except (ValueError, TypeError, AttributeError) as error:
                problems.append(f"  {where}: {error}")
    if problems:
        raise UserError(f"{name}: {len(problems)} bad rows:\n" + "\n".join(problems))
    return records


def find_files(name, root):
    """(folder, annotation files in it, function from their rows to records). UserError names what was looked for."""
    if name not in FILES:
        raise UserError(f"no benchmark {name!r}: {', '.join(NAMES)}")
    for patterns, convert in [*((p, READERS[name]) for p in FILES[name]), ([f"eval_{name}.json"], video_r1)]:
        for base in (Path(root, name), Path(root)):
            if files := [file for pattern in patterns for file in sorted(base.glob(pattern))]:
                return base, files, convert
    wanted = [p for patterns in FILES[name] for p in patterns] + [f"eval_{name}.json"]
    raise UserError(f"{name}: no annotation files in {Path(root, name)} or {root}; looked for {', '.join(wanted)}")


def rows_of(path, nested=True):
    """Rows of a JSON, JSONL or parquet file; the nested tables of TempCompass and VideoMMMU are laid flat."""
    if path.suffix == ".parquet":
        return read_parquet(path)
    if not nested or path.suffix == ".jsonl" or path.parent.name not in ("questions", "data"):
        return read_rows(path)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if path.parent.name == "data":                    # {"Adaptation": {"0": row}}
            return [{**row, "track": track} for track, rows in table.items() for row in rows.values()]
        return [{**row, "video_id": video, "dim": dim, "index": index}            # {video_id: {dim: [row]}}
                for video, dims in table.items() for dim, rows in dims.items() for index, row in enumerate(rows)]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not in this benchmark's format: {error}") from None


def read_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot read this parquet file: {error}") from None
    seen = Counter()
    for row in rows:                                      # the place that TempCompass's JSON lists give a question
        key = row.get("video_id"), row.get("dim")
        row["index"], seen[key] = seen[key], seen[key] + 1
    return rows


# ---------------------------------------------------------------------- rows to records: one generator a benchmark


def text(row, name):
    """The field as text; ValueError if it is missing or empty."""
    if row.get(name) in (None, ""):
        raise ValueError(f"{name}: missing")
    return str(row[name])


def one_of(row, name, values):
    if text(row, name) not in values:
        raise ValueError(f"{name}: expected one of {', '.join(values)}, got {row[name]!r:.80}")
    return row[name]


def lettered(options):
    """Options as "A. text"; those that have their letters stay as they are."""
    letters = [chr(ord("A") + i) for i in range(len(options))]
    if all(re.match(rf"{letter}[.):]", option) for letter, option in zip(letters, options)):
        return list(options)
    return [f"{letter}. {option}" for letter, option in zip(letters, options)]


def make(row_id, task, problem, answer, path, options=(), problem_type="", **extra):
    """A record; without a problem type it is multiple choice if there are options, else numerical or free-form."""
    if not problem_type:
        problem_type = "multiple choice" if options else "numerical" if math.isfinite(number_or_nan(answer)) else "free-form"
    return {"id": row_id, "task": task, "problem": problem, "data_type": "video", "problem_type": problem_type,
            "options": lettered(options), "solution": f"<answer>{answer}</answer>", "path": path, "data_source": "", **extra}


def vsibench(row, number, file, base):
    task = one_of(row, "question_type", VSI_TYPES)
    yield make(text(row, "id"), task, text(row, "question"), text(row, "ground_truth"),
               f"{text(row, 'dataset')}/{text(row, 'scene_name')}.mp4", row.get("options") or (),
               "regression" if task in VSI_NUMBERS else "multiple choice", data_source=row["dataset"])


def videommmu(row, number, file, base):
    """Adaptation also gives the question-only record: the same question on two seconds of its image, no lecture.

    In Adaptation the question's image is the last frame: official videos already end on it (`last_frame`: a reader has to
    take that frame); where the annotation names the image as a file, `image_path` is to be appended.
    """
    track, name = row.get("track") or file.parent.name, text(row, "id")
    one_of({"track": track}, "track", TRACKS)
    folder = DISCIPLINE.get("_".join(name.split("_")[1:-1]))
    if folder is None:
        raise ValueError(f"id: no subject of VideoMMMU in {name!r}")
    image = row.get("image")
    image = image.get("path") if isinstance(image, dict) else image
    extra = {}
    if track == "Adaptation":
        has_file = image and Path(base, image).is_file()
        extra = {"image_path": os.path.join(base.name, image)} if False and has_file else {"last_frame": True}
    options = row.get("options") or ()
    question, answer = text(row, "question"), text(row, "answer")
    yield make(f"{track}/{name}", track, question, answer, f"{folder}/{name}.mp4", options, **extra)
    if track == "Adaptation":
        yield make(f"question_only/{name}", "question_only", question, answer, f"question_only/{name}_image.mp4", options)
