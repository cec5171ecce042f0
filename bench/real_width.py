"""Checks the code at the real widths of Qwen2.5-VL-7B on a CPU: 2 of 28 text layers, 8 of 32 vision blocks.

    python bench/real_width.py               # at most 11 minutes, 16 GB of memory, 20 GB of temporary disk space
    python bench/real_width.py --shape 3b    # the widths of 3B, whose head is its embedding
    python bench/real_width.py --shape 4b    # of Qwen3-VL-4B: 3 of 36 text layers, 6 of 24 vision blocks

A random checkpoint in the hub's layout, with the whole vocabulary, answers questions on a picture, a clip of 10 seconds
and one of a minute:

    1. log-probs of packed rows equal those of a plain forward pass, one row per completion, to 1e-4 nats
    2. a greedy rollout equals Hugging Face's generate token by token

It is too slow for CI.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import naive
import numpy as np
import torch
from hub_checkpoint import write_hub_checkpoint
from PIL import Image
from test_data import write_video

import data
import policy
from support import families, model_files
from support.settings import SharedConfig
from tools import plan_memory

# All kinds of layers that a family has. Qwen3-VL adds the features of three vision blocks after three text layers.
TEXT_LAYERS = {"qwen2_5_vl": 2, "qwen3_vl": 3}
VISION = {
    "qwen2_5_vl": {"depth": 8, "fullatt_block_indexes": [3, 7]},
    "qwen3_vl": {"depth": 6, "deepstack_visual_indexes": [1, 2, 4]},
}
QUESTION = {
    "problem_type": "multiple choice", "options": ["A. left", "B. right"], "problem": "Which way does the disc move?",
    "solution": "<answer>B</answer>",
}  # fmt: skip
FILES = {"picture": ("image", "picture.png"), "10 s": ("video", "10.mp4"), "60 s": ("video", "60.mp4")}


def make_files(folder, shape):
    """Writes folder/model and the media. Returns the records that name them."""
    write_video(folder / "10.mp4", 80, fps=8, size=(640, 360))
    write_video(folder / "60.mp4", 480, fps=8, size=(640, 360))
    pixels = np.random.default_rng(1).integers(0, 255, (333, 777, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    records = [
        {**QUESTION, "problem_id": i, "data_type": kind, "path": path} for i, (kind, path) in enumerate(FILES.values())
    ]
    corpus = [" ".join(map(str, QUESTION.values()))] * 9
    config = plan_memory.model_shape(shape)
    text = dict(zip(families.TEXT, families.SIZES[shape]))
    text["num_hidden_layers"] = TEXT_LAYERS[config.model_type]
    vision = {name: getattr(config.vision_config, name) for name in ("hidden_size", "intermediate_size", "num_heads")}
    vision |= VISION[config.model_type]
    write_hub_checkpoint(folder / "model", corpus, config.tie_word_embeddings, text, vision, family=config.model_type)
    return records


@torch.no_grad()
def compare(folder, records):
    """Prints one line per prompt, raises AssertionError if they differ."""
    cfg = SharedConfig(model=str(folder / "model"), data_root=str(folder))
    processor = model_files.load_processor(cfg)
    model = policy.load_policy(cfg).eval()
    pad = processor.tokenizer.pad_token_id
    banned = tuple(policy.placeholder_ids(model))
    samples = data.Samples(records, processor, cfg, ("ordered",), in_file_order=True)
    prompts = [samples[i].inputs["ordered"] for i in range(len(records))]

    generator = torch.Generator().manual_seed(0)
    groups = [[torch.randint(0, 200, (n,), generator=generator) for n in (24, 5)] for _ in prompts]
    packed_NT, _ = policy.completion_logps(model, policy.pack(model, prompts, groups, pad), 1.0, banned)
    packed = iter(packed_NT)
    for name, x, group in zip(FILES, prompts, groups):
        begin = time.perf_counter()
        plain = [naive.completion_logps(model, x, c, placeholders=banned) for c in group]
        error = max((next(packed)[: len(c)] - logps_T).abs().max().item() for c, logps_T in zip(group, plain))
        (ours,) = policy.rollout(model, [x], [1], processor.tokenizer, 0, 16)
        ids = model.generate(
            **x,
            position_ids=naive.batch_positions(model, [x]),
            do_sample=False,
            max_new_tokens=16,
            suppress_tokens=list(banned),
            eos_token_id=policy.eos_ids(model, processor.tokenizer),
            pad_token_id=pad,
        )
        P = x["input_ids"].shape[1]
        same = ours.tolist() == ids[0, P : P + len(ours)].tolist()
        print(
            f"{name:<8} {P:>5} tokens: packed and plain log-probs differ by at most {error:.1e}; "
            f"greedy rollout {'equals' if same else 'DIFFERS FROM'} generate ({time.perf_counter() - begin:.0f} s)",
            flush=True,
        )
        assert error < 1e-4 and same


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=families.SIZES, default="7b", help="default: 7b")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        records = make_files(folder, args.shape)
        compare(folder, records)
    print("all equal")


if __name__ == "__main__":
    main()
