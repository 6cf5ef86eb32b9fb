"""The decision about layers as a text, which a run passes to its tasks."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_pipeline.bundles.choices import LayerDecision
from marc_pipeline.errors import UserError
from marc_schemas.bundle import Pooling
from marc_schemas.layers import Decision


@given(
    layers=st.none() | st.integers(0, 1000),
    pooling=st.sampled_from(get_args(Pooling)),
    decision=st.sampled_from(get_args(Decision)),
)
def test_a_decision_survives_writing_and_parsing(layers: int | None, pooling: Pooling, decision: Decision) -> None:
    decided = LayerDecision(layers, pooling, decision)
    assert LayerDecision.parse(str(decided)) == decided


@pytest.mark.parametrize(("text", "layers"), [("auto:mean:clicks", None), ("0:mean:clicks", 0), ("4:last:adopted", 4)])
def test_undecided_layers_are_written_as_auto(text: str, layers: int | None) -> None:
    decided = LayerDecision.parse(text)
    assert (decided.layers, str(decided)) == (layers, text)


@pytest.mark.parametrize(
    "text", ["", "4", "4:mean", "four:mean:clicks", "4:most:clicks", "4:mean:chance", "4:mean:all:x"]
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not LAYERS:POOLING:DECISION"):
        LayerDecision.parse(text)
