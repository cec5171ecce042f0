"""Estimates the memory of one GPU in a step of a stage, without a GPU and without the weights.

    python -m tools.plan_memory --config configs/3b_one_gpu.yaml --gpus 1 --card_gb 24  # or 80 GB, and 8 GPUs with fsdp
    python -m tools.plan_memory --config configs/7b.yaml --stage evaluate               # or sft; by default tgrpo

Weights and caches are exact. Activations are estimated from the tensors that a layer saves for its backward pass, which
were counted with saved-tensor hooks; tests/test_memory.py compares the estimate with a measured step.
"""

import argparse
import re
from functools import partial
from pathlib import Path

import torch

from evaluate import EvalConfig
from policy import LOGITS_CHUNK
from sft import SFTConfig
from support import distributed, families, settings, storage, tables, training
from support.decoding import compiled_length
from support.lora import add_adapter
from support.model_files import check_model, check_settings, empty_model, model_config
from tgrpo import TGRPOConfig

CONFIGS = {"sft": SFTConfig, "tgrpo": TGRPOConfig, "evaluate": EvalConfig}
# bytes of a trained weight, of its gradient, and of each of AdamW's two moments
FLOAT32 = 4
# What a text layer saves per token for its backward pass, beside what its norms save, in tensors as wide as: its
# feed-forward part; its attention heads (queries, output, and keys and values, which are repeated for all heads because
# of the mask); the hidden state (outputs of norms); and, per adapted matrix, the LoRA rank.
FEED_FORWARD_WIDTHS = 4
HEADS_WIDTHS = 4
HIDDEN_WIDTHS = 2
ADAPTED_MATRICES = 7
# with bfloat16 a vision block saves more, because norms compute in float32
BF16_NORM_WIDTHS = 2
# what merging patches into tokens saves per patch, in tensors as wide as the hidden state of a vision block
MERGER_WIDTHS = 4
# gradients that the backward pass of a layer holds per token, in tensors as wide as its feed-forward part
GRADIENT_WIDTHS = 2
# held per token outside the layers: embeddings, final norm and their gradients, in tensors as wide as the hidden state
OUTER_WIDTHS = 6
# float32 copies of one chunk of logits: logits, log-softmax and the gradients of both
LOGITS_COPIES = 4
# tokens of a prompt without its video; of a time stamp <123.4 seconds> and the two around its moment; of an SFT target
TEXT_PROMPT_TOKENS = 200
STAMP_TOKENS = 10
TARGET_TOKENS = 1024
# What a text layer holds per token without a backward pass, in tensors as wide as its feed-forward part and as the
# hidden state; a vision block per patch, in float32 tensors as wide as its hidden state, whatever the dtype, because it
# rotates queries and keys in float32.
FORWARD_FEED_FORWARD_WIDTHS = 3
FORWARD_WIDTHS = 6
FORWARD_VISION_WIDTHS = 12


class UnknownModel(settings.UserError):
    """No checkpoint is at this path, and its name has no size."""


def model_shape(name):
    """Config of the checkpoint `name`, or the published one of the size in the name; UnknownModel if neither exists."""
    name = storage.adapter_chain(name)[0]
    if (Path(name) / "config.json").is_file():
        check_model(settings.SharedConfig(model=name), "config")
        return model_config(name)
    plain = re.sub("[^a-z0-9]", "", name.lower())
    known = []
    for model_type, family in families.FAMILIES.items():
        # a name without a family, such as runs/7b/sft/final: the size determines it, because no two families share one
        is_family = model_type.replace("_", "") in plain or "qwen" not in plain
        for size in family.sizes:
            known.append(f"{model_type} {size}")
            if is_family and re.search(rf"(?<![a-z0-9.]){size}(?![a-z0-9])", name.lower()):
                return family.published_config(size)
    raise UnknownModel(f"model: no checkpoint at {name}, and its name is of no known size: {', '.join(known)}")


def longest_prompt(cfg, config):
    """(tokens, patches) of the longest prompt that cfg allows."""
    vision = config.vision_config
    moments = (cfg.max_frames + 1) // 2
    patches = moments * cfg.max_pixels // vision.patch_size**2
    stamps = moments * STAMP_TOKENS if families.of(config).has_time_stamps else 0
    return patches // vision.spatial_merge_size**2 + stamps + TEXT_PROMPT_TOKENS, patches


def head_width(text):
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def memory_plan(cfg, config, gpus, prompt=None):
    """(bytes that one of `gpus` GPUs holds in a T-GRPO step, by name; their peak), for the longest completions.

    prompt: its (tokens, patches), by default the most that cfg allows. The KV cache, the activations with the logits,
    and the optimizer step are never alive at the same time: the peak counts only the largest of the three.
    """
    prompt_tokens, patches = prompt or longest_prompt(cfg, config)
    prompts = max(1, cfg.batch_size // gpus)
    shards = gpus if cfg.fsdp == "full_shard" else 1
    with torch.device("meta"):
        model = empty_model(config, torch.float32)
        weights = model.num_parameters()
        if cfg.freeze_vision:
            model.model.visual.requires_grad_(False)
        if cfg.lora_rank:
            add_adapter(model, cfg)
    trained = model.num_parameters(only_trainable=True)

    compiled_caches, rollout = cache_bytes(cfg, config.get_text_config(), prompts, prompt_tokens)
    resident = resident_bytes(cfg, model, weights, trained, shards) | compiled_caches
    training = training_bytes(cfg, config, min(cfg.micro_batch_size, prompts), prompt_tokens, patches)
    # AdamW then holds the roots of the second moments of all tensors
    stepping = {"optimizer step": FLOAT32 * trained / shards}
    largest_phase = max(sum(phase.values()) for phase in (rollout, training, stepping))
    return resident | rollout | training | stepping, sum(resident.values()) + largest_phase


def resident_bytes(cfg, model, weights, trained, shards):
    """Bytes, by name, that a GPU holds all the time, given how many weights there are and how many are trained."""
    number = distributed.compute_dtype(cfg).itemsize
    resident = {
        "weights": FLOAT32 * weights / shards,
        "gradients": FLOAT32 * trained / shards,
        "optimizer (AdamW)": 2 * FLOAT32 * trained / shards,
        "reference": number * weights / shards if cfg.beta else 0,
        # whole on each GPU
        "rollout copy": number * weights if cfg.fsdp == "full_shard" or cfg.bf16 else 0,
    }
    if cfg.lora_rank:
        # the frozen weights are the policy's, the reference's and, unless merged in a copy, the rollout's
        copy = number * weights if cfg.lora_rollout == "merged_copy" else 0
        resident |= {"weights": number * weights + FLOAT32 * trained, "reference": 0, "rollout copy": copy}
    elif shards > 1:
        # FSDP gathers a layer and, ahead of time, the next one. The embedding and the head of the policy stay gathered,
        # and so does the head of the reference.
        layer = sum(parameter.numel() for parameter in model.model.language_model.layers[0].parameters())
        embedding = model.get_input_embeddings().weight
        matrices = (1 if model.lm_head.weight is embedding else 2) + (1 if cfg.beta else 0)
        resident["gathered layers"] = (2 * layer + matrices * embedding.numel()) * number
    elif cfg.bf16:
        # autocast casts a trained weight once per forward pass and keeps the copy for the backward pass
        resident["autocast copy"] = number * trained
    return resident


def cache_bytes(cfg, text, prompts, prompt_tokens):
    """(bytes that stay allocated between rollouts, bytes of the rollout alone) of the KV caches, by name."""
    number = distributed.compute_dtype(cfg).itemsize
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head_width(text) * number
    completions = prompts * (cfg.num_generations + cfg.shuffled_generations)
    row_tokens = prompt_tokens + cfg.max_new_tokens
    # each frame order of a prompt is computed once and then copied for its completions
    frame_orders = 2 if cfg.shuffled_generations else 1
    of_prompts = per_token * prompts * frame_orders * prompt_tokens
    if not cfg.rollout_compile:
        return {}, {"KV cache (rollout)": per_token * completions * row_tokens + of_prompts}
    # compiled decoding keeps one cache for long prompts and one for short ones, with the same number of rows
    compiled = 2 * per_token * completions * compiled_length(row_tokens)
    return {"KV caches (compiled)": compiled}, {"KV cache (rollout)": of_prompts}


def training_bytes(cfg, config, micro_prompts, prompt_tokens, patches):
    """Bytes of activations and logits during the forward and backward pass of one micro-batch."""
    text = config.get_text_config()
    vision = config.vision_config
    family = families.of(config)
    number = distributed.compute_dtype(cfg).itemsize
    width = text.hidden_size
    heads_width = text.num_attention_heads * head_width(text)
    packed_tokens = prompt_tokens + cfg.num_generations * cfg.max_new_tokens
    normed = 2 * width
    if family.has_head_norms:
        normed += heads_width + text.num_key_value_heads * head_width(text)
    # a norm saves its input in float32, and a trained one also the normed input
    norms = normed * (FLOAT32 // number + (0 if cfg.lora_rank else 1))
    per_text_token = norms + FEED_FORWARD_WIDTHS * text.intermediate_size + HEADS_WIDTHS * heads_width
    per_text_token += HIDDEN_WIDTHS * width + ADAPTED_MATRICES * cfg.lora_rank
    # the mask becomes a bias per pair of tokens
    text_layer = packed_tokens * (per_text_token + packed_tokens)

    # a frozen vision tower saves nothing
    patches = 0 if cfg.freeze_vision or cfg.lora_rank else patches
    vision_widths, feed_forward_widths = family.vision_widths
    vision_widths += BF16_NORM_WIDTHS if cfg.bf16 else 0
    vision_layer = patches * (vision_widths * vision.hidden_size + feed_forward_widths * vision.intermediate_size)
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))

    backward = GRADIENT_WIDTHS * packed_tokens * text.intermediate_size
    if cfg.gradient_checkpointing:
        # the inputs of all layers; the backward pass then computes one layer again, with everything that it saves
        activations = text.num_hidden_layers * packed_tokens * width + vision.depth * patches * vision.hidden_size
        backward = max(text_layer + backward, vision_layer)
    else:
        activations = text.num_hidden_layers * text_layer + vision.depth * vision_layer
    # with LoRA the embeddings have no gradient
    outer_widths = OUTER_WIDTHS - (1 if cfg.lora_rank else 0)
    activations += outer_widths * packed_tokens * width + mergers * MERGER_WIDTHS * patches * vision.hidden_size
    logits = FLOAT32 * LOGITS_COPIES * LOGITS_CHUNK * text.vocab_size
    return {
        # and a mask of one byte per pair of tokens
        "activations": micro_prompts * (number * activations + packed_tokens**2),
        # the logits are gone when the backward pass reaches the layers
        "logits, or a layer": max(logits, micro_prompts * number * backward),
    }


def sft_plan(cfg, config, gpus):
    """Like memory_plan, for a step of SFT: one target of TARGET_TOKENS per prompt, no reference and no rollout."""
    like = TGRPOConfig(**vars(cfg), beta=0.0, num_generations=1, max_new_tokens=TARGET_TOKENS)
    parts, peak = memory_plan(like, config, gpus)
    training = parts["activations"] + parts["logits, or a layer"]
    later = max(parts["KV cache (rollout)"], training, parts["optimizer step"])
    peak += max(training, parts["optimizer step"]) - later - parts["rollout copy"]
    return parts | {"rollout copy": 0, "KV cache (rollout)": 0}, peak


def evaluation_plan(cfg, config, prompt=None):
    """Like memory_plan, for evaluation: whole weights, and a batch of the longest prompts and answers."""
    text = config.get_text_config()
    vision = config.vision_config
    number = distributed.compute_dtype(cfg).itemsize
    prompt_tokens, patches = prompt or longest_prompt(cfg, config)
    with torch.device("meta"):
        weights = number * empty_model(config, torch.float32).num_parameters()
    like = TGRPOConfig(
        bf16=cfg.bf16, num_generations=1, shuffled_generations=0, max_new_tokens=cfg.max_new_tokens, batch_size=1
    )
    _, caches = cache_bytes(like, text, cfg.batch_size, prompt_tokens)

    # in the vision tower, then in the language model; the pixels stay
    patch_bytes = FLOAT32 * FORWARD_VISION_WIDTHS * vision.hidden_size
    token_widths = FORWARD_FEED_FORWARD_WIDTHS * text.intermediate_size + FORWARD_WIDTHS * text.hidden_size
    pixels = FLOAT32 * patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    prefill = cfg.batch_size * (pixels + max(patches * patch_bytes, number * prompt_tokens * token_widths))
    parts = {"weights": weights, **caches, "activations of the prompts": prefill}
    return parts, sum(parts.values())


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=partial(settings.convert, kind=int, low=1))
    parser.add_argument("--card_gb", type=partial(settings.convert, kind=float, low=1), default=80)
    parser.add_argument("--stage", choices=settings.STAGES, default="tgrpo")
    args, rest = parser.parse_known_args()
    cfg = settings.load_config(CONFIGS[args.stage], args.stage, rest, doc=__doc__, required=("model",))
    config = model_shape(cfg.model)
    check_settings(cfg, config)
    gpus = args.gpus or (8 if cfg.fsdp == "full_shard" else 1)
    if args.stage == "evaluate":
        parts, peak = evaluation_plan(cfg, config)
    else:
        training.check_batch_size(cfg, gpus)
        plan = sft_plan if args.stage == "sft" else memory_plan
        parts, peak = plan(cfg, config, gpus)
    rows = [[name, f"{size / 1e9:.1f}"] for name, size in [*parts.items(), ("peak", peak)]]
    print(tables.table([f"{args.stage}, GPUs: {gpus}, fsdp {cfg.fsdp}", "GB per GPU"], rows))
    if args.stage != "evaluate":
        print("The peak counts only the largest of: KV caches, activations and logits, optimizer step.")
    # a tenth is left to CUDA and fragmentation
    verdict = "fits" if peak / 1e9 < 0.9 * args.card_gb else "does not fit"
    print(f"It {verdict} in {args.card_gb:g} GB with a tenth to spare.")


if __name__ == "__main__":
    main()
