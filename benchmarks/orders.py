"""Scores in each order of frames, and what they differ by: does a benchmark need the order of frames, or frames at all?

`ordered` shows the frames in order, `shuffled` in a random order, `reversed` backwards, `single` the middle frame only,
and `blind` no frame. The paired difference is over the questions that were asked in both orders.
"""

import math
from itertools import chain

from benchmarks.answers import benchmarks_in, frames_of, score_benchmark, scored_rows
from benchmarks.shared import ORDERS, percent
from support.tables import table

# 97.5 % quantile of the normal distribution
Z = 1.96


def rows_by_order(scored):
    """{order: its scored rows}, for the orders that were asked. Questions that could not be asked are in the first."""
    found = {frames_of(row) for row in scored if row["status"] != "unusable"} or {"ordered"}
    asked = {order: [] for order in ORDERS if order in found}
    first = next(iter(asked))
    for row in scored:
        asked[first if row["status"] == "unusable" else frames_of(row)].append(row)
    return asked


def summarise(rows):
    """Scores of every benchmark (answers.score_benchmark), in the first of ORDERS that was asked.

    `orders` has those in the others: {order: {"score", "se", "n", "by_task", "difference": from the first}}.
    Raises UserError for bad rows, with their numbers in `rows`.
    """
    scored = scored_rows(rows)
    summary = {}
    for name in benchmarks_in(scored):
        asked = rows_by_order([row for row in scored if row["benchmark"] == name])
        first, *others = asked
        part = score_benchmark(name, asked[first])
        part["frames"] = first
        part["orders"] = {}
        for order in others:
            scores = score_benchmark(name, asked[order])
            part["orders"][order] = {key: scores[key] for key in ("score", "se", "n", "by_task")}
            part["orders"][order]["difference"] = paired_difference(asked[order], asked[first])
        summary[name] = part
    return summary


def paired_difference(rows, other_rows):
    """Mean score of `rows` minus that of `other_rows`, in percent, with a 95 % interval; by task below.

    Over the questions that both have; see paired_rows. None without pairs.
    """
    # {task: [(difference, clip)]}
    pairs = {}
    for row in paired_rows(rows, other_rows):
        pair = (100 * row["result"][0], str(row.get("path") or row["id"]))
        pairs.setdefault(str(row.get("task")), []).append(pair)
    if not pairs:
        return None
    by_task = {task: clustered_mean(pairs[task]) for task in sorted(pairs)}
    return {**clustered_mean(list(chain.from_iterable(pairs.values()))), "by_task": by_task}


def paired_rows(rows, other_rows):
    """The rows of the questions that both have, with equal texts, clips and solutions; the score is the difference.

    Unscored questions are left out. Rows are of one benchmark, one per question.
    """
    others = questions(other_rows)
    pairs = []
    for row_id, row in questions(rows).items():
        other = others.get(row_id, {})
        if all(row.get(name) == other.get(name) for name in ("id", "problem", "path", "solution")):
            pairs.append({**row, "result": (row["result"][0] - other["result"][0], True)})
    return pairs


def questions(rows):
    """{id: row} of the scored questions."""
    return {str(row["id"]): row for row in rows if row["status"] == "scored"}


def clustered_mean(pairs):
    """Mean of paired differences with its 95 % interval, mean ± 1.96 standard errors, clustered by clip.

    pairs: (difference, clip) of each question. Questions on one clip are not independent, so their deviations are
    summed before they are squared. With few clips (fewer than 30) the interval is too narrow. `low` and `high` are None
    for a single clip.

    >>> clustered_mean([(1, "a"), (0, "a"), (1, "b"), (0, "b")])                 # both clips agree
    {'mean': 0.5, 'low': 0.5, 'high': 0.5, 'n': 4, 'clips': 2}
    """
    n = len(pairs)
    mean = sum(difference for difference, _ in pairs) / n
    deviations = {}
    for difference, clip in pairs:
        deviations[clip] = deviations.get(clip, 0.0) + difference - mean
    n_clips = len(deviations)
    low = high = None
    if n_clips > 1:
        variance = n_clips / (n_clips - 1) * sum(deviation**2 for deviation in deviations.values()) / n**2
        low = mean - Z * math.sqrt(variance)
        high = mean + Z * math.sqrt(variance)
    return {"mean": mean, "low": low, "high": high, "n": n, "clips": n_clips}


def print_orders(summary):
    """Print, by benchmark and task, the score in each order and what it differs from the first with a 95 % interval."""
    parts = {name: part for name, part in summary.items() if part["orders"]}
    others = [order for order in ORDERS if any(order in part["orders"] for part in parts.values())]
    rows = []
    for name, part in parts.items():
        rows.append(order_row(name, part, others))
        for task in part["by_task"]:
            rows.append(order_row(f"  {task}", part, others, task))
    if rows:
        first = next(iter(parts.values()))["frames"]
        print("\n" + table(["percent", first, *others], rows))
        print(
            f"in brackets: paired difference from {first}, and its 95 % interval (clustered by video; too narrow for "
            "fewer than 30 videos),\nover the questions asked in both orders (pictures are asked in order and blind "
            "only), so it need not equal the difference of the two columns"
        )


def order_row(label, part, others, task=None):
    """Scores as "48.4 (-48.8, -52.1 to -45.5)", of a benchmark or one of its tasks; empty for an order not asked."""
    cells = [label, percent(of_task(part, task).get("score"))]
    for order in others:
        scores = part["orders"].get(order)
        cell = percent(of_task(scores, task).get("score")) if scores else ""
        difference = of_task(scores["difference"], task) if scores else {}
        cells.append(f"{cell} ({interval_text(difference)})" if difference else cell)
    return cells


def of_task(scores, task):
    """The part of some scores, or of a difference, that is about one task; all of it if `task` is None."""
    if task is None or scores is None:
        return scores or {}
    return scores["by_task"].get(task, {})


def interval_text(difference):
    """A mean difference with its interval, as text; "–" for one clip or if all clips agree. Empty if it is None."""
    if not difference:
        return ""
    low, high = difference["low"], difference["high"]
    interval = "–" if low is None or high - low < 1e-6 else f"{low:+.1f} to {high:+.1f}"
    return f"{difference['mean']:+.1f}, {interval}"
