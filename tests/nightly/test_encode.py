"""The encode stage of one bucket: computed and carried-over vectors, receipts, retries and quarantine."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from example_counts import examples
from marc_pipeline.errors import CorruptFile
from marc_pipeline.model import encoder
from marc_pipeline.model.bundle import Bundle
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.model.tokens import TextTokens, text_tokens
from marc_pipeline.nightly.encode import EncodeTask, delete_stale_quarantine, encode_bucket, pending_tasks
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage
from marc_pipeline.storage.checksums import check_file
from marc_pipeline.table.precision import round_mantissas
from marc_pipeline.table.write import write_bucket_file
from marc_pipeline.work_area import ProgressFiles, Workspace
from marc_schemas.bundle import LongTexts
from marc_schemas.catalogue import ITEMS, QUARANTINE, Change
from marc_schemas.feature_table import MANTISSA_BITS, file_schema
from marc_schemas.files import PublishedFile
from marc_schemas.identity import content_hash, row_id
from marc_schemas.plan import BucketPlan, Plan
from marc_schemas.receipt import Receipt
from published import flip
from tiny_models import CPU_FLOAT32, MAX_TOKENS, ONE_CORE, TEXTS, cosines, tiny_tokenizer, train_tiny_bundle

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
class Table:
    """A feature table with the work area of one plan."""

    folder: Path
    bundle: Bundle
    plan_id: str = "0123456789abcdef0123456789abcdef"
    mantissa_bits: int = MANTISSA_BITS

    @property
    def uri(self) -> Path:
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
        """Write a file of the base release. Its vectors are random, so they differ from computed ones."""
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
        written = write_bucket_file(
            *(STORAGE, str(self.uri), [pa.table(columns, schema=schema)]),
            **{"dim": DIM, "ds": BASE_DS, "bucket": bucket, "plan_id": "base" * 8, "footer": {}},
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
            rows = [(i, row_id(i), text, content_hash(text), change.value) for i, text, change in items]
            pq.write_table(pa.table([list(column) for column in zip(*rows, strict=True)], schema=ITEMS), path)
        counts = {change.value: sum(found == change for _, _, found in items) for change in Change}
        return BucketPlan(bucket=bucket, items=len(items), **counts, deleted=0, tokens=0, previous=tuple(previous))

    def plan(self, *work: BucketPlan) -> Plan:
        return Plan(
            **dict.fromkeys(("chosen", "base_release", "live_release", "tokens_per_second")),
            **{"ds": DS, "dim": DIM, "template": "{title}", "buckets": 16, "rows_read": 0, "tokens_exact": True},
            plan_id=self.plan_id,
            created_at=datetime(2026, 11, 20, tzinfo=UTC),
            catalogue=(),
            bundle=self.bundle.version,
            bundle_uri=self.bundle.uri,
            mantissa_bits=self.mantissa_bits,
            quarantined={},
            work=work,
        )

    def pending(self, *work: BucketPlan) -> list[EncodeTask]:
        return pending_tasks(self.workspace, self.plan(*work), table_uri=str(self.uri), settings=CPU_FLOAT32)

    def run(self, work: BucketPlan) -> Receipt:
        (task,) = [task for task in self.pending(work) if task.work.bucket == work.bucket]
        return encode_bucket(task, ONE_CORE)

    def read(self, file: PublishedFile | None) -> pa.Table:
        """Rows of a file, read by pyarrow alone."""
        assert file is not None
        return pq.ParquetFile(self.uri / file.path).read()

    def direct(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode texts one at a time."""
        encoder = load_encoder(STORAGE, self.bundle.uri, self.bundle.version, CPU_FLOAT32, ONE_CORE)
        return np.concatenate([encoder.encode([text]).vectors for text in texts])


@pytest.fixture
def table(tmp_path: Path, bundle: Bundle) -> Table:
    return Table(tmp_path, bundle)


def vectors(rows: pa.Table) -> NDArray[np.float32]:
    return np.array(rows["vector"].to_pylist(), dtype=np.float32)


def new(texts: Sequence[str], *, prefix: str = "item") -> list[Item]:
    return [(f"{prefix}-{number:03d}", text, Change.NEW) for number, text in enumerate(texts)]


def flip_a_byte(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def cut_a_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def fail_on(monkeypatch: pytest.MonkeyPatch, *bad: str) -> None:
    """Make the tokenizer fail on some texts."""

    def fails(tokenizer: Tokenizer, texts: Sequence[str], long_texts: LongTexts = "cut") -> list[TextTokens]:
        if set(texts) & set(bad):
            raise ValueError("no token for this")
        return text_tokens(tokenizer, texts, long_texts)

    monkeypatch.setattr("marc_pipeline.model.tokens.text_tokens", fails)


def test_a_receipt_counts_cut_texts_that_are_encoded_once(table: Table) -> None:
    texts = ["river " * (MAX_TOKENS + 8), "seven", "river " * (MAX_TOKENS + 8), "moon " * MAX_TOKENS]
    receipt = table.run(table.work(new(texts)))
    # Two special tokens take part of the limit.
    assert (receipt.encoded, receipt.cut_texts, receipt.lost_tokens) == (3, 2, 8 + 2 + 2)


def test_a_bucket_of_new_items_is_encoded_with_receipt_and_footer(table: Table) -> None:
    started = datetime.now(UTC)
    items, texts = new(TEXTS[:12][::-1]), TEXTS[:12][::-1]
    receipt = table.run(table.work(items))
    rows = table.read(receipt.file)
    assert rows.schema.remove_metadata() == file_schema(DIM)
    assert rows["item_id"].to_pylist() == sorted(i for i, _, _ in items)
    assert rows["row_id"].to_pylist() == [row_id(i) for i, _, _ in items]
    assert rows["content_hash"].to_pylist() == [content_hash(text) for text in texts]
    assert set(rows["bundle"].to_pylist()) == {table.bundle.version}
    assert cosines(vectors(rows), table.direct(texts)).min() >= 0.9999
    (encoded_at,) = set(rows["encoded_at"].to_pylist())
    assert started <= encoded_at <= datetime.now(UTC)

    assert (receipt.plan_id, receipt.bucket, receipt.bundle) == (table.plan_id, BUCKET, table.bundle.version)
    assert (receipt.encoded, receipt.reused, receipt.device, receipt.dtype) == (12, 0, "cpu", "float32")
    assert receipt.tokens == sum(len(tiny_tokenizer("bert").encode(text).ids) for text in texts)
    assert receipt.padded_tokens >= receipt.tokens
    assert receipt.cut_texts == receipt.lost_tokens == 0
    assert 0 < receipt.model_seconds <= receipt.seconds
    assert receipt.file is not None
    assert receipt.file.rows == 12
    assert receipt.file.path.startswith(f"ds={DS}/bucket={BUCKET}/")
    assert check_file(STORAGE, str(table.uri), receipt.file) is None
    assert table.workspace.read_receipts(table.plan()) == {BUCKET: receipt}

    footer = pq.read_metadata(table.uri / receipt.file.path).metadata
    card = table.bundle.card
    assert {key.decode(): value.decode() for key, value in footer.items() if key.startswith(b"marc.")} == {
        "marc.bundle": table.bundle.version,
        "marc.layer": str(card.layers_kept),
        "marc.dim": str(DIM),
        "marc.normalised": "true",
        "marc.template": card.template,
        "marc.plan_id": table.plan_id,
        "marc.mantissa_bits": "23",
        "marc.ds": DS,
        "marc.layout": "plain-pages",
    }


def test_the_file_is_complete_before_the_receipt_is_written(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    write = Workspace.write_receipt

    def check_first(self: Workspace, receipt: Receipt, **named: Any) -> Receipt:
        assert receipt.file is not None
        found.append(check_file(STORAGE, str(table.uri), receipt.file))
        return write(self, receipt, **named)

    monkeypatch.setattr(Workspace, "write_receipt", check_first)
    table.run(table.work(new(TEXTS[:2])))
    assert found == [None]


def test_a_worker_that_fails_while_writing_leaves_no_receipt(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    work = table.work(new(TEXTS[:2]))

    def dies(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("marc_pipeline.nightly.encode.write_bucket_file", dies)
    with pytest.raises(OSError, match="disk full"):
        table.run(work)
    assert table.workspace.read_receipts(table.plan(work)) == {}
    monkeypatch.undo()
    table.run(work)
    assert table.pending(work) == []


def test_unchanged_vectors_are_carried_over_bit_for_bit_with_their_encoding_times(table: Table) -> None:
    texts = {f"old-{number}": TEXTS[number] for number in range(10)}
    base = table.base_file(texts)
    # Two items are deleted, two changed, and three new ones sort between the old ones.
    items: list[Item] = [(i, text, Change.UNCHANGED) for i, text in texts.items() if i[-1] in "012345"]
    items += [("old-6", "another text", Change.CHANGED), ("old-7", "yet another", Change.CHANGED)]
    items += [("aaa", TEXTS[20], Change.NEW), ("old-3b", TEXTS[21], Change.NEW), ("zzz", TEXTS[22], Change.NEW)]
    receipt = table.run(table.work(items, previous=[base]))
    assert (receipt.encoded, receipt.reused) == (5, 6)
    rows, before = table.read(receipt.file), table.read(base)
    old = {row["item_id"]: row for row in before.to_pylist()}
    assert rows["item_id"].to_pylist() == sorted(i for i, _, _ in items)
    for row, (_, text, change) in zip(rows.to_pylist(), sorted(items), strict=True):
        assert row["content_hash"] == content_hash(text)
        if change == Change.UNCHANGED:
            assert row == old[row["item_id"]]
        else:
            assert row["encoded_at"] > LONG_AGO + timedelta(days=1)
            assert np.linalg.norm(row["vector"]) == pytest.approx(1, abs=1e-5)
    fresh = [text for _, text, change in sorted(items) if change != Change.UNCHANGED]
    is_fresh = np.array([change != Change.UNCHANGED for _, _, change in sorted(items)])
    assert cosines(vectors(rows)[is_fresh], table.direct(fresh)).min() >= 0.9999


def test_a_bucket_without_changes_does_not_load_the_model(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {f"old-{number}": TEXTS[number] for number in range(10)}
    base = table.base_file(texts)
    monkeypatch.setattr(encoder, "load_encoder", None)
    receipt = table.run(table.work([(i, text, Change.UNCHANGED) for i, text in texts.items()], previous=[base]))
    assert table.read(receipt.file).equals(table.read(base))
    assert (receipt.encoded, receipt.reused, receipt.tokens, receipt.padded_tokens) == (0, 10, 0, 0)
    assert (receipt.device, receipt.model_seconds) == ("none", 0)


@pytest.mark.parametrize("before", [10, 12, MANTISSA_BITS])
def test_computed_and_carried_vectors_are_stored_with_the_plans_precision(
    tmp_path: Path, bundle: Bundle, before: int
) -> None:
    table = Table(tmp_path, bundle, mantissa_bits=10)
    texts = {f"old-{number}": TEXTS[number] for number in range(8)}
    base = table.base_file(texts, mantissa_bits=before)
    items: list[Item] = [(i, text, Change.UNCHANGED) for i, text in texts.items()]
    items += [(f"new-{number}", text, Change.NEW) for number, text in enumerate(TEXTS[10:20])]
    receipt = table.run(table.work(items, previous=[base]))
    assert (receipt.encoded, receipt.reused) == (10, 8)
    found = vectors(table.read(receipt.file))
    assert np.array_equal(found, round_mantissas(found, 10))
    assert np.array_equal(found[10:], round_mantissas(vectors(table.read(base)), 10))
    direct = table.direct(TEXTS[10:20])
    np.testing.assert_allclose(found[:10], direct, rtol=2**-11 + 1e-3, atol=1e-6)
    assert not np.array_equal(direct, round_mantissas(direct, 10))
    assert receipt.file is not None
    assert pq.read_metadata(table.uri / receipt.file.path).metadata[b"marc.mantissa_bits"] == b"10"


def test_vectors_are_carried_over_from_several_files_when_the_number_of_buckets_changed(table: Table) -> None:
    files = [
        table.base_file({f"{side}-{number}": TEXTS[number] for number in range(5)}, bucket=bucket, seed=bucket)
        for side, bucket in (("left", 3), ("right", 11))
    ]
    items: list[Item] = [
        ("left-1", TEXTS[1], Change.UNCHANGED),
        ("right-4", TEXTS[4], Change.UNCHANGED),
        ("x", TEXTS[9], Change.NEW),
    ]
    rows = table.read(table.run(table.work(items, previous=files)).file)
    left, right = (table.read(file) for file in files)
    assert rows["vector"][:2].to_pylist() == [left["vector"][1].as_py(), right["vector"][4].as_py()]
    assert rows["encoded_at"][:2].to_pylist() == [left["encoded_at"][1].as_py(), right["encoded_at"][4].as_py()]


def test_identical_texts_share_a_vector_and_count_once(table: Table) -> None:
    texts = [TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[2]]
    receipt = table.run(table.work(new(texts)))
    found = vectors(table.read(receipt.file))
    assert np.array_equal(found, found[[0, 1, 0, 0, 1, 5]])
    assert len(np.unique(found, axis=0)) == 3
    assert cosines(found, table.direct(texts)).min() >= 0.9999
    assert (receipt.encoded, receipt.reused) == (3, 3)
    assert receipt.tokens == sum(len(tiny_tokenizer("bert").encode(text).ids) for text in TEXTS[:3])


def test_a_new_item_with_the_text_of_an_unchanged_one_is_encoded(table: Table) -> None:
    base = table.base_file({"old": TEXTS[0]})
    receipt = table.run(table.work([("old", TEXTS[0], Change.UNCHANGED), *new(TEXTS[:1])], previous=[base]))
    rows = table.read(receipt.file)
    assert rows["item_id"].to_pylist() == ["item-000", "old"]
    assert cosines(vectors(rows)[:1], table.direct(TEXTS[:1])).min() >= 0.9999
    assert vectors(rows)[1].tobytes() == vectors(table.read(base))[0].tobytes()


def test_a_bucket_that_became_empty_has_a_receipt_and_no_file(table: Table) -> None:
    work = table.work([], previous=[table.base_file({"gone": TEXTS[0]})])
    receipt = table.run(work)
    assert receipt.file is None
    assert (receipt.encoded, receipt.reused, receipt.tokens) == (0, 0, 0)
    assert not (table.uri / f"ds={DS}").exists()
    assert table.pending(work) == []


def test_a_retry_does_only_what_is_missing(table: Table) -> None:
    first, second = (table.work(new(TEXTS[n : n + 3], prefix=f"b{n}"), bucket=n) for n in (1, 2))
    assert [task.work for task in table.pending(first, second)] == [first, second]
    receipt = table.run(first)
    assert [task.work for task in table.pending(first, second)] == [second]
    table.run(second)
    assert table.pending(first, second) == []
    assert table.workspace.read_receipts(table.plan(first, second))[1] == receipt


@pytest.mark.parametrize("damage", [flip_a_byte, cut_a_byte, Path.unlink])
def test_a_bucket_with_a_damaged_file_is_pending_again(table: Table, damage: Callable[[Path], None]) -> None:
    work, other = table.work(new(TEXTS[:4])), table.work(new(TEXTS[:4]), bucket=7)
    receipt = table.run(work)
    table.run(other)
    assert receipt.file is not None
    damage(table.uri / receipt.file.path)
    assert [task.work for task in table.pending(work, other)] == [work]
    again = table.run(work)
    assert table.pending(work, other) == []
    assert cosines(vectors(table.read(again.file)), table.direct(TEXTS[:4])).min() >= 0.9999


def test_encoding_a_bucket_twice_keeps_the_first_valid_receipt_and_its_file(table: Table) -> None:
    work = table.work(new(TEXTS[:3]))
    (task,) = table.pending(work)
    first = encode_bucket(task, ONE_CORE)
    assert first.file is not None
    before, rows = (table.uri / first.file.path).read_bytes(), table.read(first.file).drop_columns(["encoded_at"])
    assert encode_bucket(task, ONE_CORE) == first == table.workspace.read_receipts(table.plan(work))[work.bucket]
    assert (table.uri / first.file.path).read_bytes() == before
    flip_a_byte(table.uri / first.file.path)
    second = encode_bucket(task, ONE_CORE)
    assert second != first
    assert table.workspace.read_receipts(table.plan(work))[work.bucket] == second
    assert table.read(second.file).drop_columns(["encoded_at"]).equals(rows)


def test_a_receipt_of_another_plan_or_bundle_is_not_valid(table: Table) -> None:
    work = table.work(new(TEXTS[:2]))
    receipt = table.run(work)
    for change in ({"plan_id": "f" * 32}, {"bundle": "f" * 16}):
        table.workspace.write_receipt(receipt.model_copy(update=change))
        assert [task.work for task in table.pending(work)] == [work]
    table.workspace.write_receipt(receipt)
    assert table.pending(work) == []


ABSENT = "does not contain the vectors"


@pytest.mark.parametrize(
    ("base", "made_by", "damage", "message"),
    [
        ({"old": TEXTS[0]}, None, flip_a_byte, "part-base"),
        ({"old": TEXTS[0]}, None, Path.unlink, "is missing"),
        ({"old": "another text"}, None, Path.touch, ABSENT),
        ({"old": TEXTS[0]}, "f" * 16, Path.touch, ABSENT),
        ({"another item": TEXTS[0]}, None, Path.touch, ABSENT),
    ],
    ids=["damaged", "missing", "text", "bundle", "item"],
)
def test_a_bucket_is_encoded_whole_if_the_base_release_lacks_its_vectors(
    table: Table,
    base: dict[str, str],
    made_by: str | None,
    damage: Callable[[Path], None],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    previous = table.base_file(base, bundle=made_by)
    damage(table.uri / previous.path)
    work = table.work([("old", TEXTS[0], Change.UNCHANGED), *new(TEXTS[1:2])], previous=[previous])
    receipt = table.run(work)
    assert (receipt.encoded, receipt.reused) == (2, 0)
    assert f"bucket {work.bucket} is encoded whole: " in caplog.text
    assert message in caplog.text
    assert table.pending(work) == []
    shutil.rmtree(Path(table.workspace.uri) / "receipts")
    plain = table.run(table.work([("old", TEXTS[0], Change.NEW), *new(TEXTS[1:2])]))
    found, expected = (table.read(file).select(["item_id", "vector"]) for file in (receipt.file, plain.file))
    assert found.equals(expected)


@pytest.mark.parametrize("change", [Change.NEW, Change.UNCHANGED])
def test_a_receipt_older_than_the_plan_is_valid_only_without_carried_vectors(table: Table, change: Change) -> None:
    base = table.base_file({"old": TEXTS[0]})
    work = table.work([("old", TEXTS[0], change), *new(TEXTS[1:2])], previous=[base])
    receipt = table.run(work)
    assert table.pending(work) == []
    earlier = table.plan(work).created_at - timedelta(seconds=1)
    table.workspace.write_receipt(receipt.model_copy(update={"finished_at": earlier}))
    assert [task.work for task in table.pending(work)] == ([] if change == Change.NEW else [work])


def test_a_damaged_bundle_is_an_error(table: Table, tmp_path: Path) -> None:
    folder = shutil.copytree(table.bundle.uri, tmp_path / "bundle")
    copied = Table(tmp_path / "copied", replace(table.bundle, uri=str(folder)))
    flip_a_byte(Path(copied.bundle.uri) / "compressor.safetensors")
    work = copied.work(new(TEXTS[:2]))
    with pytest.raises(CorruptFile, match=r"compressor\.safetensors"):
        copied.run(work)
    assert len(copied.pending(work)) == 1


def test_the_encoder_gets_the_assigned_gpu(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Mock(wraps=load_encoder)
    monkeypatch.setattr(encoder, "load_encoder", load)
    (task,) = table.pending(table.work(new(TEXTS[:2])))
    resources = TaskResources(cpus=1, gpu="5")
    encode_bucket(task, resources)
    assert [call.args[-1] for call in load.call_args_list] == [resources]


@pytest.fixture(params=[(1, 8), (3, 5), (100, 7), (8192, 65_536)], ids=str)
def windows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of a window in texts and items; row groups have two rows."""
    texts, rows = request.param
    monkeypatch.setattr("marc_pipeline.nightly.windows.WINDOW_TEXTS", texts)
    monkeypatch.setattr("marc_pipeline.nightly.windows.WINDOW_ROWS", rows)
    monkeypatch.setattr("marc_pipeline.nightly.windows.BATCH_ROWS", 2)
    monkeypatch.setattr("marc_pipeline.table.write.ROW_GROUP_ROWS", 2)


@pytest.mark.usefixtures("windows")
@examples(2, of=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**16), count=st.integers(1, 40))
def test_a_bucket_does_not_depend_on_its_windows(bundle: Bundle, seed: int, count: int) -> None:
    draw = random.Random(seed)  # noqa: S311 - no secret
    with tempfile.TemporaryDirectory() as folder:
        table = Table(Path(folder), bundle)
        # Few texts for many items, so that windows share texts.
        texts = {f"item-{number:03d}": draw.choice(TEXTS[:9]) for number in range(count)}
        old = {item: text for item, text in texts.items() if draw.random() < 0.5}
        # Deleted items, which sort between the planned ones.
        gone = {f"item-{number:03d}x": TEXTS[10] for number in range(0, count, 3)}
        base = table.base_file(old | gone, seed=seed)
        items = [(i, text, Change.UNCHANGED if i in old else Change.NEW) for i, text in texts.items()]
        receipt = table.run(table.work(items, previous=[base]))
        rows = table.read(receipt.file)
        assert rows["item_id"].to_pylist() == sorted(texts)
        assert receipt.encoded == len({text for i, text in texts.items() if i not in old})
        assert receipt.reused == count - receipt.encoded
        before = {row["item_id"]: row for row in table.read(base).to_pylist()}
        for row in rows.to_pylist():
            if row["item_id"] in old:
                assert row == before[row["item_id"]]
        if fresh := [i for i in sorted(texts) if i not in old]:
            found = vectors(rows.filter(pc.is_in(rows["item_id"], pa.array(fresh))))
            assert cosines(found, table.direct([texts[i] for i in fresh])).min() >= 0.9999


@pytest.mark.usefixtures("windows")
def test_a_text_that_cannot_be_encoded_is_quarantined(
    table: Table, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_on(monkeypatch, "poison 🎬")
    items = new([*TEXTS[:5], "poison 🎬", *TEXTS[5:9], "poison 🎬", TEXTS[0]])
    items[5] = (items[5][0], items[5][1], Change.CHANGED)
    receipt = table.run(table.work(items))
    assert receipt.quarantined == {"item-005": Change.CHANGED, "item-010": Change.NEW}
    assert (receipt.encoded, receipt.reused) == (9, 1)
    rows = table.read(receipt.file)
    assert rows["item_id"].to_pylist() == [i for i, _, _ in items if i not in receipt.quarantined]
    texts = [text for i, text, _ in items if i not in receipt.quarantined]
    assert cosines(vectors(rows), table.direct(texts)).min() >= 0.9999
    (path,) = Path(table.workspace.quarantine_uri).iterdir()
    assert path.name == receipt.quarantine
    quarantined = pq.ParquetFile(path).read()
    assert quarantined.schema == QUARANTINE
    assert [row["item_id"] for row in quarantined.to_pylist()] == list(receipt.quarantined)
    for row in quarantined.to_pylist():
        kept = json.loads(row["row"])
        assert (row["reason"], kept["text"], bool(row["source"])) == ("unencodable", "poison 🎬", True)
        assert "ValueError: no token for this" in kept["error"]
    assert "2 texts cannot be encoded" in caplog.text


def test_a_bucket_without_an_encodable_text_has_no_file(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on(monkeypatch, *TEXTS[:3])
    receipt = table.run(table.work(new(TEXTS[:3])))
    assert receipt.file is None
    assert len(receipt.quarantined) == 3
    assert [path for path in table.uri.rglob("*") if path.is_file()] == []
    assert table.pending(table.work(new(TEXTS[:3]))) == []


@pytest.mark.usefixtures("windows")
def test_damage_in_the_last_row_group_leaves_no_partial_file(table: Table) -> None:
    old = {f"item-{number:03d}": TEXTS[number] for number in range(40)}
    base = table.base_file(old)
    path = table.uri / base.path
    column = pq.ParquetFile(path).metadata.row_group(pq.ParquetFile(path).num_row_groups - 1).column(2)
    flip(path, column.data_page_offset + column.total_compressed_size // 2)
    items = [(i, text, Change.UNCHANGED) for i, text in old.items()]
    receipt = table.run(table.work([*items, *new(TEXTS[40:42], prefix="new")], previous=[base]))
    assert (receipt.encoded, receipt.reused) == (42, 0)
    # Sorted by id, the new items are the last ones.
    assert cosines(vectors(table.read(receipt.file)), table.direct(TEXTS[:42])).min() >= 0.9999
    files = [file.name for file in table.uri.rglob("*") if file.is_file()]
    assert len(files) == 2, "the base's file and the bucket's"


def test_a_running_bucket_records_its_progress(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marc_pipeline.work_area.SECONDS", 0)
    for name in ("WINDOW_TEXTS", "BATCH_ROWS"):
        monkeypatch.setattr(f"marc_pipeline.nightly.windows.{name}", 4)
    recorded: list[float] = []
    write, progress = ProgressFiles.write, table.workspace.progress
    monkeypatch.setattr(ProgressFiles, "write", lambda *given: (recorded.append(given[2]), write(*given)))
    receipt = table.run(table.work(new(TEXTS[:12])))
    assert len(recorded) >= 3
    assert recorded == sorted(set(recorded))
    assert recorded[-1] == receipt.tokens
    assert progress.total() == 0, "a finished bucket has a receipt instead"
    write(progress, BUCKET, 7)
    write(progress, BUCKET + 1, 2.5)
    assert progress.total() == 9.5
    progress.clear([BUCKET])
    assert progress.total() == 2.5
    progress.clear()
    assert progress.total() == 0


def test_a_failure_to_record_progress_is_ignored(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("the store is not reachable")

    monkeypatch.setattr("marc_pipeline.work_area.SECONDS", 0)
    monkeypatch.setattr(ProgressFiles, "clear", fails)
    write = Storage.write
    monkeypatch.setattr(Storage, "write", lambda s, uri, data: fails() if "/progress/" in uri else write(s, uri, data))
    assert table.run(table.work(new(TEXTS[:12]))).encoded == 12


def test_the_quarantine_of_an_attempt_without_a_receipt_is_deleted(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = table.work(new(TEXTS[:3]))
    (task,) = table.pending(work)
    by_plan = Path(table.workspace.quarantine_uri) / "bucket-00003.parquet"
    by_plan.parent.mkdir(parents=True)
    by_plan.write_bytes(b"rows that the plan quarantined")
    with monkeypatch.context() as patched:
        fail_on(patched, TEXTS[1])
        patched.setattr(Workspace, "write_receipt", lambda _self, receipt, **_: receipt)
        killed = encode_bucket(task, ONE_CORE)
    assert killed.quarantine is not None
    receipt = encode_bucket(task, ONE_CORE)
    assert (receipt.quarantined, receipt.quarantine) == ({}, None)
    delete_stale_quarantine(table.workspace, [receipt])
    assert [path.name for path in by_plan.parent.iterdir()] == [by_plan.name]
    delete_stale_quarantine(table.workspace, [killed])
