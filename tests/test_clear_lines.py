"""What a user lacks (a logger, a package, the network) is told in one line, before any model is loaded."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from test_benchmarks import VIDEOMME, write, write_parquet

import benchmarks
import data
import sft
from support import distributed, model_files
from support.settings import SharedConfig, UserError


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_logger_is_an_error_when_a_run_starts(monkeypatch, package):
    """Guards: a traceback from accelerate after minutes of loading; metrics that are not logged."""
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"log_with: {package} is not installed: pip install {package}"):
        distributed.make_accelerator(sft.SFTConfig(log_with=package))


def test_a_logger_gets_every_metric(run, monkeypatch):
    """Guards: a `log_with` that has no effect, or a tracker that starts without it."""
    events = []

    class Tracker(distributed.Accelerator):
        def __init__(self, log_with=None, project_dir=None, **kwargs):
            super().__init__(**kwargs)
            events.append((log_with, project_dir))

        def init_trackers(self, name, **kwargs):
            events.append((name, kwargs["config"]["steps"]))

        def log(self, metrics, step):
            events.append((step, "loss" in metrics))

    monkeypatch.setattr(distributed, "find_spec", lambda name: name)
    monkeypatch.setattr(distributed, "Accelerator", Tracker)
    folder = run("sft", "with", log_with="wandb", steps=1)
    assert events == [("wandb", str(folder)), ("video-r1", 1), (0, True)]
    run("sft", "without", steps=1)
    assert events[3:] == [(None, None)]


def test_a_missing_decord_names_its_package(monkeypatch):
    """Guards: "No module named decord": the package of that name has no wheels for current Python versions."""
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(UserError, match="its package is decord2: pip install decord2"):
        sft.SFTConfig(video_reader="decord")
    # it works without decord
    assert sft.SFTConfig().video_reader == "exact"


@pytest.mark.parametrize(
    "error, line",
    [
        (HTTPError("Name or service not known"), "HF_HUB_OFFLINE=1: .* the hub says: Name or service not known"),
        (TimeoutError("timed out"), "the hub says: timed out"),
        (RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None)), "the hub says: 404"),
    ],
)
def test_an_unreachable_hub_is_reported_at_once(monkeypatch, tmp_path, error, line):
    """Guards: minutes of retries per file, and an error that links transformers' pages."""
    asked = []

    def model_info(self, model, timeout):
        asked.append((model, timeout))
        raise error

    monkeypatch.setattr(HfApi, "model_info", model_info)
    with pytest.raises(UserError, match=line) as raised:
        model_files.load_processor(sft.SFTConfig(model="Qwen/Qwen2.5-VL-3B-Instruct"))
    assert "\n" not in str(raised.value) and asked == [("Qwen/Qwen2.5-VL-3B-Instruct", 10)]
    # a folder is not looked up
    model_files.check_hub(str(tmp_path))
    assert len(asked) == 1


def test_video_mme_is_read_from_json_without_pyarrow(tmp_path, monkeypatch):
    """Guards: a missing pyarrow that is required although test.jsonl exists."""
    for folder in ("a", "b"):
        write_parquet(tmp_path / folder / "videomme/test-00000-of-00001.parquet", VIDEOMME)
    write(tmp_path / "b/videomme/test.jsonl", VIDEOMME)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert len(benchmarks.load_benchmark("videomme", tmp_path / "b")) == len(VIDEOMME)
    with pytest.raises(UserError, match="reading parquet needs pyarrow: pip install pyarrow"):
        benchmarks.load_benchmark("videomme", tmp_path / "a")


def test_the_shuffle_of_a_question_does_not_depend_on_other_questions(monkeypatch):
    """Guards: a p̃ that changes if another benchmark is evaluated first, or a question is left out."""
    metadata = data.VideoMetadata(total_num_frames=16, frames_indices=list(range(16)))
    monkeypatch.setattr(data, "load_media", lambda record, cfg: (np.zeros(16), metadata))
    monkeypatch.setattr(data, "encode", lambda *_: {})
    records = [{"benchmark": "mine", "id": number} for number in range(6)]

    def shuffles(records, seed=0):
        samples = data.Samples(records, None, SharedConfig(seed=seed), ("shuffled",), in_file_order=True)
        return {(r["benchmark"], r["id"]): samples[i].frame_order for i, r in enumerate(records)}

    alone = shuffles(records)
    assert len({str(order) for order in alone.values()}) == len(records)
    beside = shuffles([{"benchmark": "other", "id": 0}, *records[::-1]])
    assert beside["other", 0] != alone["mine", 0]
    assert beside == alone | {("other", 0): beside["other", 0]}
    assert shuffles(records, seed=1) != alone
