"""The plain way, one prompt and one completion at a time: slow, obvious, and what tgrpo.py must equal."""

import types

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen3VLConfig

from policy import Policy, mrope_positions
from support import families
from support.distributed import seed_everything
from support.storage import read_jsonl

IMAGE = 60
VIDEO = 61
START = 62
END = 63
EOS = 1
PAD = 2
tokenizer = types.SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)

TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "initializer_range": 0.2,
}
TINY_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": 32,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.2,
}
# {family: (class of its config, what differs in its text model, in its vision tower)}
TINY = {
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
        {"patch_size": 14, "fullatt_block_indexes": [1], "window_size": 28, "tokens_per_second": 2},
    ),
    "qwen3_vl": (
        Qwen3VLConfig,
        # three layers, because what is added after the last one at a clip's tokens has no effect; heads of 16, not of
        # 32 / 4; of their 8 frequencies time has 4, which lie between those of rows and columns
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
        },
        # a table of 4 x 4 positions, which is interpolated; features of both blocks are added after two text layers
        {"patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    ),
}


def tiny_policy(seed=3, generation=None, family="qwen2_5_vl", **text):
    """A random policy of about 100,000 parameters. Large initial weights, so that its distributions are not flat.

    `generation` is what its generation_config.json would say.
    """
    seed_everything(seed)
    make_config, text_of_family, vision_of_family = TINY[family]
    config = make_config(
        text_config=TINY_TEXT | text_of_family | text,
        vision_config=TINY_VISION | vision_of_family,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    config._attn_implementation = "sdpa"
    model = AutoModelForImageTextToText.from_config(config)
    for name, value in (generation or {}).items():
        setattr(model.generation_config, name, value)
    return Policy.of(model).eval()


def prompt(kind, grid, n_text, seed, seconds=None, family="qwen2_5_vl"):
    """Inputs of a prompt with random pixels, as data.encode makes them (a picture is a clip of one moment).

    kind: "video" or "image"; grid: (T, H, W) in patches; `seconds` of the clip.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 50, (n_text,), generator=generator).tolist()
    seconds_per_patch = seconds / grid[0] if seconds else 1.0 + seed % 3
    vision = TINY[family][2]
    moment = [VIDEO] * (grid[1] * grid[2] // 4)
    media = []
    if kind == "video" and families.FAMILIES[family].has_time_stamps:
        for t in range(grid[0]):
            media += [*time_stamp((t + 0.25) * seconds_per_patch), START, *moment, END]
    else:
        media = [START, *moment * grid[0], END]
    ids = torch.tensor([[5, *media, *text]])
    patch_pixels = 3 * 2 * vision["patch_size"] ** 2
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO) * 2,
        "pixel_values_videos": torch.randn(grid[0] * grid[1] * grid[2], patch_pixels, generator=generator),
        "video_grid_thw": torch.tensor([grid]),
    }
    if kind == "video" and "tokens_per_second" in vision:
        inputs["second_per_grid_ts"] = torch.tensor([seconds_per_patch])
    return inputs


def time_stamp(seconds):
    """The tokens of a time: an opening, the digits and the point, a closing."""
    digits = [9 if character == "." else 10 + int(character) for character in f"{seconds:.1f}"]
    return [7, *digits, 8]


def as_picture(x, image_token_id=IMAGE):
    """A clip of one moment as the inputs that Hugging Face's processor makes of a picture; other clips as they are."""
    if x["video_grid_thw"][0, 0] > 1:
        return x
    is_media = x["mm_token_type_ids"] > 0
    kept = {k: v for k, v in x.items() if k not in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")}
    return kept | {
        "input_ids": x["input_ids"].masked_fill(is_media, image_token_id),
        "mm_token_type_ids": is_media * 1,
        "pixel_values": x["pixel_values_videos"],
        "image_grid_thw": x["video_grid_thw"],
    }


def mixed_prompts(family="qwen2_5_vl"):
    """One image and two videos, of different lengths."""
    return [
        prompt("video", (2, 2, 4), 3, 1, family=family),
        prompt("image", (1, 4, 4), 9, 2, family=family),
        prompt("video", (4, 4, 2), 5, 3, family=family),
    ]


def batch_positions(model, prompts):
    """Positions (3, B, P) of several prompts, padded on the left as data.collate_prompts pads."""
    rows = [mrope_positions(x, model.config) for x in prompts]
    longest = max(row.shape[1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows], 1)


@torch.no_grad()
def generate(model, x, n=1, own_positions=False, **sampling):
    """HF generate on one prompt, at our positions or at its own. Returns (sequences (n, T), per-step scores)."""
    inputs = as_picture(x, model.config.image_token_id)
    if not own_positions:
        inputs = inputs | {"position_ids": batch_positions(model, [x])}
    output = model.generate(
        **inputs,
        num_return_sequences=n,
        return_dict_in_generate=True,
        output_scores=True,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        suppress_tokens=[IMAGE, VIDEO],
        eos_token_id=EOS,
        pad_token_id=PAD,
        **sampling,
    )
    return output.sequences[:, x["input_ids"].shape[1] :], output.scores


def completion_logps(model, x, completion, temperature=1.0, placeholders=(IMAGE, VIDEO)):
    """Log-probs (T,) of one completion from one whole row and its full logits, placeholders banned as in sampling."""
    n = len(completion)
    P = x["input_ids"].shape[1]
    ids = torch.cat([x["input_ids"], completion[None]], 1)
    kinds = torch.cat([x["mm_token_type_ids"], torch.zeros(1, n, dtype=torch.long)], 1)
    row = {**x, "input_ids": ids, "mm_token_type_ids": kinds, "attention_mask": torch.ones_like(ids)}
    output = model(
        **as_picture(row, model.config.image_token_id), position_ids=batch_positions(model, [row]), use_cache=False
    )
    logits = output.logits[0, P - 1 : -1] / temperature
    banned = torch.zeros(logits.shape[-1], dtype=torch.bool).index_fill(0, torch.tensor(placeholders), True)
    return logits.masked_fill(banned, -torch.inf).log_softmax(-1).gather(1, completion[:, None])[:, 0]


def without_times(folder):
    """The metrics of a run, less what depends on the clock."""
    timed = ("time/", "rollout/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in read_jsonl(folder / "metrics.jsonl")]
