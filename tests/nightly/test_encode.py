"""The encode stage of one bucket: what is computed, what is carried over, and what a retry does."""

import json
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from marc_pipeline.errors import CorruptFile
from marc_pipeline.model import encoder
from marc_pipeline.model.bundle import Bundle, save_bundle
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.model.tokens import token_ids
from marc_pipeline.nightly.encode import EncodeTask, encode_bucket, pending_tasks, tidy_quarantine
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage
from marc_pipeline.storage.checksums import check_file
from marc_pipeline.table.precision import round_mantissas
from marc_pipeline.table.write import write_bucket_file
from marc_pipeline.work_area import Workspace
from marc_schemas.bundle import BundleCard
from marc_schemas.catalogue import ITEMS, QUARANTINE, Change
from marc_schemas.feature_table import MANTISSA_BITS, file_schema
from marc_schemas.files import PublishedFile
from marc_schemas.identity import content_hash, row_id
from marc_schemas.plan import BucketPlan, Plan
from marc_schemas.receipt import Receipt
from tiny_models import CPU_FLOAT32, ONE_CORE, TEXTS, cosines, tiny_tokenizer, train_tiny_bundle

STORAGE = Storage()
DS, BASE_DS = "2026-11-21", "2026-11-20"
DIM = 8
BUCKET = 3
LONG_AGO = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
Item = tuple[str, str, Change]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return train_tiny_bundle(tmp_path_factory.mktemp("encode"), dim=DIM)


@dataclass
class Night:
    """One plan's work area beside a table, and what writes buckets into it."""

    folder: Path
    bundle: Bundle
    plan_id: str = "0123456789abcdef0123456789abcdef"
    mantissa_bits: int = MANTISSA_BITS

    @property
    def table(self) -> Path:
        return self.folder / "table"

    @property
    def workspace(self) -> Workspace:
        return Workspace(STORAGE, str(self.folder / "work"), self.plan_id)

    def base_file(
        self,
        texts: dict[str, str],
        *,
        bucket: int = BUCKET,
        seed: int = 0,
        bundle: str | None = None,
        mantissa_bits: int = MANTISSA_BITS,
    ) -> PublishedFile:
        """A file of the release before, with random vectors: a carried vector cannot be a computed one."""
        ids = sorted(texts)
        vectors = np.random.default_rng(seed).normal(size=(len(ids), DIM)).astype(np.float32)
        schema = file_schema(DIM)
        columns = {
            "item_id": ids,
            "row_id": [row_id(i) for i in ids],
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(vectors.reshape(-1)), type=schema.field("vector").type
            ),
            "content_hash": [content_hash(texts[i]) for i in ids],
            "bundle": [bundle or self.bundle.version] * len(ids),
            "encoded_at": [LONG_AGO + timedelta(microseconds=number) for number in range(len(ids))],
        }
        rows = pa.table(columns, schema=schema)
        written = write_bucket_file(
            STORAGE,
            str(self.table),
            [rows],
            dim=DIM,
            ds=BASE_DS,
            bucket=bucket,
            plan_id="base" * 8,
            footer={},
            mantissa_bits=mantissa_bits,
        )
        assert written is not None
        return written

    def work(
        self, items: Sequence[Item], *, bucket: int = BUCKET, previous: Sequence[PublishedFile] = ()
    ) -> BucketPlan:
        """Write the planned items of a bucket."""
        items = sorted(items)
        if items:
            path = Path(self.workspace.items_uri(bucket, None))
            path.parent.mkdir(parents=True, exist_ok=True)
            columns = [
                [i for i, _, _ in items],
                [row_id(i) for i, _, _ in items],
                [text for _, text, _ in items],
                [content_hash(text) for _, text, _ in items],
                [change.value for _, _, change in items],
            ]
            pq.write_table(pa.table(columns, schema=ITEMS), path)
        counts = {change: sum(found == change for _, _, found in items) for change in Change}
        return BucketPlan(
            bucket=bucket,
            items=len(items),
            new=counts[Change.NEW],
            changed=counts[Change.CHANGED],
            unchanged=counts[Change.UNCHANGED],
            deleted=0,
            tokens=0,
            previous=tuple(previous),
        )

    def plan(self, *work: BucketPlan) -> Plan:
        return Plan(
            plan_id=self.plan_id,
            ds=DS,
            created_at=datetime(2026, 11, 20, tzinfo=UTC),
            catalogue=(),
            bundle=self.bundle.version,
            bundle_uri=self.bundle.uri,
            dim=DIM,
            template="{title}",
            buckets=16,
            mantissa_bits=self.mantissa_bits,
            chosen=None,
            base_release=None,
            live_release=None,
            rows_read=0,
            quarantined={},
            work=work,
            tokens_exact=True,
            tokens_per_second=None,
        )

    def pending(self, *work: BucketPlan) -> list[EncodeTask]:
        return pending_tasks(self.workspace, self.plan(*work), table_uri=str(self.table), settings=CPU_FLOAT32)

    def run(self, work: BucketPlan) -> Receipt:
        (task,) = [task for task in self.pending(work) if task.work.bucket == work.bucket]
        return encode_bucket(task, ONE_CORE)

    def read(self, file: PublishedFile | None) -> pa.Table:
        """The rows of a file, by plain pyarrow."""
        assert file is not None
        return pq.ParquetFile(self.table / file.path).read()

    def direct(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors straight from the encoder, one text at a time."""
        encoder = load_encoder(STORAGE, self.bundle.uri, self.bundle.version, CPU_FLOAT32, ONE_CORE)
        return np.concatenate([encoder.encode([text]).vectors for text in texts])


@pytest.fixture
def night(tmp_path: Path, bundle: Bundle) -> Night:
    return Night(tmp_path, bundle)


def vectors(rows: pa.Table) -> NDArray[np.float32]:
    return np.array(rows["vector"].to_pylist(), dtype=np.float32)


def new(texts: Sequence[str], *, prefix: str = "item") -> list[Item]:
    return [(f"{prefix}-{number:03d}", text, Change.NEW) for number, text in enumerate(texts)]


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_bucket_of_new_items_holds_the_encoders_vectors_in_the_order_of_the_items(night: Night) -> None:
    started = datetime.now(UTC)
    items = new(TEXTS[:12][::-1])
    receipt = night.run(night.work(items))
    rows = night.read(receipt.file)
    assert rows.schema.remove_metadata() == file_schema(DIM)
    assert rows["item_id"].to_pylist() == sorted(i for i, _, _ in items)
    assert rows["row_id"].to_pylist() == [row_id(i) for i, _, _ in items]
    assert rows["content_hash"].to_pylist() == [content_hash(text) for _, text, _ in items]
    assert set(rows["bundle"].to_pylist()) == {night.bundle.version}
    assert cosines(vectors(rows), night.direct([text for _, text, _ in items])).min() >= 0.9999
    (encoded_at,) = set(rows["encoded_at"].to_pylist())
    assert started <= encoded_at <= datetime.now(UTC)


def test_the_receipt_tells_what_was_done(night: Night) -> None:
    texts = TEXTS[:12]
    receipt = night.run(night.work(new(texts)))
    assert (receipt.plan_id, receipt.bucket, receipt.bundle) == (night.plan_id, BUCKET, night.bundle.version)
    assert (receipt.encoded, receipt.reused) == (12, 0)
    assert receipt.tokens == sum(len(tiny_tokenizer("bert").encode(text).ids) for text in texts)
    assert receipt.padded_tokens >= receipt.tokens
    assert (receipt.device, receipt.dtype) == ("cpu", "float32")
    assert 0 < receipt.model_seconds <= receipt.seconds
    assert receipt.file is not None
    assert receipt.file.rows == 12
    assert receipt.file.path.startswith(f"ds={DS}/bucket={BUCKET}/")
    assert check_file(STORAGE, str(night.table), receipt.file) is None
    assert night.workspace.read_receipts(night.plan()) == {BUCKET: receipt}


def test_the_files_footer_says_which_model_made_it(night: Night) -> None:
    receipt = night.run(night.work(new(TEXTS[:2])))
    assert receipt.file is not None
    footer = pq.read_metadata(night.table / receipt.file.path).metadata
    card = night.bundle.card
    assert {key.decode(): value.decode() for key, value in footer.items() if key.startswith(b"marc.")} == {
        "marc.bundle": night.bundle.version,
        "marc.layer": str(card.layers_kept),
        "marc.dim": str(DIM),
        "marc.normalised": "true",
        "marc.template": card.template,
        "marc.plan_id": night.plan_id,
        "marc.mantissa_bits": "23",
        "marc.ds": DS,
        "marc.layout": "plain-pages",
    }


def test_the_file_lies_in_place_before_the_receipt_is_written(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def look_first(self: Workspace, receipt: Receipt, **named: Any) -> Receipt:
        assert receipt.file is not None
        found.append(check_file(STORAGE, str(night.table), receipt.file))
        return write(self, receipt, **named)

    write = Workspace.write_receipt
    monkeypatch.setattr(Workspace, "write_receipt", look_first)
    night.run(night.work(new(TEXTS[:2])))
    assert found == [None]


def test_a_worker_that_dies_while_writing_leaves_no_receipt(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    work = night.work(new(TEXTS[:2]))

    def dies(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("marc_pipeline.nightly.encode.write_bucket_file", dies)
    with pytest.raises(OSError, match="disk full"):
        night.run(work)
    assert night.workspace.read_receipts(night.plan(work)) == {}
    monkeypatch.undo()
    night.run(work)
    assert night.pending(work) == []


def test_unchanged_vectors_are_carried_over_bit_for_bit_with_the_time_they_were_encoded(night: Night) -> None:
    texts = {f"old-{number}": TEXTS[number] for number in range(10)}
    base = night.base_file(texts)
    # Two of the base are gone, two changed, three are new and lie between the old ones.
    items: list[Item] = [(i, text, Change.UNCHANGED) for i, text in texts.items() if i[-1] in "012345"]
    items += [("old-6", "another text", Change.CHANGED), ("old-7", "yet another", Change.CHANGED)]
    items += [("aaa", TEXTS[20], Change.NEW), ("old-3b", TEXTS[21], Change.NEW), ("zzz", TEXTS[22], Change.NEW)]
    receipt = night.run(night.work(items, previous=[base]))
    assert (receipt.encoded, receipt.reused) == (5, 6)
    rows, before = night.read(receipt.file), night.read(base)
    old = {row["item_id"]: row for row in before.to_pylist()}
    assert rows["item_id"].to_pylist() == sorted(i for i, _, _ in items)
    for row, (_, text, change) in zip(rows.to_pylist(), sorted(items), strict=True):
        assert row["content_hash"] == content_hash(text)
        if change == Change.UNCHANGED:
            assert (
                np.array(row["vector"], np.float32).tobytes()
                == np.array(old[row["item_id"]]["vector"], np.float32).tobytes()
            )
            assert row["encoded_at"] == old[row["item_id"]]["encoded_at"]
        else:
            assert row["encoded_at"] > LONG_AGO + timedelta(days=1)
            assert np.linalg.norm(row["vector"]) == pytest.approx(1, abs=1e-5)
    fresh = [text for _, text, change in sorted(items) if change != Change.UNCHANGED]
    is_fresh = np.array([change != Change.UNCHANGED for _, _, change in sorted(items)])
    assert cosines(vectors(rows)[is_fresh], night.direct(fresh)).min() >= 0.9999


def test_a_bucket_without_any_change_is_carried_over_whole_and_loads_no_model(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = {f"old-{number}": TEXTS[number] for number in range(10)}
    base = night.base_file(texts)
    monkeypatch.setattr(encoder, "load_encoder", None)
    receipt = night.run(night.work([(i, text, Change.UNCHANGED) for i, text in texts.items()], previous=[base]))
    assert night.read(receipt.file).equals(night.read(base))
    assert (receipt.encoded, receipt.reused, receipt.tokens, receipt.padded_tokens) == (0, 10, 0, 0)
    assert (receipt.device, receipt.model_seconds) == ("none", 0)


@pytest.mark.parametrize("before", [10, 12, MANTISSA_BITS])
def test_computed_and_carried_vectors_are_stored_with_the_plans_precision(
    tmp_path: Path, bundle: Bundle, before: int
) -> None:
    night = Night(tmp_path, bundle, mantissa_bits=10)
    texts = {f"old-{number}": TEXTS[number] for number in range(8)}
    base = night.base_file(texts, mantissa_bits=before)
    items: list[Item] = [(i, text, Change.UNCHANGED) for i, text in texts.items()]
    items += [(f"new-{number}", text, Change.NEW) for number, text in enumerate(TEXTS[10:20])]
    receipt = night.run(night.work(items, previous=[base]))
    assert (receipt.encoded, receipt.reused) == (10, 8)
    found = vectors(night.read(receipt.file))
    assert np.array_equal(found, round_mantissas(found, 10))
    assert np.array_equal(found[10:], round_mantissas(vectors(night.read(base)), 10))
    direct = night.direct(TEXTS[10:20])
    np.testing.assert_allclose(found[:10], direct, rtol=2**-11 + 1e-3, atol=1e-6)
    assert not np.array_equal(direct, round_mantissas(direct, 10))
    assert receipt.file is not None
    assert pq.read_metadata(night.table / receipt.file.path).metadata[b"marc.mantissa_bits"] == b"10"


def test_vectors_are_carried_over_from_several_files_when_the_number_of_buckets_changed(night: Night) -> None:
    files = [
        night.base_file({f"{side}-{number}": TEXTS[number] for number in range(5)}, bucket=bucket, seed=bucket)
        for side, bucket in (("left", 3), ("right", 11))
    ]
    items: list[Item] = [
        ("left-1", TEXTS[1], Change.UNCHANGED),
        ("right-4", TEXTS[4], Change.UNCHANGED),
        ("x", TEXTS[9], Change.NEW),
    ]
    rows = night.read(night.run(night.work(items, previous=files)).file)
    left, right = (night.read(file) for file in files)
    assert rows["vector"][:2].to_pylist() == [left["vector"][1].as_py(), right["vector"][4].as_py()]
    assert rows["encoded_at"][:2].to_pylist() == [left["encoded_at"][1].as_py(), right["encoded_at"][4].as_py()]


def test_identical_texts_share_a_vector_and_count_once(night: Night) -> None:
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[2]]
    receipt = night.run(night.work(new(texts)))
    found = vectors(night.read(receipt.file))
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[0], found[3])
    assert np.array_equal(found[1], found[4])
    assert len(np.unique(found, axis=0)) == 3
    assert cosines(found, night.direct(texts)).min() >= 0.9999
    assert (receipt.encoded, receipt.reused) == (3, 3)
    assert receipt.tokens == sum(len(tiny_tokenizer("bert").encode(text).ids) for text in TEXTS[:3])


def test_a_new_item_with_the_text_of_an_unchanged_one_is_encoded(night: Night) -> None:
    base = night.base_file({"old": TEXTS[0]})
    receipt = night.run(night.work([("old", TEXTS[0], Change.UNCHANGED), *new(TEXTS[:1])], previous=[base]))
    rows = night.read(receipt.file)
    assert rows["item_id"].to_pylist() == ["item-000", "old"]
    assert cosines(vectors(rows)[:1], night.direct(TEXTS[:1])).min() >= 0.9999
    assert vectors(rows)[1].tobytes() == vectors(night.read(base))[0].tobytes()


def test_a_bucket_that_became_empty_has_a_receipt_and_no_file(night: Night) -> None:
    work = night.work([], previous=[night.base_file({"gone": TEXTS[0]})])
    receipt = night.run(work)
    assert receipt.file is None
    assert (receipt.encoded, receipt.reused, receipt.tokens) == (0, 0, 0)
    assert not (night.table / f"ds={DS}").exists()
    assert night.pending(work) == []


def test_a_retry_does_only_what_is_missing(night: Night) -> None:
    first, second = (night.work(new(TEXTS[n : n + 3], prefix=f"b{n}"), bucket=n) for n in (1, 2))
    assert [task.work for task in night.pending(first, second)] == [first, second]
    receipt = night.run(first)
    assert [task.work for task in night.pending(first, second)] == [second]
    night.run(second)
    assert night.pending(first, second) == []
    assert night.workspace.read_receipts(night.plan(first, second))[1] == receipt


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_bucket_whose_file_was_damaged_is_pending_again(night: Night, damage: str) -> None:
    work, other = night.work(new(TEXTS[:4])), night.work(new(TEXTS[:4]), bucket=7)
    receipt = night.run(work)
    night.run(other)
    assert receipt.file is not None
    path = night.table / receipt.file.path
    if damage == "flip":
        flip_a_byte(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    assert [task.work for task in night.pending(work, other)] == [work]
    again = night.run(work)
    assert night.pending(work, other) == []
    assert cosines(vectors(night.read(again.file)), night.direct(TEXTS[:4])).min() >= 0.9999


def test_encoding_a_bucket_again_never_touches_the_file_that_a_receipt_trusts(night: Night) -> None:
    work = night.work(new(TEXTS[:3]))
    (task,) = night.pending(work)
    first = encode_bucket(task, ONE_CORE)
    assert first.file is not None
    before = (night.table / first.file.path).read_bytes()
    second = encode_bucket(task, ONE_CORE)
    assert (night.table / first.file.path).read_bytes() == before
    drop = ["encoded_at"]
    assert night.read(first.file).drop_columns(drop).equals(night.read(second.file).drop_columns(drop))


def test_a_receipt_of_another_plan_or_bundle_does_not_count(night: Night) -> None:
    work = night.work(new(TEXTS[:2]))
    receipt = night.run(work)
    for change in ({"plan_id": "f" * 32}, {"bundle": "f" * 16}):
        night.workspace.write_receipt(receipt.model_copy(update=change))
        assert [task.work for task in night.pending(work)] == [work]
    night.workspace.write_receipt(receipt)
    assert night.pending(work) == []


def wrong_base(night: Night, wrong: str) -> PublishedFile:
    """A file of the base release that cannot give the vector of the item "old" with the first text."""
    base = night.base_file(
        {"someone else" if wrong == "item" else "old": "another text" if wrong == "text" else TEXTS[0]},
        bundle="f" * 16 if wrong == "bundle" else None,
    )
    if wrong == "damaged":
        flip_a_byte(night.table / base.path)
    if wrong == "missing":
        (night.table / base.path).unlink()
    return base


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("damaged", "part-base"),
        ("missing", "is missing"),
        ("text", "does not hold the vectors"),
        ("bundle", "does not hold the vectors"),
        ("item", "does not hold the vectors"),
    ],
)
def test_what_the_base_no_longer_gives_is_encoded(
    night: Night, wrong: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    previous = [wrong_base(night, wrong)]
    work = night.work([("old", TEXTS[0], Change.UNCHANGED), *new(TEXTS[1:2])], previous=previous)
    receipt = night.run(work)
    assert (receipt.encoded, receipt.reused) == (2, 0)
    assert f"bucket {work.bucket} is encoded whole: " in caplog.text
    assert said in caplog.text
    assert night.pending(work) == []
    shutil.rmtree(Path(night.workspace.uri) / "receipts")
    plain = night.run(night.work([("old", TEXTS[0], Change.NEW), *new(TEXTS[1:2])]))
    assert receipt.file is not None
    assert plain.file is not None
    found, expected = (night.read(file).select(["item_id", "vector"]) for file in (receipt.file, plain.file))
    assert found.equals(expected)


@pytest.mark.parametrize("change", [Change.NEW, Change.UNCHANGED])
def test_a_receipt_of_an_earlier_making_of_the_plan_counts_where_nothing_is_carried_over(
    night: Night, change: Change
) -> None:
    base = night.base_file({"old": TEXTS[0]})
    work = night.work([("old", TEXTS[0], change), *new(TEXTS[1:2])], previous=[base])
    receipt = night.run(work)
    assert night.pending(work) == []
    earlier = night.plan(work).created_at - timedelta(seconds=1)
    night.workspace.write_receipt(receipt.model_copy(update={"finished_at": earlier}))
    assert [task.work for task in night.pending(work)] == ([] if change == Change.NEW else [work])


def test_of_two_workers_of_one_bucket_the_first_ones_receipt_stands(night: Night) -> None:
    work = night.work(new(TEXTS[:2]))
    (task,) = night.pending(work)
    first = encode_bucket(task, ONE_CORE)
    assert encode_bucket(task, ONE_CORE) == first == night.workspace.read_receipts(night.plan(work))[work.bucket]
    assert first.file is not None
    flip_a_byte(night.table / first.file.path)
    second = encode_bucket(task, ONE_CORE)
    assert second != first
    assert night.workspace.read_receipts(night.plan(work))[work.bucket] == second


def test_a_damaged_bundle_encodes_nothing(night: Night, tmp_path: Path) -> None:
    def write(folder: Path) -> BundleCard:
        for name in night.bundle.card.files:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes((Path(night.bundle.uri) / name).read_bytes())
        return night.bundle.card

    copied = Night(tmp_path / "copied", save_bundle(STORAGE, str(tmp_path / "bundles"), write))
    flip_a_byte(Path(copied.bundle.uri) / "compressor.safetensors")
    work = copied.work(new(TEXTS[:2]))
    with pytest.raises(CorruptFile, match=r"compressor\.safetensors"):
        copied.run(work)
    assert len(copied.pending(work)) == 1


def test_the_gpu_that_the_scheduler_assigned_reaches_the_encoder(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[TaskResources] = []

    def load(*arguments: Any) -> encoder.Encoder:
        handed.append(arguments[-1])
        return load_encoder(*arguments)

    monkeypatch.setattr(encoder, "load_encoder", load)
    (task,) = night.pending(night.work(new(TEXTS[:2])))
    encode_bucket(task, TaskResources(cpus=1, gpu="5"))
    assert handed == [TaskResources(cpus=1, gpu="5")]


@pytest.fixture(params=[(1, 8), (3, 5), (100, 7), (8192, 65_536)], ids=str)
def windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Texts and items after which a window ends; row groups are as small."""
    texts, rows = request.param
    monkeypatch.setattr("marc_pipeline.nightly.encode.WINDOW_TEXTS", texts)
    monkeypatch.setattr("marc_pipeline.nightly.encode.WINDOW_ROWS", rows)
    monkeypatch.setattr("marc_pipeline.nightly.encode.BATCH_ROWS", 2)
    monkeypatch.setattr("marc_pipeline.table.write.ROW_GROUP_ROWS", 2)
    return texts, rows


@pytest.mark.usefixtures("windows")
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), count=st.integers(1, 40))
def test_a_bucket_is_the_same_however_it_is_cut_into_windows(bundle: Bundle, seed: int, count: int) -> None:
    draw = random.Random(seed)  # noqa: S311 - no secret
    with tempfile.TemporaryDirectory() as folder:
        night = Night(Path(folder), bundle)
        # Few texts for many items: the same one comes again in other windows.
        texts = {f"item-{number:03d}": draw.choice(TEXTS[:9]) for number in range(count)}
        old = {item: text for item, text in texts.items() if draw.random() < 0.5}
        # Names between those of the day, which the day no longer has.
        gone = {f"item-{number:03d}x": TEXTS[10] for number in range(0, count, 3)}
        base = night.base_file(old | gone, seed=seed)
        items = [(i, text, Change.UNCHANGED if i in old else Change.NEW) for i, text in texts.items()]
        receipt = night.run(night.work(items, previous=[base]))
        rows = night.read(receipt.file)
        assert rows["item_id"].to_pylist() == sorted(texts)
        assert receipt.encoded == len({text for i, text in texts.items() if i not in old})
        assert receipt.reused == count - receipt.encoded
        before = {row["item_id"]: row for row in night.read(base).to_pylist()}
        for row in rows.to_pylist():
            if row["item_id"] in old:
                assert row == before[row["item_id"]]
        fresh = [i for i in sorted(texts) if i not in old]
        if fresh:
            found = vectors(rows.filter(pc.is_in(rows["item_id"], pa.array(fresh))))
            assert cosines(found, night.direct([texts[i] for i in fresh])).min() >= 0.9999


@pytest.mark.usefixtures("windows")
def test_a_text_that_cannot_be_encoded_is_quarantined_wherever_it_comes(
    night: Night, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if "poison 🎬" in texts:
            raise ValueError("no token for this")
        return token_ids(tokenizer, texts)

    monkeypatch.setattr(encoder, "token_ids", fails)
    items = new([*TEXTS[:5], "poison 🎬", *TEXTS[5:9], "poison 🎬", TEXTS[0]])
    items[5] = (items[5][0], items[5][1], Change.CHANGED)
    receipt = night.run(night.work(items))
    assert receipt.quarantined == {"item-005": Change.CHANGED, "item-010": Change.NEW}
    assert (receipt.encoded, receipt.reused) == (9, 1)
    rows = night.read(receipt.file)
    assert rows["item_id"].to_pylist() == [i for i, _, _ in items if i not in receipt.quarantined]
    texts = [text for i, text, _ in items if i not in receipt.quarantined]
    assert cosines(vectors(rows), night.direct(texts)).min() >= 0.9999
    (path,) = Path(night.workspace.quarantine_uri).iterdir()
    assert path.name == receipt.quarantine
    quarantined = pq.ParquetFile(path).read()
    assert quarantined.schema == QUARANTINE
    assert [row["item_id"] for row in quarantined.to_pylist()] == list(receipt.quarantined)
    for row in quarantined.to_pylist():
        assert row["reason"] == "unencodable"
        kept = json.loads(row["row"])
        assert kept["text"] == "poison 🎬"
        assert "ValueError: no token for this" in kept["error"]
        assert row["source"]
    assert "2 texts cannot be encoded" in caplog.text


def test_a_bucket_of_which_nothing_can_be_encoded_has_no_file(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if set(texts) & set(TEXTS[:3]):
            raise ValueError("no token for this")
        return token_ids(tokenizer, texts)

    monkeypatch.setattr(encoder, "token_ids", fails)
    receipt = night.run(night.work(new(TEXTS[:3])))
    assert receipt.file is None
    assert len(receipt.quarantined) == 3
    assert [path for path in night.table.rglob("*") if path.is_file()] == []
    assert night.pending(night.work(new(TEXTS[:3]))) == []


@pytest.mark.usefixtures("windows")
def test_damage_that_shows_late_is_encoded_too_and_leaves_no_half_file(night: Night) -> None:
    old = {f"item-{number:03d}": TEXTS[number] for number in range(40)}
    base = night.base_file(old)
    path = night.table / base.path
    data = bytearray(path.read_bytes())
    last = pq.ParquetFile(path).metadata.row_group(pq.ParquetFile(path).num_row_groups - 1)
    data[last.column(2).data_page_offset + last.column(2).total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    items = [(i, text, Change.UNCHANGED) for i, text in old.items()]
    receipt = night.run(night.work([*items, *new(TEXTS[40:42], prefix="new")], previous=[base]))
    assert (receipt.encoded, receipt.reused) == (42, 0)
    rows = night.read(receipt.file)
    texts = {**old, **{i: text for i, text, _ in new(TEXTS[40:42], prefix="new")}}
    assert cosines(vectors(rows), night.direct([texts[i] for i in sorted(texts)])).min() >= 0.9999
    files = [file.name for file in night.table.rglob("*") if file.is_file()]
    assert len(files) == 2, "the base's file and the bucket's"


def test_progress_is_told_while_a_bucket_is_under_way(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marc_pipeline.nightly.encode.PROGRESS_SECONDS", 0)
    monkeypatch.setattr("marc_pipeline.nightly.encode.WINDOW_TEXTS", 4)
    monkeypatch.setattr("marc_pipeline.nightly.encode.BATCH_ROWS", 4)
    told: list[int] = []
    write = Workspace.write_progress
    monkeypatch.setattr(Workspace, "write_progress", lambda *given: (told.append(given[2]), write(*given)))
    receipt = night.run(night.work(new(TEXTS[:12])))
    assert len(told) == 3
    assert told == sorted(set(told))
    assert told[-1] == receipt.tokens
    assert night.workspace.read_progress() == {}, "a receipt tells the rest"
    write(night.workspace, BUCKET, 7)
    assert night.workspace.read_progress() == {BUCKET: 7}
    night.workspace.clear_progress(night.workspace.read_progress())
    assert night.workspace.read_progress() == {}


def test_progress_that_cannot_be_told_costs_nothing(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("the store is away")

    monkeypatch.setattr("marc_pipeline.nightly.encode.PROGRESS_SECONDS", 0)
    monkeypatch.setattr(Workspace, "write_progress", fails)
    monkeypatch.setattr(Workspace, "clear_progress", fails)
    assert night.run(night.work(new(TEXTS[:12]))).encoded == 12


def test_the_quarantine_of_an_attempt_whose_receipt_does_not_stand_is_removed(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if TEXTS[1] in texts:
            raise ValueError("today it fails")
        return token_ids(tokenizer, texts)

    work = night.work(new(TEXTS[:3]))
    (task,) = night.pending(work)
    by_plan = Path(night.workspace.quarantine_uri) / "bucket-00003.parquet"
    by_plan.parent.mkdir(parents=True)
    by_plan.write_bytes(b"what the plan put there")
    with monkeypatch.context() as patched:
        patched.setattr(encoder, "token_ids", fails)
        patched.setattr(Workspace, "write_receipt", lambda _self, receipt, **_: receipt)
        killed = encode_bucket(task, ONE_CORE)
    assert killed.quarantine is not None
    receipt = encode_bucket(task, ONE_CORE)
    assert (receipt.quarantined, receipt.quarantine) == ({}, None)
    tidy_quarantine(night.workspace, [receipt])
    assert [path.name for path in by_plan.parent.iterdir()] == [by_plan.name]
    tidy_quarantine(night.workspace, [killed])
