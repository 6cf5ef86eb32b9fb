"""The training set: its id depends on all inputs, it is written once and completely, and its files are verified."""

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from folder_as_s3 import BUCKET, FolderAsS3
from marc_pipeline.bundles.stages import states_stage
from marc_pipeline.config import Settings
from marc_pipeline.deployment import Deployment, open_deployment
from marc_pipeline.errors import CorruptFile, UserError
from marc_pipeline.storage import Storage, join, s3
from marc_pipeline.training import interaction_rows
from marc_pipeline.training.training_set import (
    StatesFacts,
    TrainingIdentity,
    TrainingSet,
    identify_training,
    make_training_set,
    open_training_set,
    training_uri,
)
from rated_shop import _GENRES, DS, ITEMS, RATINGS, USERS, Shop, item, ratings

LAYERS, WIDTH = 2, 4
STORAGE = Storage()


class Backbone:
    """Replaces the pass over the backbone: numbered states, and a record of all calls."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: list[str], path: Path) -> StatesFacts:
        self.calls.append(texts)
        states = np.arange((LAYERS + 1) * len(texts) * WIDTH, dtype=np.float32)
        with path.open("wb") as file:
            np.save(file, states.reshape(LAYERS + 1, len(texts), WIDTH))
        return StatesFacts(layers=LAYERS, width=WIDTH, max_tokens=48, dtype="float32", device="cpu")


def identify(settings: Settings, ds: str = DS) -> TrainingIdentity:
    return identify_training(Deployment(settings, STORAGE), ds=ds)


def make(
    spark: Any, settings: Settings, backbone: Callable[[list[str], Path], StatesFacts] | None = None
) -> TrainingSet:
    found = identify(settings)
    return make_training_set(spark, settings, found, storage=STORAGE, write_states=backbone or Backbone())


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


# --- the id


CHANGES: dict[str, Callable[[Shop], Settings]] = {
    "template": lambda shop: shop.settings(catalogue={"template": "{title}"}),
    "id column": lambda shop: shop.settings(catalogue={"id_column": "title"}),
    "backbone": lambda shop: shop.settings(train={"backbone": "another/model"}),
    "pooling": lambda shop: shop.settings(train={"pooling": "last"}),
    "tokens": lambda shop: shop.settings(train={"max_tokens": 47}),
    "sample": lambda shop: shop.settings(train={"sample": 10}),
    "dtype": lambda shop: shop.settings(encode={"dtype": "bfloat16"}),
    "long texts": lambda shop: shop.settings(encode={"long_texts": "pool"}),
    "threshold of clicks": lambda shop: shop.settings(interactions={"positive_rating": 3.0}),
    "user texts": lambda shop: shop.settings(interactions={"user_text_column": "user_id"}),
    "feedback": lambda shop: shop.settings(interactions={"feedback": "positives"}),
    "weights of events": lambda shop: shop.settings(interactions={"event_weights": {"view": 1.0}}),
    "window": lambda shop: shop.settings(interactions={"days": 30}),
    "most rows": lambda shop: shop.settings(interactions={"max_rows": 99}),
    "unknown items": lambda shop: shop.settings(interactions={"max_unknown_fraction": 0.5}),
    "one more item": lambda shop: _with(shop, catalogue=[item(number) for number in range(ITEMS + 1)]),
    "another title": lambda shop: _with(shop, catalogue=[*map(item, range(ITEMS - 1)), {**item(149), "title": "New"}]),
    "one rating less": lambda shop: _with(shop, rated=ratings()[:-1]),
    "another rating": lambda shop: _with(shop, rated=[*ratings()[:-1], {**ratings()[-1], "rating": "3"}]),
}


def _with(shop: Shop, **rows: list[dict[str, Any]]) -> Settings:
    for name, content in rows.items():
        getattr(shop, name)(content)
    return shop.settings()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_all_inputs_of_states_and_rows_change_the_id(shop: Shop, change: Callable[[Shop], Settings]) -> None:
    before = identify(shop.settings()).training_id
    assert identify(change(shop)).training_id != before


def test_the_date_and_other_weights_in_the_backbones_folder_change_the_id(shop: Shop) -> None:
    shop.catalogue([item(number) for number in range(ITEMS)], ds="2026-11-21")
    assert identify(shop.settings(), "2026-11-21").training_id != identify(shop.settings()).training_id
    folder = shop.root / "backbone"
    folder.mkdir()
    settings = shop.settings(train={"backbone": str(folder)})
    found = set()
    for content in (b"weights", b"others!"):
        (folder / "model.safetensors").write_bytes(content)
        found.add(identify(settings).training_id)
    assert len(found) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"learning_rate": 0.5}},
        {"train": {"dim": 3, "layers": 1, "seed": 4, "regime": "tuned", "epochs": 9, "processes": 2}},
        {"interactions": {"history": 3}},
        {"encode": {"token_budget": 7, "threads": 3}},
        {"evaluate": {"seeds": 9}},
        {"audit": {"max_drift": 0.5}},
    ],
)
def test_settings_of_the_training_do_not_change_the_id(shop: Shop, changes: dict[str, dict[str, Any]]) -> None:
    assert identify(shop.settings(**changes)).training_id == identify(shop.settings()).training_id


def test_the_location_of_files_does_not_change_the_id(tmp_path: Path) -> None:
    shops = [Shop(tmp_path / name) for name in ("here", "there")]
    assert len({identify(shop.settings()).training_id for shop in shops}) == 1


def test_missing_inputs_are_reported_before_spark_starts(shop: Shop) -> None:
    with pytest.raises(UserError, match=r"no training set nobody under .*; make it with `marc train`"):
        open_training_set(STORAGE, shop.settings().work_uri, "nobody")
    with pytest.raises(UserError, match=r"interactions\.uri is not set; name Parquet or CSV files"):
        identify(shop.settings(interactions={"uri": None}))
    with pytest.raises(UserError, match=r"interactions\.uri: there is no file at .*nowhere\.csv"):
        identify(shop.settings(interactions={"uri": str(shop.root / "nowhere.csv")}))
    with pytest.raises(UserError, match="no catalogue for 2030-01-01"):
        identify(shop.settings(), "2030-01-01")


# --- the content


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, spark: Any) -> tuple[Shop, TrainingSet]:
    """A training set that tests only read."""
    shop = Shop(tmp_path_factory.mktemp("shop"))
    return shop, make(spark, shop.settings())


@pytest.mark.spark
def test_a_training_set_has_texts_interactions_split_card_and_states(made: tuple[Shop, TrainingSet]) -> None:
    shop, found = made
    rows = ratings()
    assert found.item_ids == [f"i{number:03d}" for number in range(ITEMS)]
    assert found.texts == ["{title}. {genres}".format(**item(number)) for number in range(ITEMS)]
    assert [found.item_ids[place] for place in found.interactions.items] == [row["item_id"] for row in rows]
    assert found.interactions.labels.tolist() == [float(row["rating"] == "5") for row in rows]
    numbers: dict[str, int] = {}
    assert found.interactions.users.tolist() == [numbers.setdefault(row["user_id"], len(numbers)) for row in rows]
    assert (found.interactions.times // 1_000_000).tolist() == [int(row["timestamp"]) for row in rows]
    split = found.split
    assert (split.train, split.validation, split.test) == (slice(0, 2400), slice(2400, 2700), slice(2700, RATINGS))

    card = found.card
    assert card.training_id == identify(shop.settings()).training_id == found.folder.name
    assert (card.items, card.users, card.interactions) == (ITEMS, USERS, RATINGS)
    assert card.clicks == Counter(row["rating"] for row in rows)["5"]
    assert (card.ds, card.template, card.backbone) == (
        DS,
        shop.settings().catalogue.rendering,
        shop.settings().train.backbone,
    )
    assert (card.layers, card.width, card.max_tokens, card.dtype) == (LAYERS, WIDTH, 48, "float32")
    assert {path.name for path in found.folder.iterdir()} == {"training_set.json", *card.files}
    assert {"states.npy", "items.parquet", "interactions.parquet"} <= card.files.keys()

    whole = np.load(found.folder / "states.npy")
    for layer in range(LAYERS + 1):
        states = found.states(layer)
        assert np.array_equal(states, whole[layer])
        states[:] = -1
    assert np.array_equal(np.load(found.folder / "states.npy"), whole), "states are copies"


@pytest.mark.spark
@pytest.mark.parametrize("large", [False, True])
def test_purchases_are_stored_with_weights_and_as_positives_only(
    shop: Shop, spark: Any, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """Large files are read by Spark, to the same rows."""
    kinds = {"2": "view", "5": "purchase"}
    shop.rated([{"event": kinds[row.pop("rating")], **row} for row in ratings()])
    if large:
        monkeypatch.setattr(interaction_rows, "DRIVER_BYTES", 0)
    found = make(spark, shop.settings(interactions={"event_column": "event"}))
    best: dict[tuple[str, str], float] = {}
    expected = []
    for row in ratings():
        weight = {"2": 0.1, "5": 1.0}[row["rating"]]
        if weight > best.get((row["user_id"], row["item_id"]), 0):
            best[row["user_id"], row["item_id"]] = weight
            expected.append((row["item_id"], float(np.float32(weight))))
    rows = found.interactions
    assert [(found.item_ids[i], w) for i, w in zip(rows.items, rows.weights.tolist(), strict=True)] == expected
    assert (rows.implicit, found.card.implicit) == (True, True)
    assert found.card.clicks == found.card.interactions == rows.labels.sum() == len(expected)
    assert found.split.train.stop == round(0.8 * len(expected)), "one label can be split"
    assert {path.name for path in found.folder.iterdir()} == {"training_set.json", *found.card.files}


@pytest.mark.spark
@pytest.mark.parametrize("sample", [2, 12, 10_000])
def test_unrated_items_are_sampled(shop: Shop, spark: Any, sample: int) -> None:
    settings = shop.settings(train={"sample": sample})
    backbone = Backbone()
    found = make(spark, settings, backbone)
    rated = {row["item_id"] for row in ratings()}
    assert rated <= set(found.item_ids)
    others = sorted(set(found.item_ids) - rated)
    everything = sorted({f"i{number:03d}" for number in range(ITEMS)} - rated)
    assert set(others) <= set(everything)
    assert len(others) == min(sample, len(everything))
    assert backbone.calls == [found.texts]
    assert found.item_ids == sorted(found.item_ids)


@pytest.mark.spark
def test_user_texts_follow_the_item_texts(shop: Shop, spark: Any) -> None:
    shop.rated([{**row, "about": _about(row["user_id"])} for row in ratings()])
    backbone = Backbone()
    settings = shop.settings(interactions={"user_text_column": "about"})
    found = make(spark, settings, backbone)
    again = open_training_set(STORAGE, settings.work_uri, found.card.training_id)
    profiles = again.interactions.profiles
    assert profiles is not None
    assert backbone.calls == [again.encoded_texts]
    assert again.encoded_texts == [*again.texts, *again.interactions.profile_texts]
    assert again.states(1).shape == (len(again.encoded_texts), WIDTH)
    told = ["" if place < 0 else again.interactions.profile_texts[place] for place in profiles.tolist()]
    assert told == [_about(row["user_id"]).strip() for row in ratings()]
    assert (found.card.items, len(found.texts)) == (ITEMS, ITEMS)
    assert np.array_equal(found.interactions.profiles, profiles)


def _about(user: str) -> str:
    """Text about a user; blank for every seventh user."""
    number = int(user[1:])
    return " " if number % 7 == 0 else f"likes {_GENRES[number % 5]}"


@pytest.mark.spark
def test_ratings_of_unknown_items_are_skipped_with_one_warning(
    shop: Shop, spark: Any, caplog: pytest.LogCaptureFixture
) -> None:
    known = ratings()
    unknown = [{**row, "item_id": f"gone-{number % 7}"} for number, row in enumerate(known[:250])]
    shop.rated(sorted(known + unknown, key=lambda row: int(row["timestamp"])))
    with caplog.at_level(logging.WARNING, logger="marc_pipeline"):
        found = make(spark, shop.settings())
    (warning,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "250 (7.69%) of the 3,250 rows" in warning
    assert "items that the catalogue lacks, for example 'gone-" in warning
    assert warning.endswith("skipped")
    assert (len(found.interactions), found.card.interactions) == (RATINGS, RATINGS)
    assert not [name for name in found.item_ids if name.startswith("gone")]


@pytest.mark.spark
def test_unusable_inputs_are_reported_before_the_long_pass(shop: Shop, spark: Any) -> None:
    known = ratings()
    backbone = Backbone()
    shop.rated([{**row, "item_id": "gone"} if number % 5 == 0 else row for number, row in enumerate(known)])
    with pytest.raises(UserError, match=r"600 \(20\.00%\) of the 3,000 rows.*max_unknown_fraction"):
        make(spark, shop.settings(), backbone)
    shop.rated([{**row, "rating": "5"} if number >= 2700 else row for number, row in enumerate(known)])
    with pytest.raises(UserError, match="leaves test with clicks only"):
        make(spark, shop.settings(), backbone)
    shop.catalogue([{"item_id": "", "title": "No id", "genres": "Dramas"}])
    with pytest.raises(UserError, match="has no usable row; `marc plan` reports the reasons"):
        make(spark, shop.settings(), backbone)
    assert backbone.calls == []


# --- written once, completely, and verified


@pytest.mark.spark
def test_an_existing_training_set_is_opened_without_another_pass(
    shop: Shop, spark: Any, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = Backbone()
    first = make(spark, shop.settings(), backbone)
    written = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    with caplog.at_level(logging.INFO, logger="marc_pipeline"):
        again = make(spark, shop.settings(train={"learning_rate": 0.5}), backbone)
    assert len(backbone.calls) == 1
    assert "exists already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir()} == written
    assert (again.card, again.item_ids, again.texts) == (first.card, first.item_ids, first.texts)
    for name in ("users", "items", "labels", "times", "weights"):
        assert np.array_equal(getattr(again.interactions, name), getattr(first.interactions, name))


@pytest.mark.spark
def test_a_failed_pass_leaves_no_training_set_and_can_be_repeated(shop: Shop, spark: Any) -> None:
    def fails(texts: list[str], path: Path) -> StatesFacts:
        path.write_bytes(b"half")
        raise OSError("disk full")

    settings = shop.settings()
    with pytest.raises(OSError, match="disk full"):
        make(spark, settings, fails)
    folder = Path(training_uri(settings.work_uri, identify(settings).training_id))
    assert list(folder.iterdir()) == []
    with pytest.raises(UserError, match="no training set"):
        open_training_set(STORAGE, settings.work_uri, folder.name)
    backbone = Backbone()
    make(spark, settings, backbone)
    assert len(backbone.calls) == 1


@pytest.fixture
def copied(made: tuple[Shop, TrainingSet], tmp_path: Path) -> tuple[str, Path]:
    """A work area that a test may damage, and the folder of its training set."""
    folder = made[1].folder
    copy = tmp_path / "work" / "training" / folder.name
    shutil.copytree(folder, copy)
    return str(tmp_path / "work"), copy


@pytest.mark.spark
@pytest.mark.parametrize("name", ["states.npy", "items.parquet", "interactions.parquet"])
def test_a_damaged_or_missing_file_is_reported_in_one_line(copied: tuple[str, Path], name: str) -> None:
    work, folder = copied
    path, whole = folder / name, (folder / name).read_bytes()
    for place in (0.0, 0.5, 1.0):
        data = bytearray(whole)
        data[int(place * (len(data) - 1))] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptFile) as refused:
            open_training_set(STORAGE, work, folder.name)
        message = str(refused.value)
        assert message.startswith(f"{path} does not match its SHA-256 ")
        assert message.endswith("train again")
        assert "\n" not in message
    path.write_bytes(whole[:-1])
    with pytest.raises(CorruptFile, match=rf"{name} does not match"):
        open_training_set(STORAGE, work, folder.name)
    path.unlink()
    with pytest.raises(CorruptFile, match=rf"{name} is missing"):
        open_training_set(STORAGE, work, folder.name)


@pytest.mark.spark
@pytest.mark.parametrize("name", ["states.npy", "items.parquet", "interactions.parquet", "profiles.parquet"])
def test_a_deleted_file_of_a_local_copy_is_downloaded_again(
    copied: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    remote = FolderAsS3(folder=str(tmp_path))
    first = open_training_set(remote, f"{BUCKET}work", copied[1].name)
    (first.folder / name).unlink()
    again = open_training_set(remote, f"{BUCKET}work", copied[1].name)
    assert (again.card, again.item_ids, again.texts) == (first.card, first.item_ids, first.texts)
    assert (again.folder / name).read_bytes() == (copied[1] / name).read_bytes()


@pytest.mark.spark
def test_an_unreadable_card_is_reported_in_one_line(copied: tuple[str, Path]) -> None:
    work, folder = copied
    for content in ("", "{", '{"training_id": "x"}', "[]"):
        (folder / "training_set.json").write_text(content)
        with pytest.raises(CorruptFile, match=r"training_set\.json cannot be read; delete the folder and train again"):
            open_training_set(STORAGE, work, folder.name)


@pytest.mark.spark
def test_a_local_training_set_opens_no_object_store(shop: Shop, spark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a client of S3 was opened")

    for name in ("boto3_s3", "arrow_s3"):
        monkeypatch.setattr(s3, name, never)
    assert len(make(spark, shop.settings()).item_ids) == ITEMS


@pytest.mark.spark
def test_inputs_that_changed_since_the_start_of_the_run_end_it(shop: Shop, spark: Any) -> None:
    announced = identify(shop.settings()).training_id
    shop.rated(ratings()[:-1])
    now = identify(shop.settings())
    with pytest.raises(UserError, match=f"changed during the training: {announced} is now"):
        states_stage(spark, open_deployment(shop.settings()), now, expected=announced)
    assert STORAGE.stat(join(training_uri(shop.settings().work_uri, now.training_id), "training_set.json")) is None
