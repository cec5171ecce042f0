"""Learning curves of any run: the loss of SFT; reward, temporal gap, KL and completion length of T-GRPO.

    python -m tools.plot runs/toy/tgrpo/metrics.jsonl                              # writes metrics.png beside the file
    python -m tools.plot runs/a/metrics.jsonl runs/b/metrics.jsonl --out both.png  # several runs in one picture

A faint line shows the value of each step, a strong line the mean over nine steps.
"""

import math
from pathlib import Path

from support.figures import draw_curve, save_figure
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
