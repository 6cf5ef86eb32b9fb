"""The plot of one training: the terms of the loss and the validation AUC by epoch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from marc_pipeline.report.plots import BLACK, BLUE, GREEN, MARKERS, PINK, RED, legend, panel_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TERMS = {
    "loss": ("loss", BLACK),
    "click": ("click (BCE)", BLUE),
    "keep": ("keep, nHSIC(h, z)", GREEN),
    "decouple": ("decouple, nHSIC(z, s)", PINK),
}


def training_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot the terms of the training loss by epoch, and the validation AUC on a second axis.

    Args:
        history: one row per validation: ``epoch``, which may be a fraction, and any of ``loss``, ``click``, ``keep``,
            ``decouple`` and ``validation_auc``; other keys are ignored.
        path: of the PNG file.

    Raises:
        ValueError: the history is empty.
    """
    if not history:
        raise ValueError("there are no training curves without a validation")
    figure, (left,) = panel_figure(height=4)
    for (name, (label, colour)), marker in zip(TERMS.items(), MARKERS, strict=False):
        _curve(left, history, name, label=label, colour=colour, marker=marker)
    left.set(xlabel="epoch", ylabel="training, mean since the last point")
    left.locator_params(axis="x", integer=True)
    if any("validation_auc" in row for row in history):
        right = left.twinx()
        right.spines["top"].set_visible(False)
        _curve(right, history, "validation_auc", label="validation AUC (right)", colour=RED, marker="D")
        right.set_ylabel("validation AUC", color=RED)
        right.tick_params(axis="y", colors=RED)
    legend(figure)
    save(figure, path)


def _curve(
    axes: "Axes", history: Sequence[Mapping[str, float]], name: str, *, label: str, colour: str, marker: str
) -> None:
    rows = [row for row in history if name in row]
    if rows:
        epochs, values = [row["epoch"] for row in rows], [row[name] for row in rows]
        axes.plot(epochs, values, label=label, color=colour, marker=marker, linewidth=1.6, markersize=4)
