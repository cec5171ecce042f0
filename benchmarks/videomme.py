"""Video-MME: multiple choice about short, medium and long videos. Score: correct / total, by duration, domain and task.

files    test.jsonl, test.json, test-*.parquet or videomme/test-*.parquet
videos   data/<videoID>.mp4, .MP4 or .mkv
"""

from pathlib import Path

from benchmarks.shared import make_record, text_field

FILES = [["test.jsonl"], ["test.json"], ["test-*.parquet"], ["videomme/test-*.parquet"]]
GROUPS = ("duration", "domain", "sub_category")


def records(row, number, file, base):
    video = text_field(row, "videoID")
    paths = [f"data/{video}{ending}" for ending in (".mp4", ".MP4", ".mkv")]
    existing = [path for path in paths if Path(base, path).is_file()]
    yield make_record(
        text_field(row, "question_id"),
        text_field(row, "task_type"),
        text_field(row, "question"),
        text_field(row, "answer"),
        existing[0] if existing else paths[0],
        row.get("options") or (),
        "multiple choice",
        **{key: text_field(row, key) for key in GROUPS},
    )
