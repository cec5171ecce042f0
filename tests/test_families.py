"""What has to hold for each model family of support/families.py. A new one needs a tiny model in naive.TINY.

Its log-probs, rollouts and gradients are compared with plain ones in test_tgrpo.py, its positions in test_positions.py,
pictures in test_pictures.py, its vision tower and compiled decoding in test_speed.py.
"""

import copy
import inspect

import naive
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForImageTextToText
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

import policy
import tgrpo
from support import distributed, families, lora, model_files, vision

BANNED = (naive.IMAGE, naive.VIDEO)


@pytest.fixture(params=families.FAMILIES)
def family(request):
    return request.param


def logps(model, seed=0):
    """Log-probs of random completions of two clips and a picture, as the loss computes them."""
    prompts = naive.mixed_prompts(model.config.model_type)
    generator = torch.Generator().manual_seed(seed)
    groups = [[torch.randint(3, 50, (n,), generator=generator) for n in (3, 7)] for _ in prompts]
    packed = policy.pack(model, prompts, groups, naive.PAD)
    return policy.completion_logps(model, packed, 1.0, BANNED)[0]


def greedy(model):
    prompts = naive.mixed_prompts(model.config.model_type)
    return [c.tolist() for c in policy.rollout(model, prompts, [1, 1, 1], naive.tokenizer, 0, 12)]


# -------------------------------------------------------------------------------------------------- classes and configs


def transformers_class(config):
    return AutoModelForImageTextToText._model_mapping[type(config)]


def test_every_family_has_a_tiny_model_and_a_processor_of_transformers(family):
    """Guards: a family without tests; the name of a processor that no checkpoint has."""
    assert naive.TINY.keys() == families.FAMILIES.keys()
    assert families.of(naive.tiny_policy(family=family).config) is families.FAMILIES[family]
    assert PROCESSOR_MAPPING_NAMES[family] == families.FAMILIES[family].processor


# in 1e9, as the hub shows them; a tied head counts once
@pytest.mark.parametrize(
    "family, size, billions",
    [
        ("qwen2_5_vl", "3b", 3.75),
        ("qwen2_5_vl", "7b", 8.29),
        ("qwen3_vl", "2b", 2.13),
        ("qwen3_vl", "4b", 4.44),
        ("qwen3_vl", "8b", 8.77),
    ],
)
def test_published_configs_have_the_published_numbers_of_parameters(family, size, billions):
    """Guards: a wrong width, a vision tower of another size, a head that is tied in one place only."""
    config = families.FAMILIES[family].published_config(size)
    assert config.model_type == family
    with torch.device("meta"):
        model = model_files.empty_model(config, torch.bfloat16)
    model.tie_weights()
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == billions


def test_families_do_not_meet_in_one_process():
    """Guards: state of Policy, of its classes or of a cache that two models share, as teacher and student would."""
    models = {family: naive.tiny_policy(family=family) for family in families.FAMILIES}
    alone = {family: (logps(model), greedy(model)) for family, model in models.items()}
    for family, model in reversed(models.items()):
        again = (logps(model), greedy(model))
        assert torch.equal(again[0], alone[family][0]) and again[1] == alone[family][1]
        assert isinstance(model, policy.Policy)
        others = [other for name, other in models.items() if name != family]
        assert not any(isinstance(model, type(other)) for other in others)


def test_a_policy_keeps_the_signature_that_generate_inspects(family):
    """Guards: a forward of **inputs only, from which generate() would conclude that the model takes no positions."""
    model = naive.tiny_policy(family=family)
    own = inspect.signature(transformers_class(model.config).forward).parameters
    assert list(inspect.signature(model.forward).parameters) == list(own)[1:]
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(torch.tensor([[5, 6]]), nonsense=1)


def test_a_deep_copy_of_a_policy_is_a_policy_of_its_own(family):
    """Guards: a class that cannot be copied, or a copy whose weights are those of the original."""
    model = naive.tiny_policy(family=family)
    expected = logps(model)
    copied = copy.deepcopy(model)
    assert type(copied) is type(model) and torch.equal(logps(copied), expected)
    with torch.no_grad():
        copied.lm_head.weight.add_(torch.randn(copied.lm_head.weight.shape))
    assert not torch.allclose(logps(copied), expected)
    assert torch.equal(logps(model), expected)


def test_a_sharded_policy_is_still_a_policy(family, tmp_path):
    """Guards: FSDP, which makes a class of its own from each wrapped module's, and then the wrong forward."""
    model = naive.tiny_policy(family=family)
    expected = logps(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for layer in [*model.model.visual.blocks, *model.model.language_model.layers]:
            assert type(layer).__name__ in model._no_split_modules
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert isinstance(model, policy.Policy) and isinstance(model, FSDPModule)
        assert torch.allclose(logps(model), expected, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------ vision, memory


def test_lengths_that_are_passed_reach_the_blocks_and_are_those_the_tower_computes(family, monkeypatch):
    """Guards: lengths by the rule of another family, or under a name that transformers does not read."""
    model = naive.tiny_policy(family=family)
    passed = []
    used = []
    block_lengths = families.of(model.config).block_lengths

    def kept(grids, config):
        passed.append(block_lengths(grids, config))
        return passed[-1]

    monkeypatch.setattr(families.FAMILIES[family], "block_lengths", kept)
    for block in model.model.visual.blocks:
        block.register_forward_pre_hook(lambda block, _, inputs: used.append(inputs["cu_seqlens"]), with_kwargs=True)
    expected = logps(model)
    assert len(used) == len(model.model.visual.blocks)
    for lengths in used:
        # the very tensors, which nothing has computed anew or copied to a device
        assert any(lengths is tensor for tensor in passed[0].values())
    monkeypatch.setattr(vision, "lengths", lambda *_: {})
    assert torch.equal(logps(model), expected)


def count_layers(model):
    """A list that grows by one for each pass through a vision block or text layer."""
    calls = []
    for layer in [*model.model.visual.blocks, *model.model.language_model.layers]:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_gradient_checkpointing_changes_no_gradient(family):
    """Guards: layers that are computed again with other inputs; features of DeepStack that get no gradient."""
    found = {}
    for checkpointed in (False, True):
        model = naive.tiny_policy(family=family).train()
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.disable_input_require_grads()
        calls = count_layers(model)
        loss = logps(model).sum()
        once = len(calls)
        found[checkpointed] = (loss.detach(), torch.autograd.grad(loss, list(model.parameters())))
        # the backward pass computes all of them again
        assert len(calls) == (2 * once if checkpointed else once)
    assert torch.equal(found[False][0], found[True][0])
    for plain, again in zip(found[False][1], found[True][1]):
        assert torch.allclose(plain, again, rtol=1e-5, atol=1e-6 * plain.abs().max())


# ---------------------------------------------------------------------------------------------------------------- LoRA


def adapted(family, how="policy"):
    """(a policy with an adapter that changes it, its settings)."""
    cfg = tgrpo.TGRPOConfig(model="tiny", lora_rank=4, lora_alpha=8, lora_rollout=how)
    model = lora.add_adapter(naive.tiny_policy(family=family), cfg)
    generator = torch.Generator().manual_seed(5)
    for layer in lora.adapted_layers(model):
        weight = layer.lora_B["default"].weight
        weight.data = 0.3 * torch.randn(weight.shape, generator=generator)
    return model, cfg


def test_an_adapter_has_all_linear_layers_of_the_text_layers_and_no_others(family):
    """Guards: names that match nothing in a new family, or the vision tower, DeepStack's mergers or the head."""
    layers = naive.tiny_policy(family=family).model.language_model.layers
    expected = {f"model.language_model.layers.{name}" for name, m in layers.named_modules() if isinstance(m, nn.Linear)}
    model, _ = adapted(family)
    found = {name for name, module in model.named_modules() if isinstance(module, lora.LoraLayer)}
    assert found == expected and len(found) == 7 * len(layers)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.lora_{matrix}.default.weight" for name in found for matrix in "AB"}


@pytest.mark.parametrize("how", ["merged_copy", "merged_in_place"])
def test_rollouts_of_merged_weights_equal_those_of_the_adapter(how, family):
    """Guards: an adapter that the sampled model lacks, or has twice."""
    model, cfg = adapted(family, how)
    AcceleratorState._reset_state(reset_partial_state=True)
    rollout_model = policy.rollout_copy(distributed.make_accelerator(cfg), model, cfg)
    policy.refresh(rollout_model, model)
    with torch.no_grad():
        expected = logps(model)
        with lora.adapter_off(model):
            assert (logps(model) - expected).abs().max() > 0.1
            without = greedy(model)
        with lora.merged(rollout_model, how):
            assert (logps(rollout_model) - expected).abs().max() < 1e-5
            merged = greedy(rollout_model)
        assert merged == greedy(model) != without
