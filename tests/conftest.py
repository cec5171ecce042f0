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

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))
from hub_checkpoint import write_hub_checkpoint

# programs, not tests
collect_ignore = ["two_ranks.py", "hub_checkpoint.py"]
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
    toy.make_model(folder / "base", json.loads((folder / "world/sft.json").read_text()))
    return folder


@pytest.fixture(scope="session")
def hub(world):
    """Folder with untied/ and tied/, checkpoints in the hub's layout: as of 7B, and as of 3B, whose head is its
    embedding.
    """
    records = json.loads((world / "world/sft.json").read_text())
    corpus = [" ".join([r["problem"], *r["options"], r["process"], r["solution"]]) for r in records]
    for name in ("untied", "tied"):
        write_hub_checkpoint(world / "hub" / name, corpus, tied=name == "tied")
    return world / "hub"


@pytest.fixture
def run(world, tmp_path, monkeypatch):
    """run("sft", steps=2) runs the stage's real main() with configs/toy.yaml on the small world; returns its output
    folder.
    """

    def run_stage(stage, output="out", **settings):
        records = {"sft": "sft", "tgrpo": "rl", "evaluate": "test"}[stage]
        training = {} if stage == "evaluate" else {"steps": 2, "batch_size": 4, "micro_batch_size": 4, "save_every": 0}
        settings = {
            "model": world / "base",
            "records": world / f"world/{records}.json",
            "data_root": world / "world",
            "output_dir": tmp_path / output,
            "num_workers": 0,
            **training,
            **settings,
        }
        arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", [f"{stage}.py", "--config", "configs/toy.yaml", *arguments])
        # outside of the tests, each stage is a process of its own
        AcceleratorState._reset_state(reset_partial_state=True)
        STAGES[stage].main()
        return tmp_path / output

    return run_stage
