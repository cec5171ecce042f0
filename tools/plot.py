"""Learning curves of any run: the loss of SFT; reward, temporal gap, KL and completion length of T-GRPO.

    python -m tools.plot runs/toy/tgrpo/metrics.jsonl                              # writes metrics.png beside the file
    python -m tools.plot runs/a/metrics.jsonl runs/b/metrics.jsonl --out both.png  # several runs in one picture

A faint line shows the value of each step, a strong line the mean over nine steps.
"""

from itertools import chain
from pathlib import Path

from matplotlib.figure import Figure

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


def plot(files, out):
    """Draw the curves of these metrics files into the PNG `out`: one panel per metric, one colour per file."""
    runs = [shared.read_log(file, ["step"]) for file in files]
    names = set().union(*chain(*runs))
    if "reward/total" in names:
        # the loss of T-GRPO does not measure progress
        names.discard("loss")
    panels = [panel for panel in PANELS if panel[0] in names]
    if not panels:
        raise UserError(f"{files[0]}: none of {', '.join(name for name, _, _ in PANELS)} in this file")
    figure = Figure(figsize=(8, 2.8 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axis, (name, title, unit) in zip(axes, panels):
        for number, (file, rows) in enumerate(zip(files, runs)):
            draw_curve(axis, rows, name, label=str(Path(file).parent), color=f"C{number % 10}")
        axis.set(title=f"{title} ({name})", xlabel="step", ylabel=unit, yscale="log" if name == "loss" else "linear")
        # matplotlib would stretch the axis of a flat line over its rounding errors
        if axis.dataLim.height < 1e-9:
            axis.set_yticks([axis.dataLim.y0])
        axis.legend(frameon=False)
    save_figure(figure, out)


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
