"""Events below a folder, from the kernel's inotify: each is a moment for a fault."""

import ctypes
import os
import select
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

CLOSE_WRITE, MOVED_TO, CREATE, DELETE, IS_DIR = 0x8, 0x80, 0x100, 0x200, 0x40000000
HEAD = struct.Struct("iIII")
LIBC = ctypes.CDLL(None, use_errno=True)


class TreeEvents:
    """Counts files that are created, written or deleted below a folder, and calls back at one of these events.

    Args:
        root: the folder; new folders in it are followed.
        at: number of the event of the call, from 1; None: only count.
        action: function that is called at that event.
    """

    url = ""

    def __init__(self, root: Path, *, at: int | None = None, action: Callable[[], None] | None = None) -> None:
        self.count = 0
        self._at, self._action = at, action
        self._folders: dict[int, Path] = {}
        self._queue = LIBC.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._queue < 0:
            raise OSError(ctypes.get_errno(), "inotify is not available")
        self._ended, self._end = os.pipe()
        self._follow(root, seen=True)
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._end, b".")
        self._thread.join()
        for number in (self._queue, self._ended, self._end):
            os.close(number)

    def _follow(self, folder: Path, *, seen: bool) -> None:
        mask = CLOSE_WRITE | MOVED_TO | CREATE | DELETE
        number = LIBC.inotify_add_watch(self._queue, os.fsencode(folder), mask)
        if number < 0:
            return
        self._folders[number] = folder
        with suppress(OSError):
            for entry in list(os.scandir(folder)):
                if not seen:
                    # The entry was created before the watch.
                    self._happened()
                if entry.is_dir(follow_symlinks=False):
                    self._follow(Path(entry.path), seen=seen)

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._queue, self._ended], [], [])
            if self._ended in ready:
                return
            data = os.read(self._queue, 1 << 16)
            place = 0
            while place < len(data):
                watch, mask, _, length = HEAD.unpack_from(data, place)
                name = data[place + HEAD.size : place + HEAD.size + length].rstrip(b"\0")
                place += HEAD.size + length
                self._happened()
                if mask & IS_DIR and mask & (CREATE | MOVED_TO) and watch in self._folders:
                    self._follow(self._folders[watch] / os.fsdecode(name), seen=False)

    def _happened(self) -> None:
        self.count += 1
        if self.count == self._at and self._action:
            self._action()
