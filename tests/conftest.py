"""A small toy world and its model, made once for all tests, and a way to run a stage in this process."""

import json
import os
import sys
from pathlib import Path

# Two workers share the cores; more threads would only wait for each other, and would round differently from run to run.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from accelerate.state import AcceleratorState

import evaluate
import sft
import tgrpo
import toy
from support import tiny_model

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))
from hub_checkpoint import LAYOUTS, write_hub_checkpoint
from processes import Forker, as_arguments

# programs, not tests
collect_ignore = ["two_ranks.py", "hub_checkpoint.py", "processes.py"]
# what takes longest: if one of these files started last, the other worker would have nothing left to do
LONGEST = ["test_sharded", "test_runs", "test_toy", "test_survive", "test_evaluate"]
STAGES = {"sft": sft, "tgrpo": tgrpo, "evaluate": evaluate}


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder with world/ (12 + 12 training questions, 12 test questions) and base/, a checkpoint."""
    folder = tmp_path_factory.mktemp("toy")
    toy.make_world(folder / "world", seed=0, n_sft=12, n_rl=12, n_temporal=8, n_other=4)
    tiny_model.make_model(folder / "base", json.loads((folder / "world/sft.json").read_text()))
    return folder


@pytest.fixture(scope="session")
def hub(world):
    """Folder with checkpoints in the hub's layout: of Qwen2.5-VL in untied/ and tied/ (the head is the embedding), of
    Qwen3-VL in qwen3_untied/ and qwen3_tied/.
    """
    records = json.loads((world / "world/sft.json").read_text())
    corpus = [" ".join([r["problem"], *r["options"], r["process"], r["solution"]]) for r in records]
    for name, settings in LAYOUTS.items():
        write_hub_checkpoint(world / "hub" / name, corpus, **settings)
    return world / "hub"


@pytest.fixture(scope="session")
def run_into(world):
    """run_into(folder, "sft", steps=2) runs the stage's real main() with configs/toy.yaml on the small world; returns
    `folder`.
    """

    def run_stage(folder, stage, **settings):
        records = {"sft": "sft", "tgrpo": "rl", "evaluate": "test"}[stage]
        defaults = {
            "model": world / "base",
            "records": world / f"world/{records}.json",
            "data_root": world / "world",
            "output_dir": folder,
            "num_workers": 0,
        }
        if stage != "evaluate":
            defaults |= {"steps": 2, "batch_size": 4, "micro_batch_size": 4, "save_every": 0}
        if stage != "sft":
            defaults["max_new_tokens"] = 8
        arguments = ["--config", "configs/toy.yaml", *as_arguments(defaults | settings)]
        # outside of the tests, each stage is a process of its own
        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{stage}.py", *arguments])
            STAGES[stage].main()
        return folder

    return run_stage


@pytest.fixture
def run(run_into, tmp_path):
    """run("sft", steps=2) is run_into() a folder of this test, which it returns."""

    def run_stage(stage, output="out", **settings):
        return run_into(tmp_path / output, stage, **settings)

    return run_stage


@pytest.fixture(scope="session")
def forker():
    """Starts scripts in processes of their own, without their imports."""
    forker = Forker()
    yield forker
    forker.close()
