"""How a step is put together: what is scored, with which frames, and the gradient of the real loop against the plain
one.
"""

import json

import naive
import pytest
import torch
from test_sharded import difference, weights

import data
import policy
import tgrpo
import toy
from data import Sample
from policy import completion_logps, rollout
from support import families, metrics, model_files, settings, tiny_model
from support.storage import read_jsonl
from tgrpo import Group, TGRPOConfig, score

RECORD = {"problem_id": 1, "problem_type": "multiple choice", "solution": "<answer>B</answer>"}
RIGHT = "<think>x</think><answer>B</answer>"
WRONG = "<think>x</think><answer>A</answer>"
BARE = "<answer>B</answer>"


def scored(texts, shuffled=(), record=RECORD, lengths=None, **settings):
    """(a scored group, its metrics)."""
    cfg = TGRPOConfig(**{"length_min": 5, "length_max": 9, "length_omega": 0.2, **settings})
    completions = [torch.tensor([7] * (n - 1) + [1]) for n in lengths or [2] * len(texts)]
    group = Group(Sample(record), completions, list(texts), shuffled_texts=list(shuffled))
    score(group, cfg)
    return group, metrics.of_group(group, cfg, eos=[1])


def test_score_of_a_group_computed_by_hand():
    """Guards: a reward left out or counted twice, p̃ of the wrong group, a bonus for wrong answers, wrong metrics."""
    group, logged = scored([RIGHT, BARE, WRONG, RIGHT], [WRONG, RIGHT], lengths=[6, 2, 6, 20])
    assert {name: group.rewards[name].tolist() for name in ("accuracy", "format", "length")} == {
        "accuracy": [1, 1, 0, 1],
        "format": [1, 0, 1, 1],
        "length": [pytest.approx(0.2), 0, 0, 0],
    }
    assert group.temporal_G.tolist() == [pytest.approx(0.075)] * 2 + [0, pytest.approx(0.075)]
    # p 3/4, p̃ 1/2, r_t 0.3 · 1/4
    rewards = torch.tensor([2.2, 1.0, 1.0, 2.0])
    expected = (rewards - 1.55) / (rewards.std() + 1e-4) + torch.tensor([0.075, 0.075, 0.0, 0.075])
    assert torch.allclose(group.advantages_G, expected, atol=1e-6)
    variance = 0.75 * 0.25 / 3 + 0.25 / 1
    want = {
        "temporal/p": 0.75,
        "temporal/p_shuffled": 0.5,
        "temporal/gap": 0.25,
        "temporal/gap_variance": variance,
        "temporal/order_helped": 1.0,
        "temporal/advantage_change": 0.075 * 3 / 4,
        "reward/accuracy": 0.75,
        "reward/format": 0.75,
        "reward/length": 0.05,
        "reward/temporal": 0.075 * 3 / 4,
        "reward/total": 1.55,
        "accuracy/multiple_choice": 0.75,
        "group/zero_std": 0.0,
        "completion/length": 8.5,
        "completion/truncated": 0.0,
    }
    assert {name: logged[name] for name in want} == pytest.approx(want, abs=1e-6)


def test_every_reward_setting_changes_the_score():
    """Guards: a setting (alpha, target, std, rule, omega) that is never read."""
    texts = [RIGHT, RIGHT, WRONG, WRONG]
    shuffled = [WRONG, WRONG]
    base = scored(texts, shuffled)[0].advantages_G
    for change in (
        {"alpha": 1.0},
        {"temporal_target": "reward"},
        {"advantage_std": "none"},
        {"temporal_rule": "none"},
        {"temporal_rule": "paper", "alpha": 0.9},
    ):
        assert not torch.allclose(scored(texts, shuffled, **change)[0].advantages_G, base, atol=1e-3), change
    _, logged = scored([RIGHT], lengths=[6], length_omega=0.7)
    assert logged["reward/length"] == pytest.approx(0.7)
    _, logged = scored(texts, shuffled, temporal_target="reward", alpha=1.0)
    assert logged["reward/total"] == pytest.approx(1.5 + 0.5 / 2)
    _, logged = scored(texts, [RIGHT, RIGHT])
    assert logged["temporal/order_helped"] == 0
    # a single shuffled completion has no spread
    _, logged = scored(texts, [WRONG])
    assert "temporal/gap_variance" not in logged
    # an image
    _, logged = scored(texts)
    assert "temporal/p" not in logged
    group, _ = scored([RIGHT, WRONG], lengths=[3, 3])
    group.completions[0][-1] = 7
    assert metrics.of_group(group, TGRPOConfig(), [1])["completion/truncated"] == 0.5


def test_each_prompt_is_scored_by_its_own_problem_type():
    """Guards: the first record's problem type used for the whole batch."""
    for kind, solution, text in (
        ("numerical", "1000", "1,000"),
        ("free-form", "a red cat", "a red cat"),
        ("OCR", "STOP", "STOP"),
        ("regression", "4", "3"),
    ):
        record = {"problem_id": 2, "problem_type": kind, "solution": f"<answer>{solution}</answer>"}
        group, logged = scored([f"<think></think><answer>{text}</answer>", WRONG.replace("A", "~")], record=record)
        right, wrong = group.rewards["accuracy"].tolist()
        assert right == (0.75 if kind == "regression" else 1.0) and wrong < 0.5
        assert f"accuracy/{kind}" in logged


def test_shuffled_completions_come_from_shuffled_pixels(world, monkeypatch):
    """Guards: a shuffled group that sees ordered frames; groups that get each other's texts."""
    cfg = TGRPOConfig(
        model=str(world / "base"),
        data_root=str(world / "world"),
        prompt="{problem} {options}",
        min_pixels=784,
        max_pixels=3136,
        max_frames=8,
        num_generations=3,
        shuffled_generations=2,
    )
    processor = model_files.load_processor(cfg)
    records, _ = data.load_records(world / "world/rl.json", cfg.data_root)
    samples = [data.Samples(records, processor, cfg, ("ordered", "shuffled"), in_file_order=True)[i] for i in range(12)]
    assert {s.record["data_type"] for s in samples} == {"video", "image"}
    asked = []

    # generates the number of its prompt
    def echo(model, prompts, counts, tokenizer, *_, **__):
        asked.extend(prompts)
        return [
            torch.tensor([processor.tokenizer.encode(str(i % 10))[0]]) for i, n in enumerate(counts) for _ in range(n)
        ]

    monkeypatch.setattr(tgrpo, "rollout", echo)
    groups = tgrpo.sample_groups(policy.load_policy(cfg), samples, processor, cfg)
    number = len(samples)
    for i, (sample, group) in enumerate(zip(samples, groups, strict=True)):
        assert group.sample is sample and asked[i] is sample.inputs["ordered"] and group.texts == [str(i % 10)] * 3
        if "shuffled" not in sample.inputs:
            assert group.shuffled_texts == []
        else:
            assert asked[number] is sample.inputs["shuffled"] and group.shuffled_texts == [str(number % 10)] * 2
            pixels = [sample.inputs[order]["pixel_values_videos"] for order in ("ordered", "shuffled")]
            assert not torch.equal(*pixels)
            number += 1


@pytest.mark.parametrize("family", families.FAMILIES)
def test_rollout_ignores_the_checkpoints_sampling_settings(family):
    """Guards: a top-k, a penalty or a minimum length in the checkpoint's generation_config; a temperature in one place
    only.
    """
    hostile = dict(
        top_k=3,
        top_p=0.5,
        temperature=9.0,
        repetition_penalty=3.0,
        no_repeat_ngram_size=1,
        min_new_tokens=9,
        min_p=0.3,
        bad_words_ids=[[7]],
        num_return_sequences=2,
    )
    model = naive.tiny_policy(generation=hostile, family=family)
    T = 0.7
    kept = model.generation_config.to_dict()
    real = model.generate
    seen = {}

    # generate() with its own scores
    def watched(**inputs):
        seen["output"] = real(**inputs, return_dict_in_generate=True, output_scores=True)
        return seen["output"].sequences

    model.generate = watched
    torch.manual_seed(1)
    prompts = naive.mixed_prompts(family)
    completions = rollout(model, prompts, [4, 4, 4], naive.tokenizer, T, 12)
    assert model.generation_config.to_dict() == kept and len(completions) == 12 and min(map(len, completions)) < 9
    said_BTV = torch.stack(seen["output"].scores, 1).log_softmax(-1)
    packed = policy.pack(model, prompts, [completions[i : i + 4] for i in (0, 4, 8)], naive.PAD)
    with torch.no_grad():
        logps_GT, _ = completion_logps(model, packed, T, (naive.IMAGE, naive.VIDEO))
    for row, completion in enumerate(completions):
        expected = said_BTV[row, : len(completion)].gather(1, completion[:, None])[:, 0]
        assert (logps_GT[row, : len(completion)] - expected).abs().max() < 1e-4


def test_a_failed_rollout_restores_the_generation_config(monkeypatch):
    """Guards: generation settings that are replaced for the rollout and not restored after an error."""
    model = naive.tiny_policy()
    before = model.generation_config.to_dict()
    config = model.generation_config
    monkeypatch.setattr(model, "generate", lambda **_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        rollout(model, naive.mixed_prompts(), [2, 2, 2], naive.tokenizer, 1.0, 4)
    assert model.generation_config is config and config.to_dict() == before


def test_top_p_and_temperature_reach_the_sampler():
    """Guards: sampling settings of the evaluation that are never read."""
    model = naive.tiny_policy()
    prompts = naive.mixed_prompts()

    def many(*sampling):
        return {tuple(c.tolist()) for c in rollout(model, prompts[:1], [40], naive.tokenizer, *sampling)}

    assert len(many(0, 3)) == 1 == len(many(1.0, 3, 1e-6)) and many(0, 3) == many(1.0, 3, 1e-6)
    assert len(many(1.0, 3)) > 20


@pytest.fixture(params=families.FAMILIES)
def base(request, world, tmp_path):
    """The folder of a tiny checkpoint of each family."""
    if request.param == "qwen2_5_vl":
        return world / "base"
    records = json.loads((world / "world/sft.json").read_text())
    tiny_model.make_model(tmp_path / "base", records, family=request.param)
    return tmp_path / "base"


def test_the_gradient_of_the_training_loop_equals_a_plain_computation(base, world, run, monkeypatch):
    """Guards: a loss with the wrong sign, at another temperature, over other tokens, or with another group's
    advantages.
    """
    monkeypatch.setattr(tgrpo, "accuracy_reward", lambda completion, *_: float(len(completion) % 2))
    real = tgrpo.sample_groups
    kept = []
    monkeypatch.setattr(tgrpo, "sample_groups", lambda *args: kept.extend(real(*args)) or kept)
    out = run(
        "tgrpo",
        model=base,
        steps=1,
        batch_size=3,
        micro_batch_size=1,
        temperature=0.7,
        save_every=0,
        max_grad_norm=1e9,
        max_new_tokens=8,
        lr=1e-12,
        adam_beta1=0.5,
        save_rollouts="true",
        num_generations=3,
        warmup_steps=0,
        records=world / "world/rl.json",
    )
    model = policy.load_policy(settings.SharedConfig(model=str(base)))
    assert len(kept) == 3 and max(g.advantages_G.abs().max() for g in kept) > 0.3
    banned = policy.placeholder_ids(model)
    losses = [
        -advantage * naive.completion_logps(model, g.sample.inputs["ordered"], c, 0.7, banned).mean()
        for g in kept
        for advantage, c in zip(g.advantages_G, g.completions)
    ]
    # at the reference the KL term has no gradient
    (sum(losses) / len(losses)).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    (row,) = read_jsonl(out / "metrics.jsonl")
    assert row["policy/grad_norm"] == pytest.approx(norm, rel=1e-3) and norm > 1e-3
    assert (
        row["loss"] == pytest.approx(sum(-g.advantages_G.mean().item() for g in kept) / 3, abs=1e-5)
        and row["policy/kl"] == 0
    )


def test_training_raises_the_reward_and_beta_limits_the_kl(world, run, monkeypatch):
    """Guards: a loss with the wrong sign, a reference that changes with the policy, a KL term with the wrong sign."""
    monkeypatch.setattr(tgrpo, "accuracy_reward", lambda completion, *_: float(completion.count("e") > 1))
    settings = {
        "steps": 6,
        "lr": 5e-3,
        "warmup_steps": 0,
        "lr_schedule": "constant",
        "temporal_rule": "none",
        "length_omega": 0.0,
    }
    rows = read_jsonl(run("tgrpo", "free", beta=0.0, **settings) / "metrics.jsonl")
    held = read_jsonl(run("tgrpo", "held", beta=5.0, **settings) / "metrics.jsonl")

    def accuracy(rows):
        return sum(r["reward/accuracy"] for r in rows[-3:]) / 3

    assert accuracy(rows) > rows[0]["reward/accuracy"] + 0.2
    assert held[0]["policy/kl"] == 0 < held[5]["policy/kl"] and accuracy(held) < accuracy(rows)


def test_the_loss_grows_with_the_distance_from_the_reference():
    """Guards: + instead of − before β: a KL term that rewards leaving the SFT model."""
    logps = -torch.ones(1, 4)
    far = -torch.ones(1, 4) * 2

    def loss(ref, beta):
        return tgrpo.grpo_loss(logps, logps, ref, torch.zeros(1), torch.ones(1, 4), 0.2, beta)[0].item()

    kl = tgrpo.kl_k3(logps, far).mean().item()
    assert loss(logps, 0.5) == 0 and loss(far, 0.5) == pytest.approx(0.5 * kl) and kl > 0.1


def test_optimizer_settings_change_the_weights(run):
    """Guards: a max_grad_norm, lr, weight_decay or schedule that is never read."""

    def trained(name, **settings):
        return weights(run("sft", name, warmup_steps=0, **settings))

    base = trained("base")
    for name, setting in {
        "lr": {"lr": 1e-5},
        "decay": {"weight_decay": 0.5},
        "schedule": {"lr_schedule": "constant"},
        "clip": {"max_grad_norm": 1e-9},
        "beta": {"adam_beta2": 0.5},
    }.items():
        assert difference(base, trained(name, **setting)) > 1e-6, name


def test_the_toy_table_counts_the_right_questions(tmp_path):
    """Guards: conflict clips confused with agreeing ones, ordered swapped with shuffled, flashes counted as temporal
    questions.
    """

    def row(source, cue, frames, accuracy):
        return {"data_source": source, "cue": cue, "frames": frames, "accuracy": accuracy}

    rows = [
        row("toy-direction", "misleads", "ordered", 1.0),
        row("toy-direction", "misleads", "shuffled", 0.0),
        row("toy-size", "agrees", "ordered", 0.0),
        row("toy-size", "agrees", "shuffled", 0.0),
        row("toy-size", "neutral", "ordered", 1.0),
        row("toy-size", "neutral", "shuffled", 1.0),
        row("toy-size", "neutral", "reversed", 0.5),
        row("toy-flash", "none", "blind", 1.0),
        row("toy-size", "neutral", "blind", 0.25),
        row("toy-flash", "none", "ordered", 0.0),
        row("toy-image", "none", "ordered", 1.0),
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    means = {name: mean for name, (mean, _) in toy.measure(tmp_path / "p.jsonl").items()}
    assert means == {
        "ordered": pytest.approx(2 / 3),
        "shuffled": pytest.approx(1 / 3),
        "reversed": 0.5,
        "blind": 0.25,
        "conflict": 1.0,
        "flash": 0.0,
        "image": 1.0,
    }
