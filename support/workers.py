"""Worker processes that decode and prepare samples ahead of the training step, and never outlive it."""

import atexit
import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from support import settings


def loader(samples, batches, cfg):
    """Yields the samples of each batch (a list of draws), prepared ahead by worker processes.

    Workers return numpy arrays: passing many small tensors through shared memory is slower than copying them.
    """
    prefetch = 4 if cfg.num_workers else None
    for batch in with_workers(samples, cfg, batch_sampler=batches, prefetch_factor=prefetch, collate_fn=as_numpy):
        yield [convert_arrays(sample, np.ndarray, torch.from_numpy) for sample in batch]


def as_numpy(batch):
    """The samples with numpy arrays for tensors. Not a lambda: Python 3.14 pickles what it hands to workers."""
    return [convert_arrays(sample, torch.Tensor, torch.Tensor.numpy) for sample in batch]


def convert_arrays(sample, kind, function):
    """A copy of a Sample with `function` applied to every array of type `kind` in it."""
    return type(sample)(**tree_map_only(kind, function, vars(sample)))


def with_workers(dataset, cfg, **arguments):
    """Yields the results of worker processes that ignore signals, and end when this process ends for any reason.

    Raises UserError if one of them was killed: where its result is awaited, not in the middle of an update.
    """
    # nothing else would end them if this process fails
    atexit.register(kill_workers)
    results = iter(DataLoader(dataset, num_workers=cfg.num_workers, worker_init_fn=start_worker, **arguments))
    # torch's, which raises if a worker was killed
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        for result in results:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            yield result
            signal.signal(signal.SIGCHLD, handler)
            if callable(handler):
                handler(signal.SIGCHLD, None)
    except RuntimeError as error:
        reason = str(error).strip(" .\n")
        if not reason.startswith("DataLoader worker (pid"):
            raise
        advice = "most often for lack of memory: lower num_workers, and start the same command again"
        raise settings.UserError(f"{reason}, {advice}") from None


def until_killed(batches):
    """Yields the batches; in place of a UserError one last batch with it, so that the ranks of a run end together."""
    try:
        yield from batches
    except settings.UserError as error:
        yield [SimpleNamespace(record={"problem_id": "", "path": ""}, error=error)]


def start_worker(_):
    """Leaves signals to the main process. A scheduler signals all processes, but the current step needs its clips."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # blocked on a full pipe, an orphan would run forever
    leave_with_parent()


def leave_with_parent():
    """From now on this process ends, whatever it does, once its parent is gone."""
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()


def leave_with(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def kill_workers():
    # torch's handler would end this process with an error of its own, after the error that matters
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()
