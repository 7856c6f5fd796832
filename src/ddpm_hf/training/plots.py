"""curves.png: what metrics.jsonl holds, as curves over the optimizer steps."""

import math
from collections.abc import Sequence
from pathlib import Path

from ddpm_hf.evaluation.sheets import save_figure

LOSS, LOSS_BY_T = "training loss", "loss by quarter of t, not weighted"
ACCURACY, ACCURACY_BY_T = "accuracy", "accuracy by quarter of t"
BITS, HELD_OUT = "bits/dim of held-out images", "loss of averaged weights"
LOG_SNR = "log SNR of the learned schedule"
DISTANCE = "Fréchet distance of samples"
LOG_SNR_PLACES = (0, 25, 50, 75, 100)  # evenly spaced, per cent of the way from t = 0 to T - 1
FEW_POINTS = 20  # up to which each is marked
NEAREST, COLORS = "distance to the nearest image", "mean (line) and spread (dotted) of channels"


def plot_curves(rows: list[dict], channels: Sequence[str], path: Path) -> None:
    """Write a picture with a panel for each kind of value that some of the rows have.

    Args:
        rows: of metrics.jsonl, in the order of their steps.
        channels: names of the images' channels.

    Raises:
        OSError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    optional = {
        ACCURACY: "accuracy",
        ACCURACY_BY_T: "accuracy_t_quarter_1",
        BITS: "bits_per_dim",
        HELD_OUT: "loss_held_out",
        LOG_SNR: "log_snr_at_0",
        DISTANCE: "fd",
        NEAREST: "nearest_rms_samples",
        COLORS: f"samples_mean_{channels[0]}",
    }
    names = [LOSS, LOSS_BY_T, *(name for name, key in optional.items() if any(key in row for row in rows))]
    columns = 2 if len(names) == 4 else min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.5 * columns, 4 * lines), squeeze=False)
    # constrained layout would take twice as long
    edges = dict(left=0.21 / columns, bottom=0.12 / lines, right=0.99, top=1 - 0.115 / lines)
    figure.subplots_adjust(**edges, wspace=0.25, hspace=0.3)
    panels = dict(zip(names, axes.flat))
    for unused in axes.flat[len(names) :]:
        unused.remove()
    for name, key, error, style in _curves(channels):
        if name in panels:
            points = [row for row in rows if key in row]
            steps, values = _column(points, "step"), _column(points, key)
            if len(points) <= FEW_POINTS:  # a single one makes no line
                style = {"marker": "o", "markersize": 4, **style}
            panels[name].errorbar(steps, values, _column(points, error) if error else None, **style)
    if COLORS in panels:
        panels[COLORS].plot([], [], color="black", marker="o", label="samples")
        panels[COLORS].plot([], [], color="black", alpha=0.3, label="data")
    for name, panel in panels.items():
        panel.set(
            xlabel="optimizer step", ylabel=name, yscale="log" if name in (LOSS, LOSS_BY_T, DISTANCE) else "linear"
        )
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            # above the panel: within it points would be hidden, and to look for the best place takes seconds
            ncols = 3 if name == LOG_SNR else 2
            place = dict(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=ncols, borderaxespad=0.2)
            panel.legend(fontsize="small", frameon=False, **place)
    try:
        save_figure(figure, path)
    finally:
        plt.close(figure)


def _column(rows, key):
    return [math.nan if row.get(key) is None else row[key] for row in rows]


def _curves(channels):
    """(panel, key of the rows, key of their error or None, style) of every curve."""
    yield LOSS, "loss", None, {}
    for i in range(1, 5):
        yield LOSS_BY_T, f"loss_t_quarter_{i}", None, dict(label=f"t in quarter {i}")
        yield ACCURACY_BY_T, f"accuracy_t_quarter_{i}", None, dict(label=f"t in quarter {i}")
    yield ACCURACY, "accuracy", None, dict(label="training images, randomly cropped")
    yield ACCURACY, "accuracy_held_out", None, dict(label="held-out images", marker="o")
    yield BITS, "bits_per_dim", "bits_per_dim_standard_error", dict(label="mean and its standard error", capsize=2)
    yield HELD_OUT, "loss_train", None, dict(label="training images", marker="o")
    yield HELD_OUT, "loss_held_out", "loss_gap_standard_error", dict(label="held-out images", marker="o", capsize=2)
    for percent in LOG_SNR_PLACES:
        yield LOG_SNR, f"log_snr_at_{percent}", None, dict(label=f"t at {percent} %")
    yield DISTANCE, "fd", "fd_standard_error", dict(label="to training images, standard error", capsize=2)
    yield NEAREST, "nearest_rms_samples", None, dict(label="from samples", marker="o")
    yield NEAREST, "nearest_rms_data", None, dict(label="from training images to others", marker="o")
    for channel in channels:
        color = "black" if channel in ("grey", "alpha") else channel
        for statistic, line in (("mean", "-"), ("std", ":")):
            yield COLORS, f"samples_{statistic}_{channel}", None, dict(color=color, linestyle=line, marker="o")
            yield COLORS, f"data_{statistic}_{channel}", None, dict(color=color, linestyle=line, alpha=0.3)
