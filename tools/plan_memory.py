"""Estimates the memory of one GPU in a T-GRPO step, without a GPU and without the weights.

    python -m tools.plan_memory --config configs/7b.yaml --gpus 8
    python -m tools.plan_memory --config configs/3b_one_gpu.yaml --gpus 1 --card_gb 24

Weights and caches are exact. Activations are estimated from the tensors that a layer saves for its backward pass, which
were counted with saved-tensor hooks; tests/test_memory.py compares the estimate with a measured step.
"""

import argparse
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig

from policy import LOGITS_CHUNK
from support import settings, storage, tables
from support.decoding import compiled_length
from support.lora import add_adapter
from support.model_files import empty_model
from support.settings import UserError
from tgrpo import TGRPOConfig

# Bytes per trained parameter of the float32 weights, of their gradients, and of AdamW's two moments.
MASTER_BYTES = 4
GRADIENT_BYTES = 4
ADAMW_BYTES = 8
# Saved per token of a text layer, in tensors as wide as the hidden state.
TEXT_LAYER_WIDTHS = 11
# The same per patch of a vision block.
VISION_LAYER_WIDTHS = 13
# Saved in addition with bfloat16, because the norms compute in float32.
BF16_NORM_WIDTHS = 2
# Saved per token of any layer, in tensors as wide as its feed-forward part.
FEED_FORWARD_WIDTHS = 4
# With LoRA a text layer saves a tensor as wide as the rank for each of its adapted matrices, ...
ADAPTED_MATRICES = 7
# ... and its norms, which are frozen, do not save their outputs.
FROZEN_NORM_WIDTHS = 2
# Held per token outside the layers: embeddings, final norm and their gradients, in tensors as wide as the hidden state.
OUTER_WIDTHS = 6
# Float32 copies of one chunk of logits: logits, log-softmax and the gradients of both.
LOGITS_COPIES = 4
# One patch is 14 x 14 pixels of two frames; four patches become one token.
PATCH_PIXELS = 14 * 14
# Prompt tokens that are not video.
TEXT_PROMPT_TOKENS = 200

# The published shapes, for a checkpoint that is not downloaded yet.
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
    """Config of the checkpoint `name`, or the published one if the name contains 3B or 7B; else raises UserError."""
    name = storage.adapter_chain(name)[0]
    if (Path(name) / "config.json").is_file():
        return Qwen2_5_VLConfig.from_pretrained(name)
    size = re.search(r"(?<![0-9])[37]b(?![a-z])", name.lower())
    if not size:
        raise UserError(f"tgrpo.model: no checkpoint at {name}, and its name contains neither 3B nor 7B")
    text, vision, tied = SHAPES[size.group()]
    text = {**text, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied}
    return Qwen2_5_VLConfig(text_config=text, vision_config=PUBLISHED_VISION | vision, tie_word_embeddings=tied)


@dataclass
class Step:
    """The sizes of one T-GRPO step on one GPU: numbers of parameters, prompts, tokens per prompt."""

    # all but those of a LoRA adapter
    parameters: int
    trained: int
    is_vision_trained: bool
    text_layer: int
    embedding: int
    is_tied: bool
    # GPUs that share weights, gradients and optimizer
    shards: int
    # bytes per number in computation: 2 for bfloat16, 4 for float32
    number: int
    prompts: int
    micro_prompts: int
    prompt_tokens: int
    patches: int


def step_sizes(cfg, config, gpus, prompt_tokens=None, patches=None):
    """Step for one of `gpus` GPUs. prompt_tokens and patches of a prompt: by default the most that cfg allows."""
    with torch.device("meta"):
        model = empty_model(config, torch.float32)
        parameters = count(model)
        text_layer = count(model.model.language_model.layers[0])
        if cfg.freeze_vision:
            model.model.visual.requires_grad_(False)
        if cfg.lora_rank:
            add_adapter(model, cfg)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    prompts = max(1, cfg.batch_size // gpus)
    patches = patches or cfg.max_frames // 2 * cfg.max_pixels // PATCH_PIXELS
    return Step(
        parameters=parameters,
        trained=trained,
        is_vision_trained=not (cfg.freeze_vision or cfg.lora_rank),
        text_layer=text_layer,
        embedding=model.get_input_embeddings().weight.numel(),
        is_tied=model.lm_head.weight is model.get_input_embeddings().weight,
        shards=gpus if cfg.fsdp == "full_shard" else 1,
        number=2 if cfg.bf16 else 4,
        prompts=prompts,
        micro_prompts=min(cfg.micro_batch_size, prompts),
        prompt_tokens=prompt_tokens or patches // 4 + TEXT_PROMPT_TOKENS,
        patches=patches,
    )


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def resident_bytes(cfg, step):
    """Bytes, by name, that a GPU holds all the time."""
    has_copy = cfg.fsdp == "full_shard" or cfg.bf16
    resident = {
        "weights": MASTER_BYTES * step.parameters / step.shards,
        "gradients": GRADIENT_BYTES * step.trained / step.shards,
        "optimizer (AdamW)": ADAMW_BYTES * step.trained / step.shards,
        "reference": step.number * step.parameters / step.shards if cfg.beta else 0,
        "rollout copy": step.number * step.parameters if has_copy else 0,
    }
    if cfg.lora_rank:
        # the frozen weights are the policy's, the reference's and the rollout's
        resident["weights"] = step.number * step.parameters + MASTER_BYTES * step.trained
        resident["reference"] = 0
        resident["rollout copy"] = 0
    if step.shards > 1:
        # FSDP gathers a layer while it prefetches the next one. The embedding and the head of the policy stay gathered,
        # and so does the head of the reference.
        matrices = 1 if step.is_tied else 2
        if cfg.beta:
            matrices += 1
        resident["gathered layers"] = (2 * step.text_layer + matrices * step.embedding) * step.number
    return resident


def cache_bytes(cfg, text, step):
    """(bytes that stay allocated between rollouts, bytes of the rollout alone) of the KV caches, by name."""
    head_width = text.hidden_size // text.num_attention_heads
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_width * step.number
    completions = cfg.num_generations + cfg.shuffled_generations
    row_tokens = step.prompt_tokens + cfg.max_new_tokens
    # Each frame order of a prompt is computed once and then copied for its completions.
    frame_orders = 2 if cfg.shuffled_generations else 1
    prompt_tokens = frame_orders * step.prompt_tokens
    if not cfg.rollout_compile:
        return {}, {"KV cache (rollout)": per_token * step.prompts * (completions * row_tokens + prompt_tokens)}
    # Compiled decoding keeps one cache for long prompts and one for short ones, with the same number of rows.
    compiled = 2 * per_token * step.prompts * completions * compiled_length(row_tokens)
    return {"KV caches (compiled)": compiled}, {"KV cache (rollout)": per_token * step.prompts * prompt_tokens}


def training_bytes(cfg, text, vision, step):
    """Bytes of activations and logits during the forward and backward pass of one micro-batch."""
    width = text.hidden_size
    norm_widths = BF16_NORM_WIDTHS if cfg.bf16 else 0
    packed_tokens = step.prompt_tokens + cfg.num_generations * cfg.max_new_tokens
    text_widths = TEXT_LAYER_WIDTHS + norm_widths
    if cfg.lora_rank:
        text_widths -= FROZEN_NORM_WIDTHS
    per_text_token = text_widths * width + FEED_FORWARD_WIDTHS * text.intermediate_size
    per_text_token += ADAPTED_MATRICES * cfg.lora_rank
    # With a mask, keys and values are repeated for all heads, and the mask becomes a bias per pair of tokens.
    attention = 2 * packed_tokens * width + packed_tokens**2
    text_layer = packed_tokens * per_text_token + attention

    per_patch = (VISION_LAYER_WIDTHS + norm_widths) * vision.hidden_size
    per_patch += FEED_FORWARD_WIDTHS * vision.intermediate_size
    # a frozen vision tower saves nothing
    patches = step.patches if step.is_vision_trained else 0
    vision_layer = patches * per_patch

    if cfg.gradient_checkpointing:
        # the inputs of all layers, and everything that one layer saves
        inputs = text.num_hidden_layers * packed_tokens * width + vision.depth * patches * vision.hidden_size
        activations = inputs + max(text_layer, vision_layer)
    else:
        activations = text.num_hidden_layers * text_layer + vision.depth * vision_layer
    activations += OUTER_WIDTHS * packed_tokens * width
    # one byte per pair of tokens
    boolean_mask = packed_tokens**2
    return {
        "activations": step.micro_prompts * (step.number * activations + boolean_mask),
        "logits": 4 * LOGITS_COPIES * LOGITS_CHUNK * text.vocab_size,
    }


def stepping_bytes(step):
    """Bytes that AdamW adds while it steps: over all tensors together it holds the roots of the second moments."""
    return {"optimizer step": 4 * step.trained / step.shards}


def memory_plan(cfg, config, gpus, prompt_tokens=None, patches=None):
    """(bytes that one GPU holds in a T-GRPO step, by name; their peak), for the longest completions that cfg allows.

    The KV cache, the activations with the logits, and the optimizer step are never alive at the same time: the peak
    counts only the largest of the three.
    """
    step = step_sizes(cfg, config, gpus, prompt_tokens, patches)
    text = config.get_text_config()
    compiled_caches, rollout = cache_bytes(cfg, text, step)
    resident = resident_bytes(cfg, step) | compiled_caches
    training = training_bytes(cfg, text, config.vision_config, step)
    stepping = stepping_bytes(step)
    largest_phase = max(sum(phase.values()) for phase in (rollout, training, stepping))
    return resident | rollout | training | stepping, sum(resident.values()) + largest_phase


def print_plan(cfg, gpus, card_gb):
    """The plan as a table, and whether it fits into `card_gb`, a tenth of which is left to CUDA and fragmentation."""
    parts, peak = memory_plan(cfg, model_shape(cfg.model), gpus)
    rows = [[name, f"{size / 1e9:.1f}"] for name, size in parts.items()]
    rows.append(["peak", f"{peak / 1e9:.1f}"])
    print(tables.table([f"GPUs: {gpus}, fsdp {cfg.fsdp}, lora_rank {cfg.lora_rank}", "GB per GPU"], rows))
    print("The peak counts only the largest of: KV caches, activations and logits, optimizer step.")
    verdict = "fits" if peak / 1e9 < 0.9 * card_gb else "does not fit"
    print(f"It {verdict} in {card_gb:g} GB with a tenth to spare.")
    if verdict == "does not fit":
        print("Use more GPUs or lora_rank, or lower batch_size, max_frames, max_pixels or max_new_tokens.")


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=partial(settings.convert, kind=int, low=1), default=8)
    parser.add_argument("--card_gb", type=partial(settings.convert, kind=float, low=1), default=80)
    arguments, rest = parser.parse_known_args()
    cfg = settings.load_config(TGRPOConfig, "tgrpo", rest, doc=__doc__)
    settings.require(cfg, "tgrpo", "model")
    print_plan(cfg, arguments.gpus, arguments.card_gb)


if __name__ == "__main__":
    main()
