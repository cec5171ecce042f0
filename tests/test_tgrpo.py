"""The objective by its properties, and the fast rollout and loss against the plain ones of naive.py."""

import naive
import pytest
import torch

import policy
from policy import completion_logps, completion_mask, pack, rollout
from support import families
from tgrpo import group_advantages, grpo_loss, kl_k3, temporal_advantages

torch.set_default_dtype(torch.float32)
BANNED = (naive.IMAGE, naive.VIDEO)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("value", [0.0, 1.2, 0.1 + 0.2, 1 / 3, 1e6])
@pytest.mark.parametrize("std", ["group", "none"])
def test_equal_rewards_give_zero_advantages(value, std):
    """Guards: a rounding error of 1e-17 in the mean, which division by std + 1e-4 turns into a gradient."""
    for size in (1, 2, 3, 8):
        assert group_advantages(torch.full((size,), value, dtype=torch.float64), std).tolist() == [0.0] * size


def test_advantages_are_relative_to_the_group():
    """Guards: a biased std, or a mean over the batch instead of the group."""
    rewards = double(0, 1, 1, 2.2, 0.4)
    normed = group_advantages(rewards)
    assert abs(normed.mean()) < 1e-12
    # unbiased: n − 1
    assert normed.pow(2).sum() / (len(rewards) - 1) == pytest.approx(1, abs=1e-3)
    assert torch.allclose(group_advantages(rewards + 5), normed)
    assert torch.allclose(group_advantages(rewards * 3), normed, atol=1e-3)
    plain = group_advantages(rewards, "none")
    assert torch.allclose(group_advantages(rewards * 3, "none"), plain * 3)


def test_temporal_term_cancels_in_the_reward_but_not_in_the_advantage():
    """Guards: the published placement, under which T-GRPO is GRPO if correctness alone decides the reward."""
    correct = torch.tensor([1, 0, 0, 1, 0], dtype=torch.bool)
    # accuracy + format
    rewards = correct.double() + 1
    grpo = group_advantages(rewards)
    as_published = temporal_advantages(rewards, 0.3 * correct, "reward")
    ours = temporal_advantages(rewards, 0.3 * correct, "advantage")

    def two(advantages_G):
        # a correct one, a wrong one
        return [f"{a:+.4f}" for a in advantages_G[:2].tolist()]

    assert [two(grpo), two(as_published), two(ours)] == [
        ["+1.0952", "-0.7302"],
        ["+1.0953", "-0.7302"],
        ["+1.3952", "-0.7302"],
        # README
    ]
    # all that is left is the 1e-4 beside the std
    assert (as_published - grpo).abs().max() < 2e-4
    assert torch.allclose((ours - grpo)[correct], double(0.3))
    assert torch.equal(ours[~correct], grpo[~correct])
    assert (
        temporal_advantages(rewards, 0.3 * correct, "reward", "none") - group_advantages(rewards, "none")
    ).abs().max() > 0.1


def test_advantage_functions_do_not_modify_their_inputs():
    """Guards: an in-place operation on a view that changes a later term."""
    rewards = double(1, 2, 3)
    bonus = double(0.3, 0, 0.3)
    temporal_advantages(rewards, bonus)
    assert rewards.tolist() == [1, 2, 3] and bonus.tolist() == [0.3, 0, 0.3]


# ---------------------------------------------------------------------------------------------- KL, ratio, loss


def test_kl_k3_is_unbiased_and_never_negative():
    """Guards: a sign flip, which a test that restates the formula would pass."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        model = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
        reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
        estimate = kl_k3(model, reference)
        exact = (model.exp() * (model - reference)).sum()
        # E over the model
        assert (model.exp() * estimate).sum() == pytest.approx(exact.item(), abs=1e-12)
        assert (estimate >= 0).all()
    assert kl_k3(model, model).abs().max() == 0
    # clamped
    assert torch.isfinite(kl_k3(double(-500.0, 0.0), double(0.0, -500.0))).all()


def example(seed=0, G=3, T=5):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    logps = -normal(G, T).abs()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.float64)
    return logps, logps + 0.3 * normal(G, T), logps + 0.3 * normal(G, T), normal(G), mask


def test_loss_gradient_equals_finite_differences():
    """Guards: a detach in the wrong place. Ratios here lie on both sides of the clip range."""
    logps, old, ref, advantages, mask = example()

    def f(x):
        return grpo_loss(x, old, ref, advantages, mask, 0.2, 0.04)[0].sum()

    x = logps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x)
    for i in range(3):
        for j in range(5):
            step = torch.zeros_like(logps)
            step[i, j] = 1e-6
            assert gradient[i, j].item() == pytest.approx(((f(logps + step) - f(logps - step)) / 2e-6).item(), abs=1e-7)


def test_first_update_is_the_policy_gradient():
    """Guards: ρ = 1 and no KL must leave −A ∇log π, averaged over a completion's own tokens."""
    logps, _, _, advantages, mask = example()
    x = logps.clone().requires_grad_()
    grpo_loss(x, x.detach(), None, advantages, mask, 0.2, 0.0)[0].sum().backward()
    assert torch.allclose(x.grad, -advantages[:, None] * mask / mask.sum(1, keepdim=True))


@pytest.mark.parametrize(
    "advantage, log_ratio, moves", [(1, 0.5, False), (1, -0.5, True), (-1, 0.5, True), (-1, -0.5, False)]
)
def test_clipping_only_stops_moves_beyond_the_clip_range(advantage, log_ratio, moves):
    """Guards: clipping both ways (min and max confused): a wrong move must always be pulled back."""
    x = double(-1.0)[None].requires_grad_()
    loss, _, clipped = grpo_loss(x, x.detach() - log_ratio, None, double(advantage), torch.ones(1, 1), 0.2, 0.0)
    loss.sum().backward()
    assert (x.grad.abs().item() > 0) == moves and bool(clipped) != moves


def test_each_completion_counts_once_regardless_of_length():
    """Guards: a mean over all tokens, which lets long completions outvote short ones."""
    short = torch.ones(1, 4)
    long = torch.ones(1, 4)
    short[0, 1:] = 0
    logps = -torch.ones(1, 4)

    def loss(mask):
        return grpo_loss(logps, logps, None, double(1.0), mask, 0.2, 0.0)[0].item()

    assert loss(short) == pytest.approx(loss(long)) == pytest.approx(-1.0)


def test_padding_carries_no_loss():
    """Guards: log-probs of padding leaking into the mean."""
    logps, old, ref, advantages, mask = example()
    wild = torch.where(mask.bool(), logps, logps - 40)
    for padded in (logps, wild):
        assert torch.allclose(
            grpo_loss(padded, old, ref, advantages, mask, 0.2, 0.04)[0],
            grpo_loss(logps, old, ref, advantages, mask, 0.2, 0.04)[0],
        )


def test_completion_mask_keeps_the_first_eos_and_nothing_after():
    """Guards: masking EOS as padding, so that stopping is never trained."""
    ids = torch.tensor([[7, 8, 1, 1, 2], [1, 7, 7, 7, 7], [7, 7, 7, 7, 7], [7, 9, 2, 1, 7]])
    assert completion_mask(ids, [1]).int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0],
    ]
    assert completion_mask(ids, [1, 9]).int().tolist()[3] == [1, 1, 0, 0, 0]


# ------------------------------------------------------------------------- rollout and log-probs against the plain way


@pytest.fixture(scope="module", params=families.FAMILIES)
def model(request):
    return naive.tiny_policy(family=request.param)


def prompts_for(model):
    return naive.mixed_prompts(model.config.model_type)


def trim(sequence):
    return sequence[: int(completion_mask(sequence[None], [naive.EOS]).sum())]


@pytest.mark.parametrize("G", [1, 3])
def test_rollout_with_a_shared_prompt_equals_plain_generate(model, G):
    """Guards: wrong positions after the cache is repeated, rope_deltas of another prompt, attention to left padding."""
    prompts = prompts_for(model)
    counts = [G, 1, G + 1]
    shared = iter(rollout(model, prompts, counts, naive.tokenizer, temperature=0, max_new_tokens=20))
    for x, n in zip(prompts, counts):
        plain = trim(naive.generate(model, x, do_sample=False, max_new_tokens=20)[0][0])
        assert len(plain) > 3
        for _ in range(n):
            assert next(shared).tolist() == plain.tolist()


def test_rollout_equals_generate_at_the_positions_that_transformers_computes():
    """Guards: a prompt of Qwen3-VL at other positions than every other user's; for Qwen2.5-VL transformers differs."""
    model = naive.tiny_policy(family="qwen3_vl")
    prompts = [
        naive.prompt("video", (8, 2, 4), 3, 1, seconds=600, family="qwen3_vl"),
        naive.prompt("image", (1, 4, 4), 9, 2, family="qwen3_vl"),
        naive.prompt("video", (2, 6, 8), 5, 3, seconds=4, family="qwen3_vl"),
    ]
    completions = rollout(model, prompts, [1, 1, 1], naive.tokenizer, temperature=0, max_new_tokens=20)
    for x, completion in zip(prompts, completions):
        plain, _ = naive.generate(model, x, own_positions=True, do_sample=False, max_new_tokens=20)
        assert completion.tolist() == trim(plain[0]).tolist() and len(completion) > 3


def sampled_groups(model, G, seed=0):
    torch.manual_seed(seed)
    prompts = prompts_for(model)
    flat = rollout(model, prompts, [G] * len(prompts), naive.tokenizer, temperature=1.0, max_new_tokens=10)
    return prompts, [flat[i : i + G] for i in range(0, len(flat), G)]


def loss_of(logps_by_group):
    """Some function of all log-probs whose gradient weighs every token differently."""
    return sum((logps * torch.linspace(0.3, 1.7, len(logps))).sum() for logps in logps_by_group)


def gradients(model, loss):
    """Of every parameter, those of the vision tower and of DeepStack's mergers among them."""
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("G", [1, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logps_and_gradients_equal_separate_rows(model, G, temperature):
    """Guards: attention to another completion, wrong positions, pictures beside clips, unequal lengths."""
    prompts, groups = sampled_groups(model, G)
    lengths = [len(c) for group in groups for c in group]
    assert G == 1 or len(set(lengths)) > 1
    logps_GT, _ = completion_logps(model, pack(model, prompts, groups, naive.PAD), temperature, BANNED)
    packed = [row[:n] for row, n in zip(logps_GT, lengths)]
    plain = [naive.completion_logps(model, x, c, temperature) for x, group in zip(prompts, groups) for c in group]
    assert max((a - b).abs().max().item() for a, b in zip(packed, plain)) < 1e-5
    for a, b in zip(gradients(model, loss_of(packed)), gradients(model, loss_of(plain))):
        assert (a - b).abs().max() < 1e-4 * max(1, b.abs().max().item())
        assert b.abs().max() > 0


def test_the_vision_tower_runs_once_per_batch_of_pictures_and_clips(model, monkeypatch):
    """Guards: a deadlock of sharded ranks that gather its weights a different number of times."""
    calls = []
    real = model.model.visual.forward
    monkeypatch.setattr(model.model.visual, "forward", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    prompts, groups = sampled_groups(model, 2)
    # videos, pictures, both
    for chosen in ([0], [1], [0, 2], [0, 1], [1, 2, 0]):
        calls.clear()
        packed = pack(model, [prompts[i] for i in chosen], [groups[i] for i in chosen], naive.PAD)
        completion_logps(model, packed, 1.0, BANNED)
        assert len(calls) == 1


def test_a_chunked_head_gives_the_same_logps(model, monkeypatch):
    """Guards: an off-by-one error at a chunk border; entropy that counts banned tokens."""
    hidden = torch.randn(11, 32)
    targets = torch.arange(3, 14)
    whole = model.lm_head(hidden, targets, 0.5, BANNED)
    monkeypatch.setattr(policy, "LOGITS_CHUNK", 4)
    parts = model.lm_head(hidden, targets, 0.5, BANNED)
    logits = (hidden @ model.lm_head.weight.T / 0.5).clone()
    logits[:, list(BANNED)] = -torch.inf
    distribution = torch.distributions.Categorical(logits=logits)
    for logps, entropy in (whole, parts):
        assert torch.allclose(logps, distribution.log_prob(targets), atol=1e-5)
        assert torch.allclose(entropy, distribution.entropy(), atol=1e-5)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_placeholders_are_never_sampled(family):
    """Guards: a sampled <|video_pad|> without pixels, which makes the next forward pass fail."""
    model = naive.tiny_policy(family=family)
    with torch.no_grad():
        model.lm_head.weight[list(BANNED)] = model.lm_head.weight.abs().max() * 10 * model.lm_head.weight.sign().mean(0)
    completions = rollout(model, prompts_for(model), [4, 4, 4], naive.tokenizer, temperature=3.0, max_new_tokens=20)
    assert not set(BANNED) & {int(i) for c in completions for i in c}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_rollout_of_a_model_in_training_mode_keeps_its_cache(family):
    """Guards: generate() in training mode with gradient checkpointing, which drops its cache."""
    model = naive.tiny_policy(family=family)
    prompts = prompts_for(model)
    expected = rollout(model, prompts, [1, 1, 1], naive.tokenizer, temperature=0, max_new_tokens=8)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    got = rollout(model, prompts, [1, 1, 1], naive.tokenizer, temperature=0, max_new_tokens=8)
    assert [c.tolist() for c in got] == [c.tolist() for c in expected] and model.training
