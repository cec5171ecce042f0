"""Estimates the memory of one GPU in a T-GRPO step, without a GPU and without the weights.

python -m tools.plan_memory --config configs/7b.yaml --gpus 8
"""

import argparse
import re
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig

import settings
from policy import compiled_length, empty_model
from settings import UserError
from tgrpo import TGRPOConfig

# The published shapes, for when the checkpoint is not at hand yet.
PUBLISHED_VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, tokens_per_second=2)


SHAPES = {
    "7b": (
        dict(
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            vocab_size=152064,
        ),
        dict(out_hidden_size=3584),
        False,
    ),
    "3b": (
        dict(
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            vocab_size=151936,
        ),
        dict(out_hidden_size=2048),
        True,
    ),
}


def model_shape(name):
    """Config of the checkpoint, or the published one if its name says 3B or 7B. UserError otherwise."""
    if (Path(name) / "config.json").is_file():
        return Qwen2_5_VLConfig.from_pretrained(name)
    size = re.search(r"(?<![0-9])[37]b(?![a-z])", name.lower())
    if not size:
        raise UserError(
            f"tgrpo.model: no checkpoint at {name}, and its name says neither 3B nor 7B: nothing to plan with"
        )
    text, vision, tied = SHAPES[size.group()]
    text = {**text, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied}
    return Qwen2_5_VLConfig(text_config=text, vision_config=PUBLISHED_VISION | vision, tie_word_embeddings=tied)


def memory_plan(cfg, config, gpus, prompt_tokens=None, patches=None):
    """Bytes that one GPU holds in a T-GRPO step, by name, with the longest completions the settings allow.

    Weights and caches are exact; activations are counted tensor by tensor for the saved inputs of each layer (measured with
    saved-tensor hooks: per token 11 widths + 4 feed-forward widths in float32, 13 and 15 with bfloat16's float32 norms).
    """
    with torch.device("meta"):
        model = empty_model(config, torch.float32)
    text, vision = config.get_text_config(), config.vision_config
    N = sum(p.numel() for p in model.parameters())
    trained = N - sum(p.numel() for p in model.model.visual.parameters()) * cfg.freeze_vision
    layer = sum(p.numel() for p in model.model.language_model.layers[0].parameters())
    embedding = model.get_input_embeddings().weight.numel()
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    shards, size = (gpus if cfg.fsdp == "full_shard" else 1), 2 if cfg.bf16 else 4
    D, G, S, T = text.hidden_size, cfg.num_generations, cfg.shuffled_generations, cfg.max_new_tokens
    rows = max(1, cfg.batch_size // gpus)
    B = min(cfg.micro_batch_size, rows)
    patches = patches or cfg.max_frames // 2 * cfg.max_pixels // 196  # of one clip: 14 x 14 pixels of a pair of frames
    P = prompt_tokens or patches // 4 + 200

    norms = 2 if cfg.bf16 else 0
    L = P + G * T  # one packed row
    text_layer = size * B * (L * ((11 + norms) * D + 4 * text.intermediate_size) + G * T * D + 2 * G * (P + T) * D)
    vision_layer = size * B * patches * ((13 + norms) * vision.hidden_size + 4 * vision.intermediate_size)
    if cfg.gradient_checkpointing:  # the inputs of all layers, and one layer in full
        activations = size * B * (text.num_hidden_layers * L * D + vision.depth * patches * vision.hidden_size) + max(
            text_layer, vision_layer
        )
    else:
        activations = text.num_hidden_layers * text_layer + vision.depth * vision_layer
    cache_token = 2 * text.num_hidden_layers * text.num_key_value_heads * D // text.num_attention_heads * size
    parts = {
        "parameters (float32)": 4 * N / shards,
        "gradients": 4 * trained / shards,
        "optimizer (AdamW)": 8 * trained / shards,
        "reference": size * N / shards if cfg.beta else 0,
        "rollout copy": size * N if cfg.fsdp == "full_shard" or cfg.bf16 else 0,
    }
    if shards > 1:
        # two layers of the policy, its embedding and head; the reference's head stays gathered after its forward
        heads = (1 if tied else 2) + (1 if cfg.beta else 0)
        parts["gathered layers"] = (2 * layer + heads * embedding) * size
    rollout = {"KV cache (rollout)": cache_token * rows * ((G + S) * (P + T) + (1 + (S > 0)) * P)}
    if cfg.rollout_compile:
        # compiled decoding keeps its caches: one for long prompts and one for short ones, with the same rows
        parts["KV caches (compiled)"] = 2 * cache_token * rows * (G + S) * compiled_length(P + T)
        rollout = {"KV cache (rollout)": cache_token * rows * (1 + (S > 0)) * P}
    training = {"activations": activations + 6 * size * B * L * D, "logits": 4 * 4 * 512 * text.vocab_size}
    # AdamW over all tensors together holds the root of the second moments while it steps
    stepping = {"optimizer step": 4 * trained / shards}
    phases = (rollout, training, stepping)
    return parts | rollout | training | stepping, sum(parts.values()) + max(sum(phase.values()) for phase in phases)


def print_plan(cfg, gpus, card=80e9):
    """The plan as a table, and whether it fits on cards of `card` bytes (a tenth is left to CUDA and fragments)."""
    parts, peak = memory_plan(cfg, model_shape(cfg.model), gpus)
    print(
        f"one of {gpus} GPUs, fsdp {cfg.fsdp}, GB (1e9 bytes). The KV cache, the activations with logits, and the optimizer step\n"
        "never exist together; the peak counts only the largest of the three."
    )
    print("\n".join(f"  {name:<24}{size / 1e9:>8.1f}" for name, size in parts.items()))
    verdict = "fits" if peak < 0.9 * card else "does not fit: more GPUs, fewer max_frames, max_pixels or max_new_tokens"
    print(f"  {'peak':<24}{peak / 1e9:>8.1f}   {verdict} in {card / 1e9:.0f} GB (with a tenth to spare)")


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=8)
    own, rest = parser.parse_known_args()
    cfg = settings.load_config(TGRPOConfig, "tgrpo", rest, doc=__doc__)
    settings.require(cfg, "tgrpo", "model")
    print_plan(cfg, own.gpus)


if __name__ == "__main__":
    main()
