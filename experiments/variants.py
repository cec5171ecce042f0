"""T-GRPO with another temporal reward: temporal credit, two controls of it, and the rules of related work.

    accelerate launch -m experiments.variants --variant credit --config configs/credit.yaml [settings of tgrpo.py]
    accelerate launch -m experiments.variants --variant taro --config configs/toy.yaml --output_dir runs/toy/taro

Each variant replaces names of tgrpo.py before it starts:
    credit      each completion is paid by how much likelier the order of the frames makes it (credit.py)
    shuffled    the group's own credit terms, assigned to its correct completions in random order (control)
    noise       Gaussian noise with the mean and the spread of the group's own credit terms (control)
    taro        TaRO's reward (arXiv 2606.09248): 0.3 for correct completions with a credit per token above their
                group's mean. TaRO itself shuffles only the frames near annotated boundaries, here the whole clip is.
    gdpo        GDPO: each reward is normalised alone, they are added, and the sum is normalised over the step

The two controls say whether it matters which correct completion of a group is paid. The group's total remains that of
credit; with one correct completion they are credit.
"""

import sys
from dataclasses import dataclass

import torch

import tgrpo
from experiments import credit
from experiments.credit import add_credit, credit_bonus
from support import training
from support.settings import option
from tgrpo import group_advantages, score
from tools import shared

micro_batches = training.Run.micro_batches


def shuffled_bonus(credit_G, correct_G, alpha):
    bonus_G = credit_bonus(credit_G, correct_G, alpha)
    of_correct = bonus_G[correct_G]
    bonus_G[correct_G] = of_correct[torch.randperm(len(of_correct))]
    return bonus_G


def noise_bonus(credit_G, correct_G, alpha):
    bonus_G = credit_bonus(credit_G, correct_G, alpha)
    of_correct = bonus_G[correct_G]
    bonus_G[correct_G] = of_correct.mean() + of_correct.std(correction=0) * torch.randn(len(of_correct))
    return bonus_G


@dataclass
class TaroConfig(credit.CreditConfig):
    """Settings of T-GRPO with TaRO's reward; the defaults are TaRO's."""

    alpha: float = option(0.3, "what a correct completion with a credit above the mean earns", low=0)
    advantage_std: str = option("group", "whether the group's std divides the advantages", choices=("group", "none"))
    credit_shuffles: int = option(1, "K: shuffled orders that each completion is compared with", low=1)


def above_mean_bonus(credit_G, correct_G, alpha):
    return alpha * (credit_G > credit_G.mean()) * correct_G


def add_credit_per_token(model, groups, cfg, pad_id):
    """Like add_credit, with the mean over the tokens of a completion instead of their sum."""
    add_credit(model, groups, cfg, pad_id)
    for group in groups:
        if group.credit_G is not None:
            group.credit_G /= torch.tensor([len(completion) for completion in group.completions])


def gdpo_score(group, cfg):
    """Like tgrpo.score, with rewards that are normalised alone."""
    score(group, cfg)
    group.plain_advantages_G = sum(group_advantages(rewards_G) for rewards_G in group.rewards.values())
    group.advantages_G = group.plain_advantages_G + group_advantages(group.temporal_G)


def gdpo_micro_batches(run, groups, dummy):
    """Like Run.micro_batches, after the advantages of this rank's step were divided by their standard deviation."""
    if groups:
        # their mean is 0 already; a second time, for another update, nothing changes
        std = torch.cat([group.advantages_G for group in groups]).std()
        for group in groups:
            group.advantages_G = group.advantages_G / (std + 1e-4)
    return micro_batches(run, groups, dummy)


# {variant: {(where, name): what takes its place}}
VARIANTS = {
    "credit": credit.CREDIT,
    "shuffled": credit.CREDIT | {(credit, "credit_bonus"): shuffled_bonus},
    "noise": credit.CREDIT | {(credit, "credit_bonus"): noise_bonus},
    "taro": credit.CREDIT
    | {
        (tgrpo, "TGRPOConfig"): TaroConfig,
        (credit, "add_credit"): add_credit_per_token,
        (credit, "credit_bonus"): above_mean_bonus,
    },
    "gdpo": {(tgrpo, "score"): gdpo_score, (training.Run, "micro_batches"): gdpo_micro_batches},
}


def main():
    parser = shared.parser(__doc__)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    args, settings = parser.parse_known_args()
    # tgrpo.py reads its settings from the command line
    sys.argv[1:] = settings
    for (where, name), replacement in VARIANTS[args.variant].items():
        setattr(where, name, replacement)
    tgrpo.main()


if __name__ == "__main__":
    main()
