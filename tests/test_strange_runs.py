"""Strange data, disks, kills and launches: a run stops in one line, names what is wrong, and leaves nobody behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from processes import QUIET, ROOT, children, is_alive

import data
from support import checkpoints, distributed, record_files, storage, training
from support.settings import TrainConfig, UserError


def made_run(tmp_path, n_rows, **settings):
    """A Run that only counts what could be read."""
    run = training.Run.__new__(training.Run)
    cfg = TrainConfig(data_root=str(tmp_path), **settings)
    counts = dict(n_rows=n_rows, first_step=0, n_readable=0, skipped={}, unreadable={}, bad_steps=set())
    saved = []
    vars(run).update(
        cfg=cfg, accelerator=SimpleNamespace(print=print), saved=saved, save_checkpoint=saved.append, **counts
    )
    return run


def stops_at(run, broken, steps=1000):
    """The step in which a run ends that cannot read the records in `broken`; None if that is none of the first."""
    size = run.cfg.batch_size
    for step in range(run.first_step, steps):
        batch = []
        for i in range(step * size, (step + 1) * size):
            number = int(data.record_of_draw(i, run.n_rows, 0))
            record = {"problem_id": number, "path": f"{number}.mp4"}
            batch.append(data.Sample(record, error="no such file" if number in broken else None))
        try:
            assert all(sample.record["problem_id"] not in broken for sample in run.drop_unreadable(step, batch))
        except UserError as error:
            run.said = str(error)
            return step
    return None


@pytest.mark.parametrize("stage", ["sft", "tgrpo"])
def test_a_wrong_data_root_ends_the_run_at_once_and_names_the_folder(run, tmp_path, stage):
    """Guards: status 0 and a `final` of a run that has not read one clip."""
    with pytest.raises(UserError) as error:
        run(stage, data_root=tmp_path / "gone/below", max_unreadable=1.0, steps=2)
    line = str(error.value)
    assert "8 of the last 8 records drawn are unusable, max_unreadable is 1.0" in line and "\n" not in line
    assert line.endswith(f"there is no folder {tmp_path / 'gone'}")
    assert not (tmp_path / "out/final").exists()


@pytest.mark.parametrize("share, earliest, latest", [(1 / 3, 2, 6), (0.1, 5, 25), (0.005, None, None)])
def test_missing_media_of_a_large_set_stop_a_run_early(tmp_path, share, earliest, latest):
    """Guards: 1,000 steps on a set of which a third is missing, because 2,630 rows of 263,071 may be; lost steps."""
    run = made_run(tmp_path, 263_071, batch_size=8)
    step = stops_at(run, set(range(0, run.n_rows, round(1 / share))))
    assert step is None if latest is None else earliest <= step <= latest
    assert run.saved == ([] if step is None else [step])


@pytest.mark.parametrize("batch_size", [1, 4, 1024])
@pytest.mark.parametrize("broken, stops", [({7}, False), ({7, 8}, False), ({7, 8, 9}, True)])
def test_a_small_set_may_have_the_share_that_the_setting_says(tmp_path, batch_size, broken, stops):
    """Guards: one bad clip of 20 that stops a run as soon as it is drawn, or in a later epoch."""
    run = made_run(tmp_path, 20, batch_size=batch_size, max_unreadable=0.1)
    assert (stops_at(run, broken, 60) is not None) == stops


def test_a_resumed_run_has_neither_forgotten_nor_counted_twice(tmp_path):
    """Guards: a run that is restarted often and never reaches its limit; one that stops because it was restarted; an
    IndexError after a resume with a lower limit.
    """
    broken = set(range(0, 9000, 40))
    whole = made_run(tmp_path, 9000, batch_size=4)
    last = stops_at(whole, broken)
    part = made_run(tmp_path, 9000, batch_size=4)
    assert last > 20 and stops_at(part, broken, last - 1) is None
    resumed = made_run(tmp_path, 9000, batch_size=4)
    resumed.first_step = last - 1
    resumed.skipped, resumed.unreadable = json.loads(json.dumps([part.skipped, part.unreadable]))
    assert stops_at(resumed, broken) == last and resumed.said == whole.said
    part.first_step = last - 1
    part.cfg.max_unreadable = 0.0
    assert stops_at(part, set()) == last - 1 and part.said.endswith("the last: no such file")


def test_an_endless_target_and_a_prompt_that_never_fits_are_one_line(run, world, tmp_path, capsys):
    """Guards: 12.8 GB for one chain of thought of 20,000 words; the traceback of the empty prompt."""
    rows = json.loads((world / "world/sft.json").read_text())
    rows[3]["process"] = f"<think>{'right ' * 20_000}</think>"
    (tmp_path / "r.json").write_text(json.dumps(rows))
    run("sft", records=tmp_path / "r.json", steps=3, max_unreadable=0.1)
    assert f"skipped {rows[3]['problem_id']} (" in capsys.readouterr().out
    with pytest.raises(UserError, match="empty text: .* tokens, max_prompt_tokens is 3"):
        run("sft", "other", max_prompt_tokens=3)


def test_three_bad_steps_in_a_row_are_steps_and_not_updates(tmp_path):
    """Guards: a run with three updates per rollout that ends after one bad step."""
    run = made_run(tmp_path, 9)
    for step, grad_norm in enumerate([float("nan")] * 2 + [1.0] + [float("inf")] * 2):
        for _ in range(3):
            assert run.is_finite(grad_norm, step) == (step == 2)
    with pytest.raises(RuntimeError, match="three steps in a row, to 5"):
        run.is_finite(float("nan"), 5)


def test_every_line_of_a_log_is_json_and_nan_is_read_as_missing(tmp_path):
    """Guards: NaN in metrics.jsonl, which strict readers refuse; options of NaN, as pandas writes them."""
    storage.append_rows(tmp_path / "log", [{"step": 0, "loss": float("nan"), "inner": [float("-inf"), 1.5, "NaN"]}])
    assert (tmp_path / "log").read_text() == '{"step": 0, "loss": null, "inner": [null, 1.5, "NaN"]}\n'
    for name, text in (("a.json", '[{"options": NaN}]'), ("a.jsonl", '{"options": NaN}\n')):
        (tmp_path / name).write_text(text)
        assert record_files.read_rows(tmp_path / name) == [{"options": None}]


@pytest.mark.parametrize("message", ["unexpected pos 2968256 vs 2968148", "basic_ios::clear: iostream error"])
def test_a_full_disk_inside_torch_save_is_one_line(tmp_path, message):
    """Guards: a traceback for a full disk, as torch.save words it."""
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(UserError, match="checkpoint-4: .*; free disk space .* continues from checkpoint-2"):
        with checkpoints.room_on_disk(tmp_path / "checkpoint-4"):
            raise RuntimeError(f"[enforce fail at inline_container.cc:672] . {message}")
    with pytest.raises(RuntimeError, match="CUDA"), checkpoints.room_on_disk(tmp_path / "checkpoint-4"):
        raise RuntimeError("CUDA error")


def test_another_number_of_processes_is_named(run, capsys):
    """Guards: a resumed run whose samples silently differ from those of an uninterrupted one."""
    out = run("tgrpo", steps=2, save_every=1, lr_schedule="constant")
    shutil.rmtree(out / "final")
    state = out / "checkpoint-1/state.json"
    assert "processes:" not in capsys.readouterr().out
    state.write_text(json.dumps(json.loads(state.read_text()) | {"processes": 4}))
    run("tgrpo", steps=2, save_every=1, lr_schedule="constant")
    assert "processes: 4 before, 1 now" in capsys.readouterr().out


def test_a_rank_whose_launcher_has_ended_does_not_wait_for_it(monkeypatch):
    """Guards: ranks of a killed torchrun that wait for hours for the store that it held."""
    monkeypatch.setattr(distributed, "LAUNCHED", True)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    with pytest.raises(UserError, match="the launcher of this process has ended"):
        distributed.make_accelerator(TrainConfig())


def test_kill_of_toy_py_ends_the_stage_that_it_runs(tmp_path):
    """Guards: a launcher, its stage and the stage's workers that go on after toy.py; an evaluation without launcher."""
    started = tmp_path / "started"
    stage = f"import time; from support import workers; workers.leave_with_parent(); open('{started}', 'w')"
    (tmp_path / "stage.py").write_text(f"{stage}; time.sleep(120)")
    code = f"import toy; toy.stages = lambda *_: [(['{tmp_path}/stage.py'], toy.Path('{tmp_path}/result'))]; toy.main()"
    for name in ("world", "base"):
        (tmp_path / name).mkdir()
    environment = QUIET | {"PYTHONPATH": str(ROOT)}
    toy = subprocess.Popen([sys.executable, "-c", code, "--out", tmp_path], cwd=ROOT, env=environment)
    end = time.time() + 200
    while not started.exists():
        assert toy.poll() is None and time.time() < end
        time.sleep(0.1)
    below = children(toy.pid)
    toy.send_signal(signal.SIGTERM)
    assert toy.wait(90) == 130
    while len(below) < 2 or any(is_alive(pid) for pid in below):
        assert time.time() < end
        time.sleep(0.1)
