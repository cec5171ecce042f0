"""VSI-Bench: numbers and choices about rooms. Score: the mean of eight tasks.

    files    test.jsonl, test.parquet or test-*.parquet
    videos   <dataset>/<scene>.mp4

Numbers are scored by mean relative accuracy, letters by equality. The task of relative directions is first the mean of
its three levels. (Video-R1 instead reports the mean of two: the accuracy of all letters, and the mean relative accuracy
of all numbers. That is `score_video_r1`.)
"""

import math

from benchmarks.shared import choice_field, make_record, mean_of_parts, mean_score, text_field, with_error
from rewards import relative_error
from support.parsing import number_or_nan

FILES = [["test.jsonl"], ["test.parquet"], ["test-*.parquet"]]

DIRECTION = "object_rel_direction"
NUMBERS = ("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation")
TASKS = (*NUMBERS, "object_rel_distance", DIRECTION, "route_planning", "obj_appearance_order")
QUESTION_TYPES = (*TASKS, f"{DIRECTION}_easy", f"{DIRECTION}_medium", f"{DIRECTION}_hard")


def records(row, number, file, base):
    task = choice_field(row, "question_type", QUESTION_TYPES)
    yield make_record(
        text_field(row, "id"),
        task,
        text_field(row, "question"),
        text_field(row, "ground_truth"),
        f"{text_field(row, 'dataset')}/{text_field(row, 'scene_name')}.mp4",
        row.get("options") or (),
        "regression" if task in NUMBERS else "multiple choice",
        data_source=row["dataset"],
    )


def check_row(row):
    choice_field(row, "task", QUESTION_TYPES)


def score_answer(row, answer, truth):
    """(score, whether the answer could be read) of a number; None for a letter, which has the general rule."""
    if row["problem_type"] == "multiple choice":
        return None
    number = number_or_nan(answer)
    if not math.isfinite(number):
        # VSI-Bench reads the first word only
        number = number_or_nan(answer.split()[0])
    return mean_relative_accuracy(number, truth), math.isfinite(number)


def mean_relative_accuracy(prediction, truth):
    """Share of the thresholds t = .50, .55, … .95 with relative error <= 1 − t (VSI-Bench's code; its paper says <).

    >>> mean_relative_accuracy(3, 4), mean_relative_accuracy(3, 2)
    (0.6, 0.1)
    """
    error = relative_error(prediction, truth)
    # the bits of numpy.linspace(0.5, 0.95, 10), because ties depend on them
    thresholds = [0.5 + i * ((0.95 - 0.5) / 9) for i in range(10)]
    return sum(error <= 1 - threshold for threshold in thresholds) / 10


def extra_scores(rows, by_task):
    """Mean over the tasks that are there (`tasks` is their number, up to 8), and Video-R1's score."""
    task_scores = []
    for task in TASKS:
        names = [name for name in by_task if name == task or (task == DIRECTION and name.startswith(DIRECTION))]
        if names:
            task_scores.append(mean_of_parts([by_task[name] for name in names]))
    letters = mean_score([row for row in rows if row["task"] not in NUMBERS])
    numbers = mean_score([row for row in rows if row["task"] in NUMBERS])
    video_r1 = mean_of_parts([letters, numbers] if letters["n"] and numbers["n"] else [])
    of_two = with_error(video_r1["score"], video_r1["se"])
    return {
        **mean_of_parts(task_scores),
        "tasks": len(task_scores),
        "score_video_r1": video_r1["score"],
        "se_video_r1": video_r1["se"],
        "note": f"mean of {len(task_scores)} of 8 tasks; Video-R1's mean of letters and numbers: {of_two}",
    }
