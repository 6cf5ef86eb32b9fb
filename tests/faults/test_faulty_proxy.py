"""The faulty proxy, and storage, Parquet and Delta on a store that throttles, fails, stalls and drops connections."""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import CommitProperties, Transaction, write_deltalake

from faulty_proxy import CUT, CUT_HEAD, FAULTS, LOST, PASSED, RESET, SLOW_DOWN, STALL, FaultyProxy
from marc_pipeline.errors import UserError
from marc_pipeline.storage import MULTIPART_BYTES, Storage, join
from marc_pipeline.storage.delta import COMMIT_ERRORS, open_or_create, open_table

BUCKET = "faulty-proxy-tests"
STALL_S = 3.0
ROUNDS = 4
COMMITS = 2
# The default suite tests all faults mixed.
ONE_BY_ONE = [pytest.param((fault,), marks=pytest.mark.slow) for fault in FAULTS]


class Echo(BaseHTTPRequestHandler):
    """Answers with the request's body; the path gives the status."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str, list[tuple[str, str]], bytes]]

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.seen.append((self.command, self.requestline.split()[1], self.headers.items(), body))
        status = int(urlsplit(self.path).path.rsplit("/", 1)[1])
        self.send_response(status)
        if status not in {204, 304}:
            self.send_header("Content-Length", str(len(body) or 10))
        self.send_header("ETag", '"x"')
        self.end_headers()
        if self.command != "HEAD" and status not in {204, 304}:
            self.wfile.write(body or b"0123456789")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


class Careless(BaseHTTPRequestHandler):
    """Acknowledges every write, whatever its conditions."""

    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b"<DeleteResult/>" if self.command == "POST" else b""
        self.send_response(200)
        self.send_header("ETag", '"x"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST = _serve  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_a_store_that_ignores_conditions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    with ThreadingHTTPServer(("127.0.0.1", 0), Careless) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        storage = Storage(endpoint_url=f"http://127.0.0.1:{server.server_port}", region="us-east-1")
        with pytest.raises(UserError, match="the store of s3://shop/table ignores If-None-Match"):
            open_or_create(storage, "s3://shop/table", pa.schema([("a", pa.int64())]), name="any")
        server.shutdown()


def test_a_store_with_conditional_writes_is_accepted_and_keeps_nothing(direct: Storage, uri: str) -> None:
    direct.require_conditional_writes(uri)
    assert direct.list(uri, hidden=True) == []


@pytest.fixture
def echo() -> Iterator[tuple[str, Any]]:
    handler = type("OneEcho", (Echo,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def connection(proxy: FaultyProxy) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", urlsplit(proxy.url).port, timeout=10)


def test_signed_requests_pass_unchanged(echo: tuple[str, Any]) -> None:
    target, handler = echo
    path = "/b/a%2Fb//%C3%A9+%26/200?list-type=2&prefix=%2F&x"
    with FaultyProxy(target, rate=0, seed=1) as proxy:
        client = connection(proxy)
        headers = {"Host": "bucket.example:1234", "X-Amz-Date": "now", "Authorization": "AWS4 x=y, z"}
        for method, body in (("GET", None), ("PUT", b"\0\xff" * 5000), ("PUT", b""), ("DELETE", None)):
            client.request(method, path, body=body, headers=headers)
            answer = client.getresponse()
            assert (answer.status, answer.headers["ETag"], answer.read()) == (200, '"x"', body or b"0123456789")
            seen = handler.seen.pop()
            assert (seen[0], seen[1], seen[3]) == (method, path, body or b"")
            assert headers.items() <= dict(seen[2]).items()
            assert len([name for name, _ in seen[2] if name.lower() == "host"]) == 1
        assert proxy.counts == {PASSED: 4}


def test_chunked_bodies_and_bodies_after_100_continue_arrive_whole(echo: tuple[str, Any]) -> None:
    target, handler = echo
    with FaultyProxy(target, rate=0, seed=1) as proxy:
        client = connection(proxy)
        client.request("PUT", "/200", body=iter([b"abc", b"d" * 100_000]), encode_chunked=True)
        assert client.getresponse().read() == b"abc" + b"d" * 100_000
        with socket.create_connection(("127.0.0.1", urlsplit(proxy.url).port or 0), timeout=10) as raw:
            raw.sendall(b"PUT /200 HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 100 ")
            raw.sendall(b"hello")
            answer = b""
            while not answer.endswith(b"hello"):
                answer += raw.recv(1000)
        assert [seen[3][-5:] for seen in handler.seen] == [b"ddddd", b"hello"]


@pytest.mark.parametrize(("method", "status", "length"), [("HEAD", 200, "10"), ("GET", 204, None), ("GET", 304, None)])
def test_answers_without_a_body_do_not_block_the_connection(
    method: str, status: int, length: str | None, echo: tuple[str, Any]
) -> None:
    with FaultyProxy(echo[0], rate=0, seed=1) as proxy:
        client = connection(proxy)
        for _ in range(2):
            client.request(method, f"/{status}")
            answer = client.getresponse()
            assert (answer.status, answer.headers["Content-Length"], answer.read()) == (status, length, b"")


@pytest.mark.parametrize(
    ("fault", "forwarded", "outcome"),
    [
        (SLOW_DOWN, 0, "503"),
        (RESET, 0, "ConnectionResetError"),
        (LOST, 1, "ConnectionResetError"),
        (STALL, 1, "IncompleteRead"),
        (CUT, 1, "IncompleteRead"),
        (CUT_HEAD, 1, "200"),
    ],
)
def test_clients_see_each_fault_as_documented(fault: str, forwarded: int, outcome: str, echo: tuple[str, Any]) -> None:
    target, handler = echo
    with FaultyProxy(target, rate=1, seed=1, faults=[fault], stall_s=0.3) as proxy:
        for _ in range(5):
            client, started = connection(proxy), time.monotonic()
            try:
                client.request("GET", "/200")
                answer = client.getresponse()
                body = answer.read()
                found = str(answer.status)
            except (ConnectionError, http.client.HTTPException) as error:
                found, body = type(error).__name__, b""
            assert found == outcome
            assert (b"<Code>SlowDown</Code>" in body) == (fault == SLOW_DOWN)
            assert (time.monotonic() - started > 0.25) == (fault == STALL)
        assert proxy.counts == {fault: 5}
        assert len(handler.seen) == 5 * forwarded


def test_faults_come_at_their_rate_and_are_the_same_for_the_same_seed() -> None:
    drawn = []
    for seed in (1, 1, 2):
        proxy = FaultyProxy("http://127.0.0.1:1", rate=0.2, seed=seed)
        drawn.append([proxy.draw() for _ in range(3000)])
        with proxy:
            pass
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(90 < drawn[0].count(fault) < 150 for fault in FAULTS)


@pytest.mark.parametrize(
    "target", ["http://example.com:80", "https://127.0.0.1:1", "http://127.0.0.1", "http://[::1]:1"]
)
def test_the_proxy_forwards_to_this_machine_only(target: str) -> None:
    with pytest.raises(ValueError, match=r"is not http://127\.0\.0\.1:PORT"):
        FaultyProxy(target, rate=0, seed=0)


def test_the_proxy_is_a_command(echo: tuple[str, Any]) -> None:
    script = Path(__file__).parents[1] / "fixtures" / "faulty_proxy.py"
    command = [sys.executable, str(script), "--target", echo[0], "--rate", "1", "--seed", "1", "--faults", SLOW_DOWN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        client = http.client.HTTPConnection(urlsplit(process.stdout.readline().strip()).netloc, timeout=10)
        client.request("GET", "/200")
        assert client.getresponse().status == 503
        client.close()
        process.send_signal(signal.SIGTERM)
        assert json.loads(process.stdout.read()) == {SLOW_DOWN: 1}


@pytest.fixture
def direct(s3_environment: dict[str, str]) -> Storage:
    """The real server without a proxy."""
    from s3_server import client_of

    client_of(s3_environment).create_bucket(Bucket=BUCKET)
    return Storage(endpoint_url=s3_environment["AWS_ENDPOINT_URL"])


@pytest.fixture
def uri() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def patient(proxy: FaultyProxy) -> Storage:
    """The production settings with a shorter timeout."""
    return Storage(endpoint_url=proxy.url, connect_timeout_s=1.0, read_timeout_s=1.0)


def disturbed(
    target: Storage, rate: float, seed: int, faults: tuple[str, ...] = FAULTS, *, most: int | None = None
) -> FaultyProxy:
    return FaultyProxy(target.endpoint_url or "", rate=rate, seed=seed, faults=faults, stall_s=STALL_S, most=most)


@pytest.mark.parametrize("faults", [*ONE_BY_ONE, (CUT_HEAD,), FAULTS], ids="+".join)
def test_objects_read_back_as_written(faults: tuple[str, ...], direct: Storage, uri: str, tmp_path: Path) -> None:
    with disturbed(direct, 0.3, 1, faults) as proxy:
        storage = patient(proxy)
        for turn in range(ROUNDS):
            data, one = random.Random(turn).randbytes(50_000), join(uri, str(turn))  # noqa: S311
            assert storage.stat(one) is None
            with pytest.raises(FileNotFoundError, match=one):
                storage.read(one)
            storage.write(one, data)
            assert storage.read(one) == data
            stored = storage.stat(one)
            assert stored is not None
            assert stored == direct.stat(one)
            storage.fetch(one, tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == data
            assert [o.uri for o in storage.list(uri)] == [one]
            assert storage.create(one, b"other") is False
            assert direct.read(one) == data
            storage.remove([one])
            assert direct.stat(one) is None
        assert sum(proxy.counts[fault] for fault in faults) >= ROUNDS


def test_one_of_four_concurrent_creators_succeeds_although_answers_are_lost(direct: Storage, uri: str) -> None:
    with disturbed(direct, 0.3, 2, (LOST, RESET)) as proxy, ThreadPoolExecutor(4) as pool:
        storage = patient(proxy)
        for turn in range(10):
            one = join(uri, str(turn))
            rivals = [f"{turn} by {rival}".encode() for rival in range(4)]
            created = list(pool.map(storage.create, [one] * 4, rivals))
            assert created.count(True) == 1
            assert direct.read(one) == rivals[created.index(True)]
        assert min(proxy.counts[LOST], proxy.counts[RESET]) > 0


@pytest.mark.parametrize("faults", [FAULTS, (CUT_HEAD,)], ids="+".join)
def test_a_large_object_is_uploaded_and_fetched_in_parts(
    faults: tuple[str, ...], direct: Storage, uri: str, tmp_path: Path
) -> None:
    from s3_server import client_of

    data = os.urandom(100 << 20)
    assert len(data) > MULTIPART_BYTES
    # A cut head fails the whole upload, so there must be fewer of them than attempts.
    most = direct.attempts - 2 if faults == (CUT_HEAD,) else None
    with disturbed(direct, 0.3, 4, faults, most=most) as proxy:
        storage = patient(proxy)
        with storage.staged(uri) as staged:
            staged.write_bytes(data)
            storage.publish(staged, uri)
        storage.fetch(uri, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == data
        disturbances = proxy.counts.total() - proxy.counts[PASSED]
    assert disturbances >= 2
    assert direct.read(uri) == data
    found = direct.stat(uri)
    assert found is not None
    assert found.etag is not None
    assert "-" in found.etag
    # Lost answers leave unfinished uploads, which are aborted.
    direct.abort_uploads(f"s3://{BUCKET}", before=time.time() + 60)
    environment = {name: os.environ[name] for name in os.environ if name.startswith("AWS_")}
    assert "Uploads" not in client_of(environment).list_multipart_uploads(Bucket=BUCKET)


@pytest.mark.parametrize("faults", [*ONE_BY_ONE, FAULTS], ids="+".join)
def test_arrow_reads_and_writes_parquet(faults: tuple[str, ...], direct: Storage, uri: str) -> None:
    table = pa.table({"a": [random.Random(i).randbytes(30) for i in range(20_000)]})  # noqa: S311
    with disturbed(direct, 0.25, 3, faults) as proxy:
        filesystem, path = patient(proxy).filesystem(uri)
        for turn in range(ROUNDS // 2):
            pq.write_table(table, f"{path}-{turn}", filesystem=filesystem, row_group_size=5000)
            assert pq.read_table(f"{path}-{turn}", filesystem=filesystem).equals(table)
            with filesystem.open_input_stream(f"{path}-{turn}", compression=None) as stream:
                assert stream.read() == direct.read(f"{uri}-{turn}")
        assert sum(proxy.counts[fault] for fault in faults) >= 2


@pytest.mark.parametrize("faults", [*ONE_BY_ONE, FAULTS], ids="+".join)
def test_every_commit_to_a_delta_table_is_made_once(faults: tuple[str, ...], direct: Storage, uri: str) -> None:
    schema = pa.schema([("a", pa.int64())])
    with disturbed(direct, 0.25, 5, faults) as proxy:
        storage = patient(proxy)
        table = open_or_create(storage, uri, schema, name="faulty")
        for number in range(1, COMMITS + 1):
            properties = CommitProperties(app_transactions=[Transaction("test", number)])
            while (table.transaction_version("test") or 0) < number:
                with suppress(*COMMIT_ERRORS):
                    row = pa.table({"a": [number]}, schema)
                    write_deltalake(table, row, mode="append", commit_properties=properties)
                table = open_or_create(storage, uri, schema, name="faulty")
        assert proxy.counts.total() - proxy.counts[PASSED] > ROUNDS
    committed = open_table(direct, uri)
    assert committed is not None
    assert sorted(committed.to_pyarrow_table()["a"].to_pylist()) == list(range(1, COMMITS + 1))
    assert committed.version() == COMMITS
