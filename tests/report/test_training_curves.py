"""The plot of a training: every recorded term is drawn, and short histories too."""

import math
from pathlib import Path

import pytest

from marc_pipeline.report.plots import BLUE, GREEN, PINK, RED
from marc_pipeline.report.training_curves import training_curves
from pages import is_drawn, picture, shows

CURVES = [
    {"epoch": 0.5 * k, "step": 40 * k, "loss": 0.7 / k, "click": 0.6 / k, "keep": 0.1 * k, "decouple": 0.3 / k,
     "validation_auc": 0.6 + 0.01 * k}
    for k in range(1, 9)
]  # fmt: skip
COLOURS = {"click": BLUE, "keep": GREEN, "decouple": PINK, "validation_auc": RED}


@pytest.mark.parametrize("missing", ["", *COLOURS])
def test_training_curves_show_every_term_that_was_recorded(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "curves.png"
    training_curves([{name: value for name, value in row.items() if name != missing} for row in CURVES], path)
    image = picture(path)
    assert is_drawn(image)
    assert image.shape[1] == 1800
    assert {name for name, colour in COLOURS.items() if shows(image, colour)} == COLOURS.keys() - {missing}


@pytest.mark.parametrize(
    "history", [CURVES[:1], [{"epoch": 1}], [{"epoch": 1, "loss": math.nan}], [*CURVES, {"epoch": 5}]]
)
def test_short_and_broken_histories_are_drawn(tmp_path: Path, history: list[dict[str, float]]) -> None:
    training_curves(history, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_an_empty_history_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training curves without a validation"):
        training_curves([], tmp_path / "curves.png")
