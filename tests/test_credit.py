"""Temporal credit of each completion: what it is worth, who earns it, and the plain computation that it must equal."""

import shutil
from pathlib import Path

import naive
import pytest
import torch
import yaml

from data import Sample
from policy import Policy, rollout
from support.storage import read_jsonl
from tgrpo import Group, TGRPOConfig, add_credit, score, temporal_credit

ROOT = Path(__file__).parent.parent
RULE = dict(temporal_rule="credit", temporal_target="reward", advantage_std="none", alpha=1.0, shuffled_generations=0)
CFG = RULE | dict(credit_shuffles=3, micro_batch_size=2, temperature=0.7)
RECORD = {"problem_id": 1, "problem_type": "multiple choice", "solution": "<answer>B</answer>"}


def shuffled(x, seed):
    """The prompt with its patches of time in another order (never the given one)."""
    ((T, H, W),) = x["video_grid_thw"].tolist()
    order = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    order = order.roll(1) if torch.equal(order, torch.arange(T)) else order
    return x | {"pixel_values_videos": x["pixel_values_videos"].view(T, H * W, -1)[order].flatten(0, 1)}


def groups_of(prompts, completions, shuffle=shuffled):
    """Unscored groups; an image has no shuffles."""
    shuffles = [[shuffle(x, k) for k in range(3)] if x["video_grid_thw"][0, 0] > 1 else [] for x in prompts]
    return [
        Group(Sample(RECORD, ordered=x, extra_shuffles=s), c, [""] * len(c))
        for x, s, c in zip(prompts, shuffles, completions)
    ]


def sampled(model, prompts, G=3):
    torch.manual_seed(0)
    flat = rollout(model, prompts, [G] * len(prompts), naive.tokenizer, temperature=1.0, max_new_tokens=10)
    return [flat[i : i + G] for i in range(0, len(flat), G)]


@pytest.fixture(scope="module")
def model():
    return naive.tiny_policy()


def test_credit_equals_a_plain_computation_and_is_none_for_images(model):
    """Guards: log-probs of another completion or clip, a mean of logs instead of a log of means, a missing
    temperature.
    """
    # video, image, video, of different lengths
    prompts = naive.mixed_prompts()
    completions = sampled(model, prompts)
    groups = groups_of(prompts, completions)
    add_credit(model, groups, TGRPOConfig(**CFG), naive.PAD)
    assert groups[1].credit_G is None
    for group in (groups[0], groups[2]):
        for credit, completion in zip(group.credit_G, group.completions, strict=True):
            logps = []
            for x in [group.sample.ordered, *group.sample.extra_shuffles]:
                with torch.no_grad():
                    logps.append(naive.completion_logps(model, x, completion, 0.7).double().sum())
            expected = logps[0] - torch.stack(logps[1:]).exp().mean().log()
            assert credit.item() == pytest.approx(expected.item(), abs=2e-5)
    assert max(g.credit_G.abs().max() for g in (groups[0], groups[2])) > 0.01
    assert all(not g.credit_G.requires_grad for g in (groups[0], groups[2]))


def test_credit_is_zero_if_shuffling_changes_nothing(model):
    """Guards: credit from rounding errors, or from shuffles of the wrong prompt."""
    prompts = naive.mixed_prompts()
    groups = groups_of(prompts, sampled(model, prompts), shuffle=lambda x, seed: dict(x))
    add_credit(model, groups, TGRPOConfig(**CFG), naive.PAD)
    assert max(g.credit_G.abs().max() for g in (groups[0], groups[2])) < 2e-5


class FirstFrame(Policy):
    """Says token 10 after a clip that begins dark and 20 after one that begins bright, with 98 % of its probability."""

    def forward(self, input_ids, pixel_values_videos, video_grid_thw, predict, targets, **_):
        sizes = video_grid_thw.prod(1).tolist()
        bright_B = torch.stack([clip[0].mean() > 0 for clip in pixel_values_videos.split(sizes)])
        bright_N = bright_B[predict // input_ids.shape[1]]
        right_N = targets == torch.where(bright_N, 20, 10)
        return torch.where(right_N, 0.98, 0.02 / 63).log(), torch.zeros(len(targets))


def test_credit_goes_to_the_answer_that_used_the_order():
    """Guards: the wrong sign; credit for a whole group instead of a completion."""
    model = naive.tiny_policy()
    model.__class__ = FirstFrame
    x = naive.prompt("video", (2, 2, 2), 3, 1)
    # dark, then bright
    x["pixel_values_videos"] = torch.tensor([-1.0] * 4 + [1.0] * 4)[:, None].expand(8, 1176)
    (group,) = groups_of([x], [[torch.tensor([10]), torch.tensor([20]), torch.tensor([33])]])
    add_credit(model, [group], TGRPOConfig(**CFG), naive.PAD)
    copied, contrary, blind = group.credit_G.tolist()
    assert copied > 3 and contrary < -3 and blind == pytest.approx(0, abs=1e-6)


def test_one_impossible_shuffle_does_not_dominate_the_credit():
    """Guards: a mean of log-probs, which one shuffle that makes the answer impossible would dominate."""
    logps = torch.tensor([-1.0])
    shuffles = torch.tensor([[-1.0], [-1.0], [-1.0], [-500.0]])
    assert temporal_credit(logps, shuffles).item() == pytest.approx(torch.tensor(4 / 3).log().item(), abs=1e-5)


def scored(credit, texts, **settings):
    cfg = TGRPOConfig(**CFG | {"length_omega": 0.0} | settings)
    group = Group(Sample(RECORD), [torch.tensor([3, 1])] * len(texts), texts, credit_G=torch.tensor(credit))
    metrics = score(group, cfg, [1])
    return group, metrics


RIGHT = "<think>x</think><answer>B</answer>"
WRONG = "<think>x</think><answer>A</answer>"


def test_the_credit_bonus_is_between_0_and_alpha_and_0_for_wrong_answers():
    """Guards: a bonus for a wrong answer; a penalty for a right one; one huge log-ratio that dominates the group; wrong
    answers, which are never paid, counted as clamped.
    """
    group, metrics = scored([5.0, 0.25, -4.0, 9.0], [RIGHT, RIGHT, RIGHT, WRONG])
    assert group.rewards["temporal"].tolist() == [1.0, 0.25, 0.0, 0.0]
    # accuracy + format + credit; credit's own advantage has no std
    rewards = torch.tensor([3.0, 2.25, 2.0, 1.0])
    assert torch.allclose(group.advantages_G, rewards - rewards.mean())
    assert metrics["temporal/credit_clamped"] == pytest.approx(1 / 3)
    assert metrics["temporal/credit_wrong"] == 9.0 and metrics["temporal/credit_correct"] == pytest.approx(1.25 / 3)
    group, _ = scored([5.0, 0.25], [RIGHT, WRONG], alpha=0.5)
    assert group.rewards["temporal"].tolist() == [0.5, 0.0]


def test_the_credit_config_equals_the_toy_config_but_for_the_rule():
    """Guards: credit that is divided by the group's std; a toy setting that is changed in only one of the two files."""
    credit = yaml.safe_load((ROOT / "configs/credit.yaml").read_text())
    toy = yaml.safe_load((ROOT / "configs/toy.yaml").read_text())
    section = credit["tgrpo"]
    assert {name: section.pop(name) for name in RULE} == RULE
    for stage in ("tgrpo", "evaluate"):
        credit[stage] = {name: str(value).replace("/credit", "/tgrpo") for name, value in credit[stage].items()}
        toy[stage] = {name: str(value) for name, value in toy[stage].items()}
    assert credit == toy


def test_a_credit_run_samples_no_shuffled_completions_and_logs_every_completion(run, monkeypatch):
    """Guards: shuffled completions that nobody uses; a missing p̃ if S > 0; rows that a resume writes twice."""
    import tgrpo

    monkeypatch.setattr(tgrpo, "accuracy_reward", lambda completion, *_: float(len(completion) % 2))
    settings = dict(
        config="configs/credit.yaml",
        save_rollouts="true",
        max_new_tokens=8,
        gradient_checkpointing="true",
        steps=2,
        save_every=1,
    )
    out = run("tgrpo", "credit", **settings)
    rows = read_jsonl(out / "metrics.jsonl")
    said = read_jsonl(out / "rollouts.jsonl")
    assert all(
        "temporal/p_shuffled" not in row and {"reward/temporal", "temporal/credit_correct"} <= row.keys()
        for row in rows
    )
    assert (
        len(said) == 2 * 4 * 8
        and {row["frames"] for row in said} == {"ordered"}
        and {row["step"] for row in said} == {0, 1}
    )
    # images have none
    assert any("credit" not in row for row in said) and any(row.get("credit") for row in said)
    before = (out / "rollouts.jsonl").read_text()
    (out / "checkpoint-1").rename(out / "kept")
    for folder in ("final", *(p.name for p in out.glob("checkpoint-*"))):
        shutil.rmtree(out / folder)
    (out / "kept").rename(out / "checkpoint-1")
    run("tgrpo", "credit", **settings)
    assert (out / "rollouts.jsonl").read_text() == before
    asked = read_jsonl(run("tgrpo", "asked", **settings | {"shuffled_generations": 2, "steps": 1}) / "metrics.jsonl")
    assert "temporal/p_shuffled" in asked[0]
