"""TVBench: ten tasks of multiple choice that neither one frame nor the text gives away. Score: correct / total.

    files    json/<task>.json, with MVBench's rows
    videos   video/<task>/<video>

Two tasks ask about a part of a video. The videos of action_antonym (.avi, from NTU RGB+D) are not in the authors' set.
"""

from benchmarks import mvbench
from benchmarks.shared import one_of

FILES = mvbench.FILES
TASKS = (
    "action_antonym action_count action_localization action_sequence egocentric_sequence moving_direction object_count "
    "object_shuffle scene_transition unexpected_action"
).split()

extra_scores = mvbench.extra_scores


def records(row, number, file, base):
    task = one_of("task", file.stem, TASKS)
    yield mvbench.task_record(row, number, task, task)
