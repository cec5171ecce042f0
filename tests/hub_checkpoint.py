"""Writes a random checkpoint in the layout of the hub's Qwen2.5-VL-Instruct folders, which transformers 5 cannot write.

    python tests/hub_checkpoint.py FOLDER [--tied]         # a tiny one, to look at

The layout: a flat config.json without text_config, sharded bfloat16 weights with the names of transformers 4.49,
preprocessor_config.json without a video one, chat_template.json, a generation_config.json with a repetition penalty,
and Qwen2's tokenizer files. The real vocabulary is not available offline: the tokenizer is trained on `corpus`.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
# Qwen2's pattern for splitting text into words
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The hub's template. It adds a system turn if the conversation has none.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_TEXT = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 640, "rope_scaling": {"type": "mrope", "mrope_section": [4, 4, 4]},
    "initializer_range": 0.12,
}  # fmt: skip
TINY_VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 96,
    "fullatt_block_indexes": [1], "initializer_range": 0.12,
}  # fmt: skip


def write_tokenizer(folder, corpus):
    """Write Qwen2's tokenizer files, trained on `corpus`. Returns {special token: id}."""
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
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    flags = ("lstrip", "normalized", "rstrip", "single_word")
    added = {}
    for token, token_id in ids.items():
        added[str(token_id)] = {"content": token, **dict.fromkeys(flags, False), "special": True}
    settings = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": added, "bos_token": None,
        "additional_special_tokens": SPECIAL[1:], "chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>",
        "errors": "replace", "clean_up_tokenization_spaces": False, "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", settings)
    return ids


def write_json(path, tree):
    path.write_text(json.dumps(tree, indent=2), encoding="utf-8")


def write_hub_checkpoint(
    folder, corpus, tied=False, text=TINY_TEXT, vision=TINY_VISION, processor="Qwen2VLImageProcessor", seed=0
):
    """Write a checkpoint into `folder`. tied: the head is the embedding,
    as in 3B. processor: its name in the config."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    ids = write_tokenizer(folder, corpus)
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
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {
        "bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"], "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "repetition_penalty": 1.05, "temperature": 0.000001,
        "transformers_version": "4.49.0",
    })  # fmt: skip
    write_json(folder / "preprocessor_config.json", {
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": processor, "processor_class": "Qwen2_5_VLProcessor",
    })  # fmt: skip
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})

    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        Qwen2_5_VLConfig.from_pretrained(folder), dtype=torch.bfloat16
    )
    size = 2 * sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved, max_shard_size=size // 2)
        for path in Path(saved).glob("*.safetensors*"):
            shutil.copy(path, folder)
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(
        name.startswith(("visual.", "model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."))
        for name in names
    )
    assert ("lm_head.weight" in names) != tied


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tied", action="store_true", help="the head is the embedding, as in 3B")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        sys.exit(f"{arguments.folder} exists already")
    write_hub_checkpoint(
        arguments.folder, ["Which way does the disc move? A. left B. right <think></think>"] * 3, arguments.tied
    )
