"""Interactions of no use are reported before Spark starts, by every command that reads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marc_pipeline.bundles.run import evaluate, evaluate_and_promote, train_bundle
from marc_pipeline.deployment import Deployment, open_deployment
from marc_pipeline.errors import UserError
from marc_pipeline.layers.judge import judge_layers
from marc_pipeline.scheduler.tasks import identify_training_run
from marc_pipeline.spark import session
from rated_shop import DS, Shop, ratings

COMMANDS: dict[str, Callable[[Shop, Deployment], object]] = {
    "train": lambda _, deployment: train_bundle(deployment, ds=DS),
    "evaluate": lambda _, deployment: evaluate(deployment, ds=DS),
    "promote": lambda _, deployment: evaluate_and_promote(deployment, "any", ds=DS),
    "layers": lambda _, deployment: judge_layers(deployment, ds=DS),
    "identify task": lambda shop, _: identify_training_run(ds=DS, config=str(shop.config)),
}
BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "column": (lambda row: {k: row[k] for k in row if k != "timestamp"}, "names column 'timestamp', which .* does not"),
    "user": (lambda row: {**row, "user_id": "u"}, "are of one user, and at least 2 are needed"),
    "time": (lambda row: {**row, "timestamp": "1500000000"}, "have the same time, 2017-07-14"),
    "unit": (lambda row: {**row, "timestamp": row["timestamp"] + "000" * (row["user_id"] == "u1")}, "in milliseconds"),
    "rating": (lambda row: {**row, "rating": int(row["rating"]) / 2}, "none of the 3,000 interactions .* is a click"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD.keys())
def test_bad_interactions_are_reported_before_spark_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[[Shop, Deployment], object],
    spoil: Callable[[dict[str, Any]], dict[str, Any]],
    message: str,
) -> None:
    shop = Shop(tmp_path)
    shop.rated([spoil(row) for row in ratings()])

    def never(*_: object, **__: object) -> None:
        raise AssertionError("Spark was started")

    monkeypatch.setattr(session, "configured_session", never)
    with pytest.raises(UserError, match=message) as refused:
        command(shop, open_deployment(shop.settings()))
    assert "\n" not in str(refused.value)
