"""Settings, files, schedules and the set-up of accelerate: each mistake of a user, with the one line it gets."""

import json
import os
import pickle
import subprocess
import sys
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

import data
import evaluate
import policy
import sft
import tgrpo
from support import checkpoints, distributed, model_files, settings, storage, training, workers
from support.settings import load_config
from tools import check_data, plan_memory

ROOT = Path(__file__).parent.parent
STAGES = {"sft": sft.SFTConfig, "tgrpo": tgrpo.TGRPOConfig, "evaluate": evaluate.EvalConfig}
# credit.yaml belongs to experiments/
CONFIGS = sorted(path for path in ROOT.glob("configs/*.yaml") if path.stem != "credit")


def load(tmp_path, text, *argv, stage="tgrpo"):
    path = tmp_path / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(STAGES[stage], stage, ["--config", str(path), *argv])


@pytest.mark.parametrize(
    "text, argv, line",
    [
        # unknown names
        ("tgrpo:\n  lrr: 1", [], "some.yaml: tgrpo.lrr: no such setting; did you mean lr?"),
        ("max_frame: 3", [], "some.yaml: max_frame: no such setting; did you mean max_frames?"),
        ("lr: 1e-6", [], "some.yaml: lr: no such setting here; put it into the section 'tgrpo:'"),
        ("", ["--max_frame", "3"], "command line: --max_frame: no such setting; did you mean --max_frames?"),
        ("", ["resume"], "command line: resume: no such setting"),
        # types and ranges
        ("tgrpo:\n  lr: fast", [], "some.yaml: tgrpo.lr: expected a number of at least 0, got 'fast'"),
        ("", ["--lr", "fast"], "command line: --lr: expected a number of at least 0, got 'fast'"),
        ("tgrpo:\n  lr: nan", [], "tgrpo.lr: expected a number of at least 0, got 'nan'"),
        ("tgrpo:\n  lr: " + "9" * 400, [], "tgrpo.lr: expected a number of at least 0, got 999"),
        ("tgrpo:\n  steps: 1.5", [], "tgrpo.steps: expected a whole number of at least 1, got 1.5"),
        ("tgrpo:\n  steps: true", [], "tgrpo.steps: expected a whole number of at least 1, got True"),
        ("tgrpo:\n  steps: 0", [], "tgrpo.steps: expected a whole number of at least 1, got 0"),
        ("tgrpo:\n  num_generations: 1", [], "tgrpo.num_generations: expected a whole number of at least 2, got 1"),
        ("tgrpo:\n  adam_beta1: 1", [], "tgrpo.adam_beta1: expected a number from 0 to 0.999999, got 1"),
        ("bf16: maybe", [], "some.yaml: bf16: expected true or false, got 'maybe'"),
        ("fsdp: shard", [], "some.yaml: fsdp: expected one of none, full_shard, got 'shard'"),
        ("model: [a, b]", [], "some.yaml: model: expected one value, got ['a', 'b']"),
        ("model:", [], "some.yaml: model: expected one value, got None"),
        # what is not a config
        ("", ["--config", "no/such.yaml"], "no/such.yaml: cannot read this config"),
        ("tgrpo: []", [], "some.yaml: tgrpo: expected a section of settings, got []"),
        ("- a\n- b", [], "some.yaml: expected settings 'name: value', got list"),
        ("a: [", [], "some.yaml: not YAML"),
        ("seed: " + "9" * 5000, [], "some.yaml: not YAML"),
        ("seed: 1\nseed: 2", [], "some.yaml: not YAML: duplicate key seed"),
        ("a: &a\n  lr: 1\ntgrpo:\n  <<: *a", [], 'tag:yaml.org,2002:merge\' in "<unicode string>", line 4'),
        # settings that do not fit together
        ("min_pixels: 90000\nmax_pixels: 800", [], "min_pixels 90000 is larger than max_pixels 800"),
        ("tgrpo:\n  length_min: 600", [], "length_min 600 is larger than length_max 512"),
        ('prompt: "{problem} {it}"', [], "prompt: only {problem}, {options} and {hint} may be in braces: 'it'"),
        ('prompt: "{options}"', [], "prompt: {problem} is missing in '{options}'"),
    ],
)
def test_a_mistake_in_the_settings_is_one_clear_line(tmp_path, text, argv, line):
    """Guards: a setting that is ignored, unknown or of the wrong type, or is only found after the model is loaded."""
    with pytest.raises(settings.UserError) as error:
        load(tmp_path, text, *argv)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_later_sources_override_earlier_ones_and_keep_types(tmp_path):
    """Guards: 1e-6, which YAML reads as text; "False" read as true; a section that does not win."""
    cfg = load(tmp_path, "seed: 3\nmax_frames: 4\ntgrpo:\n  lr: 1e-6\n  max_frames: 8\n  resume: false", "--seed", "5")
    assert (cfg.lr, cfg.seed, cfg.max_frames, cfg.resume) == (1e-6, 5, 8, False)
    assert load(tmp_path, "", "--gradient_checkpointing").gradient_checkpointing is True
    assert load(tmp_path, "", "--resume", "False").resume is False


@pytest.mark.parametrize("text", ["[mvbench, mmvu]", "mvbench, mmvu", "mvbench mmvu"])
def test_a_list_may_have_commas_or_spaces(tmp_path, text):
    """Guards: "mvbench,mmvu" read as one name; an unknown name in a list."""
    cfg = load(tmp_path, f"evaluate:\n  root: .\n  benchmarks: {text}", stage="evaluate")
    assert cfg.benchmarks == ["mvbench", "mmvu"]
    cfg = load(tmp_path, "evaluate:\n  root: .", "--benchmarks", *text.strip("[]").split(), stage="evaluate")
    assert cfg.benchmarks == ["mvbench", "mmvu"]
    with pytest.raises(settings.UserError, match="evaluate.orders: expected one of .*, got 'sideways'"):
        load(tmp_path, "evaluate:\n  orders: [ordered, sideways]", stage="evaluate")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
@pytest.mark.parametrize("stage", STAGES)
def test_every_shipped_config_loads(path, stage):
    """Guards: a setting renamed in the code and not in the configs."""
    cfg = load_config(STAGES[stage], stage, ["--config", str(path)])
    assert cfg.model and (cfg.records or cfg.benchmarks)


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_every_field(stage, capsys):
    """Guards: an undocumented setting."""
    with pytest.raises(SystemExit) as exit:
        load_config(STAGES[stage], stage, ["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for f in fields(STAGES[stage]):
        assert f"--{f.name}" in text and len(f.metadata["help"]) > 10
        assert f.metadata["help"].split()[-1] in text


def test_utf8_is_read_and_printed_in_the_c_locale_without_torch(tmp_path):
    """Guards: a UnicodeEncodeError at "p̃", or for a file that is not ASCII, under LC_ALL=C; slow imports of torch."""
    (tmp_path / "ä.yaml").write_text('# Größe\nprompt: "p̃ {problem}"', encoding="utf-8")
    (tmp_path / "ä.jsonl").write_text('{"text": "Zählen"}\n', encoding="utf-8")
    code = """
import sys
sys.modules["torch"] = None
from support import record_files, settings, storage
config, records, written = sys.argv[1:]
print(settings.load_config(settings.SharedConfig, "sft", ["--config", config]).prompt)
storage.write_atomic(written, record_files.read_rows(records)[0]["text"])
"""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, tmp_path / "ä.yaml", tmp_path / "ä.jsonl", tmp_path / "ü.txt"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0 and done.stdout == b"p\\u0303 {problem}\n", done.stderr[-1500:]
    assert (tmp_path / "ü.txt").read_text(encoding="utf-8") == "Zählen"


def test_the_memory_plan_needs_only_the_model(monkeypatch, capsys):
    """Guards: a memory plan that requires records and an output folder, which it does not use."""
    monkeypatch.setattr("sys.argv", ["plan_memory", "--model", "Qwen/Qwen2.5-VL-3B-Instruct"])
    plan_memory.main()
    assert "peak" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["plan_memory"])
    with pytest.raises(settings.UserError, match="tgrpo.model: missing"):
        plan_memory.main()


@pytest.mark.parametrize("place", ["runs/nowhere/final", "configs/nowhere", "./nowhere", "an empty folder"])
def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path, place):
    """Guards: a hub lookup or a traceback if the user forgot the first stage."""
    path = str(tmp_path) if place == "an empty folder" else place
    with pytest.raises(settings.UserError) as error:
        model_files.check_model(tgrpo.TGRPOConfig(model=path), "tgrpo", made_by="sft.py")
    assert f"no checkpoint at {path}; make one with: accelerate launch sft.py --config" in str(error.value)
    # the name of a model on the hub is no path
    model_files.check_model(tgrpo.TGRPOConfig(model="Qwen/Qwen2.5-VL-7B-Instruct"), "tgrpo")


def test_a_saved_config_has_one_dtype():
    """Guards: a config.json that names float32 for bfloat16 weights, so that the model is loaded at twice its size."""
    config = {"torch_dtype": "float32", "hidden_size": 4, "text_config": {"dtype": "float32"}, "vision_config": {}}
    saved = model_files.with_dtype(config, torch.bfloat16)
    assert saved == config | {"torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}


def test_an_incomplete_last_line_is_ignored(tmp_path):
    """Guards: a log that cannot be read after the run was killed while writing."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert [row["step"] for row in storage.read_jsonl(path)] == [0, 1]


def test_write_atomic_leaves_no_temporary_files(tmp_path):
    """Guards: temporary files left beside the result, or an incomplete result."""
    for rows in ([1], [1, 2]):
        storage.write_atomic(tmp_path / "a.json", json.dumps(rows))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == [1, 2]


def test_half_written_checkpoints_are_never_chosen(tmp_path):
    """Guards: resuming from checkpoint-9.tmp, or sorting 10 before 9."""
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.tmp", ".checkpoint-12.old", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints.finished_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize("schedule, last", [("constant", 2.0), ("linear", 0.2), ("cosine", 0.2)])
def test_learning_rate_rises_then_falls_to_its_floor(schedule, last):
    """Guards: an off-by-one schedule that begins at 0 or ends above its minimum."""
    cfg = sft.SFTConfig(lr=2.0, steps=100, warmup_steps=10, lr_schedule=schedule, min_lr_ratio=0.1)
    rates = [training.learning_rate(step, cfg) for step in range(100)]
    assert 0 < rates[0] < rates[5] < rates[9] == 2.0 == max(rates)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert rates[-1] == pytest.approx(last, abs=0.03)


def test_the_data_order_is_a_permutation_each_epoch_and_resumes_anywhere():
    """Guards: samples lost or repeated at the end of an epoch or after a resume."""
    order = [data.record_of_draw(draw, 7, seed=1) for draw in range(21)]
    for epoch in range(3):
        assert sorted(order[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert order[:7] != order[7:14]
    cfg = sft.SFTConfig(batch_size=4, steps=5)
    whole = [draw for rank in (0, 1) for batch in data.rank_batches(cfg, 0, rank, 2) for draw in batch]
    assert sorted(whole) == list(range(20))
    assert list(data.rank_batches(cfg, 3, 1, 2)) == list(data.rank_batches(cfg, 0, 1, 2))[3:]


@pytest.mark.parametrize(
    "batch, micro, ranks, line",
    [
        (8, 1, 3, "batch_size 8 does not divide over 3 processes"),
        (4, 1, 8, "batch_size 4 does not divide over 8 processes"),
        (12, 4, 2, "micro_batch_size 4 does not divide 6 records per process"),
        (8, 4, 2, None),
        (4, 16, 2, None),
    ],
)
def test_a_batch_that_does_not_divide_is_an_error_at_the_start(batch, micro, ranks, line):
    """Guards: silent rounding of the batch, or a rank without prompts that hangs the others."""
    cfg = sft.SFTConfig(batch_size=batch, micro_batch_size=micro)
    if line is None:
        return training.check_batch_size(cfg, ranks)
    with pytest.raises(settings.UserError, match=line):
        training.check_batch_size(cfg, ranks)


def test_workers_get_picklable_objects_and_ignore_signals(monkeypatch):
    """Guards: a lambda or a local class given to a DataLoader, which Python 3.14 pickles for its workers; workers that
    end at the scheduler's signal.
    """
    pickled = []

    def loader(dataset, collate_fn=None, worker_init_fn=None, **settings):
        assert worker_init_fn is workers.start_worker
        pickled.append(pickle.loads(pickle.dumps((dataset, collate_fn))))
        return []

    monkeypatch.setattr(workers, "DataLoader", loader)
    cfg = tgrpo.TGRPOConfig(num_workers=1)
    samples = data.Samples([{"path": "a.mp4"}], None, cfg)
    assert list(workers.loader(samples, [[0]], cfg)) == [] and check_data.check_media({1: {"path": "a.mp4"}}, cfg) == {}
    assert len(pickled) == 2 and pickled[0][0].records == samples.records


@pytest.mark.parametrize("library", ["DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_an_accelerate_config_for_another_library_is_one_clear_line(monkeypatch, library):
    """Guards: weights that DeepSpeed has partitioned, in a loop for FSDP2 only; a traceback from accelerate."""
    monkeypatch.setenv(f"ACCELERATE_USE_{library}", "true")
    with pytest.raises(settings.UserError, match="the accelerate config requests .*, which is not supported"):
        distributed.make_accelerator(tgrpo.TGRPOConfig())


def test_an_accelerate_config_does_not_change_training(monkeypatch):
    """Guards: mixed_precision, accumulation steps or a torch.compile backend that overrides the stage's config."""
    AcceleratorState._reset_state(reset_partial_state=True)
    for variable, value in {
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_DYNAMO_BACKEND": "inductor",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "1",
        "FSDP_OFFLOAD_PARAMS": "true",
    }.items():
        monkeypatch.setenv(variable, value)
    accelerator = distributed.make_accelerator(tgrpo.TGRPOConfig())
    assert accelerator.gradient_accumulation_steps == 1 and accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend.value == "NO" and not distributed.is_sharded(accelerator)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_collective_timeout_is_hours(monkeypatch):
    """Guards: the default of 10 minutes, which is shorter than loading, saving, or an uneven evaluation."""
    given = {}

    def accelerator(**arguments):
        given.update(arguments)
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(distributed, "Accelerator", accelerator)
    distributed.make_accelerator(tgrpo.TGRPOConfig())
    (handler,) = given["kwargs_handlers"]
    assert handler.timeout >= timedelta(hours=2)


@pytest.mark.parametrize("stage, device", [("sft", None), ("tgrpo", None), ("evaluate", "cpu")])
def test_only_evaluation_loads_weights_directly_onto_the_device(run, monkeypatch, stage, device):
    """Guards: an evaluation on the CPU of a machine with a GPU; training weights placed on a device before they are
    sharded.
    """

    class Asked(Exception):
        """Nothing is loaded."""

    def load_policy(cfg, dtype=torch.float32, accelerator=None, device=None):
        raise Asked(device and device.type)

    monkeypatch.setattr(policy, "load_policy", load_policy)
    with pytest.raises(Asked) as asked:
        run(stage)
    assert asked.value.args == (device,)
