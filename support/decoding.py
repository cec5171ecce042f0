"""Decoding: the cache of generate(), optionally with a compiled step, and what the vision tower reads on the CPU."""

import functools
import math

import torch.nn.functional as F
from transformers import CompileConfig, StaticCache
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index


def vision_lengths(inputs, config):
    """The lengths of the vision blocks' windows, on the CPU: on a GPU the host would wait for each block."""
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


def compiled_rows(cfg, ranks):
    """How many rows a rank always decodes if decoding is compiled, for one shape is compiled once; else 0."""
    if not getattr(cfg, "rollout_compile", False):
        return 0
    return cfg.batch_size // ranks * (cfg.num_generations + cfg.shuffled_generations)


def rows_and_cache(model, prompt_of_row, n_tokens):
    """(prompt_of_row, cache): the prompt of each row that is decoded, and an empty cache of `n_tokens` tokens.

    A growing cache would be copied for every token. Compiled decoding adds rows of prompt 0 up to model.compiled_rows.
    """
    if not model.compiled_rows:
        return prompt_of_row, StaticCache(config=model.config.get_text_config(), max_cache_len=n_tokens)
    prompt_of_row = F.pad(prompt_of_row, (0, max(0, model.compiled_rows - len(prompt_of_row))))
    cache = reused_cache(model, len(prompt_of_row), compiled_length(n_tokens))
    cache.reset()
    return prompt_of_row, cache


@functools.lru_cache(maxsize=4)
def reused_cache(model, rows, n_tokens):
    """The same cache each time, to be reset(): a CUDA graph would be recorded again for a cache at other addresses."""
    return StaticCache(config=model.config.get_text_config(), max_cache_len=n_tokens)


def compiled_length(n_tokens):
    """The length of a cache for compiled decoding: a multiple of 512, because each length is compiled once."""
    return math.ceil(n_tokens / 512) * 512


def compile_settings(model):
    """Arguments of GenerationConfig that turn the compiled decoding step on or off."""
    if not model.compiled_rows:
        return {"disable_compile": True}
    return {"disable_compile": False, "compile_config": CompileConfig(dynamic=False)}
