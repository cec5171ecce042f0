"""Strange data, disks, kills and launches: a run stops in one line, names what is wrong, and leaves nobody behind."""

import json
import os
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from processes import ROOT, children, is_alive

import data
from support import checkpoints, distributed, model_files, record_files, storage, training
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
def test_a_wrong_data_root_is_one_line_before_the_model_is_loaded(run, tmp_path, stage):
    """Guards: 7B loaded for minutes, and then one line per clip."""
    root = tmp_path / "gone/below"
    with pytest.raises(UserError) as error:
        run(stage, data_root=root, max_unreadable=1.0, steps=2)
    line = str(error.value)
    assert line.startswith(f"data_root: none of the media is in {root}; for example, ./media/") and line.endswith(
        ": no such file"
    )
    assert not (tmp_path / "out").exists()


def test_a_run_that_reads_nothing_ends_in_its_first_step(tmp_path):
    """Guards: status 0 and a `final` of a run that has not read one clip; a missing folder that is not named."""
    run = made_run(tmp_path / "gone", 40, batch_size=8, max_unreadable=1.0)
    assert stops_at(run, set(range(40))) == 0
    assert all(reason.endswith(f"there is no folder {tmp_path / 'gone'}") for reason in run.skipped.values())


def test_a_saved_model_can_be_read_by_others_and_is_saved_quietly(run, capfd, caplog):
    """Guards: weights that only their owner can read, beside a config for all; a line of accelerate about tied weights
    at every checkpoint, which sounds like damage.
    """
    final = run("sft", steps=2, save_every=1) / "final"
    assert (final / "model.safetensors").stat().st_mode == (final / "config.json").stat().st_mode
    assert "shared tensor" not in caplog.text + "".join(capfd.readouterr())


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


def test_a_resumed_run_forgets_what_it_could_not_read_before(tmp_path):
    """Guards: media that came back, but for which no restart goes on; an IndexError after a lower limit."""
    resumed = made_run(tmp_path, 9000, batch_size=4, max_unreadable=0.0)
    resumed.first_step = 100
    resumed.skipped = {f"{i} ({i}.mp4)": "no such file" for i in range(50)}
    assert stops_at(resumed, set(), 200) is None


def test_a_killed_worker_ends_a_step_in_one_line(forker, tmp_path):
    """Guards: torch's traceback in the middle of an update; a step without its last samples."""
    code = """
import multiprocessing, time
from types import SimpleNamespace
from support import workers
results = workers.with_workers(list(range(99)), SimpleNamespace(num_workers=1), batch_size=1)
next(results)
multiprocessing.active_children()[0].kill()
time.sleep(0.3)
print("this step is finished", flush=True)
next(results)
"""
    (tmp_path / "script.py").write_text(code)
    assert forker.wait(forker.start(tmp_path / "said", str(tmp_path / "script.py"))) == 1
    said = (tmp_path / "said").read_text().strip().splitlines()
    assert len(said) == 2 and said[0] == "this step is finished"
    assert "is killed by signal: Killed, most often for lack of memory: lower num_workers" in said[1]


def test_a_killed_worker_loses_no_finished_step(tmp_path):
    """Guards: the steps since the last checkpoint that are lost with a worker; other ranks that wait for this one."""
    run = made_run(tmp_path, 9, steps=9)
    run.accelerator.is_main_process = False
    run.stage = "sft"

    def batches():
        for number in range(3):
            yield [data.Sample({"problem_id": number, "path": f"{number}.mp4"})]
        raise UserError("killed")

    steps = run.steps(batches())
    assert [next(steps)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(UserError, match="killed"):
        next(steps)
    assert run.saved == [3]


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
    (tmp_path / "other").write_text('5\n{"step": 1}\n[1]\n')
    assert storage.read_jsonl(tmp_path / "other") == [{"step": 1}]
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


@pytest.mark.parametrize("parent, name", [(1, "anything"), (4242, "systemd"), (4242, "tini")])
def test_a_rank_whose_launcher_has_ended_does_not_wait_for_it(monkeypatch, parent, name):
    """Guards: ranks of a killed torchrun that wait for hours for the store that it held, also where another process
    than the first adopts orphans.
    """
    monkeypatch.setattr(distributed, "LAUNCHED", True)
    monkeypatch.setattr(distributed, "process_name", lambda process: name)
    monkeypatch.setattr(os, "getppid", lambda: parent)
    with pytest.raises(UserError, match="the launcher of this process has ended"):
        distributed.make_accelerator(TrainConfig())


def test_kill_of_toy_py_ends_the_stage_that_it_runs(tmp_path, forker):
    """Guards: a launcher, its stage and the stage's workers that go on after toy.py; an evaluation without launcher."""
    started = tmp_path / "started"
    stage = f"import time; from support import workers; workers.leave_with_parent(); open('{started}', 'w')"
    (tmp_path / "stage.py").write_text(f"{stage}; time.sleep(120)")
    code = f"import toy; toy.stages = lambda *_: [(['{tmp_path}/stage.py'], toy.Path('{tmp_path}/result'))]; toy.main()"
    (tmp_path / "script.py").write_text(code)
    for name in ("world", "base"):
        (tmp_path / name).mkdir()
    toy = forker.start(tmp_path / "said", str(tmp_path / "script.py"), "--out", tmp_path, PYTHONPATH=str(ROOT))
    end = time.time() + 200
    while not started.exists():
        assert is_alive(toy) and time.time() < end
        time.sleep(0.1)
    below = children(toy)
    os.kill(toy, signal.SIGTERM)
    assert forker.wait(toy, 90) == 130
    while len(below) < 2 or any(is_alive(pid) for pid in below):
        assert time.time() < end
        time.sleep(0.1)


def test_output_that_nobody_can_read_is_dropped_and_nohup_holds(monkeypatch):
    """Guards: a closed terminal or pipe that ends a run before it has saved; a run that nohup does not protect."""
    # the first is too long for the buffer, so that writing fails; the other fails when it is flushed
    for text in ("x" * 100_000, "x"):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as stream:
            output = training.Output(stream)
            for _ in range(3):
                output.write(text)
                output.flush()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        training.StopSignal()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_folder_that_was_moved_or_holds_a_users_config_is_refused(run, tmp_path):
    """Guards: two runs that write into one folder; a user's config that the run's own replaces."""
    cfg = TrainConfig(output_dir=str(tmp_path / "a"))
    checkpoints.lock_folder(cfg.output_dir)
    (tmp_path / "a/run.json").write_text("{}")
    checkpoints.check_lock(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    for check in (checkpoints.check_lock, lambda _: checkpoints.take_folder(None, cfg, None, {})):
        with pytest.raises(UserError, match="this folder was moved or replaced"):
            check(cfg.output_dir)
    config = tmp_path / "out/config.yaml"
    config.parent.mkdir()
    config.write_text("seed: 1\nsft:\n  steps: 2\n")
    with pytest.raises(UserError, match="not written by a run"):
        run("sft", steps=2)
    assert "seed" in config.read_text()


def test_steps_without_a_checkpoint_are_kept_and_another_stage_is_refused(run):
    """Guards: a log that a mistaken second start shortens; SFT that goes on from a checkpoint of T-GRPO."""
    out = run("sft", steps=2, save_every=1)
    shutil.rmtree(out / "final")
    identity = json.loads((out / "checkpoint-1/run.json").read_text())
    other = identity | {"stage": "tgrpo"}
    assert checkpoints.changes(other, identity, TrainConfig()) == ["its stage was tgrpo, is sft"]
    # a setting that an older version did not have counts as its default
    older = identity | {"settings": dict(identity["settings"])}
    older["settings"].pop("freeze_vision")
    assert checkpoints.changes(older, identity, TrainConfig(lr_schedule="constant")) == []
    shutil.rmtree(out / "checkpoint-1")
    run("sft", steps=1)
    assert len(storage.read_jsonl(out / "earlier-1/metrics.jsonl")) == 2


def test_a_checkpoint_of_another_family_is_one_line(run, world, hub):
    """Guards: a traceback of torch if resume_changed is true and the weights have other shapes."""
    run("sft", steps=2, save_every=1, model=world / "base")
    with pytest.raises(UserError, match="checkpoint-1: cannot be loaded: .*size mismatch"):
        run("sft", steps=3, model=hub / "qwen3_tied", resume_changed=True)


OTHER_FAMILYS = {"untied": [0.5, 0.5, 0.5], "qwen3_tied": [0.48145466, 0.4578275, 0.40821073]}


@pytest.mark.parametrize("layout", ["untied", "qwen3_tied"])
@pytest.mark.parametrize(
    "changed",
    [{"merge_size": 1}, {"do_rescale": False}, {"do_normalize": False}, {"rescale_factor": 1 / 127}, "image_mean"],
    ids=str,
)
def test_a_processor_that_makes_other_pixels_is_refused(hub, tmp_path, layout, changed):
    """Guards: a traceback in the first step, and pixels from 0 to 255, too bright, or as of the other family without a
    word, also where only those of clips are.
    """
    if changed == "image_mean":
        changed = {"image_mean": OTHER_FAMILYS[layout]}
    shutil.copytree(hub / layout, tmp_path / "model")
    for path in (tmp_path / "model").glob("*preprocessor_config.json"):
        content = path.read_text()
        path.write_text(json.dumps(json.loads(content) | changed))
        with pytest.raises(UserError, match="its merge_size is not the model's, 2|do_rescale or do_normalize is false"):
            model_files.load_processor(TrainConfig(model=str(tmp_path / "model")))
        path.write_text(content)
