"""T-GRPO: reinforcement learning with a reward that asks whether the order of the frames helped.

    accelerate launch tgrpo.py --config configs/toy.yaml       # the tiny model, on a CPU
    accelerate launch tgrpo.py --config configs/7b.yaml        # Qwen2.5-VL-7B, FSDP over the GPUs of this machine

Each step:
    1. prompts: a batch of questions; a video comes with its frames in order and shuffled
    2. rollout: the policy samples G completions with the frames in order and S with the frames shuffled
    3. rewards: accuracy, format and length of each completion; p and p̃, the shares of correct ones in both orders
    4. advantages: rewards relative to their group, plus the temporal term r_t = α (p − p̃) for the correct completions
    5. loss: clipped ratio times advantage, minus β KL to the frozen SFT model; mean over the tokens of a completion,
       then over completions. Only the completions of ordered frames are trained
    6. update: backward, clip the gradient, AdamW
Without the temporal term (`temporal_rule: none`), and always for images, this is GRPO. With `temporal_rule: credit`
(after TaRO, arXiv 2606.09248; configs/credit.yaml) each completion has a temporal term of its own: how much likelier
the order of the frames makes it. Nothing is sampled from shuffled frames then: the same completions are scored with K
shuffled orders.

Differences from the paper, and why: rollouts sample from the whole distribution (no top-p), so that the log-probs of
step 5 are those of the distribution sampled from; the temporal term is added to the advantage, because division by the
group's std cancels it in the reward (`temporal_target: reward` is the published form).

Axes: G ordered completions of a prompt · S shuffled completions of a prompt · K shuffled orders of the frames
      N completions of a micro-batch · T tokens of a completion
"""

import math
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import common
import data
import policy
import settings
from policy import completion_logps, eos_ids, pack, placeholder_ids, rollout
from rewards import CORRECT, accuracy_reward, format_reward, length_reward, temporal_reward
from settings import UserError, option


@dataclass
class TGRPOConfig(settings.TrainConfig):
    """Settings of T-GRPO. Defaults are the paper's values unless the help says otherwise."""

    num_generations: int = option(8, "G: completions per prompt with the frames in order", low=2)
    shuffled_generations: int = option(4, "S: completions per video with the frames shuffled", low=0)
    temperature: float = option(1.0, "temperature of sampling and of the log-probs", low=1e-3)
    max_new_tokens: int = option(768, "longest completion", low=1)
    beta: float = option(0.04, "weight of the KL to the frozen SFT model; 0: no reference model", low=0)
    clip_epsilon: float = option(0.2, "the ratio of new to old probability is clipped to 1 ± this", low=0)
    updates_per_rollout: int = option(1, "optimizer steps per batch of completions", low=1)
    temporal_rule: str = option(
        "margin",
        "how p and p̃ make the temporal term; none: plain GRPO; credit: one term per completion (configs/credit.yaml)",
        choices=("margin", "paper", "released", "none", "credit"),
    )
    temporal_target: str = option(
        "advantage",
        "what the term is added to; reward: as published, where division by the group's std cancels it",
        choices=("advantage", "reward"),
    )
    alpha: float = option(0.3, "size of the temporal term", low=0)
    advantage_std: str = option(
        "group", "group: divide by the group's std; none: only subtract the mean", choices=("group", "none")
    )
    credit_shuffles: int = option(4, "K: shuffled orders that temporal_rule credit compares with", low=1)
    length_min: int = option(320, "a correct completion of at least this many tokens ...", low=0)
    length_max: int = option(512, "... and at most this many ...", low=0)
    length_omega: float = option(0.2, "... earns this", low=0)
    rollout_compile: bool = option(False, "compile the decoding step (CUDA only); pays off for long completions")
    print_every: int = option(10, "steps between two printed rollouts; 0: never", low=0)
    save_rollouts: bool = option(False, "write every completion with its rewards and advantage to rollouts.jsonl")

    def __post_init__(self):
        super().__post_init__()
        if self.length_min > self.length_max:
            raise UserError(f"length_min {self.length_min} is larger than length_max {self.length_max}")
        if self.temporal_rule == "none":
            self.shuffled_generations = 0


# -------------------------------------------------------------------------------------------- the method, in equations


def group_advantages(rewards_G, std="group"):
    """A_i = (r_i − mean r) / (std r + 1e-4), the std unbiased; exactly 0 if all rewards are equal (GRPO, eq. 1).

    std="none" only subtracts the mean, so that easy and hard prompts keep their weight (Dr. GRPO).
    """
    if (rewards_G == rewards_G[0]).all():
        return torch.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    if std == "none":
        return centred_G
    return centred_G / (rewards_G.std() + 1e-4)


def temporal_advantages(rewards_G, bonus_G, target="advantage", std="group"):
    """Advantages (G,) with the temporal term: bonus_G is r_t for the correct completions and 0 for the others.

    target="reward" is the published form. If the rewards take two values, dividing by the std then cancels r_t exactly:
    it only rescales the rewards (first shown in issue 51 of Video-R1, May 2025). target="advantage" (ours, default)
    adds r_t after the division, where nothing cancels it.
    """
    if target == "reward":
        return group_advantages(rewards_G + bonus_G, std)
    return group_advantages(rewards_G, std) + bonus_G


def temporal_credit(logps_G, shuffled_logps_KG):
    """c_i = log π(o_i | frames in order) − log mean_k π(o_i | shuffle k), in nats.

    TaRO (arXiv 2606.09248) compares the mean over tokens with one shuffle; the mixture of several shuffles is ours.
    Positive for a completion that the order of the frames makes likelier, 0 for one that is as likely in any order,
    negative for one that the order makes less likely. Whole completions are compared, so that a reason which follows
    from the order counts too.
    """
    mean_shuffled_G = shuffled_logps_KG.logsumexp(0) - math.log(len(shuffled_logps_KG))
    return logps_G - mean_shuffled_G


def credit_bonus(credit_G, correct_G, alpha):
    """The temporal term of rule credit: α clip(c_i, 0, 1) for the correct completions, 0 for the others.

    Pay by the amount is ours; TaRO pays every correct completion above its group's mean the same.
    """
    return alpha * credit_G.clamp(0, 1) * correct_G


def kl_k3(logps, ref_logps):
    """Schulman's k3 = e^d − d − 1, d = log π_ref − log π: never negative, and KL(π ‖ π_ref) on average over π."""
    d = (ref_logps - logps).clamp(-10, 10)
    return torch.expm1(d) - d


def grpo_loss(logps_NT, old_logps_NT, ref_logps_NT, advantages_N, mask_NT, epsilon, beta):
    """Loss of each completion (N,): −mean over its tokens of min(ρA, clip(ρ, 1±ε)A) − β KL, with ρ = π / π_old.

    `ref_logps_NT` None: no KL term. Also returns, for the metrics, the KL (N, T) and where the clip was active (N, T).
    """
    advantages_N1 = advantages_N[:, None]
    ratio_NT = torch.exp(logps_NT - old_logps_NT)
    unclipped_NT = ratio_NT * advantages_N1
    clipped_NT = ratio_NT.clamp(1 - epsilon, 1 + epsilon) * advantages_N1
    kl_NT = torch.zeros_like(logps_NT)
    if ref_logps_NT is not None:
        kl_NT = kl_k3(logps_NT, ref_logps_NT)
    objective_NT = torch.min(unclipped_NT, clipped_NT) - beta * kl_NT
    return -masked_mean(objective_NT, mask_NT), kl_NT, clipped_NT < unclipped_NT


def masked_mean(values_NT, mask_NT):
    """Mean over the tokens of each completion (N,)."""
    return (values_NT * mask_NT).sum(1) / mask_NT.sum(1)


# ------------------------------------------------------------------------------------------ rollouts and their rewards


@dataclass
class Group:
    """One prompt of a step with its completions."""

    sample: data.Sample
    # G 1-D tensors of token ids, and their texts
    completions: list
    texts: list
    # S of each; none for images, for clips of one frame, and with S = 0
    shuffled_completions: list = field(default_factory=list)
    shuffled_texts: list = field(default_factory=list)
    # with temporal_rule credit; None for images and clips of one frame
    credit_G: torch.Tensor | None = None
    # {name: (G,)}
    rewards: dict = field(default_factory=dict)
    advantages_G: torch.Tensor | None = None


def sample_groups(model, samples, processor, cfg, compiled_rows=0):
    """Step 2 for this rank's prompts: a list of Groups. All completions are sampled in one batch."""
    # all of this rank's records were unreadable
    if not samples:
        return []
    shuffled = [s for s in samples if cfg.shuffled_generations and s.shuffled is not None]
    prompts = [s.ordered for s in samples] + [s.shuffled for s in shuffled]
    counts = [cfg.num_generations] * len(samples) + [cfg.shuffled_generations] * len(shuffled)
    completions = rollout(
        model, prompts, counts, processor.tokenizer, cfg.temperature, cfg.max_new_tokens, compiled_rows=compiled_rows
    )
    texts = processor.tokenizer.batch_decode(completions, skip_special_tokens=True)

    groups = []
    start = 0
    for sample in samples:
        stop = start + cfg.num_generations
        groups.append(Group(sample, completions[start:stop], texts[start:stop]))
        start = stop
    for group in groups:
        if cfg.shuffled_generations and group.sample.shuffled is not None:
            stop = start + cfg.shuffled_generations
            group.shuffled_completions = completions[start:stop]
            group.shuffled_texts = texts[start:stop]
            start = stop
    return groups


@torch.no_grad()
def add_credit(model, groups, cfg, pad_id):
    """Give every video group its credit_G: how much likelier each completion is with the frames in order than shuffled.

    `model` is the one that sampled. It has whole weights, so no rank waits for another here, regardless of its prompts.
    """
    was_training = model.training
    # without the dropout of a LoRA adapter, as in the rollout
    model.eval()

    def sequence_logps(prompts, completions):
        """Log-probs (N,) of whole completions."""
        packed = pack(model, prompts, completions, pad_id)
        logps_NT, _ = completion_logps(model, packed, cfg.temperature, placeholder_ids(model))
        return logps_NT.sum(1).cpu()

    videos = [group for group in groups if group.sample.extra_shuffles]
    for first in range(0, len(videos), cfg.micro_batch_size):
        micro = videos[first : first + cfg.micro_batch_size]
        completions = [group.completions for group in micro]
        logps_N = sequence_logps([group.sample.ordered for group in micro], completions)
        shuffled_logps = []
        for k in range(cfg.credit_shuffles):
            shuffled_logps.append(sequence_logps([group.sample.extra_shuffles[k] for group in micro], completions))
        credit_N = temporal_credit(logps_N, torch.stack(shuffled_logps))
        for group, credit_G in zip(micro, credit_N.split([len(group) for group in completions])):
            group.credit_G = credit_G
    model.train(was_training)


def accuracies(texts, record):
    """Accuracy reward of each text (N,), from 0 to 1."""
    return torch.tensor([accuracy_reward(text, record["solution"], record["problem_type"]) for text in texts])


def score(group, cfg, eos):
    """Steps 3 and 4: set the group's rewards and advantages, and return its metrics. `eos`: end-of-turn tokens."""
    record = group.sample.record
    accuracy_G = accuracies(group.texts, record)
    correct_G = accuracy_G > CORRECT
    lengths = [len(completion) for completion in group.completions]
    length_rewards = [
        length_reward(length, bool(correct), cfg.length_min, cfg.length_max, cfg.length_omega)
        for length, correct in zip(lengths, correct_G)
    ]
    group.rewards = {
        "accuracy": accuracy_G,
        "format": torch.tensor([format_reward(text) for text in group.texts]),
        "length": torch.tensor(length_rewards),
    }
    rewards_G = sum(group.rewards.values())
    metrics = {}

    # the temporal term: 0 unless the group has shuffled completions, or credits
    bonus_G = torch.zeros_like(rewards_G)
    p = correct_G.double().mean().item()
    if group.shuffled_texts:
        correct_S = accuracies(group.shuffled_texts, record) > CORRECT
        p_shuffled = correct_S.double().mean().item()
        metrics |= gap_metrics(p, p_shuffled, len(correct_G), len(correct_S))
        if cfg.temporal_rule != "credit":
            bonus_G = temporal_reward(p, p_shuffled, cfg.alpha, cfg.temporal_rule) * correct_G
    if group.credit_G is not None:
        bonus_G = credit_bonus(group.credit_G, correct_G, cfg.alpha)
        if correct_G.any():
            metrics["temporal/credit_clamped"] = mean(group.credit_G[correct_G] >= 1)
        for name, members_G in (("correct", correct_G), ("wrong", ~correct_G)):
            if members_G.any():
                metrics[f"temporal/credit_{name}"] = group.credit_G[members_G].mean().item()
    if group.shuffled_texts or group.credit_G is not None:
        group.rewards["temporal"] = bonus_G

    group.advantages_G = temporal_advantages(rewards_G, bonus_G, cfg.temporal_target, cfg.advantage_std)
    change_G = group.advantages_G - group_advantages(rewards_G, cfg.advantage_std)
    total_G = rewards_G + bonus_G if cfg.temporal_target == "reward" else rewards_G
    for name, values_G in group.rewards.items():
        metrics[f"reward/{name}"] = mean(values_G)
    return metrics | {
        "reward/total": mean(total_G),
        f"accuracy/{record['problem_type'].replace(' ', '_')}": mean(accuracy_G),
        "group/zero_std": float((rewards_G == rewards_G[0]).all()),
        "temporal/advantage_change": mean(change_G.abs()),
        "completion/length": sum(lengths) / len(lengths),
        "completion/truncated": sum(int(c[-1]) not in eos for c in group.completions) / len(lengths),
    }


def gap_metrics(p, p_shuffled, n_ordered, n_shuffled):
    """Metrics of the temporal gap p − p̃ of one group."""
    metrics = {
        "temporal/p": p,
        "temporal/p_shuffled": p_shuffled,
        "temporal/gap": p - p_shuffled,
        "temporal/order_helped": float(p > p_shuffled),
    }
    # one completion has no spread
    if n_ordered > 1 and n_shuffled > 1:
        variance = p * (1 - p) / (n_ordered - 1) + p_shuffled * (1 - p_shuffled) / (n_shuffled - 1)
        metrics["temporal/gap_variance"] = variance
    return metrics


def sampled_tokens(group):
    """How many tokens were sampled for a group."""
    return sum(len(completion) for completion in group.completions + group.shuffled_completions)


def mean(values):
    return values.double().mean().item()


def rollout_rows(group):
    """A group's completions as rows of rollouts.jsonl: text, and for ordered ones every reward and the advantage."""
    sample = group.sample
    common_fields = {"problem_id": sample.record["problem_id"], "path": sample.record["path"]}
    numbers = group.rewards | {"advantage": group.advantages_G}
    if group.credit_G is not None:
        numbers["credit"] = group.credit_G
    rows = []
    for i, text in enumerate(group.texts):
        row_numbers = {name: float(f"{values_G[i].item():.5g}") for name, values_G in numbers.items()}
        rows.append({**common_fields, "frames": "ordered", "text": text, **row_numbers})
    for text in group.shuffled_texts:
        rows.append({**common_fields, "frames": "shuffled", "text": text, "frame_order": sample.frame_order})
    return rows


def print_rollouts(step, group):
    """Print one ordered and one shuffled completion of a group."""
    record = group.sample.record
    options = " ".join(record.get("options") or [])
    tqdm.write(f"step {step}: {record['problem']} {options}  solution {record['solution']}")
    tqdm.write(f"  in order (A = {group.advantages_G[0]:+.2f}): {group.texts[0]}")
    if group.shuffled_texts:
        tqdm.write(f"  shuffled: {group.shuffled_texts[0]}")


# ------------------------------------------------------------------------------------------------------------ the loop


def dummy_group(processor, cfg):
    """What a rank without readable records runs, with weight 0, so that all ranks run the same forward passes."""
    sample = data.dummy_sample(processor, cfg)
    return Group(sample, [sample.target], [""], advantages_G=torch.zeros(1))


# under a launcher: the traceback of the rank that failed is printed last
@record
def main():
    cfg = settings.load_config(TGRPOConfig, "tgrpo", doc=__doc__)
    settings.require(cfg, "tgrpo", "model", "records", "output_dir")
    common.check_model(cfg, "tgrpo", made_by=f"accelerate launch sft.py --config {settings.given('config', 'CONFIG')}")
    records, bad_rows = data.load_records(cfg.records, cfg.data_root, cfg.max_unreadable)
    accelerator = common.make_accelerator(cfg)
    rank = accelerator.process_index
    ranks = accelerator.num_processes
    run = common.Run(accelerator, cfg, "tgrpo", len(records), bad_rows)

    processor = policy.load_processor(cfg)
    pad_id = processor.tokenizer.pad_token_id
    starting_files = policy.starting_files(cfg.model)
    model = policy.load_trainable(cfg, accelerator)
    model, optimizer = common.prepare(accelerator, model, cfg)
    unwrapped = accelerator.unwrap_model(model)
    banned = placeholder_ids(unwrapped)
    # loaded after the policy has left the CPU
    reference = policy.load_reference(accelerator, cfg, unwrapped) if cfg.beta else None
    rollout_model = policy.rollout_copy(accelerator, unwrapped, cfg)
    run.resume()

    n_shuffles = cfg.credit_shuffles if cfg.temporal_rule == "credit" else 0
    orders = ("ordered", "shuffled") if cfg.shuffled_generations else ("ordered",)
    samples = data.Samples(records, processor, cfg, orders, n_shuffles=n_shuffles)
    batches = data.loader(samples, data.rank_batches(cfg, run.first_step, rank, ranks), cfg)
    dummy = dummy_group(processor, cfg)
    compiled_rows = 0
    if cfg.rollout_compile:
        compiled_rows = cfg.batch_size // ranks * (cfg.num_generations + cfg.shuffled_generations)

    # 1. prompts
    for step, batch in run.steps(batches):
        # 2. rollout
        policy.refresh(rollout_model, unwrapped)
        common.seed_everything(cfg.seed, step, rank)
        groups = sample_groups(rollout_model, batch, processor, cfg, compiled_rows)
        if cfg.temporal_rule == "credit":
            add_credit(rollout_model, groups, cfg, pad_id)

        # 3. rewards, 4. advantages
        means = common.Means()
        for group in groups:
            means.add(score(group, cfg, eos_ids(unwrapped, processor.tokenizer)))
        seconds = run.lap("rollout")
        if groups:
            means.add({"rollout/tokens_per_s": sum(sampled_tokens(group) for group in groups) / seconds})
        n_completions = common.sum_over_ranks(accelerator, len(groups) * cfg.num_generations)

        # log-probs of each micro-batch before the first update, where the ratio ρ is 1
        old_logps = []
        for update in range(cfg.updates_per_rollout):
            for i, (micro, weight) in enumerate(run.micro_batches(groups, dummy)):
                # 5. loss
                prompts = [group.sample.ordered for group in micro]
                packed = pack(unwrapped, prompts, [group.completions for group in micro], pad_id)
                mask_NT = packed.mask_NT
                advantages_N = torch.cat([group.advantages_G for group in micro]).to(accelerator.device)
                ref_logps_NT = None
                if reference is not None:
                    with torch.no_grad(), policy.adapter_off(reference):
                        ref_logps_NT, _ = completion_logps(reference, packed, cfg.temperature, banned)
                logps_NT, entropy_NT = completion_logps(model, packed, cfg.temperature, banned)
                if update == 0:
                    old_logps.append(logps_NT.detach())
                loss_N, kl_NT, is_clipped_NT = grpo_loss(
                    logps_NT, old_logps[i], ref_logps_NT, advantages_N, mask_NT, cfg.clip_epsilon, cfg.beta
                )

                # 6. update: backward averages over the ranks, hence the factor
                loss = weight * loss_N.sum() / max(1, n_completions)
                accelerator.backward(loss * ranks)
                metrics = {
                    "loss": mean(loss_N),
                    "policy/kl": mean(masked_mean(kl_NT, mask_NT)),
                    "policy/entropy": mean(masked_mean(entropy_NT, mask_NT)),
                    "policy/clip_frac": mean(masked_mean(is_clipped_NT, mask_NT)),
                }
                means.add(metrics, weight=weight * len(loss_N))
            grad_norm = run.update(model, optimizer, step)
        run.lap("update")

        metrics = means.reduce(accelerator) | {"policy/grad_norm": grad_norm}
        if "temporal/gap_variance" in metrics:
            # the standard error of one group's gap: the root of the mean variance
            metrics["temporal/gap_se"] = metrics.pop("temporal/gap_variance") ** 0.5
        run.log(step, metrics)
        if cfg.save_rollouts:
            run.log_rollouts(step, chain.from_iterable(rollout_rows(group) for group in groups))
        run.bar.set_postfix(accuracy=metrics.get("reward/accuracy"), length=metrics.get("completion/length"))
        if cfg.print_every and step % cfg.print_every == 0 and accelerator.is_main_process and groups:
            print_rollouts(step, groups[0])
        if run.checkpoint_or_stop(step):
            return

    final = f"{cfg.output_dir}/final"
    policy.save_model(accelerator, model, starting_files, final, common.compute_dtype(cfg))
    run.finish(f"trained policy: {final}")


if __name__ == "__main__":
    main()
