"""Splits and histories: parts are strictly later or of other users, and no row's history contains its future."""

import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from marc_pipeline.errors import UserError
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.time_split import Split, histories, split_by_time, split_by_user
from rating_files import make, refusal

LABELLED = make([(0, 0, row % 2, row) for row in range(100)])
drawn = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 1), st.integers(-4, 12)), max_size=40
).map(make)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.just(0), st.just(0), st.integers(0, 1), st.integers(0, 60)), min_size=1, max_size=80).map(
        make
    ),
    st.sampled_from([(0.8, 0.1), (0.5, 0.25), (0.34, 0.33), (0.1, 0.1)]),
)
def test_a_split_has_all_rows_in_three_parts_each_strictly_later(
    found: Interactions, shares: tuple[float, float]
) -> None:
    n, times = len(found), found.times.tolist()
    # By definition, a part starts at the first row of the time at which the share falls.
    firsts = [round(n * share) for share in (shares[0], sum(shares))]
    first, second = (times.index(times[row]) if row < n else n for row in firsts)
    parts = {"train": (0, first), "validation": (first, second), "test": (second, n)}
    bad = [name for name, (a, b) in parts.items() if len(set(found.labels[a:b].tolist())) < 2]
    if bad:
        with pytest.raises(UserError, match=f" leaves {bad[0]} with "):
            split_by_time(found, train=shares[0], validation=shares[1])
        return
    split = split_by_time(found, train=shares[0], validation=shares[1])
    assert {name: (rows.start, rows.stop) for name, rows in vars(split).items()} == parts
    assert times[first - 1] < times[first] <= times[second - 1] < times[second]


def test_shares_are_exact_without_ties_and_tied_rows_go_to_the_later_part() -> None:
    assert split_by_time(LABELLED) == Split(slice(0, 80), slice(80, 90), slice(90, 100))
    assert split_by_time(LABELLED, train=0.7, validation=0.1).validation == slice(70, 80)
    moments = [*range(75), *[75] * 10, *range(85, 100)]
    tied = make([(0, 0, row % 2, moment) for row, moment in enumerate(moments)])
    assert split_by_time(tied) == Split(slice(0, 75), slice(75, 90), slice(90, 100))


@pytest.mark.parametrize(
    ("times", "name"), [([5] * 10, "train"), ([*range(50), *[50] * 50], "validation"), ([], "train")]
)
def test_a_part_without_rows_is_refused(times: list[int], name: str) -> None:
    found = make([(0, 0, row % 2, moment) for row, moment in enumerate(times)])
    assert refusal(lambda: split_by_time(found)) == (
        f"the split of {len(found)} interactions by time leaves {name} with 0 rows; "
        "provide more interactions, or finer timestamps if many rows share one"
    )


@pytest.mark.parametrize(("start", "stop", "name"), [(0, 80, "train"), (80, 90, "validation"), (90, 100, "test")])
@pytest.mark.parametrize(("label", "kind"), [(1, "clicks only"), (0, "rows without a click only")])
def test_a_part_with_one_label_is_refused(start: int, stop: int, name: str, label: int, kind: str) -> None:
    found = make([(0, 0, label if start <= row < stop else row % 2, row) for row in range(100)])
    message = refusal(lambda: split_by_time(found))
    assert f"leaves {name} with {kind} ({stop - start} rows); provide more interactions, or set" in message
    assert "interactions.positive_rating" in message


@pytest.mark.parametrize(
    ("train", "validation"), [(0, 0.1), (0.8, 0), (0.8, 0.2), (1.5, 0.1), (0.8, -0.1), (float("nan"), 0.1)]
)
def test_invalid_shares_are_refused(train: float, validation: float) -> None:
    message = refusal(lambda: split_by_time(LABELLED, train=train, validation=validation))
    assert message.startswith(f"train {train:g} and validation {validation:g} are not valid shares of a split")


@settings(deadline=None)
@given(drawn, st.integers(3, 4), st.integers(0, 3))
def test_folds_have_distinct_users_and_all_rows(found: Interactions, folds: int, fold: int) -> None:
    assume(fold < folds)
    try:
        order, split = split_by_user(found, folds=folds, fold=fold)
    except UserError as error:
        assert "set train.layers" in str(error)  # noqa: PT017 - most draws have too few users
        return
    parts = [order[rows] for rows in vars(split).values()]
    assert sorted(order.tolist()) == list(range(len(found)))
    assert all((np.diff(part) > 0).all() for part in parts)  # each in the order of time
    users = [set(found.users[part].tolist()) for part in parts]
    assert not users[0] & users[1] | users[0] & users[2] | users[1] & users[2]
    assert all(set(found.labels[part].tolist()) == {0, 1} for part in parts)


def both_labels(users: int) -> Interactions:
    return make([(user, 1, label, 10 * user + label) for user in range(users) for label in (0, 1)])


def test_every_user_is_held_out_once() -> None:
    found = both_labels(23)
    tests, validations = [], []
    for fold in range(5):
        order, split = split_by_user(found, folds=5, fold=fold)
        tests.append(set(found.users[order[split.test]].tolist()))
        validations.append(set(found.users[order[split.validation]].tolist()))
    assert sorted(user for users in tests for user in users) == list(range(23))
    assert validations == [*tests[1:], tests[0]]
    assert {len(users) for users in tests} == {4, 5}


@pytest.mark.parametrize("users", [1, 4])
def test_fewer_users_than_folds_are_refused(users: int) -> None:
    message = refusal(lambda: split_by_user(both_labels(users), folds=5, fold=0))
    assert f"of {users} users in 5 groups" in message


# Histories


def naive_histories(found: Interactions, length: int, label: int) -> list[list[int]]:
    rows = list(zip(found.users, found.items, found.labels, found.times, strict=True))
    result = []
    for user, _, _, moment in rows:
        earlier = [int(i) for u, i, clicked, t in rows if u == user and clicked == label and t < moment]
        newest = earlier[::-1][:length]
        result.append(newest + [-1] * (length - len(newest)))
    return result


@settings(deadline=None, max_examples=300)
@given(drawn, st.integers(1, 8), st.integers(0, 1), st.integers(0, 40))
def test_a_history_follows_its_definition_and_does_not_depend_on_later_rows(
    found: Interactions, length: int, label: int, rows: int
) -> None:
    result = histories(found, length=length, label=label)
    assert (result.shape, result.dtype) == ((len(found), length), np.int32)
    assert result.tolist() == naive_histories(found, length, label)
    assert np.array_equal(result[:rows], histories(found.take(slice(0, rows)), length=length, label=label))


def test_a_history_is_newest_first_without_rows_of_its_own_time() -> None:
    found = make([(0, 7, 1, 10), (0, 8, 1, 20), (0, 9, 1, 20), (0, 5, 0, 25), (1, 6, 1, 26), (0, 4, 1, 30)])
    none, one, three = [-1, -1, -1], [7, -1, -1], [9, 8, 7]
    assert histories(found, length=3, label=1).tolist() == [none, one, one, three, none, three]
    assert histories(found, length=1, label=0).tolist() == [[-1], [-1], [-1], [-1], [-1], [5]]


def test_large_user_numbers_and_times_are_distinguished() -> None:
    big = 2**62
    found = make([(big // 2**32, 1, 1, -big), (big // 2**32 - 1, 2, 1, 0), (big // 2**32, 3, 1, big)])
    assert histories(found, length=2, label=1).tolist() == [[-1, -1], [-1, -1], [1, -1]]


def test_100_000_histories_take_less_than_a_second() -> None:
    random, n = np.random.default_rng(0), 100_000
    found = Interactions(
        users=random.integers(0, 500, n),
        items=random.integers(0, 9000, n),
        labels=random.integers(0, 2, n).astype(np.float32),
        times=np.sort(random.integers(0, 10**15, n)),
    )
    started = time.perf_counter()
    histories(found, length=10, label=1)
    assert time.perf_counter() - started < 1
