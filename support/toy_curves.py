"""The picture of a run of toy.py: learning curves of both stages, and the test accuracies."""

import numpy as np
from matplotlib.figure import Figure

from support import figures, storage

COLUMNS = ("ordered", "shuffled", "reversed", "single", "blind", "conflict")


def draw(folder, results, models, headings):
    """Write learning_curves.png into the toy's folder: the loss of SFT, p and p̃ of T-GRPO, and the test accuracies.

    results: {model: {column: (accuracy from 0 to 1, standard error)}}; models and headings: their names in the picture.
    """
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.3, 1.8))
    figures.draw_curve(left, storage.read_jsonl(folder / "sft/metrics.jsonl"), "loss", "loss", "tab:gray")
    left.set(title="1. SFT", xlabel="step", ylabel="loss, nats per token", yscale="log")

    metrics = storage.read_jsonl(folder / "tgrpo/metrics.jsonl")
    figures.draw_curve(middle, metrics, "temporal/p", "p: frames in order", "tab:blue")
    figures.draw_curve(middle, metrics, "temporal/p_shuffled", "p̃: frames shuffled", "tab:orange")
    middle.set(title="2. T-GRPO, training videos", xlabel="step", ylabel="share of correct completions", ylim=(0, 1))
    middle.legend(loc="lower right", frameon=False)

    places = np.arange(len(COLUMNS))
    for shift, model, colour in ((-0.2, "sft", "tab:gray"), (0.2, "tgrpo", "tab:blue")):
        means, errors = zip(*(results[model][column] for column in COLUMNS))
        bars = right.bar(places + shift, means, 0.38, yerr=errors, label=models[model], color=colour, capsize=3)
        right.bar_label(bars, [f"{100 * mean:.0f}" for mean in means], padding=2)
    right.axhline(0.5, color="black", linestyle=":", linewidth=1, label="chance")
    labels = [headings[column].replace(" ", "\n", 1) for column in COLUMNS]
    right.set(title="3. test clips", xticks=places, xticklabels=labels, ylabel="accuracy")
    right.set(ylim=(0, 1.3), yticks=np.arange(0, 1.1, 0.2))
    right.legend(loc="upper center", ncols=3, frameon=False)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figures.save_figure(figure, folder / "learning_curves.png")
