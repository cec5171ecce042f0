"""What a step logs: metrics of its groups and micro-batches, and the completions themselves. See docs/metrics.md."""

import re
from collections import Counter
from itertools import chain

from accelerate.utils import gather_object
from tqdm import tqdm

# what tells the question of a record from all others
QUESTION = ("problem_id", "path", "problem", "solution", "start", "end")


class Means:
    """Weighted means of named numbers, over everything that was added on all ranks."""

    def __init__(self):
        self.sums = Counter()
        self.weights = Counter()

    def add(self, values, weight=1.0):
        for name, value in values.items():
            self.sums[name] += weight * value
            self.weights[name] += weight

    def reduce(self, accelerator):
        """{name: mean}. Collective; a name may be missing on some of the ranks."""
        sums = Counter()
        weights = Counter()
        mine = {name: float(value) for name, value in self.sums.items()}
        for rank_sums, rank_weights in gather_object([(mine, self.weights)]):
            sums.update(rank_sums)
            weights.update(rank_weights)
        return {name: sums[name] / weights[name] for name in sorted(sums) if weights[name]}


def mean(values):
    return values.double().mean().item()


def averages(per_completion):
    """{name: mean} of {name: (N,)}. The means stay on the GPU: to read them here would be to wait for it."""
    return {name: values_N.detach().double().mean() for name, values_N in per_completion.items()}


def of_groups(groups, cfg, eos, seconds):
    """Means with the metrics of a rank's scored groups. `eos`: end-of-turn tokens; `seconds`: how long they took."""
    means = Means()
    n_tokens = 0
    for group in groups:
        means.add(of_group(group, cfg, eos))
        n_tokens += sum(len(completion) for completion in group.completions + group.shuffled_completions)
    if groups:
        means.add({"rollout/tokens_per_s": n_tokens / seconds})
    return means


def of_group(group, cfg, eos):
    """{name: value} of one scored group."""
    rewards_G = sum(group.rewards.values())
    total_G = rewards_G + group.temporal_G if cfg.temporal_target == "reward" else rewards_G
    lengths = [len(completion) for completion in group.completions]
    problem_type = re.sub(r"[^\w-]", "_", group.sample.record["problem_type"])
    values = {f"reward/{name}": mean(values_G) for name, values_G in group.rewards.items()}
    if group.shuffled_texts:
        values["reward/temporal"] = mean(group.temporal_G)
        values |= gap(mean(group.correct_G), mean(group.correct_S), len(group.correct_G), len(group.correct_S))
    return values | {
        "reward/total": mean(total_G),
        f"accuracy/{problem_type}": values["reward/accuracy"],
        "group/zero_std": float((rewards_G == rewards_G[0]).all()),
        "temporal/advantage_change": mean((group.advantages_G - group.plain_advantages_G).abs()),
        "completion/length": sum(lengths) / len(lengths),
        "completion/truncated": sum(int(c[-1]) not in eos for c in group.completions) / len(lengths),
    }


def gap(p, p_shuffled, n_ordered, n_shuffled):
    """Metrics of the temporal gap p − p̃ of one group."""
    values = {
        "temporal/p": p,
        "temporal/p_shuffled": p_shuffled,
        "temporal/gap": p - p_shuffled,
        "temporal/order_helped": float(p > p_shuffled),
    }
    # one completion has no spread
    if n_ordered > 1 and n_shuffled > 1:
        variance = p * (1 - p) / (n_ordered - 1)
        values["temporal/gap_variance"] = variance + p_shuffled * (1 - p_shuffled) / (n_shuffled - 1)
    return values


def of_step(means, accelerator):
    """{name: mean} over all ranks. Collective."""
    values = means.reduce(accelerator)
    if "temporal/gap_variance" in values:
        # the standard error of one group's gap: the root of the mean variance
        values["temporal/gap_se"] = values.pop("temporal/gap_variance") ** 0.5
    return values


def write_rollouts(run, step, groups):
    """Write a step's completions to rollouts.jsonl, and print two of them, as often as the settings say. Collective."""
    if run.cfg.save_rollouts:
        rows = list(chain.from_iterable(rollout_rows(group) for group in groups))
        run.append("rollouts.jsonl", step, gather_object(rows))
    if run.cfg.print_every and step % run.cfg.print_every == 0 and run.accelerator.is_main_process and groups:
        print_rollouts(step, groups[0])


def rollout_rows(group):
    """A group's completions as rows of rollouts.jsonl: text, and for ordered ones every reward and the advantage."""
    sample = group.sample
    common_fields = {name: sample.record[name] for name in QUESTION if name in sample.record}
    numbers = dict(group.rewards)
    if group.shuffled_texts:
        numbers["temporal"] = group.temporal_G
    numbers["advantage"] = group.advantages_G
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
    tqdm.write(f"  in order (advantage {group.advantages_G[0]:+.2f}): {group.texts[0]}")
    if group.shuffled_texts:
        tqdm.write(f"  shuffled: {group.shuffled_texts[0]}")
