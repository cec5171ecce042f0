"""The verdict of a rehearsal: hours, memory and disk of the whole run, from a log of 20 steps."""

import json
import types

import pytest

from support.settings import UserError
from tgrpo import TGRPOConfig
from tools import rehearse


def rehearsed(folder, steps):
    """A folder as 20 steps leave it, whose first step after each start took 100 s instead of 3 s."""
    run = folder / "tgrpo"
    for name in ("checkpoint-10", "final"):
        (run / name).mkdir(parents=True)
        (run / name / "weights").write_bytes(bytes(10**8))
    rows = []
    for step in steps:
        seconds = 100 if step in (0, 10) else 1
        rows.append({"step": step, "time/rollout": 2 * seconds, "time/update": seconds, "data/skipped": 3})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_the_verdict_counts_hours_disk_and_skipped_records(tmp_path, world):
    """Guards: hours that include compilation and loading; a disk that fills with the third checkpoint."""
    run = rehearsed(tmp_path, range(20))
    args = types.SimpleNamespace(stage="tgrpo", gpus=1, out=tmp_path)
    cfg = TGRPOConfig(model=str(world / "base"), steps=1200, keep_checkpoints=2)
    text = rehearse.verdict(args, cfg, run, 30.0)
    lines = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines()}
    assert lines["whole run: 1200 steps of 3.0 s"] == "1.0 h"
    assert lines["disk for checkpoints and final"] == "0.4 GB"
    assert lines["records skipped, of 160 drawn"] == "3"


def test_steps_that_are_missing_after_the_resume_are_no_verdict(tmp_path):
    """Guards: a run that starts again from 0, or leaves steps out, and is called healthy."""
    run = rehearsed(tmp_path, [*range(12), *range(10, 20)])
    with pytest.raises(UserError, match="not one row for each of 20 steps"):
        rehearse.verdict(types.SimpleNamespace(stage="sft"), None, run, 30.0)
