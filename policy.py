"""Qwen2.5-VL as a policy: load it, sample completions from it, and score completions with it.

    load_processor, load_model, load_frozen     transformers' own classes, and a head that returns log-probs
    mrope_positions                             where each token of a prompt stands in time, row and column
    rollout(model, prompts, counts, ...)        sample n completions for each prompt
    pack, token_logps                           log-probs of given completions, differentiable
    save_model, starting_files                  a checkpoint laid out like the one that training started from

Axes: B rows · L tokens of a row · P tokens of a prompt · N predicted tokens · D hidden size · V vocabulary
      in Packed: N completions · T tokens of the longest completion · M completion tokens of all rows
"""

import functools
import json
import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from huggingface_hub import HfApi, is_offline_mode, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoProcessor,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    StaticCache,
)
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

import common
import data
from common import compute_dtype, is_sharded, replace_folder, room_on_disk
from settings import UserError

TEXT, IMAGE, VIDEO = 0, 1, 2  # values of mm_token_type_ids


# -------------------------------------------------------------------------------------------------- processor and model


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
                "position_ids are missing; make them with policy.mrope_positions (transformers 5.24 has other ones)"
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


# ------------------------------------------------------------------------------------------------------------ positions


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


# -------------------------------------------------------------------------------------------------------------- rollout


@torch.no_grad()
def rollout(model, prompts, counts, tokenizer, temperature, max_new_tokens, top_p=1.0, compiled_rows=0):
    """Sample `counts[n]` completions of prompt n, all prompts in one batch. temperature 0 is greedy.

    The vision tower and the prompt run once per prompt; the cache is then repeated and HF generate goes on from there.
    Positions are handed over, so the model's own `rope_deltas` (state of whatever ran last) are never used.
    `compiled_rows` > 0 compiles decoding, for batches filled up to this many rows: a shape is compiled once, and a
    row more costs almost no time on a GPU.
    Returns a list of 1-D tensors of token ids, prompt by prompt, each up to and including its first end-of-turn token.
    """
    was_training = model.training
    model.eval()  # generate() under gradient checkpointing drops its cache
    positions_NP3 = [mrope_positions(x, model.config.vision_config).T for x in prompts]
    positions = data.pad(positions_NP3, 0, "left").permute(2, 0, 1).to(model.device)
    batch = common.to_device(data.collate_prompts(prompts, tokenizer.pad_token_id), model.device)
    ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
    prefix = DynamicCache(config=model.config.get_text_config())
    model(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[..., :-1],
        **batch,
        cache=prefix,
        use_cache=True,
        logits_to_keep=1,
    )  # the last prompt token is left to generate()

    rows = torch.arange(len(prompts), device=model.device).repeat_interleave(torch.tensor(counts, device=model.device))
    room = ids.shape[1] + max_new_tokens
    if compiled_rows:
        rows = torch.cat([rows, rows.new_zeros(max(0, compiled_rows - len(rows)))])
        cache = kept_cache(model, len(rows), compiled_room(room))
        cache.reset()
    else:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=room)
    for layer, filled in zip(cache.layers, prefix.layers):  # room for all tokens once: a growing cache is
        layer.update(filled.keys[rows], filled.values[rows])  # copied whole for every token
    ends = eos_ids(model, tokenizer)
    sampling = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        suppress_tokens=placeholder_ids(model),
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        disable_compile=not compiled_rows,
    )
    if compiled_rows:
        sampling.compile_config = CompileConfig(dynamic=False)
    if temperature > 0:
        # top_k 0 and top_p 1 must be said: unsaid, top_k is 50
        sampling.update(temperature=temperature, top_k=0, top_p=top_p)
    output = model.generate(
        input_ids=ids[rows],
        attention_mask=mask[rows],
        position_ids=positions[:, rows],
        cache=cache,
        generation_config=sampling,
    )
    model.train(was_training)
    completions_BT = output[: sum(counts), ids.shape[1] :]
    lengths_B = completion_mask(completions_BT, ends).sum(1)
    return [row[:n] for row, n in zip(completions_BT, lengths_B)]


def placeholder_ids(model):
    """Tokens that stand for pixels: a completion that held one would have no pixels for it. Banned in sampling."""
    return [model.config.image_token_id, model.config.video_token_id]


def eos_ids(model, tokenizer):
    """Tokens that end a completion: the tokenizer's, and those of the checkpoint's generation config."""
    listed = model.generation_config.eos_token_id
    return sorted(
        {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [] if listed is None else [listed])}
    )


def completion_mask(ids_GT, eos_ids):
    """True up to and including the first end-of-turn token: stopping is an action, so it is trained too."""
    is_eos_GT = torch.isin(ids_GT, torch.tensor(eos_ids, device=ids_GT.device)).int()
    return is_eos_GT.cumsum(1) - is_eos_GT == 0


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


# --------------------------------------------------------------------------------------------- log-probs of completions


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


def pack(model, prompts, completions, pad_id):
    """Rows [prompt, completion 1 … completion G]: every prompt is computed once for its whole group.

    `prompts` B inputs, `completions` B lists of 1-D tensors, N in all. A completion sees the prompt and itself (see
    packed_attention), and its positions go on from the prompt's. Returns (inputs, predict, targets), which are
    arguments of Policy.forward.
    """
    ids, positions, lengths = [], [], [len(c) for group in completions for c in group]
    for x, group in zip(prompts, completions):
        prompt_positions = mrope_positions(x, model.config.vision_config)
        own = torch.cat([torch.arange(len(c)) for c in group]) + prompt_positions.max() + 1
        ids.append(torch.cat([x["input_ids"][0], *(c.cpu() for c in group)]))
        positions.append(torch.cat([prompt_positions, own.expand(3, -1)], 1))
    L = max(len(row) for row in ids)

    prompt_lengths = [x["input_ids"].shape[1] for x in prompts]
    begins = []
    for b, (P, group) in enumerate(zip(prompt_lengths, completions)):
        for i in range(len(group)):
            begins.append(b * L + P + sum(len(c) for c in group[:i]))
    row_N = torch.arange(len(prompts)).repeat_interleave(torch.tensor([len(group) for group in completions]))
    packed = Packed.of(prompt_lengths, row_N, begins, lengths, len(prompts) * L)
    # a completion's first token is predicted by the last of its prompt, each other one by the token before it
    last_N = row_N * L + packed.prompt_lengths_B[row_N] - 1
    predict_NT = torch.cat([last_N[:, None], packed.index_NT[:, :-1]], 1)

    inputs = {
        "input_ids": data.pad(ids, pad_id, "right"),
        "attention_mask": {"full_attention": packed},
        "position_ids": data.pad([p.T for p in positions], 0, "right").permute(2, 0, 1),
        **data.join_media(prompts),
    }
    return inputs, predict_NT.flatten()[packed.slot_M], torch.cat([c.cpu() for group in completions for c in group])


def token_logps(model, packed, lengths, temperature, banned):
    """Log-probs and entropies (G, T) of the packed completions, zero-padded to the longest; G over all packed groups."""
    inputs, predict, targets = packed
    logps_N, entropy_N = model(**inputs, predict=predict, targets=targets, temperature=temperature, banned=banned)
    return data.pad(logps_N.split(lengths), 0.0, "right"), data.pad(entropy_N.split(lengths), 0.0, "right")


# --------------------------------------------------------------------------------------------------------------- saving


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
