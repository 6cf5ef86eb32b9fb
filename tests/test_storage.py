"""Storage on a local disk: the first writer wins, what is published is whole, and hidden names are nobody's."""

import hashlib
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.storage import STAGED_PREFIX, Storage, StoredObject, join

STORAGE = Storage()
THREADS = 16


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(STAGED_PREFIX)]


def test_of_sixteen_threads_that_create_an_object_exactly_one_wins_and_its_content_stands(tmp_path: Path) -> None:
    for attempt in range(5):
        uri = str(tmp_path / "new" / f"object-{attempt}")
        barrier = threading.Barrier(THREADS)

        def create(number: int, uri: str = uri, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return STORAGE.create(uri, f"written by {number}".encode() * 1000)

        with ThreadPoolExecutor(THREADS) as pool:
            created = list(pool.map(create, range(THREADS)))
        assert created.count(True) == 1
        assert STORAGE.read(uri) == f"written by {created.index(True)}".encode() * 1000
    assert hidden(tmp_path) == []


def test_create_leaves_an_object_that_exists_as_it_is(tmp_path: Path) -> None:
    uri = str(tmp_path / "object")
    STORAGE.write(uri, b"first")
    assert STORAGE.create(uri, b"second") is False
    assert STORAGE.read(uri) == b"first"
    assert hidden(tmp_path) == []


def test_write_replaces_an_object(tmp_path: Path) -> None:
    uri = str(tmp_path / "a" / "b" / "object")
    STORAGE.write(uri, b"first, and longer")
    STORAGE.write(uri, b"second")
    assert STORAGE.read(uri) == b"second"


def test_a_reader_sees_the_old_or_the_new_content_and_nothing_between(tmp_path: Path) -> None:
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


def test_a_staged_file_is_removed_when_its_writer_fails_and_nothing_is_published(tmp_path: Path) -> None:
    uri = str(tmp_path / "object")
    with pytest.raises(ZeroDivisionError), STORAGE.staged(uri) as path:  # noqa: PT012
        path.write_bytes(b"half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    assert STORAGE.stat(uri) is None


def test_a_staged_file_lies_beside_its_target_so_that_publishing_is_one_rename(tmp_path: Path) -> None:
    uri = str(tmp_path / "folder" / "object")
    with STORAGE.staged(uri) as path:
        path.write_bytes(b"whole")
        assert path.parent == tmp_path / "folder"
        inode = path.stat().st_ino
        assert STORAGE.list(str(tmp_path)) == []
        STORAGE.publish(path, uri)
    assert Path(uri).stat().st_ino == inode
    assert [o.uri for o in STORAGE.list(str(tmp_path))] == [uri]


def test_list_gives_every_visible_file_sorted_with_its_size(tmp_path: Path) -> None:
    names = ["b", "a/1", "a/.hidden", "a/_hidden", "_log/1", ".staged-1", "c/d/e", "c/_d/e", "a0", "z_visible.x"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    expected = []
    for folder, _, files in os.walk(tmp_path):
        for file in files:
            relative = os.path.relpath(f"{folder}/{file}", tmp_path)
            if not relative.startswith((".", "_")) and "/." not in relative and "/_" not in relative:
                expected.append((f"{tmp_path}/{relative}", len(relative)))
    found = [(o.uri, o.bytes) for o in STORAGE.list(str(tmp_path))]
    assert found == sorted(expected)
    assert [uri.removeprefix(f"{tmp_path}/") for uri, _ in found] == ["a/1", "a0", "b", "c/d/e", "z_visible.x"]
    assert STORAGE.list(f"{tmp_path}/") == STORAGE.list(str(tmp_path))


def test_a_hidden_folder_can_be_listed_by_its_own_name(tmp_path: Path) -> None:
    STORAGE.write(str(tmp_path / "_releases" / "1"), b"x")
    assert [o.uri for o in STORAGE.list(str(tmp_path / "_releases"))] == [str(tmp_path / "_releases" / "1")]


def test_nothing_is_listed_where_nothing_is(tmp_path: Path) -> None:
    assert STORAGE.list(str(tmp_path / "nowhere")) == []


def test_list_hides_names_also_below_a_relative_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    STORAGE.write("d/_hidden", b"x")
    STORAGE.write("d/visible", b"x")
    assert [o.uri.rsplit("/", 1)[1] for o in STORAGE.list("./d")] == ["visible"]


def test_list_bears_staged_files_that_vanish_while_it_looks(tmp_path: Path) -> None:
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
                assert [o.uri for o in STORAGE.list(str(tmp_path))] == [uri]
        finally:
            done.set()
        writer.result()


def test_stat_tells_the_size_of_a_file_and_that_there_is_none(tmp_path: Path) -> None:
    uri = str(tmp_path / "object")
    assert STORAGE.stat(uri) is None
    assert STORAGE.stat(str(tmp_path)) is None
    STORAGE.write(uri, b"12345")
    assert STORAGE.stat(uri) == StoredObject(uri=uri, bytes=5)


def test_reading_what_is_not_there_is_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        STORAGE.read(str(tmp_path / "object"))


@settings(deadline=None, database=None, max_examples=25)
@given(data=st.binary(max_size=2000))
def test_what_is_written_is_read_fetched_and_digested(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("storage")
    uri = str(folder / "object")
    assert STORAGE.create(uri, data)
    stored = STORAGE.stat(uri)
    assert stored is not None
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


def test_storage_travels_to_workers() -> None:
    storage = Storage(endpoint_url="http://localhost:7480", region="default")
    assert pickle.loads(pickle.dumps(storage)) == storage  # noqa: S301


def test_delta_allows_plain_http_only_for_an_endpoint_that_is_plain_http() -> None:
    assert Storage().delta_options() == {}
    assert Storage(endpoint_url="http://x:1", region="r").delta_options() == {
        "AWS_ENDPOINT_URL": "http://x:1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "r",
    }
    assert Storage(endpoint_url="https://x").delta_options()["AWS_ALLOW_HTTP"] == "false"


def test_an_s3_uri_without_a_bucket_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="names no bucket"):
        STORAGE.read("s3:///key")
