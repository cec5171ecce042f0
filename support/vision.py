"""The vision tower's attention: its windows' lengths on the CPU, and all windows of a block in one call.

In Qwen2.5-VL, vision blocks attend within windows of at most 8 x 8 patches, every eighth within whole frames; in
Qwen3-VL all blocks attend within whole frames. transformers calls the attention once per window or frame, in a loop:
2,720 calls per pass over a clip of 16 frames in Qwen2.5-VL, 216 in Qwen3-VL-8B. With `vision_attention: fused` each
block makes one call. The loop is the plain form and the default.
"""

import copy
import functools
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from support import families

# transformers passes whole blocks, with the bounds of their windows, to attentions with "flash" in their name
FUSED = "fused_windows_like_flash"


def set_attention(model, name):
    """Let the vision tower of `model` compute its attention in a "loop" over windows, or "fused"."""
    # a copy: transformers could make no other model from a config with FUSED, because it would look for that kernel
    config = copy.copy(model.config.vision_config)
    config._attn_implementation = FUSED if name == "fused" else "sdpa"
    for block in model.model.visual.blocks:
        block.attn.config = config


def lengths(inputs, config):
    """Where vision blocks cut clips, as arguments of forward, on the CPU: each block would wait for them on a GPU."""
    grid = inputs.get("video_grid_thw")
    if grid is None:
        return {}
    return families.of(config).block_lengths(grid.cpu(), config.vision_config)


class Layout(NamedTuple):
    """Where the S patches of a block are in its W windows, padded to the longest one."""

    # where each window begins, and where the last one ends (W + 1,), int32
    bounds: torch.Tensor
    longest: int
    # the patch at each place (W, longest); the first patch where there is none
    patches: torch.Tensor
    # whether there is a patch (W, 1, 1, longest); None if there is one everywhere
    mask: torch.Tensor | None
    # the place of each patch (S,) in the flattened windows
    places: torch.Tensor


@functools.lru_cache(maxsize=16)
def layout(bounds, device):
    """The Layout of windows with these bounds, a tuple. Kept, because all blocks and passes over a clip share it."""
    lengths = [end - start for start, end in pairwise(bounds)]
    longest = max(lengths)
    is_patch = torch.arange(longest) < torch.tensor(lengths)[:, None]
    places = is_patch.flatten().nonzero()[:, 0]
    patches = torch.zeros(len(lengths) * longest, dtype=torch.long)
    patches[places] = torch.arange(bounds[-1])
    return Layout(
        bounds=torch.tensor(bounds, dtype=torch.int32, device=device),
        longest=longest,
        patches=patches.view(-1, longest).to(device),
        mask=None if is_patch.all() else is_patch[:, None, None].to(device),
        places=places.to(device),
    )


def fused_attention(module, query, key, value, attention_mask, scaling, cu_seq_lens_q, **_):
    """Attention within each window, in one call. query, key, value: (1, heads, S, size). Returns (1, S, heads, size).

    On a GPU and in half precision that is torch's attention for packed sequences, otherwise SDPA on padded windows.
    """
    windows = layout(tuple(cu_seq_lens_q.tolist()), query.device)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        # needs CUDA
        from torch.nn.attention.varlen import varlen_attn

        bounds = windows.bounds
        longest = windows.longest
        return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scaling)[None], None
    padded = [states[windows.patches].transpose(1, 2) for states in (query, key, value)]
    attended = F.scaled_dot_product_attention(*padded, attn_mask=windows.mask, scale=scaling)
    return attended.transpose(1, 2).flatten(0, 1)[windows.places][None], None


AttentionInterface.register(FUSED, fused_attention)
