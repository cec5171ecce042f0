"""T-GRPO: reinforcement learning that asks whether the order of the frames helped.

    accelerate launch tgrpo.py --config configs/toy.yaml       # the tiny model, on a CPU
    accelerate launch tgrpo.py --config configs/7b.yaml        # Qwen2.5-VL-7B, FSDP over the GPUs of this machine

Each step:
    1. a batch of prompts; a video comes with its frames in order and shuffled
    2. rollout: the policy samples G completions with the frames in order and S with the frames shuffled
    3. score: accuracy, format and length of each completion; p and p̃, the shares of correct ones in order and shuffled
    4. advantages: rewards relative to their group, plus the temporal term α (p − p̃) for the correct ones
    5. loss: clipped ratio times advantage, minus β KL to the frozen cold start; mean over the tokens of a completion,
       then over completions. Only the completions of ordered frames are trained
    6. backward, clip, AdamW step
Without the temporal term (`temporal_rule: none`), and always for images, this is GRPO. With `temporal_rule: credit` (ours)
each completion has a temporal term of its own: how much likelier the order of the frames makes it. Nothing is sampled from
shuffled frames then; the completions are read again with the frames shuffled, K times.

Differs from the paper, and why: rollouts sample from the whole distribution (no top-p), so that the log-probs of step 5
are those of the distribution sampled from; the temporal term joins the advantage, because division by the group's std
cancels it in the reward (`temporal_target: reward` is the published way).

Axes: G ordered completions (of a prompt, or of a micro-batch) · S shuffled ones · K shuffles · T completion tokens
      N completions of several prompts; in token_logps: their tokens · B packed rows · L tokens of a packed row · P prompt tokens
"""

import math
from dataclasses import dataclass, field

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

import common
import data
import policy
import settings
from policy import eos_ids, pack, placeholder_ids, rollout, token_logps
from rewards import CORRECT, accuracy_reward, format_reward, length_reward, temporal_reward
from settings import UserError, option


@dataclass
class TGRPOConfig(settings.TrainConfig):
    """Settings of T-GRPO. Defaults are the paper's values unless the help says otherwise."""

    num_generations: int = option(8, "G: completions a prompt with the frames in order", low=1)
    shuffled_generations: int = option(
        -1, "S: completions a video with the frames shuffled; -1: half of num_generations, 0 with rule credit", low=-1
    )
    temperature: float = option(1.0, "sampling temperature, and that of the log-probs", low=1e-3)
    max_new_tokens: int = option(768, "longest completion", low=1)
    beta: float = option(0.04, "weight of the KL to the frozen cold start; 0: no reference model", low=0)
    clip_epsilon: float = option(0.2, "the ratio of new to old probability is clipped to 1 ± this", low=0)
    updates_per_rollout: int = option(1, "optimizer steps on one batch of completions (then the ratio leaves 1)", low=1)
    temporal_rule: str = option(
        "margin",
        "how p and p̃ make the temporal term; none: plain GRPO; credit: each completion its own",
        choices=("margin", "paper", "released", "none", "credit"),
    )
    temporal_target: str = option(
        "auto",
        "where the term enters; reward: as published, where a group's std cancels it; auto: "
        "advantage, with rule credit reward",
        choices=("auto", "advantage", "reward"),
    )
    alpha: float = option(-1, "size of the temporal term; -1: 0.3, with rule credit 1", low=-1)
    advantage_std: str = option(
        "auto",
        "group: divide by the group's std; none: only subtract the mean; auto: group, with rule credit none",
        choices=("auto", "group", "none"),
    )
    credit_shuffles: int = option(4, "K: shuffled orders of the frames that a completion's credit compares with", low=1)
    credit_control: str = option(
        "none",
        "for experiments. dealt: the credits go to the correct completions at random; noise: "
        "normal noise with their mean and std takes their place",
        choices=("none", "dealt", "noise"),
    )
    length_min: int = option(320, "a correct completion of at least this many tokens ...", low=0)
    length_max: int = option(512, "... and at most this many ...", low=0)
    length_omega: float = option(0.2, "... earns this", low=0)
    rollout_compile: bool = option(
        False, "compile the decoding step (CUDA only); pays for long completions of equal batch shape"
    )
    print_every: int = option(10, "steps between two printed rollouts; 0: never", low=0)
    save_rollouts: bool = option(False, "write every completion with its rewards and advantage into rollouts.jsonl")

    def __post_init__(self):
        super().__post_init__()
        if self.num_generations < 2:
            raise UserError(
                f"num_generations: {self.num_generations}; a completion is compared with the others of its group, so at least 2"
            )
        if self.length_min > self.length_max:
            raise UserError(f"length_min {self.length_min} is larger than length_max {self.length_max}")
        credit = self.temporal_rule == "credit"
        if self.shuffled_generations < 0:
            self.shuffled_generations = 0 if credit else self.num_generations // 2
        if self.temporal_rule == "none":
            self.shuffled_generations = 0
        if self.temporal_target == "auto":
            self.temporal_target = "reward" if credit else "advantage"
        if self.advantage_std == "auto":
            self.advantage_std = "none" if credit else "group"
        if self.alpha < 0:
            self.alpha = 1.0 if credit else 0.3


# ---------------------------------------------------------------------------------------- the method, in equations


def group_advantages(rewards_G, std="group"):
    """A_i = (r_i − mean r) / (std r + 1e-4), the std unbiased; exactly 0 if all rewards are equal (GRPO, eq. 1).

    std="none" only subtracts the mean, so that easy and hard prompts keep their weight (Dr. GRPO).
    """
    if bool((rewards_G == rewards_G[0]).all()):
        return torch.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    return centred_G / (rewards_G.std() + 1e-4) if std == "group" else centred_G


def temporal_advantages(rewards_G, correct_G, r_t, target="advantage", std="group"):
    """Advantages (G,) of a group with the temporal term given to its correct completions: r_t one number, or (G,) credits.

    target="reward" is the published form. If the rewards take two values, dividing by the std then cancels r_t exactly:
    it only rescales r. target="advantage" (ours, default) adds r_t after normalisation, where nothing cancels it.
    """
    bonus_G = r_t * correct_G.to(rewards_G.dtype)
    if target == "reward":
        return group_advantages(rewards_G + bonus_G, std)
    return group_advantages(rewards_G, std) + bonus_G


def temporal_credit(logps_G, shuffled_logps_KG):
    """c_i = log π(o_i | frames in order) − log mean_k π(o_i | shuffle k): nats by which the order makes a completion likelier (ours).

    Of whole completions, so that a reason read off the order counts. 0 for one that any order would have brought forth; below 0
    for one that the order speaks against.
    """
    return logps_G - (shuffled_logps_KG.logsumexp(0) - math.log(len(shuffled_logps_KG)))


def kl_k3(logps, ref_logps):
    """Schulman's k3 = e^d − d − 1, d = log π_ref − log π: never negative; its mean over samples of π is KL(π ‖ π_ref)."""
    d = (ref_logps - logps).clamp(-10, 10)
    return torch.expm1(d) - d


def grpo_loss(logps_GT, old_logps_GT, ref_logps_GT, advantages_G, mask_GT, epsilon, beta):
    """Loss of each completion (G,): −mean over its tokens of min(ρA, clip(ρ, 1±ε)A) − β KL, ρ = π / π_old.

    Also returns (G, T) KL and where the clipping was active, for the log. `ref_logps_GT` None: no KL term.
    """
    ratio_GT = torch.exp(logps_GT - old_logps_GT)
    clipped_GT = ratio_GT.clamp(1 - epsilon, 1 + epsilon)
    advantages_G1 = advantages_G[:, None]
    surrogate_GT = torch.min(ratio_GT * advantages_G1, clipped_GT * advantages_G1)
    kl_GT = torch.zeros_like(logps_GT) if ref_logps_GT is None else kl_k3(logps_GT, ref_logps_GT)
    loss_G = -masked_mean(surrogate_GT - beta * kl_GT, mask_GT)
    return loss_G, kl_GT, clipped_GT * advantages_G1 < ratio_GT * advantages_G1


def masked_mean(values_GT, mask_GT):
    """Mean over the tokens of each completion (G,)."""
    return (values_GT * mask_GT).sum(1) / mask_GT.sum(1)


# ---------------------------------------------------------------------------------------------- rollout and log-probs


# ------------------------------------------------------------------------------------------------- scoring a group


@dataclass
class Group:
    """One prompt of the step, with all that happened to it."""

    sample: dict
    completions: list  # G 1-D tensors
    texts: list
    shuffled_texts: list  # S of them; empty for images, one-frame clips and S = 0
    shuffled_lengths: list = field(default_factory=list)
    parts: dict = field(default_factory=dict)  # means over the group, for the log
    terms: dict = field(default_factory=dict)  # every reward term (G,)
    credit_G: torch.Tensor = None  # with temporal_rule credit; None for images and one-frame clips
    advantages_G: torch.Tensor = None


def score(group, cfg, eos):
    """Rewards, p and p̃, the temporal term, advantages of one group (steps 3 and 4)."""
    record = group.sample.record
    judge = lambda texts: torch.tensor([accuracy_reward(t, record["solution"], record["problem_type"]) for t in texts])
    accuracy_G, accuracy_S = judge(group.texts), judge(group.shuffled_texts)
    correct_G, lengths = accuracy_G > CORRECT, [len(c) for c in group.completions]
    length = lambda n, ok: length_reward(n, bool(ok), cfg.length_min, cfg.length_max, cfg.length_omega)
    group.terms = {
        "accuracy": accuracy_G,
        "format": torch.tensor([format_reward(t) for t in group.texts]),
        "length": torch.tensor([length(n, ok) for n, ok in zip(lengths, correct_G)]),
    }
    rewards_G = sum(group.terms.values())  # 3. score

    p, r_t = correct_G.double().mean().item(), 0.0  # r_t: one number, or with credit (G,)
    if group.credit_G is not None:
        r_t = cfg.alpha * credit_or_control(group.credit_G.clamp(0, 1), correct_G, cfg.credit_control)
        for name, which_G in (("correct", correct_G), ("wrong", ~correct_G)):
            if which_G.any():
                group.parts[f"temporal/credit_{name}"] = group.credit_G[which_G].mean().item()
    if group.shuffled_texts:
        p_shuffled = (accuracy_S > CORRECT).double().mean().item()
        if cfg.temporal_rule != "credit":
            r_t = temporal_reward(p, p_shuffled, cfg.alpha, cfg.temporal_rule)
        group.parts |= {
            "temporal/p": p,
            "temporal/p_shuffled": p_shuffled,
            "temporal/gap": p - p_shuffled,
            "temporal/order_helped": float(p > p_shuffled),
        }
        if (
            min(len(lengths), len(accuracy_S)) > 1
        ):  # one completion has no spread. A variance here: main takes the root of its mean
            group.parts["temporal/gap_se"] = p * (1 - p) / (len(lengths) - 1) + p_shuffled * (1 - p_shuffled) / (
                len(accuracy_S) - 1
            )
    bonus_G = r_t * correct_G
    group.advantages_G = temporal_advantages(rewards_G, correct_G, r_t, cfg.temporal_target, cfg.advantage_std)  # 4.
    without_G = group_advantages(rewards_G, cfg.advantage_std)
    if group.shuffled_texts or group.credit_G is not None:
        group.terms["temporal"] = bonus_G
    mean = lambda values_G: values_G.double().mean().item()
    group.parts |= {f"reward/{name}": mean(values_G) for name, values_G in group.terms.items()} | {
        "reward/total": mean(rewards_G + bonus_G if cfg.temporal_target == "reward" else rewards_G),
        f"accuracy/{record['problem_type'].replace(' ', '_')}": mean(accuracy_G),
        "group/zero_std": float((rewards_G == rewards_G[0]).all()),
        "temporal/advantage_change": mean((group.advantages_G - without_G).abs()),
        "completion/length": sum(lengths) / len(lengths),
        "completion/truncated": sum(int(c[-1]) not in eos for c in group.completions) / len(lengths),
    }


def credit_or_control(credit_G, correct_G, control):
    """The credits as they are; or, for an experiment that asks whether their aim matters, what `credit_control` puts in their place."""
    dealt_G, of_correct = credit_G.clone(), credit_G[correct_G]
    if control == "dealt":
        dealt_G[correct_G] = of_correct[torch.randperm(len(of_correct))]
    elif control == "noise":
        dealt_G[correct_G] = of_correct.mean() + of_correct.std(correction=0) * torch.randn(len(of_correct))
    return dealt_G


@torch.no_grad()
def add_credit(model, groups, cfg, pad_id):
    """Give every video group its credit_G: how much likelier each completion is with the frames in order than shuffled.

    `model` has whole weights (it is the one that sampled), so no rank waits for another here, whatever its prompts are.
    """
    videos = [g for g in groups if g.sample.extra_shuffles]
    for first in range(0, len(videos), cfg.micro_batch_size):
        micro = videos[first : first + cfg.micro_batch_size]
        completions, sizes = [g.completions for g in micro], [len(g.completions) for g in micro]

        def logps_of(prompts):  # log-probs (N,) of whole completions, after these prompts
            packed = common.to_device(pack(model, prompts, completions, pad_id), model.device)
            lengths = [len(c) for group in completions for c in group]
            return token_logps(model, packed, lengths, cfg.temperature, tuple(placeholder_ids(model)))[0].sum(1).cpu()

        logps_N = logps_of([g.sample.ordered for g in micro])
        shuffled_logps_KN = torch.stack(
            [logps_of([g.sample.extra_shuffles[k] for g in micro]) for k in range(cfg.credit_shuffles)]
        )
        for group, credit_G in zip(micro, temporal_credit(logps_N, shuffled_logps_KN).split(sizes)):
            group.credit_G = credit_G


def sample_groups(model, samples, processor, cfg, n_prompts):
    """Steps 2 to 4 for this rank's prompts: a list of scored Groups. `n_prompts`: how many prompts it has at most."""
    if not samples:  # all of this rank's records were unusable
        return []
    shuffled = [s for s in samples if cfg.shuffled_generations and s.shuffled is not None]
    prompts = [s.ordered for s in samples] + [s.shuffled for s in shuffled]
    counts = [cfg.num_generations] * len(samples) + [cfg.shuffled_generations] * len(shuffled)
    compiled_rows = n_prompts * (cfg.num_generations + cfg.shuffled_generations) if cfg.rollout_compile else 0
    completions = rollout(
        model, prompts, counts, processor.tokenizer, cfg.temperature, cfg.max_new_tokens, compiled_rows=compiled_rows
    )  # 2. rollout
    texts = iter(processor.tokenizer.batch_decode(completions, skip_special_tokens=True))
    completions = iter(completions)
    take = lambda n: ([next(completions) for _ in range(n)], [next(texts) for _ in range(n)])
    groups = [Group(s, *take(cfg.num_generations), []) for s in samples]
    for group in (g for g in groups if any(g.sample is s for s in shuffled)):
        others, group.shuffled_texts = take(cfg.shuffled_generations)
        group.shuffled_lengths = [len(c) for c in others]
    if cfg.temporal_rule == "credit":
        add_credit(model, groups, cfg, processor.tokenizer.pad_token_id)
    for group in groups:
        score(group, cfg, eos_ids(model, processor.tokenizer))  # 3. and 4.
    return groups


def rollout_rows(group):
    """A group's completions as rows of rollouts.jsonl: text, every reward term and the advantage of those in order."""
    said = {"problem_id": group.sample.record["problem_id"], "path": group.sample.record["path"]}
    columns = (
        group.terms | {"advantage": group.advantages_G} | ({} if group.credit_G is None else {"credit": group.credit_G})
    )
    for i, text in enumerate(group.texts):
        yield {
            **said,
            "frames": "ordered",
            "text": text,
            **{name: float(f"{values_G[i].item():.5g}") for name, values_G in columns.items()},
        }
    for text in group.shuffled_texts:
        yield {**said, "frames": "shuffled", "text": text, "frame_order": group.sample.frame_order}


def print_rollouts(step, groups):
    """One ordered and one shuffled completion of the first group, as text."""
    group = groups[0]
    record = group.sample.record
    lines = [
        f"step {step}: {record['problem']} {' '.join(record.get('options') or [])}  truth {record['solution']}",
        f"  in order (A = {group.advantages_G[0]:+.2f}): {group.texts[0]}",
    ]
    lines += [f"  shuffled: {group.shuffled_texts[0]}"] if group.shuffled_texts else [f"  in order: {group.texts[-1]}"]
    tqdm.write("\n".join(lines))


# --------------------------------------------------------------------------------------------------------- the loop


@record  # under a launcher: this rank's traceback stands last
def main():
    cfg = settings.load_config(TGRPOConfig, "tgrpo", doc=__doc__)
    settings.require(cfg, "tgrpo", "model", "records", "output_dir")
    policy.check_model(cfg, "tgrpo", made_by="accelerate launch sft.py --config " + settings.given("config", "CONFIG"))
    records, bad_rows = data.load_records(cfg.records, cfg.data_root, cfg.max_unreadable)
    accelerator = common.make_accelerator(cfg, **common.trackers(cfg))
    common.check_batches(cfg, accelerator)
    checkpoint = common.claim_folder(accelerator, cfg, "tgrpo")

    processor = policy.load_processor(cfg)
    files = policy.starting_files(cfg.model)
    model = policy.load_model(cfg, accelerator=accelerator).train()
    model, optimizer = common.prepare(accelerator, model, cfg)
    reference = policy.load_frozen(accelerator, cfg) if cfg.beta else None  # after the policy has left the CPU
    unwrapped = accelerator.unwrap_model(model)
    sampler = policy.rollout_copy(accelerator, unwrapped, cfg)
    banned, pad_id = tuple(placeholder_ids(unwrapped)), processor.tokenizer.pad_token_id
    resumed = common.resume(accelerator, checkpoint)
    start = resumed["step"]
    log = common.Log(accelerator, cfg, "tgrpo", start)
    stop = common.StopSignal()
    skipped = common.Skipped(accelerator, cfg, len(records), bad_rows, resumed.get("skipped", {}))

    orders = ("ordered", "shuffled") if cfg.shuffled_generations else ("ordered",)
    samples = data.Samples(
        records, processor, cfg, orders, n_shuffles=cfg.credit_shuffles if cfg.temporal_rule == "credit" else 0
    )
    blank = data.blank_sample(processor, cfg)
    blank = Group(blank, [blank.target], [""], [], advantages_G=torch.zeros(1))
    batches = data.loader(
        samples, data.rank_batches(cfg, start, accelerator.process_index, accelerator.num_processes), cfg
    )
    timer = common.Timer()
    bar = tqdm(batches, initial=start, total=cfg.steps, desc="tgrpo", disable=not accelerator.is_main_process)
    for step, batch in enumerate(bar, start):
        timer.lap("data_wait")
        batch = skipped.drop(accelerator, batch)  # 1. prompts
        policy.refresh(sampler, unwrapped)
        common.seed_everything(cfg.seed, step, accelerator.process_index)
        # 2. rollout, 3. score, 4. advantages
        groups = sample_groups(sampler, batch, processor, cfg, cfg.batch_size // accelerator.num_processes)
        seconds = timer.lap("rollout")
        means = common.Means()
        for group in groups:
            means.add(group.parts)
        if groups:
            n_tokens = sum(map(len, (c for g in groups for c in g.completions))) + sum(
                n for g in groups for n in g.shuffled_lengths
            )
            means.add({"rollout/tokens_per_s": n_tokens / seconds})  # of one process
        total = common.all_sum(accelerator, {"completions": len(groups) * cfg.num_generations})["completions"]

        old_logps = {}  # of each micro-batch of this step
        for _ in range(cfg.updates_per_rollout):
            for i, (micro, weight) in enumerate(common.micro_batches(groups, cfg, accelerator, blank)):
                lengths = [len(c) for g in micro for c in g.completions]
                packed = pack(unwrapped, [g.sample.ordered for g in micro], [g.completions for g in micro], pad_id)
                packed = common.to_device(packed, accelerator.device)
                advantages_G = torch.cat([g.advantages_G for g in micro]).to(accelerator.device)
                mask_GT = data.pad([torch.ones(n) for n in lengths], 0, "right").to(accelerator.device)

                ref_logps_GT = None
                if reference is not None:
                    with torch.no_grad():
                        ref_logps_GT, _ = token_logps(reference, packed, lengths, cfg.temperature, banned)
                logps_GT, entropy_GT = token_logps(model, packed, lengths, cfg.temperature, banned)
                old_logps_GT = old_logps.setdefault(i, logps_GT.detach())  # the first update's: there ρ = 1
                loss_G, kl_GT, clipped_GT = grpo_loss(
                    logps_GT, old_logps_GT, ref_logps_GT, advantages_G, mask_GT, cfg.clip_epsilon, cfg.beta
                )  # 5. loss
                loss = weight * loss_G.sum() / max(1, total)
                accelerator.backward(loss * accelerator.num_processes)  # 6. backward; ranks' gradients are averaged
                means.add(
                    {
                        "loss": loss_G.mean().item(),
                        "policy/kl": masked_mean(kl_GT, mask_GT).mean().item(),
                        "policy/entropy": masked_mean(entropy_GT, mask_GT).mean().item(),
                        "policy/clip_frac": masked_mean(clipped_GT, mask_GT).mean().item(),
                    },
                    weight=weight * len(loss_G),
                )
            grad_norm = common.update(accelerator, model, optimizer, step, cfg)  # 6. step
        timer.lap("update")

        metrics = {
            **means.reduce(accelerator),
            "policy/grad_norm": grad_norm,
            "lr": common.learning_rate(step, cfg),
            "data/skipped": len(skipped),
            **timer.report(),
            **common.peak_memory(accelerator),
        }
        if "temporal/gap_se" in metrics:
            metrics["temporal/gap_se"] **= 0.5  # the mean variance of one group's p − p̃, as a standard error
        log(step, metrics)
        if cfg.save_rollouts:
            log.rollouts(step, [row for group in groups for row in rollout_rows(group)])
        bar.set_postfix(
            accuracy=f"{metrics.get('reward/accuracy', float('nan')):.2f}",
            length=f"{metrics.get('completion/length', 0):.0f}",
        )
        if cfg.print_every and step % cfg.print_every == 0 and accelerator.is_main_process and groups:
            print_rollouts(step, groups)
        if common.after_step(accelerator, cfg, step, stop, {"skipped": skipped.seen}):
            return

    policy.save_model(accelerator, model, files, f"{cfg.output_dir}/final", common.compute_dtype(cfg))
    skipped.report(accelerator)
    accelerator.print(f"trained policy: {cfg.output_dir}/final")
    accelerator.end_training()


if __name__ == "__main__":
    main()
