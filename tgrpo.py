"""T-GRPO: reinforcement learning with a reward that asks whether the order of the frames helped.

    accelerate launch tgrpo.py --config configs/toy.yaml       # the tiny model, on a CPU
    accelerate launch tgrpo.py --config configs/7b.yaml        # Qwen2.5-VL-7B, FSDP over the GPUs of this machine

Each step:
    1. prompts: a batch of questions; a video comes with its frames in order and shuffled
    2. rollout: the policy samples G completions with the frames in order and S with the frames shuffled
    3. rewards: accuracy, format and length of each completion; the temporal term r_t = α (p − p̃) if p > p̃, else 0,
       where p and p̃ are the fractions correct with ordered and with shuffled frames
    4. advantages: rewards relative to their group, plus r_t for the correct completions
    5. loss: clipped ratio times advantage, and β times the KL to the frozen SFT model; mean over the tokens of a
       completion, then over completions. Only completions sampled with ordered frames are trained on
    6. update: backward, clip the gradient, AdamW
Without the temporal term (`temporal_rule: none`), and always for images, this is GRPO.

What is different from the paper and its released code, or left out:
    1. The temporal term is added to the advantage. In the reward, as published, division by the group's std cancels it
       if all correct completions have one reward and all wrong ones another (`temporal_target: reward` is that form).
    2. The temporal term is graded: α (p − p̃) in place of α. `temporal_rule` has the published rules, too.
    3. Rollouts sample from the whole distribution, without top-p: the log-probs of step 5 are then those of the
       distribution that was sampled from.
    4. Each completion is scored by its own record's problem type, and no clip ever replaces an unreadable one.
    5. One update per rollout is the default, as released. Then π = π_old at each update: ρ is 1 and the clip is inert.
    6. No inference engine, no reward model, no replay: each GPU samples, scores and trains its own prompts in turn.
docs/differences.md has the complete list, each with the test that guards it.

Axes: G ordered completions of a prompt · S shuffled completions of a prompt
      N completions of a micro-batch · T tokens of a completion
"""

from dataclasses import dataclass, field
from itertools import islice

import torch
from torch.distributed.elastic.multiprocessing import errors

import data
import policy
from policy import completion_logps, pack, rollout
from rewards import CORRECT, accuracy_reward, format_reward, length_reward, temporal_reward
from support import distributed, families, lora, metrics, model_files, settings, training, workers
from support.settings import option


@dataclass
class TGRPOConfig(settings.TrainConfig):
    """Settings of T-GRPO. Defaults are the paper's, except where the help says "ours"."""

    num_generations: int = option(8, "G: completions per prompt with the frames in order", low=2)
    shuffled_generations: int = option(4, "S: completions per video with the frames shuffled", low=0)
    temperature: float = option(1.0, "temperature of sampling and of the log-probs", low=1e-3)
    max_new_tokens: int = option(768, "longest completion", low=1)
    beta: float = option(0.04, "weight of the KL to the frozen SFT model; 0: no reference model", low=0)
    clip_epsilon: float = option(0.2, "the ratio of new to old probability is clipped to 1 ± this", low=0)
    updates_per_rollout: int = option(1, "optimizer steps per batch of completions", low=1)
    temporal_rule: str = option(
        "margin",
        "how p and p̃ make the temporal term; margin is ours; none: plain GRPO",
        choices=("margin", "paper", "released", "none"),
    )
    temporal_target: str = option(
        "advantage",
        "where the term is added: advantage (ours), or reward (the paper's, where division by the std cancels it)",
        choices=("advantage", "reward"),
    )
    alpha: float = option(0.3, "size of the temporal term", low=0)
    advantage_std: str = option(
        "group", "group: divide by the group's std; none: only subtract the mean", choices=("group", "none")
    )
    length_min: int = option(320, "a correct completion of at least this many tokens ...", low=0)
    length_max: int = option(512, "... and at most this many ...", low=0)
    length_omega: float = option(0.2, "... earns this", low=0)
    rollout_compile: bool = option(False, "compile the decoding step (CUDA only); pays off for long completions")
    lora_rollout: str = option(
        "adapter",
        "what samples with LoRA; with merged weights decoding is faster, and log-probs differ by rounding",
        choices=("adapter", "merged_copy", "merged_in_place"),
    )
    print_every: int = option(10, "steps between two printed rollouts; 0: never", low=0)
    save_rollouts: bool = option(False, "write every completion with its rewards and advantage to rollouts.jsonl")

    def __post_init__(self):
        super().__post_init__()
        if self.length_min > self.length_max:
            raise settings.UserError(f"length_min {self.length_min} is larger than length_max {self.length_max}")
        if self.temporal_rule == "none":
            self.shuffled_generations = 0

    def frame_orders(self):
        """The orders of frames that a step samples from."""
        return ("ordered", "shuffled") if self.shuffled_generations else ("ordered",)


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


def temporal_advantages(rewards_G, temporal_G, target="advantage", std="group"):
    """Advantages (G,) with the temporal term: temporal_G is r_t for the correct completions and 0 for the others.

    target="reward" is the published form. If all correct completions have one reward and all wrong ones another, r_t
    only rescales the rewards, and dividing by the std cancels it, up to the 1e-4 (first shown in issue 51 of Video-R1,
    May 2025). target="advantage" (ours, default) adds r_t after the division, where nothing cancels it.
    """
    if target == "reward":
        return group_advantages(rewards_G + temporal_G, std)
    return group_advantages(rewards_G, std) + temporal_G


def kl_k3(logps, ref_logps):
    """Schulman's k3 = e^d − d − 1 with d = log π_ref − log π. It is never negative, and its mean over samples from π is
    KL(π ‖ π_ref).
    """
    # e^d stays finite
    d = (ref_logps - logps).clamp(max=10)
    return torch.expm1(d) - d


def grpo_loss(logps_NT, old_logps_NT, ref_logps_NT, advantages_N, mask_NT, epsilon, beta):
    """Loss of each completion (N,): −mean over its tokens of [min(ρA, clip(ρ, 1±ε)A) − β KL], with ρ = π / π_old.

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
    # which completions are correct
    correct_G: torch.Tensor | None = None
    correct_S: torch.Tensor | None = None
    # {name: (G,)}: the rewards that are summed
    rewards: dict = field(default_factory=dict)
    # r_t for the correct completions, 0 for the others
    temporal_G: torch.Tensor | None = None
    advantages_G: torch.Tensor | None = None
    # for the log: the advantages without the temporal term
    plain_advantages_G: torch.Tensor | None = None


def sample_groups(model, samples, processor, cfg):
    """Step 2 for this rank's prompts: a list of Groups. All completions are sampled in one batch."""
    # all of this rank's records were unreadable
    if not samples:
        return []
    # the batch: all prompts with ordered frames, then those of the videos with shuffled frames
    ordered = [sample.inputs["ordered"] for sample in samples]
    shuffled = [sample.inputs["shuffled"] for sample in samples if "shuffled" in sample.inputs]
    counts = [cfg.num_generations] * len(ordered) + [cfg.shuffled_generations] * len(shuffled)
    prompts = ordered + shuffled
    completions = iter(rollout(model, prompts, counts, processor.tokenizer, cfg.temperature, cfg.max_new_tokens))

    def take(n):
        """The next n completions of the batch, and their texts."""
        taken = list(islice(completions, n))
        return taken, families.texts(processor, taken)

    groups = [Group(sample, *take(cfg.num_generations)) for sample in samples]
    for group in groups:
        if "shuffled" in group.sample.inputs:
            group.shuffled_completions, group.shuffled_texts = take(cfg.shuffled_generations)
    return groups


def score(group, cfg):
    """Steps 3 and 4: the group's rewards and advantages."""
    accuracy_G = accuracies(group.texts, group.sample.record)
    group.correct_G = accuracy_G > CORRECT
    length_rewards = []
    for completion, correct in zip(group.completions, group.correct_G.tolist()):
        length_rewards.append(length_reward(len(completion), correct, cfg.length_min, cfg.length_max, cfg.length_omega))
    group.rewards = {
        "accuracy": accuracy_G,
        "format": torch.tensor([format_reward(text) for text in group.texts]),
        "length": torch.tensor(length_rewards),
    }
    rewards_G = sum(group.rewards.values())
    group.temporal_G = temporal_term(group, cfg)
    group.advantages_G = temporal_advantages(rewards_G, group.temporal_G, cfg.temporal_target, cfg.advantage_std)
    group.plain_advantages_G = group_advantages(rewards_G, cfg.advantage_std)


def accuracies(texts, record):
    """Accuracy reward of each text (N,), from 0 to 1."""
    return torch.tensor([accuracy_reward(text, record["solution"], record["problem_type"]) for text in texts])


def temporal_term(group, cfg):
    """The temporal term (G,): r_t for the correct completions, else 0; all 0 without shuffled completions.

    Needs group.correct_G, and sets group.correct_S.
    """
    if not group.shuffled_texts:
        return torch.zeros(len(group.texts))
    group.correct_S = accuracies(group.shuffled_texts, group.sample.record) > CORRECT
    p = group.correct_G.double().mean().item()
    p_shuffled = group.correct_S.double().mean().item()
    return temporal_reward(p, p_shuffled, cfg.alpha, cfg.temporal_rule) * group.correct_G


def dummy_group(processor, cfg):
    """What a rank without readable records runs, with weight 0, so that all ranks run the same forward passes."""
    sample = data.dummy_sample(processor, cfg)
    return Group(sample, [sample.target], [""], advantages_G=torch.zeros(1))


# ------------------------------------------------------------------------------------------------------------ the loop


# under a launcher: the traceback of the rank that failed is printed last
@errors.record
def main():
    cfg = settings.load_config(TGRPOConfig, "tgrpo", doc=__doc__, required=("model", "records", "output_dir"))
    model_files.check_model(cfg, "tgrpo", made_by="sft.py")
    records, bad_rows = data.load_records(cfg.records, cfg.data_root, cfg.max_unreadable)
    accelerator = distributed.make_accelerator(cfg)
    rank = accelerator.process_index
    ranks = accelerator.num_processes
    run = training.Run(accelerator, cfg, "tgrpo", records, bad_rows)

    # the policy: `model` is called, and backward runs through it; `unwrapped` has its weights and config
    processor = model_files.load_processor(cfg)
    starting_files = model_files.starting_files(cfg.model)
    model, optimizer = distributed.prepare(accelerator, policy.load_trainable(cfg, accelerator), cfg)
    unwrapped = accelerator.unwrap_model(model)
    # loaded after the policy has left the CPU
    reference = policy.load_reference(accelerator, cfg, unwrapped) if cfg.beta else None
    rollout_model = policy.rollout_copy(accelerator, unwrapped, cfg)
    run.resume()

    samples = data.Samples(records, processor, cfg, cfg.frame_orders())
    batches = workers.loader(samples, data.rank_batches(cfg, run.first_step, rank, ranks), cfg)
    dummy = dummy_group(processor, cfg)
    pad_id = processor.tokenizer.pad_token_id
    banned = policy.placeholder_ids(unwrapped)
    eos = policy.eos_ids(unwrapped, processor.tokenizer)

    # 1. prompts
    for step, batch in run.steps(batches):
        # 2. rollout
        policy.refresh(rollout_model, unwrapped)
        distributed.seed_everything(cfg.seed, step, rank)
        # only with LoRA, and only if the settings ask for it, does merged do anything
        with lora.merged(rollout_model, cfg.lora_rollout):
            groups = sample_groups(rollout_model, batch, processor, cfg)

        # 3. rewards, 4. advantages
        for group in groups:
            score(group, cfg)
        # the step's metrics; the update adds its own
        means = metrics.of_groups(groups, cfg, eos, seconds=run.lap("rollout"))
        n_completions = distributed.sum_over_ranks(accelerator, len(groups) * cfg.num_generations)

        # log-probs of each micro-batch before the first update, where the ratio ρ is 1
        old_logps = []
        for update in range(cfg.updates_per_rollout):
            for i, (micro, weight) in enumerate(run.micro_batches(groups, dummy)):
                # 5. loss
                prompts = [group.sample.inputs["ordered"] for group in micro]
                packed = pack(unwrapped, prompts, [group.completions for group in micro], pad_id)
                mask_NT = packed.mask_NT
                advantages_N = torch.cat([group.advantages_G for group in micro]).to(accelerator.device)
                ref_logps_NT = None
                if reference is not None:
                    # with LoRA the reference is the policy; without, adapter_off does nothing
                    with torch.no_grad(), lora.adapter_off(reference):
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
                per_completion = {
                    "loss": loss_N,
                    "policy/kl": masked_mean(kl_NT, mask_NT),
                    "policy/entropy": masked_mean(entropy_NT, mask_NT),
                    "policy/clip_frac": masked_mean(is_clipped_NT, mask_NT),
                }
                means.add(metrics.averages(per_completion), weight=weight * len(loss_N))
            training.set_learning_rate(optimizer, step, cfg)
            grad_norm = run.clip_gradient(model)
            if run.is_finite(grad_norm, step):
                optimizer.step()
            optimizer.zero_grad()
        run.lap("update")

        run.log(step, metrics.of_step(means, accelerator) | {"policy/grad_norm": grad_norm}, show="reward/accuracy")
        metrics.write_rollouts(run, step, groups)
        if run.checkpoint_or_stop(step):
            return

    run.finish(model, starting_files, "trained policy")


if __name__ == "__main__":
    main()
