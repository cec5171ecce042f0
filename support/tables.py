"""What the scripts print: tables, and means with their standard errors."""

import math


def table(header, rows):
    """An aligned Markdown table of strings and numbers: the first column is left-aligned, the others right-aligned.

    >>> print(table(["model", "n"], [["SFT", 7], ["T-GRPO", 120]]))
    | model  |   n |
    | ------ | --: |
    | SFT    |   7 |
    | T-GRPO | 120 |
    """
    lines = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    lines.insert(1, rule)
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def mean_and_se(values):
    """Mean and its standard error, with the unbiased variance; the error is 0 for one value.

    >>> mean_and_se([1.0, 2.0, 3.0, 2.0])
    (2.0, 0.408248290463863)
    """
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))
