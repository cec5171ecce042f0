"""Runs that are killed, disks that are full, gradients that are not finite: nothing a user made is lost."""

import json
import os
import resource
import signal
import time

import pytest
import torch
from naive import without_times
from processes import as_arguments, is_alive
from safetensors.torch import load_file
from test_sharded import difference, weights

import tgrpo
from support import checkpoints, settings
from tools import export


def test_a_killed_run_ends_like_an_uninterrupted_run(world, run, forker, tmp_path, capsys):
    """Guards: a checkpoint without optimizer, order or seeds; repeated or missing steps in the log; SIGKILL while
    saving.
    """
    training = {"steps": 8, "save_every": 1, "lr_schedule": "constant"}
    more = {
        "config": "configs/toy.yaml",
        "model": world / "base",
        "records": world / "world/rl.json",
        "data_root": world / "world",
        "output_dir": tmp_path / "killed",
        "num_workers": 1,
        "batch_size": 4,
        "micro_batch_size": 4,
        "max_new_tokens": 8,
    }
    pid = forker.start(tmp_path / "said", "tgrpo.py", *as_arguments(training | more))
    while not (tmp_path / "killed/checkpoint-3").exists():
        assert is_alive(pid), (tmp_path / "said").read_text()[-3000:]
        time.sleep(0.01)
    # its data workers too
    os.killpg(pid, signal.SIGKILL)
    assert forker.wait(pid) == -signal.SIGKILL
    assert not (tmp_path / "killed/final").exists()
    killed = run("tgrpo", "killed", **training)
    assert "resumed from" in capsys.readouterr().out
    whole = run("tgrpo", "whole", **training)
    assert without_times(killed) == without_times(whole)
    assert difference(weights(killed), weights(whole)) == 0


def test_a_full_disk_keeps_the_last_checkpoint_and_gives_advice(run, tmp_path):
    """Guards: an incomplete checkpoint that is later resumed, or a traceback from a library."""
    settings_of_run = dict(steps=4, save_every=2, lr_schedule="constant")
    run("tgrpo", **settings_of_run | {"steps": 3})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # weights are larger than this
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(settings.UserError, match="free disk space and start the same command again"):
            run("tgrpo", **settings_of_run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in checkpoints.finished_checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    # the same command, with free disk space
    run("tgrpo", **settings_of_run)
    assert len(without_times(tmp_path / "out")) == 4


@pytest.mark.parametrize("bad_steps, ends", [([1], "well"), ([0, 1, 2], "in an error")])
def test_a_step_without_finite_gradients_is_skipped_and_three_end_the_run(run, monkeypatch, bad_steps, ends):
    """Guards: one NaN that destroys all weights, or a run that skips every step."""
    real = tgrpo.grpo_loss
    calls = []

    def sometimes_nan(*args):
        calls.append(None)
        loss_G, kl_GT, clipped_GT = real(*args)
        return loss_G * (float("nan") if len(calls) - 1 in bad_steps else 1.0), kl_GT, clipped_GT

    monkeypatch.setattr(tgrpo, "grpo_loss", sometimes_nan)
    if ends == "well":
        assert all(torch.isfinite(t).all() for t in weights(run("tgrpo", steps=3)).values())
    else:
        with pytest.raises(RuntimeError, match="three steps in a row"):
            run("tgrpo", steps=3)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_an_export_never_replaces_a_folder_nor_writes_half_a_model(world, run, tmp_path, lora_rank):
    """Guards: an export of the starting model or of the last step; a run folder replaced by the exported model; a
    folder lost for a slash at the end of its name, or for a .tmp; a model in a checkpoint, which the run deletes, or
    with a checkpoint's name, which it takes for damaged; a "model" of whatever tensors a damaged checkpoint holds.
    """
    out = run("sft", steps=2, save_every=1, lora_rank=lora_rank)
    for folder in (out, f"{out}/", out / "final"):
        with pytest.raises(settings.UserError, match="exists already"):
            export.export(out / "checkpoint-1", folder)
    # of a run that goes on
    for folder in (out / "checkpoint-1/plain", out / "checkpoint-7", out / "final/../later"):
        with pytest.raises(settings.UserError, match="is inside the folder of a run"):
            export.export(out / "checkpoint-1", folder)
    (tmp_path / "plain.tmp").mkdir()
    export.export(out / "checkpoint-1", f"{tmp_path}/plain/")
    plain = load_file(tmp_path / "plain/model.safetensors")
    for other in (weights(out), load_file(world / "base/model.safetensors")):
        assert plain.keys() == other.keys() and difference(plain, other) > 0
    assert sorted(path.name for path in tmp_path.glob("*plain*")) == ["plain", "plain.tmp"]
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
