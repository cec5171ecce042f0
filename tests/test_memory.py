"""tools/plan_memory.py compared with the bytes of a real training step, and its results for the shipped configs."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from test_data import write_video
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import Qwen2_5_VLConfig

import data
import policy
import tgrpo
from bench import gpu
from evaluate import EvalConfig
from sft import SFTConfig
from support import distributed, model_files, settings
from support.settings import load_config
from tools import plan_memory


class Tracker(MemTracker):
    """MemTracker for models with frozen weights: its hooks on gradients, which only sort bytes, need trained ones."""

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def plan_config(**settings):
    cfg = load_config(tgrpo.TGRPOConfig, "tgrpo", ["--config", "configs/toy.yaml"])
    for name, value in (settings | {"beta": 0.0}).items():
        setattr(cfg, name, value)
    return cfg


@pytest.mark.parametrize(
    "settings, G, T, checkpointing",
    [
        ({}, 8, 40, False),
        ({}, 2, 150, True),
        ({"freeze_vision": True}, 8, 40, False),
        ({"lora_rank": 16}, 8, 40, False),
        ({"lora_rank": 16}, 2, 150, True),
        ({"lora_rank": 16, "bf16": True}, 8, 40, True),
    ],
    ids=str,
)
def test_the_plan_is_within_15_percent_of_a_measured_step(world, tmp_path, checkpointing, G, T, settings):
    """Guards: a plan that omits memory of a real step, so that a run fails after an hour in a queue."""
    write_video(tmp_path / "clip.mp4", 8)
    cfg = plan_config(
        model=str(world / "base"),
        data_root=str(tmp_path),
        gradient_checkpointing=checkpointing,
        num_generations=G,
        max_new_tokens=T,
        shuffled_generations=0,
        lr=1e-3,
        **settings,
    )
    record = next(
        r for r in json.loads((world / "world/rl.json").read_text()) if r["data_source"] == "toy-direction"
    ) | {"path": "clip.mp4"}
    prompts = [data.Samples([record], model_files.load_processor(cfg), cfg)[0].inputs["ordered"]] * cfg.micro_batch_size
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = distributed.make_accelerator(cfg)
    model, optimizer = distributed.prepare(accelerator, policy.load_trainable(cfg, accelerator), cfg)
    completions = [[torch.randint(10, 300, (T,)) for _ in range(G)] for _ in prompts]

    def step():
        logps_GT, _ = policy.completion_logps(model, policy.pack(model, prompts, completions, 0))
        logps_GT.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    # the first step creates the optimizer's state
    step()
    tracker = Tracker()
    tracker.track_external(model, optimizer.optimizer)
    with tracker:
        step()
    (measured,) = (sizes["Total"] for sizes in tracker.get_tracker_snapshot("peak").values())
    P = prompts[0]["input_ids"].shape[1]
    _, planned = plan_memory.memory_plan(cfg, plan_memory.model_shape(cfg.model), 1, prompt_tokens=P, patches=64)
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("path, gpus, card_gb, fits", [("7b", 8, 80, True), ("7b_one_gpu", 1, 24, False)])
def test_what_the_plan_says_of_the_shipped_configs(monkeypatch, capsys, path, gpus, card_gb, fits):
    """Guards: a verdict that does not follow from the plan; a plan that needs a GPU or a download."""
    command = ["plan_memory", "--config", f"configs/{path}.yaml", "--gpus", str(gpus), "--card_gb", str(card_gb)]
    monkeypatch.setattr("sys.argv", command)
    plan_memory.main()
    printed = capsys.readouterr().out
    assert f"It {'fits' if fits else 'does not fit'} in {card_gb} GB" in printed
    assert "KV cache" in printed


@pytest.mark.parametrize(
    "path, gpus, card_gb, row",
    [
        ("7b", 4, 80, "7B on 4 GPUs"),
        ("7b", 8, 80, "7B on 8 GPUs"),
        ("3b", 2, 80, "3B on 2 GPUs"),
        ("7b_one_gpu", 1, 80, "7B with LoRA on 1 GPU"),
        ("3b_one_gpu", 1, 24, "3B with LoRA on 1 GPU"),
    ],
)
def test_documented_table_equals_the_plan(path, gpus, card_gb, row):
    """Guards: an outdated table; a phase of the step that the peak omits; a config that does not fit on its GPUs."""
    cfg = load_config(tgrpo.TGRPOConfig, "tgrpo", ["--config", f"configs/{path}.yaml"])
    parts, peak = plan_memory.memory_plan(cfg, plan_memory.model_shape(cfg.model), gpus)
    states = parts["weights"] + parts["gradients"] + parts["optimizer (AdamW)"]
    phases = (parts["KV cache (rollout)"], parts["activations"] + parts["logits"], parts["optimizer step"])
    resident = states + parts["reference"] + parts["rollout copy"] + parts.get("gathered layers", 0)
    assert peak == pytest.approx(resident + max(phases))
    assert peak / 1e9 < 0.9 * card_gb
    page = (Path(__file__).parent.parent / "docs/training.md").read_text()
    line = next(line for line in page.split("\n") if line.startswith(f"| {row} |"))
    expected = (states, parts["reference"], parts["rollout copy"], parts.get("gathered layers", 0), *phases, peak)
    assert [float(cell) for cell in line.split("|")[2:-1]] == [pytest.approx(n / 1e9, abs=0.06) for n in expected]


def test_the_published_shapes_have_the_published_number_of_parameters():
    """Guards: a plan for a model that does not exist."""
    for name, billions in (("Qwen/Qwen2.5-VL-7B-Instruct", 8.292), ("Qwen/Qwen2.5-VL-3B-Instruct", 3.755)):
        with torch.device("meta"):
            model = model_files.empty_model(plan_memory.model_shape(name), torch.float32)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.001)
    with pytest.raises(settings.UserError, match="neither 3B nor 7B"):
        plan_memory.model_shape("some/other-13b")


def test_the_plan_of_evaluation_is_within_15_percent_of_a_measured_prefill():
    """Guards: a batch of long prompts that does not fit, in the stage that runs last."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
    shape = dict(zip(plan_memory.TEXT, (512, 2048, 3, 8, 2, 640))) | {"rope_parameters": rope}
    vision = plan_memory.VISION | dict(
        hidden_size=320, intermediate_size=860, num_heads=4, depth=2, out_hidden_size=512
    )
    ids = {"vision_start_token_id": 617, "vision_end_token_id": 618, "image_token_id": 620, "video_token_id": 621}
    config = Qwen2_5_VLConfig(text_config=shape, vision_config=vision, **ids)
    model = policy.Policy.of(model_files.empty_model(config, torch.float32)).eval()
    prompts = [gpu.clip_prompt(config, (8, 12, 12), 400)] * 4
    tracker = Tracker()
    tracker.track_external(model)
    with tracker, torch.no_grad():
        policy.read_prompts(model, prompts, 601)
    (measured,) = (sizes["Total"] for sizes in tracker.get_tracker_snapshot("peak").values())
    cfg = EvalConfig(batch_size=4, max_new_tokens=1)
    parts, planned = plan_memory.evaluation_plan(cfg, config, prompt_tokens=400, patches=8 * 12 * 12)
    # half of the caches belong to decoding
    assert planned - parts["KV cache (rollout)"] / 2 == pytest.approx(measured, rel=0.15)


def test_the_plan_of_sft_has_neither_reference_nor_rollout():
    """Guards: a plan of SFT that is that of T-GRPO."""
    cfg = load_config(SFTConfig, "sft", ["--config", "configs/7b.yaml"])
    parts, peak = plan_memory.sft_plan(cfg, plan_memory.model_shape("7B"), 8)
    assert not parts["reference"] and not parts["rollout copy"] and not parts["KV cache (rollout)"]
    resident = sum(parts[name] for name in ("weights", "gradients", "optimizer (AdamW)", "gathered layers"))
    assert peak == pytest.approx(resident + max(parts["optimizer step"], parts["activations"] + parts["logits"]))
