"""What makes a step slow on a GPU and can be counted on a CPU: waits for the device, compilations, kept caches."""

import json
import subprocess
import sys
from pathlib import Path

import naive
import pytest
import torch
from transformers import CompileConfig
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

import policy
from bench import speed
from support import decoding, distributed

ROOT = Path(__file__).parent.parent


def mixed_pack(model):
    """Three prompts, one of them a picture, with completions of very unequal length."""
    generator = torch.Generator().manual_seed(0)
    groups = [
        [torch.randint(3, 50, (n,), generator=generator) for n in lengths]
        for lengths in ((1, 60, 7), (12, 2, 3), (5, 5, 33))
    ]
    return policy.pack(model, naive.mixed_prompts(), groups, naive.PAD)


def test_the_text_layers_never_read_a_value_from_the_device():
    """Guards: int(tensor.max()) or a boolean index in a layer: the host would wait in each of 28 layers."""
    model = naive.tiny_policy()
    inputs = mixed_pack(model).inputs
    B, L = inputs["input_ids"].shape
    # tensors without values: reading one raises an error
    layers = model.model.language_model.to("meta")
    inputs = distributed.to_device(inputs, "meta")
    hidden_BLD = torch.empty(B, L, model.config.text_config.hidden_size, device="meta")
    output = layers(
        inputs_embeds=hidden_BLD,
        position_ids=inputs["position_ids"],
        attention_mask=inputs["attention_mask"],
        use_cache=False,
    )
    assert output.last_hidden_state.shape == hidden_BLD.shape


def test_vision_window_lengths_are_on_the_cpu(monkeypatch):
    """Guards: lengths that every vision block reads from the GPU, in the loss or in the prefill; lengths of another
    batch.
    """
    model = naive.tiny_policy()
    config = model.config.vision_config
    packed = mixed_pack(model)
    seen = []
    model.model.visual.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    policy.completion_logps(model, packed)
    policy.rollout(model, naive.mixed_prompts(), [1, 1, 1], naive.tokenizer, 1.0, 2)
    # the loss and the prefill
    assert [len(kwargs["grid_thw"]) for kwargs in seen] == [3, 3]
    for kwargs in seen:
        grid = kwargs["grid_thw"]
        index, windows = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)
        expected = {"cu_seqlens": get_vision_cu_seqlens(grid), "window_index": index, "cu_window_seqlens": windows}
        for name, value in expected.items():
            assert torch.equal(kwargs[name], value)
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self) or self)
    decoding.vision_lengths({"video_grid_thw": grid}, config)
    assert len(moved) == 1 and moved[0] is grid


def test_compiled_rollouts_compile_once_per_shape_and_reuse_their_cache(monkeypatch):
    """Guards: a new static cache per rollout, so that CUDA graphs are recorded again at every step."""
    model = naive.tiny_policy()
    graphs = []
    addresses = {}

    def backend(graph, inputs):
        """Counts compilations, and the caches that the compiled code is called with."""
        graphs.append(graph)

        def call(*args):
            for x in args:
                if isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[2] >= 512:
                    addresses.setdefault(x.shape[2], set()).add(x.data_ptr())
            return graph.forward(*args)

        return call

    real = model.generate

    def on_a_cpu_too(**inputs):
        config = inputs["generation_config"].compile_config
        inputs["generation_config"].compile_config = CompileConfig(backend=backend, mode=None, dynamic=config.dynamic)
        inputs["generation_config"].compile_config._compile_all_devices = True
        return real(**inputs)

    for n_text in (3, 600, 9, 700):
        x = naive.prompt("video", (2, 2, 4), n_text, n_text)
        monkeypatch.setattr(model, "generate", on_a_cpu_too)
        torch.manual_seed(n_text)
        model.compiled_rows = 4
        compiled = policy.rollout(model, [x], [4], naive.tokenizer, 1.0, 6)
        assert len(policy.rollout(model, [x], [3], naive.tokenizer, 1.0, 6)) == 3
        model.compiled_rows = 0
        monkeypatch.setattr(model, "generate", real)
        torch.manual_seed(n_text)
        plain = policy.rollout(model, [x], [4], naive.tokenizer, 1.0, 6)
        assert [c.tolist() for c in compiled] == [c.tolist() for c in plain]
    layers = 2
    keys_and_values = 2
    found = {room: len(caches) for room, caches in addresses.items()}
    assert found == dict.fromkeys((512, 1024), layers * keys_and_values)
    assert len(graphs) == 2


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_gpu_benchmark_runs_on_a_cpu(lora_rank):
    """Guards: a GPU script that has never run before someone has a GPU, and fails there."""
    command = [sys.executable, "bench/gpu.py", "--shape", "tiny", "--repeats", "1", "--lora_rank", str(lora_rank)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    # memory fragments as shapes change at every step; cuDNN attention would plan each new shape anew
    assert "allocator: expandable_segments:True, cuDNN attention: False" in done.stdout
    result = json.loads(done.stdout.strip().split("\n")[-1])
    assert all(result[f"rollout, compile {switch}"]["tokens_per_s"] > 0 for switch in ("off", "on"))
    assert result["update"]["seconds"] > 0 and result["peak"]["planned_gb"] > 0


def test_the_contestants_of_the_comparison_train(tmp_path):
    """Guards: a benchmark that fails, or a contestant that skips its update and looks fast."""
    step = speed.Step(tmp_path / "model", "64x8")
    before = step.model.lm_head.weight.detach().clone()
    for contestant in speed.CONTESTANTS.values():
        contestant(step)
        assert not torch.equal(step.model.lm_head.weight, before)
        before = step.model.lm_head.weight.detach().clone()
