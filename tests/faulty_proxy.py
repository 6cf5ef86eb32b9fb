"""A proxy before an S3 server on this machine that throttles, resets, stalls and cuts, at random but seeded."""

import argparse
import json
import os
import random
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from email.message import Message
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

# Answers 503 and forwards nothing; resets, and forwards nothing; forwards, then resets before the answer or within it;
# forwards, sends half of the answer's body if it has one, waits and closes; the same without waiting; and the one that
# is only by request: forwards and ends within the headers, which some clients take for an answer.
SLOW_DOWN, RESET, LOST, STALL, CUT = FAULTS = ("slow_down", "reset", "lost", "stall", "cut")
CUT_HEAD, PASSED = "cut_head", "passed"
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}
UPSTREAM_TIMEOUT_S = 60.0
SLOW_DOWN_BODY = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message><RequestId>proxy</RequestId></Error>"
)


class FaultyProxy:
    """``with FaultyProxy(url, rate=0.05, seed=1) as proxy:`` clients use ``proxy.url``; ``proxy.counts`` tells.

    Args:
        target: url of the server; it must be on this machine.
        rate: share of the requests that are disturbed.
        seed: of the choice which ones are, and how.
        faults: kinds to choose from.
        stall_s: how long a stalled answer takes until it is dropped.
        port: to listen on; 0: any.
        most: requests that are disturbed at all; None: no limit.
    """

    def __init__(
        self,
        target: str,
        *,
        rate: float,
        seed: int,
        faults: Sequence[str] = FAULTS,
        stall_s: float = 3.0,
        port: int = 0,
        most: int | None = None,
    ) -> None:
        parts = urlsplit(target)
        if parts.scheme != "http" or parts.hostname not in {"127.0.0.1", "localhost"} or parts.port is None:
            raise ValueError(f"{target!r} is not http://127.0.0.1:PORT")
        self.upstream = (parts.hostname, parts.port)
        self.rate, self.faults, self.stall_s, self.most = rate, tuple(faults), stall_s, most
        self.counts: Counter[str] = Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()  # noqa: S311
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def draw(self) -> str:
        """What happens to the next request."""
        with self._lock:
            struck = self.counts.total() - self.counts[PASSED]
            fails = self._random.random() < self.rate and (self.most is None or struck < self.most)
            chosen = self._random.choice(self.faults) if fails else PASSED
            self.counts[chosen] += 1
            return chosen

    def draw_length(self, whole: int) -> int:
        """How much of an answer is sent before a reset; in half of the cases nothing."""
        with self._lock:
            return self._random.choice((0, self._random.randrange(whole)))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultyProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        # Clients that time out hang up on us.
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        proxy = self.server.proxy
        fault = proxy.draw()
        if fault == RESET:
            return self._reset()
        body = self._body()
        if fault == SLOW_DOWN:
            head = _head(503, "Slow Down", [("Content-Type", "application/xml")], len(SLOW_DOWN_BODY))
            return self._send(head + (b"" if self.command == "HEAD" else SLOW_DOWN_BODY))
        head, answer = self._forward(body)
        if fault == PASSED:
            return self._send(head + answer)
        if fault == LOST:
            return self._reset((head + answer)[: proxy.draw_length(len(head + answer))])
        with suppress(OSError):
            if fault == CUT_HEAD:
                self.wfile.write(head.partition(b"\r\n")[0] + b"\r\n")
            elif answer:
                self.wfile.write(head + answer[: len(answer) // 2])
            if fault == STALL:
                time.sleep(proxy.stall_s)
        self.close_connection = True
        return None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_OPTIONS = _serve  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self._read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self._read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError("the client hung up within its request")
        return data

    def _forward(self, body: bytes) -> tuple[bytes, bytes]:
        """The server's answer: status line with headers, and body."""
        upstream = HTTPConnection(*self.server.proxy.upstream, timeout=UPSTREAM_TIMEOUT_S)
        try:
            # The path as it came: the signature is over its very bytes, and over the Host header.
            upstream.putrequest(self.command, self.requestline.split()[1], skip_host=True, skip_accept_encoding=True)
            for name, value in _end_to_end(self.headers):
                upstream.putheader(name, value)
            if body or self.command in {"PUT", "POST"}:
                upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body or None)
            response = upstream.getresponse()
            answer = response.read()
            length: int | None = len(answer)
            if self.command == "HEAD" or response.status in {204, 304}:
                stated = response.headers.get("Content-Length")
                length = None if stated is None else int(stated)
            return _head(response.status, response.reason, _end_to_end(response.headers), length), answer
        finally:
            upstream.close()

    def _send(self, data: bytes) -> None:
        self.wfile.write(data)

    def _reset(self, begun: bytes = b"") -> None:
        """Close so that the client sees a reset, not an end."""
        self._send(begun)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _end_to_end(headers: "Message[str, str]") -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers.items() if name.lower() not in HOP_BY_HOP]


def _head(status: int, reason: str, headers: Sequence[tuple[str, str]], length: int | None) -> bytes:
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers)]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def main() -> None:
    """Print the proxy's url, serve until terminated, print what was done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True, help="http://127.0.0.1:PORT of the S3 server")
    parser.add_argument("--rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--stall", type=float, default=3.0, help="seconds")
    parser.add_argument("--faults", nargs="+", choices=(*FAULTS, CUT_HEAD), default=FAULTS)
    given = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with FaultyProxy(
        given.target, rate=given.rate, seed=given.seed, faults=given.faults, stall_s=given.stall, port=given.port
    ) as proxy:
        sys.stdout.write(f"{proxy.url}\n")
        sys.stdout.flush()
        ended.wait()
    sys.stdout.write(json.dumps(proxy.counts) + "\n")


if __name__ == "__main__":
    main()
