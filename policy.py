"""Qwen2.5-VL as a policy: load it, sample completions from it, and score completions with it.

    load_processor, load_policy, load_reference    transformers' own classes, and a head that returns log-probs
    load_trainable, adapter_off                    the policy to train; the same policy without its LoRA adapter
    mrope_positions                                time, row and column of each token of a prompt
    rollout(model, prompts, counts, ...)           sample n completions for each prompt
    pack, completion_logps                         log-probs of given completions, differentiable
    save_model, starting_files                     a checkpoint laid out like the one that training started from
    save_adapter, load_adapter, merge_adapter      LoRA adapters, in peft's own files

`prompts` are the inputs that data.encode makes. There a picture becomes a clip of one moment, so all media are videos.

Axes: B packed rows, or prompts of a rollout · L tokens of a row · P tokens of a prompt
      N completions · T tokens of the longest completion · M tokens of all completions · D hidden size · V vocabulary
"""

import functools
import json
import math
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoProcessor,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    StaticCache,
)
from transformers.initialization import no_init_weights
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

import common
import data
from common import compute_dtype, is_sharded, replace_folder, room_on_disk
from settings import UserError, adapter_chain

# values of mm_token_type_ids
TEXT = 0
IMAGE = 1
VIDEO = 2
# The head computes the logits of this many tokens at a time: 512 of them over a vocabulary of 152,000 take 311 MB.
LOGITS_CHUNK = 512


# -------------------------------------------------------------------------------------------------------------- loading


def load_processor(cfg):
    """The checkpoint's own processor (tokenizer, image and video processor). UserError if it cannot be loaded."""
    base = adapter_chain(cfg.model)[0]
    common.check_hub(base)
    try:
        processor = AutoProcessor.from_pretrained(base)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        if "Unrecognized image processor" in reason:
            reason = (
                "transformers does not know the image processor that preprocessor_config.json names. The hub's "
                "first revision of Qwen2.5-VL names Qwen2_5_VLImageProcessor: write "
                "Qwen2VLImageProcessor, which is the same class"
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
    """The language-model head. Given targets, it returns their log-probs without ever holding all (M, V) logits."""

    def forward(self, hidden_MD, targets_M=None, temperature=1.0, banned=()):
        if targets_M is None:
            return super().forward(hidden_MD)
        logps = []
        entropies = []
        for hidden, targets in zip(hidden_MD.split(LOGITS_CHUNK), targets_M.split(LOGITS_CHUNK)):
            # the backward pass computes the chunk's logits again instead of keeping them
            chunk_logps, chunk_entropies = checkpoint(
                self.chunk_logps, hidden, targets, temperature, banned, use_reentrant=False
            )
            logps.append(chunk_logps)
            entropies.append(chunk_entropies)
        return torch.cat(logps), torch.cat(entropies)

    def chunk_logps(self, hidden_MD, targets_M, temperature, banned):
        """Log-probs and entropies (M,) in nats, in float32 for any dtype of the weights."""
        logits_MV = F.linear(hidden_MD, self.weight).float() / temperature
        # tokens that are never sampled have no probability here either
        for token in banned:
            logits_MV[:, token] = torch.finfo(torch.float32).min
        log_norm_M = logits_MV.logsumexp(-1)
        logps_M = logits_MV.gather(-1, targets_M[:, None])[:, 0] - log_norm_M
        with torch.no_grad():
            entropy_M = log_norm_M - (logits_MV.softmax(-1) * logits_MV).sum(-1)
        return logps_M, entropy_M


class Policy(Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL whose forward can return log-probs of chosen tokens. Its weights are those of the base class.

    forward(**inputs, predict=, targets=) returns (logps_M, entropy_M) in nats: `predict` (M,) points into the flattened
    (B·L) tokens whose next token is wanted, and `targets` (M,) are those next tokens. The head runs inside forward,
    because under FSDP its weight exists only there. Without `targets` it is the plain model.
    """

    @classmethod
    def of(cls, model):
        """The loaded base model, turned into a Policy in place (transformers only knows the base class's file layout).

        Of the checkpoint's generation settings only the end-of-turn tokens are kept: a penalty or a top-k would make
        the sampled distribution differ from the one whose log-probs are trained.
        """
        model.__class__ = cls
        model.lm_head.__class__ = LogpHead
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
        return model

    # generate() inspects the signature
    @functools.wraps(Qwen2_5_VLForConditionalGeneration.forward)
    def forward(self, *args, predict=None, targets=None, temperature=1.0, banned=(), **inputs):
        inputs |= vision_lengths(inputs, self.config.vision_config)
        if targets is None:
            return super().forward(*args, **inputs)
        if inputs.get("position_ids") is None:
            raise TypeError("position_ids are missing; compute them with mrope_positions, as transformers 5.24 differs")
        inputs.pop("second_per_grid_ts", None)
        hidden_BLD = self.model(*args, use_cache=False, **inputs).last_hidden_state
        return self.lm_head(hidden_BLD.flatten(0, 1)[predict], targets, temperature, banned)


def vision_lengths(inputs, config):
    """The lengths of the windows in which the vision blocks attend, on the CPU, as arguments of the model's forward.

    Every vision block reads them as numbers. On the GPU the host would wait for each of these reads.
    """
    grid = inputs.get("video_grid_thw")
    if grid is None:
        return {}
    grid = grid.cpu()
    index, windows = get_vision_window_index(grid, config.spatial_merge_size, config.window_size, config.patch_size)
    return {
        "video_cu_seqlens": get_vision_cu_seqlens(grid),
        "video_window_index": index,
        "video_cu_window_seqlens": windows,
    }


def load_policy(cfg, dtype=torch.float32, accelerator=None, device=None):
    """The checkpoint `cfg.model` as a Policy. Master weights are float32: bfloat16 would lose updates of size 1e-6.

    If `cfg.model` is a LoRA adapter, it is merged into the checkpoint it belongs to.
    The model is loaded on the CPU, and accelerate then moves or shards it. With `device` (for inference) the weights
    are read straight onto that device. If the model will be sharded, only rank 0 reads the weights and
    sends them to the other ranks, so a machine holds one copy.

    Raises UserError if the checkpoint's tensors are not the model's.
    """
    base, *adapters = adapter_chain(cfg.model)
    if accelerator and is_sharded(accelerator) and not accelerator.is_main_process:
        with init_empty_weights():
            model = empty_model(Qwen2_5_VLConfig.from_pretrained(base), dtype)
        # init_empty_weights has untied them
        model.tie_weights()
        model.generation_config = generation_config(base, model.config)
    else:
        model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            base,
            dtype=dtype,
            attn_implementation="sdpa",
            device_map=None if device is None else {"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        refuse_other_tensors(base, report)
        if adapted_layers(model):
            raise UserError(f"{base} is an adapter on the hub; download it, and set model to its folder")
        for adapter in adapters:
            model = merge_adapter(model, adapter)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        # only reentrant checkpointing needs its hooks, by which gradients would run through a frozen vision tower too
        model.disable_input_require_grads()
    return Policy.of(model)


def generation_config(model, config):
    """The checkpoint's generation config; if it has none, the one that from_pretrained derives from its config."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return GenerationConfig.from_model_config(config)


def refuse_other_tensors(model, report):
    """Raise UserError with the tensors that the checkpoint lacks or should not have. Missing ones would be random."""
    problems = []
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(key if isinstance(key, str) else key[0] for key in report.get(f"{kind}_keys", ()))
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{kind} {', '.join(names[:3])}{more}")
    if problems:
        raise UserError(f"{model}: these weights are not the model's: {'; '.join(problems)}")


def empty_model(config, dtype):
    """The model without loaded weights."""
    return Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")


def load_trainable(cfg, accelerator):
    """The checkpoint as the policy to train: all of its weights, or with `lora_rank` an adapter on frozen weights.

    With an adapter, accelerator's checkpoints hold only that.
    """
    if not cfg.lora_rank:
        return load_policy(cfg, accelerator=accelerator).train()
    checkpoint_adapter_only(accelerator)
    return add_adapter(load_policy(cfg, compute_dtype(cfg), device=accelerator.device), cfg).train()


def load_reference(accelerator, cfg, policy):
    """A frozen copy of the starting checkpoint, sharded like the policy but without optimizer state.

    With LoRA it is the policy itself: call it within adapter_off().
    """
    if cfg.lora_rank:
        return policy
    model = load_policy(cfg, compute_dtype(cfg), accelerator).eval().requires_grad_(False)
    return fsdp2_prepare_model(accelerator, model) if is_sharded(accelerator) else model.to(accelerator.device)


def rollout_copy(accelerator, policy, cfg):
    """The model to sample from: the policy itself or, if it is sharded or trained in bfloat16, a whole copy of it.

    generate() on sharded weights would gather all of them for every token. With a whole copy, ranks also sample without
    waiting for one another. Call refresh() before each rollout. With LoRA the policy's weights are whole and frozen.
    """
    if cfg.lora_rank or (not is_sharded(accelerator) and not cfg.bf16):
        return policy
    with torch.device(accelerator.device), no_init_weights():
        copy = Policy.of(empty_model(policy.config, compute_dtype(cfg)))
    # no_init_weights has skipped this
    copy.tie_weights()
    copy.generation_config = policy.generation_config
    return copy.eval().requires_grad_(False)


@torch.no_grad()
def refresh(copy, policy):
    """Copy the policy's weights into `copy`, one parameter at a time: the extra memory is that of the largest one.

    Collective: full_tensor() gathers a parameter's shards from all ranks. Each shard is cast first.
    """
    if copy is policy:
        return
    target = dict(copy.named_parameters())
    for name, parameter in policy.named_parameters():
        parameter = parameter.detach().to(target[name].dtype)
        target[name].copy_(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)


# ------------------------------------------------------------------------------------------------------------ positions


def mrope_positions(prompt, config):
    """M-RoPE positions (3, P) of a prompt's tokens — time, row, column — by the rule Qwen2.5-VL was trained with.

    Text continues at (largest position so far, of all three axes) + 1. Patch (t, row, column) of a clip that starts at
    position s has position s + (floor(t · tokens_per_second · seconds between temporal patches), row, column). So the
    answer to a two-minute clip begins after the clip's last moment. transformers 4.49 and 4.51 compute the same.
    4.57 rounds the seconds between patches down to a whole number first. 5.24 continues after a clip at
    s + max(rows, columns), which lies inside any clip of more than a few seconds.

    `prompt` holds mm_token_type_ids (1, P) and the grid and frame times of its clip; `config` is the model's vision
    config. With tokens_per_second 2, patches less than half a second apart share a time position, as those of 16 frames
    of a clip under 4 seconds do.
    """
    grids = iter(prompt.get("video_grid_thw", ()))
    seconds_per_patch = iter(prompt.get("second_per_grid_ts", ()))
    kinds, lengths = torch.unique_consecutive(prompt["mm_token_type_ids"][0], return_counts=True)
    positions = []
    start = 0
    for kind, length in zip(kinds.tolist(), lengths.tolist()):
        if kind == TEXT:
            part = torch.arange(length).expand(3, -1)
        else:
            T, H, W = next(grids).tolist()
            time_T = (torch.arange(T) * next(seconds_per_patch) * config.tokens_per_second).long()
            rows = torch.arange(H // config.spatial_merge_size)
            columns = torch.arange(W // config.spatial_merge_size)
            part = torch.stack(torch.meshgrid(time_T, rows, columns, indexing="ij")).flatten(1)
        positions.append(start + part)
        start += int(part.max()) + 1
    return torch.cat(positions, 1)


# -------------------------------------------------------------------------------------------------------------- rollout


@torch.no_grad()
def rollout(model, prompts, counts, tokenizer, temperature, max_new_tokens, top_p=1.0, compiled_rows=0):
    """Sample counts[b] completions of prompt b, all prompts in one batch. Temperature 0 is greedy decoding.

    The vision tower and the prompt run once per prompt; the cache is then repeated, and generate() continues from it.
    Positions are passed in, so the model's own `rope_deltas` (state of the last forward pass) are never used.
    `compiled_rows` > 0 compiles decoding and fills the batch up to this many rows: each shape is compiled once, and an
    extra row costs almost no time on a GPU.
    Returns a list of 1-D tensors of token ids, prompt by prompt, each up to and including its first end-of-turn token.
    """
    was_training = model.training
    # under gradient checkpointing, generate() in training mode would drop its cache
    model.eval()
    prompt_BP, mask_BP, positions_3BP, prompt_cache = read_prompts(model, prompts, tokenizer.pad_token_id)

    # one row per completion
    prompt_of_row = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(model.device)
    if compiled_rows:
        # the added rows repeat prompt 0; their completions are dropped
        prompt_of_row = F.pad(prompt_of_row, (0, max(0, compiled_rows - len(prompt_of_row))))
    n_tokens = prompt_BP.shape[1] + max_new_tokens
    cache = empty_cache(model, len(prompt_of_row), n_tokens, compiled=bool(compiled_rows))
    for layer, prompt_layer in zip(cache.layers, prompt_cache.layers):
        layer.update(prompt_layer.keys[prompt_of_row], prompt_layer.values[prompt_of_row])

    output = model.generate(
        input_ids=prompt_BP[prompt_of_row],
        attention_mask=mask_BP[prompt_of_row],
        position_ids=positions_3BP[:, prompt_of_row],
        cache=cache,
        generation_config=sampling_config(model, tokenizer, temperature, max_new_tokens, top_p, bool(compiled_rows)),
    )
    model.train(was_training)
    completions_NT = output[: sum(counts), prompt_BP.shape[1] :]
    lengths_N = completion_mask(completions_NT, eos_ids(model, tokenizer)).sum(1)
    return [row[:length] for row, length in zip(completions_NT, lengths_N)]


def read_prompts(model, prompts, pad_id):
    """Run all prompt tokens but the last, which is left to generate(). Returns (ids, mask, positions, cache)."""
    batch = common.to_device(data.collate_prompts(prompts, pad_id), model.device)
    prompt_BP = batch.pop("input_ids")
    mask_BP = batch.pop("attention_mask")
    positions = [mrope_positions(prompt, model.config.vision_config).T for prompt in prompts]
    positions_3BP = data.pad(positions, 0, "left").permute(2, 0, 1).to(model.device)
    cache = DynamicCache(config=model.config.get_text_config())
    model(
        input_ids=prompt_BP[:, :-1],
        attention_mask=mask_BP[:, :-1],
        position_ids=positions_3BP[..., :-1],
        **batch,
        cache=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return prompt_BP, mask_BP, positions_3BP, cache


def empty_cache(model, rows, n_tokens, compiled):
    """A cache of `n_tokens` tokens from the start: a growing cache would be copied whole for every token."""
    if not compiled:
        return StaticCache(config=model.config.get_text_config(), max_cache_len=n_tokens)
    cache = reused_cache(model, rows, compiled_length(n_tokens))
    cache.reset()
    return cache


@functools.lru_cache(maxsize=4)
def reused_cache(model, rows, n_tokens):
    """The same cache for the same arguments, for up to four shapes. It still holds the last rollout: call reset().

    A CUDA graph is recorded for fixed addresses, so a new cache at each rollout would have it recorded again.
    """
    return StaticCache(config=model.config.get_text_config(), max_cache_len=n_tokens)


def compiled_length(n_tokens):
    """The length of a cache for compiled decoding: a multiple of 512, because each length is compiled once."""
    return math.ceil(n_tokens / 512) * 512


def sampling_config(model, tokenizer, temperature, max_new_tokens, top_p, compiled):
    """How generate() samples: from the whole distribution, except for the tokens that stand for pixels."""
    sampling = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        suppress_tokens=placeholder_ids(model),
        eos_token_id=eos_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        disable_compile=not compiled,
    )
    if temperature > 0:
        # the default of top_k is 50, so it must be given
        sampling.update(temperature=temperature, top_k=0, top_p=top_p)
    if compiled:
        sampling.compile_config = CompileConfig(dynamic=False)
    return sampling


def placeholder_ids(model):
    """The tokens that stand for pixels. They are banned in sampling: a completion has no pixels for them."""
    return (model.config.image_token_id, model.config.video_token_id)


def eos_ids(model, tokenizer):
    """The tokens that end a completion: the tokenizer's and those of the checkpoint's generation config."""
    listed = model.generation_config.eos_token_id or []
    if isinstance(listed, int):
        listed = [listed]
    return sorted({tokenizer.eos_token_id, *listed})


def completion_mask(ids_NT, eos_ids):
    """True up to and including the first end-of-turn token: stopping is an action, so it is trained too."""
    is_eos_NT = torch.isin(ids_NT, torch.tensor(eos_ids, device=ids_NT.device)).int()
    eos_before_NT = is_eos_NT.cumsum(1) - is_eos_NT
    return eos_before_NT == 0


# --------------------------------------------------------------------------------------------- log-probs of completions


@dataclass
class Packed:
    """Rows [prompt, completion 1 … completion G]: every prompt is computed once for its whole group."""

    # arguments of the model: ids and positions of the rows, the attention mask, pixels
    inputs: dict
    # for each token of each completion: the index, in the flattened (B·L) rows, of the token before it
    predict_M: torch.Tensor
    # the token itself
    targets_M: torch.Tensor
    # 1.0 for the tokens of a completion, 0.0 for padding
    mask_NT: torch.Tensor


def pack(model, prompts, completions, pad_id):
    """Packed rows, on the model's device, of B prompts and a list of completions (1-D tensors) for each of them.

    A completion attends to its prompt and to itself, and its positions continue from the prompt's.
    """
    rows = [pack_row(model, prompt, group) for prompt, group in zip(prompts, completions)]
    targets = [completion.cpu() for completion in chain.from_iterable(completions)]
    L = max(len(row["ids"]) for row in rows)
    packed = Packed(
        inputs={
            "input_ids": data.pad([row["ids"] for row in rows], pad_id, "right"),
            "attention_mask": packed_mask(data.pad([row["segments"] for row in rows], -1, "right")),
            "position_ids": data.pad([row["positions"].T for row in rows], 0, "right").permute(2, 0, 1),
            **data.join_media(prompts),
        },
        predict_M=torch.cat([b * L + row["predict"] for b, row in enumerate(rows)]),
        targets_M=torch.cat(targets),
        mask_NT=data.pad([torch.ones(len(target)) for target in targets], 0.0, "right"),
    )
    return Packed(**common.to_device(vars(packed), model.device))


def pack_row(model, prompt, completions):
    """One packed row: ids, segments and predict (L,), positions (3, L)."""
    P = prompt["input_ids"].shape[1]
    positions_3P = mrope_positions(prompt, model.config.vision_config)
    first_position = positions_3P.max() + 1
    ids = [prompt["input_ids"][0]]
    positions = [positions_3P]
    segments = [torch.zeros(P, dtype=torch.long)]
    predict = []
    start = P
    for number, completion in enumerate(completions, 1):
        offsets = torch.arange(len(completion))
        ids.append(completion.cpu())
        positions.append((first_position + offsets).expand(3, -1))
        segments.append(torch.full((len(completion),), number))
        # the prompt's last token predicts the first one
        predict.append(torch.cat([torch.tensor([P - 1]), start + offsets[:-1]]))
        start += len(completion)
    return {
        "ids": torch.cat(ids),
        "positions": torch.cat(positions, 1),
        "segments": torch.cat(segments),
        "predict": torch.cat(predict),
    }


def packed_mask(segments_BL):
    """The attention mask (B, 1, L, L) of packed rows: True where a token may attend to an earlier one or to itself.

    Segment 0 is the prompt, i the i-th completion, −1 padding.
    """
    L = segments_BL.shape[1]
    causal_LL = torch.ones(L, L, dtype=torch.bool).tril()
    same_segment_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    prompt_B1L = segments_BL[:, None, :] == 0
    return (causal_LL & (same_segment_BLL | prompt_B1L))[:, None]


def completion_logps(model, packed, temperature=1.0, banned=()):
    """Log-probs and entropies (N, T) in nats of the completions' tokens; 0 at padding. `model` may be wrapped."""
    logps_M, entropy_M = model(
        **packed.inputs, predict=packed.predict_M, targets=packed.targets_M, temperature=temperature, banned=banned
    )
    is_token_NT = packed.mask_NT.bool()
    zeros_NT = torch.zeros_like(packed.mask_NT)
    return zeros_NT.masked_scatter(is_token_NT, logps_M), zeros_NT.masked_scatter(is_token_NT, entropy_M)


# --------------------------------------------------------------------------------------------------------------- saving


# The files of a checkpoint, besides its weights, from which a model and its processor are loaded.
STARTING_FILES = (
    "config.json generation_config.json *processor_config.json chat_template.* tokenizer* vocab.* merges.txt "
    "added_tokens.json special_tokens_map.json"
).split()


def starting_files(model):
    """{name: bytes} of a checkpoint's own config, generation config, preprocessor, chat template and tokenizer files.

    `model` is a folder or a hub name. `final` gets these files instead of newly written ones, so what loads the
    starting checkpoint loads `final` too: transformers 4.x and older vLLM cannot read what transformers 5 would write.
    """
    model = adapter_chain(model)[0]
    folder = Path(model) if Path(model).is_dir() else Path(snapshot_download(model, allow_patterns=STARTING_FILES))
    found = set()
    for pattern in STARTING_FILES:
        found |= set(folder.glob(pattern))
    return {path.name: path.read_bytes() for path in sorted(found) if path.is_file()}


def with_dtype(config, dtype):
    """A copy of a config.json's dict in which every dtype entry (torch_dtype until transformers 4.55) is `dtype`."""
    name = str(dtype).removeprefix("torch.")
    named = {key: with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return named | {key: name for key in ("dtype", "torch_dtype") if key in config}


def save_model(accelerator, model, files, folder, dtype=None):
    """`folder` becomes a checkpoint laid out like the one that `files` (starting_files) are from.

    Collective: every rank must call it. Written whole or not at all.
    """
    # gathers the shards; the full state dict is on rank 0
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        write_model(state, accelerator.unwrap_model(model), files, folder, dtype)
    accelerator.wait_for_everyone()


def write_model(state, model, files, folder, dtype=None):
    """The files of save_model from a full state dict of `model`; `dtype` None keeps the weights' own."""
    has_adapter = bool(adapted_layers(model))
    if has_adapter:
        state = merged_state(state, model)
    # the base class, empty: it knows the names of the weights in files
    with torch.device("meta"):
        shell = Qwen2_5_VLForConditionalGeneration(model.config)
    # the tied head is the embedding; in gathered shards they no longer share memory
    for name in shell.all_tied_weights_keys:
        state.pop(name, None)
    if dtype is not None:
        state = {name: tensor.to(dtype) for name, tensor in state.items()}
    dtype = next(iter(state.values())).dtype
    folder = Path(folder)
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with room_on_disk(folder):
        shell.save_pretrained(temporary, state_dict=state)
        for written in temporary.glob("*config*.json"):
            written.unlink()
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        config_json = json.loads(files["config.json"])
        if "dtype" not in config_json:
            config_json.setdefault("torch_dtype", None)
        text = json.dumps(with_dtype(config_json, dtype), indent=2) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        if has_adapter:
            # not beside the weights, where transformers would find it and add it to them again
            save_adapter(model, temporary / "adapter")
        replace_folder(temporary, folder)


# ----------------------------------------------------------------------------------------------------------------- LoRA

# The linear layers of the language model. The vision tower has some of the same names, but stays frozen.
ADAPTED_LAYERS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
ADAPTER_FILE = "adapter_model.safetensors"


def adapted_layers(model):
    """The linear layers that have an adapter."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def add_adapter(model, cfg):
    """`model`, frozen, with a trainable adapter: each adapted weight W acts as W + (alpha / rank) B A (Hu et al. 2021).

    B is 0 at first, so the policy starts as the checkpoint. A and B are float32 whatever the dtype of W.
    """
    # A is random, and the same each time the run starts
    common.seed_everything(cfg.seed)
    config = LoraConfig(
        r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout, target_modules=ADAPTED_LAYERS
    )
    # an absolute path, so that the adapter can be loaded from any folder
    config.base_model_name_or_path = str(Path(cfg.model).resolve()) if Path(cfg.model).exists() else cfg.model
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in adapted_layers(model):
        # in bfloat16 autocast does it; peft would first cast to float32
        layer.cast_input_dtype_enabled = False
    return model


@contextmanager
def adapter_off(model):
    """Within it a model with an adapter computes without it, as the checkpoint it started from.

    A model without an adapter is not changed.
    """
    for layer in adapted_layers(model):
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in adapted_layers(model):
            layer.enable_adapters(True)


def merged_state(state, model):
    """`state`, the state dict of `model`, as that of a plain model. Changes the model: its weights include the adapter.

    In place, because a second copy may not fit beside the model. Each sum is rounded once, to the dtype of W.
    """
    for layer in adapted_layers(model):
        layer.merge()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}


def adapter_tensors(model):
    """The tensors of the model's adapter, under the names that peft gives them in a file."""
    # embeddings are not adapted; by default peft would look on the hub whether they were
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}


def save_adapter(model, folder):
    """Write the model's adapter into `folder`, as files that peft's PeftModel.from_pretrained loads."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(adapter_tensors(model), f"{folder}/{ADAPTER_FILE}")
    model.peft_config["default"].save_pretrained(folder)


@torch.no_grad()
def load_adapter(model, folder):
    """Read what save_adapter wrote into the model's adapter. KeyError or RuntimeError if it is another adapter."""
    saved = load_file(f"{folder}/{ADAPTER_FILE}")
    for name, tensor in adapter_tensors(model).items():
        tensor.copy_(saved[name])


# How names of tensors begin in adapters that were made with transformers before 4.52, and how they do now.
OLDER_NAMES = {r"^model\.layers\.": "model.language_model.layers.", r"^visual\.": "model.visual."}


def merge_adapter(model, folder):
    """`model` with the adapter in `folder`, in peft's format, added to its weights. UserError if that is impossible."""
    if not any(Path(folder).glob("adapter_model.*")):
        raise UserError(f"{folder}: adapter_model.safetensors is missing")
    try:
        wrapped = PeftModel(model, PeftConfig.from_pretrained(folder))
        report = wrapped.load_adapter(folder, "default", key_mapping=OLDER_NAMES)._asdict()
        refuse_other_tensors(folder, report)
        names = " ".join(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        if model.config.tie_word_embeddings and re.search(r"\b(lm_head|embed_tokens)\b", names):
            raise ValueError("it changes the embedding or the head, which are one matrix in this model")
        # peft has frozen the model
        return wrapped.merge_and_unload().requires_grad_(True)
    # a damaged or unusual adapter may raise anything
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{folder}: this adapter cannot be merged: {reason:.200}") from error


def checkpoint_adapter_only(accelerator):
    """Checkpoints then hold the adapter in peft's format, and no other weights."""

    def save(models, states, folder):
        if accelerator.is_main_process:
            save_adapter(accelerator.unwrap_model(models[0]), folder)
        states.clear()

    def load(models, folder):
        load_adapter(accelerator.unwrap_model(models.pop()), folder)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
