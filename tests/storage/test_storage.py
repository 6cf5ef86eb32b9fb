"""Storage on a local disk and on S3: the first writer wins, writes are atomic, hidden names are skipped."""

import errno
import hashlib
import inspect
import json
import logging
import os
import pickle
import resource
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marc_pipeline.config import StorageSettings, load_settings
from marc_pipeline.errors import UserError
from marc_pipeline.storage import STAGED_PREFIX, Storage, StoredObject, join
from marc_pipeline.storage.delta import open_table
from s3_server import client_of

STORAGE = Storage()
THREADS = 16
MIB = 1 << 20
SECRET = "s3cr3t"  # noqa: S105


def staged_names(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(STAGED_PREFIX)]


def uris(stored: Iterable[StoredObject]) -> list[str]:
    return [one.uri for one in stored]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_exactly_one_of_sixteen_concurrent_creators_wins(
    tmp_path: Path, request: pytest.FixtureRequest, place: str
) -> None:
    root = str(tmp_path / "new") if place == "local" else request.getfixturevalue("bucket")
    for attempt in range(5):
        uri = join(root, f"object-{attempt}")
        barrier = threading.Barrier(THREADS)

        def create(number: int, uri: str = uri, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return STORAGE.create(uri, f"written by {number}".encode() * 1000)

        with ThreadPoolExecutor(THREADS) as pool:
            created = list(pool.map(create, range(THREADS)))
        assert created.count(True) == 1
        assert STORAGE.read(uri) == f"written by {created.index(True)}".encode() * 1000
    assert staged_names(tmp_path) == []
    # Even equal content of another writer does not count as created.
    assert STORAGE.create(join(root, "same"), b"same") is True
    assert STORAGE.create(join(root, "same"), b"same") is False


def test_write_replaces_and_create_keeps_an_existing_object(tmp_path: Path) -> None:
    uri = str(tmp_path / "a" / "b" / "object")
    for content in (b"first, and longer", b"second"):
        STORAGE.write(uri, content)
        assert STORAGE.create(uri, b"third") is False
        assert STORAGE.read(uri) == content
    assert staged_names(tmp_path) == []


def test_a_reader_never_sees_a_partial_write(tmp_path: Path) -> None:
    uri = str(tmp_path / "object")
    versions = [letter * 500_000 for letter in (b"a", b"b")]
    STORAGE.write(uri, versions[0])
    done = threading.Event()

    def write() -> None:
        try:
            for turn in range(40):
                STORAGE.write(uri, versions[turn % 2])
        finally:
            done.set()

    torn = 0
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        while not done.is_set():
            torn += STORAGE.read(uri) not in versions
        writer.result()
    assert torn == 0


def test_publishing_renames_a_staged_file_which_is_removed_when_its_writer_fails(tmp_path: Path) -> None:
    uri = str(tmp_path / "object")
    with pytest.raises(ZeroDivisionError), STORAGE.staged(uri) as path:  # noqa: PT012
        path.write_bytes(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    assert STORAGE.stat(uri) is None
    with STORAGE.staged(uri) as path:
        path.write_bytes(b"whole")
        assert path.parent == tmp_path
        inode = path.stat().st_ino
        assert STORAGE.list(str(tmp_path)) == []
        STORAGE.publish(path, uri)
    assert Path(uri).stat().st_ino == inode
    assert uris(STORAGE.list(str(tmp_path))) == [uri]


def test_list_returns_every_visible_file_sorted_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["b", "a/1", "a/.hidden", "a/_hidden", "_log/1", ".staged-1", "c/d/e", "c/_d/e", "a0", "z_visible.x"]
    for name in names:
        STORAGE.write(str(tmp_path / name), name.encode())
    visible = ["a/1", "a0", "b", "c/d/e", "z_visible.x"]
    found = STORAGE.list(str(tmp_path))
    assert [(o.uri, o.bytes) for o in found] == [(str(tmp_path / name), len(name)) for name in visible]
    assert STORAGE.list(f"{tmp_path}/") == found
    # A hidden folder can be listed by its own name.
    assert uris(STORAGE.list(str(tmp_path / "_log"))) == [str(tmp_path / "_log" / "1")]
    assert STORAGE.list(str(tmp_path / "nowhere")) == []
    monkeypatch.chdir(tmp_path)
    assert uris(STORAGE.list("./c")) == ["c/d/e"]


def test_list_skips_staged_files_that_are_deleted_meanwhile(tmp_path: Path) -> None:
    uri = str(tmp_path / "object")
    STORAGE.write(uri, b"x")
    done = threading.Event()

    def stage() -> None:
        while not done.is_set():
            with STORAGE.staged(uri) as path:
                path.touch()

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(stage)
        try:
            for _ in range(5000):
                assert uris(STORAGE.list(str(tmp_path))) == [uri]
        finally:
            done.set()
        writer.result()


@settings(deadline=None, database=None, max_examples=25)
@given(data=st.binary(max_size=2000))
def test_written_content_is_read_fetched_and_digested(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("storage")
    uri = str(folder / "object")
    assert STORAGE.stat(uri) is None
    assert STORAGE.stat(str(folder)) is None
    with pytest.raises(FileNotFoundError):
        STORAGE.read(uri)
    assert STORAGE.create(uri, data)
    stored = StoredObject(uri=uri, bytes=len(data), modified=Path(uri).stat().st_mtime)
    assert STORAGE.stat(uri) == stored
    STORAGE.fetch(uri, folder / "copies" / "object")
    filesystem, path = STORAGE.filesystem(uri)
    with filesystem.open_input_file(path) as file:
        assert file.read() == STORAGE.read(uri) == (folder / "copies" / "object").read_bytes() == data
    assert STORAGE.content_digest(stored) == hashlib.sha256(data).hexdigest()


def test_an_etag_is_the_digest_of_an_object_that_has_one() -> None:
    assert STORAGE.content_digest(StoredObject(uri="s3://b/k", bytes=1, etag='"abc-2"')) == "abc-2"


def test_join_puts_one_slash_between_parts() -> None:
    assert join("s3://bucket/prefix/", "/a/", "b") == "s3://bucket/prefix/a/b"
    assert join("/tmp/x", "a/b") == "/tmp/x/a/b"  # noqa: S108
    assert join("/", "a") == "/a"


def test_storage_is_picklable_and_has_the_defaults_of_its_settings() -> None:
    storage = Storage(endpoint_url="http://localhost:7480", region="default")
    assert pickle.loads(pickle.dumps(storage)) == storage  # noqa: S301
    assert Storage(**StorageSettings().model_dump()) == Storage()
    assert set(inspect.signature(Storage).parameters) == set(StorageSettings.model_fields)


def test_delta_allows_plain_http_only_for_a_plain_http_endpoint() -> None:
    assert not [name for name in Storage().delta_options() if name.startswith("AWS_")]
    assert {k: v for k, v in Storage(endpoint_url="http://x:1", region="r").delta_options().items() if "AWS" in k} == {
        "AWS_ENDPOINT_URL": "http://x:1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "r",
    }
    assert Storage(endpoint_url="https://x").delta_options()["AWS_ALLOW_HTTP"] == "false"


@pytest.mark.parametrize("name", [name for name in STORAGE.delta_options() if not name.startswith("AWS_")])
def test_delta_knows_every_option(name: str, bucket: str) -> None:
    class Wrong(Storage):
        def delta_options(self) -> dict[str, str]:
            return {**super().delta_options(), name: "nonsense"}

    assert open_table(Storage(attempts=1), join(bucket, "no-table")) is None
    with pytest.raises(Exception, match=r'nonsense\\?" as'):
        open_table(Wrong(attempts=1), join(bucket, "no-table"))


def test_an_s3_uri_without_a_bucket_is_the_users_error() -> None:
    with pytest.raises(UserError, match="has no bucket"):
        STORAGE.read("s3:///key")


@pytest.mark.parametrize(
    "url",
    [f"http://user:{SECRET}@store:7480", f"https://store/?key={SECRET}", f"user:{SECRET}@store", f"http://x/#{SECRET}"],
)
@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_an_endpoint_with_credentials_is_refused_and_not_repeated(
    url: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "marc.yaml"
    config.write_text(f'catalogue: {{uri: x.csv, template: "{{title}}"}}\nstorage: {{endpoint_url: "{url}"}}\n')
    uri = "s3://bucket/key"
    with monkeypatch.context() as patch:
        patch.setenv(variable, url)
        messages = [refusal(use) for use in (lambda: STORAGE.read(uri), lambda: STORAGE.filesystem(uri))]
        messages.append(refusal(lambda: open_table(STORAGE, uri)))
    messages += [refusal(lambda: load_settings(config)), refusal(lambda: Storage(endpoint_url=url))]
    config.write_text(f'catalogue: {{uri: x.csv, template: "{{title}}"}}\nstorage: "{url}"\n')
    messages.append(refusal(lambda: load_settings(config)))
    assert not [message for message in messages if SECRET in message]


@pytest.mark.parametrize("uri", [f"s3://key:{SECRET}@bucket/x", f"s3://key:{SECRET}/y@bucket/x", f"s3://{SECRET}@b/x"])
def test_a_uri_with_credentials_is_refused_and_not_repeated(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    attempts: list[Callable[[], object]] = [
        lambda: STORAGE.read(uri),
        lambda: STORAGE.list(uri),
        lambda: STORAGE.write(uri, b""),
        lambda: STORAGE.filesystem(uri),
        lambda: STORAGE.remove([uri]),
        lambda: open_table(STORAGE, uri),
    ]
    assert SECRET not in "".join(refusal(attempt) for attempt in attempts) + caplog.text


def refusal(attempt: Callable[[], object]) -> str:
    with pytest.raises(UserError, match=r"storage must be a mapping|credentials|without user") as caught:
        attempt()
    return str(caught.value)


def test_hidden_files_are_listed_on_request_with_their_age(tmp_path: Path) -> None:
    names = ["a", f"{STAGED_PREFIX}1", "_log/1", "d/.x/y"]
    for age, name in enumerate(names):
        STORAGE.write(str(tmp_path / name), b"x")
        os.utime(tmp_path / name, (0, 1_000_000 + age))
    found = STORAGE.list(str(tmp_path), hidden=True)
    assert {o.uri.removeprefix(f"{tmp_path}/"): o.modified - 1_000_000 for o in found} == {
        name: age for age, name in enumerate(names)
    }
    assert uris(STORAGE.list(str(tmp_path))) == [str(tmp_path / "a")]


def test_removing_files_removes_two_levels_of_empty_folders(tmp_path: Path) -> None:
    names = ["work/plans/1/receipts/0", "work/plans/1/plan", "work/plans/2/receipts/0", "work/plans/2/plan"]
    for name in names:
        STORAGE.write(str(tmp_path / name), b"x")
    STORAGE.remove(str(tmp_path / name) for name in [*names[:3], "work/nowhere/x", "work/plans/2/none"])
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "work", "work/plans", "work/plans/2", "work/plans/2/plan"
    ]  # fmt: skip
    STORAGE.remove([str(tmp_path / names[3])])
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["work"]
    STORAGE.remove([str(tmp_path / names[3])])


def test_writers_recreate_a_folder_that_is_removed_as_empty(tmp_path: Path) -> None:
    rounds = 300
    done = threading.Event()

    def prune() -> None:
        while not done.is_set():
            STORAGE.remove([str(tmp_path / "a" / "b" / "nothing")])
            time.sleep(0.0002)  # lets the other threads run

    def write(number: int) -> None:
        for turn in range(rounds):
            uri = str(tmp_path / "a" / "b" / f"{number}-{turn}")
            if turn % 2:
                STORAGE.write(uri, b"x")
            else:
                assert STORAGE.create(uri, b"x")
            assert STORAGE.read(uri) == b"x"
            STORAGE.remove([uri])

    with ThreadPoolExecutor(4) as pool:
        pruner = pool.submit(prune)
        try:
            for writer in [pool.submit(write, number) for number in range(3)]:
                writer.result()
        finally:
            done.set()
        pruner.result()


@pytest.fixture(params=["tmpfs", "limit"])
def full_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder with space for one mebibyte, beside a file of two mebibytes."""
    (tmp_path / "source").write_bytes(os.urandom(2 * MIB))
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "tmpfs":
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "none", str(folder)], check=False)
        if mounted.returncode:
            pytest.skip("mounting a small file system needs root")
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB // 2, before[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_with_the_uri_and_keeps_the_old_content(full_disk: Path, tmp_path: Path) -> None:
    uri = str(full_disk / "folder" / "object")
    STORAGE.write(uri, b"old")

    def parquet() -> None:
        with STORAGE.staged(uri) as path:
            pq.write_table(pa.table({"a": os.urandom(2 * MIB)}), path)
            STORAGE.publish(path, uri)

    def library() -> None:
        with STORAGE.staged(uri) as path:
            path.write_bytes(b"x")
            raise RuntimeError(f"write error: 12 != 34 ({os.strerror(errno.ENOSPC)})")

    tried = []

    def commit() -> None:
        tried.append(1)
        raise OSError(f"Generic LocalFileSystem error: {os.strerror(errno.ENOSPC)} (os error {errno.ENOSPC})")

    attempts: list[Callable[[], object]] = [
        lambda: STORAGE.repeated(uri, commit, on=(OSError,)),
        lambda: STORAGE.write(uri, bytes(2 * MIB)),
        lambda: STORAGE.create(uri + "2", bytes(2 * MIB)),
        lambda: STORAGE.fetch(str(tmp_path / "source"), Path(uri)),
        parquet,
        library,
    ]
    for attempt in attempts:
        with pytest.raises(OSError, match=r"space left|too large") as caught:
            attempt()
        assert caught.value.errno in {errno.ENOSPC, errno.EFBIG}
        assert caught.value.filename.startswith(uri)
        assert STORAGE.read(uri) == b"old"
        assert uris(STORAGE.list(str(full_disk), hidden=True)) == [uri]
    assert len(tried) == 1


def test_fetching_a_missing_object_keeps_the_local_file(tmp_path: Path) -> None:
    (tmp_path / "copy").write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        STORAGE.fetch(str(tmp_path / "nothing"), tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert (tmp_path / "copy").read_bytes() == b"old"


@pytest.mark.parametrize(("failures", "calls"), [(0, 1), (3, 4), (4, 4)])
def test_temporary_errors_are_retried_up_to_the_limit(
    failures: int, calls: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    caplog.set_level(logging.INFO)
    made = []

    def action() -> str:
        made.append(1)
        if len(made) <= failures:
            raise TimeoutError("the \x1b[31mstore\x1b[0m\n  stalls")
        return "done"

    if failures < 4:
        assert Storage(attempts=4).repeated("s3://b/k", action, on=(TimeoutError,)) == "done"
    else:
        with pytest.raises(OSError, match=r"^s3://b/k: failed 4 times, at last: the store stalls$"):
            Storage(attempts=4).repeated("s3://b/k", action, on=(TimeoutError,))
    assert len(made) == calls
    assert len(pauses) == len(caplog.messages) == calls - 1
    assert all(0 <= pause <= 0.1 * 2**number for number, pause in enumerate(pauses))
    with pytest.raises(ZeroDivisionError):
        Storage().repeated("s3://b/k", lambda: 1 / 0, on=(TimeoutError,))


@pytest.fixture
def bucket(s3_environment: dict[str, str]) -> str:
    """A fresh prefix on the real server."""
    client_of(s3_environment).create_bucket(Bucket="storage-tests")
    return f"s3://storage-tests/{uuid.uuid4().hex}"


def test_s3_objects_are_written_listed_found_and_removed(bucket: str, tmp_path: Path) -> None:
    names = ["a", "b/c d&<é>+%", ".staged-1", "_x/y"]
    before = time.time() - 2
    for name in names:
        STORAGE.write(join(bucket, name), name.encode())
    assert uris(STORAGE.list(bucket)) == [join(bucket, name) for name in names[:2]]
    found = STORAGE.list(bucket, hidden=True)
    assert sorted(uris(found)) == sorted(join(bucket, name) for name in names)
    for stored in found:
        assert before < stored.modified < time.time() + 2
        head = STORAGE.stat(stored.uri)
        assert head is not None
        assert (head.uri, head.bytes, head.etag, int(head.modified)) == (
            stored.uri, stored.bytes, stored.etag, int(stored.modified),
        )  # fmt: skip
        STORAGE.fetch(stored.uri, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == STORAGE.read(stored.uri) == stored.uri[len(bucket) + 1 :].encode()
    STORAGE.remove([*uris(found), join(bucket, "nothing"), join(bucket, "a")])
    assert STORAGE.list(bucket, hidden=True) == []
    assert STORAGE.stat(join(bucket, "a")) is None
    for missing in (lambda: STORAGE.read(join(bucket, "a")), lambda: STORAGE.fetch(join(bucket, "a"), tmp_path / "c")):
        with pytest.raises(FileNotFoundError):
            missing()


def test_more_objects_are_removed_than_one_request_takes(bucket: str) -> None:
    many = [join(bucket, f"{number:04d}") for number in range(1003)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda uri: STORAGE.write(uri, b""), many))
    STORAGE.remove(many[:-2])
    assert uris(STORAGE.list(bucket)) == many[-2:]


def test_an_object_that_cannot_be_removed_is_named_and_the_others_are_gone(
    bucket: str, s3_environment: dict[str, str]
) -> None:
    free, denied = join(bucket, "free"), join(bucket, "denied")
    for uri in (free, denied):
        STORAGE.write(uri, b"x")
    statement = {
        "Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject",
        "Resource": f"arn:aws:s3:::{denied.removeprefix('s3://')}",
    }  # fmt: skip
    client = client_of(s3_environment)
    client.put_bucket_policy(
        Bucket="storage-tests", Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    )
    try:
        with pytest.raises(OSError, match=rf"^1 objects could not be deleted, the first one: {denied}: AccessDenied"):
            STORAGE.remove([free, denied])
    finally:
        client.delete_bucket_policy(Bucket="storage-tests")
    assert uris(STORAGE.list(bucket)) == [denied]


def test_only_old_uploads_below_a_folder_are_aborted(bucket: str, s3_environment: dict[str, str]) -> None:
    client = client_of(s3_environment)
    prefix = bucket.rsplit("/", 1)[1]
    for key in ("in/a", "in/b", "inside/c"):
        client.create_multipart_upload(Bucket="storage-tests", Key=f"{prefix}/{key}")
    now = time.time()
    assert STORAGE.abort_uploads(join(bucket, "in"), before=now - 3600) == 0
    assert STORAGE.abort_uploads(join(bucket, "in"), before=now + 60) == 2
    left = client.list_multipart_uploads(Bucket="storage-tests", Prefix=prefix)["Uploads"]
    assert [upload["Key"] for upload in left] == [f"{prefix}/inside/c"]
    assert STORAGE.abort_uploads(bucket, before=now + 60) == 1
    assert STORAGE.abort_uploads("/local", before=now) == 0


FORKS = """
import os, sys
from marc_pipeline.storage import Storage, join
bucket, storage = sys.argv[1], Storage()
def check():
    for turn in range(30):
        name = str((turn + os.getpid()) % 10)
        uri = join(bucket, name)
        filesystem, path = storage.filesystem(uri)
        with filesystem.open_input_file(path) as file:
            assert file.read() == storage.read(uri) == name.encode() * 1000
for name in range(10):
    storage.write(join(bucket, str(name)), str(name).encode() * 1000)
check()
children = []
for _ in range(4):
    child = os.fork()
    if not child:
        try:
            check()
        except BaseException as error:
            print("child:", repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    children.append(child)
check()
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


def test_clients_made_before_a_fork_serve_parent_and_children(bucket: str, s3_environment: dict[str, str]) -> None:
    env = {**os.environ, **s3_environment}
    command = [sys.executable, "-W", "ignore", "-c", FORKS, bucket]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
