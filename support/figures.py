"""Curves of metrics, and pictures written whole or not at all."""

import io

import numpy as np

from support import storage


def smoothed(values, window=9):
    """Moving average over `window` steps; near the ends, over the values that exist.

    >>> smoothed([0, 3, 6], 3).tolist()
    [1.5, 3.0, 4.5]
    """
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def draw_curve(axis, rows, name, label=None, color=None):
    """Draw the metric `name` over the steps of `rows`, which count from 0. Rows without the metric are skipped."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if not points:
        return
    steps, values = np.array(points, dtype=float).T
    line = axis.plot(steps, smoothed(values), color=color, linewidth=2, label=label)[0]
    axis.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=1)
    axis.xaxis.get_major_locator().set_params(integer=True)


def save_figure(figure, path):
    """Write a PNG atomically. Raises UserError if it cannot be written."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    storage.write_atomic(path, picture.getvalue())
