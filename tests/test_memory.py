"""tools/plan_memory.py compared with the bytes of a real training step, and its results for the shipped configs."""

import weakref
from pathlib import Path

import naive
import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import policy
import tgrpo
from bench import gpu
from evaluate import EvalConfig
from sft import SFTConfig
from support import distributed, families, lora, model_files, settings
from support.settings import load_config
from tools import check_data, plan_memory

both_families = pytest.mark.parametrize("family", families.FAMILIES)


class Peak(TorchDispatchMode):
    """`peak`: the most bytes that were alive at once within it, of `tensors` and of all that operators return.

    torch's MemTracker finds the same, but looks at every storage in every operator.
    """

    def __init__(self, tensors):
        super().__init__()
        self.alive = set()
        self.bytes = self.peak = 0
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata in self.alive:
            return
        self.alive.add(storage._cdata)
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, address, size):
        self.alive.remove(address)
        self.bytes -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self.add(result)
        return results


def small_config(family, width, layers=2, depth=2):
    """Config of a small model. The heads of Qwen3-VL are together twice as wide as its hidden state."""
    make_config, of_text, of_vision = naive.TINY[family]
    head_dim = width // 2 if "head_dim" in of_text else width // 4
    text = dict(zip(families.TEXT, (width, 4 * width, layers, 4, 2, 320)))
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [head_dim // 6] * 3}
    if "head_dim" in of_text:
        text["head_dim"] = head_dim
    vision = {"hidden_size": width * 2 // 3, "intermediate_size": 2 * width, "num_heads": 2, "depth": depth}
    return make_config(
        text_config=text,
        vision_config=of_vision | vision | {"out_hidden_size": width},
        image_token_id=naive.IMAGE,
        video_token_id=naive.VIDEO,
    )


@both_families
@pytest.mark.parametrize(
    "settings, G, T, checkpointing",
    [
        ({}, 8, 30, False),
        ({}, 2, 120, True),
        ({"freeze_vision": True}, 8, 30, False),
        ({"bf16": True}, 8, 30, False),
        ({"lora_rank": 16}, 8, 30, False),
        ({"lora_rank": 16, "bf16": True}, 2, 120, True),
    ],
    ids=str,
)
def test_the_plan_is_within_10_percent_of_a_measured_step(monkeypatch, family, checkpointing, G, T, settings):
    """Guards: a plan that omits memory of a real step, so that a run fails after an hour in a queue."""
    cfg = tgrpo.TGRPOConfig(
        gradient_checkpointing=checkpointing,
        micro_batch_size=4,
        num_generations=G,
        max_new_tokens=T,
        shuffled_generations=0,
        beta=0.0,
        **settings,
    )
    config = small_config(family, 96)
    monkeypatch.setattr(
        policy, "load_policy", lambda cfg, dtype=torch.float32, **_: gpu.random_model(config, cfg, dtype)
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = distributed.make_accelerator(cfg)
    model, optimizer = distributed.prepare(accelerator, policy.load_trainable(cfg, accelerator), cfg)
    prompts = [gpu.clip_prompt(config, (4, 4, 6), 80)] * cfg.micro_batch_size
    completions = [[torch.randint(100, 300, (T,)) for _ in range(G)] for _ in prompts]

    def step():
        logps_GT, _ = policy.completion_logps(model, policy.pack(model, prompts, completions, 0))
        logps_GT.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    # the first step creates the optimizer's state
    step()
    moments = [moment for state in optimizer.optimizer.state.values() for moment in state.values()]
    with Peak([*model.parameters(), *moments]) as measured:
        step()
    parts, planned = plan_memory.memory_plan(cfg, config, 1, prompt=(80, 4 * 4 * 6))
    # nothing is sampled here
    planned -= parts["rollout copy"]
    assert planned == pytest.approx(measured.peak, rel=0.1)


@both_families
@pytest.mark.parametrize("lora_rank, bf16", [(0, False), (4, False), (4, True)])
@pytest.mark.parametrize("part", ["layers", "depth"])
def test_the_plan_counts_what_one_more_layer_saves(family, lora_rank, bf16, part):
    """Guards: the count of another family, or of another version of transformers."""
    cfg = tgrpo.TGRPOConfig(lora_rank=lora_rank, bf16=bf16, num_generations=2, max_new_tokens=40)
    prompt = gpu.clip_prompt(small_config(family, 96), (4, 8, 12), 150)
    completions = [[torch.randint(100, 300, (40,)) for _ in range(2)]]

    def found_and_planned(**layers):
        config = small_config(family, 96, **layers)
        model = gpu.random_model(config, cfg, distributed.compute_dtype(cfg))
        if lora_rank:
            lora.add_adapter(model, cfg)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        saved = {}

        def save(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                policy.completion_logps(model, policy.pack(model, [prompt], completions, 0))
        planned = plan_memory.training_bytes(cfg, config, 1, 150, 4 * 8 * 12)["activations"]
        return torch.tensor([sum(storage.nbytes() for storage in saved.values()), planned])

    found, planned = (found_and_planned(**{part: 3}) - found_and_planned()).tolist()
    assert planned == pytest.approx(found, rel=0.02)


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
        ("qwen3vl_8b", 4, 80, "Qwen3-VL-8B on 4 GPUs"),
        ("qwen3vl_8b", 8, 80, "Qwen3-VL-8B on 8 GPUs"),
        ("qwen3vl_4b_one_gpu", 1, 24, "Qwen3-VL-4B with LoRA on 1 GPU"),
    ],
)
def test_documented_table_equals_the_plan(path, gpus, card_gb, row):
    """Guards: an outdated table; a phase of the step that the peak omits; a config that does not fit on its GPUs."""
    cfg = load_config(tgrpo.TGRPOConfig, "tgrpo", ["--config", f"configs/{path}.yaml"])
    parts, peak = plan_memory.memory_plan(cfg, plan_memory.model_shape(cfg.model), gpus)
    states = parts["weights"] + parts["gradients"] + parts["optimizer (AdamW)"]
    phases = (parts["KV cache (rollout)"], parts["activations"] + parts["logits, or a layer"], parts["optimizer step"])
    resident = states + parts["reference"] + parts["rollout copy"] + parts.get("gathered layers", 0)
    assert peak == pytest.approx(resident + max(phases))
    assert peak / 1e9 < 0.9 * card_gb
    page = (Path(__file__).parent.parent / "docs/training.md").read_text()
    line = next(line for line in page.split("\n") if line.startswith(f"| {row} |"))
    expected = (states, parts["reference"], parts["rollout copy"], parts.get("gathered layers", 0), *phases, peak)
    assert [float(cell) for cell in line.split("|")[2:-1]] == [pytest.approx(n / 1e9, abs=0.06) for n in expected]


@pytest.mark.parametrize("path, gpus", [("7b", 8), ("7b_one_gpu", 1), ("qwen3vl_8b", 8), ("qwen3vl_4b_one_gpu", 1)])
def test_documented_numbers_of_the_other_stages_equal_the_plan(path, gpus):
    """Guards: outdated numbers of SFT and of evaluation; a stage that does not fit on the GPU of its config."""
    command = ["--config", f"configs/{path}.yaml"]
    sft = load_config(SFTConfig, "sft", command)
    evaluation = load_config(EvalConfig, "evaluate", command)
    shape = plan_memory.model_shape(sft.model)
    page = (Path(__file__).parent.parent / "docs/training.md").read_text()
    card_gb = 24 if "4b" in path else 80
    for _, peak in (plan_memory.sft_plan(sft, shape, gpus), plan_memory.evaluation_plan(evaluation, shape)):
        assert f" {peak / 1e9:.1f} " in page.replace("\n", " ")
        assert peak / 1e9 < 0.9 * card_gb


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
        ("Qwen/Qwen3-VL-2B-Thinking", 2_127_532_032),
        ("Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808),
        ("runs/qwen3vl_8b/sft/final", 8_767_123_696),
        ("3B", 3_754_622_976),
    ],
)
def test_the_published_shapes_have_the_published_number_of_parameters(name, parameters):
    """Guards: a plan for a model that does not exist, or for one of the other family."""
    with torch.device("meta"):
        model = model_files.empty_model(plan_memory.model_shape(name), torch.float32)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    "name",
    ["some/other-13b", "Qwen/Qwen3-VL-7B-Instruct", "some/30B-A3B", "Qwen/Qwen3.5-4B", "some/1.7B"],
)
def test_an_unknown_size_names_the_known_ones(name):
    """Guards: the plan of another model: of the size in the other family, or of the experts' 3B."""
    with pytest.raises(settings.UserError, match=f"{name}.*qwen2_5_vl 7b.*qwen3_vl 4b"):
        plan_memory.model_shape(name)


def test_the_longest_prompt_has_the_time_stamps_that_the_family_writes():
    """Guards: a plan that counts patches of the other family, an odd frame for nothing, or no time stamps."""
    cfg = tgrpo.TGRPOConfig(max_frames=15, max_pixels=128 * 32 * 32)
    patches = 8 * 128 * 4
    tokens = patches // 4 + plan_memory.TEXT_PROMPT_TOKENS + 8 * plan_memory.STAMP_TOKENS
    assert plan_memory.longest_prompt(cfg, plan_memory.model_shape("4B")) == (tokens, patches)
    cfg.max_pixels = 128 * 28 * 28
    tokens -= 8 * plan_memory.STAMP_TOKENS
    assert plan_memory.longest_prompt(cfg, plan_memory.model_shape("3B")) == (tokens, patches)


@both_families
@pytest.mark.parametrize("bf16", [False, True])
def test_the_plan_of_evaluation_is_within_10_percent_of_a_measured_prefill(family, bf16):
    """Guards: a batch of long prompts that does not fit, in the stage that runs last."""
    config = small_config(family, 240)
    cfg = EvalConfig(batch_size=4, max_new_tokens=1, bf16=bf16)
    model = policy.Policy.of(model_files.empty_model(config, distributed.compute_dtype(cfg))).eval()
    prompts = [gpu.clip_prompt(config, (4, 12, 12), 250)] * 4
    with Peak(model.parameters()) as measured, torch.no_grad():
        policy.read_prompts(model, prompts, 601)
    parts, planned = plan_memory.evaluation_plan(cfg, config, prompt=(250, 4 * 12 * 12))
    # half of the caches belong to decoding
    planned -= parts["KV cache (rollout)"] / 2
    assert planned == pytest.approx(measured.peak, rel=0.1)


def test_the_plan_of_sft_has_neither_reference_nor_rollout():
    """Guards: a plan of SFT that is that of T-GRPO."""
    cfg = load_config(SFTConfig, "sft", ["--config", "configs/7b.yaml"])
    parts, peak = plan_memory.sft_plan(cfg, plan_memory.model_shape("7B"), 8)
    assert not parts["reference"] and not parts["rollout copy"] and not parts["KV cache (rollout)"]
    resident = sum(parts[name] for name in ("weights", "gradients", "optimizer (AdamW)", "gathered layers"))
    assert peak == pytest.approx(
        resident + max(parts["optimizer step"], parts["activations"] + parts["logits, or a layer"])
    )


def test_a_batch_that_the_gpus_cannot_share_has_no_plan(monkeypatch):
    """Guards: "it fits" for a run that does not start."""
    monkeypatch.setattr("sys.argv", ["plan_memory", "--config", "configs/qwen3vl_4b_one_gpu.yaml", "--gpus", "8"])
    with pytest.raises(settings.UserError, match="batch_size 2 does not divide over 8 processes"):
        plan_memory.main()


@pytest.mark.parametrize("config, gpus", [("3b_one_gpu", 1), ("7b", 8)])
def test_a_plan_is_for_the_gpus_that_a_config_is_made_for(config, gpus, monkeypatch, capsys):
    """Guards: the plan of a config for one GPU that divides its prompts over eight, and so is too low."""
    monkeypatch.setattr("sys.argv", ["plan_memory", "--config", f"configs/{config}.yaml"])
    plan_memory.main()
    assert f"tgrpo, GPUs: {gpus}, fsdp" in capsys.readouterr().out


@pytest.mark.parametrize(
    "config, changed, line",
    [
        ("3b", ["--shuffle_stamps", "true"], "shuffle_stamps: true: the prompts of .* have no time stamps"),
        ("qwen3vl_8b", ["--min_pixels", "784", "--max_pixels", "1023"], "max_pixels: 1023, but a token of .* is 1024"),
        ("3b", ["--length_min", "900"], "length_min 900 is larger than length_max 512"),
    ],
)
@pytest.mark.parametrize("tool", [plan_memory, check_data])
def test_settings_that_a_stage_refuses_are_refused_by_the_tools(monkeypatch, tool, config, changed, line):
    """Guards: records that are checked, and a plan that fits, for a run that does not start."""
    monkeypatch.setattr("sys.argv", ["tool", "--config", f"configs/{config}.yaml", *changed])
    with pytest.raises(settings.UserError, match=line):
        tool.main()
