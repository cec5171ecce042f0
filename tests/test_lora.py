"""LoRA: an adapter on frozen weights, which are the policy's base, the reference and the rollout model at once."""

import json
import re
import shutil
from itertools import chain

import naive
import pytest
import torch
from accelerate.state import AcceleratorState
from naive import mixed_prompts, without_times
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_hub import other_files, weights
from test_sharded import difference
from transformers import AutoModelForImageTextToText

import data
import policy
import sft
import tgrpo
from support import distributed, lora, model_files
from support.settings import TrainConfig, UserError, load_config
from support.storage import fingerprint, read_jsonl
from tools import export

LORA = dict(lora_rank=4, lora_alpha=8)
# large enough steps that an adapter which is not used, saved or merged is noticed
TRAINING = dict(lr=1e-2, warmup_steps=0, lr_schedule="constant")


def random_adapter(model, seed=5):
    """Give the model's adapter a random B, so that it changes the model."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def adapted_policy(rank=4, **settings):
    cfg = TrainConfig(model="tiny", lora_rank=rank, lora_alpha=8, **settings)
    return lora.add_adapter(naive.tiny_policy(), cfg)


def clip_logps(model, folder, world, gradients=torch.no_grad()):
    """Log-probs of the answers of two clips and a picture, by the model that was loaded from `folder`."""
    cfg = TrainConfig(model=str(folder), data_root=str(world / "world"), max_pixels=3136, min_pixels=784)
    processor = model_files.load_processor(cfg)
    records = json.loads((world / "world/sft.json").read_text())
    picture = next(record for record in records if record["data_type"] == "image")
    samples = data.Samples([*records[:2], picture], processor, cfg, targets=True)
    prompts = [samples[i].inputs["ordered"] for i in range(3)]
    packed = policy.pack(model, prompts, [[samples[i].target] for i in range(3)], 0)
    with gradients:
        return policy.completion_logps(model, packed)[0]


@pytest.mark.parametrize("layout, bf16", [("untied", False), ("tied", True), ("qwen3_untied", False)])
def test_a_new_adapter_leaves_the_model_as_it_was(hub, world, layout, bf16):
    """Guards: an adapter that begins at random, or on the vision tower; frozen weights in the wrong dtype."""
    cfg = tgrpo.TGRPOConfig(model=str(hub / layout), bf16=bf16, lora_rank=4)
    dtype = torch.bfloat16 if bf16 else torch.float32
    base = policy.load_policy(cfg, dtype)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = distributed.make_accelerator(cfg)
    model = policy.load_trainable(cfg, accelerator)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert torch.equal(clip_logps(model, hub / layout, world), clip_logps(base, hub / layout, world))
    # one set of weights: no copy for the reference, none for the rollout
    assert policy.load_reference(accelerator, cfg, model) is model
    assert policy.rollout_copy(accelerator, model, cfg) is model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and {p.dtype for p in frozen.values()} == {dtype}
    assert all(".language_model.layers." in name and ".lora_" in name for name in trained)
    # A and B of seven matrices per layer
    assert len(trained) == 2 * 7 * model.config.text_config.num_hidden_layers
    assert len(frozen) == len(list(base.parameters()))


def test_adapter_gradients_of_packed_rows_equal_those_of_whole_rows():
    """Guards: packing that lets completions see each other through the adapter; a checkpointed layer without it."""
    prompts = mixed_prompts()
    generator = torch.Generator().manual_seed(4)
    completions = [[torch.randint(3, 50, (n,), generator=generator) for n in (3, 7)] for _ in prompts]
    gradients = []
    for kind in ("packed", "whole", "checkpointed"):
        model = random_adapter(adapted_policy()).train()
        if kind == "checkpointed":
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if kind == "whole":
            rows = []
            for x, group in zip(prompts, completions):
                rows += [naive.completion_logps(model, x, completion).sum() for completion in group]
            total = sum(rows)
        else:
            packed = policy.pack(model, prompts, completions, naive.PAD)
            total = policy.completion_logps(model, packed, banned=(naive.IMAGE, naive.VIDEO))[0].sum()
        total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(gradients[0]) == 2 * 7 * 2
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in gradients[0].items():
            assert torch.allclose(gradient, other[name], atol=1e-4 * gradient.abs().max() + 1e-6), name


@pytest.mark.parametrize("layout", ["tied", "qwen3_tied"])
@pytest.mark.parametrize("settings", [{"lora_rank": 4}, {"freeze_vision": True}], ids=str)
def test_nothing_runs_backwards_through_a_frozen_vision_tower(hub, world, layout, settings):
    """Guards: hooks of gradient checkpointing (or of peft) that make frozen vision blocks keep their activations."""
    cfg = TrainConfig(model=str(hub / layout), gradient_checkpointing=True, **settings)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = distributed.make_accelerator(cfg)
    model, _ = distributed.prepare(accelerator, policy.load_trainable(cfg, accelerator), cfg)
    features = []
    model.model.visual.register_forward_hook(lambda module, inputs, output: features.append(output))
    logps = clip_logps(model, hub / layout, world, torch.enable_grad())
    assert logps.requires_grad
    (output,) = features
    # Qwen3-VL's tower has these too, one part per clip
    deepstack = getattr(output, "deepstack_features", [])
    assert bool(deepstack) == layout.startswith("qwen3")
    tensors = (output.last_hidden_state, *output.pooler_output, *chain(*deepstack))
    assert not any(tensor.requires_grad for tensor in tensors)


def test_adapter_off_is_the_starting_model_and_ends():
    """Guards: a reference that is the trained policy (KL always 0); adapters that stay off, or frozen, afterwards."""
    plain = naive.tiny_policy()
    model = random_adapter(adapted_policy(lora_dropout=0.5)).train()
    prompts = mixed_prompts()
    completions = [[torch.tensor([7, 8, naive.EOS])] for _ in prompts]

    def logps(model):
        with torch.no_grad():
            return policy.completion_logps(model, policy.pack(model, prompts, completions, naive.PAD))[0]

    expected = logps(plain)
    before = logps(model.eval())
    model.train()
    with lora.adapter_off(model):
        assert torch.equal(logps(model), expected)
    # a model without an adapter
    with lora.adapter_off(plain):
        assert torch.equal(logps(plain), expected)
    assert torch.equal(logps(model.eval()), before) and (before - expected).abs().max() > 0.05
    assert sum(p.requires_grad for p in model.parameters()) == 2 * 7 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["merged_copy", "merged_in_place"])
def test_merged_rollouts_come_from_the_trained_model_and_leave_it_as_it_was(how, dtype):
    """Guards: an adapter that is left out, counted twice or outdated in the rollout; frozen weights that drift."""
    model = random_adapter(adapted_policy())
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    bf16 = dtype == torch.bfloat16
    AcceleratorState._reset_state(reset_partial_state=True)
    cfg = tgrpo.TGRPOConfig(model="tiny", lora_rank=4, lora_rollout=how, bf16=bf16)
    rollout_model = policy.rollout_copy(distributed.make_accelerator(cfg), model, cfg)
    packed = policy.pack(model, mixed_prompts(), [[torch.arange(3, 40)]] * 3, naive.PAD)

    @torch.no_grad()
    def logps(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return policy.completion_logps(model, packed)[0]

    frozen = {name: parameter.clone() for name, parameter in model.named_parameters() if "lora_" not in name}
    for seed in (5, 6, 7):
        random_adapter(model, seed)
        trained = logps(model)
        policy.refresh(rollout_model, model)
        with lora.merged(rollout_model, how):
            error = (logps(rollout_model) - trained).abs().mean()
        assert error < (0.05 if bf16 else 1e-5)
        with lora.adapter_off(model):
            assert (logps(model) - trained).abs().mean() > 0.2
        assert torch.equal(logps(model), trained)
    assert all(torch.equal(frozen[name], dict(model.named_parameters())[name]) for name in frozen)


@pytest.mark.parametrize("layout, bf16", [("untied", "false"), ("tied", "true"), ("qwen3_tied", "false")])
def test_every_stage_trains_only_the_adapter_and_writes_a_merged_model(hub, world, run, monkeypatch, layout, bf16):
    """Guards: frozen weights that move; a KL that is not 0 at first, or stays 0; a `final` without the adapter, or one
    that only peft can load; a checkpoint with all weights; a resumed run that ends elsewhere.
    """
    monkeypatch.setattr(tgrpo, "accuracy_reward", lambda completion, *_: float(len(completion) % 2))
    settings = dict(
        **LORA, **TRAINING, bf16=bf16, save_every=1, keep_checkpoints=9, steps=3, gradient_checkpointing=True
    )
    settings |= dict(lora_dropout=0.1, min_pixels=784, max_pixels=3136)
    start = hub / layout
    merging = {"lora_rollout": "merged_copy" if bf16 == "true" else "merged_in_place"}
    for stage in ("sft", "tgrpo"):
        if stage == "tgrpo":
            settings |= merging
        out = run(stage, stage, model=start, **settings)
        # resumed after the first step, a run ends the same
        shutil.copytree(out, out.with_name(f"{stage} again"))
        again = out.with_name(f"{stage} again")
        for path in ("final", "checkpoint-2"):
            shutil.rmtree(again / path)
        run(stage, f"{stage} again", model=start, **settings)
        assert without_times(again) == without_times(out)
        for path in ("model.safetensors", "adapter/adapter_model.safetensors"):
            assert (again / "final" / path).read_bytes() == (out / "final" / path).read_bytes()

        check_checkpoint(out / "checkpoint-1")
        check_final(out / "final", start, world, torch.bfloat16 if bf16 == "true" else torch.float32)
        start = out / "final"
    rows = read_jsonl(out / "metrics.jsonl")
    assert rows[0]["policy/kl"] == 0 < rows[1]["policy/kl"]

    # the checkpoint before the last step as a model
    export.export(out / "checkpoint-2", out.parent / "exported")
    assert other_files(out.parent / "exported") == other_files(hub / layout)
    moved = difference(weights(out.parent / "exported"), weights(out / "final"))
    assert 0 < moved < 0.1
    run("evaluate", "eval", model=out / "checkpoint-2", orders="ordered")


def check_checkpoint(folder):
    """A checkpoint of a LoRA run: the adapter, in peft's format, and its optimizer."""
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.bin"} <= files
    assert not [name for name in files if name.startswith(("model", "pytorch_model"))]
    adapter = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32} and len(adapter) == 2 * 7 * 2
    n_trained = sum(tensor.numel() for tensor in adapter.values())
    state = torch.load(folder / "optimizer.bin", weights_only=True)["state"]
    assert sum(moments["exp_avg"].numel() for moments in state.values()) == n_trained


def check_final(final, start, world, dtype):
    """`final` is `start` plus the adapter beside it, as peft itself computes it."""
    before = weights(start)
    after = weights(final)
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {dtype}
    adapter = load_file(final / "adapter/adapter_model.safetensors")
    for name in before:
        expected = before[name].to(dtype)
        if ".layers." in name and "visual" not in name and name.endswith("_proj.weight"):
            # Qwen2.5-VL's files have older names than its modules
            layer = re.sub(r"^model\.layers", "model.language_model.layers", name.removesuffix(".weight"))
            layer = f"base_model.model.{layer}"
            change = adapter[f"{layer}.lora_B.weight"] @ adapter[f"{layer}.lora_A.weight"]
            expected = (expected.float() + change * LORA["lora_alpha"] / LORA["lora_rank"]).to(dtype)
            assert not torch.equal(expected, before[name].to(dtype))
        assert torch.equal(after[name], expected), name
    assert set(other_files(final)) == {*other_files(start), "adapter"}
    if dtype == torch.float32:
        base = AutoModelForImageTextToText.from_pretrained(start, dtype=dtype)
        with_adapter = PeftModel.from_pretrained(base, final / "adapter").eval()
        with_adapter = policy.Policy.of(with_adapter.base_model.model)
        merged = policy.load_policy(TrainConfig(model=str(final)))
        expected = clip_logps(with_adapter, final, world)
        assert torch.allclose(clip_logps(merged, final, world), expected, atol=1e-4)
        with lora.adapter_off(with_adapter):
            assert (clip_logps(with_adapter, final, world) - expected).abs().max() > 1e-2


def test_an_adapter_of_others_is_merged_at_load_and_is_the_reference(hub, world, run, monkeypatch, tmp_path):
    """Guards: T-GRPO from an adapter whose reference is the model below it; a merged model that stays frozen."""
    monkeypatch.setattr(tgrpo, "accuracy_reward", lambda completion, *_: float(len(completion) % 2))
    base = hub / "tied"
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    # as TRL and LLaMA-Factory write them, with another alpha and fewer layers
    theirs = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    random_adapter(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    cfg = TrainConfig(model=str(tmp_path / "theirs"))
    merged = policy.load_policy(cfg)
    assert all(p.requires_grad for p in merged.parameters()) and not lora.adapted_layers(merged)
    expected = clip_logps(policy.Policy.of(theirs.base_model.model.eval()), base, world)
    assert torch.allclose(clip_logps(merged, base, world), expected, atol=1e-5)
    plain = policy.load_policy(TrainConfig(model=str(base)))
    assert (clip_logps(plain, base, world) - expected).abs().max() > 1e-2

    # names of tensors as in transformers 4.49
    older = shutil.copytree(tmp_path / "theirs", tmp_path / "older") / "adapter_model.safetensors"
    tensors = {name.replace("language_model.", ""): tensor for name, tensor in load_file(older).items()}
    save_file(tensors, older)
    again = policy.load_policy(TrainConfig(model=str(older.parent)))
    assert difference(again.state_dict(), merged.state_dict()) == 0
    # a run notices another scale, and other weights under the adapter
    described = tmp_path / "older/adapter_config.json"
    moved = shutil.copytree(base, tmp_path / "base")
    described.write_text(described.read_text().replace(str(base), str(moved)))
    seen = [fingerprint(str(older.parent))]
    described.write_text(described.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    fingerprint.cache_clear()
    seen.append(fingerprint(str(older.parent)))
    shard = next(moved.glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, {"format": "pt"})
    fingerprint.cache_clear()
    seen.append(fingerprint(str(older.parent)))
    assert len(set(seen)) == 3

    full = run("tgrpo", "full", model=tmp_path / "theirs", **TRAINING)
    adapted = run("tgrpo", "lora", model=tmp_path / "theirs", save_every=1, **LORA, **TRAINING)
    for out in (full, adapted):
        rows = read_jsonl(out / "metrics.jsonl")
        assert rows[0]["policy/kl"] == 0 < rows[1]["policy/kl"]
    # an adapter of an adapter
    both = policy.load_policy(TrainConfig(model=str(adapted / "final/adapter")))
    trained = policy.load_policy(TrainConfig(model=str(adapted / "final")))
    assert difference(both.state_dict(), trained.state_dict()) < 1e-6
    assert difference(merged.state_dict(), trained.state_dict()) > 1e-3
    export.export(adapted / "checkpoint-1", tmp_path / "exported")
    assert 0 < difference(weights(tmp_path / "exported"), weights(adapted / "final")) < 0.05


def test_a_wrong_adapter_is_one_clear_line(hub, world, tmp_path):
    """Guards: an adapter of another model that is ignored with a warning; a traceback for a folder without its base."""
    base = hub / "tied"

    def message(folder):
        with pytest.raises(UserError) as error:
            cfg = TrainConfig(model=str(folder))
            model_files.check_model(cfg, "tgrpo")
            policy.load_policy(cfg)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
        return str(error.value)

    def adapter(name, base=base, rank=4, rename=None, **config):
        model = lora.add_adapter(policy.load_policy(TrainConfig(model=str(hub / "tied"))), TrainConfig(lora_rank=rank))
        folder = tmp_path / name
        lora.save_adapter(model, folder)
        described = json.loads((folder / "adapter_config.json").read_text())
        described |= {"base_model_name_or_path": base and str(base), **config}
        (folder / "adapter_config.json").write_text(json.dumps(described))
        return folder

    assert "no checkpoint at" in message(adapter("gone", tmp_path / "nowhere"))
    assert "expected the model below it, got None" in message(adapter("none", None))
    assert "cannot be merged: Error(s) in loading" in message(adapter("other rank", r=8))
    all_seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    more_layers = adapter("more layers", target_modules=[*all_seven, "qkv"])
    assert "these weights are not the model's: missing" in message(more_layers)
    assert "these weights are not the model's: unexpected" in message(adapter("fewer", target_modules=["q_proj"]))
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    get_peft_model(model, LoraConfig(target_modules=["lm_head"])).save_pretrained(tmp_path / "head")
    assert "one matrix in this model" in message(tmp_path / "head")
    for number, change in enumerate(({"peft_type": "NEW"}, {"target_modules": "(("}, {"r": "x"})):
        assert "cannot be merged" in message(adapter(f"odd {number}", **change))
    file = adapter("damaged") / "adapter_model.safetensors"
    for content in (b"version https://git-lfs.github.com/spec/v1", file.read_bytes()[:-100]):
        file.write_bytes(content)
        assert "cannot be merged" in message(file.parent)
    file.unlink()
    assert "adapter_model.safetensors is missing" in message(file.parent)
    (tmp_path / "gone/adapter_config.json").write_text("[]")
    assert "not the config of an adapter" in message(tmp_path / "gone")
    shutil.copy(base / "config.json", tmp_path / "fewer")
    assert "holds a model and an adapter" in message(tmp_path / "fewer")


def test_lora_settings_that_cannot_work_are_one_clear_line(tmp_path, monkeypatch):
    """Guards: adapters that FSDP would shard; an accelerate config that turns it on."""
    path = tmp_path / "some.yaml"
    path.write_text("fsdp: full_shard\nsft:\n  lora_rank: 8")
    with pytest.raises(UserError) as error:
        load_config(sft.SFTConfig, "sft", ["--config", str(path)])
    assert "lora_rank: 8: LoRA needs the whole model on each GPU; set fsdp: none" in str(error.value)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="the accelerate config requests FSDP, but LoRA needs whole weights"):
        distributed.make_accelerator(TrainConfig(lora_rank=8))


def test_a_run_resumes_only_with_the_kind_of_weights_it_began_with(run):
    """Guards: an adapter at random beside the old optimizer; a full checkpoint that is ignored without a word."""
    full = run("sft", "full", save_every=1)
    adapted = run("sft", "lora", save_every=1, **LORA)
    for folder, settings, line in (
        (full, LORA, "whole weights cannot be resumed in a run of an adapter"),
        (adapted, {}, "an adapter of rank 4 cannot be resumed in a run of whole weights"),
        (adapted, LORA | {"lora_rank": 8}, "an adapter of rank 4 cannot be resumed in a run of an adapter of rank 8"),
    ):
        shutil.rmtree(folder / "final", ignore_errors=True)
        for more in ({}, {"resume_changed": "true"}):
            with pytest.raises(UserError, match=line):
                run("sft", folder, save_every=1, **settings, **more)


def test_rollouts_see_no_dropout(world, run, monkeypatch):
    """Guards: completions of a model with random neurons switched off."""
    modes = []

    for name in ("rollout", "completion_logps"):
        function = getattr(tgrpo, name)

        def watched(model, *args, function=function, name=name, **kwargs):
            handle = next(m for m in model.modules() if isinstance(m, torch.nn.Dropout)).register_forward_hook(
                lambda module, *_: modes.append((name, torch.is_grad_enabled(), module.training))
            )
            try:
                return function(model, *args, **kwargs)
            finally:
                handle.remove()

        monkeypatch.setattr(tgrpo, name, watched)
    run("tgrpo", lora_dropout=0.5, **LORA, steps=1)
    assert ("rollout", False, False) in modes
    assert ("completion_logps", True, True) in modes
    assert not [mode for mode in modes if not mode[1] and mode[2]]
