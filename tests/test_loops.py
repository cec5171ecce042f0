"""The real loops of the three stages, a few steps each, on the tiny model: they run, learn, resume, and name what they
skip.
"""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from naive import without_times
from PIL import Image
from safetensors.torch import load_file, save_file
from test_data import write_video
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

import data
import policy
import tgrpo
from support import model_files, training
from support.settings import SharedConfig, UserError
from support.storage import fingerprint, read_jsonl
from tools import check_data


def weights(folder):
    return load_file(folder / "final/model.safetensors")


def settings(world, **values):
    defaults = {
        "model": str(world / "base"),
        "data_root": str(world / "world"),
        "prompt": "{problem} {options}",
        "min_pixels": 784,
        "max_pixels": 3136,
        "max_frames": 8,
        "num_workers": 0,
    }
    return SharedConfig(**defaults | values)


def some_accuracy(completion, *_):
    """A random policy answers nothing right; this stand-in gives its groups something to compare."""
    return float(len(completion) % 2)


@pytest.fixture(autouse=True)
def some_reward(monkeypatch):
    monkeypatch.setattr(tgrpo, "accuracy_reward", some_accuracy)


@pytest.fixture(scope="module")
def trained(run_into, tmp_path_factory):
    """{stage: folder of a run of three steps, with checkpoints after the first two}."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tgrpo, "accuracy_reward", some_accuracy)
        return {stage: run_into(folder / stage, stage, steps=3, save_every=1) for stage in ("sft", "tgrpo")}


@pytest.fixture(scope="module")
def evaluated(run_into, tmp_path_factory):
    """Folder of an evaluation in all orders, five questions per batch."""
    return run_into(tmp_path_factory.mktemp("evaluated") / "out", "evaluate", batch_size=5)


# ------------------------------------------------------------------------------------------------- training steps


@pytest.mark.parametrize("stage", ["sft", "tgrpo"])
def test_a_run_saves_changed_finite_weights_that_transformers_loads(world, trained, stage):
    """Guards: a script that cannot take a step; a checkpoint that only our own class can load."""
    out = trained[stage]
    rows = read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2] and all(math.isfinite(v) for row in rows for v in row.values())
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(out / "final", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(AutoProcessor.from_pretrained(out / "final")).__name__ == "Qwen2_5_VLProcessor"
    architectures = json.loads((out / "final/config.json").read_text())["architectures"]
    assert architectures == ["Qwen2_5_VLForConditionalGeneration"]
    before = load_file(world / "base/model.safetensors")
    after = weights(out)
    assert before.keys() == after.keys() and all(torch.isfinite(after[name]).all() for name in after)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(name.startswith("visual") for name in moved) and any("layers" in name for name in moved)


@pytest.mark.parametrize("stage", ["sft", "tgrpo"])
def test_a_resumed_run_equals_an_uninterrupted_run(run, trained, tmp_path, stage):
    """Guards: an optimizer, random state, data position or log that is lost in a resume."""
    whole = trained[stage]
    shutil.copytree(whole / "checkpoint-1", tmp_path / "part/checkpoint-1")
    # has steps 1 and 2 too: they must be dropped and repeated
    shutil.copy(whole / "metrics.jsonl", tmp_path / "part")
    part = run(stage, "part", steps=3, save_every=1)
    assert without_times(part) == without_times(whole) and len(without_times(whole)) == 3
    a = weights(whole)
    b = weights(part)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stage", ["sft", "tgrpo"])
def test_the_micro_batch_size_does_not_change_the_result(run, trained, stage):
    """Guards: a mean over micro-batches that overweights short answers or a small last micro-batch."""
    gradients = []
    for out in (trained[stage], run(stage, save_every=1, micro_batch_size=1)):
        state = torch.load(out / "checkpoint-1/optimizer.bin", weights_only=True)["state"]
        # after one step: 0.1 × gradient
        gradients.append([moments["exp_avg"] for moments in state.values()])
    scale = max(g.abs().max() for g in gradients[0])
    assert scale > 1e-4 and all((a - b).abs().max() < 1e-4 * scale for a, b in zip(*gradients))


def test_a_second_update_per_rollout_has_ratios_other_than_one(run, trained):
    """Guards: old log-probs recomputed in each update, so that nothing is ever clipped."""

    def clipped(out):
        return [row["policy/clip_frac"] for row in read_jsonl(out / "metrics.jsonl")]

    assert max(clipped(run("tgrpo", updates_per_rollout=3, lr=0.01, warmup_steps=0))) > 0
    assert max(clipped(trained["tgrpo"])) == 0


def test_one_process_computes_in_bfloat16_with_and_without_full_shard(run, trained):
    """Guards: dtype errors between autocast and the rollout model, the reference or the head; float32 computation if a
    multi-GPU config runs on one GPU, because neither FSDP nor autocast casts.
    """
    sft = run("sft", "sft", bf16="true", steps=1)
    # the plain run first: what the other might leave in the environment must not reach it
    plain = run("tgrpo", "none", bf16="true", steps=1, fsdp="none")
    alone = run("tgrpo", "shard", bf16="true", steps=1, fsdp="full_shard")
    for out in (sft, plain):
        assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}
        assert all(math.isfinite(v) for row in read_jsonl(out / "metrics.jsonl") for v in row.values())
    assert without_times(alone) == without_times(plain) != without_times(trained["tgrpo"])[:1]


def test_the_old_log_probs_are_those_of_the_step(run, monkeypatch):
    """Guards: a dummy group or a micro-batch whose ratio uses log-probs of an earlier step."""
    real = tgrpo.grpo_loss
    ratios = []

    def watched(logps_GT, old_logps_GT, *rest):
        ratios.append((logps_GT - old_logps_GT).abs().max().item())
        return real(logps_GT, old_logps_GT, *rest)

    monkeypatch.setattr(tgrpo, "grpo_loss", watched)
    monkeypatch.setattr(training.Run, "micro_batches", lambda run, items, dummy: [(items, 1.0), ([dummy], 0.0)])
    run("tgrpo", steps=2, updates_per_rollout=2, lr=0.01, warmup_steps=0)
    first = [ratios[i : i + 2] for i in range(0, 8, 4)]
    second = [ratios[i : i + 2] for i in range(2, 8, 4)]
    assert first == [[0.0, 0.0]] * 2 and all(real > 0 and dummy > 0 for real, dummy in second)


def test_a_rank_that_lacks_samples_runs_the_dummy_with_weight_0():
    """Guards: a dummy that is trained on; a rank with fewer forward passes than the others, which then wait forever."""
    training_run = training.Run.__new__(training.Run)
    training_run.cfg = SimpleNamespace(batch_size=8, micro_batch_size=2)
    training_run.accelerator = SimpleNamespace(num_processes=2)
    assert list(training_run.micro_batches([1, 2, 3], "dummy")) == [([1, 2], 1.0), ([3], 1.0)]
    assert list(training_run.micro_batches([1, 2], "dummy")) == [([1, 2], 1.0), (["dummy"], 0.0)]
    assert list(training_run.micro_batches([], "dummy")) == [(["dummy"], 0.0)] * 2


def test_the_rollout_copy_is_refreshed_before_every_rollout(run, monkeypatch):
    """Guards: completions sampled from the weights of the first step."""
    calls = []
    real = tgrpo.rollout
    monkeypatch.setattr(policy, "refresh", lambda *_: calls.append("refresh"))
    monkeypatch.setattr(tgrpo, "rollout", lambda *args: calls.append("rollout") or real(*args))
    run("tgrpo", steps=3)
    assert calls == ["refresh", "rollout"] * 3


def test_temporal_rule_none_is_grpo(run, trained):
    """Guards: shuffled rollouts that nobody uses, or a remaining temporal term."""
    (row,) = read_jsonl(run("tgrpo", temporal_rule="none", steps=1) / "metrics.jsonl")
    assert row["temporal/advantage_change"] == 0 and "temporal/p_shuffled" not in row
    names = {"temporal/p", "temporal/p_shuffled", "temporal/gap_se", "temporal/order_helped"}
    assert all(names <= row.keys() for row in read_jsonl(trained["tgrpo"] / "metrics.jsonl"))


def test_a_missing_sft_model_names_the_sft_command(run):
    """Guards: a traceback for a user who starts with the second stage."""
    with pytest.raises(UserError, match="accelerate launch sft.py --config CONFIG"):
        run("tgrpo", model="runs/nowhere/final")


# ------------------------------------------------------------------------------------- unreadable media in the loop


@pytest.fixture
def broken_world(world, tmp_path):
    """The training questions again; the first clip that is drawn is empty: (folder, its problem_id)."""
    folder = tmp_path / "broken"
    shutil.copytree(world / "world", folder)
    records = json.loads((folder / "rl.json").read_text())
    drawn = [records[data.record_of_draw(draw, len(records), 0)] for draw in range(4)]
    record = next(r for r in drawn if r["data_type"] == "video")
    (folder / record["path"]).write_bytes(b"")
    return folder, record["problem_id"]


def test_unreadable_clips_are_skipped_counted_and_named_also_after_a_resume(run, broken_world, capsys):
    """Guards: a replacement clip, a crash, a skip without a message; a list of skipped records that a restart cuts."""
    folder, problem_id = broken_world
    settings = dict(records=folder / "rl.json", data_root=folder, max_unreadable=0.5, save_every=1)
    out = run("tgrpo", "whole", **settings)
    assert [row["data/skipped"] for row in read_jsonl(out / "metrics.jsonl")] == [1, 1]
    assert f"skipped {problem_id} (./media/" in capsys.readouterr().out
    part = out.parent / "part"
    shutil.copytree(out / "checkpoint-1", part / "checkpoint-1")
    shutil.copy(out / "metrics.jsonl", part)
    run("tgrpo", "part", **settings)
    assert without_times(part) == without_times(out)
    assert f"1 unusable records were skipped: {problem_id} (" in capsys.readouterr().out


def test_too_many_unreadable_clips_stop_the_run(run, broken_world):
    """Guards: training for a day on the rest of a broken download."""
    folder, _ = broken_world
    with pytest.raises(UserError, match="1 of the last 4 records drawn are unusable, max_unreadable is 0.01"):
        run("tgrpo", records=folder / "rl.json", data_root=folder, max_unreadable=0.01)


def test_check_lists_unreadable_files(broken_world, monkeypatch, capsys):
    """Guards: a broken file that is only found during training."""
    folder, _ = broken_world
    paths = ["--records", str(folder / "rl.json"), "--data_root", str(folder)]
    arguments = ["check_data", "--config", "configs/toy.yaml", "--num_workers", "2", *paths]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as exit:
        check_data.main()
    said = capsys.readouterr().out
    assert exit.value.code == 1 and "only a part of one" in said and "11 of 12 rows of " in said


# ----------------------------------------------------------------------------------------------- samples and labels


def test_sft_trains_the_target_tokens_only(world):
    """Guards: loss on the prompt and on its video placeholders."""
    cfg = settings(world)
    processor = model_files.load_processor(cfg)
    records, _ = data.load_records(world / "world/sft.json", cfg.data_root, need_process=True)
    samples = [data.Samples(records, processor, cfg, targets=True, in_file_order=True)[i] for i in range(6)]
    model = policy.load_policy(cfg)
    prompts = [sample.inputs["ordered"] for sample in samples]
    packed = policy.pack(model, prompts, [[s.target] for s in samples], processor.tokenizer.pad_token_id)
    assert processor.tokenizer.decode(packed.targets_M) == "".join(
        r["process"] + "\n" + r["solution"] + "<|im_end|>" for r in records[:6]
    )
    ids = packed.inputs["input_ids"]
    # each position predicts the token that follows it
    assert torch.equal(ids.flatten()[packed.source_M + 1], packed.targets_M)
    logps_NT, _ = policy.completion_logps(model, packed)
    # Hugging Face's own loss, with an ordinary mask
    labels = torch.full_like(ids, -100).flatten()
    labels[packed.source_M + 1] = packed.targets_M
    lengths = torch.tensor([len(x["input_ids"][0]) + len(s.target) for x, s in zip(prompts, samples)])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    inputs = packed.inputs | {"attention_mask": mask.long()}
    expected = model(**inputs, labels=labels.view_as(ids), use_cache=False).loss
    assert -logps_NT.sum().item() / len(packed.targets_M) == pytest.approx(expected.item(), abs=1e-5)


RECORD = {
    "problem_id": 1,
    "problem": "Which way?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. left", "B. right"],
    "solution": "<answer>B</answer>",
    "path": "clip.mp4",
}


ORDERS = ("ordered", "shuffled", "reversed", "single", "blind")


def one(world, folder, orders=("ordered", "shuffled"), change=None, **values):
    """The Sample of RECORD, changed, whose media are in `folder`."""
    cfg = settings(world, data_root=str(folder), **values)
    record = RECORD | (change or {})
    return data.Samples([record], model_files.load_processor(cfg), cfg, orders, in_file_order=True)[0]


def test_frame_times_reach_the_model(world, tmp_path):
    """Guards: an assumed 2 fps: 8 of 40 frames at 5 fps are 1 second apart, and a patch of two is 2 seconds long."""
    write_video(tmp_path / "clip.mp4", 40, fps=5)
    sample = one(world, tmp_path)
    # shuffled clips have the times of the ordered ones
    for order in ("ordered", "shuffled"):
        x = sample.inputs[order]
        assert x["second_per_grid_ts"].tolist() == [2.0]
        model = policy.load_policy(settings(world))
        video = x["mm_token_type_ids"][0] == data.VIDEO
        time = policy.mrope_positions(x, model.config)[0, video]
        # tokens_per_second is 2
        assert (time - time[0]).unique().tolist() == [0, 4, 8, 12]


def test_shuffled_pixels_are_the_ordered_ones_in_another_order(world, tmp_path):
    """Guards: a shuffle that loses frames or changes nothing."""
    write_video(tmp_path / "clip.mp4", 8)
    sample = one(world, tmp_path)
    ordered, shuffled = (sample.inputs[order]["pixel_values_videos"] for order in ("ordered", "shuffled"))
    assert ordered.shape == shuffled.shape and not torch.equal(ordered, shuffled)

    def frames(x):
        return x.view(64, 3, 2, 14, 14).mean((1, 3, 4)).view(4, 16, 2).mean(1).flatten()

    assert torch.allclose(frames(ordered).sort().values, frames(shuffled).sort().values, atol=1e-4)
    assert torch.equal(sample.inputs["ordered"]["input_ids"], sample.inputs["shuffled"]["input_ids"])


def test_each_clip_has_its_own_shuffle_of_the_configured_unit(world, tmp_path):
    """Guards: one permutation for all clips; a shuffle_unit that is never read or equal extra shuffles."""
    write_video(tmp_path / "clip.mp4", 8)
    for unit in ("frame", "patch"):
        cfg = settings(world, data_root=str(tmp_path), shuffle_unit=unit)
        names = ("shuffled", "shuffled 1", "shuffled 2", "shuffled 3")
        processor = model_files.load_processor(cfg)
        samples = data.Samples([RECORD] * 6, processor, cfg, ("shuffled",), in_file_order=True)
        orders = [tuple(samples[i].frame_order) for i in range(6)]
        assert len(set(orders)) > 3 and orders == [tuple(samples[i].frame_order) for i in range(6)]
        assert all(order[i + 1] == order[i] + 1 for order in orders for i in range(0, 8, 2)) == (unit == "patch")
        inputs = one(world, tmp_path, names, shuffle_unit=unit).inputs
        drawn = [inputs[name]["pixel_values_videos"] for name in names[1:]]
        assert any(not torch.equal(drawn[0], x) for x in drawn[1:])


def test_a_clip_of_one_frame_has_no_shuffled_group(world, tmp_path):
    """Guards: a temporal reward for a single frame; an infinite loop that looks for another permutation of it."""
    write_video(tmp_path / "clip.mp4", 1)
    sample = one(world, tmp_path)
    assert "shuffled" not in sample.inputs and sample.inputs["ordered"]["video_grid_thw"].tolist() == [[1, 4, 4]]


def test_large_images_are_shrunk_to_max_pixels(world, tmp_path):
    """Guards: one large picture that fills a GPU's memory."""
    Image.new("RGB", (2000, 1500)).save(tmp_path / "clip.mp4", format="png")
    sample = one(world, tmp_path, change={"data_type": "image"}, max_pixels=100 * 28 * 28)
    assert "shuffled" not in sample.inputs
    assert 60 <= (sample.inputs["ordered"]["mm_token_type_ids"] == data.VIDEO).sum() <= 100


def test_small_clips_are_not_enlarged(world, tmp_path):
    """Guards: the processor's default minimum of 128 · 28 · 28 pixels per frame: nine times the tokens of a small
    clip.
    """
    write_video(tmp_path / "clip.mp4", 4)
    assert one(world, tmp_path).inputs["ordered"]["video_grid_thw"].tolist() == [[2, 4, 4]]


def test_long_prompts_are_skipped_not_cut(world, tmp_path):
    """Guards: truncation that removes video tokens but keeps their pixels."""
    write_video(tmp_path / "clip.mp4", 4)
    sample = one(world, tmp_path, change={"problem": "why " * 300}, max_prompt_tokens=200)
    assert "max_prompt_tokens is 200" in sample.error and "ordered" not in sample.inputs


# ----------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_writes_every_answer_and_resumes_to_the_same_summary(run, evaluated):
    """Guards: a resumed evaluation that averages only the new rows, counts one twice, or overwrites the score; an order
    that changes the label of an answer but not its frames.
    """
    rows = read_jsonl(evaluated / "predictions.jsonl")
    summary = (evaluated / "summary.json").read_text()
    said = {}
    for order in ("ordered", "shuffled"):
        said[order] = {row["id"]: row["prediction"] for row in rows if row["frames"] == order}
    assert len(said["ordered"]) == 12
    assert said["shuffled"].keys() == {row["id"] for row in rows if row["data_type"] == "video"}
    assert any(said["ordered"][name] != prediction for name, prediction in said["shuffled"].items())
    assert all({"prediction", "solution", "accuracy", "format", "settings", "cue"} <= row.keys() for row in rows)
    lines = (evaluated / "predictions.jsonl").read_text().splitlines(keepends=True)
    # killed within a batch, with an incomplete last line
    for kept in (3, len(lines) - 1):
        out = evaluated.parent / f"kept {kept}"
        out.mkdir()
        (out / "predictions.0.jsonl").write_text("".join(lines[:kept]) + lines[kept][:40])
        run("evaluate", out, batch_size=5)
        assert (out / "summary.json").read_text() == summary
        assert (out / "predictions.jsonl").read_text() == "".join(lines) and len(list(out.glob("[!.]*"))) == 2


def test_evaluation_refuses_to_mix_settings(run, evaluated):
    """Guards: a mean over answers given with 16 frames and answers given with 64."""
    with pytest.raises(UserError, match="max_frames 8"):
        run("evaluate", evaluated, max_frames=4)


def test_evaluation_notices_other_weights_and_other_questions_at_the_same_path(run, world, tmp_path):
    """Guards: a retrained model, or an edited question, that gets the old answers' score."""
    shutil.copytree(world / "base", tmp_path / "model")
    shutil.copy(world / "world/test.json", tmp_path / "test.json")
    settings = {"model": tmp_path / "model", "records": tmp_path / "test.json", "orders": "ordered"}
    run("evaluate", **settings)
    rows = json.loads((tmp_path / "test.json").read_text())
    changed = [rows[0] | {"problem": "Another question?"}, *rows[1:]]
    (tmp_path / "test.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="other questions"):
        run("evaluate", **settings)
    (tmp_path / "test.json").write_text(json.dumps(rows))
    run("evaluate", **settings)
    path = tmp_path / "model/model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    # outside of the tests, each run is a process of its own
    fingerprint.cache_clear()
    with pytest.raises(UserError, match="weights"):
        run("evaluate", **settings)


def test_evaluation_counts_and_names_what_it_could_not_read_and_asks_the_rest(run, broken_world, capsys):
    """Guards: an unreadable clip that marks a whole batch wrong, a bad row that refuses an evaluation; either one
    missing from the count.
    """
    folder, _ = broken_world
    rows = json.loads((folder / "rl.json").read_text())
    bad = next(i for i, row in enumerate(rows) if row["data_type"] == "image")
    rows[bad]["path"] = 7
    (folder / "mine.json").write_text(json.dumps(rows))
    out = run("evaluate", records=folder / "mine.json", data_root=folder, max_unreadable=0.1, orders="ordered")
    part = json.loads((out / "summary.json").read_text())["mine"]
    assert part["n"] == 10 and len(part["unusable"]) == 2 and f"row {bad + 1}" in part["unusable"]
    printed = capsys.readouterr().out
    assert "2 unusable, not in n" in printed and f"skipped row {bad + 1}: path: expected text, got 7" in printed
    rows = read_jsonl(out / "predictions.jsonl")
    assert [r["path"] in r["error"] for r in rows if "error" in r] == [True, True]


def brightness(x):
    """The frame numbers of a clip made by write_video, in the order in which the model sees them."""
    pixels = x["pixel_values_videos"]
    grid = x["video_grid_thw"][0].tolist()
    mean_TF = pixels.view(grid[0], grid[1] * grid[2], 3, 2, 14 * 14).mean((1, 2, 4)).flatten()
    return mean_TF.argsort().argsort().tolist(), mean_TF


def test_each_order_shows_the_frames_that_it_names(world, tmp_path):
    """Guards: a reversed clip that is the ordered one; a single frame that is the first; a blind prompt with pixels."""
    write_video(tmp_path / "clip.mp4", 8)
    sample = one(world, tmp_path, ("ordered", "reversed", "single", "blind"))
    ordered, ordered_brightness = brightness(sample.inputs["ordered"])
    assert ordered == list(range(8)) and brightness(sample.inputs["reversed"])[0] == list(range(8))[::-1]
    _, single_brightness = brightness(sample.inputs["single"])
    assert sample.inputs["single"]["video_grid_thw"].tolist() == [[1, 4, 4]]
    assert torch.allclose(single_brightness, ordered_brightness[4].expand(2), atol=1e-4)
    assert "shuffled" not in sample.inputs and "pixel_values_videos" not in sample.inputs["blind"]
    processor = model_files.load_processor(settings(world))
    vision = {processor.video_token_id, processor.image_token_id}
    assert not vision & set(sample.inputs["blind"]["input_ids"][0].tolist())
    # the words are the same
    kept = sample.inputs["ordered"]["mm_token_type_ids"][0] == 0
    blind_ids = sample.inputs["blind"]["input_ids"][0].tolist()
    words = [token for token in sample.inputs["ordered"]["input_ids"][0, kept].tolist() if token in blind_ids]
    assert words == blind_ids


def test_the_questions_own_picture_is_last_in_every_order(world, tmp_path):
    """Guards: a question image that is reversed to the start, or that is the single frame."""
    write_video(tmp_path / "clip.mp4", 7)
    Image.new("RGB", (56, 56), (255, 255, 255)).save(tmp_path / "question.png")
    sample = one(world, tmp_path, ORDERS, {"image_path": "question.png"})
    for order, last in (("ordered", 7), ("shuffled", 7), ("reversed", 7), ("single", 3)):
        assert brightness(sample.inputs[order])[0][-1] == last, order
    assert brightness(sample.inputs["reversed"])[0] == [6, 5, 4, 3, 2, 1, 0, 7]
    assert "pixel_values_videos" not in sample.inputs["blind"]


@pytest.mark.parametrize("kind", ["picture", "one frame"])
def test_what_has_no_order_is_asked_in_order_and_blind_only(world, tmp_path, kind):
    """Guards: a picture that counts as a reversed clip; a question that is asked twice with the same pixels."""
    if kind == "picture":
        Image.new("RGB", (56, 56)).save(tmp_path / "clip.mp4", format="png")
    else:
        write_video(tmp_path / "clip.mp4", 1)
    sample = one(world, tmp_path, ORDERS, {"data_type": "image" if kind == "picture" else "video"})
    assert [order for order in ORDERS if order in sample.inputs] == ["ordered", "blind"]


def test_prompts_with_and_without_frames_share_a_batch(world, tmp_path):
    """Guards: pixels of one prompt on the tokens of another, if a prompt between them has none."""
    write_video(tmp_path / "clip.mp4", 8)
    cfg = settings(world)
    processor = model_files.load_processor(cfg)
    sample = one(world, tmp_path, ("ordered", "reversed", "blind"))
    prompts = [sample.inputs["ordered"], sample.inputs["blind"], sample.inputs["reversed"]]
    model = policy.load_policy(cfg).eval()
    together = policy.rollout(model, prompts, [1, 1, 1], processor.tokenizer, 0, 12)
    for prompt, completion in zip(prompts, together):
        (alone,) = policy.rollout(model, [prompt], [1], processor.tokenizer, 0, 12)
        assert completion.tolist() == alone.tolist()
    assert len({tuple(completion.tolist()) for completion in together}) > 1
