"""The folder of a run: its lock, what it may resume from, and checkpoints that are written whole or not at all."""

import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from support import distributed, settings, storage

# Settings that may change when a run is resumed: they affect where and how fast it runs, not what is learned. The
# records and the starting weights are compared by their content.
RESUMABLE_SETTINGS = (
    "model records data_root output_dir num_workers fsdp micro_batch_size gradient_checkpointing max_unreadable steps "
    "save_every keep_checkpoints resume resume_changed print_every save_rollouts vision_attention rollout_compile "
    "log_with"
).split()
START_ANEW = "start from scratch with --resume false (the earlier run is moved aside)"
held_locks = {}
# at every checkpoint accelerate prints that tied weights are stored once, which is right
logging.getLogger("accelerate.utils.other").addFilter(lambda line: "Removed shared tensor" not in line.getMessage())


def claim_folder(accelerator, cfg, stage):
    """Lock cfg.output_dir for this run. Returns [checkpoint to resume from or None, identity of this run]. Collective.

    Raises UserError for a folder or a checkpoint it cannot use. Files that are in the folder stay as they are.
    """
    checkpoint = None
    now = None
    if accelerator.is_main_process:
        folder = Path(cfg.output_dir)
        lock_folder(folder)
        refuse_foreign_config(folder)
        now = identity(cfg, stage)
        if cfg.resume:
            checkpoint = newest_whole_checkpoint(accelerator, folder)
            if checkpoint is not None:
                check_resumable(accelerator, cfg, checkpoint, now)
            refuse_finished(cfg, folder, checkpoint)
        # a folder without it is no run's, see check_lock
        if not (folder / "run.json").exists():
            storage.write_atomic(folder / "run.json", json.dumps(now, indent=1))
    return broadcast_object_list([checkpoint, now])


def take_folder(accelerator, cfg, checkpoint, now):
    """Move aside what this run does not continue, and write its identity `now` to run.json. For the main process.

    Call it once everything is loaded, so that a run that cannot start moves nothing.
    """
    check_lock(cfg.output_dir)
    folder = Path(cfg.output_dir)
    if checkpoint is not None:
        # the newer ones are damaged; `final` is the model of fewer steps
        newer = [path for path in finished_checkpoints(folder) if step_of(path) > step_of(checkpoint)]
        move_aside(accelerator, folder, [*newer, *folder.glob("final")])
    # with `resume`: steps of a run that ended before its first checkpoint
    elif not cfg.resume or storage.read_jsonl(folder / "metrics.jsonl"):
        patterns = "*checkpoint-* final* metrics.jsonl rollouts.jsonl config.yaml run.json".split()
        move_aside(accelerator, folder, [path for pattern in patterns for path in folder.glob(pattern)])
    storage.write_atomic(folder / "run.json", json.dumps(now, indent=1))


def lock_folder(folder):
    """Lock `folder` until this process ends, however it ends. UserError if it is in use or cannot be written."""
    folder = Path(folder)
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise settings.UserError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        # this lock is not inherited by child processes, and the system releases it when the process ends
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise settings.UserError(f"{folder}: another run is using this folder: {file.read().strip()}") from None
    except OSError as error:
        print(f"{folder}: this file system has no locks ({error.strerror}): start no second run in this folder")
    held_locks[str(folder)] = file
    with room_on_disk(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()


def check_lock(folder):
    """Raise UserError if `folder` is no longer the one that this process has locked."""
    path = Path(folder) / ".lock"
    held = held_locks.get(str(Path(folder)))
    if not held:
        return
    is_another = path.exists() and not os.path.samestat(os.fstat(held.fileno()), path.stat())
    if is_another or not path.with_name("run.json").exists():
        raise settings.UserError(f"{folder}: this folder was moved or replaced while the run was using it")


def refuse_foreign_config(folder):
    """Raise UserError if `folder` holds a config.yaml but no run: the run's own config would replace it."""
    path = folder / "config.yaml"
    if path.exists() and not (folder / "run.json").exists():
        raise settings.UserError(f"{path}: not written by a run, which would replace it; move it, or rename it")


def newest_whole_checkpoint(accelerator, folder):
    """The newest whole checkpoint, or None if there is none. Damaged ones are named; UserError if all are damaged."""
    found = finished_checkpoints(folder)
    for checkpoint in reversed(found):
        wrong = damage(checkpoint)
        if wrong is None:
            return checkpoint
        accelerator.print(f"{checkpoint} is damaged: {wrong}; not used")
    if found:
        raise settings.UserError(f"{folder}: none of its checkpoints is whole; {START_ANEW}")
    return None


def move_aside(accelerator, folder, earlier):
    """Move these files of an earlier run in `folder` into a new folder earlier-1, earlier-2, … inside it."""
    if not earlier:
        return
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for path in earlier:
        os.replace(path, aside / path.name)
    names = ", ".join(path.name for path in earlier)
    accelerator.print(f"the earlier run in {folder} is now in {aside}: {names}")


def refuse_finished(cfg, folder, checkpoint):
    """Raise UserError if `folder` holds a finished run, unless this run continues it to more steps."""
    if not (folder / "final").is_dir():
        return
    steps = len(storage.read_jsonl(folder / "metrics.jsonl"))
    if (folder / "run.json").exists():
        steps = json.loads((folder / "run.json").read_text(encoding="utf-8"))["schedule_steps"]
    if checkpoint is None or cfg.steps <= steps:
        finished = f"{folder}: a run of {steps} steps is finished here, its model is {folder / 'final'}"
        more = "" if checkpoint is None else f", or continue from {checkpoint.name} with more --steps"
        # the rates of the earlier steps were those of a shorter run
        if checkpoint is not None and cfg.lr_schedule != "constant":
            more += " and --resume_changed true"
        raise settings.UserError(f"{finished}; {START_ANEW}, choose another --output_dir{more}")


def identity(cfg, stage):
    """What the result of a run depends on: its settings, the content of its records, the starting weights."""
    compared = {name: value for name, value in asdict(cfg).items() if name not in RESUMABLE_SETTINGS}
    return {
        "stage": stage,
        "settings": compared,
        "schedule_steps": cfg.steps,
        "records": storage.file_hash(cfg.records),
        "weights": storage.fingerprint(cfg.model) or cfg.model,
    }


def check_resumable(accelerator, cfg, path, now):
    """Raise UserError if the checkpoint at `path` was made by a run that differs from this one in what it learns."""
    if step_of(path) > cfg.steps:
        raise settings.UserError(f"steps: {cfg.steps}, but {path} is already after step {step_of(path)}; {START_ANEW}")
    before = json.loads((path / "run.json").read_text(encoding="utf-8"))
    kind_before = kind_of_weights((path / "pytorch_model_fsdp_0").is_dir(), before["settings"]["lora_rank"])
    kind = kind_of_weights(distributed.is_sharded(accelerator), cfg.lora_rank)
    if kind != kind_before:
        way_on = f"start it as before, or export it as a model: python -m tools.export {path} FOLDER"
        raise settings.UserError(f"{path}: {kind_before} cannot be resumed in a run of {kind}: {way_on}")
    differences = "; ".join(changes(before, now, cfg))
    if differences and not cfg.resume_changed:
        way_on = f"{START_ANEW}, choose another --output_dir, or continue anyway with --resume_changed true"
        raise settings.UserError(f"{path} was made by a different run: {differences}; {way_on}")
    if differences:
        accelerator.print(f"continuing from {path} although {differences}")


def kind_of_weights(sharded, lora_rank):
    """What the checkpoints of a run hold, in words."""
    if sharded:
        return "sharded weights"
    return f"an adapter of rank {lora_rank}" if lora_rank else "whole weights"


def changes(before, now, cfg):
    """What differs between the identity of the run `before` and of this one, as a list of texts."""
    if before["stage"] != now["stage"]:
        return [f"its stage was {before['stage']}, is {now['stage']}"]
    found = []
    defaults = {field.name: field.default for field in fields(cfg)}
    for name, value in now["settings"].items():
        # what an older version did not know counts as its default
        value_before = before["settings"].get(name, defaults.get(name))
        if value_before != value:
            found.append(f"{name} was {value_before!r}, is {value!r}")
    steps = before["schedule_steps"]
    if steps != cfg.steps and cfg.lr_schedule != "constant":
        found.append(f"steps was {steps}, is {cfg.steps}, which the {cfg.lr_schedule} schedule depends on")
    if before["records"] != now["records"]:
        found.append(f"the content of {cfg.records} has changed")
    if before["weights"] != now["weights"]:
        found.append(f"the model in {cfg.model} has changed")
    return found


@contextmanager
def room_on_disk(path):
    """Turns a failed write to `path` into a UserError with advice. The previous content stays as it was."""
    try:
        yield
    # torch and safetensors raise their own errors if the disk is full
    except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
        if isinstance(error, CheckpointException):
            # sharded: the first rank that failed
            error, _ = next(iter(error.failures.values()))
        is_of_disk = isinstance(error, OSError | SafetensorError)
        if not is_of_disk and not re.search("writ|unexpected pos|iostream", str(error)):
            raise
        advice = "free disk space and start the same command again"
        saved = finished_checkpoints(Path(path).parent)
        if saved:
            advice += f": it continues from {saved[-1].name}, which is complete"
        raise settings.UserError(f"cannot write {path}: {str(error).splitlines()[0]}; {advice}") from error


def step_of(checkpoint):
    """The number of finished steps in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def finished_checkpoints(output_dir):
    """Finished checkpoints, oldest first."""
    # a half-written one is checkpoint-7.tmp
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def save_checkpoint(accelerator, cfg, step, state):
    """Everything that is needed to continue after `step` finished steps, written whole or not at all. Collective."""
    check_lock(cfg.output_dir)
    folder = Path(cfg.output_dir) / f"checkpoint-{step}"
    temporary = folder.with_name(folder.name + ".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    with room_on_disk(folder):
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.copy(folder.with_name("run.json"), temporary)
            state |= {"step": step, "processes": accelerator.num_processes, "files": contents(temporary)}
            storage.write_atomic(temporary / "state.json", json.dumps(state))
            storage.replace_folder(temporary, folder)
    if accelerator.is_main_process:
        for old in finished_checkpoints(cfg.output_dir)[: -cfg.keep_checkpoints]:
            try:
                shutil.rmtree(old)
            except OSError as error:
                print(f"{old} cannot be deleted: {error}; {folder} is complete")
    accelerator.wait_for_everyone()


def contents(folder):
    """{file in `folder`: hash of its size and of samples of its bytes}, by which a damaged checkpoint is recognised."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != "state.json")
    return {str(path.relative_to(folder)): storage.sampled_hash(path) for path in files}


def damage(checkpoint):
    """A description of what is wrong with a checkpoint's files; None if nothing is."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        step = state["step"]
        expected = dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"state.json cannot be read ({error!r})"
    if step != step_of(checkpoint):
        return f"state.json is of step {step!r}"
    found = contents(checkpoint)
    wrong = [name for name, value in expected.items() if found.get(name) != value]
    return f"{wrong[0]} is missing or not what was written" if wrong else None
