"""What every stage shares: accelerator and sharding, optimizer, and a Run (settings and files are in settings.py).

    make_accelerator, prepare            Accelerate, with FSDP switched on from the config; the optimizer
    Run                                  a training run: folder, resuming, steps, log, checkpoints, stopping
    checkpoints                          written whole or not at all: a half-written folder is never chosen
    Means, sum_over_ranks                numbers of all ranks together

"Collective" in a docstring means that every rank must call the function, or the others wait for it.
"""

import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import time
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from settings import (
    SharedConfig,
    UserError,
    adapter_chain,
    append_rows,
    file_hash,
    fingerprint,
    read_jsonl,
    sampled_hash,
    write_atomic,
)

# The shapes of a step change with its prompts, and a GPU's memory fragments. Read when torch first allocates there.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

WRAPPED_LAYERS = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]


# ---------------------------------------------------------------------------------- accelerator and sharding


# What an accelerate config may request but these scripts do not support: the variable it sets, and its name.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# What an accelerate config may set for training. Here the stage's own config sets it, so these are dropped.
OVERRULED = re.compile(r"FSDP_\w+|ACCELERATE_(USE_FSDP|MIXED_PRECISION|GRADIENT_ACCUMULATION_STEPS|DYNAMO_\w+)")
# Ranks wait for each other while rank 0 loads or saves 30 GB, and at the end of an evaluation. The launcher still
# notices a dead rank at once.
COLLECTIVE_TIMEOUT = timedelta(hours=6)


def make_accelerator(cfg, shard=True):
    """Accelerator for this launch. With several processes and `fsdp: full_shard`, prepare() shards the model (FSDP2).

    A user's own accelerate config may set which processes run where, and one with FSDP turns sharding on too. How they
    train is set by `cfg` alone. With `shard` False each process holds a whole model, as in evaluation.

    Raises UserError for DeepSpeed, Megatron-LM and other parallelism, and for a `log_with` that is not installed.
    """
    for name, library in UNSUPPORTED.items():
        if os.environ.get(name, "false").lower() == "true":
            raise UserError(
                f"the accelerate config requests {library}, which is not supported here: choose multi-GPU or FSDP"
            )
    config_shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    for name in [name for name in os.environ if OVERRULED.fullmatch(name)]:
        del os.environ[name]

    processes = int(os.environ.get("WORLD_SIZE", 1))
    sharded = shard and processes > 1 and (cfg.fsdp == "full_shard" or config_shards)
    if sharded and cfg.lora_rank:
        raise UserError("lora_rank: the accelerate config requests FSDP, but with LoRA each GPU holds the whole model")
    plugin = fsdp_plugin(cfg) if sharded else None
    on_cpu = not torch.cuda.is_available()
    # under FSDP the plugin's policy casts
    autocast = "bf16" if cfg.bf16 and plugin is None else "no"
    accelerator = Accelerator(
        cpu=on_cpu,
        fsdp_plugin=plugin,
        mixed_precision=autocast,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
        **tracker_arguments(cfg),
    )
    if accelerator.num_processes != processes:
        raise RuntimeError("accelerate did not join the launched processes")
    if plugin and on_cpu and accelerator.distributed_type == DistributedType.MULTI_CPU:
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
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=WRAPPED_LAYERS,
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
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
        raise UserError(f"log_with: {log_with} is not installed: pip install {log_with}, or log_with: none")
    return {"log_with": log_with, "project_dir": cfg.output_dir}


def is_sharded(accelerator):
    return accelerator.distributed_type == DistributedType.FSDP


def seed_everything(*numbers):
    """Seed every generator from these numbers. tgrpo.py does so each step, so a resumed step samples the same."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def compute_dtype(cfg):
    """The dtype of forward passes and of saved models."""
    return torch.bfloat16 if cfg.bf16 else torch.float32


def to_device(inputs, device):
    """`inputs` (nested dicts and lists) with every tensor on `device`."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device, non_blocking=True), inputs)


# --------------------------------------------------------------------------------------------------- the starting model


def check_model(cfg, stage, made_by=None):
    """Raise UserError if `cfg.model` is a local path without a Qwen2.5-VL checkpoint.

    `made_by` is a command that makes one; the message shows it.
    """
    is_hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", cfg.model) and not cfg.model.startswith(".")
    is_local = Path(cfg.model).exists() or ("/" in cfg.model and Path(cfg.model).parent.is_dir())
    if is_hub_name and not is_local:
        return
    base, *adapters = adapter_chain(cfg.model)
    if adapters:
        check_model(SharedConfig(model=base), f"{stage}.model: {cfg.model} is an adapter; its base")
        return
    config = Path(cfg.model) / "config.json"
    if not config.is_file():
        hint = f"; make one with: {made_by}" if made_by else ""
        raise UserError(f"{stage}.model: no checkpoint at {cfg.model}{hint}")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config}: not a model's config: {error}") from None
    if model_type != "qwen2_5_vl":
        raise UserError(
            f"{stage}.model: {cfg.model} holds a model of type {model_type}; these scripts train qwen2_5_vl"
        )


def check_hub(model):
    """UserError if `model` is a hub name and the hub cannot be reached; transformers would retry for minutes."""
    if Path(model).exists() or is_offline_mode():
        return
    try:
        HfApi().model_info(model, timeout=10)
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"model: {model} is neither a local folder nor a model on the hub that you may read") from None
    except (OSError, HTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"model: {model} is not a local folder, and the hub cannot be reached: {reason:.200}; with "
            "HF_HUB_OFFLINE=1 a copy in the hub's cache is used"
        ) from None


# ----------------------------------------------------------------------------------------------------------- optimizer


def learning_rate(step, cfg):
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then `lr_schedule` down to min_lr_ratio · lr."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    if cfg.lr_schedule == "constant":
        return cfg.lr
    if cfg.lr_schedule == "linear":
        decay = 1 - progress
    else:
        decay = (1 + math.cos(math.pi * progress)) / 2
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * decay)


def prepare(accelerator, model, cfg):
    """(model, optimizer) ready for training: on their device, and sharded or wrapped if the launch requires it.

    The model is sharded before the optimizer exists: on the ranks whose weights have not arrived yet, accelerate could
    not replace an optimizer's parameters.
    """
    if cfg.freeze_vision:
        model.model.visual.requires_grad_(False)
    if is_sharded(accelerator):
        model = fsdp2_prepare_model(accelerator, model)
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


class Means:
    """Weighted means of named numbers, over everything that was added on all ranks."""

    def __init__(self):
        self.sums = {}
        self.weights = {}

    def add(self, values, weight=1.0):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def reduce(self, accelerator):
        """{name: mean}. Collective; a name may be missing on some of the ranks."""
        sums = {}
        weights = {}
        for rank_sums, rank_weights in gather_object([(self.sums, self.weights)]):
            for name in rank_sums:
                sums[name] = sums.get(name, 0.0) + rank_sums[name]
                weights[name] = weights.get(name, 0.0) + rank_weights[name]
        return {name: sums[name] / weights[name] for name in sorted(sums) if weights[name]}


# ---------------------------------------------------------------------------------------------------------------- a run


class Run:
    """A training run in `cfg.output_dir`: its folder, batches, metrics, checkpoints, and how it stops.

    Create it before anything slow happens: it claims the folder and raises UserError for a batch that the ranks cannot
    share, for a folder in use, and for a checkpoint of a different run. After prepare(), call resume(). Collective, as
    are all methods.

    `bad_rows` {name: reason} are the rows that load_records left out, `n_records` is the number of the others.
    """

    def __init__(self, accelerator, cfg, stage, n_records, bad_rows):
        self.accelerator = accelerator
        self.cfg = cfg
        self.stage = stage
        self.folder = Path(cfg.output_dir)
        self.n_rows = n_records + len(bad_rows)
        # {name: reason} of every row that was skipped
        self.skipped = dict(bad_rows)
        self.steps_without_gradient = 0
        check_batch_size(cfg, accelerator.num_processes)
        self.checkpoint = claim_folder(accelerator, cfg, stage)
        for name, reason in bad_rows.items():
            accelerator.print(f"skipped {name}: {reason}")

    def resume(self):
        """Load the newest checkpoint, if there is one, into what accelerator.prepare() was given."""
        state = {"step": 0}
        if self.checkpoint is not None:
            self.accelerator.load_state(str(self.checkpoint))
            self.accelerator.print(f"resumed from {self.checkpoint}")
            state = json.loads((Path(self.checkpoint) / "state.json").read_text(encoding="utf-8"))
        self.first_step = state["step"]
        self.skipped |= state.get("skipped", {})
        self.stop = StopSignal()
        self.start_log()

    def start_log(self):
        """Drop the logged rows of steps that will be repeated, and start a tracker if `log_with` names one."""
        if self.accelerator.is_main_process:
            for path in (self.folder / "metrics.jsonl", self.folder / "rollouts.jsonl"):
                rows = [row for row in read_jsonl(path) if row["step"] < self.first_step]
                if rows or path.exists():
                    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
            config = {self.stage: asdict(self.cfg)}
            write_atomic(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        if self.cfg.log_with == "tensorboard":
            # the name of a folder in output_dir
            self.accelerator.init_trackers("tensorboard")
        if self.cfg.log_with == "wandb":
            name = {"wandb": {"name": self.cfg.output_dir}}
            self.accelerator.init_trackers("video-r1", config=asdict(self.cfg), init_kwargs=name)

    def steps(self, batches):
        """Yields (step, readable samples) for this rank's `batches` (lists of Samples), with a progress bar."""
        self.bar = tqdm(
            batches,
            initial=self.first_step,
            total=self.cfg.steps,
            desc=self.stage,
            disable=not self.accelerator.is_main_process,
        )
        self.seconds = {}
        self.last_lap = time.perf_counter()
        for step, batch in enumerate(self.bar, self.first_step):
            self.lap("data_wait")
            yield step, self.drop_unreadable(batch)

    def drop_unreadable(self, batch):
        """The readable samples of `batch`. All ranks count the unreadable ones; too many of them end the run."""
        errors = [(f"{s.record['problem_id']} ({s.record['path']})", s.error) for s in batch if s.error]
        errors = gather_object(errors)
        for name, reason in errors:
            if name not in self.skipped:
                self.accelerator.print(f"skipped {name}: {reason}")
                self.skipped[name] = reason
        if len(self.skipped) > self.cfg.max_unreadable * self.n_rows:
            raise UserError(
                f"{len(self.skipped)} of {self.n_rows} records are unusable, more than max_unreadable "
                f"{self.cfg.max_unreadable} allows; `python data.py --check` lists them. The last: {errors[-1][1]}"
            )
        return [sample for sample in batch if not sample.error]

    def micro_batches(self, items, dummy):
        """Yields (micro-batch, weight): this rank's items of a step, `micro_batch_size` at a time.

        Sharded weights are gathered by all ranks together, so every rank must run the same number of forward passes. If
        unreadable records left a rank with too few, it runs `dummy` with weight 0, from which nothing is learned.
        """
        size = self.cfg.micro_batch_size
        for first in range(0, self.cfg.batch_size // self.accelerator.num_processes, size):
            if items[first : first + size]:
                yield items[first : first + size], 1.0
            elif self.accelerator.num_processes > 1:
                yield [dummy], 0.0

    def update(self, model, optimizer, step):
        """One clipped AdamW step. Returns the gradient norm over all ranks, before clipping.

        If the norm is not finite, no rank takes the step; three such steps in a row raise RuntimeError.
        """
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, self.cfg)
        norm = self.accelerator.clip_grad_norm_(model.parameters(), self.cfg.max_grad_norm)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(norm):
            optimizer.step()
            self.steps_without_gradient = 0
        else:
            self.steps_without_gradient += 1
            self.accelerator.print(f"step {step}: the gradient norm is {norm}; this step is skipped")
        optimizer.zero_grad()
        if self.steps_without_gradient == 3:
            raise RuntimeError(
                f"three steps in a row had no finite gradient, the last was step {step}; lower lr, or check the data"
            )
        return norm

    def lap(self, name):
        """The seconds since the last lap; logged as time/<name>."""
        now = time.perf_counter()
        seconds = now - self.last_lap
        self.last_lap = now
        self.seconds[f"time/{name}"] = self.seconds.get(f"time/{name}", 0.0) + seconds
        return seconds

    def log(self, step, metrics):
        """Write a step's metrics, learning rate, seconds and peak memory to metrics.jsonl and to the tracker."""
        metrics = metrics | {"lr": learning_rate(step, self.cfg), "data/skipped": len(self.skipped), **self.seconds}
        self.seconds = {}
        if self.accelerator.device.type == "cuda":
            metrics["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        rounded = {name: float(f"{value:.6g}") for name, value in metrics.items()}
        self.append("metrics.jsonl", step, [rounded])
        if self.cfg.log_with != "none":
            self.accelerator.log(metrics, step=step)

    def log_rollouts(self, step, rows):
        """Append the rows of all ranks to rollouts.jsonl."""
        self.append("rollouts.jsonl", step, gather_object(list(rows)))

    def append(self, name, step, rows):
        if self.accelerator.is_main_process:
            append_rows(self.folder / name, [{"step": step, **row} for row in rows])

    def checkpoint_or_stop(self, step):
        """Save a checkpoint if one is due. True if the run was asked to stop: then it is saved, and the caller returns.

        The ranks decide together, or one would leave while the others wait for it.
        """
        finished = step + 1
        stop = sum_over_ranks(self.accelerator, float(self.stop.asked)) > 0
        due = self.cfg.save_every and finished % self.cfg.save_every == 0 and finished < self.cfg.steps
        if stop or due:
            save_checkpoint(self.accelerator, self.cfg, finished, {"skipped": self.skipped})
        if stop:
            self.accelerator.print(
                f"stopped after {finished} of {self.cfg.steps} steps; the same command continues from "
                f"{self.cfg.output_dir}/checkpoint-{finished}"
            )
        return stop

    def finish(self, message):
        """Print which records were skipped, and `message`."""
        if self.skipped:
            self.accelerator.print(f"{len(self.skipped)} unusable records were skipped: {', '.join(self.skipped)}")
        self.accelerator.print(message)
        self.accelerator.end_training()


def check_batch_size(cfg, ranks):
    """Raise UserError, at start-up, for a batch that the ranks cannot share evenly."""
    share = cfg.batch_size // ranks
    if cfg.batch_size % ranks:
        raise UserError(f"batch_size {cfg.batch_size} does not divide over {ranks} processes")
    if share % min(cfg.micro_batch_size, share):
        raise UserError(
            f"the {share} records of one process do not divide into micro-batches of {cfg.micro_batch_size}"
        )


def launcher():
    """The id of the process that launched this one if it is accelerate's or torch's launcher, else None."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return os.getppid() if re.search(r"accelerate|torchrun|torch\.distributed", command) else None


class StopSignal:
    """`asked` is True once SIGTERM, Ctrl-C or the end of its launcher has asked this run to stop.

    The loop then saves and exits with status 0. A second Ctrl-C stops at once.
    """

    def __init__(self):
        self.received = False
        self.launcher = launcher()
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        # print() is not allowed here: the signal may have interrupted one
        os.write(2, b"\nstopping after this step; Ctrl-C stops at once, without saving\n")

    @property
    def asked(self):
        return self.received or (self.launcher is not None and os.getppid() != self.launcher)


# ------------------------------------------------------------------------------------------ the folder of a run

# Settings that may change when a run is resumed: they affect where and how fast it runs, not what is learned. The
# records and the starting weights are compared by their content.
RESUMABLE_SETTINGS = (
    "model records data_root output_dir num_workers fsdp micro_batch_size gradient_checkpointing max_unreadable steps "
    "save_every keep_checkpoints resume resume_changed print_every save_rollouts rollout_compile log_with"
).split()
RUN_FILES = (
    "checkpoint-* damaged-checkpoint-* final final-of-*-steps metrics.jsonl rollouts.jsonl config.yaml run.json"
).split()
held_locks = {}


def claim_folder(accelerator, cfg, stage):
    """Lock cfg.output_dir for this run. Returns the checkpoint to resume from, or None. Collective.

    With `resume` false an earlier run in the folder is moved aside. Raises UserError if the folder cannot be
    written, if another run is using it, or if its newest checkpoint was made by a run with other settings.
    """
    checkpoint = None
    if accelerator.is_main_process:
        folder = Path(cfg.output_dir)
        lock_folder(folder)
        if cfg.resume:
            checkpoint = newest_whole_checkpoint(accelerator, folder)
        else:
            move_aside(accelerator, folder)
        now = identity(cfg, stage)
        if checkpoint is not None:
            check_resumable(accelerator, cfg, checkpoint, now)
        keep_finished(accelerator, cfg, folder, checkpoint)
        write_atomic(folder / "run.json", json.dumps(now, indent=1))
    return broadcast_object_list([checkpoint])[0]


def lock_folder(folder):
    """Lock `folder` until this process ends, however it ends.

    Raises UserError if the folder cannot be written or another run is using it.
    """
    folder = Path(folder)
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another --output_dir") from None
    try:
        # this lock is not inherited by child processes, and the system releases it when the process ends
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(
            f"{folder}: another run is using this folder: {file.read().strip()}; "
            "wait for it, or choose another --output_dir"
        ) from None
    held_locks[str(folder)] = file
    with room_on_disk(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()


def newest_whole_checkpoint(accelerator, folder):
    """The newest checkpoint whose files are what was written, or None if there is no checkpoint.

    Damaged checkpoints are renamed. Raises UserError if all are damaged.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        wrong = damage(checkpoint)
        if wrong is None:
            return str(checkpoint)
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        accelerator.print(f"{checkpoint} is damaged: {wrong}; renamed to {aside.name} and not used")
    if found:
        raise UserError(
            f"{folder}: none of its checkpoints is whole; start from scratch with --resume false (they are moved aside)"
        )
    return None


def move_aside(accelerator, folder):
    """Move the files of an earlier run in `folder` into a new folder earlier-1, earlier-2, … inside it."""
    earlier = []
    for pattern in RUN_FILES:
        earlier += sorted(folder.glob(pattern))
    if not earlier:
        return
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for path in earlier:
        os.replace(path, aside / path.name)
    accelerator.print(f"resume is false: the earlier run in {folder} is now in {aside}")


def keep_finished(accelerator, cfg, folder, checkpoint):
    """Raise UserError if `folder` holds a finished run, which starting again would overwrite.

    A run may continue from a checkpoint to more steps; the model after fewer steps is kept under another name.
    """
    if not (folder / "final").is_dir():
        return
    try:
        steps = json.loads((folder / "run.json").read_text(encoding="utf-8"))["schedule_steps"]
    except OSError:
        steps = len(read_jsonl(folder / "metrics.jsonl"))
    if checkpoint is None or cfg.steps <= steps:
        more = "" if checkpoint is None else ", or continue with more --steps"
        raise UserError(
            f"{folder}: a run of {steps} steps is finished here, its model is {folder / 'final'}; start from "
            f"scratch with --resume false (the finished run is moved aside), choose another --output_dir{more}"
        )
    kept = folder / f"final-of-{steps}-steps"
    replace_folder(folder / "final", kept)
    accelerator.print(f"continuing from {steps} to {cfg.steps} steps; the model after {steps} steps is now {kept}")


def identity(cfg, stage):
    """What the result of a run depends on: its settings, the content of its records, the starting weights."""
    compared = {name: value for name, value in asdict(cfg).items() if name not in RESUMABLE_SETTINGS}
    return {
        "stage": stage,
        "settings": compared,
        "schedule_steps": cfg.steps,
        "records": file_hash(cfg.records),
        "weights": fingerprint(cfg.model) or cfg.model,
    }


def check_resumable(accelerator, cfg, checkpoint, now):
    """Raise UserError if `checkpoint` was made by a run that differs from this one in what it learns."""
    path = Path(checkpoint)
    done = int(path.name.split("-")[1])
    if done > cfg.steps:
        raise UserError(
            f"steps: {cfg.steps}, but {path} is already after step {done}; set more steps, or start from "
            "scratch with --resume false"
        )
    if is_sharded(accelerator):
        kind = "sharded weights"
    else:
        kind = "an adapter" if cfg.lora_rank else "whole weights"
    if weights_in(path) != kind:
        raise UserError(
            f"{path}: a checkpoint of {weights_in(path)} cannot be resumed in a run of {kind}: start it as before, or "
            f"export it as a model to start from: python -m tools.export {path} FOLDER"
        )
    try:
        before = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except OSError:
        accelerator.print(f"{path} has no run.json: settings, records and starting weights are not compared")
        return
    changed = []
    # a setting that did not exist when the checkpoint was made had its default
    settings_before = {f.name: f.default for f in fields(cfg)} | before["settings"]
    for name, value in now["settings"].items():
        if settings_before[name] != value:
            changed.append(f"{name} was {settings_before[name]!r}, is {value!r}")
    steps = before["schedule_steps"]
    if steps != cfg.steps and cfg.lr_schedule != "constant":
        changed.append(f"steps was {steps}, is {cfg.steps}, which the {cfg.lr_schedule} schedule depends on")
    if before["records"] != now["records"]:
        changed.append(f"the content of {cfg.records} has changed")
    if before["weights"] != now["weights"]:
        belongs = ", so this policy belongs to another SFT model" if now["stage"] == "tgrpo" else ""
        changed.append(f"the weights in {cfg.model} have changed{belongs}")
    differences = "; ".join(changed)
    if settings_before["lora_rank"] != cfg.lora_rank:
        raise UserError(
            f"{path}: {differences}; the rank of an adapter cannot change. Start from scratch with --resume false (the "
            "earlier run is moved aside), or choose another --output_dir"
        )
    if changed and not cfg.resume_changed:
        raise UserError(
            f"{path} was made by a different run: {differences}. Start from scratch with --resume false "
            "(the earlier run is moved aside), choose another --output_dir, or continue anyway with "
            "--resume_changed true"
        )
    if changed:
        accelerator.print(f"continuing from {path} although {differences}")


def weights_in(checkpoint):
    """What a training checkpoint holds: "whole weights", "sharded weights" or "an adapter"."""
    if (checkpoint / "pytorch_model_fsdp_0").is_dir():
        return "sharded weights"
    return "an adapter" if (checkpoint / "adapter_config.json").is_file() else "whole weights"


# ------------------------------------------------------------------------------------ checkpoints


@contextmanager
def room_on_disk(path):
    """Turns a failed write to `path` into a UserError with advice. The previous content stays as it was."""
    try:
        yield
    # torch and safetensors raise their own errors if the disk is full
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "writ" not in str(error):
            raise
        advice = "free disk space and start the same command again"
        saved = checkpoints(Path(path).parent)
        if saved:
            advice += f": it continues from {saved[-1].name}, which is complete"
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}; {advice}") from error


def replace_folder(new, old):
    """Put the finished folder `new` where `old` is."""
    if old.exists():
        trash = old.with_name(f".{old.name}.old")
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(old, trash)
        os.replace(new, old)
        shutil.rmtree(trash)
    else:
        os.replace(new, old)


def checkpoints(output_dir):
    """Finished checkpoints, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def save_checkpoint(accelerator, cfg, step, state):
    """Everything that is needed to continue after `step` finished steps, written whole or not at all. Collective."""
    folder = Path(cfg.output_dir) / f"checkpoint-{step}"
    temporary = folder.with_name(folder.name + ".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    with room_on_disk(folder):
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.copy(Path(cfg.output_dir) / "run.json", temporary)
            write_atomic(temporary / "state.json", json.dumps({"step": step, "files": contents(temporary), **state}))
            replace_folder(temporary, folder)
    if accelerator.is_main_process:
        for old in checkpoints(cfg.output_dir)[: -cfg.keep_checkpoints]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def contents(folder):
    """{file in `folder`: hash of its size and of samples of its bytes}, by which a damaged checkpoint is recognised."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != "state.json")
    return {str(path.relative_to(folder)): sampled_hash(path) for path in files}


def damage(checkpoint):
    """A description of what is wrong with a checkpoint's files; None if nothing is."""
    try:
        expected = json.loads((checkpoint / "state.json").read_text(encoding="utf-8")).get("files", {})
    except (OSError, ValueError) as error:
        return f"state.json cannot be read ({error})"
    found = contents(checkpoint)
    for name, value in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != value:
            return f"{name} is not what was written"
    return None


if __name__ == "__main__":
    raise UserError("python common.py --export is now: python -m tools.export CHECKPOINT FOLDER")
