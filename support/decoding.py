"""Decoding with a compiled step (`rollout_compile: true`), in place of the loop inside of generate().

generate() prepares everything and calls decode(), which repeats one step: the model reads the newest token of each row,
and the next one is sampled, in one compiled graph of fixed shape. The host waits for the GPU only every 16 tokens, to
see whether all rows have ended. The plain form is generate()'s own loop, which samples the same tokens.
"""

import functools
import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, StaticCache

# how many tokens are decoded between two looks at whether all rows have ended
CHECK_EVERY = 16
FOLDED = "folded_heads"


def compiled_rows(cfg, ranks):
    """How many rows a rank always decodes if decoding is compiled, so that it is compiled once; else 0."""
    if not getattr(cfg, "rollout_compile", False):
        return 0
    return cfg.batch_size // ranks * (cfg.num_generations + cfg.shuffled_generations)


def compiled_length(n_tokens):
    """The length of a cache for compiled decoding: a multiple of 512, because each length is compiled once."""
    return math.ceil(n_tokens / 512) * 512


def rows_and_cache(model, prompt_of_row, n_tokens):
    """(prompt_of_row, cache): the prompt of each row that is decoded, and an empty cache of `n_tokens` tokens.

    A growing cache would be copied for every token. Compiled decoding adds rows of prompt 0 up to model.compiled_rows.
    """
    if not model.compiled_rows:
        return prompt_of_row, StaticCache(config=model.config.get_text_config(), max_cache_len=n_tokens)
    prompt_of_row = F.pad(prompt_of_row, (0, max(0, model.compiled_rows - len(prompt_of_row))))
    cache = buffers(model, len(prompt_of_row), compiled_length(n_tokens)).cache
    cache.reset()
    return prompt_of_row, cache


@dataclass
class Buffers:
    """What a compiled step reads and writes, always at the same addresses: a CUDA graph is recorded for them.

    N rows · K places of the cache · V vocabulary
    """

    cache: StaticCache
    # the newest token of each row
    token_N1: torch.Tensor
    position_3N1: torch.Tensor
    # False where the prompt is padded
    is_token_NK: torch.Tensor
    has_ended_N: torch.Tensor
    # Exp(1), drawn anew for each token
    noise_NV: torch.Tensor


@functools.lru_cache(maxsize=4)
def buffers(model, rows, n_tokens):
    """The Buffers for this many rows and places."""
    text = model.config.get_text_config()
    long = {"dtype": torch.long, "device": model.device}
    tensors = {
        "token_N1": torch.zeros(rows, 1, **long),
        "position_3N1": torch.zeros(3, rows, 1, **long),
        "is_token_NK": torch.ones(rows, n_tokens, dtype=torch.bool, device=model.device),
        "has_ended_N": torch.zeros(rows, dtype=torch.bool, device=model.device),
        "noise_NV": torch.zeros(rows, text.vocab_size, device=model.device),
    }
    for tensor in tensors.values():
        torch._dynamo.mark_static_address(tensor)
    return Buffers(cache=StaticCache(config=text, max_cache_len=n_tokens), **tensors)


def how_to_decode(model):
    """Arguments of generate(): its own loop, or decode() if `model` has compiled rows."""
    return {"custom_generate": decode} if model.compiled_rows else {}


def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
    """Like generate()'s own loop for one token of input per row, with the rest in the cache. Returns all tokens.

    With the same seed it samples the same tokens: torch.multinomial, too, takes the largest probability over noise. Of
    the settings only temperature, banned tokens and end-of-turn tokens are obeyed.
    """
    P = input_ids.shape[1]
    state = buffers(model, len(input_ids), inputs["cache"].get_max_length())
    state.token_N1.copy_(input_ids[:, -1:])
    state.position_3N1.copy_(inputs["position_ids"][..., -1:])
    state.is_token_NK.fill_(True)
    # None: no prompt is padded
    if inputs.get("attention_mask") is not None:
        state.is_token_NK[:, :P].copy_(inputs["attention_mask"])
    state.has_ended_N.zero_()
    settings = StepSettings(
        temperature=generation_config.temperature if generation_config.do_sample else 0.0,
        banned=tuple(generation_config.suppress_tokens or ()),
        eos=tuple(generation_config.eos_token_id),
        pad=generation_config.pad_token_id,
    )
    step = compiled_step(model.device)
    n_tokens = generation_config.max_length - P
    tokens = torch.full((len(input_ids), n_tokens), settings.pad, device=input_ids.device)
    with folded_heads(model):
        for i in range(n_tokens):
            if settings.temperature:
                state.noise_NV.exponential_()
            step(model, state, settings)
            tokens[:, i] = state.token_N1[:, 0]
            if (i + 1) % CHECK_EVERY == 0 and state.has_ended_N.all():
                break
    return torch.cat([input_ids, tokens[:, : i + 1]], dim=1)


@dataclass(frozen=True)
class StepSettings:
    """What a compiled step takes as constants."""

    # 0: greedy
    temperature: float
    banned: tuple
    eos: tuple
    pad: int


def decode_step(model, state, settings):
    """One more token in every row; rows that have ended get padding. Everything is written in place."""
    # the place in the cache that this token will have
    place = state.cache.layers[0].cumulative_length
    is_past_K = torch.arange(state.is_token_NK.shape[1], device=place.device) <= place
    output = model(
        input_ids=state.token_N1,
        position_ids=state.position_3N1,
        attention_mask=(state.is_token_NK & is_past_K)[:, None, None],
        cache=state.cache,
        use_cache=True,
    )
    scores_NV = output.logits[:, -1].float()
    for token in settings.banned:
        scores_NV[:, token] = -torch.inf
    if settings.temperature:
        scores_NV = (scores_NV / settings.temperature).softmax(-1) / state.noise_NV
    next_N = scores_NV.argmax(-1).masked_fill(state.has_ended_N, settings.pad)
    for token in settings.eos:
        state.has_ended_N.logical_or_(next_N == token)
    state.token_N1.copy_(next_N[:, None])
    state.position_3N1.add_(1)


@functools.cache
def compiled_step(device):
    """decode_step, on a GPU compiled once per shape."""
    return CompiledStep(mode="reduce-overhead") if device.type == "cuda" else decode_step


class CompiledStep:
    """decode_step as one compiled graph. Where torch cannot compile it, this says so once, and the step runs as it is.

    Compilation ends before anything is computed, so no token is sampled twice. `options` are torch.compile's.
    """

    def __init__(self, **options):
        self.step = torch.compile(decode_step, dynamic=False, fullgraph=True, **options)

    def __call__(self, *arguments):
        dynamo = torch._dynamo.exc
        try:
            self.step(*arguments)
        except (dynamo.TorchDynamoException, dynamo.FailOnRecompileLimitHit) as error:
            # the error of the compiler itself may begin on the second line
            reason = " ".join(str(error).split("\n")[:2])
            print(f"rollout_compile: decoding cannot be compiled here, and continues without: {reason}")
            self.step = decode_step
            self.step(*arguments)


# ------------------------------------------------------------------------------------------------------ its attention


@contextmanager
def folded_heads(model):
    """Within it, the text layers of `model` compute attention as folded_attention does."""
    config = model.model.language_model.config
    before = config._attn_implementation
    config._attn_implementation = FOLDED
    try:
        yield
    finally:
        config._attn_implementation = before


def folded_attention(module, query, key, value, attention_mask, scaling, **_):
    """Attention of one query token per row. The query heads of a key head become its query tokens.

    In compiled code SDPA would repeat keys and values for each of them, which for Qwen2.5-VL-7B is seven times.
    query: (N, heads, 1, size), key and value: (N, key heads, K, size). Returns (N, 1, heads, size).
    """
    N, n_heads, _, size = query.shape
    folded = query.reshape(N, key.shape[1], -1, size)
    attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=scaling)
    return attended.reshape(N, 1, n_heads, size), None


AttentionInterface.register(FOLDED, folded_attention)
