"""What makes a step slow on a GPU and can be counted on a CPU: waits for the device, compilations, kept caches."""

import json
import types
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import naive
import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

import policy
from support import decoding, families, model_files, vision

ROOT = Path(__file__).parent.parent
both_families = pytest.mark.parametrize("family", families.FAMILIES)


def mixed_pack(model):
    """Three prompts, one of them a picture, with completions of very unequal length."""
    generator = torch.Generator().manual_seed(0)
    groups = [
        [torch.randint(3, 50, (n,), generator=generator) for n in lengths]
        for lengths in ((1, 60, 7), (12, 2, 3), (5, 5, 33))
    ]
    return policy.pack(model, naive.mixed_prompts(model.config.model_type), groups, naive.PAD)


@both_families
def test_the_text_layers_never_read_a_value_from_the_device(family):
    """Guards: int(tensor.max()) or a boolean index in a layer: the host would wait in each of 28 layers.

    Adding DeepStack's features, which transformers does after three layers of Qwen3-VL, is left out: it has such an
    index.
    """
    model = naive.tiny_policy(family=family)
    inputs = mixed_pack(model).inputs
    B, L = inputs["input_ids"].shape
    # tensors without values: reading one raises an error
    layers = model.model.language_model.to("meta")
    inputs = send_to_device(inputs, "meta")
    hidden_BLD = torch.empty(B, L, model.config.text_config.hidden_size, device="meta")
    output = layers(
        inputs_embeds=hidden_BLD,
        position_ids=inputs["position_ids"],
        attention_mask=inputs["attention_mask"],
        use_cache=False,
    )
    assert output.last_hidden_state.shape == hidden_BLD.shape


def lengths_of_blocks(grid, config):
    """What transformers' vision tower computes itself if it is not passed."""
    expected = {"cu_seqlens": get_vision_cu_seqlens(grid)}
    if hasattr(config, "window_size"):
        index, windows = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)
        expected |= {"window_index": index, "cu_window_seqlens": windows}
    return expected


@both_families
def test_vision_window_lengths_are_on_the_cpu(family, monkeypatch):
    """Guards: lengths that every vision block reads from the GPU, in the loss or in the prefill; lengths of another
    batch.
    """
    model = naive.tiny_policy(family=family)
    packed = mixed_pack(model)
    seen = []
    model.model.visual.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    policy.completion_logps(model, packed)
    policy.rollout(model, naive.mixed_prompts(family), [1, 1, 1], naive.tokenizer, 1.0, 2)
    # the loss and the prefill
    assert [len(kwargs["grid_thw"]) for kwargs in seen] == [3, 3]
    for kwargs in seen:
        grid = kwargs["grid_thw"]
        for name, value in lengths_of_blocks(grid, model.config.vision_config).items():
            assert torch.equal(kwargs[name], value)
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self) or self)
    vision.lengths({"video_grid_thw": grid}, model.config)
    assert len(moved) == 1 and moved[0] is grid


@both_families
def test_compiled_rollouts_compile_once_per_shape_and_reuse_their_cache(family, monkeypatch):
    """Guards: a new static cache per rollout, so that CUDA graphs are recorded again at every step; a part of the step
    that is not compiled.
    """
    model = naive.tiny_policy(family=family)
    graphs = []
    moving = []
    key_heads = set()
    addresses = {}

    def backend(graph, inputs):
        """Counts compilations, and the caches that the compiled code is called with."""
        graphs.append(graph)
        for node in graph.graph.nodes:
            if node.target is F.scaled_dot_product_attention:
                key_heads.add(node.args[1].meta["example_value"].shape[1])
            if node.op == "placeholder" and "_dynamo_static_input_type" not in node.meta["tensor_dict"]:
                moving.append(node.name)

        def call(*args):
            for x in args:
                if isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[2] >= 512:
                    addresses.setdefault(x.shape[2], set()).add(x.data_ptr())
            return graph.forward(*args)

        return call

    compiled_step = decoding.CompiledStep(backend=backend)
    monkeypatch.setattr(decoding, "compiled_step", lambda device: compiled_step)
    for n_text in (3, 600, 9, 700):
        x = naive.prompt("video", (2, 2, 4), n_text, n_text, family=family)
        torch.manual_seed(n_text)
        model.compiled_rows = 4
        compiled = policy.rollout(model, [x], [4], naive.tokenizer, 1.0, 6)
        assert len(policy.rollout(model, [x], [3], naive.tokenizer, 1.0, 6)) == 3
        model.compiled_rows = 0
        torch.manual_seed(n_text)
        plain = policy.rollout(model, [x], [4], naive.tokenizer, 1.0, 6)
        assert [c.tolist() for c in compiled] == [c.tolist() for c in plain]
    layers = model.config.text_config.num_hidden_layers
    keys_and_values = 2
    found = {room: len(caches) for room, caches in addresses.items()}
    assert found == dict.fromkeys((512, 1024), layers * keys_and_values)
    assert len(graphs) == 2
    # torch records no CUDA graph that writes to a tensor whose address may change
    assert not moving
    # compiled, transformers' own attention would repeat keys and values for all query heads
    assert key_heads == {model.config.text_config.num_key_value_heads}


def test_decoding_continues_without_compilation_where_it_fails(monkeypatch, capsys):
    """Guards: a run that ends because a GPU, a driver or a missing C compiler does not suit torch.compile; a line for
    every token; other tokens than those of plain decoding.
    """

    def backend(graph, inputs):
        raise RuntimeError("no C compiler\nand many lines")

    model = naive.tiny_policy()
    x = naive.prompt("video", (2, 2, 4), 3, 1)
    step = decoding.CompiledStep(backend=backend)
    monkeypatch.setattr(decoding, "compiled_step", lambda device: step)
    found = {}
    for rows in (4, 0):
        model.compiled_rows = rows
        torch.manual_seed(0)
        found[rows] = [c.tolist() for c in policy.rollout(model, [x], [4], naive.tokenizer, 1.0, 6)]
    assert found[4] == found[0]
    said = capsys.readouterr().out
    assert said.count("rollout_compile: decoding cannot be compiled here") == said.count("\n") == 1
    assert "no C compiler" in said


def test_an_error_of_the_compiled_step_itself_ends_the_run(monkeypatch):
    """Guards: a GPU out of memory in the middle of decoding that counts as a failed compilation."""

    def backend(graph, inputs):
        def call(*args):
            raise torch.OutOfMemoryError("tried to allocate")

        return call

    model = naive.tiny_policy()
    model.compiled_rows = 4
    step = decoding.CompiledStep(backend=backend)
    monkeypatch.setattr(decoding, "compiled_step", lambda device: step)
    with pytest.raises(torch.OutOfMemoryError):
        policy.rollout(model, [naive.prompt("video", (2, 2, 4), 3, 1)], [4], naive.tokenizer, 1.0, 6)


def prompts_of_kind(kind, family):
    """A clip, a picture, or a batch of both whose windows have many lengths."""
    clip = naive.prompt("video", (4, 6, 10), 5, 3, family=family)
    picture = naive.prompt("image", (1, 14, 6), 9, 2, family=family)
    other = naive.prompt("video", (2, 2, 4), 3, 1, family=family)
    return {"clip": [clip], "picture": [picture], "both": [clip, picture, other]}[kind]


@both_families
@pytest.mark.parametrize("kind", ["clip", "picture", "both"])
def test_fused_vision_attention_equals_the_loop(kind, family):
    """Guards: a patch that attends to another window or to padding, in the outputs or in the gradients."""
    model = naive.tiny_policy(family=family)
    prompts = prompts_of_kind(kind, family)
    completions = [[torch.tensor([7, 8, 9])]] * len(prompts)
    found = {}
    for name in ("loop", "fused"):
        vision.set_attention(model, name)
        logps, _ = policy.completion_logps(model, policy.pack(model, prompts, completions, naive.PAD))
        model.zero_grad()
        logps.sum().backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in model.model.visual.parameters()])
        found[name] = (logps.detach(), gradient)
    assert (found["loop"][0] - found["fused"][0]).abs().max() < 1e-5
    assert found["loop"][1].norm() > 0
    assert (found["loop"][1] - found["fused"][1]).norm() < 1e-5 * found["loop"][1].norm()


class Calls(TorchDispatchMode):
    """Counts the calls of each operator."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", ["Qwen2.5-VL-7B", "Qwen3-VL-8B"])
def test_a_vision_block_makes_one_attention_call_and_never_reads_from_the_device(shape, monkeypatch):
    """Guards: one call per window, which is 2,720 per pass over a clip of 16 frames at the shape of Qwen2.5-VL-7B;
    lengths that a block reads from the device although they were passed.
    """
    grid = torch.tensor([[8, 18, 26]])
    if shape == "Qwen3-VL-8B":
        config = families.Qwen3VL.published_config("8b")
        calls_expected = {"loop": 8 * 27, "fused": 27}
    else:
        config = families.Qwen2_5_VL.published_config("7b")
        # a quarter of the 32 blocks, of which every eighth attends within frames
        config.vision_config.depth = 8
        config.vision_config.fullatt_block_indexes = [7]
        calls_expected = {"loop": 2720 / 4, "fused": 32 / 4}
    # the text layers are not run
    config.text_config.num_hidden_layers = 1
    with torch.device("meta"):
        model = model_files.empty_model(config, torch.float32)
        n_patches = 8 * 18 * 26
        pixels = torch.empty(n_patches, 3 * 2 * config.vision_config.patch_size**2)
        # what the tower computes once per pass, before its blocks
        inputs = {"position_ids": torch.empty(n_patches, 2, dtype=torch.long)}
        if shape == "Qwen3-VL-8B":
            inputs |= {"interp_indices": torch.empty(n_patches, 4, dtype=torch.long)}
            inputs |= {"interp_weights": torch.empty(n_patches, 4)}
    for name, tensor in vision.lengths({"video_grid_thw": grid}, config).items():
        inputs[name.removeprefix("video_")] = tensor
    calls = []
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attention(*a, **k))
    found = {}
    for name in ("loop", "fused"):
        calls.clear()
        vision.set_attention(model, name)
        # tensors on "meta" have no values: reading one raises an error
        model.model.visual(pixels, grid_thw=grid.to("meta"), **inputs)
        found[name] = len(calls)
    assert found == calls_expected


def test_a_run_with_all_settings_for_a_gpu_trains_and_saves(run):
    """Guards: an attention in the model's config, from which `final` or the rollout copy cannot be made; settings that
    fit on their own but not together.
    """
    fast = {"vision_attention": "fused", "rollout_compile": "true", "save_every": 1}
    out = run("tgrpo", lora_rank=4, lora_rollout="merged_copy", steps=2, **fast)
    run("evaluate", "eval", model=out / "final", orders="ordered", max_new_tokens=4, vision_attention="fused")
    run("tgrpo", "whole", bf16="true", steps=1, **fast)


def test_a_step_on_another_device_mixes_no_devices_and_hardly_waits(forker, tmp_path):
    """Guards: a tensor that was left on the CPU, which ends a run on a GPU only; a wait for the device per token, per
    completion or per layer in our own code (transformers' waits are not counted).
    """
    status = forker.wait(forker.start(tmp_path / "said", "tests/made_up_device.py"))
    said = (tmp_path / "said").read_text()
    assert status == 0, said[-2000:]
    steps = [json.loads(line) for line in said.split("\n") if line.startswith("{")]
    assert len(steps) == 3
    for step in steps:
        assert step["same_completions"] and step["difference"] < 1e-5
        # each of two rollouts: a prefill, completions to the CPU; compiled decoding: 20 tokens; reference and policy
        assert step["waits"] == {"lengths": 2 + 2, "rollout": 2, "decode": 1}


# of Qwen3-VL-4B, Qwen3-VL-8B and Qwen2.5-VL
@pytest.mark.parametrize("size", [64, 72, 80])
def test_fused_vision_attention_fits_torchs_packed_attention(size):
    """Guards: arguments that torch's attention for packed sequences does not take, which only a GPU would show."""
    bounds = types.SimpleNamespace(tolist=lambda: [0, 64, 80, 208])
    with FakeTensorMode():
        states = [torch.empty(1, 16, 208, size, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
        with patch.object(
            vision, "layout", lambda bounds, device: vision.Layout(torch.empty(4), 128, None, None, None)
        ):
            output, _ = vision.fused_attention(None, *states, None, 0.1, bounds)
    assert output.shape == (1, 208, 16, size) and output.device.type == "cuda"


def with_decode(family="qwen2_5_vl"):
    """A model whose rollouts run through decode(), which compiles nothing on a CPU."""
    model = naive.tiny_policy(family=family)
    model.compiled_rows = 9
    return model


@both_families
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_decode_samples_the_tokens_that_generate_samples(temperature, family):
    """Guards: padding of unequal prompts that is attended to, wrong positions, tokens after the end of a turn, a banned
    token, another distribution.
    """
    model = with_decode(family)
    prompts = naive.mixed_prompts(family)
    found = {}
    for rows in (9, 0):
        model.compiled_rows = rows
        torch.manual_seed(5)
        found[rows] = policy.rollout(model, prompts, [3, 4, 2], naive.tokenizer, temperature, 40)
    assert [c.tolist() for c in found[9]] == [c.tolist() for c in found[0]]
    # some rows end early, and one does not
    assert len({len(completion) for completion in found[9]}) > 1 or not temperature


def test_decode_samples_the_models_distribution():
    """Guards: noise that is used twice or has another distribution, which equal seeds may not show."""
    model = with_decode()
    x = naive.prompt("video", (2, 2, 4), 3, 1)
    model.compiled_rows = n = 4000
    torch.manual_seed(0)
    first = torch.stack([c[0] for c in policy.rollout(model, [x], [n], naive.tokenizer, 1.3, 1)])
    counts = torch.bincount(first, minlength=64)
    banned = [naive.IMAGE, naive.VIDEO]
    allowed = [token for token in range(64) if token not in banned]
    assert counts[banned].sum() == 0
    counts = counts[allowed]
    expected = torch.stack([naive.completion_logps(model, x, torch.tensor([token]), 1.3)[0] for token in allowed])
    expected = expected.exp() * n
    # chi-square over the tokens that are expected at least five times; 99.9 % of samples are below this bound
    squares = ((counts - expected) ** 2 / expected)[expected >= 5]
    assert len(squares) > 20 and squares.sum() < len(squares) + 3.1 * (2 * len(squares)) ** 0.5 + 7


@both_families
def test_decoding_waits_for_the_device_every_16_tokens_and_does_not_repeat_keys(family, monkeypatch):
    """Guards: .item() or a boolean index in the loop, for which the GPU waits at every token; repeated keys."""
    model = with_decode(family)
    x = naive.prompt("video", (2, 2, 4), 3, 1, family=family)
    real = decoding.decode
    calls = Calls()
    key_heads = set()
    attention = F.scaled_dot_product_attention

    def counted(*args, **inputs):
        with calls:
            return real(*args, **inputs)

    def attend(query, key, value, **settings):
        # the cache of the rollout, not of the prompt
        if key.shape[2] == 512:
            key_heads.add(key.shape[1])
        return attention(query, key, value, **settings)

    monkeypatch.setattr(decoding, "decode", counted)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    # no row ends
    monkeypatch.setattr(policy, "eos_ids", lambda *_: [9999])
    policy.rollout(model, [x], [9], naive.tokenizer, 1.0, 40)
    waits = sum(calls.counts[name] for name in ("_local_scalar_dense", "nonzero", "masked_select", "item"))
    assert waits == 2
    assert key_heads == {model.config.text_config.num_key_value_heads}


@pytest.mark.parametrize(
    "shape, options",
    [
        ("tiny_qwen2_5_vl", ""),
        ("tiny_qwen3_vl", "--lora_rank 4 --lora_rollout merged_in_place --vision_attention fused"),
    ],
)
def test_the_gpu_benchmark_runs_on_a_cpu(shape, options, forker, tmp_path):
    """Guards: a GPU script that has never run before someone has a GPU, and fails there."""
    arguments = ["--shape", shape, "--repeats", "1", *options.split()]
    status = forker.wait(forker.start(tmp_path / "said", "bench/gpu.py", *arguments))
    said = (tmp_path / "said").read_text()
    assert status == 0, said[-2000:]
    # memory fragments as shapes change at every step; cuDNN attention would plan each new shape anew
    assert "allocator: expandable_segments:True, cuDNN attention: False" in said
    result = json.loads(said.strip().split("\n")[-1])
    assert all(result[f"rollout, compile {switch}"]["tokens_per_s"] > 0 for switch in ("off", "on"))
    assert result["update"]["seconds"] > 0 and result["peak"]["planned_gb"] > 0
