"""A tiny Qwen2.5-VL or Qwen3-VL for toy.py: random weights, a tokenizer of its own, the layout of any checkpoint."""

import shutil
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from support import parsing, storage

CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def make_tokenizer(records, other_text=()):
    """Byte-level BPE trained on the text of the records and on `other_text`. Each of the four tags is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [" ".join([r["problem"], *r["options"], r["process"], r["solution"], "user assistant"]) for r in records]
    tokenizer.train_from_iterator([*corpus, *other_text], trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in parsing.TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", *VISION_TOKENS],
        model_max_length=4096,
    )


def make_model(folder, records, seed=0, family="qwen2_5_vl"):
    """Write a checkpoint of half a million random weights, with a tokenizer trained on the text of the records."""
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    time_stamps = [f"<{tenths / 10} seconds>" for tenths in range(100)]
    tokenizer = make_tokenizer(records, time_stamps if family == "qwen3_vl" else ())
    token = tokenizer.convert_tokens_to_ids
    # initializer_range 0.12: with the usual 0.02 so small a model learns nothing visual
    text_config = dict(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        initializer_range=0.12,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=token("<|im_end|>"),
        pad_token_id=token("<|endoftext|>"),
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 4, 4]),
    )
    vision_config = dict(
        depth=1, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=96, initializer_range=0.12
    )
    if family == "qwen3_vl":
        text_config |= {"head_dim": 24}
        vision_config |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        video_processor = Qwen3VLVideoProcessor(do_sample_frames=False)
        image_processor = Qwen2VLImageProcessor(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        processor = Qwen3VLProcessor(image_processor, tokenizer, video_processor, CHAT_TEMPLATE)
    else:
        vision_config |= {"fullatt_block_indexes": [0], "tokens_per_second": 2}
        video_processor = Qwen2VLVideoProcessor(do_sample_frames=False)
        image_processor = Qwen2VLImageProcessor()
        processor = Qwen2_5_VLProcessor(image_processor, tokenizer, video_processor, CHAT_TEMPLATE)
    config = AutoConfig.for_model(
        family,
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=True,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    storage.replace_folder(unfinished, folder)
