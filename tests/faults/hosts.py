"""Processes of the fault campaign: permanent hosts, and attempts at commands that can be killed."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from process_table import end_session

HERE = Path(__file__).resolve().parent
MARC = "from marc_pipeline.cli.app import main; main()"


class Overdue(Exception):
    """A process did not answer in time."""


@dataclass(frozen=True)
class Ended:
    """End of a command: exit code (negative: a signal; None: it had to be killed), and standard error."""

    code: int | None
    said: str


class Host:
    """A permanent child process that receives commands and sends answers as JSON lines.

    Args:
        script: name of a script in this folder.
        arguments: arguments of the script.
        env: its whole environment.
        log: file for its standard error.
    """

    def __init__(self, script: str, *arguments: str, env: Mapping[str, str], log: Path) -> None:
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=dict(env),
                text=True,
                start_new_session=True,
            )
        self.log = log
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    @property
    def answered(self) -> bool:
        """Whether an answer is waiting."""
        return not self._answers.empty()

    def send(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            Overdue: no answer came in time, or the process has ended.
        """
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            raise Overdue(f"no answer in {seconds:.0f} s; see {self.log}") from None
        if line is None:
            raise Overdue(f"the process has ended; see {self.log}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        end_session(self.pid)
        self._process.wait()


class Attempt:
    """One attempt at a command in another process; subclasses fetch its end once."""

    _done: Ended | None = None

    @property
    def running(self) -> bool:
        """Whether the command has not ended."""
        raise NotImplementedError

    def wait(self, seconds: float) -> Ended:
        """Return how the command ended; after so many seconds it is killed."""
        if self._done is None:
            self._done = self._end(seconds)
        return self._done

    def kill(self) -> None:
        raise NotImplementedError

    def _end(self, seconds: float) -> Ended:
        raise NotImplementedError


class WarmAttempt(Attempt):
    """A command in a host's Spark session; it cannot be killed alone."""

    def __init__(self, host: Host, arguments: Sequence[str]) -> None:
        self.host = host
        host.send(arguments=list(arguments))

    @property
    def running(self) -> bool:
        return self._done is None and not self.host.answered

    def _end(self, seconds: float) -> Ended:
        answer = self.host.receive(seconds)
        return Ended(answer["code"], answer["said"])


class ForkAttempt(Attempt):
    """A command in a child process of a host."""

    def __init__(self, host: Host, arguments: Sequence[str], output: Path) -> None:
        self.host, self._output = host, output
        host.send(arguments=list(arguments), output=str(output))
        self.pid: int = host.receive(30)["pid"]

    @property
    def running(self) -> bool:
        return self._done is None and not self.host.answered

    def _end(self, seconds: float) -> Ended:
        try:
            code = self.host.receive(seconds)["code"]
        except Overdue:
            self.kill()
            self.host.receive(30)
            code = None
        return Ended(code, self._output.read_text(errors="replace"))

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class ColdAttempt(Attempt):
    """A ``marc`` process with its own JVM; both are one process group."""

    def __init__(self, arguments: Sequence[str], *, env: Mapping[str, str], output: Path) -> None:
        self._output = output
        with output.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-c", MARC, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=dict(env),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def _end(self, seconds: float) -> Ended:
        code: int | None
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
            code = None
        return Ended(code, self._output.read_text(errors="replace"))

    def kill(self) -> None:
        """Kill driver and JVM; Python workers end by themselves, as on a cluster."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
