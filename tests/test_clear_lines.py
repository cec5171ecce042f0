"""One clear line, before any model is loaded, for what a new user gets wrong; and text that any locale can print."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError
from test_benchmarks import VIDEOMME, write, write_parquet

import benchmarks
import data
import policy
import sft
import tgrpo
from support import distributed, model_files
from support.settings import UserError, load_config

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "text, line",
    [
        ("tgrpo:\n  length_min: 600", "length_min 600 is larger than length_max 512"),
        ("tgrpo:\n  num_generations: 1", "tgrpo.num_generations: expected at least 2, got 1"),
        ("a: &a\n  lr: 1\ntgrpo:\n  <<: *a", "some.yaml: not YAML: line 4: merge keys (<<) are not read"),
        (
            "tgrpo:\n  log_with: mlflow",
            "some.yaml: tgrpo.log_with: expected one of none, tensorboard, wandb, got 'mlflow'",
        ),
    ],
)
def test_a_mistake_in_the_settings_is_one_clear_line(tmp_path, text, line):
    """Guards: a length reward that no completion can earn; advantages of 0 for a whole run; a traceback for <<."""
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        load_config(tgrpo.TGRPOConfig, "tgrpo", ["--config", str(tmp_path / "some.yaml")])
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_logger_is_an_error_before_the_model_loads(run, monkeypatch, tmp_path, package):
    """Guards: a traceback from accelerate after minutes of loading; metrics that are not logged."""
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    monkeypatch.setattr(policy, "load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=f"log_with: {package} is not installed: pip install {package}"):
        run("sft", log_with=package)


def test_a_logger_gets_every_metric(run, monkeypatch):
    """Guards: a `log_with` that has no effect, or a tracker that starts without it."""
    started = []
    logged = []

    class Tracker(distributed.Accelerator):
        def __init__(self, log_with=None, project_dir=None, **kwargs):
            super().__init__(**kwargs)
            started.append((log_with, project_dir))

        def init_trackers(self, name, **kwargs):
            started.append((name, kwargs.get("config", {}).get("steps")))

        def log(self, metrics, step):
            logged.append((step, "loss" in metrics))

    monkeypatch.setattr(distributed, "find_spec", lambda name: name)
    monkeypatch.setattr(distributed, "Accelerator", Tracker)
    folder = run("sft", "with", log_with="wandb")
    assert started == [("wandb", str(folder)), ("video-r1", 2)] and logged == [(0, True), (1, True)]
    run("sft", "without")
    assert started[2:] == [(None, None)] and len(logged) == 2


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
        (
            HTTPError("Name or service not known"),
            "the hub cannot be reached: Name or service not known; with HF_HUB_OFFLINE=1",
        ),
        (TimeoutError("timed out"), "the hub cannot be reached: timed out"),
        (
            RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None)),
            "is neither a local folder nor a model on the hub",
        ),
    ],
)
def test_an_unreachable_hub_is_reported_at_once(monkeypatch, world, error, line):
    """Guards: minutes of retries per file, and an error that links transformers' pages."""
    asked = []

    def model_info(self, model, timeout):
        asked.append((model, timeout))
        raise error

    monkeypatch.setattr(HfApi, "model_info", model_info)
    with pytest.raises(UserError, match=line.replace("(", r"\(")) as raised:
        model_files.load_processor(sft.SFTConfig(model="Qwen/Qwen2.5-VL-3B-Instruct"))
    assert "\n" not in str(raised.value) and asked == [("Qwen/Qwen2.5-VL-3B-Instruct", 10)]
    model_files.load_processor(sft.SFTConfig(model=str(world / "base")))
    # a folder is not looked up
    assert len(asked) == 1


def test_a_c_locale_can_read_and_print_utf8(tmp_path):
    """Guards: a UnicodeEncodeError at "±", or for a config that is not ASCII, under LC_ALL=C."""
    row = {
        "benchmark": "mine",
        "id": "1",
        "task": "Zählen",
        "problem": "p̃?",
        "problem_type": "numerical",
        "solution": "<answer>3</answer>",
    }
    rows = [row | {"frames": frames, "prediction": "<answer>3</answer>"} for frames in ("ordered", "shuffled")]
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (tmp_path / "predictions.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "ä.yaml").write_text("# Größe\nseed: 1", encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [
        sys.executable,
        "evaluate.py",
        "--score",
        tmp_path / "predictions.jsonl",
        "--config",
        tmp_path / "ä.yaml",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr[-1500:]
    said = done.stdout.decode("utf-8")
    assert "Zählen" in said and "±" in said
    # over a single clip there is no interval
    assert "100.0 (+0.0)" in said


# ----------------------------------------------------------------------------------------------------- benchmarks


def test_video_mme_is_read_from_json_without_pyarrow(tmp_path, monkeypatch):
    """Guards: a missing pyarrow that is required although test.jsonl exists."""
    write_parquet(tmp_path / "a/videomme/test-00000-of-00001.parquet", VIDEOMME)
    write_parquet(tmp_path / "b/videomme/test-00000-of-00001.parquet", VIDEOMME)
    write(tmp_path / "b/videomme/test.jsonl", VIDEOMME)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert len(benchmarks.load_benchmark("videomme", tmp_path / "b")) == len(VIDEOMME)
    with pytest.raises(UserError, match="reading parquet needs pyarrow: pip install pyarrow"):
        benchmarks.load_benchmark("videomme", tmp_path / "a")


def test_the_shuffle_of_a_question_does_not_depend_on_other_questions(world):
    """Guards: a p̃ that changes if another benchmark is evaluated first, or a question is left out."""
    cfg = sft.SFTConfig(
        model=str(world / "base"), data_root=str(world / "world"), max_frames=8, min_pixels=784, max_pixels=3136
    )
    processor = model_files.load_processor(cfg)
    records = [r for r in json.loads((world / "world/test.json").read_text()) if r["data_type"] == "video"]
    records = [r | {"benchmark": "mine", "id": r["problem_id"]} for r in records]

    def orders(records, **settings):
        samples = data.Samples(
            records, processor, sft.SFTConfig(**(vars(cfg) | settings)), ("shuffled",), shuffle=False
        )
        return {(r["benchmark"], r["id"]): samples[i].frame_order for i, r in enumerate(records)}

    alone = orders(records)
    assert len({str(order) for order in alone.values()}) == len(records)
    beside = orders([records[0] | {"benchmark": "other"}] + records[::-1])
    assert {key: beside[key] for key in alone} == alone and beside["other", records[0]["id"]] != alone[
        "mine", records[0]["id"]
    ]
    assert orders(records, seed=1) != alone
