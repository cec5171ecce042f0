"""Measures speed and memory of one T-GRPO step of Qwen2.5-VL-7B on one GPU. Random weights; nothing is downloaded.

    python bench/gpu.py                      # the 7B shape: a GPU of 80 GB, 40 GB of host memory, a few minutes
    python bench/gpu.py --shape 3b
    python bench/gpu.py --lora_rank 16       # an adapter on this GPU alone
    python bench/gpu.py --shape tiny         # seconds, also on a CPU: does the script run?

    1. rollout: G + S completions of a clip of 16 frames, with rollout_compile off and on
    2. update: reference, model, loss, backward and AdamW, as one rank of --gpus
    3. how often the host waits for the GPU during an update

The other ranks do not exist: in torch's "fake" process group a collective does nothing. Memory and seconds are
therefore those of one GPU of --gpus without the network. Values computed from gathered weights are meaningless and are
not used. The last line has all numbers as JSON.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
import types
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen2_5_VLConfig
from transformers.initialization import no_init_weights

import data
import policy
import tgrpo
from support import distributed, lora, model_files
from tools import plan_memory

TINY = {
    "text": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "vision": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32},
}  # fmt: skip


def shape(name):
    """The model's config: the published shape, or a tiny one with the published vocabulary."""
    if name != "tiny":
        return plan_memory.model_shape(f"Qwen2.5-VL-{name}")
    vision = {"tokens_per_second": 2, "fullatt_block_indexes": [1], "window_size": 112}
    return Qwen2_5_VLConfig(text_config=TINY["text"], vision_config=TINY["vision"] | vision)


def clip_prompt(config, grid, n_tokens, seconds=10.0):
    """A prompt of `n_tokens` tokens with one clip of random pixels; grid (T, H, W) in patches of 14 x 14 pixels."""
    n_patches = grid[0] * grid[1] * grid[2]
    n_clip = n_patches // 4
    before = 15
    after = n_tokens - n_clip - 17
    words = torch.randint(100, 1000, (before + after,)).tolist()
    ids = [
        *words[:before],
        config.vision_start_token_id,
        *[config.video_token_id] * n_clip,
        config.vision_end_token_id,
        *words[before:],
    ]
    ids = torch.tensor([ids])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.video_token_id) * policy.VIDEO,
        "pixel_values_videos": torch.randn(n_patches, 3 * 2 * 14 * 14),
        "video_grid_thw": torch.tensor([grid]),
        "second_per_grid_ts": torch.tensor([seconds / grid[0]]),
    }


def bandwidth_share(model, groups, seconds):
    """Share of the GPU's memory bandwidth that decoding these groups needed at least; {} on a CPU.

    Counts every text weight once per decoding step, plus the KV cache of every row.
    """
    if model.device.type != "cuda":
        return {}
    gpu = torch.cuda.get_device_properties(model.device)
    # bytes per second, at two transfers per clock
    peak = 2 * gpu.memory_clock_rate * 1e3 * gpu.memory_bus_width / 8
    text = model.config.get_text_config()
    weights = sum(p.numel() * p.element_size() for p in model.model.language_model.parameters())
    # An untied head is read at every step; of the embedding only single rows are.
    if model.lm_head.weight is not model.get_input_embeddings().weight:
        weights += model.lm_head.weight.nbytes - model.get_input_embeddings().weight.nbytes
    head_width = text.hidden_size // text.num_attention_heads
    cache_per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_width * model.dtype.itemsize
    longest = 0
    cached_tokens_read = 0
    for group in groups:
        n_prompt = group.sample.ordered["input_ids"].shape[1]
        for completion in [*group.completions, *group.shuffled_completions]:
            n = len(completion)
            longest = max(longest, n)
            # step k reads the prompt and k completion tokens
            cached_tokens_read += n * n_prompt + n * (n + 1) / 2
    bytes_read = longest * weights + cache_per_token * cached_tokens_read
    return {"rollout/bandwidth_share": bytes_read / seconds / peak}


def fake_ranks(n):
    """Make this process rank 0 of `n`."""
    os.environ |= {
        "WORLD_SIZE": str(n),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29999",
    }
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)


def random_model(config, cfg, dtype):
    """Like policy.load_policy, but without a checkpoint: the weights are uninitialised memory."""
    with no_init_weights():
        model = model_files.empty_model(config, dtype)
    model.tie_weights()
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return policy.Policy.of(model)


def timed(device, function):
    """Seconds that `function` takes, including the GPU's work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure_rollout(rollout_model, prompt, cfg, tokenizer, compiled, repeats):
    """(numbers for the result, completions with frames in order) of a rollout of G + S completions."""
    counts = [cfg.num_generations, cfg.shuffled_generations]
    compiled_rows = sum(counts) if compiled else 0
    completions = []

    def sample():
        completions[:] = policy.rollout(
            rollout_model,
            [prompt, prompt],
            counts,
            tokenizer,
            1.0,
            cfg.max_new_tokens,
            compiled_rows=compiled_rows,
        )

    device = rollout_model.device
    first = timed(device, sample)
    seconds = statistics.median(timed(device, sample) for _ in range(repeats))
    ordered = completions[: cfg.num_generations]
    shuffled = completions[cfg.num_generations :]
    group = tgrpo.Group(data.Sample({}, ordered=prompt), ordered, [], shuffled_completions=shuffled)
    share = bandwidth_share(rollout_model, [group], seconds).get("rollout/bandwidth_share")
    n_tokens = sum(len(completion) for completion in completions)
    numbers = {"tokens_per_s": n_tokens / seconds, "bandwidth_share": share, "first_s": first, "seconds": seconds}
    return numbers, ordered


def count_waits(device, function):
    """How often the host waits for the GPU during `function`; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def make_models(config, cfg, accelerator):
    """(policy, optimizer, reference, rollout model), sharded as in tgrpo.py."""
    policy.load_policy = lambda cfg, dtype=torch.float32, *_, **__: random_model(config, cfg, dtype)
    model, optimizer = distributed.prepare(accelerator, policy.load_trainable(cfg, accelerator), cfg)
    model = accelerator.unwrap_model(model)
    reference = policy.load_reference(accelerator, cfg, model)
    return model, optimizer, reference, policy.rollout_copy(accelerator, model, cfg)


def measure_rollouts(rollout_model, prompt, cfg, tokenizer, repeats):
    """({name: numbers}, completions): rollouts with rollout_compile off and on."""
    result = {}
    for compiled, name in ((False, "off"), (True, "on")):
        numbers, completions = measure_rollout(rollout_model, prompt, cfg, tokenizer, compiled, repeats)
        result[f"rollout, compile {name}"] = numbers
        line = f"rollout, rollout_compile {name}: {numbers['tokens_per_s']:.0f} tokens per second"
        if numbers["bandwidth_share"] is not None:
            line += f", {numbers['bandwidth_share']:.0%} of the bandwidth limit"
        print(f"{line}; {numbers['seconds']:.2f} s, the first {numbers['first_s']:.2f} s")
    return result, completions


def measure_update(accelerator, models, prompt, completions, cfg, tokenizer, repeats):
    """Numbers of one update on one prompt: seconds, and how often the host waits for the GPU."""
    model, optimizer, reference, _ = models
    device = accelerator.device
    advantages_G = torch.linspace(-1, 1, len(completions), device=device)
    banned = policy.placeholder_ids(model)

    def forward_and_backward():
        packed = policy.pack(model, [prompt], [completions], tokenizer.pad_token_id)
        with torch.no_grad(), lora.adapter_off(reference):
            ref_logps_GT, _ = policy.completion_logps(reference, packed, 1.0, banned)
        logps_GT, _ = policy.completion_logps(model, packed, 1.0, banned)
        loss_G, _, _ = tgrpo.grpo_loss(
            logps_GT, logps_GT.detach(), ref_logps_GT, advantages_G, packed.mask_NT, 0.2, 0.04
        )
        accelerator.backward(loss_G.mean())

    def update():
        forward_and_backward()
        accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    first = timed(device, update)
    seconds = statistics.median(timed(device, update) for _ in range(repeats))
    waits = count_waits(device, forward_and_backward)
    print(f"update: {seconds:.2f} s, the first {first:.2f} s; the host waits for the GPU {waits} times")
    return {"first_s": first, "seconds": seconds, "waits": waits}


def compare_memory(cfg, config, gpus, n_prompt, grid):
    """Numbers of the peak memory: planned, and measured on a GPU."""
    # The compiled rollout, which ran last, keeps its caches.
    cfg = dataclasses.replace(cfg, rollout_compile=True)
    n_patches = grid[0] * grid[1] * grid[2]
    _, planned = plan_memory.memory_plan(cfg, config, gpus, prompt_tokens=n_prompt, patches=n_patches)
    measured = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    measured_text = "only on a GPU" if measured is None else f"{measured:.1f} GB"
    print(f"peak memory: planned {planned / 1e9:.1f} GB, measured {measured_text}")
    return {"planned_gb": planned / 1e9, "measured_gb": measured}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["7b", "3b", "tiny"], default="7b", help="default: 7b")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs, of which this is one; default: 8")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions after a first one; default: 3")
    parser.add_argument("--lora_rank", type=int, default=0, help="train an adapter; then each GPU is on its own")
    args = parser.parse_args()
    if args.lora_rank:
        args.gpus = 1
    if args.shape == "tiny":
        n_prompt = 40
        n_completion = 8
        grid = (4, 4, 4)
    else:
        n_prompt = 1300
        n_completion = 256
        grid = (8, 16, 30)
    cfg = tgrpo.TGRPOConfig(
        fsdp="none" if args.lora_rank else "full_shard",
        lora_rank=args.lora_rank,
        bf16=True,
        gradient_checkpointing=True,
        batch_size=args.gpus,
        max_new_tokens=n_completion,
    )
    config = shape(args.shape)
    tokenizer = types.SimpleNamespace(eos_token_id=151645, pad_token_id=151643)

    if args.gpus > 1:
        fake_ranks(args.gpus)
    accelerator = distributed.make_accelerator(cfg)
    device = accelerator.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; {args.shape}, one of {args.gpus} ranks")
    print(f"P = {n_prompt}, C = {n_completion}, {cfg.num_generations} + {cfg.shuffled_generations} completions")
    allocator = os.environ.get("PYTORCH_ALLOC_CONF")
    print(f"allocator: {allocator}, cuDNN attention: {torch.backends.cuda.cudnn_sdp_enabled()}")

    models = make_models(config, cfg, accelerator)
    model, _, _, rollout_model = models
    refresh_seconds = timed(device, lambda: policy.refresh(rollout_model, model))
    result = {"shape": args.shape, "gpus": args.gpus, "refresh_s": refresh_seconds}
    with torch.no_grad():
        for parameter in rollout_model.parameters():
            parameter.normal_(0, 0.02)
    if device.type == "cuda":
        print(f"weights, without gradients: {torch.cuda.memory_allocated() / 1e9:.1f} GB")

    prompt = clip_prompt(config, grid, n_prompt)
    rollouts, completions = measure_rollouts(rollout_model, prompt, cfg, tokenizer, args.repeats)
    result.update(rollouts)
    result["update"] = measure_update(accelerator, models, prompt, completions, cfg, tokenizer, args.repeats)
    result["peak"] = compare_memory(cfg, config, args.gpus, n_prompt, grid)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
