"""Temporal credit: how much likelier does the order of the frames make a completion?

    accelerate launch -m experiments.variants --variant credit --config configs/credit.yaml

T-GRPO has one temporal term per prompt. Here each completion has its own, after TaRO (arXiv 2606.09248). Nothing is
sampled from shuffled frames: the same completions are scored again, without gradients, with K shuffled orders.
    credit      c_i = log π(o_i | frames in order) − log mean_k π(o_i | shuffle k), in nats
    term        α clip(c_i, 0, 1) for a correct completion, 0 for a wrong one
    advantage   r_i plus the term, minus the group's mean; not divided by the group's std

Axes: G completions of a prompt · K shuffled orders of the frames · N completions of a micro-batch · T their tokens
"""

import math
from dataclasses import dataclass

import torch

import policy
import tgrpo
from support import metrics
from support.metrics import of_group, rollout_rows
from support.settings import option
from tgrpo import sample_groups


@dataclass
class CreditConfig(tgrpo.TGRPOConfig):
    """Settings of T-GRPO with credits; the defaults are the rule above."""

    temporal_target: str = option("reward", "what the term is added to", choices=("advantage", "reward"))
    alpha: float = option(1.0, "what a correct completion with a credit of 1 nat or more earns", low=0)
    advantage_std: str = option("none", "whether the group's std divides the advantages", choices=("group", "none"))
    credit_shuffles: int = option(4, "K: shuffled orders that each completion is compared with", low=1)

    def __post_init__(self):
        # no term from p and p̃, so nothing is sampled from shuffled frames
        self.temporal_rule = "none"
        super().__post_init__()

    def frame_orders(self):
        """The orders of frames that each completion is scored with."""
        return ["ordered", *(f"shuffled {k}" for k in range(1, self.credit_shuffles + 1))]


@dataclass
class CreditGroup(tgrpo.Group):
    """A Group whose completions have credits; None for images and clips of one frame."""

    credit_G: torch.Tensor | None = None


def temporal_credit(logps_G, shuffled_logps_KG):
    """c_i (G,): positive if the order of the frames makes a completion likelier, 0 if it is as likely in any order.

    TaRO compares the mean over tokens with one shuffle; the mixture of several shuffles is ours. Whole completions are
    compared, so that a reason which follows from the order counts too.
    """
    mean_shuffled_G = shuffled_logps_KG.logsumexp(0) - math.log(len(shuffled_logps_KG))
    return logps_G - mean_shuffled_G


def credit_bonus(credit_G, correct_G, alpha):
    """The temporal term (G,). TaRO pays every correct completion above its group's mean the same."""
    return alpha * credit_G.clamp(0, 1) * correct_G


@torch.no_grad()
def add_credit(model, groups, cfg, pad_id):
    """Give every video group its credit_G. `model` has sampled: its weights are whole, so no rank waits for another."""
    was_training = model.training
    # without the dropout of a LoRA adapter, as in the rollout
    model.eval()
    banned = policy.placeholder_ids(model)
    videos = [group for group in groups if "shuffled 1" in group.sample.inputs]
    for first in range(0, len(videos), cfg.micro_batch_size):
        micro = videos[first : first + cfg.micro_batch_size]
        completions = [group.completions for group in micro]
        logps = []
        for order in cfg.frame_orders():
            packed = policy.pack(model, [group.sample.inputs[order] for group in micro], completions, pad_id)
            logps_NT, _ = policy.completion_logps(model, packed, cfg.temperature, banned)
            logps.append(logps_NT.sum(1).cpu())
        credit_N = temporal_credit(logps[0], torch.stack(logps[1:]))
        for group, credit_G in zip(micro, credit_N.split([len(group.completions) for group in micro])):
            group.credit_G = credit_G
    model.train(was_training)


# --------------------------------------------------------------------------- what takes the place of names of tgrpo.py


def sample_with_credit(model, samples, processor, cfg):
    """tgrpo.sample_groups, then the credit of every completion."""
    groups = sample_groups(model, samples, processor, cfg)
    add_credit(model, groups, cfg, processor.tokenizer.pad_token_id)
    return groups


def credit_term(group, cfg):
    """The temporal term (G,) of a scored group; 0 without credits."""
    if group.credit_G is None:
        return torch.zeros(len(group.texts))
    return credit_bonus(group.credit_G, group.correct_G, cfg.alpha)


def metrics_with_credit(group, cfg, eos):
    """metrics.of_group, with the credits of the group: see docs/metrics.md."""
    values = of_group(group, cfg, eos)
    if group.credit_G is None:
        return values
    values["reward/temporal"] = metrics.mean(group.temporal_G)
    if group.correct_G.any():
        values["temporal/credit_clamped"] = metrics.mean(group.credit_G[group.correct_G] >= 1)
        values["temporal/credit_correct"] = metrics.mean(group.credit_G[group.correct_G])
    if not group.correct_G.all():
        values["temporal/credit_wrong"] = metrics.mean(group.credit_G[~group.correct_G])
    return values


def rows_with_credit(group):
    """metrics.rollout_rows, with the temporal term and the credit of each completion."""
    rows = rollout_rows(group)
    if group.credit_G is not None:
        for row, term, credit in zip(rows, group.temporal_G.tolist(), group.credit_G.tolist(), strict=True):
            row["temporal"] = float(f"{term:.5g}")
            row["credit"] = float(f"{credit:.5g}")
    return rows


# {(where, name): what takes its place}
CREDIT = {
    (tgrpo, "TGRPOConfig"): CreditConfig,
    (tgrpo, "Group"): CreditGroup,
    (tgrpo, "sample_groups"): sample_with_credit,
    (tgrpo, "temporal_term"): credit_term,
    (metrics, "of_group"): metrics_with_credit,
    (metrics, "rollout_rows"): rows_with_credit,
}
