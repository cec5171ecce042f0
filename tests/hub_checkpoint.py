"""Writes a random checkpoint in the layout of the hub's Qwen2.5-VL or Qwen3-VL folders. transformers 5 writes another.

    python tests/hub_checkpoint.py FOLDER [--family qwen3_vl] [--tied]         # a tiny one, to look at

Both have sharded bfloat16 weights, chat_template.json and Qwen2's tokenizer files. The real vocabulary is not available
offline: the tokenizer is trained on `corpus`. Qwen2.5-VL has a flat config.json without text_config, weights with the
names of transformers 4.49, preprocessor_config.json without a video one, and a generation_config.json with a repetition
penalty. Qwen3-VL has the nested config.json and the names of transformers 4.57, and the config of a video processor.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
# Qwen3's other added tokens, of which the thoughts' tags matter here: they are no special tokens, so they stay in texts
THINKING = ["<think>", "</think>"]
# Qwen2's pattern for splitting text into words
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2.5-VL's template adds a system turn if the conversation has none.
SYSTEM_TURN = (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
)
TURN = (
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
)
ANSWER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHAT_TEMPLATES = {
    "qwen2_5_vl": "{% for message in messages %}" + SYSTEM_TURN + TURN + "{% endfor %}" + ANSWER,
    "qwen3_vl": "{% for message in messages %}" + TURN + "{% endfor %}" + ANSWER,
}
TINY_TEXT = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 640, "initializer_range": 0.12,
}  # fmt: skip
TINY_VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 96,
    "initializer_range": 0.12,
}  # fmt: skip
# what one family has besides
TINY_TEXTS = {
    "qwen2_5_vl": TINY_TEXT | {"rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 4]}},
    "qwen3_vl": TINY_TEXT
    | {
        "head_dim": 24,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 4, 4], "rope_type": "default"},
    },
}
TINY_VISIONS = {
    "qwen2_5_vl": TINY_VISION | {"fullatt_block_indexes": [1]},
    "qwen3_vl": TINY_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64},
}


def write_tokenizer(folder, corpus, chat_template, tags):
    """Write Qwen2's tokenizer files, trained on `corpus`. `tags` are added tokens that are not special ones.

    Returns {special token: id}.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # vocab.json and merges.txt
    tokenizer.model.save(str(folder))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tags])
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = ("lstrip", "normalized", "rstrip", "single_word")
    added = {}
    for token in [*SPECIAL, *tags]:
        described = {"content": token, **dict.fromkeys(flags, False), "special": token in SPECIAL}
        added[str(tokenizer.token_to_id(token))] = described
    settings = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added, "bos_token": None,
        "additional_special_tokens": SPECIAL[1:], "chat_template": chat_template, "eos_token": "<|im_end|>",
        "errors": "replace", "clean_up_tokenization_spaces": False, "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", settings)
    return {token: tokenizer.token_to_id(token) for token in SPECIAL}


def write_json(path, tree):
    path.write_text(json.dumps(tree, indent=2), encoding="utf-8")


def qwen2_5_vl_files(ids, tied, text, vision, processor):
    """{name: content} of the files that only Qwen2.5-VL has like this."""
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"], "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"], "hidden_act": "silu",
        "initializer_range": 0.02, "max_position_embeddings": 128000, "max_window_layers": 28,
        "model_type": "qwen2_5_vl", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, **text,
        "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "in_chans": 3, "out_hidden_size": text["hidden_size"], "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
            "temporal_patch_size": 2, **vision,
        },
    }  # fmt: skip
    generation = {
        "bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"], "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "repetition_penalty": 1.05, "temperature": 0.000001,
        "transformers_version": "4.49.0",
    }  # fmt: skip
    pictures = {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": processor, "processor_class": "Qwen2_5_VLProcessor",
    }  # fmt: skip
    return {"config.json": config, "generation_config.json": generation, "preprocessor_config.json": pictures}


def qwen3_vl_files(ids, tied, text, vision, processor):
    """{name: content} of the files that only Qwen3-VL has like this. Only a tied config says so in text_config too."""
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": ids["<|image_pad|>"],
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": ids["<|endoftext|>"],
            "dtype": "bfloat16", "eos_token_id": ids["<|im_end|>"], "head_dim": 128, "hidden_act": "silu",
            "initializer_range": 0.02, "max_position_embeddings": 262144, "model_type": "qwen3_vl_text",
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000, "use_cache": True, **({"tie_word_embeddings": True} if tied else {}), **text,
        },
        "tie_word_embeddings": tied, "transformers_version": "4.57.0.dev0", "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1024, "in_channels": 3, "initializer_range": 0.02, "intermediate_size": 4096,
            "model_type": "qwen3_vl", "num_heads": 16, "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"], "patch_size": 16, "spatial_merge_size": 2,
            "temporal_patch_size": 2, **vision,
        },
        "vision_end_token_id": ids["<|vision_end|>"], "vision_start_token_id": ids["<|vision_start|>"],
    }  # fmt: skip
    generation = {
        "bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"], "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "top_k": 20, "top_p": 0.8,
        "repetition_penalty": 1.0, "temperature": 0.7, "transformers_version": "4.56.0",
    }  # fmt: skip
    both = {
        "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5], "processor_class": "Qwen3VLProcessor",
    }  # fmt: skip
    pictures = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "image_processor_type": processor}
    videos = {
        "size": {"longest_edge": 25165824, "shortest_edge": 4096}, "video_processor_type": "Qwen3VLVideoProcessor"
    }  # fmt: skip
    return {
        "config.json": config,
        "generation_config.json": generation,
        "preprocessor_config.json": pictures | both,
        "video_preprocessor_config.json": videos | both,
    }


# family: its files, the name of its image processor, how names of weights begin
FAMILIES = {
    "qwen2_5_vl": (
        qwen2_5_vl_files,
        "Qwen2VLImageProcessor",
        ("visual.", "model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."),
    ),
    "qwen3_vl": (
        qwen3_vl_files,
        "Qwen2VLImageProcessorFast",
        ("model.visual.", "model.language_model.", "lm_head."),
    ),
}


# name: arguments of write_hub_checkpoint, for checkpoints as of 7B, 3B, 8B, and 2B or 4B
LAYOUTS = {
    "untied": {},
    "tied": {"tied": True},
    "qwen3_untied": {"family": "qwen3_vl"},
    "qwen3_tied": {"family": "qwen3_vl", "tied": True},
}


def write_hub_checkpoint(
    folder, corpus, tied=False, text=None, vision=None, processor=None, seed=0, family="qwen2_5_vl"
):
    """Write a checkpoint into `folder`.

    tied: the head is the embedding, as in Qwen2.5-VL-3B and in Qwen3-VL-2B and 4B. text, vision: sizes, by default tiny
    ones. processor: the name of the image processor, by default the hub's.
    """
    files, usual_processor, beginnings = FAMILIES[family]
    folder = Path(folder)
    folder.mkdir(parents=True)
    chat_template = CHAT_TEMPLATES[family]
    ids = write_tokenizer(folder, corpus, chat_template, THINKING if family == "qwen3_vl" else [])
    write_json(folder / "chat_template.json", {"chat_template": chat_template})
    sizes = (text or TINY_TEXTS[family], vision or TINY_VISIONS[family])
    for name, content in files(ids, tied, *sizes, processor or usual_processor).items():
        write_json(folder / name, content)

    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    size = 2 * sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved, max_shard_size=size // 2)
        for path in Path(saved).glob("*.safetensors*"):
            shutil.copy(path, folder)
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(name.startswith(beginnings) for name in names)
    assert ("lm_head.weight" in names) != tied


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen2_5_vl")
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} exists already")
    write_hub_checkpoint(
        arguments.folder,
        ["Which way does the disc move? A. left B. right <think></think>"] * 3,
        arguments.tied,
        family=arguments.family,
    )
