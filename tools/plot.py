"""Learning curves of any run: the loss of SFT; reward, temporal gap, KL and completion length of T-GRPO.

    python -m tools.plot runs/toy/tgrpo/metrics.jsonl                              # writes metrics.png beside the file
    python -m tools.plot runs/a/metrics.jsonl runs/b/metrics.jsonl --out both.png  # several runs in one picture

A faint line shows the value of each step, a strong line the mean over nine steps.
"""

import math
import os
from pathlib import Path

import numpy as np

from support.settings import UserError
from tools import shared

# (metric, title of its panel, label of its axis)
PANELS = (
    ("loss", "SFT loss", "nats per token"),
    ("reward/total", "reward", "mean over completions"),
    ("temporal/gap", "temporal gap", "p − p̃"),
    ("policy/kl", "KL to the SFT model", "nats per token"),
    ("completion/length", "completion length", "tokens"),
)
# steps in the moving average
WINDOW = 9


def smoothed(values, window=WINDOW):
    """Moving average over `window` values; near the ends, over the values that exist.

    >>> smoothed([0, 3, 6], 3).tolist()
    [1.5, 3.0, 4.5]
    """
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def draw_curve(axis, rows, name, label=None, color=None):
    """Draw the metric `name` over the steps of `rows` onto a matplotlib axis. Rows without the metric are skipped."""
    points = [(row["step"] + 1, row[name]) for row in rows if row.get(name) is not None]
    if not points:
        return
    steps, values = np.array(points, dtype=float).T
    line = axis.plot(steps, smoothed(values), color=color, linewidth=2, label=label)[0]
    axis.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=1)


def save_figure(figure, path):
    """Write a PNG atomically. Raises UserError if it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", dpi=130)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def metrics_in(rows):
    """Names of the metrics to draw. The loss of T-GRPO is left out: its value does not measure progress."""
    names = set().union(*rows)
    if "reward/total" in names:
        names.discard("loss")
    return names


def plot(files, out):
    """Draw the curves of these metrics files into the PNG `out`: one panel per metric, one colour per file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [shared.read_log(file, ["step"]) for file in files]
    known = set().union(*(metrics_in(rows) for rows in runs))
    panels = [panel for panel in PANELS if panel[0] in known]
    if not panels:
        raise UserError(f"{files[0]}: none of {', '.join(name for name, _, _ in PANELS)} in this file")
    n_columns = min(2, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    size = (5.5 * n_columns, 3.4 * n_rows)
    figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (name, title, unit) in zip(axes.flat, panels):
        for number, rows in enumerate(runs):
            if name in metrics_in(rows):
                draw_curve(axis, rows, name, color=f"C{number % 10}")
        axis.set(title=f"{title} ({name})", xlabel="step", ylabel=unit, yscale="log" if name == "loss" else "linear")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    names = [str(Path(file).parent) for file in files]
    handles = [plt.Line2D([], [], color=f"C{number % 10}", label=name) for number, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", frameon=False)
    save_figure(figure, out)
    plt.close(figure)


def main(argv=None):
    parser = shared.parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="metrics.jsonl")
    parser.add_argument("--out", help="picture to write; default: metrics.png beside the first file")
    args = parser.parse_args(argv)
    out = args.out or Path(args.files[0]).with_suffix(".png")
    plot(args.files, out)
    print(f"curves: {out}")


if __name__ == "__main__":
    main()
