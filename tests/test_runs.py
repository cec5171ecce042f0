"""A run goes on only as the run it was, alone in its folder, and ends when it is asked to, with its work saved."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from naive import without_times
from processes import QUIET, ROOT, as_arguments, children, free_port, is_alive
from safetensors.torch import load_file, save_file

import policy
import tgrpo
from support import checkpoints, distributed, storage
from support.settings import UserError
from support.storage import read_jsonl

SETTINGS = dict(steps=3, save_every=1, keep_checkpoints=9, lr_schedule="constant")


@pytest.fixture(scope="module")
def three_steps(run_into, tmp_path_factory):
    """Folder of a finished run of three steps, with checkpoint-1 and checkpoint-2."""
    return run_into(tmp_path_factory.mktemp("runs") / "out", "tgrpo", **SETTINGS)


@pytest.fixture
def finished(three_steps, world, tmp_path):
    """(a copy of that folder, the settings of its run), on records and weights of its own."""
    shutil.copytree(three_steps, tmp_path / "out")
    shutil.copytree(world / "base", tmp_path / "base")
    shutil.copy(world / "world/rl.json", tmp_path / "rl.json")
    return tmp_path / "out", {**SETTINGS, "model": tmp_path / "base", "records": tmp_path / "rl.json"}


@pytest.fixture
def started(finished):
    """The same, as if it had been stopped after checkpoint-2."""
    folder, settings = finished
    shutil.rmtree(folder / "final")
    return folder, settings


# ------------------------------------------------------------------------------------------------- what is resumed


@pytest.mark.parametrize(
    "change, line",
    [
        ({"lr": 1e-3}, "lr was 0.0005, is 0.001"),
        ({"prompt": "{problem}"}, "prompt was"),
        ({"temporal_rule": "none"}, "temporal_rule was 'margin', is 'none'"),
        ({"steps": 5, "lr_schedule": "linear"}, "steps was 3, is 5, which the linear schedule depends on"),
    ],
)
def test_a_run_does_not_resume_with_other_settings(run, started, change, line):
    """Guards: a run whose halves have different settings, and whose config.yaml only has the second ones."""
    folder, settings = started
    before = (folder / "config.yaml").read_text()
    with pytest.raises(UserError) as error:
        run("tgrpo", **settings | change)
    said = str(error.value)
    assert line in said and "checkpoint-2 was made by a different run" in said and "\n" not in said
    assert "--resume false" in said and "--resume_changed true" in said
    assert (folder / "config.yaml").read_text() == before


def test_changed_records_and_weights_are_noticed_by_their_content(run, started, world, tmp_path):
    """Guards: a new SFT model at the path of the old one, while T-GRPO resumes a policy of the old one."""
    _, settings = started
    records = json.loads((tmp_path / "rl.json").read_text())
    (tmp_path / "rl.json").write_text(json.dumps(records[::-1]))
    with pytest.raises(UserError, match="the content of .*rl.json has changed"):
        run("tgrpo", **settings)
    shutil.copy(world / "world/rl.json", tmp_path / "rl.json")
    changed = {name: tensor + 1e-3 for name, tensor in load_file(tmp_path / "base/model.safetensors").items()}
    save_file(changed, tmp_path / "base/model.safetensors", {"format": "pt"})
    storage.fingerprint.cache_clear()
    with pytest.raises(UserError, match="the model in .*base has changed"):
        run("tgrpo", **settings)


def test_settings_that_do_not_change_the_result_may_change(run, started, tmp_path, capsys):
    """Guards: a run that cannot be moved to other paths, more workers or another micro-batch size."""
    folder, settings = started
    os.rename(tmp_path / "base", tmp_path / "moved")
    os.rename(tmp_path / "rl.json", tmp_path / "moved.json")
    before = without_times(folder)
    paths = {"model": tmp_path / "moved", "records": tmp_path / "moved.json"}
    run("tgrpo", **settings | paths | {"micro_batch_size": 2, "num_workers": 1, "print_every": 0})
    assert "resumed from" in capsys.readouterr().out and (folder / "final").is_dir()
    after = without_times(folder)
    assert [row["step"] for row in after] == [row["step"] for row in before] and after[:2] == before[:2]


def test_resume_changed_continues_and_names_the_changes(run, started, capsys):
    """Guards: a check that cannot be overridden."""
    _, settings = started
    run("tgrpo", **settings | {"lr": 1e-3, "resume_changed": "true"})
    said = capsys.readouterr().out
    assert "although lr was 0.0005, is 0.001" in said and "resumed from" in said


def test_fewer_steps_than_the_checkpoint_is_an_error(run, started):
    """Guards: a policy after 2 steps saved as the final one of 1 step."""
    _, settings = started
    with pytest.raises(UserError, match="steps: 1, but .*checkpoint-2 is already after step 2"):
        run("tgrpo", **settings | {"steps": 1})


@pytest.mark.parametrize("has_checkpoints", [True, False])
def test_a_finished_run_is_not_overwritten(run, finished, has_checkpoints):
    """Guards: a `final` overwritten by another run that had no checkpoint to compare with."""
    folder, settings = finished
    weights = (folder / "final/model.safetensors").read_bytes()
    refused = [{}, {"lr": 1e-3, "resume_changed": "true"}]
    if not has_checkpoints:
        for checkpoint in checkpoints.finished_checkpoints(folder):
            shutil.rmtree(checkpoint)
        refused.append({"steps": 4})
    line = "a run of 3 steps is finished here, its model is .*final; start from scratch with --resume false"
    for change in refused:
        with pytest.raises(UserError, match=line):
            run("tgrpo", **settings | change)
    assert (folder / "final/model.safetensors").read_bytes() == weights
    if has_checkpoints:
        run("tgrpo", **settings | {"steps": 4})
        assert (folder / "earlier-1/final/model.safetensors").read_bytes() == weights
        assert (folder / "final/model.safetensors").read_bytes() != weights


def test_resume_false_moves_the_earlier_run_aside(run, finished, capsys):
    """Guards: new checkpoints deleted in favour of older ones; the earlier run resumed instead of the new one."""
    folder, settings = finished
    settings["steps"] = 2
    old = {p.name for p in folder.iterdir()} - {".lock"}
    weights = (folder / "final/model.safetensors").read_bytes()
    first = read_jsonl(folder / "metrics.jsonl")
    run("tgrpo", **settings | {"resume": "false", "seed": 5})
    assert {p.name for p in (folder / "earlier-1").iterdir()} == old
    assert (folder / "earlier-1/final/model.safetensors").read_bytes() == weights
    assert f"is now in {folder / 'earlier-1'}" in capsys.readouterr().out
    assert read_jsonl(folder / "earlier-1/metrics.jsonl") == first
    assert read_jsonl(folder / "metrics.jsonl")[0] != first[0]
    assert [p.name for p in checkpoints.finished_checkpoints(folder)] == ["checkpoint-1"]
    shutil.rmtree(folder / "final")
    # the new one is resumed
    run("tgrpo", **settings | {"seed": 5})
    assert "resumed from" in capsys.readouterr().out
    run("tgrpo", **settings | {"resume": "false", "steps": 1})
    assert (folder / "earlier-2/checkpoint-1").is_dir() and (folder / "earlier-1/checkpoint-1").is_dir()


@pytest.mark.parametrize(
    "change, line",
    [
        ({"resume_changed": "true", "steps": 4}, "checkpoint-1: cannot be loaded: .*size mismatch"),
        ({"resume": "false"}, "model: its weights cannot be read"),
    ],
)
def test_a_run_that_cannot_start_changes_nothing(run, finished, hub, tmp_path, change, line):
    """Guards: a finished model, a damaged checkpoint or a whole run that is renamed for a run that fails to load."""
    folder, settings = finished
    (folder / "checkpoint-2/optimizer.bin").unlink()
    model = shutil.copytree(hub / "qwen3_tied", tmp_path / "model")
    if "resume" in change:
        (model / "model.safetensors.index.json").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UserError, match=line):
        run("tgrpo", **settings | {"model": model} | change)
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(run, started, capsys):
    """Guards: a traceback from torch for a file that is incomplete after a full disk or an interrupted copy."""
    folder, settings = started
    whole = without_times(folder)
    weights = folder / "checkpoint-2/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    run("tgrpo", **settings)
    said = capsys.readouterr().out
    assert "checkpoint-2 is damaged: model.safetensors is missing or not what was written" in said
    assert f"resumed from {folder / 'checkpoint-1'}" in said
    assert without_times(folder) == whole
    assert (folder / "earlier-1/checkpoint-2/model.safetensors").exists()
    (folder / "checkpoint-2/state.json").write_text("{")
    (folder / "checkpoint-1/optimizer.bin").unlink()
    # also when it is started again
    for _ in range(2):
        with pytest.raises(UserError, match="none of its checkpoints is whole; start from scratch with --resume false"):
            run("tgrpo", **settings)
    assert "checkpoint-1 is damaged: optimizer.bin is missing" in capsys.readouterr().out


@pytest.mark.parametrize("sharded", [True, False])
def test_a_sharded_checkpoint_in_a_whole_run_names_the_export_command(run, started, monkeypatch, sharded):
    """Guards: a traceback if one process loads sharded weights, or FSDP loads whole ones."""
    folder, settings = started
    if sharded:
        (folder / "checkpoint-2/pytorch_model_fsdp_0").mkdir()
    else:
        monkeypatch.setattr(distributed, "is_sharded", lambda accelerator: True)
    line = r"cannot be resumed in a run of .* weights.*python -m tools.export .*checkpoint-2 FOLDER"
    with pytest.raises(UserError, match=line):
        run("tgrpo", **settings)


# --------------------------------------------------------------------------------------------- one run, one folder


def hold(folder, is_held):
    checkpoints.lock_folder(folder)
    is_held.set()
    time.sleep(60)


def test_two_runs_cannot_share_a_folder_and_a_crash_releases_it(run, tmp_path):
    """Guards: two runs that overwrite each other's checkpoints; a lock that remains after a crash."""
    processes = multiprocessing.get_context("fork")
    is_held = processes.Event()
    first = processes.Process(target=hold, args=(tmp_path / "out", is_held))
    first.start()
    assert is_held.wait(20)
    for stage in ("tgrpo", "evaluate"):
        with pytest.raises(UserError, match=f"another run is using this folder: process {first.pid} on .*, since 20"):
            run(stage)
    first.kill()
    first.join()
    checkpoints.lock_folder(tmp_path / "out")


def test_an_unwritable_folder_is_an_error_before_the_model_loads(run, tmp_path, monkeypatch):
    """Guards: an hour of loading before the first write fails."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(policy, "load_policy", lambda *_, **__: pytest.fail("the model was loaded"))
    for stage in ("sft", "tgrpo", "evaluate"):
        with pytest.raises(UserError, match="cannot be written"):
            run(stage, output="file/out")


def test_a_failed_write_names_the_file_and_the_checkpoint_that_exists(tmp_path):
    """Guards: a message about checkpoints that do not exist; temporary files left by a full disk."""

    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError) as error, checkpoints.room_on_disk(tmp_path / "final"):
        full()
    assert f"cannot write {tmp_path / 'final'}" in str(error.value) and "checkpoint" not in str(error.value)
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(UserError, match="it continues from checkpoint-3"), checkpoints.room_on_disk(tmp_path / "final"):
        full()
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match="cannot write .*a.json: Is a directory"):
        storage.write_atomic(tmp_path / "a.json", "[]")
    with pytest.raises(UserError, match="cannot write .*a.json: Is a directory; free disk space"):
        storage.append_rows(tmp_path / "a.json", [{"step": 1}])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "checkpoint-3"]


# --------------------------------------------------------------------------------------------- what is a checkpoint


def test_missing_and_unexpected_tensors_are_named(world, tmp_path, run):
    """Guards: missing tensors that are initialised at random, with only a warning."""
    shutil.copytree(world / "base", tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    whole = load_file(world / "base/model.safetensors")
    name = next(n for n in whole if n.endswith("layers.1.mlp.up_proj.weight"))
    changes = {
        "missing .*layers.1.mlp.up_proj.weight": {n: t for n, t in whole.items() if n != name},
        "unexpected extra.weight": whole | {"extra.weight": whole[name].clone()},
        "mismatched .*layers.1.mlp.up_proj.weight": whole | {name: whole[name][:-1].clone()},
    }
    for line, tensors in changes.items():
        save_file(tensors, path, {"format": "pt"})
        with pytest.raises(UserError, match=f"base: these weights are not the model's: {line}"):
            policy.load_policy(tgrpo.TGRPOConfig(model=str(tmp_path / "base")))
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))
    with pytest.raises(UserError, match="sft.model: .*base: models of type qwen2_vl cannot be used here"):
        run("sft", model=tmp_path / "base")


# --------------------------------------------------------------------------------------------------------- stopping


LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch"],
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "1", "--master_port", free_port()],
}


@pytest.mark.parametrize(
    "launcher, number, to_group, saves",
    [
        # as Slurm sends it, DataLoader workers included
        ("python", signal.SIGTERM, True, True),
        # Ctrl-C
        ("python", signal.SIGINT, True, True),
        ("python", signal.SIGKILL, False, False),
        # the launcher dies at once and leaves its child behind
        ("accelerate", signal.SIGTERM, False, True),
        ("torchrun", signal.SIGTERM, True, True),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_stopped_run_saves_and_leaves_no_processes(world, tmp_path, forker, launcher, number, to_group, saves):
    """Guards: workers that die of the process group's signal and end the run; orphaned training or worker processes."""
    settings = {
        "config": "configs/toy.yaml",
        "model": world / "base",
        "records": world / "world/rl.json",
        "data_root": world / "world",
        "output_dir": tmp_path / "out",
        "num_workers": 1,
        "steps": 2000,
        "batch_size": 2,
        "micro_batch_size": 2,
        "num_generations": 2,
        "max_new_tokens": 4,
        "save_every": 0,
        "print_every": 0,
    }
    command = ["tgrpo.py", *as_arguments(settings)]
    if launcher == "python":
        pid = forker.start(tmp_path / "said", *command)
    else:
        launch = [sys.executable, "-m", *LAUNCHERS[launcher], *command]
        with open(tmp_path / "said", "w") as said:
            pid = subprocess.Popen(launch, cwd=ROOT, env=QUIET, stdout=said, stderr=said, start_new_session=True).pid
    metrics = tmp_path / "out/metrics.jsonl"
    while not read_jsonl(metrics):
        assert is_alive(pid), (tmp_path / "said").read_text()[-3000:]
        time.sleep(0.05)
    everyone = [pid, *children(pid)]
    assert len(everyone) >= (2 if launcher == "python" else 3)
    (os.killpg if to_group else os.kill)(pid, number)
    end = time.time() + 60
    while [pid for pid in everyone if is_alive(pid)]:
        assert time.time() < end, [Path(f"/proc/{p}/cmdline").read_text() for p in everyone if is_alive(p)]
        time.sleep(0.05)
    if launcher == "python":
        assert forker.wait(pid) == (0 if saves else -number)
    done = len(read_jsonl(metrics))
    expected = [f"checkpoint-{done}"] if saves else []
    assert [p.name for p in checkpoints.finished_checkpoints(tmp_path / "out")] == expected
