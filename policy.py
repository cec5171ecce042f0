"""A Qwen-VL as a policy: sample completions from it, and score completions with it.

    Policy                             transformers' own class, with a head that returns log-probs
    load_policy, load_reference        the policy to train, and the frozen SFT model of the KL term
    mrope_positions                    time, row and column of each token of a prompt
    rollout(model, prompts, counts)    sample counts[b] completions of prompt b
    pack, completion_logps             log-probs of given completions, differentiable

Which object plays which part in tgrpo.py:

    training           policy (trained in float32)   rollout_model                       reference
    one or more GPUs   whole                         the policy; with bf16 a bf16 copy   a frozen copy
    sharded (FSDP)     a shard per GPU               a whole copy per GPU, refreshed     a frozen copy, a shard per GPU
    LoRA               frozen weights + an adapter   the policy, see lora_rollout        the policy with its adapter off

`prompts` are model inputs from data.encode. There a picture becomes a clip of one moment, so all media are videos.

Axes: B packed rows, or prompts of a rollout · L tokens of a row · P tokens of a prompt
      N completions · T tokens of the longest completion · M tokens of all completions · D hidden size · V vocabulary
"""

import functools
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationConfig
from transformers.initialization import no_init_weights

import data
from support import decoding, distributed, families, lora, model_files, vision

# The head computes the logits of this many tokens at a time: 512 of them over a vocabulary of 152,000 take 311 MB.
LOGITS_CHUNK = 512


# ----------------------------------------------------------------------------------------------------------- the policy


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
        # tokens that are never sampled have no probability here either; -inf would make the entropy NaN
        for token in banned:
            logits_MV[:, token] = torch.finfo(torch.float32).min
        log_norm_M = logits_MV.logsumexp(-1)
        logps_M = logits_MV.gather(-1, targets_M[:, None])[:, 0] - log_norm_M
        with torch.no_grad():
            entropy_M = log_norm_M - (logits_MV.softmax(-1) * logits_MV).sum(-1)
        return logps_M, entropy_M


class Policy:
    """Mixed into the model's class by Policy.of: its forward can also return log-probs of chosen tokens.

    forward(**inputs, source=, targets=) returns (logps_M, entropy_M) in nats: `targets` (M,) are tokens, and `source`
    (M,) points to the token before each of them in the flattened (B·L) rows. The head runs inside forward, because
    under FSDP its weight exists only there. Without `targets`, forward is that of the base class.
    """

    # decoding is compiled for this many rows; 0: it is not compiled (support/decoding.py)
    compiled_rows = 0

    @classmethod
    def of(cls, model):
        """The loaded model as a Policy: the same object, whose class now inherits from Policy and its former class.

        Of the checkpoint's generation settings only the end-of-turn tokens are kept: a penalty or a top-k would make
        the sampled distribution differ from the one whose log-probs are trained.
        """

        class ModelAsPolicy(cls, type(model)):
            # generate() learns from the signature which arguments the model takes; `wraps` shows it the former class's
            @functools.wraps(type(model).forward)
            def forward(self, *args, **inputs):
                return super().forward(*args, **inputs)

        model.__class__ = ModelAsPolicy
        model.lm_head.__class__ = LogpHead
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
        return model

    def forward(self, *args, source=None, targets=None, temperature=1.0, banned=(), **inputs):
        # only for speed: the lengths of frames and windows on the CPU, so that no vision block waits for the GPU
        inputs |= vision.lengths(inputs, self.config)
        if targets is None:
            return super().forward(*args, **inputs)
        if inputs.get("position_ids") is None:
            raise TypeError("position_ids are missing; compute them with mrope_positions, as transformers 5.24 differs")
        hidden_BLD = self.model(*args, use_cache=False, **inputs).last_hidden_state
        return self.lm_head(hidden_BLD.flatten(0, 1)[source], targets, temperature, banned)


def load_policy(cfg, dtype=torch.float32, accelerator=None, device=None):
    """The checkpoint `cfg.model` as a Policy. Trained weights are float32: bfloat16 would lose updates of size 1e-6.

    It is loaded on the CPU; accelerate then moves or shards it. With `device`, it is loaded straight onto that device.
    Raises UserError if the checkpoint's tensors are not the model's.
    """
    return Policy.of(model_files.load_weights(cfg, dtype, accelerator, device))


def load_trainable(cfg, accelerator):
    """The policy to train: all of its weights or, with `lora_rank`, an adapter on frozen weights."""
    if not cfg.lora_rank:
        return load_policy(cfg, accelerator=accelerator).train()
    # accelerator's checkpoints then hold only the adapter
    lora.checkpoint_adapter_only(accelerator)
    policy = load_policy(cfg, distributed.compute_dtype(cfg), device=accelerator.device)
    return lora.add_adapter(policy, cfg).train()


def load_reference(accelerator, cfg, policy):
    """A frozen copy of the starting checkpoint, sharded like the policy but without optimizer state.

    With LoRA it is the policy itself: call it within lora.adapter_off().
    """
    if cfg.lora_rank:
        return policy
    model = load_policy(cfg, distributed.compute_dtype(cfg), accelerator).eval().requires_grad_(False)
    return distributed.place(accelerator, model)


def rollout_copy(accelerator, policy, cfg):
    """The model to sample from: the policy itself or, if it is sharded or computes in bfloat16, a whole copy of it.

    generate() on sharded weights would gather all of them for every token. With a whole copy, ranks also sample without
    waiting for one another. In bfloat16, a copy saves casting the float32 weights for every token. Call refresh()
    before each rollout. With LoRA a copy has the adapter merged into its weights, which decodes faster.
    """
    copy = policy
    needs_copy = distributed.is_sharded(accelerator) or cfg.bf16
    if cfg.lora_rank:
        needs_copy = cfg.lora_rollout == "merged_copy"
    if needs_copy:
        with torch.device(accelerator.device), no_init_weights():
            copy = Policy.of(model_files.empty_model(policy.config, distributed.compute_dtype(cfg)))
        # no_init_weights has skipped this
        copy.tie_weights()
        copy.generation_config = policy.generation_config
        copy.eval().requires_grad_(False)
        vision.set_attention(copy, cfg.vision_attention)
    copy.compiled_rows = decoding.compiled_rows(cfg, accelerator.num_processes)
    return copy


@torch.no_grad()
def refresh(copy, policy):
    """Copy the policy's weights into `copy`, one parameter at a time: the extra memory is that of the largest one.

    Collective: full_tensor() gathers a parameter's shards from all ranks. Each shard is cast first.
    """
    if copy is policy:
        return
    target = dict(copy.named_parameters())
    for name, parameter in lora.merged_parameters(policy):
        parameter = parameter.detach().to(target[name].dtype)
        target[name].copy_(parameter.full_tensor() if isinstance(parameter, DTensor) else parameter)


# ------------------------------------------------------------------------------------------------------------ positions


def mrope_positions(prompt, config):
    """M-RoPE positions (3, P) of a prompt's tokens (time, row, column) by the rule the checkpoints were trained with.

    Each text and each clip starts at s = (largest position so far, of all three axes) + 1. Token i of a text has s + i
    on all axes. In Qwen2.5-VL, token (t, row, column) of a clip has s + (floor(t · tokens_per_second · seconds between
    temporal patches), row, column), so the answer to a two-minute clip begins after the clip's last moment.
    transformers 4.49 and 4.51 compute the same; 4.57 first rounds the seconds down to a whole number; 5.24 continues
    after a clip at s + max(rows, columns), which lies inside any clip of more than a few seconds.

    In Qwen3-VL each temporal patch is a clip of its own with t = 0, after a time stamp in the text.
    `prompt` holds mm_token_type_ids (1, P), the patch grid and Qwen2.5-VL's seconds; `config` is the model's.
    """
    runs = families.of(config).runs(prompt, config.vision_config)
    kinds, lengths = torch.unique_consecutive(prompt["mm_token_type_ids"][0], return_counts=True)
    positions = []
    start = 0
    for kind, length in zip(kinds.tolist(), lengths.tolist()):
        if kind == data.VIDEO:
            (n_times, n_rows, n_columns), seconds_per_patch, tokens_per_second = next(runs)
            times = (torch.arange(n_times) * seconds_per_patch * tokens_per_second).long()
            part = torch.cartesian_prod(times, torch.arange(n_rows), torch.arange(n_columns)).T
        else:
            part = torch.arange(length).expand(3, -1)
        positions.append(start + part)
        start += int(part.max()) + 1
    return torch.cat(positions, 1)


# -------------------------------------------------------------------------------------------------------------- rollout


@torch.no_grad()
def rollout(model, prompts, counts, tokenizer, temperature, max_new_tokens, top_p=1.0):
    """Sample counts[b] completions of prompt b, all prompts in one batch. Temperature 0 is greedy decoding.

    The vision tower and the prompt run once per prompt; the cache is then repeated, and generate() continues from it.
    Positions are passed in, so the model's own `rope_deltas` (state of the last forward pass) are never used.
    Returns a list of 1-D tensors of token ids on the CPU, prompt by prompt, each up to and including its first
    end-of-turn token.
    """
    was_training = model.training
    # under gradient checkpointing, generate() in training mode would drop its cache
    model.eval()
    prompt_BP, mask_BP, positions_3BP, prompt_cache = read_prompts(model, prompts, tokenizer.pad_token_id)

    # one row per completion; compiled decoding adds rows, whose completions are dropped
    prompt_of_row = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(model.device)
    n_tokens = prompt_BP.shape[1] + max_new_tokens
    prompt_of_row, cache = decoding.rows_and_cache(model, prompt_of_row, n_tokens)
    for layer, prompt_layer in zip(cache.layers, prompt_cache.layers):
        layer.update(prompt_layer.keys[prompt_of_row], prompt_layer.values[prompt_of_row])

    # generate() takes the length of the cache as done, and computes the rest of input_ids: the prompt's last token. The
    # position of each new token is 1 more than the last. (`cache` was past_key_values before transformers 5.24.)
    output = model.generate(
        input_ids=prompt_BP[prompt_of_row],
        attention_mask=mask_BP[prompt_of_row],
        position_ids=positions_3BP[:, prompt_of_row],
        cache=cache,
        generation_config=sampling_config(model, tokenizer, temperature, max_new_tokens, top_p),
        **decoding.how_to_decode(model),
    )
    model.train(was_training)
    completions_NT = output[: sum(counts), prompt_BP.shape[1] :].cpu()
    lengths_N = completion_mask(completions_NT, eos_ids(model, tokenizer)).sum(1)
    return [row[:length] for row, length in zip(completions_NT, lengths_N)]


def read_prompts(model, prompts, pad_id):
    """Run all prompt tokens but the last, which is left to generate(). Returns (ids, mask, positions, cache)."""
    batch = send_to_device(data.collate_prompts(prompts, pad_id), model.device, non_blocking=True)
    prompt_BP = batch.pop("input_ids")
    mask_BP = batch.pop("attention_mask")
    positions = [mrope_positions(prompt, model.config).T for prompt in prompts]
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


def sampling_config(model, tokenizer, temperature, max_new_tokens, top_p):
    """How generate() samples: from the whole distribution, except for the tokens that stand for pixels."""
    sampling = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        suppress_tokens=placeholder_ids(model),
        eos_token_id=eos_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        disable_compile=True,
    )
    if temperature > 0:
        # the default of top_k is 50, so it must be given
        sampling.update(temperature=temperature, top_k=0, top_p=top_p)
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
    # the tokens of all completions
    targets_M: torch.Tensor
    # for each of them: where the token before it is in the flattened (B·L) rows
    source_M: torch.Tensor
    # 1.0 for the tokens of a completion, 0.0 for padding
    mask_NT: torch.Tensor


def pack(model, prompts, completions, pad_id):
    """Packed rows, on the model's device, of B prompts and a list of completions (1-D, on the CPU) for each of them.

    A completion attends to its prompt and to itself, and its positions continue from the prompt's.
    """
    rows = [pack_row(model, prompt, group) for prompt, group in zip(prompts, completions)]
    targets = list(chain.from_iterable(completions))
    L = max(len(row["ids"]) for row in rows)
    fields = dict(
        inputs={
            "input_ids": data.pad([row["ids"] for row in rows], pad_id, "right"),
            "attention_mask": packed_mask(data.pad([row["segments"] for row in rows], -1, "right").to(model.device)),
            "position_ids": data.pad([row["positions"].T for row in rows], 0, "right").permute(2, 0, 1),
            **data.join_media(prompts),
        },
        targets_M=torch.cat(targets),
        source_M=torch.cat([b * L + row["source"] for b, row in enumerate(rows)]),
        mask_NT=data.pad([torch.ones(len(target)) for target in targets], 0.0, "right"),
    )
    return Packed(**send_to_device(fields, model.device, non_blocking=True))


def pack_row(model, prompt, completions):
    """One packed row: ids and segments (L,), positions (3, L), source (tokens of the completions,)."""
    P = prompt["input_ids"].shape[1]
    positions_3P = mrope_positions(prompt, model.config)
    first_position = positions_3P.max() + 1
    ids = [prompt["input_ids"][0]]
    positions = [positions_3P]
    segments = [torch.zeros(P, dtype=torch.long)]
    source = []
    start = P
    for number, completion in enumerate(completions, 1):
        offsets = torch.arange(len(completion))
        ids.append(completion)
        positions.append((first_position + offsets).expand(3, -1))
        segments.append(torch.full((len(completion),), number))
        # the first token of a completion is predicted from the prompt's last token
        source.append(torch.cat([torch.tensor([P - 1]), start + offsets[:-1]]))
        start += len(completion)
    return {
        "ids": torch.cat(ids),
        "positions": torch.cat(positions, 1),
        "segments": torch.cat(segments),
        "source": torch.cat(source),
    }


def packed_mask(segments_BL):
    """The attention mask (B, 1, L, L) of packed rows: True where a token may attend to an earlier one or to itself.

    Segment 0 is the prompt, i the i-th completion, −1 padding.
    """
    L = segments_BL.shape[1]
    causal_LL = torch.ones(L, L, dtype=torch.bool, device=segments_BL.device).tril()
    same_segment_BLL = segments_BL[:, :, None] == segments_BL[:, None, :]
    prompt_B1L = segments_BL[:, None, :] == 0
    return (causal_LL & (same_segment_BLL | prompt_B1L))[:, None]


def completion_logps(model, packed, temperature=1.0, banned=()):
    """Log-probs and entropies (N, T) in nats of the completions' tokens; 0 at padding. `model` may be wrapped."""
    logps_M, entropy_M = model(
        **packed.inputs, source=packed.source_M, targets=packed.targets_M, temperature=temperature, banned=banned
    )
    is_token_NT = packed.mask_NT.bool()
    zeros_NT = torch.zeros_like(packed.mask_NT)
    return zeros_NT.masked_scatter(is_token_NT, logps_M), zeros_NT.masked_scatter(is_token_NT, entropy_M)
