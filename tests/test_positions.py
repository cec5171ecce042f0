"""M-RoPE positions: those the checkpoints were trained with, and the same ones in every stage, however long the clip
is.
"""

import json

import naive
import pytest
import torch

import data
import policy
from support import families, model_files, settings, tiny_model

# Rows of a hub-sized clip, 16 frames of 720p: 8 temporal patches of 16 x 30 (see the test of its positions).
WIDE = (8, 16, 30)


def wide_prompt(seconds):
    """15 tokens, the clip, 5 tokens; only what positions depend on."""
    kinds = [0] * 15 + [data.VIDEO] * (8 * 8 * 15) + [0] * 5
    return {
        "mm_token_type_ids": torch.tensor([kinds]),
        "video_grid_thw": torch.tensor([WIDE]),
        "second_per_grid_ts": torch.tensor([seconds / 8]),
    }


@pytest.fixture(scope="module")
def model():
    return naive.tiny_policy()


def test_text_after_a_long_clip_starts_after_its_last_moment(model):
    """Guards: transformers 5.24's rule, which puts the text after a two-minute clip inside the clip, at position 30."""
    positions = policy.mrope_positions(wide_prompt(120.0), model.config)
    clip = positions[:, 15:-5]
    after = positions[:, -5:]
    assert clip[0].unique().tolist() == [15, 45, 75, 105, 135, 165, 195, 225]
    assert (clip[1].min(), clip[1].max(), clip[2].min(), clip[2].max()) == (15, 22, 15, 29)
    assert after.tolist() == [[226, 227, 228, 229, 230]] * 3
    assert positions[:, :15].tolist() == [list(range(15))] * 3


def test_frames_of_a_short_clip_share_time_positions(model):
    """Guards: a time axis with more positions per second than the 2 that the checkpoints were trained on."""
    for seconds, moments in ((1.0, 2), (2.0, 4), (4.0, 8), (60.0, 8)):
        clip = policy.mrope_positions(wide_prompt(seconds), model.config)[0, 15:-5]
        assert len(clip.unique()) == moments


def test_positions_equal_transformers_for_short_clips(model):
    """Guards: rows and columns swapped, a wrong start, frame times of another clip, a picture with a time axis."""
    generator = torch.Generator().manual_seed(0)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    agree = 0
    for seed in range(60):
        T = draw(1, 9)
        H = 2 * draw(1, 9)
        W = 2 * draw(1, 9)
        kind = "image" if seed % 3 == 0 else "video"
        x = naive.prompt(kind, (1 if kind == "image" else T, H, W), draw(1, 20), seed, seconds=draw(1, 400) / 10)
        ours = policy.mrope_positions(x, model.config)
        picture = naive.as_picture(x)
        media = {k: v for k, v in picture.items() if k not in ("input_ids", "mm_token_type_ids") and "pixel" not in k}
        theirs = model.model.get_rope_index(picture["input_ids"], picture["mm_token_type_ids"], **media)[0][:, 0]
        before_text = x["mm_token_type_ids"][0].nonzero().max() + 1
        assert torch.equal(ours[:, :before_text], theirs[:, :before_text])
        if ours[:, :before_text].max() < theirs[0, before_text]:
            assert torch.equal(ours, theirs)
            agree += 1
        assert ours[0, before_text] == ours[:, :before_text].max() + 1
    assert 20 < agree < 60


def random_prompt(generator):
    """What positions depend on, of a prompt of Qwen3-VL with one to three clips and pictures, as we and as transformers
    have it: there a picture is no clip.
    """

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    ours = []
    theirs = []
    grids = {1: [], data.VIDEO: []}
    in_order = []
    for _ in range(draw(1, 4)):
        kind = draw(1, 3)
        grid = [1 if kind == 1 else draw(1, 9), 2 * draw(1, 9), 2 * draw(1, 9)]
        grids[kind].append(grid)
        in_order.append(grid)
        n_tokens = grid[1] * grid[2] // 4
        for _ in range(grid[0]):
            n_text = draw(1, 9)
            ours += [0] * n_text + [data.VIDEO] * n_tokens
            theirs += [0] * n_text + [kind] * n_tokens
    after = [0] * draw(1, 20)
    prompt = {"mm_token_type_ids": torch.tensor([ours + after]), "video_grid_thw": torch.tensor(in_order)}
    media = {
        "image_grid_thw": torch.tensor(grids[1]) if grids[1] else None,
        "video_grid_thw": torch.tensor(grids[data.VIDEO]) if grids[data.VIDEO] else None,
    }
    return prompt, torch.tensor([theirs + after]), media


def test_positions_of_qwen3_vl_equal_transformers():
    """Guards: text after a clip or between its moments at other positions than the checkpoints were trained with; the
    grid of another clip, rows and columns swapped.
    """
    model = naive.tiny_policy(family="qwen3_vl")
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        prompt, kinds, media = random_prompt(generator)
        ours = policy.mrope_positions(prompt, model.config)
        theirs, _ = model.model.get_rope_index(torch.zeros_like(kinds), kinds, **media)
        assert torch.equal(ours, theirs[:, 0])


def test_positions_of_encoded_files_equal_transformers_for_qwen3_vl(world, tmp_path):
    """Guards: token types of other tokens than those of the pixels; an order of frames with another number of runs."""
    records = json.loads((world / "world/sft.json").read_text())
    tiny_model.make_model(tmp_path / "base", records, family="qwen3_vl")
    cfg = settings.SharedConfig(model=str(tmp_path / "base"), data_root=str(world / "world"))
    model = policy.load_policy(cfg)
    processor = model_files.load_processor(cfg)
    orders = ("ordered", "shuffled", "reversed", "single", "blind")
    seen = set()
    samples = data.Samples(records, processor, cfg, orders, in_file_order=True)
    for i in range(len(records)):
        sample = samples[i]
        for order, x in sample.inputs.items():
            kinds = (x["input_ids"] == model.config.video_token_id) * data.VIDEO
            theirs, _ = model.model.get_rope_index(x["input_ids"], kinds, video_grid_thw=x.get("video_grid_thw"))
            assert torch.equal(policy.mrope_positions(x, model.config), theirs[:, 0])
            seen.add((sample.record["data_type"], order))
    assert seen == {("video", order) for order in orders} | {("image", "ordered"), ("image", "blind")}


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("media", [[4], [40], [120], [600], [None], [4, None, 600]], ids=str)
def test_sampling_training_and_sft_use_the_same_positions(media, family, monkeypatch):
    """Guards: training at other positions than sampling: 5 nats per token for a clip of 100 s."""
    model = naive.tiny_policy(family=family)
    prompts = []
    for seed, seconds in enumerate(media, 5):
        kind, grid = ("image", (1, 4, 4)) if seconds is None else ("video", (8, 2, 4))
        prompts.append(naive.prompt(kind, grid, 7, seed, seconds, family))
    seen = {}
    real = model.generate

    def watched(**inputs):
        seen["output"] = real(**inputs, return_dict_in_generate=True, output_scores=True)
        return seen["output"].sequences

    monkeypatch.setattr(model, "generate", watched)
    torch.manual_seed(1)
    completions = policy.rollout(model, prompts, [3] * len(prompts), naive.tokenizer, 1.0, 12)
    said_NTV = torch.stack(seen["output"].scores, 1).log_softmax(-1)
    banned = (naive.IMAGE, naive.VIDEO)
    groups = [completions[i : i + 3] for i in range(0, len(completions), 3)]
    prompt_of_row = [x for x in prompts for _ in range(3)]
    with torch.no_grad():
        # T-GRPO packs a group behind one prompt, SFT one target behind each prompt
        packed = policy.pack(model, prompts, groups, naive.PAD)
        packed_NT, _ = policy.completion_logps(model, packed, 1.0, banned)
        packed = policy.pack(model, prompt_of_row, [[c] for c in completions], naive.PAD)
        sft_NT, _ = policy.completion_logps(model, packed, 1.0, banned)
        for row, completion in enumerate(completions):
            T = len(completion)
            plain_T = naive.completion_logps(model, prompt_of_row[row], completion)
            sampled_T = said_NTV[row, :T].gather(1, completion[:, None])[:, 0]
            for other_T in (sampled_T, packed_NT[row, :T], sft_NT[row, :T]):
                assert (other_T - plain_T).abs().max() < 1e-5


def test_a_forward_without_positions_is_refused(model):
    """Guards: a new stage that uses transformers' positions and silently trains long clips at wrong ones."""
    x = naive.prompt("video", (2, 2, 4), 3, 1)
    packed = policy.pack(model, [x], [[torch.tensor([5, 6])]], naive.PAD)
    packed.inputs["position_ids"] = None
    with pytest.raises(TypeError, match="mrope_positions"):
        policy.completion_logps(model, packed)


def test_media_of_a_batch_keep_their_own_positions(model):
    """Guards: the frame times of one clip used for another of the same batch."""
    prompts = [
        naive.prompt("video", (8, 2, 4), 3, 1, 120.0),
        naive.prompt("image", (1, 4, 4), 9, 2),
        naive.prompt("video", (8, 2, 4), 5, 3, 6.0),
    ]
    inputs = policy.pack(model, prompts, [[torch.tensor([5])]] * 3, naive.PAD).inputs
    for b, x in enumerate(prompts):
        alone = policy.mrope_positions(x, model.config)
        P = alone.shape[1]
        assert torch.equal(inputs["position_ids"][:, b, :P], alone)
        assert inputs["position_ids"][:, b, P].tolist() == [int(alone.max()) + 1] * 3
