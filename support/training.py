"""A training run: its folder, steps, log, checkpoints, and how it stops. Both training scripts use one Run."""

import errno
import json
import math
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from accelerate.utils import gather_object
from tqdm import tqdm

from support import checkpoints, distributed, model_card, model_files, record_files, settings, storage, workers

# of so many draws the unreadable ones are counted, and so many at the start must not all be unreadable
RECENT_DRAWS = 500
FIRST_DRAWS = 8


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


def set_learning_rate(optimizer, step, cfg):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg)


class Run:
    """A training run in `cfg.output_dir`: its folder, batches, metrics, checkpoints, and how it stops. Collective.

    Create it before anything slow happens: it claims the folder, and raises UserError if the run cannot start there.
    After prepare(), call resume(): only then are files of an earlier run moved or changed. `bad_rows` {name: reason}
    are the rows that load_records left out.
    """

    def __init__(self, accelerator, cfg, stage, records, bad_rows):
        self.accelerator = accelerator
        self.cfg = cfg
        self.stage = stage
        self.folder = Path(cfg.output_dir)
        self.n_rows = len(records) + len(bad_rows)
        # {name: reason} of every row that was skipped, and {name: last step} of those whose media could not be read
        self.skipped = dict(bad_rows)
        self.unreadable = {}
        self.n_readable = 0
        self.bad_steps = set()
        check_batch_size(cfg, accelerator.num_processes)
        record_files.check_data_root(records, cfg.data_root)
        self.checkpoint, self.identity = checkpoints.claim_folder(accelerator, cfg, stage)
        for name, reason in bad_rows.items():
            accelerator.print(f"skipped {name}: {reason}")

    def resume(self):
        """Load the newest checkpoint, if there is one, into what accelerator.prepare() was given."""
        ranks = self.accelerator.num_processes
        state = {"step": 0, "skipped": {}, "processes": ranks}
        if self.checkpoint is not None:
            # with resume_changed the weights may be another model's
            with model_files.usable(f"{self.checkpoint}: cannot be loaded"):
                self.accelerator.load_state(str(self.checkpoint))
            self.accelerator.print(f"resumed from {self.checkpoint}")
            state |= json.loads((Path(self.checkpoint) / "state.json").read_text(encoding="utf-8"))
        if state["processes"] != ranks:
            self.accelerator.print(
                f"processes: {state['processes']} before, {ranks} now: random numbers differ from here"
            )
        self.first_step = state["step"]
        self.skipped |= state["skipped"]
        self.stop = StopSignal()
        self.start_log()

    def start_log(self):
        """Start a tracker if `log_with` names one, take the folder, and drop the logged rows that will be repeated."""
        if self.cfg.log_with == "tensorboard":
            # the name of a folder in output_dir
            self.accelerator.init_trackers("tensorboard")
        if self.cfg.log_with == "wandb":
            name = {"wandb": {"name": self.cfg.output_dir}}
            self.accelerator.init_trackers("video-r1", config=asdict(self.cfg), init_kwargs=name)
        # all ranks have loaded
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            checkpoints.take_folder(self.accelerator, self.cfg, self.checkpoint, self.identity)
            for path in (self.folder / "metrics.jsonl", self.folder / "rollouts.jsonl"):
                rows = [row for row in storage.read_jsonl(path) if row.get("step", math.inf) < self.first_step]
                if path.exists():
                    storage.write_atomic(path, "".join(map(storage.json_line, rows)))
            config = {self.stage: asdict(self.cfg)}
            storage.write_atomic(self.folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def steps(self, batches):
        """Yields (step, readable samples) for this rank's `batches` (lists of Samples), with a progress bar."""
        hidden = not self.accelerator.is_main_process
        self.bar = tqdm(batches, initial=self.first_step, total=self.cfg.steps, desc=self.stage, disable=hidden)
        self.seconds = {}
        self.last_lap = time.perf_counter()
        for step, batch in enumerate(workers.until_killed(self.bar), self.first_step):
            self.lap("data_wait")
            yield step, self.drop_unreadable(step, batch)

    def drop_unreadable(self, step, batch):
        """The readable samples of a step's `batch`. All ranks count the others; too many of them end the run."""
        drawn = [(sample.record["problem_id"], sample.record["path"], sample.error) for sample in batch]
        for problem_id, path, error in gather_object(drawn):
            name = f"{problem_id} ({path})"
            if error is None:
                self.n_readable += 1
                continue
            if isinstance(error, settings.UserError):
                self.end(step, error)
            if name not in self.skipped:
                self.skipped[name] = error + missing_folder(record_files.media_path(path, self.cfg.data_root))
                self.accelerator.print(f"skipped {name}: {self.skipped[name]}")
            # moved to the end: the last one drawn
            self.unreadable.pop(name, None)
            self.unreadable[name] = step
        self.check_unreadable(step)
        return [sample for sample in batch if not sample.error]

    def check_unreadable(self, step):
        """Raise UserError if none of the first draws, or too few of the last ones, could be read."""
        size = self.cfg.batch_size
        n_steps = 1 + RECENT_DRAWS // size
        recent = [name for name, last_step in self.unreadable.items() if last_step > step - n_steps]
        # the last draws are all rows of a small set; of a large one they are a sample, and its share varies
        allowed = self.cfg.max_unreadable * min(self.n_rows, 2 * n_steps * size)
        n_drawn = (step + 1 - self.first_step) * size
        nothing = not self.n_readable and n_drawn >= min(FIRST_DRAWS, self.cfg.steps * size)
        if nothing or len(recent) > allowed:
            n_recent = min(n_drawn, n_steps * size)
            unusable = f"{len(recent)} of the last {n_recent} records drawn are unusable"
            advice = f"max_unreadable is {self.cfg.max_unreadable}; tools.check_data lists them"
            self.end(step, settings.UserError(f"{unusable}, {advice}; the last: {self.skipped[recent[-1]]}"))

    def end(self, step, error):
        """Save the finished steps, and raise the error. Collective."""
        if step > self.first_step:
            self.save_checkpoint(step)
        raise error

    def micro_batches(self, items, dummy):
        """Yields (micro-batch, weight): this rank's items of a step, `micro_batch_size` at a time.

        Every rank must run the same number of forward passes, because they gather sharded weights together. A rank with
        too few readable records runs `dummy` with weight 0.
        """
        size = self.cfg.micro_batch_size
        for first in range(0, self.cfg.batch_size // self.accelerator.num_processes, size):
            if items[first : first + size]:
                yield items[first : first + size], 1.0
            elif self.accelerator.num_processes > 1:
                yield [dummy], 0.0

    def clip_gradient(self, model):
        """Clip the gradient to `max_grad_norm`. Returns its norm over all ranks, before clipping."""
        limit = self.cfg.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(model.parameters(), limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def is_finite(self, grad_norm, step):
        """Whether to take this update; all ranks have the same norm. RuntimeError after three bad steps in a row."""
        if math.isfinite(grad_norm):
            return True
        self.accelerator.print(f"step {step}: the gradient norm is {grad_norm}; this update is skipped")
        self.bad_steps.add(step)
        if self.bad_steps >= {step - 2, step - 1, step}:
            raise RuntimeError(f"three steps in a row, to {step}, had no finite gradient; lower lr, or check the data")
        return False

    def lap(self, name):
        """The seconds since the last lap; logged as time/<name>."""
        now = time.perf_counter()
        seconds = now - self.last_lap
        self.last_lap = now
        self.seconds[f"time/{name}"] = self.seconds.get(f"time/{name}", 0.0) + seconds
        return seconds

    def log(self, step, metrics, show):
        """Write a step's metrics, learning rate, seconds and peak memory. `show`: the metric in the progress bar."""
        self.bar.set_postfix({show.split("/")[-1]: metrics.get(show)})
        metrics = metrics | {"lr": learning_rate(step, self.cfg), "data/skipped": len(self.skipped), **self.seconds}
        self.seconds = {}
        if self.accelerator.device.type == "cuda":
            metrics["memory/peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        rounded = {name: float(f"{value:.6g}") for name, value in metrics.items()}
        self.append("metrics.jsonl", step, [rounded])
        if self.cfg.log_with != "none":
            self.accelerator.log(metrics, step=step)

    def append(self, name, step, rows):
        """Append these rows of the main process to the file `name`."""
        if self.accelerator.is_main_process:
            checkpoints.check_lock(self.folder)
            storage.append_rows(self.folder / name, [{"step": step, **row} for row in rows])

    def checkpoint_or_stop(self, step):
        """Save a checkpoint if one is due. True if the run was asked to stop: it is saved, and the caller returns."""
        finished = step + 1
        # decided together, or one rank would leave while the others wait for it
        stop = distributed.sum_over_ranks(self.accelerator, float(self.stop.asked)) > 0
        due = self.cfg.save_every and finished % self.cfg.save_every == 0 and finished < self.cfg.steps
        if stop or due:
            self.save_checkpoint(finished)
        if stop:
            stopped = f"stopped after {finished} of {self.cfg.steps} steps; the same command continues from"
            self.accelerator.print(f"{stopped} {self.cfg.output_dir}/checkpoint-{finished}")
        return stop

    def save_checkpoint(self, finished):
        """Save a checkpoint after this many finished steps. Collective."""
        checkpoints.save_checkpoint(self.accelerator, self.cfg, finished, {"skipped": self.skipped})

    def finish(self, model, starting_files, name):
        """Save the trained model as output_dir/final, and print where it is and which records were skipped."""
        final = f"{self.cfg.output_dir}/final"
        files = starting_files
        if self.accelerator.is_main_process:
            # the hash from the start: the file may have changed since
            records_hash = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))["records"]
            steps = storage.read_jsonl(self.folder / "metrics.jsonl")
            card = model_card.model_card(self.cfg, self.stage, steps, records_hash)
            files = {**starting_files, "README.md": card}
        model_files.save_model(self.accelerator, model, files, final, distributed.compute_dtype(self.cfg))
        if self.bad_steps & {self.cfg.steps - 2, self.cfg.steps - 1}:
            self.accelerator.print("warning: the last steps had no finite gradient; this model may be useless")
        if self.skipped:
            self.accelerator.print(f"{len(self.skipped)} unusable records were skipped: {', '.join(self.skipped)}")
        self.accelerator.print(f"{name}: {final}")
        self.accelerator.end_training()


def check_batch_size(cfg, ranks):
    """Raise UserError, at start-up, for a batch that the ranks cannot share evenly."""
    share = cfg.batch_size // ranks
    if cfg.batch_size % ranks:
        raise settings.UserError(f"batch_size {cfg.batch_size} does not divide over {ranks} processes")
    if share % min(cfg.micro_batch_size, share):
        raise settings.UserError(f"micro_batch_size {cfg.micro_batch_size} does not divide {share} records per process")


def missing_folder(path):
    """The highest folder above `path` that does not exist, as the end of a message; "" if all of them exist."""
    absent = [folder for folder in Path(path).parents if not folder.exists()]
    return f"; there is no folder {absent[-1]}" if absent else ""


class Output:
    """A stream whose output is dropped once nobody can read it: a closed terminal or pipe must not end a run."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            return self.stream.write(text)
        except OSError as error:
            self.drop(error)

    def flush(self):
        try:
            self.stream.flush()
        except OSError as error:
            self.drop(error)

    def drop(self, error):
        """From now on the stream leads nowhere, unless the error may pass, as on a full disk."""
        if error.errno in (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class StopSignal:
    """`asked` is True once SIGTERM, Ctrl-C or the end of its launcher has asked this run to save and exit."""

    def __init__(self):
        self.received = False
        for name in ("stdout", "stderr"):
            if not isinstance(getattr(sys, name), Output):
                setattr(sys, name, Output(getattr(sys, name)))
        # HUP: the terminal is gone; USR1: what Slurm's --signal usually sends
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            # nohup ignores HUP
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        # print() is not allowed here: the signal may have interrupted one
        with suppress(OSError):
            os.write(2, b"\nstopping after this step; Ctrl-C stops at once, without saving\n")

    @property
    def asked(self):
        return self.received or distributed.launcher_has_ended()
