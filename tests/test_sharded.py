"""The sharded code path (FSDP2) on two CPU processes: the same numbers as one process, no rank left waiting, runs that
survive.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from naive import without_times
from processes import QUIET, ROOT, free_port
from safetensors.torch import load_file
from test_hub import checked_final
from test_hub import weights as all_weights

from data import record_of_draw
from support.storage import read_jsonl
from tools import export

# accelerate configs as `accelerate config` writes them; each requests things that would change the training.
ACCELERATE_CONFIGS = {
    "fsdp1": {
        "fsdp_version": 1,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_backward_prefetch": "BACKWARD_PRE",
        "fsdp_transformer_layer_cls_to_wrap": "Qwen2_5_VLDecoderLayer",
        "fsdp_sharding_strategy": "SHARD_GRAD_OP",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_sync_module_states": True,
        "fsdp_use_orig_params": False,
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_offload_params": False,
    },
    "fsdp2": {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_activation_checkpointing": True,
        "fsdp_cpu_ram_efficient_loading": False,
        "fsdp_offload_params": True,
        "fsdp_reshard_after_forward": False,
        "fsdp_state_dict_type": "FULL_STATE_DICT",
    },
}


@pytest.fixture(scope="module")
def outputs(world, hub, forker, tmp_path_factory):
    """Folders of the same runs on one process and on two, sharded."""
    for name, fsdp in ACCELERATE_CONFIGS.items():
        config = {
            "compute_environment": "LOCAL_MACHINE",
            "distributed_type": "FSDP",
            "mixed_precision": "bf16",
            "num_machines": 1,
            "num_processes": 2,
            "fsdp_config": fsdp,
        }
        (world / f"{name}.yaml").write_text(yaml.safe_dump(config))
    one = tmp_path_factory.mktemp("one")
    two = tmp_path_factory.mktemp("two")
    shutil.copytree(world / "world", two / "broken")
    record = next(r for r in json.loads((two / "broken/rl.json").read_text()) if r["data_type"] == "video")
    (two / "broken" / record["path"]).write_bytes(b"")
    # step 0: rank 0 has a picture and a video, rank 1 two videos
    for stage, file in (("sft", "sft"), ("tgrpo", "rl")):
        records = json.loads((world / f"world/{file}.json").read_text())
        pictures, videos = ([r for r in records if (r["data_type"] == "image") == kind] for kind in (True, False))
        picked = [pictures[0], *videos[:7]]
        # the training order of seed 0
        order = [record_of_draw(position, 8, 0) for position in range(8)]
        placed = [None] * 8
        for place, r in zip(order, picked):
            placed[place] = r
        (world / f"mixed_{stage}.json").write_text(json.dumps(placed))
    runs = [forker.start(one / "said", "tests/two_ranks.py", world, one, "none")]
    port = free_port()
    for rank in ("0", "1"):
        # what torchrun sets
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        said = two / f"said {rank}"
        runs.append(forker.start(said, "tests/two_ranks.py", world, two, "full_shard", **environment))
    statuses = [forker.wait(run, seconds=400) for run in runs]
    files = (one / "said", two / "said 0", two / "said 1")
    assert statuses == [0, 0, 0], "\n".join(file.read_text()[-3000:] for file in files)
    return one, two


@pytest.fixture(scope="module")
def two_machines(world, tmp_path_factory):
    """(folder, outputs of the launchers) of one stage on two machines, here two launchers on loopback, after which one
    rank breaks in the next stage.
    """
    folder = tmp_path_factory.mktemp("machines")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", free_port(), "--node_rank"]
    script = ["tests/two_ranks.py", str(world), str(folder), "full_shard", "explode"]
    machines = []
    for rank in ("0", "1"):
        command = [*launcher, rank, *script]
        machines.append(
            subprocess.Popen(command, cwd=ROOT, env=QUIET, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        said = [machine.communicate(timeout=240)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [1, 1], "\n".join(text[-3000:] for text in said)
    return folder, said


def weights(folder):
    return load_file(folder / "final/model.safetensors")


def difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def same_metrics(one, two):
    for a, b in zip(without_times(one), without_times(two), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=2e-5), name


@pytest.mark.parametrize("stage", ["sft", "tgrpo", "frozen", "mixed sft", "mixed tgrpo"])
def test_two_sharded_processes_train_like_one_process(world, outputs, stage):
    """Guards: loss or metrics averaged per rank instead of per token and completion; stale shards in the saved file."""
    one, two = outputs
    # A step moves a weight by 1e-3. AdamW divides a gradient by its own size, so where the gradient is almost 0, a
    # difference in rounding moves the weight by a few percent of a step.
    assert difference(weights(one / stage), weights(two / stage)) < 5e-5
    # and it is a step
    assert difference(weights(one / stage), load_file(world / "base/model.safetensors")) > 1e-4
    same_metrics(one / stage, two / stage)


def test_two_sharded_processes_train_qwen3_vl_like_one_process(hub, outputs):
    """Guards: a vision tower whose DeepStack features are lost, or not trained, when its blocks are sharded."""
    one, two = (folder / "qwen3" for folder in outputs)
    trained = weights(two)
    # as in the test above
    assert difference(weights(one), trained) < 5e-5
    same_metrics(one, two)
    for name, tensor in all_weights(hub / "qwen3_untied").items():
        if "deepstack" in name and "norm" not in name:
            assert (trained[name] - tensor).abs().max() > 1e-4, name


@pytest.mark.parametrize("stage", ["sft", "tgrpo"])
def test_an_adapter_trained_by_two_processes_equals_that_of_one(outputs, stage):
    """Guards: gradients that are not averaged; two ranks that write; an adapter that starts at random."""
    one, two = (folder / "lora" / stage for folder in outputs)
    adapters = [load_file(folder / "final/adapter/adapter_model.safetensors") for folder in (one, two)]
    assert difference(*adapters) < 5e-5
    # and it is a step: B starts at 0
    assert max(tensor.abs().max() for name, tensor in adapters[0].items() if "lora_B" in name) > 1e-4
    assert difference(weights(one), weights(two)) < 5e-5
    same_metrics(one, two)


def test_an_adapter_of_two_processes_resumes(outputs):
    """Guards: an adapter or optimizer of one rank that starts again."""
    folder = outputs[1] / "lora"
    assert without_times(folder / "again") == without_times(folder / "tgrpo")


@pytest.mark.parametrize("name", ["fsdp1", "fsdp2"])
def test_an_accelerate_config_with_fsdp_gives_the_same_training(outputs, name):
    """Guards: a crash with FSDP1; log-probs in steps of 0.03 with FSDP2 and bf16; a quarter of the loss with 4
    accumulation steps.
    """
    _, two = outputs
    assert without_times(two / name) == without_times(two / "tgrpo")
    assert difference(weights(two / name), weights(two / "tgrpo")) == 0


@pytest.mark.parametrize("layout, stage", [("untied", "sft"), ("tied", "tgrpo"), ("qwen3_tied", "tgrpo")])
def test_a_hub_checkpoint_passes_a_stage_sharded_in_bfloat16(hub, outputs, layout, stage):
    """Guards: mixed dtypes that fail in the first step on a GPU; a `final` whose config names float32 for bfloat16
    weights, that loses the tied head, or that differs after a resume.
    """
    folder = outputs[1] / layout / stage
    final = checked_final(folder / "final", hub / layout, torch.bfloat16)
    unstopped = checked_final(folder / "unstopped", hub / layout, torch.bfloat16)
    assert all(torch.equal(final[name], unstopped[name]) for name in final)
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [0, 1]
    export.export(folder / "checkpoint-1", folder.parent / "exported")
    checked_final(folder.parent / "exported", hub / layout, torch.bfloat16)


def test_the_trained_hub_checkpoint_is_evaluated_by_two_processes(outputs):
    """Guards: an evaluation of a sharded run's model that loses or repeats questions."""
    assert len(read_jsonl(outputs[1] / "tied/eval/predictions.jsonl")) == 12


def test_freeze_vision_freezes_the_vision_tower_only(world, outputs):
    """Guards: freeze_vision that only skips the optimizer, or that freezes everything."""
    base = load_file(world / "base/model.safetensors")
    for folder in outputs:
        for name, tensor in weights(folder / "frozen").items():
            if name.startswith("visual"):
                assert torch.equal(tensor, base[name]), name


def test_sigterm_on_one_rank_saves_and_the_same_command_resumes(outputs):
    """Guards: one rank that exits while the other waits for it; work lost when a job is preempted."""
    _, two = outputs
    assert difference(weights(two / "stopped"), weights(two / "tgrpo")) == 0
    assert without_times(two / "stopped") == without_times(two / "tgrpo")


def test_unequal_rollouts_on_two_ranks_do_not_deadlock(outputs):
    """Guards: a deadlock with unequal completions, with a picture or an unreadable clip on one rank."""
    rows = read_jsonl(outputs[1] / "real/metrics.jsonl")
    assert len(rows) == 3 and rows[-1]["data/skipped"] == 1


def test_the_final_model_loads_without_our_code(outputs):
    """Guards: DTensors or wrapper names in the exported file."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    folder = outputs[1] / "tgrpo/final"
    _, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    AutoProcessor.from_pretrained(folder)


def test_two_machines_train_like_one(outputs, two_machines):
    """Guards: a global rank used as the local one, or both machines writing the same files."""
    assert difference(weights(outputs[1] / "sft"), weights(two_machines[0] / "sft")) < 1e-5


def test_one_failing_rank_stops_all_ranks_and_its_traceback_is_last(two_machines):
    """Guards: the other ranks waiting for hours in a collective, and the cause hidden among their errors."""
    said = two_machines[1][1]
    assert "rank 1 broke" in said[said.rindex("Root Cause") :]


def test_one_command_exports_a_sharded_checkpoint(outputs, tmp_path, monkeypatch):
    """Guards: shards that only the same number of GPUs can load."""
    folder = outputs[1] / "stopped"
    monkeypatch.setattr(sys, "argv", ["export.py", str(folder / "checkpoint-1"), str(tmp_path / "plain")])
    export.main()
    plain = load_file(tmp_path / "plain/model.safetensors")
    final = weights(folder)
    # one step before the end
    assert plain.keys() == final.keys() and 0 < difference(plain, final) < 0.02
