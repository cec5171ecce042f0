"""Devices and ranks: the accelerator, sharding (FSDP2), the optimizer, seeds, sums over the ranks.

"Collective" in a docstring means that every rank must call the function, or the others wait for it.
"""

import os
import re
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, InitProcessGroupKwargs, set_seed
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import MixedPrecisionPolicy

from support import settings

# The shapes of a step change with its prompts, and a GPU's memory fragments. Read when torch first allocates there.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# Whether accelerate's or torch's launcher started this process: they set these variables.
ACCELERATE_LAUNCH = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"}
LAUNCHED = "TORCHELASTIC_RUN_ID" in os.environ or ACCELERATE_LAUNCH <= os.environ.keys()

# What an accelerate config may set for training. Here the stage's own config sets it, so these are dropped.
OVERRULED = re.compile(r"FSDP_\w+|ACCELERATE_(USE_FSDP|MIXED_PRECISION|GRADIENT_ACCUMULATION_STEPS|DYNAMO_\w+)")


# how accelerate's and torch's launchers are called on a command line
LAUNCHERS = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun")
LAUNCHERS += ("torch.distributed.run", "torch.distributed.launch")


def process_name(process):
    """The name that the system shows for a process, or None if there is no such process."""
    try:
        return Path(f"/proc/{process}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def is_launcher(process):
    """Whether a process is accelerate's or torch's launcher, by its first words: a folder may have these names, too."""
    # the name that torch's launcher gives itself
    if process_name(process) == "pt_elastic":
        return True
    try:
        command = Path(f"/proc/{process}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(Path(word).name in LAUNCHERS for word in command.split("\0")[:4])


# besides process 1, what adopts orphans
ADOPTERS = ("systemd", "init", "tini", "dumb-init", "docker-init", "catatonit", "containerd-shim")
# the process of the launcher; None without one, or if it has ended already
LAUNCHER = os.getppid() if is_launcher(os.getppid()) else None
# how long ranks without one wait for each other: the variables may be left over from an earlier launch
MEETING = timedelta(minutes=10)


def launcher_has_ended():
    """Whether a launcher started this process and has ended: a process that adopts orphans is then the parent."""
    if LAUNCHER:
        return os.getppid() != LAUNCHER
    return LAUNCHED and (os.getppid() == 1 or process_name(os.getppid()) in ADOPTERS)


def make_accelerator(cfg, shard=True):
    """Accelerator for this launch. With several processes and `fsdp: full_shard`, prepare() shards the model (FSDP2).

    A user's own accelerate config may set which processes run where, and one with FSDP turns sharding on too. Training
    settings come from `cfg` alone. With `shard` False each process holds a whole model, as in evaluation.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise settings.UserError(f"the accelerate config requests {name}, which is not supported: choose FSDP")
    config_shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    for name in [name for name in os.environ if OVERRULED.fullmatch(name)]:
        del os.environ[name]

    # the ranks would wait for it for hours
    if launcher_has_ended():
        raise settings.UserError("the launcher of this process has ended, and so does this process")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and "LOCAL_RANK" not in os.environ:
        raise settings.UserError(f"WORLD_SIZE is {processes}, but no launcher started this process: unset it")
    sharded = shard and processes > 1 and (cfg.fsdp == "full_shard" or config_shards)
    if sharded and cfg.lora_rank:
        raise settings.UserError("lora_rank: the accelerate config requests FSDP, but LoRA needs whole weights per GPU")
    if processes > 1 and LAUNCHER is None and not torch.distributed.is_initialized():
        doubt = f"WORLD_SIZE is {processes}; if no launcher started this process, unset it"
        print(f"waiting for the other processes: {doubt}", flush=True)
        try:
            # a variable, so that the store lasts until accelerate meets the others in it again
            store = next(torch.distributed.rendezvous("env://", timeout=MEETING))  # noqa: F841
        except (ValueError, torch.distributed.DistError) as error:
            raise settings.UserError(f"the other processes have not come ({error!s:.200}): {doubt}") from None
    plugin = fsdp_plugin(cfg) if sharded else None
    on_cpu = not torch.cuda.is_available()
    # under FSDP the plugin's policy casts
    autocast = "bf16" if cfg.bf16 and not sharded else "no"
    # ranks wait while rank 0 loads or saves 30 GB, and at the end of an evaluation; the launcher notices a dead rank
    timeout = InitProcessGroupKwargs(timeout=timedelta(hours=6))
    accelerator = Accelerator(
        cpu=on_cpu,
        fsdp_plugin=plugin,
        mixed_precision=autocast,
        kwargs_handlers=[timeout],
        **tracker_arguments(cfg),
    )
    if accelerator.num_processes != processes:
        raise RuntimeError("accelerate did not join the launched processes")
    if sharded and on_cpu:
        # accelerate does not support FSDP on CPUs, but PyTorch does: turn on accelerate's FSDP2 code (for the tests)
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    # cuDNN's attention spends 30 ms on planning each new shape, and here shapes change at every step
    torch.backends.cuda.enable_cudnn_sdp(False)
    return accelerator


def fsdp_plugin(cfg):
    """FSDP2 with float32 master weights. An argument that is not given would be read from the user's environment."""
    compute = torch.bfloat16 if cfg.bf16 else None
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        # shards each text layer and vision block on its own
        auto_wrap_policy="transformer_based_wrap",
        mixed_precision_policy=precision,
        reshard_after_forward=True,
        cpu_offload=False,
        # policy.load_policy does it, if gradient_checkpointing is set
        activation_checkpointing=False,
        cpu_ram_efficient_loading=True,
        state_dict_type="SHARDED_STATE_DICT",
    )


def tracker_arguments(cfg):
    """Arguments of Accelerator for `log_with`. Raises UserError if that package is not installed."""
    log_with = getattr(cfg, "log_with", "none")
    if log_with == "none":
        return {}
    if find_spec(log_with) is None:
        raise settings.UserError(f"log_with: {log_with} is not installed: pip install {log_with}, or log_with: none")
    return {"log_with": log_with, "project_dir": cfg.output_dir}


def is_sharded(accelerator):
    return accelerator.distributed_type == DistributedType.FSDP


def seed_everything(*numbers):
    """Seed every generator from these numbers. tgrpo.py does so each step, so a resumed step samples the same."""
    set_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def compute_dtype(cfg):
    """The dtype of forward passes and of saved models."""
    return torch.bfloat16 if cfg.bf16 else torch.float32


def place(accelerator, model):
    """The model on this rank's device, sharded if the policy is."""
    return fsdp2_prepare_model(accelerator, model) if is_sharded(accelerator) else model.to(accelerator.device)


def prepare(accelerator, model, cfg):
    """(model, optimizer) ready for training: on their device, and sharded or wrapped if the launch requires it."""
    if cfg.freeze_vision:
        model.model.visual.requires_grad_(False)
    if is_sharded(accelerator):
        # before the optimizer exists: accelerate could not replace the parameters of weights that have not arrived
        model = place(accelerator, model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # foreach: the default updates sharded tensors one by one, six times slower
    optimizer = torch.optim.AdamW(
        parameters, lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2), weight_decay=cfg.weight_decay, foreach=True
    )
    return accelerator.prepare(model, optimizer)


def sum_over_ranks(accelerator, value):
    """Sum of a number over the ranks. Collective."""
    total = torch.tensor(value, dtype=torch.float64, device=accelerator.device)
    return accelerator.reduce(total, "sum").item()
