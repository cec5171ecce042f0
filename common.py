"""The plumbing every stage shares, once: models, sharding, memory, checkpoints, logs (settings are in settings.py).

Read `data.py` and `rewards.py` first; come back here when a stage script calls one of these:

    load_processor, load_model, Policy      transformers' own classes, and a head that returns log-probs
    mrope_positions                         where each token of a prompt stands in time, row and column
    make_accelerator                        Accelerate, with FSDP switched on from the config
    save_model, save_checkpoint, resume     atomic: a half-written folder is never chosen
    starting_files                          the checkpoint's own config and tokenizer files, kept for `final`
    Log                                     metrics.jsonl, one dict a step

Axes: B rows · L tokens of a row · P tokens of a prompt · N predicted tokens · D hidden size · V vocabulary
      in Packed: N completions · T tokens of the longest completion · M completion tokens of all rows
"""

import argparse
import fcntl
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator, init_empty_weights
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from accelerate.utils.fsdp_utils import fsdp2_prepare_model, merge_fsdp_weights
from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoProcessor,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    StaticCache,
)
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

from settings import (
    SharedConfig,
    UserError,
    append_rows,
    file_hash,
    fingerprint,
    read_jsonl,
    read_yaml,
    sampled_hash,
    write_atomic,
)

# The shapes of a step change with its prompts, and a GPU's memory fragments. Read when torch first allocates there.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

WRAPPED_LAYERS = ["Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock"]
TEXT, IMAGE, VIDEO = 0, 1, 2  # values of mm_token_type_ids


# ------------------------------------------------------------------------------------- processor and model


def check_model(cfg, stage, made_by=None):
    """UserError if `cfg.model` is a local path without a Qwen2.5-VL checkpoint. `made_by`: a command that makes one."""
    is_hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", cfg.model) and not cfg.model.startswith(".")
    is_local = Path(cfg.model).exists() or "/" in cfg.model and Path(cfg.model).parent.is_dir()
    if is_hub_name and not is_local:
        return
    config = Path(cfg.model) / "config.json"
    if config.is_file():
        try:
            kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{config}: not a model's config: {error}") from None
        if kind != "qwen2_5_vl":
            raise UserError(f"{stage}.model: {cfg.model} holds a model of type {kind}; these scripts train qwen2_5_vl")
        return
    hint = f"; make one with: {made_by}" if made_by else ""
    raise UserError(f"{stage}.model: no checkpoint at {cfg.model}{hint}")


def check_hub(model):
    """UserError if `model` is a hub name and the hub is out of reach; transformers would try for minutes."""
    if Path(model).exists() or is_offline_mode():
        return
    try:
        HfApi().model_info(model, timeout=10)
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"model: {model} is neither a folder here nor a model on the hub that you may read") from None
    except (OSError, HTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"model: {model} is no folder here, and the hub cannot be reached: {reason:.200}; with HF_HUB_OFFLINE=1 a copy "
            "in the hub's cache is used"
        ) from None


def load_processor(cfg):
    """The checkpoint's own processor (tokenizer, image and video processor). UserError if it cannot be loaded."""
    check_hub(cfg.model)
    try:
        processor = AutoProcessor.from_pretrained(cfg.model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        if "Unrecognized image processor" in reason:
            reason = (
                "transformers does not know the image processor that preprocessor_config.json names. The hub's first revision "
                "of Qwen2.5-VL names Qwen2_5_VLImageProcessor: write Qwen2VLImageProcessor, which is the same class"
            )
        raise UserError(f"{cfg.model}: its processor cannot be loaded: {reason:.300}") from error
    # older folders have the template in the tokenizer's config only
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not processor.chat_template:
        raise UserError(
            f"{cfg.model}: no chat template, neither in a file chat_template.* nor in tokenizer_config.json"
        )
    return processor


@dataclass
class Packed:
    """Says which tokens of packed rows [prompt, completion 1 … completion G] belong to which of these.

    It is passed to the model in place of an attention mask. All of it is computed once, on the CPU: reading a length
    or an index from the GPU inside a layer would make the host wait.
    """

    longest_prompt: int
    prompt_lengths_B: torch.Tensor
    # the row of each of the N completions
    row_N: torch.Tensor
    # its tokens, in the flattened (B·L); padding points at tokens spread over all rows
    index_NT: torch.Tensor
    # the M tokens that are no padding: their places in the flattened (N·T) and in the flattened (B·L)
    slot_M: torch.Tensor
    token_M: torch.Tensor

    @classmethod
    def of(cls, prompt_lengths, row_N, begins, lengths, total):
        """`begins` and `lengths` are those of the N completions in the flattened rows, `total` = B·L.

        A GPU adds the gradients of equal indices one after the other, so padding must not all point at the same token.
        """
        T = max(lengths)
        steps_T = torch.arange(T)
        index_NT = torch.tensor(begins)[:, None] + steps_T
        valid_NT = steps_T < torch.tensor(lengths)[:, None]
        index_NT[~valid_NT] = torch.arange(int((~valid_NT).sum())) % total
        slot_M = valid_NT.flatten().nonzero()[:, 0]
        token_M = index_NT.flatten()[slot_M]
        return cls(max(prompt_lengths), torch.tensor(prompt_lengths), row_N, index_NT, slot_M, token_M)

    def to(self, device, **_):
        values = [getattr(self, f.name) for f in fields(self)]
        return Packed(*(v.to(device) if isinstance(v, torch.Tensor) else v for v in values))


def packed_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention in which a completion sees its prompt and itself, without the (L, L) pairs of one completion with another.

    Registered with transformers as "packed". query (B, H, L, D), key and value (B, H_kv, L, D); returns (B, L, H, D).
    With an ordinary mask it is transformers' own SDPA. P is the length of the longest prompt; what is computed behind a
    shorter prompt is overwritten.
    """
    mask = attention_mask
    if not isinstance(mask, Packed):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
    key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    (B, H, L, D), (N, T), P = query.shape, mask.index_NT.shape, mask.longest_prompt
    prompts = F.scaled_dot_product_attention(
        query[:, :, :P], key[:, :, :P], value[:, :, :P], is_causal=True, scale=scaling
    )

    def own(x):
        """The completions' own tokens (N, H, T, D)."""
        return x.transpose(1, 2).reshape(B * L, H, D)[mask.index_NT].transpose(1, 2)

    def seen(x):
        """What a completion may look at: its prompt and itself (N, H, P + T, D)."""
        return torch.cat([x[mask.row_N, :, :P], own(x)], 2)

    is_prompt_NP = torch.arange(P, device=query.device) < mask.prompt_lengths_B[mask.row_N, None]
    causal_TT = torch.ones(T, T, dtype=torch.bool, device=query.device).tril()
    visible_NTL = torch.cat([is_prompt_NP[:, None].expand(N, T, P), causal_TT.expand(N, T, T)], 2)
    completions = F.scaled_dot_product_attention(
        own(query), seen(key), seen(value), attn_mask=visible_NTL[:, None], scale=scaling
    )
    output = F.pad(prompts.transpose(1, 2), (0, 0, 0, 0, 0, L - P)).reshape(B * L, H, D)
    completions_MHD = completions.transpose(1, 2).reshape(N * T, H, D)[mask.slot_M]
    return output.index_put((mask.token_M,), completions_MHD).view(B, L, H, D), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


class LogpHead(nn.Linear):
    """The language-model head. Given targets, it returns their log-probs without ever holding (N, V) logits."""

    def forward(self, hidden_ND, targets_N=None, temperature=1.0, banned=(), chunk=512):
        if targets_N is None:
            return super().forward(hidden_ND)
        step = lambda h, t: self._logps(h, t, temperature, banned)
        if torch.is_grad_enabled():  # keep the (chunk, V) logits of one chunk only
            step = lambda h, t: checkpoint(self._logps, h, t, temperature, banned, use_reentrant=False)
        parts = [step(h, t) for h, t in zip(hidden_ND.split(chunk), targets_N.split(chunk))]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _logps(self, hidden_ND, targets_N, temperature, banned):
        logits_NV = F.linear(hidden_ND, self.weight).float() / temperature  # log-softmax is always float32
        # never sampled, so they have no probability here either
        for token in banned:
            logits_NV[:, token] = torch.finfo(torch.float32).min
        log_norm_N = logits_NV.logsumexp(-1)
        logps_N = logits_NV.gather(-1, targets_N[:, None])[:, 0] - log_norm_N
        with torch.no_grad():
            entropy_N = log_norm_N - (logits_NV.softmax(-1) * logits_NV).sum(-1)
        return logps_N, entropy_N


def mrope_positions(prompt, config):
    """M-RoPE positions (3, P) of a prompt's tokens — time, row, column — by the rule Qwen2.5-VL was trained with.

    Text goes on at (largest position so far, of all three axes) + 1. Patch (t, row, column) of a picture or clip that
    starts at s stands at s + (floor(t · tokens_per_second · seconds between temporal patches), row, column); a picture
    has t = 0. So the answer to a two-minute clip begins behind the clip's last moment. transformers 4.49 and 4.51
    compute the same. 4.57 rounds the seconds between patches down to a whole number first. 5.24 goes on after a clip at
    s + max(rows, columns), which lies inside any clip of more than a few seconds.

    `prompt` holds mm_token_type_ids (1, P) and the grids and frame times of its media; `config` is the model's vision
    config. With tokens_per_second 2, patches less than half a second apart share a time position, as those of 16 frames
    of a clip under 4 seconds do.
    """
    grids = {IMAGE: iter(prompt.get("image_grid_thw", ())), VIDEO: iter(prompt.get("video_grid_thw", ()))}
    seconds_per_patch = iter(prompt.get("second_per_grid_ts", ()))
    kinds, lengths = torch.unique_consecutive(prompt["mm_token_type_ids"][0], return_counts=True)
    parts = []
    start = 0
    for kind, length in zip(kinds.tolist(), lengths.tolist()):
        if kind == TEXT:
            part = torch.arange(length).expand(3, -1)
        else:
            T, H, W = next(grids[kind]).tolist()
            time_T = torch.arange(T)
            if kind == VIDEO:
                time_T = (time_T * next(seconds_per_patch) * config.tokens_per_second).long()
            rows = torch.arange(H // config.spatial_merge_size)
            columns = torch.arange(W // config.spatial_merge_size)
            part = torch.stack(torch.meshgrid(time_T, rows, columns, indexing="ij")).flatten(1)
        parts.append(start + part)
        start += int(part.max()) + 1
    return torch.cat(parts, 1)


class Policy(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL whose forward can return log-probs of chosen tokens. Its weights are those of the base class.

    forward(**inputs, position_ids=, predict=, targets=) returns (logps_N, entropy_N) in nats: `predict` (N,) points
    into the flattened (B·L) positions whose next token is wanted, `targets` (N,) are these tokens. The head runs inside
    forward, because under FSDP its weight exists only there. Without `targets` it is the plain model.
    """

    @classmethod
    def of(cls, model):
        """The loaded base model, turned into a Policy in place (transformers knows only the base class's file layout).

        Of the checkpoint's generation settings only the end of a turn is kept: with a penalty or a top-k, rollouts
        would be sampled from another distribution than the one whose log-probs are trained.
        """
        model.__class__ = cls
        model.lm_head.__class__ = LogpHead
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
        return model

    @functools.wraps(Qwen2_5_VLForConditionalGeneration.forward)  # generate() looks at the signature
    def forward(self, *args, predict=None, targets=None, temperature=1.0, banned=(), **inputs):
        if targets is None:
            return super().forward(*args, **inputs, **vision_lengths(inputs, self.config.vision_config))
        if inputs.get("position_ids") is None:
            raise TypeError(
                "position_ids are missing; make them with common.mrope_positions (transformers 5.24 has other ones)"
            )
        inputs.pop("second_per_grid_ts", None)
        if "pixel_values" in inputs:
            inputs = self.pictures_as_videos(**inputs)
        inputs |= vision_lengths(inputs, self.config.vision_config)
        hidden_BLD = self.model(*args, use_cache=False, **inputs).last_hidden_state
        return self.lm_head(hidden_BLD.flatten(0, 1)[predict], targets, temperature, banned)

    def pictures_as_videos(self, input_ids, **inputs):
        """The same inputs with pictures as videos of one moment, so that the vision tower runs once, whatever the
        batch holds.

        The model would run it once for pictures and once for videos. Sharded, all ranks gather its weights together,
        so a rank with both kinds would wait for ever for a rank with videos alone. One picture or video per row.
        """
        media = {}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            pixels = inputs.pop(name, None)
            grid = inputs.pop(f"{kind}_grid_thw", None)
            media[kind] = iter(() if pixels is None else zip(pixels.split(grid.prod(1).tolist()), grid))
        is_picture_BL = input_ids == self.config.image_token_id
        kinds = ["image" if row else "video" for row in is_picture_BL.any(1).tolist()]
        pixels, grids = zip(*(next(media[kind]) for kind in kinds))
        return {
            "input_ids": input_ids.masked_fill(is_picture_BL, self.config.video_token_id),
            **inputs,
            "pixel_values_videos": torch.cat(pixels),
            "video_grid_thw": torch.stack(grids),
        }


def vision_lengths(inputs, config):
    """The lengths of the windows in which the vision blocks attend, on the CPU, as arguments of the model's forward.

    Every vision block reads them as numbers. That is free on the CPU; on the GPU the host would wait in every block.
    """
    lengths = {}
    for kind in ("image", "video"):
        grid = inputs.get(f"{kind}_grid_thw")
        if grid is not None:
            grid = grid.cpu()
            index, windows = get_vision_window_index(
                grid, config.spatial_merge_size, config.window_size, config.patch_size
            )
            lengths[f"{kind}_cu_seqlens"] = get_vision_cu_seqlens(grid)
            lengths[f"{kind}_window_index"] = index
            lengths[f"{kind}_cu_window_seqlens"] = windows
    return lengths


def load_model(cfg, dtype=torch.float32, accelerator=None, device=None):
    """Policy, with PyTorch's own attention kernels. Master weights are float32: bfloat16 would lose updates of 1e-6.

    The model is loaded on the CPU; accelerate then moves or shards it. With `device`, the weights are read straight
    onto that device, for inference. When the model will be sharded, only rank 0 reads the weights and sends them to
    the others, so a machine holds one copy. Raises UserError if the checkpoint's tensors are not the model's.
    """
    if accelerator and is_sharded(accelerator) and not accelerator.is_main_process:
        with init_empty_weights():
            model = empty_model(Qwen2_5_VLConfig.from_pretrained(cfg.model), dtype)
        model.tie_weights()  # the context above has parted them
        model.generation_config = generation_config(cfg.model, model.config)
    else:
        device_map = None if device is None else {"": device}
        model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            cfg.model,
            dtype=dtype,
            attn_implementation="packed",
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        refuse_other_tensors(cfg.model, report)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return Policy.of(model)


def generation_config(model, config):
    """The checkpoint's generation config; if it has none, what from_pretrained makes of its config then."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return GenerationConfig.from_model_config(config)


def refuse_other_tensors(model, report):
    """UserError that names tensors which the checkpoint lacks or should not have. Missing ones would be random."""
    problems = []
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(key if isinstance(key, str) else key[0] for key in report[f"{kind}_keys"])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{kind} {', '.join(names[:3])}{more}")
    if problems:
        raise UserError(f"{model}: these weights are not the model's: {'; '.join(problems)}")


def empty_model(config, dtype):
    return Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="packed")


def load_frozen(accelerator, cfg):
    """A frozen copy of the starting checkpoint: the reference. Sharded like the policy, but without optimizer state."""
    model = load_model(cfg, compute_dtype(cfg), accelerator).eval().requires_grad_(False)
    return fsdp2_prepare_model(accelerator, model) if is_sharded(accelerator) else model.to(accelerator.device)


def compute_dtype(cfg):
    return torch.bfloat16 if cfg.bf16 else torch.float32


@functools.lru_cache(maxsize=4)
def kept_cache(model, rows, room):
    """A static cache for `rows` rows of `room` tokens. The same arguments return the same cache, for up to four shapes.

    A CUDA graph is recorded for fixed addresses, and a new cache at each rollout would have it recorded anew. The cache
    still holds the last rollout: call reset() first.
    """
    return StaticCache(config=model.config.get_text_config(), max_cache_len=room)


def compiled_room(tokens):
    """Tokens that a cache for compiled decoding has room for: multiples of 512, as each size is compiled once."""
    return -(-tokens // 512) * 512


def rollout_copy(accelerator, model, cfg):
    """The model to sample from: the policy itself, or, where it is sharded or trained in bfloat16, a whole copy to refresh().

    generate() on sharded weights would gather all of them for every token. The copy also lets ranks finish on their own.
    """
    policy = accelerator.unwrap_model(model)
    if not is_sharded(accelerator) and not cfg.bf16:
        return policy
    with torch.device(accelerator.device), no_init_weights():
        copy = Policy.of(empty_model(policy.config, compute_dtype(cfg)))
    copy.tie_weights()  # skipped with the initial weights
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


# What an accelerate config may ask for that these scripts do not do: the variable it sets, and its name.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
# What an accelerate config may say about training. Here the stage's own config says it, so these are dropped.
OVERRULED = re.compile(r"FSDP_\w+|ACCELERATE_(USE_FSDP|MIXED_PRECISION|GRADIENT_ACCUMULATION_STEPS|DYNAMO_\w+)")
# Ranks wait for each other while rank 0 loads or saves 30 GB, and at the end of an evaluation. The launcher still
# notices a rank that died at once.
PATIENCE = timedelta(hours=6)


def make_accelerator(cfg, shard=True, **kwargs):
    """Accelerator for this launch. With several processes and `fsdp: full_shard`, prepare() shards the model (FSDP2).

    A user's own accelerate config may say which processes run where, and one with FSDP asks for sharding too. How they
    train is said by `cfg` alone. `shard` False: each process holds a whole model, as in evaluation.

    Raises UserError for DeepSpeed, Megatron-LM and other parallelism.
    """
    for name, library in UNSUPPORTED.items():
        if os.environ.get(name, "false").lower() == "true":
            raise UserError(
                f"the accelerate config asks for {library}, which is not supported here: choose multi-GPU or FSDP"
            )
    asks_for_shards = cfg.fsdp == "full_shard" or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    for name in [name for name in os.environ if OVERRULED.fullmatch(name)]:
        del os.environ[name]

    processes = int(os.environ.get("WORLD_SIZE", 1))
    plugin = fsdp_plugin(cfg) if shard and asks_for_shards and processes > 1 else None
    on_cpu = not torch.cuda.is_available()
    # under FSDP the plugin's policy casts
    autocast = "bf16" if cfg.bf16 and plugin is None else "no"
    accelerator = Accelerator(
        cpu=on_cpu,
        fsdp_plugin=plugin,
        mixed_precision=autocast,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        **kwargs,
    )
    if accelerator.num_processes != processes:
        raise RuntimeError("accelerate did not join the launched processes")
    if plugin and on_cpu and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate knows no FSDP on CPUs; PyTorch does. This turns accelerate's own FSDP2 code on (for the tests).
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    # cuDNN's attention plans each new shape for 30 ms and keeps the plan; here shapes change at every step
    torch.backends.cuda.enable_cudnn_sdp(False)
    return accelerator


def fsdp_plugin(cfg):
    """FSDP2 with float32 master weights; what is not said here would be read from the user's environment."""
    compute = torch.bfloat16 if cfg.bf16 else None
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=WRAPPED_LAYERS,
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
        reshard_after_forward=True,
        cpu_offload=False,
        activation_checkpointing=False,  # the setting gradient_checkpointing does it, in load_model
        cpu_ram_efficient_loading=True,
        state_dict_type="SHARDED_STATE_DICT",
    )


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
    # foreach: the default updates sharded tensors one by one, six times slower
    optimizer = torch.optim.AdamW(
        parameters, lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2), weight_decay=cfg.weight_decay, foreach=True
    )
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
            raise RuntimeError(
                f"three steps in a row had no finite gradient, the last was step {step}; lower lr, or look at the data"
            )
    optimizer.zero_grad()
    return norm


update.skipped_in_a_row = 0


def all_sum(accelerator, values):
    """Sum of each number over the ranks. Collective: every rank must call it, with the same keys."""
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=accelerator.device)
    return dict(zip(values, accelerator.reduce(total, "sum").tolist()))


# ------------------------------------------------------------------------------------------- memory, told beforehand

# The published shapes, for --plan where the checkpoint is not at hand yet.
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
        parts["KV caches (compiled)"] = 2 * cache_token * rows * (G + S) * compiled_room(P + T)
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


# ------------------------------------------------------------------------------------ checkpoints and the end


# The files of a checkpoint, besides its weights, from which a model and its processor are loaded.
STARTING_FILES = (
    "config.json generation_config.json *processor_config.json chat_template.* tokenizer* vocab.* merges.txt "
    "added_tokens.json special_tokens_map.json"
).split()


def starting_files(model):
    """{name: bytes} of a checkpoint's own config, generation config, preprocessor, chat template and tokenizer files.

    `model` is a folder or a hub name. `final` gets these files instead of newly written ones, so whatever loads the
    starting checkpoint loads `final` too: transformers 4.x and older vLLM cannot read what transformers 5 would write.
    """
    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, allow_patterns=STARTING_FILES))
    found = {path for pattern in STARTING_FILES for path in folder.glob(pattern) if path.is_file()}
    return {path.name: path.read_bytes() for path in sorted(found)}


def with_dtype(config, dtype):
    """A copy of a config.json's dict in which every dtype entry (torch_dtype until transformers 4.55) is `dtype`."""
    name = str(dtype).removeprefix("torch.")
    named = {key: with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return named | {key: name for key in ("dtype", "torch_dtype") if key in config}


def save_model(accelerator, model, files, folder, dtype=None):
    """`folder` becomes a checkpoint laid out like the one that `files` (starting_files) are from.

    Collective: every rank must call it. Written whole or not at all.
    """
    state = accelerator.get_state_dict(model)  # gathers the shards; full on rank 0
    if accelerator.is_main_process:
        write_model(state, accelerator.unwrap_model(model).config, files, folder, dtype)
    accelerator.wait_for_everyone()


def write_model(state, config, files, folder, dtype=None):
    """The files of save_model from a full state dict; `dtype` None keeps the weights' own."""
    # the base class, empty: it knows the names of the weights in files
    with torch.device("meta"):
        shell = Qwen2_5_VLForConditionalGeneration(config)
    for name in shell.all_tied_weights_keys:  # the embedding once more; gathered shards hide that
        state.pop(name, None)
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    dtype = next(iter(state.values())).dtype
    temporary = Path(f"{folder}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with room_on_disk(folder):
        shell.save_pretrained(temporary, state_dict=state)
        for written in temporary.glob("*config*.json"):
            written.unlink()
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        settings = json.loads(files["config.json"])
        if "dtype" not in settings:
            settings.setdefault("torch_dtype", None)
        settings = with_dtype(settings, dtype)
        (temporary / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        replace_folder(temporary, Path(folder))


@contextmanager
def room_on_disk(path):
    """Turns a failed write to `path` into one line that says what to do; what was there before stays as it was."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        if isinstance(error, RuntimeError) and "writ" not in str(error):
            raise
        there = checkpoints(Path(path).parent)
        advice = "make room on the disk and start the same command again"
        if there:
            advice += f": it goes on from {there[-1].name}, which is whole"
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}; {advice}") from error


def export(checkpoint, folder):
    """Make a checkpoint of a training run, sharded or not, a plain model in `folder`. On one CPU process, no GPU needed."""
    checkpoint = Path(checkpoint)
    (settings,) = read_yaml(checkpoint.parent / "config.yaml").values()
    with tempfile.TemporaryDirectory(dir=checkpoint.parent) as merged:
        if (checkpoint / "pytorch_model_fsdp_0").is_dir():
            merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), merged)
        source = Path(merged) if any(Path(merged).iterdir()) else checkpoint
        state = {
            name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()
        }
    cfg = SharedConfig(model=settings["model"], bf16=settings["bf16"])
    check_model(cfg, f"{checkpoint}, whose run started from: export")
    config = Qwen2_5_VLConfig.from_pretrained(cfg.model)
    write_model(state, config, starting_files(cfg.model), folder, compute_dtype(cfg))


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
    folder = Path(cfg.output_dir) / f"checkpoint-{step}"
    temporary = folder.with_name(folder.name + ".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    with room_on_disk(folder):
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.copy(Path(cfg.output_dir) / "run.json", temporary)
            write_atomic(temporary / "state.json", json.dumps({"step": step, "files": contents(temporary), **state}))
            replace_folder(temporary, folder)
    if accelerator.is_main_process:
        for old in checkpoints(cfg.output_dir)[: -cfg.keep_checkpoints]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def contents(folder):
    """{file below `folder`: hash of its size and of samples of its bytes}, by which a damaged checkpoint is known."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.name != "state.json")
    return {str(path.relative_to(folder)): sampled_hash(path) for path in files}


def damage(checkpoint):
    """What is wrong with a checkpoint's files, in words; None if nothing is."""
    try:
        expected = json.loads((checkpoint / "state.json").read_text(encoding="utf-8")).get("files", {})
    except (OSError, ValueError) as error:
        return f"state.json cannot be read ({error})"
    found = contents(checkpoint)
    for name, value in expected.items():
        if found.get(name) != value:
            return f"{name} {'is not what was written' if name in found else 'is missing'}"
    return None


def resume(accelerator, checkpoint):
    """Load `checkpoint` (of claim_folder) into what was prepared. Returns its state, {"step": 0} for None.

    Collective: every rank must call it.
    """
    if checkpoint is None:
        return {"step": 0}
    accelerator.load_state(str(checkpoint))
    accelerator.print(f"resumed from {checkpoint}")
    return json.loads((Path(checkpoint) / "state.json").read_text(encoding="utf-8"))


# ------------------------------------------------------------------------------------------ the folder of a run

# Settings that may change when a run is resumed: they say where and how fast it runs, not what is learned. The records
# and the starting weights are compared by their content.
HARMLESS = (
    "model records data_root output_dir num_workers fsdp micro_batch_size gradient_checkpointing max_unreadable steps "
    "save_every keep_checkpoints resume resume_changed print_every save_rollouts rollout_compile plan gpus log_with"
).split()
RUN_FILES = (
    "checkpoint-* damaged-checkpoint-* final final-of-*-steps metrics.jsonl rollouts.jsonl config.yaml run.json"
).split()
held_locks = {}


def claim_folder(accelerator, cfg, stage):
    """Make cfg.output_dir this run's own, before anything slow happens. Returns the checkpoint to go on from, or None.

    With `resume` false an earlier run in the folder is moved aside. Raises UserError if the folder cannot be
    written, if another run works in it, or if its newest checkpoint is of a run that would learn something else.
    Collective.
    """
    chosen = [None]
    if accelerator.is_main_process:
        folder = Path(cfg.output_dir)
        lock_folder(folder)
        if cfg.resume:
            chosen = [newest_whole_checkpoint(accelerator, folder)]
        else:
            move_aside(accelerator, folder)
        now = identity(cfg, stage)
        if chosen[0] is not None:
            check_resumable(accelerator, cfg, chosen[0], now)
        keep_finished(accelerator, cfg, folder, chosen[0])
        write_atomic(folder / "run.json", json.dumps(now, indent=1))
    return broadcast_object_list(chosen)[0]


def lock_folder(folder):
    """Lock `folder` until this process ends, however it ends.

    Raises UserError if the folder cannot be written or another run has it.
    """
    folder = Path(folder)
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; choose another --output_dir") from None
    try:
        # a lock of the process: its children do not inherit it, and the system drops it when the process is gone
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(
            f"{folder}: another run works in this folder: {file.read().strip()}; wait for it, or choose another --output_dir"
        ) from None
    held_locks[str(folder)] = file
    with room_on_disk(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()


def newest_whole_checkpoint(accelerator, folder):
    """The newest checkpoint whose files are what was written, or None if there is no checkpoint.

    Newer ones are damaged: they are named and renamed. Raises UserError if all are.
    """
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        wrong = damage(checkpoint)
        if wrong is None:
            return str(checkpoint)
        aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(checkpoint, aside)
        accelerator.print(f"{checkpoint} is damaged: {wrong}; it is renamed to {aside.name} and not used")
    if found:
        raise UserError(
            f"{folder}: none of its checkpoints is whole; start anew with --resume false (they are moved aside)"
        )
    return None


def move_aside(accelerator, folder):
    """Move what an earlier run left in `folder` into a new folder earlier-1, earlier-2, … below it."""
    there = [path for pattern in RUN_FILES for path in sorted(folder.glob(pattern))]
    if not there:
        return
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    aside = folder / f"earlier-{number}"
    aside.mkdir()
    for path in there:
        os.replace(path, aside / path.name)
    accelerator.print(f"resume is false: the earlier run in {folder} is now in {aside}")


def keep_finished(accelerator, cfg, folder, checkpoint):
    """UserError if `folder` holds a finished run, which starting again would overwrite.

    A run may go on from a checkpoint to more steps; the model of the fewer steps is kept under another name.
    """
    if not (folder / "final").is_dir():
        return
    try:
        steps = json.loads((folder / "run.json").read_text(encoding="utf-8"))["schedule_steps"]
    except OSError:
        steps = len(read_jsonl(folder / "metrics.jsonl"))
    if checkpoint is None or cfg.steps <= steps:
        more = "" if checkpoint is None else ", or go on with more --steps"
        raise UserError(
            f"{folder}: a run of {steps} steps is finished here, its model is {folder / 'final'}; start anew with --resume "
            f"false (the finished run is moved aside), choose another --output_dir{more}"
        )
    kept = folder / f"final-of-{steps}-steps"
    replace_folder(folder / "final", kept)
    accelerator.print(f"going on from {steps} to {cfg.steps} steps; the model of {steps} steps is now {kept}")


def identity(cfg, stage):
    """What the result of a run depends on: its settings, the content of its records, the starting weights."""
    settings = {name: value for name, value in asdict(cfg).items() if name not in HARMLESS}
    return {
        "stage": stage,
        "settings": settings,
        "schedule_steps": cfg.steps,
        "records": file_hash(cfg.records),
        "weights": fingerprint(cfg.model) or cfg.model,
    }


def check_resumable(accelerator, cfg, checkpoint, now):
    """UserError if this run would go on from `checkpoint` as another one than it was made by."""
    path = Path(checkpoint)
    done = int(path.name.split("-")[1])
    if done > cfg.steps:
        raise UserError(
            f"steps: {cfg.steps}, but {path} has done {done} already; ask for more, or start anew with --resume false"
        )
    was_sharded = (path / "pytorch_model_fsdp_0").is_dir()
    if was_sharded != is_sharded(accelerator):
        kinds = ("of whole weights", "of sharded weights")
        raise UserError(
            f"{path}: a checkpoint {kinds[was_sharded]} cannot be resumed in a run {kinds[not was_sharded]}: start it as "
            f"before, or make it a model to start from: python common.py --export {path} --out FOLDER"
        )
    try:
        before = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except OSError:
        accelerator.print(
            f"{path} does not say how it was made; settings, records and starting weights are not compared"
        )
        return
    changed = []
    for name, value in now["settings"].items():
        if before["settings"].get(name) != value:
            changed.append(f"{name} was {before['settings'].get(name)!r}, is {value!r}")
    steps = before["schedule_steps"]
    if steps != cfg.steps and cfg.lr_schedule != "constant":
        changed.append(f"steps was {steps}, is {cfg.steps}, which the {cfg.lr_schedule} schedule depends on")
    if before["records"] != now["records"]:
        changed.append(f"the content of {cfg.records} has changed")
    if before["weights"] != now["weights"]:
        belongs = ", so this policy belongs to another SFT model" if now["stage"] == "tgrpo" else ""
        changed.append(f"the weights in {cfg.model} have changed{belongs}")
    differences = "; ".join(changed)
    if changed and not cfg.resume_changed:
        raise UserError(
            f"{path} was made by another run: {differences}. Start anew with --resume false (the earlier run is moved aside), "
            "choose another --output_dir, or go on all the same with --resume_changed true"
        )
    if changed:
        accelerator.print(f"going on from {path} all the same: {differences}")


def launcher():
    """The process that launched this one, if it is accelerate's or torch's launcher; else None."""
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return os.getppid() if re.search(r"accelerate|torchrun|torch\.distributed", command) else None


class StopSignal:
    """True once the run was asked to stop: by SIGTERM, by Ctrl-C, or by the end of its launcher.

    The loop then saves and leaves with exit status 0. A second Ctrl-C stops at once.
    """

    def __init__(self):
        self.received = False
        self.launcher = launcher()
        signal.signal(signal.SIGTERM, self.ask)
        signal.signal(signal.SIGINT, self.ask)

    def ask(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        # print() must not be called here: the signal may have come in the middle of one
        os.write(2, b"\nstopping after this step; Ctrl-C stops at once, without saving\n")

    @property
    def asked(self):
        return self.received or (self.launcher is not None and os.getppid() != self.launcher)


def after_step(accelerator, cfg, step, stop, state):
    """Checkpoint where one is due. True if the run was asked to stop: it is saved, and the caller leaves.

    Collective: the ranks decide together, or one would leave while the others wait for it.
    """
    asked = all_sum(accelerator, {"stop": float(stop.asked)})["stop"] > 0
    due = cfg.save_every and (step + 1) % cfg.save_every == 0 and step + 1 < cfg.steps
    if asked or due:
        save_checkpoint(accelerator, cfg, step + 1, state)
    if asked:
        accelerator.print(
            f"stopped after {step + 1} of {cfg.steps} steps; the same command goes on from "
            f"{cfg.output_dir}/checkpoint-{step + 1}"
        )
    return asked


# --------------------------------------------------------------------------------------------- batches of a step


def check_batches(cfg, accelerator):
    """UserError, at start-up, for a batch that the processes cannot share evenly."""
    ranks, share = accelerator.num_processes, cfg.batch_size // accelerator.num_processes
    if cfg.batch_size % ranks:
        raise UserError(f"batch_size {cfg.batch_size} does not divide over {ranks} processes")
    if share % min(cfg.micro_batch_size, share):
        raise UserError(
            f"the {share} records of one process do not divide into micro-batches of {cfg.micro_batch_size}"
        )


def micro_batches(items, cfg, accelerator, blank):
    """This rank's share of a step, `micro_batch_size` at a time, each with its weight: 1, or 0 for a blank one.

    Sharded weights are gathered by all ranks together, so every rank must run the same number of forwards. Where an
    unusable record left a rank short, it runs `blank` with weight 0 instead; nothing is learned from it.
    """
    for first in range(0, cfg.batch_size // accelerator.num_processes, cfg.micro_batch_size):
        chunk = items[first : first + cfg.micro_batch_size]
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
        found = gather_object(
            [(f"{s['record']['problem_id']} ({s['record']['path']})", s["error"]) for s in batch if "error" in s]
        )
        for name, reason in found:
            if name not in self.seen:
                accelerator.print(f"skipped {name}: {reason}")
                self.seen[name] = reason
        if len(self.seen) > self.limit * self.n_records:
            raise UserError(
                f"{len(self.seen)} of {self.n_records} records are unusable, more than max_unreadable "
                f"{self.limit} allows; `python data.py --check` lists them. The last: {found[-1][1]}"
            )
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
    """metrics.jsonl, one dict per step, and rollouts.jsonl; `log_with` sends the metrics elsewhere too. Rank 0 writes.

    A resumed run begins by dropping the rows of the steps that it will do again.
    """

    def __init__(self, accelerator, cfg, stage, start_step):
        self.accelerator, self.folder = accelerator, Path(cfg.output_dir)
        self.has_tracker = cfg.log_with != "none"
        if accelerator.is_main_process:
            for path in (self.folder / "metrics.jsonl", self.folder / "rollouts.jsonl"):
                kept = [row for row in read_jsonl(path) if row["step"] < start_step]
                if kept or path.exists():
                    write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
            write_atomic(self.folder / "config.yaml", yaml.safe_dump({stage: asdict(cfg)}, sort_keys=False))
        if cfg.log_with == "tensorboard":
            # the name of a folder in output_dir
            accelerator.init_trackers("tensorboard")
        if cfg.log_with == "wandb":
            accelerator.init_trackers("video-r1", config=asdict(cfg), init_kwargs={"wandb": {"name": cfg.output_dir}})

    def __call__(self, step, metrics):
        self.append("metrics.jsonl", step, [{k: float(f"{v:.6g}") for k, v in metrics.items()}])
        if self.has_tracker:
            self.accelerator.log(metrics, step=step)

    def rollouts(self, step, rows):
        """Collective: every rank hands over its own rows."""
        self.append("rollouts.jsonl", step, gather_object(rows))

    def append(self, name, step, rows):
        if self.accelerator.is_main_process:
            append_rows(self.folder / name, [{"step": step, **row} for row in rows])


def trackers(cfg):
    """Arguments of Accelerator for `log_with`. UserError if that package is not installed."""
    if cfg.log_with == "none":
        return {}
    if find_spec(cfg.log_with) is None:
        raise UserError(f"log_with: {cfg.log_with} is not installed: pip install {cfg.log_with}, or log_with: none")
    return {"log_with": cfg.log_with, "project_dir": cfg.output_dir}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Make a training run's checkpoint a plain model that from_pretrained loads."
    )
    parser.add_argument("--export", required=True, metavar="CHECKPOINT", help="for example runs/7b/tgrpo/checkpoint-50")
    parser.add_argument("--out", required=True, help="folder to write")
    arguments = parser.parse_args()
    export(arguments.export, arguments.out)
