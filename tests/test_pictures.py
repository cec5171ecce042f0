"""A picture is a clip of one moment (data.as_clip): the model computes from it what it computes from Hugging Face's
image.
"""

import json

import naive
import pytest
import torch
from PIL import Image

import data
import policy
from support import families, model_files, tiny_model
from support.settings import SharedConfig


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_picture_as_a_clip_equals_hugging_faces_image_path(family, world, tmp_path):
    """Guards: other features, positions or logits for pictures than the checkpoint was trained with; a time stamp."""
    base = tmp_path / "base"
    tiny_model.make_model(base, json.loads((world / "world/sft.json").read_text()), family=family)
    Image.effect_mandelbrot((180, 120), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(tmp_path / "picture.png")
    cfg = SharedConfig(model=str(base), data_root=str(tmp_path), min_pixels=1024, max_pixels=20 * 1024)
    record = {
        "problem": "What is it?",
        "problem_type": "free-form",
        "data_type": "image",
        "path": "picture.png",
        "solution": "<answer>a fractal</answer>",
    }
    processor = model_files.load_processor(cfg)
    model = policy.load_policy(cfg).eval()
    ours = data.Samples([record], processor, cfg, in_file_order=True)[0].inputs["ordered"]

    text = processor.apply_chat_template(data.messages(record, cfg), tokenize=False, add_generation_prompt=True)
    size = {"shortest_edge": cfg.min_pixels, "longest_edge": cfg.max_pixels}
    theirs = processor(
        text=[text], images=[Image.open(tmp_path / "picture.png")], images_kwargs={"size": size}, return_tensors="pt"
    )
    theirs = {name: theirs[name] for name in theirs}
    assert (theirs["mm_token_type_ids"] == 1).sum() > 4

    positions = policy.mrope_positions(ours, model.config)
    grid = theirs["image_grid_thw"]
    expected = model.model.get_rope_index(theirs["input_ids"], theirs["mm_token_type_ids"], image_grid_thw=grid)[0]
    assert torch.equal(positions, expected[:, 0])
    with torch.no_grad():
        features = model.model.get_video_features(ours["pixel_values_videos"], ours["video_grid_thw"]).pooler_output
        expected = model.model.get_image_features(theirs["pixel_values"], grid).pooler_output
        assert torch.equal(torch.cat(list(features)), torch.cat(list(expected)))
        logits = model(**ours, position_ids=positions[:, None], use_cache=False).logits
        expected = model(**theirs, position_ids=positions[:, None], use_cache=False).logits
        assert torch.equal(logits, expected)
        # of an answer, as the loss computes them, and with transformers' own positions
        answer = torch.arange(20, 30)
        packed = policy.pack(model, [ours], [[answer]], processor.tokenizer.pad_token_id)
        logps, _ = policy.completion_logps(model, packed)
        theirs |= {
            "input_ids": torch.cat([theirs["input_ids"], answer[None]], 1),
            "attention_mask": torch.ones(1, len(positions[0]) + len(answer), dtype=torch.long),
            "mm_token_type_ids": torch.nn.functional.pad(theirs["mm_token_type_ids"], (0, len(answer))),
        }
        expected = model(**theirs, use_cache=False).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        assert (logps[0] - expected.gather(1, answer[:, None])[:, 0]).abs().max() < 1e-5


@pytest.mark.parametrize("family", families.FAMILIES)
def test_as_picture_undoes_as_clip(family):
    """Guards: a plain reference (naive.py) that takes the same path as the code it checks."""
    x = naive.prompt("image", (1, 4, 4), 3, 1, family=family)
    picture = naive.as_picture(x)
    assert "pixel_values_videos" not in picture and (picture["input_ids"] == naive.IMAGE).sum() == 4
