"""A run goes on only as the run it was, alone in its folder, and ends when it is asked to, with its work saved."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from naive import without_times
from safetensors.torch import load_file, save_file
from test_sharded import QUIET

import policy
import tgrpo
from support import checkpoints, distributed, storage
from support.settings import UserError
from support.storage import read_jsonl

ROOT = Path(__file__).parent.parent
SETTINGS = dict(steps=2, save_every=1, keep_checkpoints=9, max_new_tokens=8)


@pytest.fixture
def started(run, world, tmp_path):
    """(folder of a run of two steps, stopped after checkpoint-1, its settings), on records and weights of its own."""
    shutil.copytree(world / "base", tmp_path / "base")
    shutil.copy(world / "world/rl.json", tmp_path / "rl.json")
    settings = {**SETTINGS, "model": tmp_path / "base", "records": tmp_path / "rl.json"}
    folder = run("tgrpo", **settings)
    shutil.rmtree(folder / "final")
    return folder, settings


# ------------------------------------------------------------------------------------------------- what is resumed


@pytest.mark.parametrize(
    "change, line",
    [
        ({"lr": 1e-3}, "lr was 0.0005, is 0.001"),
        ({"seed": 7}, "seed was 0, is 7"),
        ({"batch_size": 8}, "batch_size was 4, is 8"),
        ({"prompt": "{problem}"}, "prompt was"),
        ({"temporal_rule": "none"}, "temporal_rule was 'margin', is 'none'"),
        ({"steps": 5}, "steps was 2, is 5, which the linear schedule depends on"),
    ],
)
def test_a_run_does_not_resume_with_other_settings(run, started, change, line):
    """Guards: a run whose halves have different settings, and whose config.yaml only has the second ones."""
    folder, settings = started
    before = (folder / "config.yaml").read_text()
    with pytest.raises(UserError) as error:
        run("tgrpo", **settings | change)
    said = str(error.value)
    assert line in said and "checkpoint-1 was made by a different run" in said and "\n" not in said
    assert "--resume false" in said and "--resume_changed true" in said
    assert (folder / "config.yaml").read_text() == before


def test_changed_records_and_weights_are_noticed_by_their_content(run, started, world, tmp_path):
    """Guards: a new SFT model at the path of the old one, while T-GRPO resumes a policy of the old one."""
    folder, settings = started
    records = json.loads((tmp_path / "rl.json").read_text())
    (tmp_path / "rl.json").write_text(json.dumps(records[::-1]))
    with pytest.raises(UserError, match="the content of .*rl.json has changed"):
        run("tgrpo", **settings)
    (tmp_path / "rl.json").write_text(json.dumps(records, indent=3))
    shutil.copy(world / "world/rl.json", tmp_path / "rl.json")
    weights = load_file(tmp_path / "base/model.safetensors")
    save_file(
        {name: tensor + 1e-3 for name, tensor in weights.items()}, tmp_path / "base/model.safetensors", {"format": "pt"}
    )
    storage.fingerprint.cache_clear()
    with pytest.raises(UserError, match="the weights in .*base have changed"):
        run("tgrpo", **settings)


def test_settings_that_do_not_change_the_result_may_change(run, started, world, tmp_path, capsys):
    """Guards: a run that cannot be moved to other paths, more workers or another micro-batch size."""
    folder, settings = started
    os.rename(tmp_path / "base", tmp_path / "moved")
    os.rename(tmp_path / "rl.json", tmp_path / "moved.json")
    whole = without_times(folder)
    run(
        "tgrpo",
        **settings
        | {"model": tmp_path / "moved", "records": tmp_path / "moved.json", "micro_batch_size": 2, "print_every": 0},
    )
    assert "resumed from" in capsys.readouterr().out and (folder / "final").is_dir()
    again = without_times(folder)
    assert [row["step"] for row in again] == [row["step"] for row in whole] and again[0] == whole[0]


def test_resume_changed_continues_and_names_the_changes(run, started, capsys):
    """Guards: a check that cannot be overridden."""
    folder, settings = started
    run("tgrpo", **settings | {"lr": 1e-3, "resume_changed": "true"})
    said = capsys.readouterr().out
    assert "although lr was 0.0005, is 0.001" in said and "resumed from" in said


def test_fewer_steps_than_the_checkpoint_is_an_error(run, started):
    """Guards: a policy after 2 steps saved as the final one of 1 step."""
    folder, settings = started
    run("tgrpo", **settings | {"steps": 3, "lr_schedule": "constant", "resume_changed": "true"})
    with pytest.raises(UserError, match="steps: 1, but .*checkpoint-2 is already after step 2"):
        run("tgrpo", **settings | {"steps": 1})


@pytest.mark.parametrize("save_every", [0, 1])
def test_a_finished_run_is_not_overwritten(run, started, save_every, capsys):
    """Guards: a `final` overwritten by another run that had no checkpoint to compare with."""
    folder, settings = started
    shutil.rmtree(folder)
    settings = settings | {"save_every": save_every, "lr_schedule": "constant"}
    run("tgrpo", **settings)
    weights = (folder / "final/model.safetensors").read_bytes()
    for change in ({}, {"lr": 1e-3, "resume_changed": "true"}):
        with pytest.raises(
            UserError,
            match="a run of 2 steps is finished here, its model is .*final; start from scratch with --resume false",
        ):
            run("tgrpo", **settings | change)
    if save_every:
        run("tgrpo", **settings | {"steps": 3})
        assert (folder / "final-of-2-steps/model.safetensors").read_bytes() == weights
    else:
        with pytest.raises(UserError, match="a run of 2 steps is finished here"):
            run("tgrpo", **settings | {"steps": 3})
        run("tgrpo", **settings | {"resume": "false", "lr": 1e-3})
        assert (folder / "earlier-1/final/model.safetensors").read_bytes() == weights
    assert (folder / "final/model.safetensors").read_bytes() != weights


def test_resume_false_moves_the_earlier_run_aside(run, started, capsys):
    """Guards: new checkpoints deleted in favour of older ones; the earlier run resumed instead of the new one."""
    folder, settings = started
    old = {p.name for p in folder.iterdir()} - {".lock"}
    first = read_jsonl(folder / "metrics.jsonl")
    run("tgrpo", **settings | {"resume": "false", "seed": 5})
    assert {p.name for p in (folder / "earlier-1").iterdir()} == old
    assert f"is now in {folder / 'earlier-1'}" in capsys.readouterr().out
    assert read_jsonl(folder / "earlier-1/metrics.jsonl") == first != read_jsonl(folder / "metrics.jsonl")
    assert [p.name for p in checkpoints.finished_checkpoints(folder)] == ["checkpoint-1"]
    shutil.rmtree(folder / "final")
    # the new one is resumed
    run("tgrpo", **settings | {"seed": 5})
    assert "resumed from" in capsys.readouterr().out
    run("tgrpo", **settings | {"resume": "false"})
    assert (folder / "earlier-2/checkpoint-1").is_dir() and (folder / "earlier-1/checkpoint-1").is_dir()


def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(run, tmp_path, capsys):
    """Guards: a traceback from torch for a file that is incomplete after a full disk or an interrupted copy."""
    settings = {**SETTINGS, "steps": 4}
    folder = run("tgrpo", **settings)
    whole = without_times(folder)
    shutil.rmtree(folder / "final")
    weights = folder / "checkpoint-3/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "checkpoint-2/optimizer.bin").unlink()
    run("tgrpo", **settings)
    said = capsys.readouterr().out
    assert "checkpoint-3 is damaged: model.safetensors is missing or not what was written" in said
    assert (
        "checkpoint-2 is damaged: optimizer.bin is missing" in said
        and f"resumed from {folder / 'checkpoint-1'}" in said
    )
    assert without_times(folder) == whole
    for checkpoint in checkpoints.finished_checkpoints(folder):
        (checkpoint / "state.json").write_text("{")
    with pytest.raises(UserError, match="none of its checkpoints is whole; start from scratch with --resume false"):
        run("tgrpo", **settings)


@pytest.mark.parametrize("sharded", [True, False])
def test_a_sharded_checkpoint_in_a_whole_run_names_the_export_command(run, started, monkeypatch, sharded):
    """Guards: a traceback if one process loads sharded weights, or FSDP loads whole ones."""
    folder, settings = started
    if sharded:
        (folder / "checkpoint-1/pytorch_model_fsdp_0").mkdir()
    else:
        monkeypatch.setattr(distributed, "is_sharded", lambda accelerator: True)
    with pytest.raises(
        UserError,
        match=r"cannot be resumed in a run of .* weights.*python -m tools.export .*checkpoint-1 FOLDER",
    ):
        run("tgrpo", **settings)


# --------------------------------------------------------------------------------------------- one run, one folder


def test_two_runs_cannot_share_a_folder_and_a_crash_releases_it(run, tmp_path):
    """Guards: two runs that overwrite each other's checkpoints; a lock that remains after a crash."""
    folder = tmp_path / "out"
    locked = f"checkpoints.lock_folder({str(folder)!r}); print('locked', flush=True)"
    code = f"from support import checkpoints; import time; {locked}; time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=QUIET, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "locked\n"
    for stage in ("tgrpo", "evaluate"):
        with pytest.raises(UserError, match=f"another run is using this folder: process {first.pid} on .*, since 20"):
            run(stage, steps=1, max_new_tokens=4) if stage == "tgrpo" else run(stage, max_new_tokens=4)
    first.kill()
    first.wait()
    run("tgrpo", steps=1, max_new_tokens=4)


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
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"model_type": "qwen3_vl"}))
    with pytest.raises(UserError, match="sft.model: .*base holds a model of type qwen3_vl, not qwen2_5_vl"):
        run("sft", model=tmp_path / "base")


# --------------------------------------------------------------------------------------------------------- stopping


def children(pid):
    """All processes below `pid`."""
    try:
        direct = [
            int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()
        ]
    except OSError:
        return []
    return direct + [grandchild for child in direct for grandchild in children(child)]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29671"],
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
def test_a_stopped_run_saves_and_leaves_no_processes(world, tmp_path, launcher, number, to_group, saves):
    """Guards: workers that die of the process group's signal and end the run; orphaned training or worker processes."""
    command = [
        *LAUNCHERS[launcher],
        "tgrpo.py",
        "--config",
        "configs/toy.yaml",
        "--model",
        world / "base",
        "--records",
        world / "world/rl.json",
        "--data_root",
        world / "world",
        "--output_dir",
        tmp_path / "out",
        "--num_workers",
        2,
        "--steps",
        2000,
        "--batch_size",
        4,
        "--micro_batch_size",
        2,
        "--save_every",
        0,
        "--max_new_tokens",
        8,
        "--print_every",
        0,
    ]
    run = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=QUIET,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics = tmp_path / "out/metrics.jsonl"
    while not read_jsonl(metrics):
        assert run.poll() is None
        time.sleep(0.05)
    everyone = [run.pid, *children(run.pid)]
    assert len(everyone) >= 3
    (os.killpg if to_group else os.kill)(run.pid, number)
    end = time.time() + 40
    while [pid for pid in everyone if is_alive(pid)]:
        assert time.time() < end, [Path(f"/proc/{p}/cmdline").read_text() for p in everyone if is_alive(p)]
        time.sleep(0.05)
    if launcher == "python" and saves:
        assert run.wait() == 0
    done = len(read_jsonl(metrics))
    assert [p.name for p in checkpoints.finished_checkpoints(tmp_path / "out")] == (
        [f"checkpoint-{done}"] if saves else []
    )
