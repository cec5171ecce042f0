"""Qwen3-VL's prompts: time stamps, the orders of frames under them, pixel limits, clips of one frame; and, for both
families, chat templates that open <think>.
"""

import json
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import write_video
from test_media import UNEVEN, write_clip

import data
import rewards
import tgrpo
from support import families, model_files, tiny_model
from support.settings import SharedConfig, UserError
from support.storage import read_jsonl

ORDERS = ("ordered", "shuffled", "reversed", "single", "blind")
CLIP = {
    "problem": "Which way?", "problem_type": "multiple choice", "options": ["A. left", "B. right"],
    "data_type": "video", "solution": "<answer>B</answer>", "path": "a.mp4",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(world):
    """A tiny Qwen3-VL."""
    records = json.loads((world / "world/sft.json").read_text())
    tiny_model.make_model(world / "qwen3_vl", records, family="qwen3_vl")
    return world / "qwen3_vl"


@pytest.fixture(scope="module")
def processor(base):
    return model_files.load_processor(SharedConfig(model=str(base)))


def sample(processor, folder, record=CLIP, **settings):
    """The Sample of a record, with frames in all orders."""
    defaults = {"data_root": str(folder), "max_frames": 8, "min_pixels": 1024, "max_pixels": 4096}
    cfg = SharedConfig(**(defaults | settings))
    return data.Samples([record], processor, cfg, ORDERS, in_file_order=True)[0]


def stamps(processor, inputs):
    """The time stamps in a prompt, in seconds."""
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    return [float(stamp) for stamp in re.findall(r"<(\d+\.\d) seconds>", text)]


def pairs(times):
    """The mean time of each temporal patch, as it is printed."""
    padded = [*times, times[-1]] if len(times) % 2 else times
    return [float(f"{(a + b) / 2:.1f}") for a, b in zip(padded[::2], padded[1::2])]


def brightness(inputs):
    """The mean of each frame's pixels (F,)."""
    grid_t, *_ = inputs["video_grid_thw"][0].tolist()
    # a patch is channel, frame, row, column
    return inputs["pixel_values_videos"].view(grid_t, -1, 3, 2, 256).mean((1, 2, 4)).flatten()


def test_a_prompt_has_the_form_of_the_release(processor, tmp_path):
    """Guards: the tokens round the whole clip that transformers 5.10 and later leave in the prompt; 4.57 does not."""
    write_video(tmp_path / "a.mp4", 8)
    text = processor.tokenizer.decode(sample(processor, tmp_path).inputs["ordered"]["input_ids"][0])
    patch = "<|vision_start|>" + 4 * "<|video_pad|>" + "<|vision_end|>"
    clip = "".join(f"<{seconds} seconds>{patch}" for seconds in ("0.1", "0.6", "1.1", "1.6"))
    assert text.startswith(f"<|im_start|>user\n{clip}Which way?")


@pytest.mark.parametrize("ticks", [range(150), UNEVEN, [0, 1, 2, 200], [7]])
@pytest.mark.parametrize("n", [5, 16])
def test_time_stamps_are_when_the_frames_are_on_display(processor, tmp_path, ticks, n):
    """Guards: frame numbers over the mean rate, which are seconds off in clips of an uneven rate; a clip of one frame
    that the processor refuses.
    """
    write_clip(tmp_path / "a.mp4", list(ticks))
    x = sample(processor, tmp_path, max_frames=n)
    _, metadata = data.load_media(CLIP, SharedConfig(data_root=str(tmp_path), max_frames=n))
    assert stamps(processor, x.inputs["ordered"]) == pairs(metadata.timestamps)
    last = (ticks[-1] - ticks[0]) / 25
    assert 0 <= metadata.timestamps[0] and metadata.timestamps[-1] <= last + 1e-6
    assert set(x.inputs) == ({"ordered", "blind"} if len(ticks) == 1 else set(ORDERS))


@pytest.mark.parametrize("n_frames", [16, 17, 24, 31, 40])
def test_a_frame_that_is_shown_once_counts_from_when_it_appears(n_frames):
    """Guards: 1.06 seconds for a frame that appears after one second, in clips of few more frames than are shown."""
    indices, _, _, seconds = data.even_frames(range(n_frames), Fraction(1), 16)
    assert seconds == indices


def test_a_picture_of_the_question_comes_after_the_clip(processor, tmp_path):
    """Guards: a picture at the time of the last frame, or of the first."""
    write_video(tmp_path / "a.mp4", 7)
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    x = sample(processor, tmp_path, CLIP | {"image_path": "a.png"})
    assert stamps(processor, x.inputs["ordered"]) == pairs([i / 4 for i in range(8)])
    assert stamps(processor, x.inputs["single"]) == pairs([3 / 4, 3 / 4, 7 / 4])


def test_a_part_of_a_clip_is_timed_from_its_beginning(processor, tmp_path):
    """Guards: a part that tells where in the file it was cut out, unlike the same part as a file of its own."""
    write_video(tmp_path / "a.mp4", 40)
    x = sample(processor, tmp_path, CLIP | {"start": 5, "end": 7})
    assert stamps(processor, x.inputs["ordered"]) == [0.1, 0.6, 1.1, 1.6]


@pytest.mark.parametrize("unit", ["frame", "patch"])
@pytest.mark.parametrize("n_frames", [7, 8])
def test_frames_move_under_fixed_time_stamps_or_with_theirs(processor, tmp_path, unit, n_frames):
    """Guards: a shuffle whose order can be read in the text, so that p and p̃ hardly differ; stamps that do not move
    although shuffle_stamps says so.
    """
    write_video(tmp_path / "a.mp4", n_frames)
    times = [i / 4 for i in range(n_frames)]
    for moves in (False, True):
        x = sample(processor, tmp_path, shuffle_unit=unit, shuffle_stamps=moves)
        in_order = brightness(x.inputs["ordered"])
        assert (in_order[:n_frames].diff() > 0).all()
        orders = {"shuffled": x.frame_order, "reversed": list(range(n_frames))[::-1]}
        for name, order in orders.items():
            shown = [*order, order[-1]] if len(order) % 2 else order
            assert torch.equal(brightness(x.inputs[name]), in_order[shown])
            expected = [times[i] for i in order] if moves else times
            assert stamps(processor, x.inputs[name]) == pairs(expected)
        if not moves:
            # only the pixels differ
            for name in ("shuffled", "reversed"):
                assert torch.equal(x.inputs[name]["input_ids"], x.inputs["ordered"]["input_ids"])


@pytest.mark.parametrize("unit", ["frame", "patch"])
@pytest.mark.parametrize("n_frames", [6, 7, 8])
def test_the_questions_last_frame_stays_in_its_pair(processor, tmp_path, unit, n_frames):
    """Guards: one temporal patch more in a shuffled clip than in the ordered one, for which there is no time stamp."""
    write_video(tmp_path / "a.mp4", n_frames)
    x = sample(processor, tmp_path, CLIP | {"last_frame": True}, shuffle_unit=unit)
    assert sorted(x.frame_order) == list(range(n_frames)) and x.frame_order[-1] == n_frames - 1
    if unit == "patch":
        firsts = x.frame_order[::2]
        assert all(first % 2 == 0 for first in firsts)
        assert x.frame_order[1::2] == [first + 1 for first in firsts if first + 1 < n_frames]
    for name in ("shuffled", "reversed"):
        assert torch.equal(x.inputs[name]["input_ids"], x.inputs["ordered"]["input_ids"])


def test_a_single_frame_carries_its_own_time(processor, tmp_path):
    """Guards: the middle frame under the time of the first."""
    write_video(tmp_path / "a.mp4", 8)
    x = sample(processor, tmp_path)
    assert stamps(processor, x.inputs["single"]) == [1.0]
    assert stamps(processor, x.inputs["blind"]) == []


def test_each_order_has_metadata_of_its_own(processor, tmp_path, monkeypatch):
    """Guards: one list for all orders, which transformers may lengthen in place if it is odd."""
    write_video(tmp_path / "a.mp4", 7)
    given = []

    def lengthen(processor, record, media, metadata, *_):
        if metadata is not None:
            given.append(len(metadata.frames_indices))
            metadata.frames_indices.append(0)
        return {}

    monkeypatch.setattr(data, "encode", lengthen)
    sample(processor, tmp_path)
    # ordered, shuffled, reversed, single
    assert given == [7, 7, 7, 2]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("n_frames", [1, 2, 5, 16])
@pytest.mark.parametrize("limits", [(2**12, 2**14), (2**16, 2**18)])
def test_pixel_limits_are_those_of_a_frame_for_both_families(world, processor, tmp_path, family, n_frames, limits):
    """Guards: limits of the whole clip, so that a clip of 16 frames gets a sixteenth of the pixels."""
    if family == "qwen2_5_vl":
        processor = model_files.load_processor(SharedConfig(model=str(world / "base")))
    side = {"qwen2_5_vl": 28, "qwen3_vl": 32}[family]
    cfg = SharedConfig(min_pixels=limits[0], max_pixels=limits[1])
    metadata = data.VideoMetadata(total_num_frames=n_frames, fps=1.0, frames_indices=list(range(n_frames)))
    media = np.zeros((n_frames, 120, 200, 3), dtype=np.uint8)
    grid_t, grid_h, grid_w = data.encode(processor, CLIP, media, metadata, cfg)["video_grid_thw"][0].tolist()
    area = grid_h * grid_w * side * side / 4
    assert grid_t == -(-n_frames // 2)
    # rounded to whole tokens
    assert 0.7 * limits[0] <= area <= limits[1]
    if limits[1] < 120 * 200:
        assert area > 0.7 * limits[1]


@pytest.mark.parametrize("n_frames", [5, 8])
@pytest.mark.parametrize("moves", [False, True])
def test_pairs_move_before_a_last_frame_that_stays(processor, tmp_path, n_frames, moves):
    """Guards: an IndexError for a clip that is shuffled in pairs, with an odd frame before the one that stays."""
    write_video(tmp_path / "a.mp4", n_frames)
    x = sample(processor, tmp_path, CLIP | {"last_frame": True}, shuffle_unit="patch", shuffle_stamps=moves)
    moved = x.frame_order if moves else sorted(x.frame_order)
    assert x.frame_order[-1] == n_frames - 1
    assert stamps(processor, x.inputs["shuffled"]) == pairs([i / 4 for i in moved])


@pytest.mark.parametrize("record, n_frames", [(CLIP, 7), (CLIP | {"last_frame": True}, 8)])
def test_seconds_between_frames_are_those_of_the_clip_in_every_order(world, tmp_path, record, n_frames):
    """Guards: Qwen2.5-VL's seconds from the number of frames shown, which "single" and shuffled pairs change."""
    write_video(tmp_path / "a.mp4", 30)
    processor = model_files.load_processor(SharedConfig(model=str(world / "base")))
    x = sample(processor, tmp_path, record, shuffle_unit="patch", max_frames=n_frames)
    seconds = [x.inputs[order]["second_per_grid_ts"].item() for order in ORDERS if order != "blind"]
    assert seconds == pytest.approx([2 * 30 / 4 / n_frames] * 4)


@pytest.mark.parametrize("height", [1, 3])
def test_a_clip_as_high_as_there_are_colours_stays_upright(processor, tmp_path, height):
    """Guards: rows of pixels that are taken for the channels, so that width becomes height."""
    (tmp_path / "a").mkdir()
    for i in range(2):
        Image.new("RGB", (100, height), (50 * i, 0, 250)).save(tmp_path / f"a/{i}.png")
    x = sample(processor, tmp_path, CLIP | {"path": "a", "data_type": "frame"})
    grid_t, grid_h, grid_w = x.inputs["ordered"]["video_grid_thw"][0].tolist()
    assert grid_h == 2 < grid_w


def test_answers_under_other_time_stamps_are_not_continued(base, run):
    """Guards: rows of two kinds of shuffling in one file, both said to be of the second kind."""
    run("evaluate", model=base, orders="shuffled")
    with pytest.raises(UserError, match="has answers made with shuffle_stamps False"):
        run("evaluate", model=base, orders="shuffled", shuffle_stamps=True)


def test_time_stamps_cannot_be_shuffled_where_there_are_none(world):
    """Guards: a setting that does nothing."""
    with pytest.raises(UserError, match="shuffle_stamps: true: the prompts of .*base have no time stamps"):
        model_files.load_processor(SharedConfig(model=str(world / "base"), shuffle_stamps=True))


@pytest.mark.parametrize("layout, token", [("untied", 784), ("qwen3_tied", 1024)])
def test_a_limit_below_one_token_is_refused(hub, run, monkeypatch, layout, token):
    """Guards: frames of 1,024 pixels for max_pixels 800."""
    model_files.load_processor(SharedConfig(model=str(hub / layout), min_pixels=784, max_pixels=token))
    # of a hub name
    cfg = SharedConfig(model=str(hub / layout), min_pixels=784)
    cfg.max_pixels = token - 1
    with pytest.raises(UserError, match=f"max_pixels: {token - 1}, but a token of .*{layout} is {token} pixels"):
        model_files.load_processor(cfg)
    if token > 784:
        monkeypatch.setattr(model_files, "load_weights", None)
        for stage in ("sft", "tgrpo", "evaluate"):
            with pytest.raises(UserError, match="max_pixels: 1023, but a token of .* is 1024 pixels"):
                run(stage, model=hub / layout, min_pixels=784, max_pixels=1023)


# ------------------------------------------------------------------------------------------ templates that open <think>


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def thinking(request, world, base, tmp_path):
    """A checkpoint whose chat template opens <think>, as those of Thinking variants do."""
    start = {"qwen2_5_vl": world / "base", "qwen3_vl": base}[request.param]
    shutil.copytree(start, tmp_path / "thinking")
    template = tmp_path / "thinking/chat_template.jinja"
    text = template.read_text()
    assert "<|im_start|>assistant\n{% endif %}" in text
    template.write_text(
        text.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
    )
    return tmp_path / "thinking"


def test_an_opened_think_block_counts_as_part_of_the_answer(thinking, world):
    """Guards: SFT that learns <think><think>; a format reward of 0 for each completion of a Thinking variant."""
    processor = model_files.load_processor(SharedConfig(model=str(thinking)))
    plain = model_files.load_processor(SharedConfig(model=str(world / "base")))
    record = CLIP | {"process": "<think> It moves. </think>", "solution": "<answer>B</answer>"}
    target = data.target_ids(processor, record)
    decode = processor.tokenizer.decode
    assert decode(target) == "It moves. </think>\n<answer>B</answer><|im_end|>"
    (text,) = families.texts(processor, [target])
    assert text == "<think>\nIt moves. </think>\n<answer>B</answer>"
    assert rewards.format_reward(text) == 1
    decode = plain.tokenizer.decode
    assert decode(data.target_ids(plain, record)) == "<think> It moves. </think>\n<answer>B</answer><|im_end|>"
    assert families.opening(plain) == ""


def test_stages_of_a_thinking_variant_see_the_whole_answer(thinking, run, monkeypatch):
    """Guards: the opening in one stage, but not in another."""
    seen = []
    monkeypatch.setattr(tgrpo, "format_reward", lambda text: seen.append(text) or 0.0)
    run("tgrpo", model=thinking, steps=1, print_every=0)
    out = run("evaluate", "eval", model=thinking)
    seen += [row["prediction"] for row in read_jsonl(out / "predictions.jsonl")]
    assert seen and all(text.startswith("<think>\n") for text in seen)


@pytest.mark.parametrize("opening", ["", "<think>", "<think>\n", "<think> \n\n"])
def test_the_opening_is_what_the_template_writes_last(world, tmp_path, opening):
    """Guards: an opening that is lost because it ends otherwise than that of Qwen3-VL; a system turn that asks for
    <think> and </think>, taken for an opening or refused.
    """
    shutil.copytree(world / "base", tmp_path / "asks")
    template = tmp_path / "asks/chat_template.jinja"
    asking = "<|im_start|>system\nThink between <think> and </think>.<|im_end|>\n"
    template.write_text(asking + template.read_text() + f"{{{{ {opening!r} }}}}")
    processor = model_files.load_processor(SharedConfig(model=str(tmp_path / "asks")))
    assert families.opening(processor) == opening
    record = CLIP | {"process": "<think>\n\nIt moves.</think>"}
    learned = processor.tokenizer.decode(data.target_ids(processor, record))
    assert learned.startswith("It moves." if opening else "<think>\n\nIt moves.")


def test_a_closed_think_block_is_refused(world, tmp_path):
    """Guards: a template for answers without thoughts, whose completions all fail the format reward."""
    shutil.copytree(world / "base", tmp_path / "closed")
    template = tmp_path / "closed/chat_template.jinja"
    template.write_text(template.read_text() + "<think>\n\n</think>\n\n")
    with pytest.raises(UserError, match="its chat template closes <think>"):
        model_files.load_processor(SharedConfig(model=str(tmp_path / "closed")))
