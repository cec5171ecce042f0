"""The plumbing every stage shares, once: models, sharding, memory, checkpoints, logs (settings are in settings.py).

Read `data.py` and `rewards.py` first; come back here when a stage script calls one of these:

    load_processor, load_model, Policy      transformers' own classes, and a head that returns log-probs
    make_accelerator                        Accelerate, with FSDP switched on from the config
    save_model, save_checkpoint, resume     atomic: a half-written folder is never chosen
    Log                                     metrics.jsonl, one dict a step

Axes: B rows · L tokens of a row · N predicted tokens · D hidden size · V vocabulary
"""

import argparse
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator, init_empty_weights
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model, merge_fsdp_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import (AttentionInterface, AttentionMaskInterface, AutoProcessor, GenerationConfig, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration)
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from settings import SharedConfig, UserError, read_jsonl, read_yaml, write_atomic

WRAPPED_LAYERS = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]


# ------------------------------------------------------------------------------------- processor and model


def check_model(cfg, stage, made_by=None):
    """UserError if `cfg.model` is a local path without a checkpoint; `made_by` is the command that makes one."""
    is_hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", cfg.model) and not cfg.model.startswith(".")
    is_local = Path(cfg.model).exists() or "/" in cfg.model and Path(cfg.model).parent.is_dir()
    if (Path(cfg.model) / "config.json").is_file() or is_hub_name and not is_local:
        return
    hint = f"; make one with: {made_by}" if made_by else ""
    raise UserError(f"{stage}.model: no checkpoint at {cfg.model}{hint}")


def load_processor(cfg):
    """The checkpoint's own processor (tokenizer, image and video processor)."""
    return AutoProcessor.from_pretrained(cfg.model)


@dataclass
class Packed:
    """Which tokens of packed rows [prompt, completion 1 … completion G] are which; it takes the place of an attention mask."""

    prompt_lengths_B: torch.Tensor
    row_N: torch.Tensor                                   # the row of each of the N completions
    index_NT: torch.Tensor                                # its tokens, in the flattened (B·L); padding points at token 0
    valid_NT: torch.Tensor                                # False for that padding

    def to(self, device, **_):
        return Packed(*(getattr(self, f.name).to(device) for f in fields(self)))


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention in which a completion sees its prompt and itself, without the (L, L) pairs of one completion with another.

    Registered with transformers as "packed". query (B, H, L, D), key and value (B, H_kv, L, D); returns (B, L, H, D). With an
    ordinary mask it is transformers' own SDPA. P is the longest prompt; what lies behind a shorter one is overwritten.
    """
    if not isinstance(mask := attention_mask, Packed):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    (B, H, L, D), (N, T), P = query.shape, mask.index_NT.shape, int(mask.prompt_lengths_B.max())
    prompts = F.scaled_dot_product_attention(query[:, :, :P], key[:, :, :P], value[:, :, :P], is_causal=True, scale=scaling)

    own = lambda x: x.transpose(1, 2).reshape(B * L, H, D)[mask.index_NT].transpose(1, 2)                # (N, H, T, D)
    seen = lambda x: torch.cat([x[mask.row_N, :, :P], own(x)], 2)                                        # (N, H, P + T, D)
    prompt_NTP = (torch.arange(P, device=query.device) < mask.prompt_lengths_B[mask.row_N, None])[:, None].expand(N, T, P)
    causal_NTT = torch.ones(T, T, dtype=torch.bool, device=query.device).tril().expand(N, T, T)
    completions = F.scaled_dot_product_attention(own(query), seen(key), seen(value), scale=scaling,
                                                 attn_mask=torch.cat([prompt_NTP, causal_NTT], 2)[:, None])
    output = F.pad(prompts.transpose(1, 2), (0, 0, 0, 0, 0, L - P)).reshape(B * L, H, D)
    output = output.index_put((mask.index_NT[mask.valid_NT],), completions.transpose(1, 2)[mask.valid_NT])
    return output.view(B, L, H, D), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


class LogpHead(nn.Linear):
    """The language-model head. Given targets, it returns their log-probs without ever holding (N, V) logits."""

    def forward(self, hidden_ND, targets_N=None, temperature=1.0, banned=(), chunk=512):
        if targets_N is None:
            return super().forward(hidden_ND)
        step = lambda h, t: self._logps(h, t, temperature, banned)
        if torch.is_grad_enabled():                       # keep the (chunk, V) logits of one chunk only
            step = lambda h, t: checkpoint(self._logps, h, t, temperature, banned, use_reentrant=False)
        parts = [step(h, t) for h, t in zip(hidden_ND.split(chunk), targets_N.split(chunk))]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _logps(self, hidden_ND, targets_N, temperature, banned):
        logits_NV = F.linear(hidden_ND, self.weight).float() / temperature      # log-softmax is always float32
        if banned:                                        # never sampled, so they have no probability here either
            logits_NV[:, list(banned)] = torch.finfo(torch.float32).min
        log_norm_N = logits_NV.logsumexp(-1)
        logps_N = logits_NV.gather(-1, targets_N[:, None])[:, 0] - log_norm_N
        with torch.no_grad():
            entropy_N = log_norm_N - (logits_NV.softmax(-1) * logits_NV).sum(-1)
        return logps_N, entropy_N


class Policy(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL whose forward can return log-probs of chosen tokens. Its weights are those of the base class.

    forward(**inputs, predict=, targets=) returns (logps_N, entropy_N) in nats: `predict` (N,) points into the
    flattened (B·L) positions whose next token is wanted, `targets` (N,) are these tokens. The head runs inside
    forward, because under FSDP its weight exists only there. Without `targets` it is the plain model.
    """

    @classmethod
    def of(cls, model):
        """The loaded base model, turned into a Policy in place (transformers knows the file layout of the base class only)."""
        model.__class__, model.lm_head.__class__ = cls, LogpHead
        return model

    @functools.wraps(Qwen2_5_VLForConditionalGeneration.forward)       # generate() looks at the signature
    def forward(self, *args, predict=None, targets=None, temperature=1.0, banned=(), **inputs):
        if targets is None:
            return super().forward(*args, **inputs)
        if "pixel_values" in inputs:
            inputs = self.pictures_as_videos(**inputs)
        hidden_BLD = self.model(*args, use_cache=False, **inputs).last_hidden_state
        return self.lm_head(hidden_BLD.flatten(0, 1)[predict], targets, temperature, banned)

    def pictures_as_videos(self, input_ids, attention_mask=None, mm_token_type_ids=None, position_ids=None, **media):
        """The same inputs, pictures handed over as videos of one moment: then the vision tower runs once, whatever the batch holds.

        The model would run it once for pictures and once for videos. Sharded, all ranks gather its weights together, so a rank
        with both kinds would wait for ever for one with videos alone. One picture or video a row; positions are taken before.
        """
        if position_ids is None:
            grids = {k: v for k, v in media.items() if not k.startswith("pixel")}
            position_ids = self.model.get_rope_index(input_ids, mm_token_type_ids, attention_mask=attention_mask, **grids)[0]
        split = lambda pixels, grid: iter(zip(media[pixels].split(media[grid].prod(1).tolist()), media[grid])) if pixels in media else iter(())
        pictures, videos = split("pixel_values", "image_grid_thw"), split("pixel_values_videos", "video_grid_thw")
        is_picture_BL = input_ids == self.config.image_token_id
        pixels, grid = zip(*(next(pictures if row else videos) for row in is_picture_BL.any(1).tolist()))
        return {"input_ids": input_ids.masked_fill(is_picture_BL, self.config.video_token_id), "attention_mask": attention_mask,
                "position_ids": position_ids, "pixel_values_videos": torch.cat(pixels), "video_grid_thw": torch.stack(grid)}


def load_model(cfg, dtype=torch.float32, accelerator=None):
    """Policy on the CPU, with PyTorch's own attention kernels. Master weights are float32: bfloat16 would lose updates of 1e-6.

    Where it will be sharded only rank 0 reads the weights and the others get them from it: one copy in the memory of a machine.
    """
    if accelerator and is_sharded(accelerator) and not accelerator.is_main_process:
        with init_empty_weights():
            model = empty_model(Qwen2_5_VLConfig.from_pretrained(cfg.model), dtype)
        model.tie_weights()                               # the context above has parted them
        model.generation_config = GenerationConfig.from_pretrained(cfg.model)
    else:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(cfg.model, dtype=dtype, attn_implementation="packed")
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return Policy.of(model)


def empty_model(config, dtype):
    return Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="packed")


def load_frozen(accelerator, cfg):
    """A frozen copy of the starting checkpoint: the reference. Sharded like the policy, but without optimizer state."""
    model = load_model(cfg, compute_dtype(cfg), accelerator).eval().requires_grad_(False)
    return fsdp2_prepare_model(accelerator, model) if is_sharded(accelerator) else model.to(accelerator.device)


def compute_dtype(cfg):
    return torch.bfloat16 if cfg.bf16 else torch.float32


def rollout_copy(accelerator, model, cfg):
    """The model to sample from: the policy itself, or, where it is sharded or trained in bfloat16, a whole copy to refresh().

    generate() on sharded weights would gather all of them for every token. The copy also lets ranks finish on their own.
    """
    policy = accelerator.unwrap_model(model)
    if not is_sharded(accelerator) and not cfg.bf16:
        return policy
    with torch.device(accelerator.device), no_init_weights():
        copy = Policy.of(empty_model(policy.config, compute_dtype(cfg)))
    copy.tie_weights()                                     # skipped with the initial weights
    copy.generation_config = policy.generation_config
    return copy.eval().requires_grad_(False)


@torch.no_grad()
def refresh(copy, model):
    """Copy the weights of `model` into `copy`, one parameter at a time: extra memory of the largest one only.

    Every rank must call it: full_tensor() gathers a parameter's shards from all ranks. The shard is cast first.
    """
    if copy is model:
        return
    target = dict(copy.named_parameters())
    for name, parameter in model.named_parameters():
        parameter = parameter.detach().to(target[name].dtype)
        target[name].copy_(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)


# ---------------------------------------------------------------------------------- Accelerate, sharded or not


def make_accelerator(cfg, **kwargs):
    """Accelerator for this launch; with `fsdp: full_shard` the model handed to prepare() is sharded (FSDP2).

    The plugin is built here, so that `accelerate launch` needs no config file; a user's own FSDP config wins.
    """
    plugin = None
    if cfg.fsdp == "full_shard" and "ACCELERATE_USE_FSDP" not in os.environ:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=WRAPPED_LAYERS,
            state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=True,
            mixed_precision_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16 if cfg.bf16 else None,
                                                        reduce_dtype=torch.float32, cast_forward_inputs=False))
    on_cpu = not torch.cuda.is_available()
    autocast = "bf16" if cfg.bf16 and plugin is None else "no"        # under FSDP the policy above casts
    accelerator = Accelerator(cpu=on_cpu, fsdp_plugin=plugin, mixed_precision=autocast, **kwargs)
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise RuntimeError("accelerate did not join the launched processes")
    if plugin and on_cpu and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate knows no FSDP on CPUs; PyTorch does. This turns accelerate's own FSDP2 code on (for the tests).
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def is_sharded(accelerator):
    return accelerator.distributed_type == DistributedType.FSDP


def seed_everything(*numbers):
    """Seed every generator from these numbers. tgrpo.py does so each step, so that a resumed step samples what it would have."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def to_device(inputs, device):
    return tree_map_only((torch.Tensor, Packed), lambda x: x.to(device, non_blocking=True), inputs)


def learning_rate(step, cfg):
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then `lr_schedule` down to min_lr_ratio."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[cfg.lr_schedule]
    return cfg.lr * (shape if cfg.lr_schedule == "constant" else cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * shape)


def prepare(accelerator, model, cfg):
    """(model, optimizer) ready for training: on their device, sharded or wrapped where the launch asks for it.

    Sharding comes first: ranks whose weights are still to come could not be matched with an optimizer made before.
    """
    if cfg.freeze_vision:
        model.model.visual.requires_grad_(False)
    if is_sharded(accelerator):
        model = fsdp2_prepare_model(accelerator, model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2), weight_decay=cfg.weight_decay)
    return accelerator.prepare(model, optimizer)


def update(accelerator, model, optimizer, step, cfg):
    """One clipped AdamW step. Returns the gradient norm before clipping, of all ranks together.

    A norm that is not finite means no step, on any rank; three in a row end the run (RuntimeError).
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg)
    norm = accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if math.isfinite(norm):
        optimizer.step()
        update.skipped_in_a_row = 0
    else:
        update.skipped_in_a_row += 1
        accelerator.print(f"step {step}: the gradient norm is {norm}; this step is skipped")
        if update.skipped_in_a_row == 3:
            raise RuntimeError(f"three steps in a row had no finite gradient, the last was step {step}; lower lr, or look at the data")
    optimizer.zero_grad()
    return norm


update.skipped_in_a_row = 0


def all_sum(accelerator, values):
    """Sum of each number over the ranks. Collective: every rank must call it, with the same keys."""
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(values, accelerator.reduce(total, "sum").tolist()))


# ------------------------------------------------------------------------------------------- memory, told beforehand

# The published shapes, for --plan where the checkpoint is not at hand yet.
SHAPES = {
    "7b": (dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                vocab_size=152064), dict(out_hidden_size=3584), False),
    "3b": (dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
                vocab_size=151936), dict(out_hidden_size=2048), True),
}


def model_shape(name):
    """Config of the checkpoint, or the published one if its name says 3B or 7B. UserError otherwise."""
    if (Path(name) / "config.json").is_file():
        return Qwen2_5_VLConfig.from_pretrained(name)
    size = re.search(r"(?<![0-9])[37]b(?![a-z])", name.lower())
    if not size:
        raise UserError(f"tgrpo.model: no checkpoint at {name}, and its name says neither 3B nor 7B: nothing to plan with")
    text, vision, tied = SHAPES[size.group()]
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, **vision)
    return Qwen2_5_VLConfig(text_config={**text, "tie_word_embeddings": tied}, vision_config=vision, tie_word_embeddings=tied)


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
    shards, size = (gpus if cfg.fsdp == "full_shard" else 1), 2 if cfg.bf16 else 4
    D, G, S, T = text.hidden_size, cfg.num_generations, cfg.shuffled_generations, cfg.max_new_tokens
    rows = max(1, cfg.batch_size // gpus)
    B = min(cfg.micro_batch_size, rows)
    patches = patches or cfg.max_frames // 2 * cfg.max_pixels // 196       # of one clip: 14 x 14 pixels of a pair of frames
    P = prompt_tokens or patches // 4 + 200

    norms = 2 if cfg.bf16 else 0
    L = P + G * T                                                          # one packed row
    text_layer = size * B * (L * ((11 + norms) * D + 4 * text.intermediate_size) + G * T * D + 2 * G * (P + T) * D)
    vision_layer = size * B * patches * ((13 + norms) * vision.hidden_size + 4 * vision.intermediate_size)
    if cfg.gradient_checkpointing:                                         # the inputs of all layers, and one layer in full
        activations = size * B * (text.num_hidden_layers * L * D + vision.depth * patches * vision.hidden_size) + max(text_layer, vision_layer)
    else:
        activations = text.num_hidden_layers * text_layer + vision.depth * vision_layer
    cache_token = 2 * text.num_hidden_layers * text.num_key_value_heads * D // text.num_attention_heads * size
    parts = {
        "parameters (float32)": 4 * N / shards,
        "gradients": 4 * trained / shards,
        "optimizer (AdamW)": 8 * trained / shards,
        "reference": size * N / shards if cfg.beta else 0,
        "rollout copy": size * N if cfg.fsdp == "full_shard" or cfg.bf16 else 0,
        "gathered layers": (2 * layer + (1 if text.tie_word_embeddings else 2) * embedding) * size if shards > 1 else 0,
    }
    rollout = {"KV cache (rollout)": cache_token * rows * ((G + S) * (P + T) + (1 + (S > 0)) * P)}
    training = {"activations": activations + 6 * size * B * L * D, "logits": 4 * 4 * 512 * text.vocab_size}
    return parts | rollout | training, sum(parts.values()) + max(sum(rollout.values()), sum(training.values()))


def print_plan(cfg, gpus, card=80e9):
    """The plan as a table, and whether it fits on cards of `card` bytes (a tenth is left to CUDA and fragments)."""
    parts, peak = memory_plan(cfg, model_shape(cfg.model), gpus)
    print(f"one of {gpus} GPUs, fsdp {cfg.fsdp}, GB (1e9 bytes); the cache and the activations do not meet, the larger counts")
    print("\n".join(f"  {name:<24}{size / 1e9:>8.1f}" for name, size in parts.items()))
    verdict = "fits" if peak < 0.9 * card else "does not fit: more GPUs, fewer max_frames, max_pixels or max_new_tokens"
    print(f"  {'peak':<24}{peak / 1e9:>8.1f}   {verdict} in {card / 1e9:.0f} GB (with a tenth to spare)")


# ------------------------------------------------------------------------------------ checkpoints and the end


def save_model(accelerator, model, processor, folder, dtype=None):
    """`folder` becomes a checkpoint that from_pretrained and AutoProcessor load. Collective; written whole or not at all."""
    state = accelerator.get_state_dict(model)             # every rank must call it; full on rank 0
    if accelerator.is_main_process:
        inner = accelerator.unwrap_model(model)
        write_model(state, inner.config, inner.generation_config, processor, folder, dtype)
    accelerator.wait_for_everyone()


def write_model(state, config, generation_config, processor, folder, dtype=None):
    """The files of save_model from a full state dict; `dtype` None keeps the weights' own."""
    if config.get_text_config().tie_word_embeddings:
        state.pop("lm_head.weight", None)                 # the embedding once more; gathered shards hide that
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    temporary = Path(f"{folder}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with torch.device("meta"):                            # the base class, empty: it knows the file layout
        shell = Qwen2_5_VLForConditionalGeneration(config)
    shell.config.dtype, shell.generation_config = next(iter(state.values())).dtype, generation_config
    with room_on_disk(folder):
        shell.save_pretrained(temporary, state_dict=state)
        processor.save_pretrained(temporary)
        replace_folder(temporary, Path(folder))


@contextmanager
def room_on_disk(folder):
    """Turns a failed write into one line that says what to do; what was there before stays as it was."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:          # torch and safetensors have their own for a full disk
        if isinstance(error, RuntimeError) and "writ" not in str(error):
            raise
        raise UserError(f"cannot write {folder}: {str(error).splitlines()[0]}; earlier checkpoints are whole: make room on the "
                        "disk and start the same command again, it goes on from the newest") from error


def export(checkpoint, folder):
    """Make a checkpoint of a training run, sharded or not, a plain model in `folder`. On one CPU process, no GPU needed."""
    checkpoint = Path(checkpoint)
    (settings,) = read_yaml(checkpoint.parent / "config.yaml").values()
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as merged:
        if (checkpoint / "pytorch_model_fsdp_0").is_dir():
            merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), merged)
        source = Path(merged) if any(Path(merged).iterdir()) else checkpoint
        state = {name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    cfg = SharedConfig(model=settings["model"], bf16=settings["bf16"])
    write_model(state, Qwen2_5_VLConfig.from_pretrained(cfg.model), GenerationConfig.from_pretrained(cfg.model), load_processor(cfg),
                folder, compute_dtype(cfg))


def replace_folder(new, old):
    """Put the finished folder `new` where `old` is."""
    if old.exists():
        trash = old.with_name(f".{old.name}.old")
        shutil.rmtree(trash, ignore_errors=True)
        os.replace(old, trash)
        os.replace(new, old)
        shutil.rmtree(trash)
    else:
        os.replace(new, old)


def checkpoints(output_dir):
    """Finished checkpoints, oldest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def save_checkpoint(accelerator, cfg, step, state):
    """All that is needed to go on after `step` finished steps. Collective. A checkpoint appears whole or not at all."""
    temporary = Path(cfg.output_dir) / f"checkpoint-{step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    with room_on_disk(temporary):
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_atomic(temporary / "state.json", json.dumps({"step": step, **state}))
            replace_folder(temporary, Path(cfg.output_dir) / f"checkpoint-{step}")
    if accelerator.is_main_process:
        for old in checkpoints(cfg.output_dir)[:-cfg.keep_checkpoints]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator, cfg):
    """Load the newest checkpoint into what was prepared. Returns its state dict, {"step": 0} if there is none."""
    found = checkpoints(cfg.output_dir) if cfg.resume else []
    if not found:
        return {"step": 0}
    accelerator.load_state(str(found[-1]))
    accelerator.print(f"resumed from {found[-1]}")
    return json.loads((found[-1] / "state.json").read_text())


class StopSignal:
    """True once the process was asked to stop (SIGTERM): the loop then saves and leaves with exit status 0."""

    asked = False

    def __init__(self):
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "asked", True))


def after_step(accelerator, cfg, step, stop, state):
    """Checkpoint where one is due. True if the run was asked to stop: it is saved, and the caller leaves.

    Collective: the ranks decide together, or one would leave while the others wait for it.
    """
    asked = all_sum(accelerator, {"stop": float(stop.asked)})["stop"] > 0
    due = cfg.save_every and (step + 1) % cfg.save_every == 0 and step + 1 < cfg.steps
    if asked or due:
        save_checkpoint(accelerator, cfg, step + 1, state)
    if asked:
        accelerator.print(f"stopped after step {step}; the same command goes on from {cfg.output_dir}/checkpoint-{step + 1}")
    return asked


# --------------------------------------------------------------------------------------------- batches of a step


def check_batches(cfg, accelerator):
    """UserError, at start-up, for a batch that the processes cannot share evenly."""
    ranks, share = accelerator.num_processes, cfg.batch_size // accelerator.num_processes
    if cfg.batch_size % ranks:
        raise UserError(f"batch_size {cfg.batch_size} does not divide over {ranks} processes")
    if share % min(cfg.micro_batch_size, share):
        raise UserError(f"the {share} records of one process do not divide into micro-batches of {cfg.micro_batch_size}")


def micro_batches(items, cfg, accelerator, blank):
    """This rank's share of a step, `micro_batch_size` at a time, each with its weight: 1, or 0 for a blank one.

    Sharded weights are gathered by all ranks together, so every rank must run the same number of forwards. Where an
    unusable record left a rank short, it runs `blank` with weight 0 instead; nothing is learned from it.
    """
    for first in range(0, cfg.batch_size // accelerator.num_processes, cfg.micro_batch_size):
        chunk = items[first:first + cfg.micro_batch_size]
        if chunk or accelerator.num_processes > 1:
            yield (chunk, 1.0) if chunk else ([blank], 0.0)


class Skipped:
    """Counts and names bad rows and records whose media are unusable; stops the run past `max_unreadable` of all rows.

    bad_rows: {name: reason}, known since the records were loaded. seen: the same of those met before a resume.
    """

    def __init__(self, accelerator, cfg, n_records, bad_rows, seen=()):
        self.limit = cfg.max_unreadable
        self.n_records = n_records + len(bad_rows)
        self.seen = dict(bad_rows) | dict(seen)
        for name, reason in bad_rows.items():
            accelerator.print(f"skipped {name}: {reason}")

    def __len__(self):
        return len(self.seen)

    def drop(self, accelerator, batch):
        """The readable samples of this rank's batch. Collective: all ranks learn of every unusable record."""
        found = gather_object([(f"{s['record']['problem_id']} ({s['record']['path']})", s["error"]) for s in batch if "error" in s])
        for name, reason in found:
            if name not in self.seen:
                accelerator.print(f"skipped {name}: {reason}")
                self.seen[name] = reason
        if len(self.seen) > self.limit * self.n_records:
            raise UserError(f"{len(self.seen)} of {self.n_records} records are unusable, more than max_unreadable "
                            f"{self.limit} allows; `python data.py --check` lists them. The last: {found[-1][1]}")
        return [s for s in batch if "error" not in s]

    def report(self, accelerator):
        if self.seen:
            accelerator.print(f"{len(self.seen)} unusable records were skipped: " + ", ".join(self.seen))


class Means:
    """Means over everything added on all ranks, each with its own weight."""

    def __init__(self):
        self.sums, self.weights = {}, {}

    def add(self, values, weight=1.0):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + weight * value
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def reduce(self, accelerator):
        """{name: mean}. Collective; a name need not be known on every rank."""
        parts = gather_object([(self.sums, self.weights)])
        names = sorted({name for sums, _ in parts for name in sums})
        total = lambda index, name: sum(part[index].get(name, 0.0) for part in parts)
        return {name: total(0, name) / total(1, name) for name in names if total(1, name)}


def peak_memory(accelerator):
    """{"memory/peak_gb": most that tensors have held on this GPU so far, in 1e9 bytes}; empty on a CPU."""
    return {"memory/peak_gb": torch.cuda.max_memory_allocated() / 1e9} if accelerator.device.type == "cuda" else {}


class Timer:
    """Seconds between laps, by name."""

    def __init__(self):
        self.last, self.laps = time.perf_counter(), {}

    def lap(self, name):
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.laps[f"time/{name}"] = self.laps.get(f"time/{name}", 0.0) + seconds
        return seconds

    def report(self):
        laps, self.laps = self.laps, {}
        return laps


# -------------------------------------------------------------------------------------------------------- log


class Log:
    """metrics.jsonl, one dict a step, and rollouts.jsonl; TensorBoard beside them if installed. Only rank 0 writes.

    A resumed run begins by dropping the rows of the steps that it will do again.
    """

    def __init__(self, accelerator, cfg, stage, start_step):
        self.accelerator, self.folder = accelerator, Path(cfg.output_dir)
        if accelerator.is_main_process:
            for path in (self.folder / "metrics.jsonl", self.folder / "rollouts.jsonl"):
                kept = [row for row in read_jsonl(path) if row["step"] < start_step]
                if kept or path.exists():
                    write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
            write_atomic(self.folder / "config.yaml", yaml.safe_dump({stage: asdict(cfg)}, sort_keys=False))
        if accelerator.log_with:
            accelerator.init_trackers("tensorboard")

    def __call__(self, step, metrics):
        self.append("metrics.jsonl", step, [{k: float(f"{v:.6g}") for k, v in metrics.items()}])
        if self.accelerator.log_with:
            self.accelerator.log(metrics, step=step)

    def rollouts(self, step, rows):
        """Collective: every rank hands over its own rows."""
        self.append("rollouts.jsonl", step, gather_object(rows))

    def append(self, name, step, rows):
        if self.accelerator.is_main_process:
            with open(self.folder / name, "a") as file:
                file.write("".join(json.dumps({"step": step, **row}) + "\n" for row in rows))


def trackers(cfg):
    """Arguments of Accelerator for TensorBoard, empty where it is not installed."""
    return {"log_with": "tensorboard", "project_dir": cfg.output_dir} if find_spec("tensorboard") else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a training run's checkpoint a plain model that from_pretrained loads.")
    parser.add_argument("--export", required=True, metavar="CHECKPOINT", help="for example runs/7b/tgrpo/checkpoint-50")
    parser.add_argument("--out", required=True, help="folder to write")
    arguments = parser.parse_args()
    export(arguments.export, arguments.out)
