"""The training loop in other processes: killed and resumed, and two that train as a group."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

from fit_probe import DROPPING, PLAIN, State, same, trained

pytestmark = pytest.mark.usefixtures("one_thread")

LONG: dict[str, Any] = {**DROPPING, "epochs": 5, "validate_every": 7, "checkpoint_every": 3, "patience": 100}
RUN = """
import json, sys, time
from pathlib import Path
import torch
from fit_probe import place, trained

torch.set_num_threads(1)
calls = []
def slowly(*_):
    calls.append(1)
    time.sleep(0.01)
folder = Path(sys.argv[1])
def prepare(objective):
    objective.register_forward_hook(slowly)
    sys.stdin.readline()
state, progress = trained(checkpoint=place(folder), prepare=prepare, **json.loads(sys.argv[2]))
torch.save({"state": state, "history": progress.history, "calls": len(calls)}, folder / "out")
"""


Process = subprocess.Popen[bytes]


@contextmanager
def started(script: str, *arguments: object, **variables: str) -> Iterator[Process]:
    """Start a Python process, which is killed at the end."""
    paths = os.pathsep.join([str(REPOSITORY / folder) for folder in ("pipeline", "schemas", "tests/fixtures")])
    command = [sys.executable, "-c", script, *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": paths, **variables}
    with subprocess.Popen(command, env=variables, stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_checkpoints(process: Process, path: Path, count: int) -> None:
    """Wait until the process has written so many checkpoints."""

    def version() -> tuple[int, int] | None:
        return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None

    before, seen, deadline = version(), 0, time.monotonic() + 100
    while seen < count:
        assert process.poll() is None, "the process ended before it could be killed"
        assert time.monotonic() < deadline
        if (now := version()) != before:
            before, seen = now, seen + 1
        time.sleep(0.001)


def go(process: Process) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


@pytest.mark.slow
def test_a_run_that_was_killed_three_times_has_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    chance, path, out = random.Random(0), tmp_path / "checkpoint", tmp_path / "out"  # noqa: S311
    with ExitStack() as stack:
        # Imports take the most time, so that all processes import at once and then wait for a line.
        *killed, last = [stack.enter_context(started(RUN, tmp_path, json.dumps(LONG))) for _ in range(4)]
        undisturbed, progress = trained(**LONG)
        for process in killed:
            go(process)
            wait_for_checkpoints(process, path, chance.randint(1, 5))
            time.sleep(chance.uniform(0, 0.06))  # at any point of a step
            process.kill()
            assert process.wait() == -signal.SIGKILL
            assert not out.exists()
        go(last)
        assert last.wait() == 0
    found = torch.load(out)
    assert 0 < found["calls"] < progress.step - 3
    assert found["history"] == progress.history
    assert same(found["state"], undisturbed)


# Two processes

GROUP: dict[str, dict[str, Any]] = {
    "plain": {**PLAIN, "batch": 64, "epochs": 1},
    "dropping": {**DROPPING, "batch": 64, "checkpoint_every": 3},
    "short": {**PLAIN, "batch": 50, "epochs": 1, "accumulate": 2},
}
MEMBER = """
import json, sys
from contextlib import suppress
from pathlib import Path
import torch
import fit_probe
from marc_pipeline.training.distributed import place, process_group

torch.set_num_threads(1)
folder, GROUP, found = Path(sys.argv[1]), json.loads(sys.argv[2]), {}
assert place() == (0, 1)
with process_group():
    rank, _ = place()
    def train(changes, checkpoint=None, calls=0):
        def prepare(objective):
            # The processes start from different weights, and must use those of the first one.
            if rank:
                for parameter in objective.parameters():
                    parameter.data.normal_()
            fit_probe.ending(calls)(objective)
        state, progress = fit_probe.trained(count=1920, checkpoint=checkpoint, prepare=prepare, **changes)
        torch.distributed.barrier()
        return state, progress.step, progress.history
    for name, changes in GROUP.items():
        found[name] = train(changes)
    checkpoint = fit_probe.place(folder)
    with suppress(fit_probe.Ended):
        train(GROUP["dropping"], checkpoint, calls=8)
    torch.distributed.barrier()
    found["resumed"] = train(GROUP["dropping"], checkpoint)
assert place() == (0, 1)
torch.save(found, folder / f"member-{rank}")
"""


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[State, int, list[dict[str, float]]]]]:
    """Weights, steps and histories of two processes that trained as a group."""
    folder = tmp_path_factory.mktemp("group")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(started(MEMBER, folder, json.dumps(GROUP), RANK=str(rank), **shared)) for rank in (0, 1)
        ]
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(folder / f"member-{rank}") for rank in (0, 1)]


def test_processes_of_a_group_have_the_same_weights_and_resume_with_the_same_bits(members: list[Any]) -> None:
    for name in (*GROUP, "resumed"):
        (one, step, _), (other, other_step, _) = (member[name] for member in members)
        assert same(one, other), name
        assert step == other_step > 0
    (undisturbed, step, _), (resumed, resumed_step, _) = members[0]["dropping"], members[0]["resumed"]
    assert step == resumed_step
    assert same(undisturbed, resumed)


def test_two_processes_equal_one_with_batches_of_twice_the_size(members: list[Any]) -> None:
    found, step, history = members[0]["plain"]
    alone, progress = trained(count=1920, **{**GROUP["plain"], "batch": 128})
    assert step == progress.step
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    assert history[-1]["validation_auc"] == pytest.approx(progress.history[-1]["validation_auc"], abs=1e-4)
