"""Runs the real stages on one or two CPU processes; test_sharded.py starts it and compares the results.

    torchrun --nproc_per_node 2 tests/two_ranks.py FOLDER OUT full_shard
    torchrun --nproc_per_node 2 tests/two_ranks.py FOLDER OUT full_shard explode    # one stage, then rank 1 breaks
    python tests/two_ranks.py FOLDER OUT none

Sampling depends on the number of processes, so here a prompt's completions are a function of its tokens and pixels.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, prepare_multi_gpu_env
from processes import as_arguments
from torch.distributed.tensor import DTensor

import evaluate
import policy
import sft
import tgrpo

FOLDER = Path(sys.argv[1])
OUT = Path(sys.argv[2])
FSDP = sys.argv[3]
MORE = sys.argv[4:]
RANK = int(os.environ.get("RANK", 0))
real_rollout = tgrpo.rollout
real_refresh = policy.refresh
real_score = tgrpo.score


def fixed_rollout(model, prompts, counts, tokenizer, temperature, max_new_tokens, **_):
    """Completions of unequal length that depend on nothing but the prompt."""
    completions = []
    for x, n in zip(prompts, counts):
        pixels = x["pixel_values_videos"] if "pixel_values_videos" in x else x["pixel_values"]
        generator = torch.Generator().manual_seed(int(x["input_ids"].sum()) + int(1000 * pixels.abs().sum()))
        for _ in range(n):
            length = int(torch.randint(1, 12, (1,), generator=generator))
            completions.append(torch.randint(10, 300, (length,), generator=generator))
    return completions


def checked_refresh(copy, model):
    """The real one, after which every weight of the rollout copy must be the trained one (every rank gathers)."""
    real_refresh(copy, model)
    sharded = any(isinstance(p, DTensor) for p in model.parameters())
    adapted = any("lora_A" in name for name, _ in model.named_parameters())
    assert sharded == (FSDP == "full_shard" and not adapted)
    if copy is model:
        return
    trained = dict(model.named_parameters())
    for name, parameter in copy.named_parameters():
        now = trained[name].full_tensor() if hasattr(trained[name], "full_tensor") else trained[name]
        assert torch.equal(parameter, now.to(parameter.dtype)), f"stale in the rollout: {name}"


def exploding_score(group, cfg):
    if RANK == 1:
        raise ValueError("rank 1 broke")
    return real_score(group, cfg)


def run(stage, output, accelerate_config=None, **settings):
    """One stage with configs/toy.yaml, in OUT/output; under the environment that an accelerate config gives, if one is
    named.
    """
    # a second stage in this process: reset accelerate
    if PartialState._shared_state:
        kind = DistributedType.MULTI_CPU if "WORLD_SIZE" in os.environ else DistributedType.NO
        for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
            os.environ.pop(name, None)
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = kind
    if accelerate_config:
        os.environ.update(launcher_environment(accelerate_config))
    records = {"sft": "sft", "tgrpo": "rl", "evaluate": "test"}[stage.__name__]
    training = {
        "steps": 2,
        "micro_batch_size": 1,
        "save_every": 0,
        "lr_schedule": "constant",
        "adam_beta2": 0.9,
        "lr": 1e-3,
        "warmup_steps": 0,
    }
    settings = {
        "model": FOLDER / "base",
        "records": FOLDER / f"world/{records}.json",
        "data_root": FOLDER / "world",
        "output_dir": OUT / output,
        "num_workers": 0,
        "fsdp": FSDP,
        "batch_size": 4,
        **(training if stage is not evaluate else {}),
        **settings,
    }
    sys.argv = [stage.__name__, "--config", "configs/toy.yaml", *as_arguments(settings)]
    stage.main()


def launcher_environment(config):
    """What `accelerate launch --config_file CONFIG --gradient_accumulation_steps 4` puts into the environment, by its
    own code.
    """
    command = ["--config_file", str(config), "--gradient_accumulation_steps", "4", "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    found = prepare_multi_gpu_env(arguments)
    return {k: v for k, v in found.items() if k.startswith(("FSDP_", "ACCELERATE_")) and k != "ACCELERATE_USE_CPU"}


def stopped_and_resumed(stage, output, **settings):
    """Run a stage, move its `final` to `unstopped`, and make `final` again from the checkpoint before it."""
    run(stage, output, save_every=1, **settings)
    final = OUT / output / "final"
    if RANK == 0:
        os.replace(final, final.with_name("unstopped"))
    torch.distributed.barrier()
    run(stage, output, save_every=1, **settings)


def hub_stages():
    """Stages on checkpoints in the hub's layout, sharded and in bfloat16: all on Qwen2.5-VL, T-GRPO on Qwen3-VL."""
    settings = {"bf16": "true", "gradient_checkpointing": "true"}
    stopped_and_resumed(sft, "untied/sft", model=FOLDER / "hub/untied", **settings)
    run(sft, "tied/sft", model=FOLDER / "hub/tied", **settings)
    stopped_and_resumed(tgrpo, "tied/tgrpo", model=OUT / "tied/sft/final", max_new_tokens=8, **settings)
    run(evaluate, "tied/eval", model=OUT / "tied/tgrpo/final", bf16="true", max_new_tokens=8, orders="ordered")
    stopped_and_resumed(tgrpo, "qwen3_tied/tgrpo", model=FOLDER / "hub/qwen3_tied", max_new_tokens=8, **settings)


def lora_stages():
    """Both training stages with an adapter; on two ranks T-GRPO once more, resumed after its first step."""
    settings = {"fsdp": "none", "lora_rank": 4, "lora_alpha": 8}
    run(sft, "lora/sft", **settings)
    settings |= {"save_every": 1, "updates_per_rollout": 2}
    run(tgrpo, "lora/tgrpo", **settings)
    if not torch.distributed.is_initialized():
        return
    again = OUT / "lora/again"
    if RANK == 0:
        shutil.copytree(OUT / "lora/tgrpo", again)
        shutil.rmtree(again / "final")
    torch.distributed.barrier()
    run(tgrpo, "lora/again", **settings)


def main():
    # the process group serves the next stage too
    Accelerator.end_training = lambda self: None
    tgrpo.accuracy_reward = lambda completion, *_: float(len(completion) % 2)
    tgrpo.rollout = fixed_rollout
    policy.refresh = checked_refresh
    run(sft, "sft")
    if "explode" in MORE:
        tgrpo.score = exploding_score
        run(tgrpo, "explode")
    run(tgrpo, "tgrpo", updates_per_rollout=2)
    # micro-batches of pictures beside videos on one rank, videos alone on the other
    for stage in (sft, tgrpo):
        run(stage, f"mixed {stage.__name__}", micro_batch_size=2, records=FOLDER / f"mixed_{stage.__name__}.json")
    run(tgrpo, "frozen", freeze_vision="true", gradient_checkpointing="true", steps=1)
    run(tgrpo, "qwen3", model=FOLDER / "hub/qwen3_untied", steps=1)
    lora_stages()
    if FSDP == "none":
        return

    # a scheduler stops one of the ranks
    def stop_once(group, cfg):
        tgrpo.score = real_score
        if RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real_score(group, cfg)

    tgrpo.score = stop_once
    run(tgrpo, "stopped", updates_per_rollout=2)
    assert not (OUT / "stopped/final").exists() and (OUT / "stopped/checkpoint-1/state.json").exists()
    # the same command resumes
    run(tgrpo, "stopped", updates_per_rollout=2)

    # a user's own accelerate config asks for FSDP, and for much that would train otherwise: the same numbers all the
    # same
    for name in ("fsdp1", "fsdp2"):
        run(tgrpo, name, accelerate_config=FOLDER / f"{name}.yaml", fsdp="none", updates_per_rollout=2)

    # ranks with other tokens, an image beside a video, an unreadable clip
    tgrpo.rollout = real_rollout
    run(
        tgrpo,
        "real",
        records=OUT / "broken/rl.json",
        data_root=OUT / "broken",
        steps=3,
        max_unreadable=0.5,
        max_new_tokens=8,
    )
    hub_stages()


if __name__ == "__main__":
    main()
