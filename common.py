"""The plumbing every stage shares, once: models, sharding, memory, checkpoints, logs (settings are in settings.py).

Read `data.py` and `rewards.py` first; come back here when a stage script calls one of these:

    load_processor, load_model, Policy      transformers' own classes, and a head that returns log-probs
    mrope_positions                         where each token of a prompt stands in time, row and column
    make_accelerator                        Accelerate, with FSDP switched on from the config
    save_model, save_checkpoint, resume     atomic: a half-written folder is never chosen
    starting_files                          the checkpoint's own config and tokenizer files, kept for `final`
    Log                                     metrics.jsonl, one dict a step

Axes: B rows · L tokens of a row · P tokens of a prompt · N predicted tokens · D hidden size · V vocabulary
      in Packed: N completions · T tokens of the longest completion · M completion tokens of all rows
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
from dataclasses import asdict
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
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._pytree import tree_map

from settings import (
    UserError,
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


# ------------------------------------------------------------------------------------- processor and model


def compute_dtype(cfg):
    return torch.bfloat16 if cfg.bf16 else torch.float32


# ---------------------------------------------------------------------------------- Accelerate, sharded or not


# What an accelerate config may ask for that these scripts do not do: the variable it sets, and its name.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# What an accelerate config may say about training. Here the stage's own config says it, so these are dropped.
OVERRULED = re.compile(r"FSDP_\w+|ACCELERATE_(USE_FSDP|MIXED_PRECISION|GRADIENT_ACCUMULATION_STEPS|DYNAMO_\w+)")
# Ranks wait for each other while rank 0 loads or saves 30 GB, and at the end of an evaluation. The launcher still
# notices a rank that died at once.
PATIENCE = timedelta(hours=6)


def make_accelerator(cfg, shard=True, **kwargs):
    """Accelerator for this launch. With several processes and `fsdp: full_shard`, prepare() shards the model (FSDP2).

    A user's own accelerate config may say which processes run where, and one with FSDP asks for sharding too. How they
    train is said by `cfg` alone. `shard` False: each process holds a whole model, as in evaluation.

    Raises UserError for DeepSpeed, Megatron-LM and other parallelism.
    """
    for name, library in UNSUPPORTED.items():
        if os.environ.get(name, "false").lower() == "true":
            raise UserError(
                f"the accelerate config asks for {library}, which is not supported here: choose multi-GPU or FSDP"
            )
    asks_for_shards = cfg.fsdp == "full_shard" or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    for name in [name for name in os.environ if OVERRULED.fullmatch(name)]:
        del os.environ[name]

    processes = int(os.environ.get("WORLD_SIZE", 1))
    plugin = fsdp_plugin(cfg) if shard and asks_for_shards and processes > 1 else None
    on_cpu = not torch.cuda.is_available()
    # under FSDP the plugin's policy casts
    autocast = "bf16" if cfg.bf16 and plugin is None else "no"
    accelerator = Accelerator(
        cpu=on_cpu,
        fsdp_plugin=plugin,
        mixed_precision=autocast,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        **kwargs,
    )
    if accelerator.num_processes != processes:
        raise RuntimeError("accelerate did not join the launched processes")
    if plugin and on_cpu and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate knows no FSDP on CPUs; PyTorch does. This turns accelerate's own FSDP2 code on (for the tests).
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    # cuDNN's attention plans each new shape for 30 ms and keeps the plan; here shapes change at every step
    torch.backends.cuda.enable_cudnn_sdp(False)
    return accelerator


def fsdp_plugin(cfg):
    """FSDP2 with float32 master weights; what is not said here would be read from the user's environment."""
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
        activation_checkpointing=False,  # the setting gradient_checkpointing does it, in load_model
        cpu_ram_efficient_loading=True,
        state_dict_type="SHARDED_STATE_DICT",
    )


def is_sharded(accelerator):
    return accelerator.distributed_type == DistributedType.FSDP


def seed_everything(*numbers):
    """Seed every generator from these numbers. tgrpo.py does so each step, so that a resumed step samples what it would have."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def to_device(inputs, device):
    return tree_map(lambda x: x.to(device, non_blocking=True) if hasattr(x, "to") else x, inputs)


def learning_rate(step, cfg):
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then `lr_schedule` down to min_lr_ratio."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[cfg.lr_schedule]
    return cfg.lr * (shape if cfg.lr_schedule == "constant" else cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * shape)


def prepare(accelerator, model, cfg):
    """(model, optimizer) ready for training: on their device, sharded or wrapped where the launch asks for it.

    Sharding comes first: ranks whose weights are still to come could not be matched with an optimizer made before.
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


def update(accelerator, model, optimizer, step, cfg):
    """One clipped AdamW step. Returns the gradient norm before clipping, of all ranks together.

    A norm that is not finite means no step, on any rank; three in a row end the run (RuntimeError).
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg)
    norm = accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if math.isfinite(norm):
        optimizer.step()
        update.skipped_in_a_row = 0
    else:
        update.skipped_in_a_row += 1
        accelerator.print(f"step {step}: the gradient norm is {norm}; this step is skipped")
        if update.skipped_in_a_row == 3:
            raise RuntimeError(
                f"three steps in a row had no finite gradient, the last was step {step}; lower lr, or look at the data"
            )
    optimizer.zero_grad()
    return norm


update.skipped_in_a_row = 0


def all_sum(accelerator, values):
    """Sum of each number over the ranks. Collective: every rank must call it, with the same keys."""
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(values, accelerator.reduce(total, "sum").tolist()))


# ------------------------------------------------------------------------------------------- memory, told beforehand


# ------------------------------------------------------------------------------------ checkpoints and the end


@contextmanager
def room_on_disk(path):
    """Turns a failed write to `path` into one line that says what to do; what was there before stays as it was."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        if isinstance(error, RuntimeError) and "writ" not in str(error):
            raise
        there = checkpoints(Path(path).parent)
        advice = "make room on the disk and start the same command again"
        if there:
            advice += f": it goes on from {there[-1].name}, which is whole"
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
    """All that is needed to go on after `step` finished steps. Collective. A checkpoint appears whole or not at all."""
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
    """{file below `folder`: hash of its size and of samples of its bytes}, by which a damaged checkpoint is known."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != "state.json")
    return {str(path.relative_to(folder)): sampled_hash(path) for path in files}


def damage(checkpoint):
    """What is wrong with a checkpoint's files, in words; None if nothing is."""
    try:
        expected = json.loads((checkpoint / "state.json").read_text(encoding="utf-8")).get("files", {})
    except (OSError, ValueError) as error:
        return f"state.json cannot be read ({error})"
    found = contents(checkpoint)
    for name, value in expected.items():
        if found.get(name) != value:
            return f"{name} {'is not what was written' if name in found else 'is missing'}"
    return None


def resume(accelerator, checkpoint):
    """Load `checkpoint` (of claim_folder) into what was prepared. Returns its state, {"step": 0} for None.

    Collective: every rank must call it.
    """
    if checkpoint is None:
        return {"step": 0}
    accelerator.load_state(str(checkpoint))
    accelerator.print(f"resumed from {checkpoint}")
    return json.loads((Path(checkpoint) / "state.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------ the folder of a run

# Settings that may change when a run is resumed: they say where and how fast it runs, not what is learned. The records
# and the starting weights are compared by their content.
HARMLESS = (
    "model records data_root output_dir num_workers fsdp micro_batch_size gradient_checkpointing max_unreadable steps "
    "save_every keep_checkpoints resume resume_changed print_every save_rollouts rollout_compile plan gpus log_with"
).split()
RUN_FILES = (
    "checkpoint-* damaged-checkpoint-* final final-of-*-steps metrics.jsonl rollouts.jsonl config.yaml run.json"
).split()
held_locks = {}


def claim_folder(accelerator, cfg, stage):
    """Make cfg.output_dir this run's own, before anything slow happens. Returns the checkpoint to go on from, or None.

    With `resume` false an earlier run in the folder is moved aside. Raises UserError if the folder cannot be
    written, if another run works in it, or if its newest checkpoint is of a run that would learn something else.
    Collective.
    """
    chosen = [None]
    if accelerator.is_main_process:
        folder = Path(cfg.output_dir)
        lock_folder(folder)
        if cfg.resume:
            chosen = [newest_whole_checkpoint(accelerator, folder)]
        else:
            move_aside(accelerator, folder)
        now = identity(cfg, stage)
        if chosen[0] is not None:
            check_resumable(accelerator, cfg, chosen[0], now)
        keep_finished(accelerator, cfg, folder, chosen[0])
        write_atomic(folder / "run.json", json.dumps(now, indent=1))
    return broadcast_object_list(chosen)[0]


def lock_folder(folder):
    """Lock `folder` until this process ends, however it ends.

    Raises UserError if the folder cannot be written or another run has it.
    """
    folder = Path(folder)
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another --output_dir") from None
    try:
        # a lock of the process: its children do not inherit it, and the system drops it when the process is gone
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(
            f"{folder}: another run works in this folder: {file.read().strip()}; wait for it, or choose another --output_dir"
        ) from None
    held_locks[str(folder)] = file
    with room_on_disk(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()


def newest_whole_checkpoint(accelerator, folder):
    """The newest checkpoint whose files are what was written, or None if there is no checkpoint.

    Newer ones are damaged: they are named and renamed. Raises UserError if all are.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        wrong = damage(checkpoint)
        if wrong is None:
            return str(checkpoint)
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        accelerator.print(f"{checkpoint} is damaged: {wrong}; it is renamed to {aside.name} and not used")
    if found:
        raise UserError(
            f"{folder}: none of its checkpoints is whole; start anew with --resume false (they are moved aside)"
        )
    return None


def move_aside(accelerator, folder):
    """Move what an earlier run left in `folder` into a new folder earlier-1, earlier-2, … below it."""
    there = [path for pattern in RUN_FILES for path in sorted(folder.glob(pattern))]
    if not there:
        return
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for path in there:
        os.replace(path, aside / path.name)
    accelerator.print(f"resume is false: the earlier run in {folder} is now in {aside}")


def keep_finished(accelerator, cfg, folder, checkpoint):
    """UserError if `folder` holds a finished run, which starting again would overwrite.

    A run may go on from a checkpoint to more steps; the model of the fewer steps is kept under another name.
    """
    if not (folder / "final").is_dir():
        return
    try:
        steps = json.loads((folder / "run.json").read_text(encoding="utf-8"))["schedule_steps"]
    except OSError:
        steps = len(read_jsonl(folder / "metrics.jsonl"))
    if checkpoint is None or cfg.steps <= steps:
        more = "" if checkpoint is None else ", or go on with more --steps"
        raise UserError(
            f"{folder}: a run of {steps} steps is finished here, its model is {folder / 'final'}; start anew with --resume "
            f"false (the finished run is moved aside), choose another --output_dir{more}"
        )
    kept = folder / f"final-of-{steps}-steps"
    replace_folder(folder / "final", kept)
    accelerator.print(f"going on from {steps} to {cfg.steps} steps; the model of {steps} steps is now {kept}")


def identity(cfg, stage):
    """What the result of a run depends on: its settings, the content of its records, the starting weights."""
    settings = {name: value for name, value in asdict(cfg).items() if name not in HARMLESS}
    return {
        "stage": stage,
        "settings": settings,
        "schedule_steps": cfg.steps,
        "records": file_hash(cfg.records),
        "weights": fingerprint(cfg.model) or cfg.model,
    }


def check_resumable(accelerator, cfg, checkpoint, now):
    """UserError if this run would go on from `checkpoint` as another one than it was made by."""
    path = Path(checkpoint)
    done = int(path.name.split("-")[1])
    if done > cfg.steps:
        raise UserError(
            f"steps: {cfg.steps}, but {path} has done {done} already; ask for more, or start anew with --resume false"
        )
    was_sharded = (path / "pytorch_model_fsdp_0").is_dir()
    if was_sharded != is_sharded(accelerator):
        kinds = ("of whole weights", "of sharded weights")
        raise UserError(
            f"{path}: a checkpoint {kinds[was_sharded]} cannot be resumed in a run {kinds[not was_sharded]}: start it as "
            f"before, or make it a model to start from: python -m tools.export {path} FOLDER"
        )
    try:
        before = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except OSError:
        accelerator.print(
            f"{path} does not say how it was made; settings, records and starting weights are not compared"
        )
        return
    changed = []
    for name, value in now["settings"].items():
        if before["settings"].get(name) != value:
            changed.append(f"{name} was {before['settings'].get(name)!r}, is {value!r}")
    steps = before["schedule_steps"]
    if steps != cfg.steps and cfg.lr_schedule != "constant":
        changed.append(f"steps was {steps}, is {cfg.steps}, which the {cfg.lr_schedule} schedule depends on")
    if before["records"] != now["records"]:
        changed.append(f"the content of {cfg.records} has changed")
    if before["weights"] != now["weights"]:
        belongs = ", so this policy belongs to another SFT model" if now["stage"] == "tgrpo" else ""
        changed.append(f"the weights in {cfg.model} have changed{belongs}")
    differences = "; ".join(changed)
    if changed and not cfg.resume_changed:
        raise UserError(
            f"{path} was made by another run: {differences}. Start anew with --resume false (the earlier run is moved aside), "
            "choose another --output_dir, or go on all the same with --resume_changed true"
        )
    if changed:
        accelerator.print(f"going on from {path} all the same: {differences}")


def launcher():
    """The process that launched this one, if it is accelerate's or torch's launcher; else None."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return os.getppid() if re.search(r"accelerate|torchrun|torch\.distributed", command) else None


class StopSignal:
    """True once the run was asked to stop: by SIGTERM, by Ctrl-C, or by the end of its launcher.

    The loop then saves and leaves with exit status 0. A second Ctrl-C stops at once.
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
        # print() must not be called here: the signal may have come in the middle of one
        os.write(2, b"\nstopping after this step; Ctrl-C stops at once, without saving\n")

    @property
    def asked(self):
        return self.received or (self.launcher is not None and os.getppid() != self.launcher)


def after_step(accelerator, cfg, step, stop, state):
    """Checkpoint where one is due. True if the run was asked to stop: it is saved, and the caller leaves.

    Collective: the ranks decide together, or one would leave while the others wait for it.
    """
    asked = all_sum(accelerator, {"stop": float(stop.asked)})["stop"] > 0
    due = cfg.save_every and (step + 1) % cfg.save_every == 0 and step + 1 < cfg.steps
    if asked or due:
        save_checkpoint(accelerator, cfg, step + 1, state)
    if asked:
        accelerator.print(
            f"stopped after {step + 1} of {cfg.steps} steps; the same command goes on from "
            f"{cfg.output_dir}/checkpoint-{step + 1}"
        )
    return asked


# --------------------------------------------------------------------------------------------- batches of a step


def check_batches(cfg, accelerator):
    """UserError, at start-up, for a batch that the processes cannot share evenly."""
    ranks, share = accelerator.num_processes, cfg.batch_size // accelerator.num_processes
    if cfg.batch_size % ranks:
        raise UserError(f"batch_size {cfg.batch_size} does not divide over {ranks} processes")
    if share % min(cfg.micro_batch_size, share):
        raise UserError(
            f"the {share} records of one process do not divide into micro-batches of {cfg.micro_batch_size}"
        )


def micro_batches(items, cfg, accelerator, blank):
    """This rank's share of a step, `micro_batch_size` at a time, each with its weight: 1, or 0 for a blank one.

    Sharded weights are gathered by all ranks together, so every rank must run the same number of forwards. Where an
    unusable record left a rank short, it runs `blank` with weight 0 instead; nothing is learned from it.
    """
    for first in range(0, cfg.batch_size // accelerator.num_processes, cfg.micro_batch_size):
        chunk = items[first : first + cfg.micro_batch_size]
        if chunk or accelerator.num_processes > 1:
            yield (chunk, 1.0) if chunk else ([blank], 0.0)


class Skipped:
    """Counts and names bad rows and records whose media are unusable; stops the run past `max_unreadable` of all rows.

    bad_rows: {name: reason}, known since the records were loaded. seen: the same of those met before a resume.
    """

    def __init__(self, accelerator, cfg, n_records, bad_rows, seen=()):
        self.limit = cfg.max_unreadable
        self.n_records = n_records + len(bad_rows)
        self.seen = dict(bad_rows) | dict(seen)
        for name, reason in bad_rows.items():
            accelerator.print(f"skipped {name}: {reason}")

    def __len__(self):
        return len(self.seen)

    def drop(self, accelerator, batch):
        """The readable samples of this rank's batch. Collective: all ranks learn of every unusable record."""
        found = gather_object([(f"{s.record['problem_id']} ({s.record['path']})", s.error) for s in batch if s.error])
        for name, reason in found:
            if name not in self.seen:
                accelerator.print(f"skipped {name}: {reason}")
                self.seen[name] = reason
        if len(self.seen) > self.limit * self.n_records:
            raise UserError(
                f"{len(self.seen)} of {self.n_records} records are unusable, more than max_unreadable "
                f"{self.limit} allows; `python data.py --check` lists them. The last: {found[-1][1]}"
            )
        return [s for s in batch if not s.error]

    def report(self, accelerator):
        if self.seen:
            accelerator.print(f"{len(self.seen)} unusable records were skipped: " + ", ".join(self.seen))


class Means:
    """Means over everything added on all ranks, each with its own weight."""

    def __init__(self):
        self.sums, self.weights = {}, {}

    def add(self, values, weight=1.0):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def reduce(self, accelerator):
        """{name: mean}. Collective; a name need not be known on every rank."""
        parts = gather_object([(self.sums, self.weights)])
        names = sorted({name for sums, _ in parts for name in sums})
        total = lambda index, name: sum(part[index].get(name, 0.0) for part in parts)
        return {name: total(0, name) / total(1, name) for name in names if total(1, name)}


def peak_memory(accelerator):
    """{"memory/peak_gb": most that tensors have held on this GPU so far, in 1e9 bytes}; empty on a CPU."""
    return {"memory/peak_gb": torch.cuda.max_memory_allocated() / 1e9} if accelerator.device.type == "cuda" else {}


class Timer:
    """Seconds between laps, by name."""

    def __init__(self):
        self.last, self.laps = time.perf_counter(), {}

    def lap(self, name):
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.laps[f"time/{name}"] = self.laps.get(f"time/{name}", 0.0) + seconds
        return seconds

    def report(self):
        laps, self.laps = self.laps, {}
        return laps


# -------------------------------------------------------------------------------------------------------- log


class Log:
    """metrics.jsonl, one dict per step, and rollouts.jsonl; `log_with` sends the metrics elsewhere too. Rank 0 writes.

    A resumed run begins by dropping the rows of the steps that it will do again.
    """

    def __init__(self, accelerator, cfg, stage, start_step):
        self.accelerator, self.folder = accelerator, Path(cfg.output_dir)
        self.has_tracker = cfg.log_with != "none"
        if accelerator.is_main_process:
            for path in (self.folder / "metrics.jsonl", self.folder / "rollouts.jsonl"):
                kept = [row for row in read_jsonl(path) if row["step"] < start_step]
                if kept or path.exists():
                    write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
            write_atomic(self.folder / "config.yaml", yaml.safe_dump({stage: asdict(cfg)}, sort_keys=False))
        if cfg.log_with == "tensorboard":
            # the name of a folder in output_dir
            accelerator.init_trackers("tensorboard")
        if cfg.log_with == "wandb":
            accelerator.init_trackers("video-r1", config=asdict(cfg), init_kwargs={"wandb": {"name": cfg.output_dir}})

    def __call__(self, step, metrics):
        self.append("metrics.jsonl", step, [{k: float(f"{v:.6g}") for k, v in metrics.items()}])
        if self.has_tracker:
            self.accelerator.log(metrics, step=step)

    def rollouts(self, step, rows):
        """Collective: every rank hands over its own rows."""
        self.append("rollouts.jsonl", step, gather_object(rows))

    def append(self, name, step, rows):
        if self.accelerator.is_main_process:
            append_rows(self.folder / name, [{"step": step, **row} for row in rows])


def trackers(cfg):
    """Arguments of Accelerator for `log_with`. UserError if that package is not installed."""
    if cfg.log_with == "none":
        return {}
    if find_spec(cfg.log_with) is None:
        raise UserError(f"log_with: {cfg.log_with} is not installed: pip install {cfg.log_with}, or log_with: none")
    return {"log_with": cfg.log_with, "project_dir": cfg.output_dir}
