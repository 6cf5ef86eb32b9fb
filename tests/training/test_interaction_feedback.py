"""Feedback: which files are ratings and which are positives only, events with weights, and interactions of no use."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_pipeline.config import load_settings
from marc_pipeline.training.interactions import Interactions
from rating_files import GOOD, read, refusal, write

SORTED = GOOD | {"timestamp": [10, 20, 30, 40, 50]}
UNRATED = {name: values for name, values in SORTED.items() if name != "rating"}
BOTH = ("r.csv", "r.parquet")
IN_ONE_STEP = (
    "if every row is a purchase or a view, set interactions.feedback: positives, else correct "
    "interactions.positive_rating"
)


def rated(ratings: list[Any] | pa.Array) -> dict[str, Any]:
    return SORTED | {"rating": ratings}


POSITIVES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no rating": (UNRATED, {}),
    "another column is not the rating": (UNRATED | {"quantity": [1, 2, 1, 9, 1]}, {}),
    "a constant column": (rated([1] * 5), {}),
    "a constant column that is named": (UNRATED | {"quantity": [2] * 5}, {"rating_column": "quantity"}),
    "every boolean is true": (rated([True] * 5), {}),
    "every rating is a click": (rated([4, 5, 4.5, 5, 4]), {}),
    "asked for": (SORTED, {"feedback": "positives"}),
    "asked for, with bad ratings": (rated(["bad", "", "1", "2", "3"]), {"feedback": "positives"}),
}


@pytest.mark.parametrize(("columns", "keys"), POSITIVES.values(), ids=POSITIVES.keys())
def test_every_row_is_a_positive(
    tmp_path: Path, columns: dict[str, Any], keys: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    for name in BOTH:
        with caplog.at_level(logging.INFO):
            found = read(write(tmp_path / name, columns), **keys)
        assert "every row is a positive, and negatives are sampled" in caplog.text
        assert found.implicit
        assert found.labels.tolist() == found.weights.tolist() == [1] * 5
        taken = found.take(slice(1, 3))
        assert (taken.implicit, taken.weights.tolist(), taken.items.tolist()) == (
            True,
            [1, 1],
            found.items[1:3].tolist(),
        )


LABELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "stars": ([4, 3, 5, 0.5, 4], {}),
    "whole numbers": ([1, 0, 1, 0, 1], {}),
    "numbers with a point": ([1.0, 0.0, 1.0, 0.0, 1.0], {}),
    "booleans": ([True, False, True, False, True], {}),
    "booleans and a threshold that is no threshold": ([True, False, True, False, True], {"positive_rating": 0}),
    "yes and no": (["yes", "No", "Y", "n", "YES"], {}),
    "t and f": (["t", "f", " T", "F ", "t"], {}),
    "text of both": (["true", "0", "1", "false", "True"], {}),
    "digits as text": (["1", "0", "1", "0", "1"], {}),
    "decimals": (pa.array([1, 0, 1, 0, 1]).cast(pa.decimal128(20, 1)), {}),
    "asked for": ([1, 0, 1, 0, 1], {"feedback": "ratings"}),
}


@pytest.mark.parametrize(("ratings", "keys"), LABELS.values(), ids=LABELS.keys())
def test_labels_need_no_threshold(tmp_path: Path, ratings: Any, keys: dict[str, Any]) -> None:
    for name in BOTH[isinstance(ratings, pa.Array) :]:
        found = read(write(tmp_path / name, rated(ratings)), **keys)
        assert (found.labels.tolist(), found.implicit) == ([1, 0, 1, 0, 1], False)
        assert found.weights.tolist() == [1] * 5


def test_labels_are_told_over_all_files(tmp_path: Path) -> None:
    """In a file of stars with 0 and 1 only, 1 is no click; and one constant file beside others is a file of ratings."""
    write(tmp_path / "a.csv", rated([0, 1, 1, 0, 1]))
    assert read(tmp_path / "*.csv").labels.tolist() == [0, 1, 1, 0, 1]
    write(tmp_path / "b.csv", rated([5] * 5))
    assert read(tmp_path / "*.csv").labels.tolist() == [0, 1] * 5
    write(tmp_path / "b.csv", UNRATED)
    assert refusal(lambda: read(tmp_path / "*.csv")) == (
        f"{tmp_path}/a.csv has a column 'rating' and {tmp_path}/b.csv has none; add it, or set interactions.feedback: "
        "positives to count every row as a positive"
    )
    assert read(tmp_path / "*.csv", feedback="positives").implicit


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no click": (
        rated([1, 2, 3, 1, 1]),
        {},
        f"none of the 5 interactions at {{path}} is a click: column 'rating' has 1 to 3, and a click is 4 or more; "
        f"{IN_ONE_STEP}",
    ),
    "zeros": (
        rated([0] * 5),
        {},
        f"none of the 5 interactions at {{path}} is a click: column 'rating' has 0 only, and a click is 1 or more; "
        f"{IN_ONE_STEP}",
    ),
    "only clicks": (
        rated([4, 5, 5, 4, 4]),
        {"feedback": "ratings"},
        f"all of the 5 interactions at {{path}} are clicks: column 'rating' has 4 to 5, and a click is 4 or more; "
        f"{IN_ONE_STEP}",
    ),
    "one user": (
        SORTED | {"user_id": ["u"] * 5},
        {},
        "all 5 interactions at {path} are of one user, and at least 2 are needed; does interactions.user_column "
        "'user_id' name the users?",
    ),
    "one time": (
        SORTED | {"timestamp": [1_500_000_000] * 5},
        {},
        "all 5 interactions at {path} have the same time, 2017-07-14T02:40:00.000000, and a split by time needs "
        "several; does interactions.timestamp_column 'timestamp' name the times?",
    ),
    "two units": (
        SORTED | {"timestamp": [1_500_000_000, 1_500_000_001, 1_500_000_002_000, 3, 1_500_000_003_000]},
        {},
        "interactions.timestamp_column 'timestamp' has times in seconds (1500000000 in row 1 of {path}) and in "
        "milliseconds (1500000002000 in row 3 of {path}); write all times in one unit",
    ),
    "nothing left to sample": (
        UNRATED | {"user_id": list("uuuvv"), "item_id": list("abcab")},
        {"items": ["a", "b"], "max_unknown_fraction": 0.5},
        "every user of the interactions at {path} took all 2 items of the catalogue, so that no negative is left to "
        "sample; provide a larger catalogue, or ratings",
    ),
    "one user left": (
        UNRATED | {"user_id": list("uuuvv"), "item_id": list("abcxx")},
        {"max_unknown_fraction": 0.5},
        "all 3 interactions at {path} are of one user, and at least 2 are needed; does interactions.user_column "
        "'user_id' name the users?",
    ),
    "one label left": (
        rated([5, 5, 5, 1, 1]) | {"item_id": list("abaxx")},
        {"max_unknown_fraction": 0.5},
        "all of the 3 interactions at {path} with known items, within interactions.days and max_rows, are clicks; "
        "provide more ratings, or set interactions.feedback: positives",
    ),
    "unknown kinds": (
        SORTED | {"event": ["view", "Buy", "view", "Buy", "tap"]},
        {"event_column": "event"},
        "interactions.event_column 'event' has kinds without a weight (rows): 'Buy' (2), 'tap' (1); add "
        "them to interactions.event_weights, where 0 leaves a kind out",
    ),
    "no kind": (
        SORTED | {"event": ["view", "", "view", "view", "view"]},
        {"event_column": "event"},
        "interactions.event_column: column 'event' of {path} has no event in 1 of the first 5 rows, first in row 2; "
        "remove them",
    ),
    "all left out": (
        SORTED | {"event": ["view"] * 5},
        {"event_column": "event", "event_weights": {"view": 0, "buy": 1}},
        "all 5 interactions at {path} have events of weight 0; raise one in interactions.event_weights",
    ),
}


@pytest.mark.parametrize(("columns", "keys", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_interactions_of_no_use_get_one_clear_line(
    tmp_path: Path, columns: dict[str, Any], keys: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "r.csv", columns)
    assert refusal(lambda: read(path, **keys)) == message.format(path=path)


def test_two_units_are_refused_between_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", SORTED | {"timestamp": [1_600_000_000_000 + row for row in range(5)]})
    second = write(tmp_path / "b.csv", SORTED | {"timestamp": [1_500_000_000 + row for row in range(5)]})
    assert refusal(lambda: read(tmp_path / "*.csv")) == (
        "interactions.timestamp_column 'timestamp' has times in milliseconds (1600000000000 in row 1 of "
        f"{first}) and in seconds (1500000000 in row 1 of {second}); write all times in one unit"
    )


# Events


def test_events_have_weights_and_kinds_of_weight_0_are_left_out(tmp_path: Path) -> None:
    events = SORTED | {"event": ["view", "purchase", "cart", "purchase", " view "], "rating": ["bad"] * 5}
    for name in BOTH:
        path = write(tmp_path / name, events)
        found = read(path, event_column="event")
        assert found.weights.tolist() == np.array([0.1, 1, 0.3, 1, 0.1], np.float32).tolist()
        assert (found.implicit, found.labels.tolist()) == (True, [1] * 5)
        found = read(path, event_column="event", event_weights={"view": 0, "purchase": 2, "cart": 1.5})
        assert found.weights.tolist() == [2, 1.5, 2]
        assert (found.times // 1_000_000).tolist() == [20, 30, 40]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("event_weights: {view: -1}", "event_weights: a weight is a finite number of at least 0"),
        ("event_weights: {view: .inf}", "event_weights: a weight is a finite number of at least 0"),
        ("event_weights: {view: 0}", "event_weights: at least one kind of event needs a weight above 0"),
        ("event_column: e, rating_column: r", "with event_column every event is a positive: remove rating_column"),
        ("event_column: e, feedback: ratings", "with event_column every event is a positive: remove rating_column"),
    ],
)
def test_bad_settings_of_events_are_refused(tmp_path: Path, keys: str, message: str) -> None:
    path = tmp_path / "marc.yaml"
    path.write_text(f'catalogue: {{uri: "x.csv", template: "{{t}}"}}\ninteractions: {{{keys}}}\n')
    assert message in refusal(lambda: load_settings(path))


EVENTS = st.lists(
    st.tuples(
        st.sampled_from("uvw"), st.sampled_from("abc"), st.sampled_from(["view", "cart", "purchase"]), st.integers(0, 9)
    ),
    min_size=8,
    max_size=40,
)
WEIGHTS = {"view": 0.1, "cart": 0.3, "purchase": 1.0}


@given(EVENTS, st.booleans())
def test_a_repeat_is_left_out_by_its_definition_and_later_rows_do_not_matter(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str, int]], kinds: bool
) -> None:
    rows += [("x", "a", "view", 10), ("y", "b", "cart", 11)]
    columns = dict(zip(("user_id", "item_id", "event", "timestamp"), map(list, zip(*rows, strict=True)), strict=True))
    path = tmp_path_factory.mktemp("events") / "r.parquet"
    found = read(write(path, columns), items="abcd", **({"event_column": "event"} if kinds else {}))
    expected: list[tuple[str, float]] = []
    best: dict[tuple[str, str], float] = {}
    for user, item, kind, _ in sorted(rows, key=lambda row: row[3]):
        weight = WEIGHTS[kind] if kinds else 1.0
        if weight > best.get((user, item), 0):
            best[user, item] = weight
            expected.append((item, weight))
    assert [
        ("abcd"[item], float(np.float32(weight))) for item, weight in zip(found.items, found.weights, strict=True)
    ] == [(item, float(np.float32(weight))) for item, weight in expected]


def test_repeats_are_counted_in_the_log_and_ratings_are_all_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again = {"user_id": list("uvuvu"), "item_id": list("ababa"), "timestamp": [1, 2, 3, 4, 5]}
    with caplog.at_level(logging.INFO):
        assert len(read(write(tmp_path / "p.csv", again))) == 2
    assert "interactions: 3 repeats are left out: the user had the item before" in caplog.text
    assert len(read(write(tmp_path / "r.csv", again | {"rating": [5, 1, 5, 1, 1]}))) == 5


def test_weights_are_1_unless_given_and_one_per_row() -> None:
    users, times = np.zeros(2, np.int64), np.arange(2)
    made = Interactions(users, users, np.ones(2, np.float32), times)
    assert (made.weights.tolist(), made.weights.dtype, made.implicit) == ([1, 1], np.float32, False)
    with pytest.raises(ValueError, match="one weight per row"):
        Interactions(users, users, np.ones(2, np.float32), times, weights=np.ones(3, np.float32))
