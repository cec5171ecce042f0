"""experiments/credit.py and variants.py: what a credit is worth, who earns it, and what its controls keep."""

import shutil
import sys
from pathlib import Path

import naive
import pytest
import torch

import tgrpo
from data import Sample
from experiments import variants
from experiments.credit import CreditConfig, CreditGroup, add_credit, credit_bonus, temporal_credit
from policy import rollout
from support import metrics, training
from support.settings import UserError, load_config
from support.storage import read_jsonl

ROOT = Path(__file__).parent.parent
CFG = CreditConfig(credit_shuffles=3, micro_batch_size=2, temperature=0.7, length_omega=0.0)
RECORD = {
    "problem": "Which way?",
    "problem_id": 1,
    "path": "a.mp4",
    "problem_type": "multiple choice",
    "solution": "<answer>B</answer>",
}
RIGHT = "<think>x</think><answer>B</answer>"
WRONG = "<think>x</think><answer>A</answer>"
# of five completions, of which the last is wrong
CREDIT_G = torch.tensor([5.0, 0.25, -4.0, 0.5, 9.0])
CORRECT_G = torch.tensor([True, True, True, True, False])


def use(variant, monkeypatch):
    """Replace what a variant replaces, until the end of the test."""
    for (where, name), replacement in variants.VARIANTS[variant].items():
        monkeypatch.setattr(where, name, replacement)


def test_credit_equals_a_plain_computation_and_is_none_for_images():
    """Guards: log-probs of another completion or clip, a missing temperature, neurons that dropout switches off."""
    model = naive.tiny_policy(attention_dropout=0.5).eval()
    prompts = naive.mixed_prompts()
    torch.manual_seed(0)
    sampled = rollout(model, prompts, [3, 3, 3], naive.tokenizer, temperature=1.0, max_new_tokens=10)
    groups = []
    for i, prompt in enumerate(prompts):
        inputs = {"ordered": prompt}
        ((T, H, W),) = prompt["video_grid_thw"].tolist()
        pixels = prompt["pixel_values_videos"].view(T, H * W, -1)
        for k in range(1, 4 if T > 1 else 1):
            inputs[f"shuffled {k}"] = prompt | {"pixel_values_videos": pixels.roll(k, 0).flatten(0, 1)}
        groups.append(CreditGroup(Sample(RECORD, inputs=inputs), sampled[3 * i : 3 * i + 3], []))
    model.train()
    add_credit(model, groups, CFG, naive.PAD)
    assert model.training and groups[1].credit_G is None
    model.eval()
    for group in (groups[0], groups[2]):
        for credit, completion in zip(group.credit_G, group.completions, strict=True):
            logps = []
            for x in group.sample.inputs.values():
                with torch.no_grad():
                    logps.append(naive.completion_logps(model, x, completion, 0.7).double().sum())
            expected = logps[0] - torch.stack(logps[1:]).exp().mean().log()
            assert credit.item() == pytest.approx(expected.item(), abs=2e-5)
        assert group.credit_G.abs().max() > 0.01


def test_credit_is_0_for_an_answer_that_is_as_likely_in_any_order():
    """Guards: the wrong sign; a mean of log-probs, which one shuffle with an impossible answer would dominate."""
    logps_G = torch.tensor([-9.0, -1.0, -2.0, -1.0])
    shuffled_KG = torch.tensor([[-9.0, -2.0, -1.0, -1.0], [-9.0, -2.0, -1.0, -500.0]])
    assert temporal_credit(logps_G, shuffled_KG).tolist() == pytest.approx([0.0, 1.0, -1.0, 0.6931], abs=1e-4)


def test_only_correct_completions_are_paid_between_0_and_alpha(monkeypatch):
    """Guards: a bonus for a wrong answer; a penalty for a right one; one huge log-ratio that dominates the group; wrong
    answers counted as clamped; a credit that is not in the log.
    """
    use("credit", monkeypatch)
    group = CreditGroup(Sample(RECORD), [torch.tensor([3, 1])] * 5, [RIGHT] * 4 + [WRONG], credit_G=CREDIT_G)
    tgrpo.score(group, CFG)
    assert group.temporal_G.tolist() == [1.0, 0.25, 0.0, 0.5, 0.0]
    # accuracy + format + term, less the group's mean
    rewards = torch.tensor([3.0, 2.25, 2.0, 2.5, 1.0])
    assert torch.allclose(group.advantages_G, rewards - rewards.mean())
    logged = metrics.of_group(group, CFG, eos=[1])
    expected = {"credit_correct": 1.75 / 4, "credit_wrong": 9.0, "credit_clamped": 1 / 4}
    assert {name: logged[f"temporal/{name}"] for name in expected} == pytest.approx(expected)
    assert logged["reward/temporal"] == pytest.approx(1.75 / 5)
    rows = metrics.rollout_rows(group)
    assert [row["credit"] for row in rows] == CREDIT_G.tolist()
    assert [row["temporal"] for row in rows] == group.temporal_G.tolist()


def test_the_credit_config_is_the_toy_config_with_the_rule_and_plain_tgrpo_refuses_it():
    """Guards: a toy setting that is changed in only one of the two files; credit.yaml trained by another rule, because
    the variant was forgotten.
    """
    given = ["--config", str(ROOT / "configs/credit.yaml")]
    ours = vars(load_config(CreditConfig, "tgrpo", given))
    toy = vars(load_config(CreditConfig, "tgrpo", ["--config", str(ROOT / "configs/toy.yaml")]))
    assert {name for name in ours if ours[name] != toy[name]} == {"output_dir"}
    with pytest.raises(UserError, match="credit_shuffles: no such setting"):
        load_config(tgrpo.TGRPOConfig, "tgrpo", given)


def test_a_credit_run_samples_no_shuffled_completions_and_logs_every_completion(run, monkeypatch):
    """Guards: shuffled completions that nobody uses; credits that a resumed run computes otherwise."""
    use("credit", monkeypatch)
    monkeypatch.setattr(tgrpo, "accuracy_reward", lambda completion, *_: float(len(completion) % 2))
    settings = dict(config="configs/credit.yaml", max_new_tokens=8, steps=2, save_every=1)
    out = run("tgrpo", "credit", **settings)
    for row in read_jsonl(out / "metrics.jsonl"):
        assert "temporal/p_shuffled" not in row and {"reward/temporal", "temporal/credit_correct"} <= row.keys()
    rows = read_jsonl(out / "rollouts.jsonl")
    assert len(rows) == 2 * 4 * 8 and {row["frames"] for row in rows} == {"ordered"}
    # images have none
    assert any("credit" not in row for row in rows) and any(row.get("credit") for row in rows)
    before = (out / "rollouts.jsonl").read_text()
    shutil.rmtree(out / "final")
    run("tgrpo", "credit", **settings)
    assert (out / "rollouts.jsonl").read_text() == before


# --------------------------------------------------------------------------------------------------------- the variants


def test_controls_keep_the_total_of_the_group_and_pay_correct_completions_only():
    """Guards: a control that changes how much is paid, pays wrong completions, or pays the same ones each time; noise
    that is one value for the whole group, which would cancel in the advantages.
    """
    torch.manual_seed(0)
    own_G = credit_bonus(CREDIT_G, CORRECT_G, 0.5)[:4]
    shuffled = torch.stack([variants.shuffled_bonus(CREDIT_G, CORRECT_G, 0.5) for _ in range(20)])
    assert (shuffled[:, :4].sort().values == own_G.sort().values).all() and len(shuffled.unique(dim=0)) > 5
    noise = torch.stack([variants.noise_bonus(CREDIT_G, CORRECT_G, 0.5) for _ in range(2000)])
    assert noise[:, :4].mean().item() == pytest.approx(own_G.mean().item(), abs=0.01)
    assert noise[:, :4].std().item() == pytest.approx(own_G.std(correction=0).item(), abs=0.01)
    assert noise[:, :4].std(1).min() > 0
    assert not shuffled[:, 4].any() and not noise[:, 4].any()


def test_taro_pays_correct_completions_above_their_groups_mean_per_token(monkeypatch):
    """Guards: sums over tokens, with which long completions always win; the mean of the correct ones alone."""
    group = CreditGroup(None, [torch.zeros(n) for n in (2, 12, 1, 1)], [], credit_G=torch.tensor([4.0, 6.0, 8.0, 1.0]))
    monkeypatch.setattr(variants, "add_credit", lambda *_: None)
    variants.add_credit_per_token(None, [group, CreditGroup(None, [], [])], None, 0)
    assert group.credit_G.tolist() == [2.0, 0.5, 8.0, 1.0]
    # the mean is 2.875, that of the first, second and last 1.17
    for correct, paid in (([1, 1, 0, 1], [0, 0, 0, 0]), ([1, 1, 1, 0], [0, 0, 0.5, 0])):
        assert variants.above_mean_bonus(group.credit_G, torch.tensor(correct, dtype=bool), 0.5).tolist() == paid


def test_gdpo_normalises_each_reward_alone_and_the_step_once(monkeypatch):
    """Guards: the sum that is normalised, in which the published temporal reward cancels; a factor per group, which
    would cancel it again; advantages several times those of GRPO; a second update that scales again.
    """
    monkeypatch.setattr(variants, "micro_batches", lambda run, groups, dummy: groups)
    use("gdpo", monkeypatch)
    cfg = tgrpo.TGRPOConfig(temporal_rule="paper", temporal_target="reward", length_omega=0.0)
    groups = []
    for shuffled_texts in ([WRONG], []):
        completions = [torch.tensor([3, 1])] * 4
        groups.append(tgrpo.Group(Sample(RECORD), completions, [RIGHT, RIGHT, WRONG, WRONG], [], shuffled_texts))
        tgrpo.score(groups[-1], cfg)
    alone_G = tgrpo.group_advantages(torch.tensor([1.0, 1, 0, 0]))
    # accuracy and the temporal reward; accuracy alone
    for group, factor in zip(groups, (2, 1)):
        assert torch.allclose(group.advantages_G, factor * alone_G, atol=1e-3)
    for _ in range(2):
        training.Run.micro_batches(None, groups, None)
        assert torch.cat([group.advantages_G for group in groups]).std().item() == pytest.approx(1, abs=1e-3)
    assert torch.allclose(groups[0].advantages_G, 2 * groups[1].advantages_G, atol=1e-3)
    # a rank without readable records
    assert training.Run.micro_batches(None, [], None) == []


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_variant_replaces_names_of_tgrpo(variant, monkeypatch):
    """Guards: a variant that is named but not applied; settings that do not reach tgrpo.py."""
    # restored after the test
    for where, name in variants.VARIANTS[variant]:
        monkeypatch.setattr(where, name, getattr(where, name))
    received = []
    monkeypatch.setattr(tgrpo, "main", lambda: received.extend(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["variants.py", "--steps", "2", "--variant", variant, "--alpha", "1"])
    variants.main()
    assert received == ["--steps", "2", "--alpha", "1"]
    assert all(getattr(where, name) is new for (where, name), new in variants.VARIANTS[variant].items())
