"""Controls of temporal credit: does it matter which completions get it, or only how much there is?

    accelerate launch -m experiments.controls --control shuffled --config configs/credit.yaml [settings of tgrpo.py]

Runs tgrpo.py with another bonus for the correct completions of a group:
    shuffled    the group's own bonuses, assigned to its correct completions in random order
    noise       Gaussian noise with the mean and the spread of the group's own bonuses
"""

import argparse
import sys

import torch

import tgrpo

credit_bonus = tgrpo.credit_bonus


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


CONTROLS = {"shuffled": shuffled_bonus, "noise": noise_bonus}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--control", choices=CONTROLS, required=True)
    args, settings = parser.parse_known_args()
    # tgrpo.py reads its settings from the command line
    sys.argv[1:] = settings
    tgrpo.credit_bonus = CONTROLS[args.control]
    tgrpo.main()


if __name__ == "__main__":
    main()
