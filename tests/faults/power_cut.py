"""Cut the power at any moment of publications, a roll-back and a vacuum, and look what a disk may have kept.

    python tests/faults/power_cut.py [--cuts 500] [--seed 0]

A traced process publishes to a local disk. The trace of its system calls shows what was flushed at each moment. After
a cut, a file has at least the bytes that were flushed, and a folder the names; of everything later, the disk kept an
arbitrary part (Pillai et al., All File Systems Are Not Created Equal, OSDI 2014). Each cut is one such state. Its log
must open, must have every acknowledged release, intact, and must take the next release.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
SITE, TEMPORARY = "site", "tmp"
CALLS = (
    "openat,open,creat,write,pwrite64,writev,ftruncate,lseek,sendfile,copy_file_range,rename,renameat,renameat2,link,"
    "linkat,unlink,unlinkat,mkdir,mkdirat,rmdir,fsync,fdatasync"
)
CALL = re.compile(r"^(\d+)\s+(\w+)\((.*)\)\s+= (-?\d+)")
UNFINISHED = re.compile(r"^(\d+)\s+(\w+\(.*) <unfinished \.\.\.>$")
RESUMED = re.compile(r"^(\d+)\s+<\.\.\. \w+ resumed>(.*)$")
ARGUMENT = re.compile(r'\s*("(?:[^"\\]|\\.)*"(?:\.\.\.)?|\[.*?\]|[\w\-+|]+<[^>]*>|[^,]+)(?:,|$)')
DESCRIPTOR = re.compile(r"(\d+|AT_FDCWD)<(.*)>")
PIECE = re.compile(r'iov_base="((?:[^"\\]|\\.)*)"')


@dataclass(eq=False)
class Node:
    """A file or a folder: what it is, and what is sure to be on the disk."""

    data: bytearray = field(default_factory=bytearray)
    flushed: bytes = b""
    names: "dict[str, Node] | None" = None
    flushed_names: "dict[str, Node]" = field(default_factory=dict)
    changes: "list[dict[str, Node | None]]" = field(default_factory=list)

    def flush(self) -> None:
        if self.names is None:
            self.flushed = bytes(self.data)
        else:
            self.flushed_names, self.changes = dict(self.names), []

    def change(self, names: "dict[str, Node | None]") -> None:
        """Add, replace or (None) remove names, in one step."""
        assert self.names is not None
        self.changes.append(names)
        _apply(self.names, names)


def _apply(names: dict[str, Node], changes: dict[str, Node | None]) -> None:
    for name, node in changes.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """A folder with a site and the temporary files of its process, as their system calls leave it."""

    def __init__(self, root: Path) -> None:
        self.site = Node(names={})
        self._root, self._top = root, Node(names={SITE: self.site, TEMPORARY: Node(names={})})
        self._offsets: dict[str, int] = {}

    def perform(self, call: str, arguments: list[str], result: int) -> None:
        """Perform a successful call; calls outside the folder do nothing."""
        if call in {"openat", "open", "creat"}:
            self._open(call, arguments, result)
        elif call in {"rename", "renameat", "renameat2", "link", "linkat"}:
            self._move(arguments, keep=call.startswith("link"))
        elif call in {"mkdir", "mkdirat"}:
            self._put(self._paths(arguments)[0], Node(names={}))
        elif call in {"unlink", "unlinkat", "rmdir"}:
            self._put(self._paths(arguments)[0], None)
        elif call in {"fsync", "fdatasync"}:
            if node := self._node(arguments[0]):
                node.flush()
        elif call == "lseek":
            self._offsets[_number(arguments[0])] = result
        elif call == "ftruncate":
            if node := self._node(arguments[0]):
                size = int(arguments[1])
                node.data[:] = node.data[:size].ljust(size, b"\0")
        elif call in {"sendfile", "copy_file_range"}:
            target, source = arguments[:2] if call == "sendfile" else (arguments[2], arguments[0])
            start = self._offsets.get(_number(source), 0)
            self._offsets[_number(source)] = start + result
            if copied := self._node(source):
                self._write(target, bytes(copied.data[start : start + result]))
        else:
            pieces = PIECE.findall(arguments[1]) if call == "writev" else [arguments[1].strip('"')]
            data = b"".join(ast.literal_eval(f'b"{piece}"') for piece in pieces)[:result]
            self._write(arguments[0], data, int(arguments[3]) if call == "pwrite64" else None)

    def after_a_cut(self, chance: random.Random | None, folder: Path) -> None:
        """Write a state of the site after a power cut to a folder; without ``chance``, what is certain only."""
        self._restore(self.site, folder, chance)

    def _restore(self, node: Node, path: Path, chance: random.Random | None) -> None:
        if node.names is None:
            path.write_bytes(_survivor(node, chance))
            return
        path.mkdir(exist_ok=True)
        names = dict(node.flushed_names)
        for changes in node.changes[: chance.randint(0, len(node.changes)) if chance else 0]:
            _apply(names, changes)
        for name, child in names.items():
            self._restore(child, path / name, chance)

    def _open(self, call: str, arguments: list[str], result: int) -> None:
        path = self._paths(arguments)[0]
        self._offsets[str(result)] = 0
        if path is None:
            return
        flags = "O_CREAT|O_TRUNC" if call == "creat" else arguments[2 if call == "openat" else 1]
        parent, name = self._parent(path)
        if parent is None or parent.names is None:
            return
        if "O_CREAT" in flags and name not in parent.names:
            parent.change({name: Node()})
        node = parent.names.get(name)
        if node and node.names is None:
            if "O_TRUNC" in flags:
                node.data.clear()
            if "O_APPEND" in flags:
                self._offsets[str(result)] = len(node.data)

    def _move(self, arguments: list[str], *, keep: bool) -> None:
        source, target = self._paths(arguments)
        found, name = self._parent(source) if source else (None, "")
        node = found.names.get(name) if found and found.names is not None else None
        parent, new = self._parent(target) if target else (None, "")
        if node is None or parent is None or found is None:
            return
        if parent is found and not keep:
            parent.change({name: None, new: node})
            return
        parent.change({new: node})
        if not keep:
            found.change({name: None})

    def _put(self, path: Path | None, node: Node | None) -> None:
        parent, name = self._parent(path) if path else (None, "")
        if parent is not None:
            parent.change({name: node})

    def _write(self, descriptor: str, data: bytes, at: int | None = None) -> None:
        if node := self._node(descriptor):
            number = _number(descriptor)
            start = self._offsets.get(number, 0) if at is None else at
            node.data.extend(b"\0" * (start - len(node.data)))
            node.data[start : start + len(data)] = data
            if at is None:
                self._offsets[number] = start + len(data)

    def _node(self, descriptor: str) -> Node | None:
        path = Path(_path(descriptor))
        if path == self._root:
            return self._top
        parent, name = self._parent(path)
        return parent.names.get(name) if parent and parent.names is not None else None

    def _parent(self, path: Path) -> tuple[Node | None, str]:
        """The node of a path's folder, None outside the site or where it does not exist, and the path's name."""
        if not path.is_relative_to(self._root) or path == self._root:
            return None, ""
        node: Node | None = self._top
        for part in path.relative_to(self._root).parts[:-1]:
            node = node.names.get(part) if node and node.names is not None else None
        return node, path.name

    def _paths(self, arguments: list[str]) -> list[Path | None]:
        """Paths of a call inside the site; None for a path outside it."""
        found: list[Path | None] = []
        folder = ""
        for argument in arguments:
            if argument.startswith('"'):
                path = Path(folder, ast.literal_eval(f"b{argument}").decode())
                found.append(path if path.is_relative_to(self._root) else None)
            elif DESCRIPTOR.fullmatch(argument):
                folder = _path(argument)
        return found


def _survivor(node: Node, chance: random.Random | None) -> bytes:
    """Content of a file after a cut."""
    now, sure = bytes(node.data), node.flushed
    if now == sure or chance is None:
        return sure
    torn = now[: chance.randint(min(len(sure), len(now)), len(now))]
    return chance.choice((sure, now, torn, sure + b"\0" * (len(now) - len(sure))))


def _number(descriptor: str) -> str:
    return descriptor.partition("<")[0]


def _path(descriptor: str) -> str:
    found = DESCRIPTOR.fullmatch(descriptor)
    return found[2] if found else ""


def calls(trace: Path) -> Iterator[tuple[str, list[str], int]]:
    """Successful system calls of a trace in order: name, arguments, result."""
    begun: dict[str, str] = {}
    with trace.open(errors="surrogateescape") as lines:
        for raw in lines:
            line = raw.rstrip("\n")
            if found := UNFINISHED.match(line):
                begun[found[1]] = found[2]
                continue
            if found := RESUMED.match(line):
                line = f"{found[1]} {begun.pop(found[1])}{found[2]}"
            if (found := CALL.match(line)) and int(found[4]) >= 0:
                yield found[2], ARGUMENT.findall(found[3]), int(found[4])


# The traced process


def work(root: Path) -> None:
    """Publish, roll back and vacuum; print the live release of every date after each step."""
    from marc_pipeline.releases.log import live_releases
    from published import items
    from vacuumed import AT_ONCE, VacuumedSite

    site, steps = VacuumedSite(root), root / "steps"
    steps.mkdir()
    states: list[dict[str, str]] = [{}]

    def done() -> None:
        states.append({ds: release.release_id for ds, release in live_releases(site.log).items()})
        (steps / str(len(states) - 1)).mkdir()

    first = site.publish(items(12), ds="2026-11-20")
    done()
    site.publish(items(12, seed=1), ds="2026-11-21", plan_id="second")
    done()
    site.publish(items(12, seed=2), ds="2026-11-20", plan_id="again")
    done()
    site.roll_back(first)
    done()
    for retention in (AT_ONCE.model_copy(update={"days": 2}), AT_ONCE):
        site.vacuum(1, retention)
        done()
    site.publish(items(12, seed=3), ds="2026-11-22", plan_id="third")
    done()
    sys.stdout.write(json.dumps(states))


# The campaign


def problems(root: Path, states: list[dict[str, str]], done: int) -> list[str]:
    """What is wrong with the site after a cut, when ``done`` steps were acknowledged."""
    from marc_pipeline.reader.verify import verify
    from marc_pipeline.releases.log import live_releases
    from published import items
    from vacuumed import VacuumedSite

    site = VacuumedSite(root)
    live = live_releases(site.log)
    found = {ds: release.release_id for ds, release in live.items()}
    wanted = states[done : done + 2]
    # A step may have been finished, but not acknowledged.
    wrong = [] if found in wanted else [f"live releases are {found}, not {' or '.join(map(str, wanted))}"]
    for release in live.values():
        wrong += verify(site.storage, release, table_uri=site.table_uri)
    site.publish(items(12, seed=9), ds="2026-11-30", plan_id="next")
    return wrong + ([] if "2026-11-30" in live_releases(site.log) else ["the next release is not live"])


def traced(folder: Path) -> tuple[Path, Path, list[dict[str, str]]]:
    """Run the process; return its folder, the trace, and the live releases after each step."""
    root, trace = folder / "disk", folder / "trace"
    for name in (SITE, TEMPORARY):
        (root / name).mkdir(parents=True)
    paths = os.pathsep.join([str(TESTS / "fixtures"), *sys.path])
    done = subprocess.run(
        ["strace", "-f", "-y", "-s", "16777216", "-e", f"trace={CALLS}", "-o", str(trace), sys.executable, __file__,
         "--work", str(root / SITE)],
        env={**os.environ, "PYTHONPATH": paths, "TMPDIR": str(root / TEMPORARY)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return root, trace, json.loads(done.stdout.splitlines()[-1])


def campaign(folder: Path, *, cuts: int, seed: int) -> list[str]:
    """Cut the power at random moments; return one line per problem."""
    root, trace, states = traced(folder)
    events = [event for event in calls(trace) if any(str(root) in argument for argument in event[1])]
    full = Disk(root)
    for event in events:
        full.perform(*event)
    site = root / SITE
    _require_faithful(full.site, site)
    chance = random.Random(seed)  # noqa: S311
    moments = sorted(chance.randrange(len(events)) for _ in range(cuts))
    disk, performed, wrong = Disk(root), 0, []
    shutil.rmtree(site)
    for cut, moment in enumerate(moments):
        for event in events[performed:moment]:
            disk.perform(*event)
        performed = moment
        steps = disk.site.names.get("steps") if disk.site.names else None
        done = len(steps.names or ()) if steps else 0
        # Every fourth disk kept nothing that it did not have to keep.
        disk.after_a_cut(None if cut % 4 == 0 else chance, site)
        try:
            found = problems(site, states, done)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        wrong += [f"cut {cut} before call {moment} of {len(events)}, {done} steps done: {line}" for line in found]
        shutil.rmtree(site)
    return wrong


def _require_faithful(node: Node, path: Path) -> None:
    """Require that the replay of all calls ends with the files that the process left."""
    if node.names is None:
        if path.read_bytes() != node.data:
            raise RuntimeError(f"the replay differs from {path}")
        return
    left = {entry.name for entry in path.iterdir()}
    if left != set(node.names):
        raise RuntimeError(f"the replay of {path} has {sorted(node.names)}, not {sorted(left)}")
    for name, child in node.names.items():
        _require_faithful(child, path / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given: Any = parser.parse_args()
    sys.path.append(str(TESTS / "fixtures"))
    if given.work:
        work(given.work)
        return
    with tempfile.TemporaryDirectory(prefix="marc-power-cut-") as folder, suppress(BrokenPipeError):
        wrong = campaign(Path(folder), cuts=given.cuts, seed=given.seed)
        sys.stdout.write("\n".join([*wrong, f"{given.cuts} cuts, {len(wrong)} problems\n"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
