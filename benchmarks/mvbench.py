"""MVBench: 20 tasks of multiple choice about short videos. Score: correct / total.

    files    json/<task>.json
    videos   video/<folder>/<video>, for one task a folder of stills

The answer is a text; its letter is its place among the candidates. Five tasks ask about a part of a video: `start` and
`end` in seconds (the authors show that part, Video-R1 shows the whole video).
"""

from benchmarks.shared import make_record, one_of, text_field

FILES = [["json/*.json"]]

# folder of the videos: its tasks
FOLDERS = {
    "star/Charades_v1_480": "action_sequence action_prediction object_interaction",
    "sta/sta_video": "action_localization",
    "clevrer/video_validation": "moving_direction moving_count moving_attribute object_existence "
    "counterfactual_inference",
    "perception/videos": "object_shuffle action_count state_change character_order",
    "ssv2_video": "action_antonym",
    "Moments_in_Time_Raw/videos": "fine_grained_action",
    "FunQA_test/test": "unexpected_action",
    "nturgbd": "fine_grained_pose",
    "scene_qa/video": "scene_transition",
    "vlnqa": "egocentric_navigation",
    "tvqa/frames_fps3_hq": "episodic_reasoning",
}
FOLDER_OF = {}
for folder, tasks in FOLDERS.items():
    FOLDER_OF |= dict.fromkeys(tasks.split(), folder)


def records(row, number, file, base):
    task = one_of("task", file.stem, FOLDER_OF)
    record = task_record(row, number, task, FOLDER_OF[task])
    if task == "episodic_reasoning":
        record["data_type"] = "frame"
    yield record


def task_record(row, number, task, folder):
    """The record of a row, whose video is in video/`folder`."""
    options = [str(candidate) for candidate in row.get("candidates") or ()]
    answer = one_of("answer", text_field(row, "answer"), options)
    letter = chr(ord("A") + options.index(answer))
    path = f"video/{folder}/{text_field(row, 'video')}"
    record = make_record(f"{task}/{number - 1}", task, text_field(row, "question"), letter, path, options)
    for key in ("start", "end"):
        if row.get(key) is not None:
            record[key] = float(row[key])
    return record


def extra_scores(rows, by_task):
    clipped = sum("start" in row for row in rows)
    return {"clipped": clipped, "note": f"{clipped} questions on a part of their video"}
