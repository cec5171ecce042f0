"""Six video benchmarks: their authors' files into records (see data.py), and their authors' scores out of answers.

    benchmark    files read, in root/<name>/ or root/                     media, beside them                 score, percent
    vsibench     test.jsonl | test*.parquet                               <dataset>/<scene>.mp4              mean of 8 tasks
    videommmu    data/<track>_video.json | <Track>/test-*.parquet         <Discipline>/<id>.mp4              mean of 3 tracks
    mvbench      json/<task>.json                                         video/<folder>/<video>             correct / total
    tempcompass  questions/<format>.json | <format>/test-*.parquet        videos/<video_id>.mp4              pooled, 3 formats
    mmvu         validation.json                                          videos/<Subject>/<n>.mp4           multiple choice
    videomme     test.json[l] | test-*.parquet (also in videomme/)        data/<videoID>.mp4, .MP4, .mkv     correct / total

Only parquet files need pyarrow (pip install pyarrow); where JSON lies beside them, it is read instead.
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

from rewards import (
    ACCURACY,
    extract_answer,
    lettered,
    mean_relative_accuracy,
    number_or_nan,
    parse_letter,
    parse_solution,
    tags_in,
)
from settings import UserError, read_rows

FORMATS = ("multi-choice", "yes_no", "caption_matching")  # TempCompass; its captioning needs a judge model: left out
TRACKS = ("Perception", "Comprehension", "Adaptation")  # VideoMMMU
GROUPS = ("dim", "duration", "domain", "sub_category")  # beside the task: TempCompass's, then Video-MME's
TEXTS = (
    "benchmark",
    "prediction",
    "solution",
    "problem_type",
    "problem",
    "task",
    "path",
    "error",
    *GROUPS,
)  # of a prediction row
FILES = {  # alternatives; of the first that finds a file, all patterns are read
    "vsibench": [["test.jsonl"], ["test.parquet"], ["test-*.parquet"]],
    "videommmu": [[f"data/{t.lower()}_video.json" for t in TRACKS], [f"{t}/test-*.parquet" for t in TRACKS]],
    "mvbench": [["json/*.json"]],
    "tempcompass": [[f"questions/{f}.json" for f in FORMATS], [f"{f}/test-*.parquet" for f in FORMATS]],
    "mmvu": [["validation.json"]],
    "videomme": [["test.jsonl"], ["test.json"], ["test-*.parquet"], ["videomme/test-*.parquet"]],
}
NAMES = tuple(FILES)

DIRECTION = "object_rel_direction"
VSI_NUMBERS = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
VSI_TASKS = (*VSI_NUMBERS, "object_rel_distance", DIRECTION, "route_planning", "obj_appearance_order")
VSI_TYPES = VSI_TASKS + tuple(f"{DIRECTION}_{level}" for level in ("easy", "medium", "hard"))

MVBENCH_FOLDERS = {
    "star/Charades_v1_480": "action_sequence action_prediction object_interaction",
    "sta/sta_video": "action_localization",
    "clevrer/video_validation": "moving_direction moving_count moving_attribute object_existence counterfactual_inference",
    "perception/videos": "object_shuffle action_count state_change character_order",
    "ssv2_video": "action_antonym",
    "Moments_in_Time_Raw/videos": "fine_grained_action",
    "FunQA_test/test": "unexpected_action",
    "nturgbd": "fine_grained_pose",
    "scene_qa/video": "scene_transition",
    "vlnqa": "egocentric_navigation",
    "tvqa/frames_fps3_hq": "episodic_reasoning",
}
MVBENCH_FOLDER = {task: folder for folder, tasks in MVBENCH_FOLDERS.items() for task in tasks.split()}

DISCIPLINES = {  # VideoMMMU: folder of a subject's videos
    "Art": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Humanities": "History Literature Sociology Psychology",
    "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
    "Mechanical_Engineering",
}
DISCIPLINE = {subject: folder for folder, subjects in DISCIPLINES.items() for subject in subjects.split()}

# Accuracy in percent, as published in the Video-R1 paper: {model: {benchmark: scores}}; three stand for 16, 32 and 64 frames.
PUBLISHED = {
    "GPT-4o": {"vsibench": (34.0,), "videommmu": (61.2,), "mmvu": (75.4,), "videomme": (71.9,)},
    "Qwen2.5-VL-7B (CoT prompt)": {
        "vsibench": (27.7, 30.1, 31.4),
        "videommmu": (47.8, 48.1, 50.4),
        "mmvu": (59.2, 60.0, 60.0),
        "mvbench": (57.4, 59.0, 59.2),
        "tempcompass": (72.2, 72.6, 72.9),
        "videomme": (53.1, 56.6, 59.6),
    },
    "Video-R1-7B": {
        "vsibench": (34.6, 35.8, 37.1),
        "videommmu": (49.8, 52.3, 52.4),
        "mmvu": (64.2, 63.8, 63.8),
        "mvbench": (62.7, 63.9, 64.8),
        "tempcompass": (72.6, 73.2, 73.2),
        "videomme": (57.4, 59.3, 61.4),
    },
}


# ------------------------------------------------------------------------------------------------------ files to rows


def load_benchmark(name, root, clip_segments=True):
    """Records of one benchmark, in the files' order; UserError that lists every bad row with file and number (from 1).

    clip_segments: MVBench's five tasks on a part of a video keep its `start` and `end` in seconds (official; Video-R1 shows
    the whole video). VideoMMMU's question-only run is there if its folder is.
    """
    from data import media_path  # not above: scoring needs no torch

    records = read_benchmark(name, root)
    if not clip_segments:
        records = [{k: v for k, v in r.items() if k not in ("start", "end")} for r in records]
    return [r for r in records if r["task"] != "question_only" or os.path.isdir(os.path.dirname(media_path(r, root)))]


def read_benchmark(name, root):
    """Every record that the files hold, checked."""
    from data import check_record

    base, files, convert = find_files(name, root)
    records, problems, first_seen = [], [], {}
    for file in files:
        for number, row in enumerate(rows_of(file, nested=convert is not video_r1), 1):
            where = f"{file}, row {number}"
            try:
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, got {row!r:.80}")
                for record in convert(row, number, file, base):
                    record |= {"benchmark": name, "problem_id": record["id"]}
                    record |= {
                        key: os.path.normpath(os.path.join(os.path.relpath(base, root), record[key]))
                        for key in ("path", "image_path")
                        if key in record
                    }
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
        if path.parent.name == "data":  # {"Adaptation": {"0": row}}
            return [{**row, "track": track} for track, rows in table.items() for row in rows.values()]
        return [
            {**row, "video_id": video, "dim": dim, "index": index}  # {video_id: {dim: [row]}}
            for video, dims in table.items()
            for dim, rows in dims.items()
            for index, row in enumerate(rows)
        ]
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
    for row in rows:  # the place that TempCompass's JSON lists give a question
        key = row.get("video_id"), row.get("dim")
        row["index"], seen[key] = seen[key], seen[key] + 1
    return rows


# ---------------------------------------------------------------------- rows to records: one generator a benchmark


def need(row, name):
    """The field as text; ValueError if it is missing or empty."""
    if row.get(name) in (None, ""):
        raise ValueError(f"{name}: missing")
    return str(row[name])


def one_of(row, name, values):
    if need(row, name) not in values:
        raise ValueError(f"{name}: expected one of {', '.join(values)}, got {row[name]!r:.80}")
    return row[name]


def make(row_id, task, problem, answer, path, options=(), problem_type="", **extra):
    """A record; without a problem type it is multiple choice if there are options, else numerical or free-form."""
    if not problem_type:
        problem_type = (
            "multiple choice" if options else "numerical" if math.isfinite(number_or_nan(answer)) else "free-form"
        )
    return {
        "id": row_id,
        "task": task,
        "problem": problem,
        "data_type": "video",
        "problem_type": problem_type,
        "options": lettered(options),
        "solution": f"<answer>{answer}</answer>",
        "path": path,
        "data_source": "",
        **extra,
    }


def vsibench(row, number, file, base):
    task = one_of(row, "question_type", VSI_TYPES)
    yield make(
        need(row, "id"),
        task,
        need(row, "question"),
        need(row, "ground_truth"),
        f"{need(row, 'dataset')}/{need(row, 'scene_name')}.mp4",
        row.get("options") or (),
        "regression" if task in VSI_NUMBERS else "multiple choice",
        data_source=row["dataset"],
    )


def videommmu(row, number, file, base):
    """Adaptation also gives the question-only record: the same question on two seconds of its image, no lecture.

    In Adaptation the question's image is the last frame: official videos already end on it (`last_frame`: a reader has to
    take that frame); where the annotation names the image as a file, `image_path` is to be appended.
    """
    track, name = row.get("track") or file.parent.name, need(row, "id")
    one_of({"track": track}, "track", TRACKS)
    folder = DISCIPLINE.get("_".join(name.split("_")[1:-1]))
    if folder is None:
        raise ValueError(f"id: no subject of VideoMMMU in {name!r}")
    image = row.get("image")
    image = image.get("path") if isinstance(image, dict) else image
    extra = {}
    if track == "Adaptation":
        extra = {"image_path": image} if image and Path(base, image).is_file() else {"last_frame": True}
    options = row.get("options") or ()
    question, answer = need(row, "question"), need(row, "answer")
    yield make(f"{track}/{name}", track, question, answer, f"{folder}/{name}.mp4", options, **extra)
    if track == "Adaptation":
        yield make(
            f"question_only/{name}", "question_only", question, answer, f"question_only/{name}_image.mp4", options
        )


def mvbench(row, number, file, base):
    """The answer is a text; its letter is its place among the candidates. `start`, `end`: seconds of the part asked about."""
    task, video = file.stem, need(row, "video")
    folder = MVBENCH_FOLDER.get(task)
    if folder is None:
        raise ValueError(f"no task of MVBench is called {task!r}")
    options, answer = [str(c) for c in row.get("candidates") or ()], need(row, "answer")
    if answer not in options:
        raise ValueError(f"answer: {answer!r:.80} is not among the candidates {options!r:.160}")
    extra = {key: float(row[key]) for key in ("start", "end") if row.get(key) is not None}
    if task == "episodic_reasoning":
        extra |= {"data_type": "frame"}
    record = make(
        f"{task}/{number - 1}",
        task,
        need(row, "question"),
        chr(ord("A") + options.index(answer)),
        f"video/{folder}/{video}",
        options,
    )
    yield record | extra


def tempcompass(row, number, file, base):
    """Multi-choice options are lines of the question; the other two formats are answered in words."""
    form = file.stem if file.suffix == ".json" else file.parent.name
    video, dim, question, answer = (need(row, key) for key in ("video_id", "dim", "question", "answer"))
    options = []
    if form == "multi-choice":
        options = [line for line in question.split("\n")[1:] if re.match(r"[A-D][.)]", line)]
        question = "\n".join(line for line in question.split("\n") if line not in options)
        answer = answer[:1] if re.match(r"[A-D][.)]", answer) else answer
    elif form == "yes_no":
        answer = one_of({"answer": answer.lower()}, "answer", ("yes", "no"))
        question += "\nAnswer yes or no."
    elif answer not in question.split("\n")[1:]:
        raise ValueError(f"answer: {answer!r:.80} is not a line of the question")
    else:
        question += "\nAnswer with the label of the one that matches."
    yield make(
        f"{form}/{video}/{dim}/{row['index']}",
        form,
        question,
        answer,
        f"videos/{video}.mp4",
        options,
        "multiple choice" if form == "multi-choice" else "free-form",
        dim=dim,
    )


def mmvu(row, number, file, base):
    """Open questions have no rule, only a judge model: they are kept, marked `unscored`."""
    kind = one_of(row, "question_type", ("multiple-choice", "open-ended"))
    subject = need(row["metadata"] if isinstance(row.get("metadata"), dict) else {}, "subject")
    path = "videos/" + need(row, "video").split("videos/")[-1]
    if kind == "open-ended":
        yield make(
            need(row, "id"), subject, need(row, "question"), need(row, "answer"), path, (), "free-form", unscored=True
        )
    else:
        options = [f"{letter}. {choice}" for letter, choice in (row.get("choices") or {}).items() if choice]
        yield make(
            need(row, "id"), subject, need(row, "question"), need(row, "answer"), path, options, "multiple choice"
        )


def videomme(row, number, file, base):
    video = need(row, "videoID")
    ending = next((e for e in (".mp4", ".MP4", ".mkv") if Path(base, "data", video + e).is_file()), ".mp4")
    yield make(
        need(row, "question_id"),
        need(row, "task_type"),
        need(row, "question"),
        need(row, "answer"),
        f"data/{video}{ending}",
        row.get("options") or (),
        "multiple choice",
        **{key: need(row, key) for key in ("duration", "domain", "sub_category")},
    )


def video_r1(row, number, file, base):
    """A row of Video-R1's eval JSON: already a record. Its path goes on where eval_bench.py's starts, at this folder."""
    kind = need(row, "problem_type")
    task = row.get("original_question_type") or kind
    if file.stem == "eval_mmvu":
        task = Path(need(row, "path")).parent.name  # the subject stands only here
    yield {
        **row,
        "id": need(row, "problem_id"),
        "task": task,
        "options": row.get("options") or [],
        "path": need(row, "path"),
    }


READERS = {reader.__name__: reader for reader in (vsibench, videommmu, mvbench, tempcompass, mmvu, videomme)}


# ------------------------------------------------------------------------------------------------------------- media


def missing_media(records, root):
    """Paths, relative to root, of the videos, frame folders and question images that are not there; each once, in order."""
    paths = [path for r in records for path in (r["path"], r.get("image_path")) if path]
    return [path for path in dict.fromkeys(paths) if not os.path.exists(os.path.join(root, path))]


# ------------------------------------------------------------------------------------------------- scoring one answer


def answer_of(prediction):
    """The answer in a prediction's text: its answer block's, or all of it if it holds no tags. Empty if there is none.

    >>> answer_of("<think>A?</think><answer>B</answer>"), answer_of(" B "), answer_of("<think>B")
    ('B', 'B', '')
    """
    text = prediction or ""
    answer = extract_answer(text)
    return answer if answer is not None else "" if any(tags_in(text)) else text.strip()


def vsi_number(answer):
    """The number that the answer is, or else its first word is (VSI-Bench reads only that); NaN if neither."""
    number = number_or_nan(answer)
    return number if math.isfinite(number) else number_or_nan(answer.split()[0])


def tempcompass_letter(answer):
    """TempCompass without a judge: "B", or a text that begins with "B." or "B)"; no other spelling counts."""
    match = re.match(r"([A-D])(?:[.)]|$)", answer)
    return match[1] if match else None


def names_caption(answer, line):
    """TempCompass without a judge: is the answer this line "Option 2: text", its text, its label, or its bare index?"""
    label, _, sentence = line.partition(": ")
    labels = (label, label.split()[-1])
    return (
        answer in (line, sentence, *labels)
        or answer.replace(".", "") in labels
        or answer.split(") ")[1:2] == [sentence]
    )


# The phrases after which VideoMMMU's evaluation (MMMU's, with more of them) looks for an open answer.
LEADS = (
    "could be ,so ,is ,thus ,therefore ,final ,answer ,result ,are ,in total ,total ,identify ,recognize ,calculated as ,"
    "counted as ,measured as ,observed as ,concluded as ,found to be ,equals ,determined to be ,number of ,value is ,"
    "adds up to ,have ,has "
).split(",")
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",  # 1,000 · 1e3 · 12.5; MMMU's three patterns
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_form(text):
    """MMMU's comparable forms: a number to two decimals, else lower case; one letter needs a space beside it."""
    text = text.strip().lower()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def mmmu_open(answer, truth):
    """MMMU's rule for open answers: 1 if any number or closing phrase of the answer meets the truth. Lenient on purpose.

    A truth that is a list in text form (one row of VideoMMMU) is met by any of its entries (ours).

    >>> mmmu_open("4, not 5", "5"), mmmu_open("x = 3.429", "3.43"), mmmu_open("3.5", "5")
    (1.0, 1.0, 0.0)
    """
    tails, sentences = [], answer.strip().strip(".").lower().split("\n")
    for i, sentence in enumerate(sentences):
        leads = LEADS + ["="] if i == len(sentences) - 1 else LEADS
        tail = ""
        for lead in leads:  # the shortest; an empty one gives way to the next, as in the original
            if lead in sentence:
                found = sentence.split(lead)[-1].strip()
                tail = found if not tail or len(found) < len(tail) else tail
        tails += [tail] if tail and tail not in list(":,.!?;'") else []
    tails = tails or [answer.strip().strip(".").lower()]
    numbers = [number for tail in tails for pattern in NUMBERS for number in re.findall(pattern, tail)]
    guesses = [form for part in tails + numbers for form in mmmu_form(part)]
    truths = [t.strip(" []'\"") for t in truth.split(",")] if truth.startswith("[") else [truth]
    truths = [form for t in truths if t for form in mmmu_form(t)]
    return float(any(t == g or isinstance(t, str) and isinstance(g, str) and t in g for t in truths for g in guesses))


def judge(row):
    """(score in [0, 1], whether the answer could be read) of a prediction row. ValueError if its solution is bad."""
    benchmark, kind, task = row["benchmark"], row["problem_type"], row.get("task")
    truth, answer = parse_solution(row["solution"], kind, row.get("options")), answer_of(row["prediction"])
    if not answer:
        return 0.0, False
    if kind == "multiple choice":
        letter = (tempcompass_letter if benchmark == "tempcompass" else parse_letter)(answer)
        return float(letter == truth), letter is not None
    if benchmark == "vsibench":
        number = vsi_number(answer)
        return mean_relative_accuracy(number, truth), math.isfinite(number)
    if benchmark == "videommmu":
        return mmmu_open(answer, extract_answer(row["solution"])), True
    if benchmark == "tempcompass" and task == "yes_no":
        word = next(
            (w for w in ("yes", "no") if answer.lower().startswith(w)), None
        )  # official: "Not sure" begins with no
        return float(word == truth), word is not None
    if benchmark == "tempcompass" and task == "caption_matching":
        lines = [line for line in (row.get("problem") or truth).split("\n") if ": " in line]
        return float(names_caption(answer, truth)), any(names_caption(answer, line) for line in lines)
    read = math.isfinite(number_or_nan(answer)) if kind in ("numerical", "regression") else True
    return float(ACCURACY[kind](answer, truth)), read


# ---------------------------------------------------------------------------------------------- scoring a benchmark


def benchmarks_in(rows):
    """Names of the rows' benchmarks, the six in their order, then others by name."""
    return sorted({r["benchmark"] for r in rows}, key=lambda name: ((NAMES + (name,)).index(name), name))


def judge_rows(rows):
    """The rows, each with its `place` (see place_of) and, where that is "scored", `judged`: (score, whether it could be read).

    UserError lists, by number from 1, every row that is bad or whose benchmark, id and frame order came before.
    """
    judged, problems, first_seen = [], [], {}
    for number, row in enumerate(rows, 1):
        try:
            place = place_of(row)
            key = row["benchmark"], str(row["id"]), row.get("frames") or "ordered"
            if first_seen.setdefault(key, number) != number:
                raise ValueError(f"{key[0]} {key[1]!r} again, it stood in row {first_seen[key]}; one row a question")
            judged.append({**row, "place": place, "judged": judge(row) if place == "scored" else None})
        except ValueError as error:
            problems.append(f"  row {number}: {error}")
    if problems:
        raise UserError(f"{len(problems)} of {len(rows)} predictions are bad:\n" + "\n".join(problems))
    return judged


def place_of(row):
    """Where a row counts: "scored", "unscored" or "unusable". ValueError if it lacks what scoring needs, or has it in another type."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a prediction, got {row!r:.80}")
    for name in TEXTS:
        if not isinstance(row.get(name), str | None):
            raise ValueError(f"{name}: expected text, got {row[name]!r:.80}")
    need(row, "benchmark")
    need(row, "id")
    if row.get("frames") is not None:
        one_of(row, "frames", ("ordered", "shuffled"))
    if row.get("error") and "prediction" not in row:
        return "unusable"
    if (
        row["benchmark"] == "mmvu"
        and row.get("problem_type") not in (None, "multiple choice")
        or row["benchmark"] == "tempcompass"
        and row.get("task") == "captioning"
    ):
        return "unscored"
    if not row.get("solution"):
        raise ValueError("solution: missing; join the official files with --annotations DIR")
    need(row, "problem_type")
    options = row.get("options") or []
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise ValueError(f"options: expected a list of texts, got {options!r:.80}")
    if "prediction" not in row:
        raise ValueError("prediction: missing")
    if row["benchmark"] == "vsibench":
        one_of(row, "task", VSI_TYPES)
    return "scored"


def score_benchmark(name, rows):
    """{"score": percent, "se", "n", "answered", "unparsed": share of n, "by_task": {task: {...}}, ...} of judged rows, one a question.

    Not in n, but listed: `unscored` (they need a judge model) and `unusable` (rows with an `error`: no answer was made).
    """
    scored, unscored, unusable = (
        [r for r in rows if r["place"] == place] for place in ("scored", "unscored", "unusable")
    )
    tasks = by(scored, "task")
    overall = {"vsibench": vsi_score, "videommmu": videommmu_score}.get(name, lambda rows, tasks: describe(rows))
    described = {**describe(scored), **overall(scored, tasks)}
    groups = {"by_" + key: by(scored, key) for key in GROUPS if any(r.get(key) for r in scored)}
    if name == "tempcompass":
        for task, part in tasks.items():
            part["by_dim"] = by([r for r in scored if r["task"] == task], "dim")
        described["note"] = (
            "pooled over multi-choice, yes_no and caption_matching; captioning, which needs a judge, is left out"
        )
    if name == "mmvu":
        described["note"] = "multiple choice only; open-ended questions need a judge and are listed as unscored"
    if name == "mvbench":
        described["clipped"] = sum("start" in r for r in scored)  # questions on a part of their video
    return {
        **described,
        "answered": sum(answer_of(r["prediction"]) != "" for r in scored),
        "unparsed": sum(not r["judged"][1] for r in scored) / len(scored) if scored else None,
        "by_task": tasks,
        **groups,
        "unscored": [str(r["id"]) for r in unscored],
        "unusable": [str(r["id"]) for r in unusable],
    }


def describe(rows):
    """Mean score in percent, its standard error (None for fewer than two), and the number of questions."""
    values, n = [100 * r["judged"][0] for r in rows], len(rows)
    mean = sum(values) / n if n else None
    return {
        "score": mean,
        "n": n,
        "se": math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None,
    }


def by(rows, key):
    names = sorted({r[key] for r in rows if r.get(key) is not None})
    return {name: describe([r for r in rows if r.get(key) == name]) for name in names}


def mean_of(parts):
    """Plain mean of the parts' scores, however many questions each has, with se sqrt(sum se²) / k. None without parts."""
    k = len(parts)
    se = math.sqrt(sum(p["se"] ** 2 for p in parts)) / k if k and all(p["se"] is not None for p in parts) else None
    return {"score": sum(p["score"] for p in parts) / k if k else None, "se": se}


def vsi_score(rows, tasks):
    """Mean over the eight tasks, of which relative direction is first the mean of its levels; `tasks` says how many are here.

    Video-R1 instead reports the mean of two: accuracy of all letters, mean relative accuracy of all numbers.
    """
    groups = {
        task: [t for t in tasks if t == task or task == DIRECTION and t.startswith(DIRECTION)] for task in VSI_TASKS
    }
    eight = [mean_of([tasks[t] for t in names]) for names in groups.values() if names]
    halves = [describe([r for r in rows if (r["task"] in VSI_NUMBERS) == numeric]) for numeric in (False, True)]
    both = mean_of(halves) if all(h["n"] for h in halves) else mean_of([])
    return {**mean_of(eight), "tasks": len(eight), "score_video_r1": both["score"], "se_video_r1": both["se"]}


def videommmu_score(rows, tasks):
    """Mean of the tracks (pooled where a file names none); knowledge gain in percent of what the video could still teach."""
    with_video = [r for r in rows if r.get("task") != "question_only"]
    parts = [tasks[t] for t in TRACKS if t in tasks]
    n_tracks = sum(p["n"] for p in parts)
    score = {**mean_of(parts), "n": n_tracks} if n_tracks == len(with_video) else describe(with_video)
    if "Adaptation" in tasks and "question_only" in tasks:
        score |= knowledge_gain(tasks["Adaptation"], tasks["question_only"])
    return score


def knowledge_gain(after, before):
    """100 (after − before) / (100 − before), percent, and its standard error (first order, the two runs taken as independent)."""
    left = 100 - before["score"]
    if left == 0:  # nothing was left to learn
        return {"delta_knowledge": None, "se_delta_knowledge": None}
    se = None
    if after["se"] is not None and before["se"] is not None:
        se = 100 / left * math.hypot(after["se"], before["se"] * (100 - after["score"]) / left)
    return {"delta_knowledge": 100 * (after["score"] - before["score"]) / left, "se_delta_knowledge": se}


# ------------------------------------------------------------------------------------------------- table and join


def print_table(summary):
    """Our scores with their standard errors, by task below; published ones beside them, marked so."""
    number = lambda x, width: f"{'-' if x is None else format(x, '.1f'):>{width}}"
    cell = lambda scores: "/".join(f"{s:.1f}" for s in scores or ()) or "-"
    print(
        f"{'':<34} {'n':>6} {'score':>6}   {'se':>4} {'unread':>7}   "
        + "".join(f"{model:<28}" for model in PUBLISHED)
        + "(published; three: 16/32/64 frames)"
    )
    for name in [n for n, part in summary.items() if isinstance(part, dict) and "by_task" in part]:
        part = summary[name]
        print(
            f"{name:<34} {part['n']:>6} {number(part['score'], 6)} ± {number(part['se'], 4)} "
            f"{'-' if part['unparsed'] is None else format(part['unparsed'], '.1%'):>7}   "
            + "".join(f"{cell(scores.get(name)):<28}" for scores in PUBLISHED.values()).rstrip()
        )
        for key in [k for k in ("by_task", *(f"by_{g}" for g in GROUPS)) if k in part]:
            for label, line in part[key].items():
                label = label if key == "by_task" else f"{key[3:].replace('_', '-')} {label}"
                print(f"  {label:<32.32} {line['n']:>6} {number(line['score'], 6)} ± {number(line['se'], 4)}")
        if name == "vsibench":
            print(
                f"  mean of {part['tasks']} of 8 tasks; Video-R1's mean of letters and numbers: {number(part['score_video_r1'], 1)} "
                f"± {number(part['se_video_r1'], 1)}"
            )
        if "delta_knowledge" in part:
            print(f"  knowledge gain: {number(part['delta_knowledge'], 1)} ± {number(part['se_delta_knowledge'], 1)}")
        for key in [k for k in ("note", "clipped") if k in part]:
            print(f"  {part[key]}" if key == "note" else f"  {part[key]} questions on a part of their video")
        for key in [k for k in ("unscored", "unusable") if part[k]]:
            print(f"  {len(part[key])} {key}, not in n")


def join_annotations(rows, root):
    """The rows, those without a solution filled up from the official files in `root`; what a row has itself wins.

    An id is the record's, or without its "<task>/" if the row has the task. UserError lists every unknown id.
    """
    is_bare = lambda row: isinstance(row, dict) and not row.get("solution") and not row.get("error")
    bare = [row for row in rows if is_bare(row)]
    if strange := sorted({str(row.get("benchmark")) for row in bare} - set(NAMES)):
        raise UserError(f"no benchmark {', '.join(strange)}: {', '.join(NAMES)}")
    known = {
        (name, r["id"]): r
        for name in NAMES
        if any(row["benchmark"] == name for row in bare)
        for r in read_benchmark(name, root)
    }
    find = lambda row: (
        known.get((row["benchmark"], str(row.get("id"))))
        or known.get((row["benchmark"], f"{row.get('task')}/{row.get('id')}"))
    )
    if unknown := [f"{row['benchmark']} {row.get('id')!r}" for row in bare if find(row) is None]:
        raise UserError(f"{len(unknown)} predictions are of no question in {root}: {', '.join(unknown)}")
    return [{**row, **find(row), **{k: v for k, v in row.items() if v}} if is_bare(row) else row for row in rows]
