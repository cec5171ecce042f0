"""Measures speed and memory of one T-GRPO step of a Qwen-VL on one GPU. Random weights; nothing is downloaded.

    python bench/gpu.py                      # Qwen2.5-VL-7B: a GPU of 80 GB, 40 GB of host memory, a few minutes
    python bench/gpu.py --shape 8b           # Qwen3-VL-8B; each published size belongs to one family
    python bench/gpu.py --lora_rank 16 --lora_rollout merged_copy       # an adapter on this GPU alone
    python bench/gpu.py --vision_attention fused
    python bench/gpu.py --shape tiny_qwen3_vl    # seconds, also on a CPU: does the script run?

    1. rollout: G + S completions of a clip of 16 frames, with rollout_compile off and on
    2. update: reference, model, loss, backward and AdamW, as one rank of --gpus

The other ranks do not exist: in torch's "fake" process group a collective does nothing. Memory and seconds are
therefore those of one GPU of --gpus without the network. Values computed from gathered weights are meaningless and are
not used. The last line has all numbers as JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import naive
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.initialization import no_init_weights

import policy
import tgrpo
from support import distributed, families, lora, model_files
from tools import plan_memory

TINY = [f"tiny_{model_type}" for model_type in families.FAMILIES]


def shape(name):
    """The model's config: the published shape of this size, or a tiny one."""
    if name in TINY:
        return naive.tiny_policy(family=name.removeprefix("tiny_")).config
    return plan_memory.model_shape(name)


def clip_prompt(config, grid, n_tokens):
    """A prompt of `n_tokens` tokens with one clip of random pixels; grid (T, H, W) in patches."""
    clip = {"kind": "video", "grid": grid, "seed": 0, "seconds": 10, "family": config.model_type}
    n_clip = naive.prompt(n_text=0, **clip)["input_ids"].shape[1]
    prompt = naive.prompt(n_text=n_tokens - n_clip, **clip)
    prompt["input_ids"].masked_fill_(prompt["mm_token_type_ids"] > 0, config.video_token_id)
    return prompt


def fake_ranks(n):
    """Make this process rank 0 of `n`."""
    ranks = {"WORLD_SIZE": str(n), "RANK": "0", "LOCAL_RANK": "0"}
    os.environ |= ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)


def random_model(config, cfg, dtype):
    """Like policy.load_policy, but without a checkpoint: the weights are uninitialised memory."""
    with no_init_weights():
        model = model_files.empty_model(config, dtype)
    model.tie_weights()
    return policy.Policy.of(model_files.set_up(model, cfg))


def make_models(config, cfg, accelerator):
    """(policy, optimizer, reference, rollout model), sharded as in tgrpo.py."""
    policy.load_policy = lambda cfg, dtype=torch.float32, *_, **__: random_model(config, cfg, dtype)
    model, optimizer = distributed.prepare(accelerator, policy.load_trainable(cfg, accelerator), cfg)
    model = accelerator.unwrap_model(model)
    reference = policy.load_reference(accelerator, cfg, model)
    return model, optimizer, reference, policy.rollout_copy(accelerator, model, cfg)


def timed(function, repeats):
    """{"first_s", "seconds"}: the first call of `function`, and the median of `repeats` more, with the GPU's work."""
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {"first_s": seconds[0], "seconds": statistics.median(seconds[1:])}


def measure_rollout(rollout_model, prompt, cfg, tokenizer, compiled, repeats):
    """(numbers, the last completions with frames in order) of a rollout of G + S completions."""
    counts = [cfg.num_generations, cfg.shuffled_generations]
    rollout_model.compiled_rows = sum(counts) if compiled else 0
    completions = []

    def sample():
        with lora.merged(rollout_model, cfg.lora_rollout):
            completions[:] = policy.rollout(rollout_model, [prompt] * 2, counts, tokenizer, 1.0, cfg.max_new_tokens)

    numbers = timed(sample, repeats)
    numbers["tokens_per_s"] = sum(map(len, completions)) / numbers["seconds"]
    print(
        f"rollout, rollout_compile {'on' if compiled else 'off'}: {numbers['tokens_per_s']:.0f} tokens per second; "
        f"{numbers['seconds']:.2f} s, the first {numbers['first_s']:.2f} s"
    )
    return numbers, completions[: cfg.num_generations]


def measure_update(accelerator, models, prompt, completions, cfg, tokenizer, repeats):
    """Seconds of one update on one prompt."""
    model, optimizer, reference, _ = models
    advantages_G = torch.linspace(-1, 1, len(completions), device=accelerator.device)
    banned = policy.placeholder_ids(model)

    def update():
        packed = policy.pack(model, [prompt], [completions], tokenizer.pad_token_id)
        with torch.no_grad(), lora.adapter_off(reference):
            ref_logps_GT, _ = policy.completion_logps(reference, packed, 1.0, banned)
        logps_GT, _ = policy.completion_logps(model, packed, 1.0, banned)
        loss_G, _, _ = tgrpo.grpo_loss(
            logps_GT, logps_GT.detach(), ref_logps_GT, advantages_G, packed.mask_NT, cfg.clip_epsilon, cfg.beta
        )
        accelerator.backward(loss_G.mean())
        accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    numbers = timed(update, repeats)
    print(f"update: {numbers['seconds']:.2f} s, the first {numbers['first_s']:.2f} s")
    return numbers


def compare_memory(cfg, config, gpus, prompt):
    """Numbers of the peak memory: planned, and measured on a GPU."""
    n_prompt = prompt["input_ids"].shape[1]
    n_patches = len(prompt["pixel_values_videos"])
    _, planned = plan_memory.memory_plan(cfg, config, gpus, prompt=(n_prompt, n_patches))
    measured = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    measured_text = "only on a GPU" if measured is None else f"{measured:.1f} GB"
    print(f"peak memory: planned {planned / 1e9:.1f} GB, measured {measured_text}")
    return {"planned_gb": planned / 1e9, "measured_gb": measured}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*families.SIZES, *TINY], default="7b", help="default: 7b")
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs, of which this is one; default: 8")
    parser.add_argument("--repeats", type=int, default=3, help="timed repetitions after a first one; default: 3")
    parser.add_argument("--lora_rank", type=int, default=0, help="train an adapter; then each GPU is on its own")
    parser.add_argument("--lora_rollout", default="adapter", help="as in tgrpo.py")
    parser.add_argument("--vision_attention", default="loop", help="as in tgrpo.py")
    args = parser.parse_args()
    gpus = 1 if args.lora_rank else args.gpus
    is_tiny = args.shape in TINY
    cfg = tgrpo.TGRPOConfig(
        fsdp="none" if args.lora_rank else "full_shard",
        lora_rank=args.lora_rank,
        lora_rollout=args.lora_rollout,
        vision_attention=args.vision_attention,
        bf16=True,
        gradient_checkpointing=True,
        batch_size=gpus,
        max_new_tokens=8 if is_tiny else 256,
        # the compiled rollout keeps its caches, which the memory plan counts
        rollout_compile=True,
    )
    config = shape(args.shape)
    prompt = clip_prompt(config, (4, 4, 4), 60) if is_tiny else clip_prompt(config, (8, 16, 30), 1300)
    # <|im_end|> and <|endoftext|> are this far before <|image_pad|>
    tokenizer = types.SimpleNamespace(eos_token_id=config.image_token_id - 10, pad_token_id=config.image_token_id - 12)

    if gpus > 1:
        fake_ranks(gpus)
    accelerator = distributed.make_accelerator(cfg)
    name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; one of {gpus} ranks; {vars(args)}")
    print(f"{prompt['input_ids'].shape[1]} prompt tokens, {cfg.num_generations} + {cfg.shuffled_generations} rows")
    allocator = os.environ.get("PYTORCH_ALLOC_CONF")
    print(f"allocator: {allocator}, cuDNN attention: {torch.backends.cuda.cudnn_sdp_enabled()}")

    models = make_models(config, cfg, accelerator)
    rollout_model = models[-1]
    with torch.no_grad():
        for parameter in rollout_model.parameters():
            parameter.normal_(0, 0.02)

    result = {"shape": args.shape, "gpus": gpus}
    for compiled, switch in ((False, "off"), (True, "on")):
        numbers, completions = measure_rollout(rollout_model, prompt, cfg, tokenizer, compiled, args.repeats)
        result[f"rollout, compile {switch}"] = numbers
    result["update"] = measure_update(accelerator, models, prompt, completions, cfg, tokenizer, args.repeats)
    result["peak"] = compare_memory(cfg, config, gpus, prompt)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
