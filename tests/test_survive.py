"""Runs that are killed, disks that are full, gradients that are not finite: nothing a user made is lost."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from naive import without_times
from safetensors.torch import load_file
from test_sharded import QUIET, difference, weights

from support import checkpoints, settings
from tools import export

ROOT = Path(__file__).parent.parent


def command(world, output, *more):
    return [
        str(x)
        for x in (
            sys.executable,
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
            output,
            "--steps",
            12,
            "--batch_size",
            4,
            "--micro_batch_size",
            4,
            "--save_every",
            2,
            "--num_workers",
            1,
            "--max_new_tokens",
            12,
            "--lr_schedule",
            "constant",
            *more,
        )
    ]


def start(arguments, **kwargs):
    return subprocess.Popen(
        arguments, cwd=ROOT, env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


def test_a_killed_run_ends_like_an_uninterrupted_run(world, tmp_path):
    """Guards: a checkpoint without optimizer, order or seeds; repeated or missing steps in the log; SIGKILL while
    saving.
    """
    whole = start(command(world, tmp_path / "whole"))
    run = start(command(world, tmp_path / "killed"), start_new_session=True)
    while not (tmp_path / "killed/checkpoint-4").exists():
        assert run.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    # its data workers too
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "killed/final").exists()
    again = start(command(world, tmp_path / "killed"))
    said, _ = again.communicate(timeout=120)
    whole.communicate(timeout=120)
    assert whole.returncode == again.returncode == 0 and "resumed from" in said
    assert without_times(tmp_path / "killed") == without_times(tmp_path / "whole")
    assert difference(weights(tmp_path / "killed"), weights(tmp_path / "whole")) == 0


def test_a_full_disk_keeps_the_last_checkpoint_and_gives_advice(world, run, tmp_path):
    """Guards: an incomplete checkpoint that is later resumed, or a traceback from a library."""
    settings = dict(save_every=2, max_new_tokens=12, lr_schedule="constant")
    run("tgrpo", steps=3, **settings)

    def small():
        # weights are larger than this
        return resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    # this process is done with the folder
    for lock in checkpoints.held_locks.values():
        lock.close()
    full = start(command(world, tmp_path / "out", "--steps", 6), preexec_fn=small)
    said, _ = full.communicate(timeout=120)
    assert full.returncode == 1 and "free disk space" in said and "Traceback" not in said, said[-1500:]
    assert [p.name for p in checkpoints.finished_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    checkpoints.held_locks.clear()
    # the same command, with free disk space
    run("tgrpo", steps=6, **settings)
    assert len(without_times(tmp_path / "out")) == 6


@pytest.mark.parametrize("bad_steps, ends", [([1], "well"), ([0, 1, 2], "in an error")])
def test_a_step_without_finite_gradients_is_skipped_and_three_end_the_run(run, monkeypatch, bad_steps, ends):
    """Guards: one NaN that destroys all weights, or a run that skips every step."""
    import tgrpo

    real = tgrpo.grpo_loss
    calls = []

    def sometimes_nan(*args):
        calls.append(None)
        loss_G, kl_GT, clipped_GT = real(*args)
        return loss_G * (float("nan") if len(calls) - 1 in bad_steps else 1.0), kl_GT, clipped_GT

    monkeypatch.setattr(tgrpo, "grpo_loss", sometimes_nan)
    if ends == "well":
        assert all(torch.isfinite(t).all() for t in weights(run("tgrpo", steps=4)).values())
    else:
        with pytest.raises(RuntimeError, match="three steps in a row"):
            run("tgrpo", steps=4)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_an_export_never_replaces_a_folder_nor_writes_half_a_model(world, run, tmp_path, lora_rank):
    """Guards: an export of the starting model or of the last step; a run folder replaced by the exported model; a
    folder lost for a slash at the end of its name; a "model" of whatever tensors a damaged checkpoint holds.
    """
    out = run("sft", steps=2, save_every=1, lora_rank=lora_rank)
    for folder in (out, f"{out}/", out / "final"):
        with pytest.raises(settings.UserError, match="exists already"):
            export.export(out / "checkpoint-1", folder)
    export.export(out / "checkpoint-1", f"{tmp_path}/plain/")
    plain = load_file(tmp_path / "plain/model.safetensors")
    for other in (weights(out), load_file(world / "base/model.safetensors")):
        assert plain.keys() == other.keys() and difference(plain, other) > 0
    assert [path.name for path in tmp_path.glob("*plain*")] == ["plain"]
    with pytest.raises(settings.UserError, match="no such checkpoint"):
        export.export(out / "checkpoint-9", tmp_path / "other")
    name = "adapter_config.json" if lora_rank else "model.safetensors"
    (out / "checkpoint-1" / name).unlink()
    with pytest.raises(settings.UserError, match=f"damaged: {name} is missing"):
        export.export(out / "checkpoint-1", tmp_path / "other")
    # a copy from elsewhere, without its list of files
    state = out / "checkpoint-1/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "files": {}}))
    with pytest.raises(settings.UserError, match="these weights are not the model's: missing"):
        export.export(out / "checkpoint-1", tmp_path / "other")
    assert not (tmp_path / "other").exists() and (out / "final").is_dir()
