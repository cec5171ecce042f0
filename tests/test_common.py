"""Settings, atomic writes, checkpoints: the mistakes a user makes, each with the one line it gets."""

import json
import pickle
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
from support import checkpoints, distributed, model_files, settings, training, workers
from support.settings import load_config
from support.storage import read_jsonl, write_atomic
from tools import plan_memory

STAGES = {"sft": sft.SFTConfig, "tgrpo": tgrpo.TGRPOConfig, "evaluate": evaluate.EvalConfig}
CONFIGS = sorted(Path(__file__).parent.parent.glob("configs/*.yaml"))


def load(tmp_path, text, *argv, cls=tgrpo.TGRPOConfig, stage="tgrpo"):
    path = tmp_path / "some.yaml"
    path.write_text(text)
    return load_config(cls, stage, ["--config", str(path), *argv])


@pytest.mark.parametrize(
    "text, argv, line",
    [
        ("tgrpo:\n  lr: fast", [], "some.yaml: tgrpo.lr: expected a number, got 'fast'"),
        ("tgrpo:\n  lrr: 1", [], "some.yaml: tgrpo.lrr: no such setting; did you mean lr?"),
        ("max_frame: 3", [], "some.yaml: max_frame: no such setting; did you mean max_frames?"),
        ("lr: 1e-6", [], "some.yaml: lr: no such setting here; put it into the section 'tgrpo:'"),
        ("tgrpo:\n  steps: 1.5", [], "tgrpo.steps: expected a whole number, got '1.5'"),
        ("tgrpo:\n  steps: true", [], "tgrpo.steps: expected a whole number, got 'True'"),
        ("tgrpo:\n  steps: 0", [], "tgrpo.steps: expected at least 1, got 0"),
        ("tgrpo:\n  lr: nan", [], "tgrpo.lr: expected a number, got 'nan'"),
        (
            "tgrpo:\n  temporal_rule: magic",
            [],
            "tgrpo.temporal_rule: expected one of margin, paper, released, none, credit, got 'magic'",
        ),
        ("bf16: maybe", [], "bf16: expected true or false, got 'maybe'"),
        ("tgrpo: 3", [], "some.yaml: tgrpo: expected a section of settings, got 3"),
        ("- a\n- b", [], "some.yaml: expected settings 'name: value', got list"),
        ("a: [", [], "some.yaml: not YAML"),
        ("tgrpo: []", [], "some.yaml: tgrpo: expected a section of settings, got []"),
        ("tgrpo:\n  lr: 1\ntgrpo:\n  steps: 2", [], "some.yaml: not YAML: duplicate key tgrpo"),
        ("seed: 1\nseed: 2", [], "some.yaml: not YAML: duplicate key seed"),
        ("seed: " + "9" * 5000, [], "some.yaml: not YAML"),
        ("tgrpo:\n  lr: " + "9" * 400, [], "some.yaml: tgrpo.lr: expected a number, got '999"),
        ("tgrpo:\n  adam_beta1: 1", [], "tgrpo.adam_beta1: expected at most 0.999999, got 1"),
        (
            'prompt: "{problem} {answer}"',
            [],
            "prompt: only {problem}, {options} and {hint} may be in braces: 'answer'",
        ),
        ('prompt: "{problem} {"', [], "prompt: only {problem}"),
        ('prompt: "{options}"', [], "prompt: {problem} is missing in '{options}'"),
        ("", ["--lr", "fast"], "command line: --lr: expected a number, got 'fast'"),
        ("min_pixels: 90000\nmax_pixels: 800", [], "min_pixels 90000 is larger than max_pixels 800"),
    ],
)
def test_a_mistake_in_the_settings_is_one_clear_line(tmp_path, text, argv, line):
    """Guards: an unknown or badly typed setting that is ignored, or only found after the model is loaded."""
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
    """Guards: "mvbench,mmvu" read as one name."""
    evaluation = {"cls": evaluate.EvalConfig, "stage": "evaluate"}
    cfg = load(tmp_path, f"evaluate:\n  root: .\n  benchmarks: {text}", **evaluation)
    assert cfg.benchmarks == ["mvbench", "mmvu"]
    cfg = load(tmp_path, "evaluate:\n  root: .", "--benchmarks", *text.strip("[]").split(), **evaluation)
    assert cfg.benchmarks == ["mvbench", "mmvu"]


def test_a_missing_config_file_is_one_line():
    """Guards: a traceback for a mistyped path."""
    with pytest.raises(settings.UserError, match="no/such.yaml: cannot read this config"):
        load_config(sft.SFTConfig, "sft", ["--config", "no/such.yaml"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
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


def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path):
    """Guards: a hub lookup or a traceback if the user forgot the first stage."""
    for path in ("runs/nowhere/final", "configs/nowhere", "./nowhere", str(tmp_path)):
        cfg = load(tmp_path, f"tgrpo:\n  model: {path}")
        with pytest.raises(settings.UserError) as error:
            model_files.check_model(cfg, "tgrpo", made_by="accelerate launch sft.py --config x.yaml")
        assert f"no checkpoint at {path}" in str(error.value) and "accelerate launch sft.py" in str(error.value)
    model_files.check_model(load(tmp_path, "tgrpo:\n  model: Qwen/Qwen2.5-VL-7B-Instruct"), "tgrpo")


def test_an_incomplete_last_line_is_ignored(tmp_path):
    """Guards: a log that cannot be read after the run was killed while writing."""
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert [row["step"] for row in read_jsonl(path)] == [0, 1]


def test_half_written_checkpoints_are_never_chosen(tmp_path):
    """Guards: resuming from checkpoint-9.tmp, or sorting 10 before 9."""
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11.tmp", ".checkpoint-12.old", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in checkpoints.finished_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_rises_then_falls_to_its_floor(schedule):
    """Guards: an off-by-one schedule that begins at 0 or ends above its minimum."""
    cfg = sft.SFTConfig(lr=2.0, steps=100, warmup_steps=10, lr_schedule=schedule, min_lr_ratio=0.1)
    rates = [training.learning_rate(step, cfg) for step in range(100)]
    assert 0 < rates[0] < rates[5] < rates[9] == 2.0 == max(rates)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))
    assert rates[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2, abs=0.03)


def test_the_data_order_is_a_permutation_each_epoch_and_resumes_anywhere():
    """Guards: samples lost or repeated at the end of an epoch or after a resume."""
    order = [data.data_index(position, 7, seed=1) for position in range(21)]
    for epoch in range(3):
        assert sorted(order[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert order[:7] != order[7:14]
    cfg = sft.SFTConfig(batch_size=4, steps=5)
    whole = [p for rank in (0, 1) for batch in data.rank_batches(cfg, 0, rank, 2) for p in batch]
    assert sorted(whole) == list(range(20))
    assert list(data.rank_batches(cfg, 3, 1, 2)) == list(data.rank_batches(cfg, 0, 1, 2))[3:]


def test_write_atomic_leaves_no_temporary_files(tmp_path):
    """Guards: temporary files left beside the result, or an incomplete result."""
    write_atomic(tmp_path / "a.json", json.dumps([1]))
    write_atomic(tmp_path / "a.json", json.dumps([1, 2]))
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and json.loads((tmp_path / "a.json").read_text()) == [
        1,
        2,
    ]


@pytest.mark.parametrize(
    "batch, micro, ranks, line",
    [
        (8, 1, 3, "batch_size 8 does not divide over 3 processes"),
        (4, 1, 8, "batch_size 4 does not divide over 8 processes"),
        (12, 4, 2, "the 6 records of one process do not divide into micro-batches of 4"),
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


@pytest.mark.parametrize(
    "variable, name",
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
    ],
)
def test_an_accelerate_config_for_another_library_is_one_clear_line(monkeypatch, variable, name):
    """Guards: weights that DeepSpeed has partitioned, in a loop for FSDP2 only; a traceback from accelerate."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(settings.UserError, match=f"the accelerate config requests {name}, which is not supported here"):
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
    assert (
        accelerator.gradient_accumulation_steps == 1
        and accelerator.mixed_precision == "no"
        and not distributed.is_sharded(accelerator)
    )
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_collective_timeout_is_hours(monkeypatch):
    """Guards: the default of 10 minutes, which is shorter than loading, saving, or an uneven evaluation."""
    given = {}
    monkeypatch.setattr(
        distributed, "Accelerator", lambda **kwargs: given.update(kwargs) or SimpleNamespace(num_processes=1)
    )
    distributed.make_accelerator(tgrpo.TGRPOConfig())
    (handler,) = given["kwargs_handlers"]
    assert handler.timeout >= timedelta(hours=2)


def test_workers_get_picklable_objects(monkeypatch, tmp_path):
    """Guards: a lambda or a local class given to a DataLoader, which Python 3.14 pickles for its workers."""
    pickled = []

    def loader(dataset, collate_fn=None, worker_init_fn=None, **settings):
        # ignoring signals and ending with its parent is every worker's rule, in --check too
        assert worker_init_fn is workers.start_worker
        pickled.append(pickle.loads(pickle.dumps((dataset, collate_fn))))
        return []

    monkeypatch.setattr(data, "DataLoader", loader)
    cfg = tgrpo.TGRPOConfig(num_workers=1)
    samples = data.Samples([{"path": "a.mp4"}], None, cfg)
    assert list(workers.loader(samples, [[0]], cfg)) == [] and data.check_media({1: {"path": "a.mp4"}}, cfg) == {}
    assert len(pickled) == 2 and pickled[0][0].records == samples.records


def test_the_memory_plan_needs_only_the_model(monkeypatch, capsys):
    """Guards: a memory plan that requires records and an output folder, which it does not use."""
    monkeypatch.setattr("sys.argv", ["plan_memory", "--model", "Qwen/Qwen2.5-VL-3B-Instruct"])
    plan_memory.main()
    assert "peak" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["plan_memory"])
    with pytest.raises(settings.UserError, match="tgrpo.model: missing"):
        plan_memory.main()


def test_a_saved_config_has_one_dtype():
    """Guards: a config.json that names float32 for bfloat16 weights, so that the model is loaded at twice its size."""
    config = {"torch_dtype": "float32", "hidden_size": 4, "text_config": {"dtype": "float32"}, "vision_config": {}}
    assert model_files.with_dtype(config, torch.bfloat16) == {
        "torch_dtype": "bfloat16",
        "hidden_size": 4,
        "text_config": {"dtype": "bfloat16"},
        "vision_config": {},
    }


def test_only_evaluation_loads_weights_directly_onto_the_device(world, run, monkeypatch):
    """Guards: an evaluation on the CPU of a machine with a GPU; training weights placed on a device before they are
    sharded.
    """
    real = policy.load_policy
    devices = {}

    def watched(cfg, dtype=torch.float32, accelerator=None, device=None):
        devices.setdefault(type(cfg).__name__, set()).add(device and device.type)
        return real(cfg, dtype, accelerator, device)

    monkeypatch.setattr(policy, "load_policy", watched)
    run("sft", "sft", steps=1)
    run("tgrpo", "tgrpo", steps=1, max_new_tokens=4)
    run("evaluate", "eval", max_new_tokens=4)
    assert devices == {"SFTConfig": {None}, "TGRPOConfig": {None}, "EvalConfig": {"cpu"}}
