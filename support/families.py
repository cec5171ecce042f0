"""What depends on the model family: one class per family, found by its `model_type`.

All other code asks transformers' Auto classes or the model's config. To add a family, write its class here and run
tests/test_families.py. Both families merge 2 x 2 patches of two consecutive frames into one token.

A `run` is an uninterrupted sequence of video tokens in a prompt. `grids` are the (T, H, W) of clips in patches.
"""

import functools
import re

import torch
from transformers import Qwen2_5_VLConfig, Qwen3VLConfig
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

# what a chat template writes for a clip
CLIP = "<|vision_start|><|video_pad|><|vision_end|>"
# the fields of a text model's config that `sizes` give
TEXT = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()


def in_tokens(grid, config):
    """A grid (T, H, W) of patches as one of tokens."""
    n_times, height, width = grid.tolist()
    return n_times, height // config.spatial_merge_size, width // config.spatial_merge_size


class Qwen2_5_VL:
    """A clip is one run of tokens. Its times are positions: seconds times tokens_per_second.

    With tokens_per_second 2, patches less than half a second apart may share a time position; this happens with 16
    frames (8 patches) of a clip shorter than 4 seconds.
    """

    processor = "Qwen2_5_VLProcessor"
    video_processor = "Qwen2VLVideoProcessor"
    # what the checkpoints were trained with in place of CLIP
    clip = CLIP
    has_time_stamps = False
    # norms of queries and keys, per head
    has_head_norms = False
    # what a vision block saves per patch for its backward pass, in tensors as wide as its hidden state and as its
    # feed-forward part (counted with saved-tensor hooks)
    vision_widths = (13, 4)
    # the published text models; the head of 3B is its embedding
    sizes = {"3b": (2048, 11008, 36, 16, 2, 151936), "7b": (3584, 18944, 28, 28, 4, 152064)}

    @classmethod
    def published_config(cls, size):
        """Config of the checkpoint on the hub."""
        tied = size == "3b"
        text = dict(zip(TEXT, cls.sizes[size])) | {"rms_norm_eps": 1e-6, "tie_word_embeddings": tied}
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "tokens_per_second": 2}
        vision["out_hidden_size"] = text["hidden_size"]
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)

    @staticmethod
    def runs(prompt, config):
        """Yields the grid in tokens, the seconds per temporal patch and the positions per second of each run."""
        # a picture is one moment, and has no seconds
        seconds = prompt.get("second_per_grid_ts", torch.ones(1))
        for grid, seconds_per_patch in zip(prompt.get("video_grid_thw", ()), seconds):
            yield in_tokens(grid, config), seconds_per_patch, config.tokens_per_second

    @staticmethod
    def area_limits(size, n_frames):
        """What the video processor takes for `size`, the limits of a frame's area in pixels: the same."""
        return size

    @staticmethod
    def block_lengths(grids, config):
        """How the vision tower cuts clips for its attention: frames, and windows of 8 x 8 patches within them."""
        index, windows = get_vision_window_index(
            grids, config.spatial_merge_size, config.window_size, config.patch_size
        )
        return {
            "video_cu_seqlens": get_vision_cu_seqlens(grids),
            "video_window_index": index,
            "video_cu_window_seqlens": windows,
        }


class Qwen3VL:
    """Each temporal patch is a run of its own, after a time stamp in the prompt's text: <1.2 seconds>."""

    processor = "Qwen3VLProcessor"
    video_processor = "Qwen3VLVideoProcessor"
    # without tokens around the whole clip: transformers 4.57, which the release used, removes them, 5.10 does not
    clip = "<|video_pad|>"
    has_time_stamps = True
    has_head_norms = True
    vision_widths = (11, 2)
    # the heads of 2B and 4B are their embeddings
    sizes = {
        "2b": (2048, 6144, 28, 16, 8, 151936),
        "4b": (2560, 9728, 36, 32, 8, 151936),
        "8b": (4096, 12288, 36, 32, 8, 151936),
    }

    @classmethod
    def published_config(cls, size):
        """Config of the checkpoint on the hub."""
        text = dict(zip(TEXT, cls.sizes[size]))
        vision = {"out_hidden_size": text["hidden_size"]}
        if size != "8b":
            vision |= {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
            vision["deepstack_visual_indexes"] = [5, 11, 17]
        return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=size != "8b")

    @staticmethod
    def runs(prompt, config):
        """Like those of Qwen2.5-VL. A run has only time 0, so any number of seconds would do."""
        for grid in prompt.get("video_grid_thw", ()):
            n_times, n_rows, n_columns = in_tokens(grid, config)
            for _ in range(n_times):
                yield (1, n_rows, n_columns), 0, 0

    @staticmethod
    def area_limits(size, n_frames):
        """What the video processor takes for `size`: limits of the sum over all frames, an even number."""
        return {edge: pixels * n_frames for edge, pixels in size.items()}

    @staticmethod
    def block_lengths(grids, config):
        """How the vision tower cuts clips for its attention: frames."""
        return {"video_cu_seqlens": get_vision_cu_seqlens(grids)}


FAMILIES = {"qwen2_5_vl": Qwen2_5_VL, "qwen3_vl": Qwen3VL}
# by the name of the processor's class, which model_files.load_processor checks
BY_PROCESSOR = {family.processor: family for family in FAMILIES.values()}
# all published sizes; no two families share one
SIZES = Qwen2_5_VL.sizes | Qwen3VL.sizes


def of(config):
    """The family of a model, by its config."""
    return FAMILIES[config.model_type]


def check_type(model_type):
    """Raise ValueError if the code cannot train models of this type."""
    if model_type in FAMILIES:
        return
    reason = ""
    if str(model_type).startswith(("qwen3_5", "qwen3_next", "qwen4")):
        reason = " (their linear layers take no attention mask, so the completions of a packed row would mix)"
    elif "moe" in str(model_type):
        reason = " (their experts would be routed differently in sampling and in training)"
    raise ValueError(f"models of type {model_type} cannot be used here{reason}, only {' and '.join(FAMILIES)}")


@functools.cache
def opening(processor):
    """What the chat template writes of each answer: in Thinking variants "<think>" and a newline, else nothing."""
    conversation = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    prompt = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return re.search(r"(<think>\s*)?$", prompt).group()


def texts(processor, completions):
    """The texts of completions (1-D tensors of token ids), with what the chat template has written of them."""
    decoded = processor.tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [opening(processor) + text for text in decoded]
