"""Other ways of paying correct completions: two controls of temporal credit, and the rules of related work.

    accelerate launch -m experiments.variants --variant shuffled --config configs/credit.yaml [settings of tgrpo.py]

Each variant replaces functions of tgrpo.py:
    shuffled    the group's own bonuses, assigned to its correct completions in random order (control)
    noise       Gaussian noise with the mean and the spread of the group's own bonuses (control)
    relative    credit as a share of the group's largest, which does not grow with the length of the answers (ours)
    taro        TaRO's reward (arXiv 2606.09248): α for correct completions with a credit per token above their group's
                mean. TaRO itself shuffles only the frames near annotated boundaries, here the whole clip is shuffled.
    gdpo        GDPO: each reward is normalised alone, they are added, and the sum is normalised over the step
Temporal credit itself needs no variant: it is `temporal_rule: credit`.

The two controls say whether it matters which correct completion of a group gets the bonus. How much a group gets in all
remains that of credit; with one correct completion they are credit.
"""

import argparse
import sys

import torch

import tgrpo
from support import training
from tgrpo import add_credit, credit_bonus, group_advantages, score

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


def relative_bonus(credit_G, correct_G, alpha):
    """α max(0, c_i) / max(1, largest c_j of a correct completion): equal to credit if no credit exceeds 1 nat."""
    largest = (credit_G * correct_G).max().clamp(min=1)
    return alpha * (credit_G / largest).clamp(min=0) * correct_G


def above_mean_bonus(credit_G, correct_G, alpha):
    return alpha * (credit_G > credit_G.mean()) * correct_G


def add_credit_per_token(model, groups, cfg, pad_id):
    """Like tgrpo.add_credit, with the mean over the tokens of a completion instead of their sum."""
    add_credit(model, groups, cfg, pad_id)
    for group in groups:
        if group.credit_G is not None:
            group.credit_G /= torch.tensor([len(completion) for completion in group.completions])


def gdpo_score(group, cfg, eos):
    """Like tgrpo.score; the metrics of the advantages remain those of tgrpo.score."""
    metrics = score(group, cfg, eos)
    group.advantages_G = sum(group_advantages(rewards_G) for rewards_G in group.rewards.values())
    return metrics


def gdpo_micro_batches(run, groups, dummy):
    """Like Run.micro_batches, after the advantages of this rank's step were divided by their standard deviation.

    Their mean is 0 already. A second time, for another update, changes nothing: the deviation is 1 then.
    """
    if groups:
        std = torch.cat([group.advantages_G for group in groups]).std()
        for group in groups:
            group.advantages_G = group.advantages_G / (std + 1e-4)
    return micro_batches(run, groups, dummy)


# {variant: {(where, name): what takes its place}}
VARIANTS = {
    "shuffled": {(tgrpo, "credit_bonus"): shuffled_bonus},
    "noise": {(tgrpo, "credit_bonus"): noise_bonus},
    "relative": {(tgrpo, "credit_bonus"): relative_bonus},
    "taro": {(tgrpo, "credit_bonus"): above_mean_bonus, (tgrpo, "add_credit"): add_credit_per_token},
    "gdpo": {(tgrpo, "score"): gdpo_score, (training.Run, "micro_batches"): gdpo_micro_batches},
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    args, settings = parser.parse_known_args()
    # tgrpo.py reads its settings from the command line
    sys.argv[1:] = settings
    for (where, name), function in VARIANTS[args.variant].items():
        setattr(where, name, function)
    tgrpo.main()


if __name__ == "__main__":
    main()
