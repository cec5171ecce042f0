"""A checkpoint in the hub's layout passes through every stage, and the result has the same layout."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from hub_checkpoint import LAYOUTS, write_hub_checkpoint
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

import data
import policy
import tgrpo
from support import families, model_files
from support.settings import SharedConfig, UserError
from support.storage import read_jsonl
from tools import export, plan_memory


def weights(folder):
    """All weights of a checkpoint folder, sharded or not, by name."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def other_files(folder):
    """All but the weights and the model card."""
    return sorted(path.name for path in folder.iterdir() if "safetensors" not in path.name and path.suffix != ".md")


def checked_final(folder, start, dtype):
    """Weights of the checkpoint at `folder`. Checks that it has the layout of `start`, `dtype`, and trained weights."""
    before = weights(start)
    after = weights(folder)
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert any(not torch.equal(before[name].to(dtype), after[name]) for name in before)
    assert other_files(folder) == other_files(start)
    # no index of the starting shards
    assert [path.name for path in folder.glob("*safetensors*")] == ["model.safetensors"]
    for name in other_files(start):
        if name != "config.json":
            assert (folder / name).read_bytes() == (start / name).read_bytes()
    config = json.loads((start / "config.json").read_text())
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    # where Qwen3-VL's config.json names it
    if "text_config" in config:
        config["text_config"]["dtype"] = config["torch_dtype"]
    assert json.loads((folder / "config.json").read_text()) == config
    _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    AutoProcessor.from_pretrained(folder)
    return after


def test_the_card_of_a_final_says_what_it_was_trained_on_and_how(run):
    """Guards: a model whose data, settings or base nobody can tell later; a card that the hub refuses."""
    out = run("sft", steps=2, lr=1e-3)
    card = (out / "final/README.md").read_text()
    _, front_matter, text = card.split("---\n", 2)
    # the base is a folder, which is no hub name
    assert "base_model" not in yaml.safe_load(front_matter)
    cfg = yaml.safe_load((out / "config.yaml").read_text())["sft"]
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == cfg
    last = read_jsonl(out / "metrics.jsonl")[-1]
    assert f"| {last['loss']} |" in text.replace("  ", " ") and cfg["records"] in text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stage_runs_on_the_hub_layout(hub, run, monkeypatch, capsys, tmp_path, layout):
    """Guards: SFT that fails at its last line, because the hub's flat config has no text_config.tie_word_embeddings."""
    monkeypatch.setattr(tgrpo, "accuracy_reward", lambda completion, *_: float(len(completion) % 2))

    def stopped_and_resumed(stage, model):
        """Run two steps with a checkpoint after the first, then resume without `final`: it comes back the same."""
        settings = {"model": model, "save_every": 1}
        final = run(stage, stage, **settings) / "final"
        whole = weights(final)
        shutil.rmtree(final)
        run(stage, stage, **settings)
        assert "resumed from" in capsys.readouterr().out
        again = checked_final(final, hub / layout, torch.float32)
        assert all(torch.equal(whole[name], again[name]) for name in whole)
        return final

    sft = stopped_and_resumed("sft", hub / layout)
    final = stopped_and_resumed("tgrpo", sft)
    rows = read_jsonl(tmp_path / "tgrpo/metrics.jsonl")
    assert all(math.isfinite(value) for row in rows for value in row.values())

    export.export(tmp_path / "tgrpo/checkpoint-1", tmp_path / "exported")
    exported = checked_final(tmp_path / "exported", hub / layout, torch.float32)
    assert any(not torch.equal(exported[name], tensor) for name, tensor in weights(final).items())

    run("evaluate", "eval", model=final, orders="ordered,blind")
    assert len(read_jsonl(tmp_path / "eval/predictions.jsonl")) == 24
    monkeypatch.setattr("sys.argv", ["plan_memory", "--model", str(final)])
    plan_memory.main()
    assert "peak" in capsys.readouterr().out


def test_plan_counts_a_separate_head_only_if_untied(hub):
    """Guards: a plan that reads from the config, which does not have it, whether the head is a separate matrix."""
    head = 640 * 96 * 4
    for beta, heads in ((0.04, 1), (0.0, 0)):
        cfg = tgrpo.TGRPOConfig(fsdp="full_shard", beta=beta)
        sizes = {
            layout: plan_memory.memory_plan(cfg, plan_memory.model_shape(str(hub / layout)), 2)[0] for layout in LAYOUTS
        }
        assert sizes["untied"]["rollout copy"] - sizes["tied"]["rollout copy"] == head
        assert sizes["untied"]["gathered layers"] - sizes["tied"]["gathered layers"] == head
        assert sizes["qwen3_untied"]["gathered layers"] - sizes["qwen3_tied"]["gathered layers"] == head
        layer = sizes["tied"]["gathered layers"] - (1 + heads) * head
        # two layers, and where there is a reference its head, which stays gathered
        assert layer == 2 * 4 * (96 * 96 * 2 + 96 + 2 * (96 * 48 + 48) + 3 * 96 * 256 + 2 * 96)


def test_final_copies_only_files_of_the_model(hub, tmp_path):
    """Guards: a trainer's state, or the index of missing shards, in `final`."""
    shutil.copytree(hub / "tied", tmp_path / "start")
    trainers = {"trainer_state.json", "pytorch_model.bin.index.json", "adapter_model.bin", "requirements.txt"}
    models = {
        "video_preprocessor_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
    }
    for name in trainers | models | {"modeling.py"}:
        (tmp_path / "start" / name).write_text("{}")
    assert set(model_files.starting_files(str(tmp_path / "start"))) == set(other_files(hub / "tied")) | models


def test_checkpoint_without_optional_files_loads(hub, tmp_path):
    """Guards: a crash if there is no generation config, or if only the tokenizer's config has a chat template."""
    shutil.copytree(hub / "tied", tmp_path / "start")
    for name in ("generation_config.json", "chat_template.json"):
        (tmp_path / "start" / name).unlink()
    cfg = SharedConfig(model=str(tmp_path / "start"))
    config = AutoConfig.from_pretrained(cfg.model)
    assert (
        model_files.generation_config(cfg.model, config).eos_token_id
        == policy.load_policy(cfg).generation_config.eos_token_id
    )
    processor = model_files.load_processor(cfg)
    assert processor.chat_template == AutoProcessor.from_pretrained(hub / "tied").chat_template
    tokenizer = json.loads((tmp_path / "start/tokenizer_config.json").read_text())
    del tokenizer["chat_template"]
    (tmp_path / "start/tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="start: its chat template fails: .* does not have a chat template"):
        model_files.load_processor(cfg)


def test_export_names_the_missing_starting_model(run, hub, tmp_path):
    """Guards: "Repo id must be in the form" for a folder that was moved."""
    shutil.copytree(hub / "tied", tmp_path / "start")
    out = run("sft", model=tmp_path / "start", save_every=1)
    os.rename(tmp_path / "start", tmp_path / "moved")
    with pytest.raises(UserError, match="checkpoint-1, whose run started from: .*no checkpoint at .*start"):
        export.export(out / "checkpoint-1", tmp_path / "exported")


def test_rollout_ignores_generation_settings_of_the_checkpoint(hub):
    """Guards: the hub's repetition penalty of 1.05 and temperature of 1e-6 in the sampling distribution."""
    model = policy.load_policy(SharedConfig(model=str(hub / "untied")))
    left = {k: v for k, v in model.generation_config.to_diff_dict().items() if k != "transformers_version"}
    assert left == {"eos_token_id": json.loads((hub / "untied/generation_config.json").read_text())["eos_token_id"]}


def test_renamed_image_processor_error_names_the_new_name(tmp_path):
    """Guards: half a page of class names for Qwen2_5_VLImageProcessor, which transformers renamed."""
    write_hub_checkpoint(tmp_path / "first", ["a b c"] * 9, processor="Qwen2_5_VLImageProcessor")
    cfg = SharedConfig(model=str(tmp_path / "first"))
    with pytest.raises(
        UserError, match="first: its processor cannot be loaded: .* write Qwen2VLImageProcessor"
    ) as error:
        model_files.load_processor(cfg)
    assert "\n" not in str(error.value)
    path = tmp_path / "first/preprocessor_config.json"
    path.write_text(path.read_text().replace("Qwen2_5_VLImageProcessor", "Qwen2VLImageProcessor"))
    model_files.load_processor(cfg)


def test_missing_preprocessor_is_one_clear_error(tmp_path):
    """Guards: a traceback from inside transformers for a half-copied checkpoint."""
    write_hub_checkpoint(tmp_path / "half", ["a b c"] * 9)
    (tmp_path / "half/preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="half.*processor"):
        model_files.load_processor(SharedConfig(model=str(tmp_path / "half")))


MIXED = "their linear layers take no attention mask, so the completions of a packed row would mix"
ROUTED = "experts would be routed differently in sampling and in training"
QWEN2_5_PROCESSOR = {"processor_class": "Qwen2_5_VLProcessor"}


@pytest.mark.parametrize(
    "file, values, line",
    [
        # 30B-A3B
        (
            "config",
            {"model_type": "qwen3_vl_moe"},
            f"type qwen3_vl_moe cannot be used here .their {ROUTED}., only ",
        ),
        ("config", {"model_type": "qwen3_5"}, f"type qwen3_5 cannot .*{MIXED}"),
        ("config", {"model_type": "qwen3_5_moe"}, f"type qwen3_5_moe cannot .*{MIXED}"),
        ("config", {"model_type": "qwen3_next"}, f"type qwen3_next cannot .*{MIXED}"),
        ("config", {"model_type": "qwen4_exp"}, f"type qwen4_exp cannot .*{MIXED}"),
        ("config", {"model_type": "qwen2_vl"}, "type qwen2_vl cannot be used here, only qwen2_5_vl and qwen3_vl$"),
        ("config", {"quantization_config": {"quant_method": "fp8"}}, "it is quantized, and such weights cannot be"),
        ("config", {"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "it is quantized"),
        ("preprocessor_config", QWEN2_5_PROCESSOR, "processor is a Qwen2_5_VLProcessor, not a Qwen3VLProcessor"),
        (
            "video_preprocessor_config",
            {"video_processor_type": "Qwen2VLVideoProcessor"},
            "its video processor is a Qwen2VLVideoProcessor, not a Qwen3VLVideoProcessor",
        ),
    ],
)
def test_other_models_and_processors_are_one_clear_line_before_a_model_is_loaded(
    hub, run, monkeypatch, tmp_path, file, values, line
):
    """Guards: hybrids whose packed completions would read one another; FP8 weights by their hub name, or of the text
    model alone; clips whose size and time stamps are made as for the other family.
    """
    folder = shutil.copytree(hub / "qwen3_tied", tmp_path / "start")
    path = folder / f"{file}.json"
    described = json.loads(path.read_text())
    for name, value in values.items():
        # some values of an inner config, all others as they are
        described[name] = described[name] | value if isinstance(described.get(name), dict) else value
    path.write_text(json.dumps(described))
    monkeypatch.setattr(model_files, "load_weights", None)
    with pytest.raises(UserError, match=f"start: .*{line}") as error:
        run("sft", model=folder)
    assert "\n" not in str(error.value)
    # what a hub name passes through
    with pytest.raises(UserError, match=f"start: .*{line}"):
        model_files.load_processor(SharedConfig(model=str(folder)))


@pytest.mark.parametrize(
    "file, values",
    [
        ("config", {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs"}}),
        ("preprocessor_config", {"processor_class": "Theirs", "auto_map": {"AutoProcessor": "theirs.Theirs"}}),
    ],
)
def test_code_of_a_repository_is_never_run(hub, monkeypatch, tmp_path, file, values):
    """Guards: transformers' question on a terminal whether to run it, which one key answers."""
    folder = shutil.copytree(hub / "qwen3_tied", tmp_path / "start")
    path = folder / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    (folder / "theirs.py").write_text("raise AssertionError('this code was run')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="start: .*contains custom code"):
        model_files.load_processor(SharedConfig(model=str(folder)))


CLIP = {
    "problem": "Which way?", "problem_type": "multiple choice", "options": ["A. left", "B. right"],
    "data_type": "video", "solution": "<answer>B</answer>", "path": "a.mp4",
}  # fmt: skip


def clip_inputs(cfg):
    """Model inputs of a clip of two seconds, and the processor of the checkpoint `cfg.model`."""
    processor = model_files.load_processor(cfg)
    frames = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    metadata = VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3])
    return data.encode(processor, CLIP, frames, metadata, cfg), processor


def test_qwen3_vl_prompts_have_the_token_ids_of_its_release(hub):
    """Guards: prompts unlike those that transformers 4.57, which the hub's config names, made of clips and pictures
    (compared by hand in November 2026): a frame round the whole clip, split time stamps, split tags.
    """
    cfg = SharedConfig(model=str(hub / "qwen3_tied"), min_pixels=1024, max_pixels=4096)
    clip, processor = clip_inputs(cfg)
    picture = data.encode(processor, CLIP | {"data_type": "image"}, Image.new("RGB", (64, 64)), None, cfg)
    moment = "<|vision_start|>" + 4 * "<|video_pad|>" + "<|vision_end|>"
    question = data.messages(CLIP, cfg)[0]["content"][1]["text"]
    for inputs, media in ((clip, f"<0.2 seconds>{moment}<1.2 seconds>{moment}"), (picture, moment)):
        text = f"<|im_start|>user\n{media}{question}<|im_end|>\n<|im_start|>assistant\n"
        # by the tokenizer alone, in one piece
        assert inputs["input_ids"][0].tolist() == processor.tokenizer(text)["input_ids"]
    # one token each, which stay in the texts that are rewarded, although others are left out
    tags = processor.tokenizer("<think></think><|im_end|>", return_tensors="pt")["input_ids"]
    assert tags.shape == (1, 3)
    assert families.texts(processor, tags) == ["<think></think>"]


def test_a_qwen3_vl_folder_without_its_video_processor_s_config_gives_the_same_inputs(hub, tmp_path):
    """Guards: clips with the pixel limits of pictures, or of the other family, where a file was not copied."""
    folder = shutil.copytree(hub / "qwen3_tied", tmp_path / "start")
    (folder / "video_preprocessor_config.json").unlink()
    inputs, expected = (clip_inputs(SharedConfig(model=str(path)))[0] for path in (folder, hub / "qwen3_tied"))
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
