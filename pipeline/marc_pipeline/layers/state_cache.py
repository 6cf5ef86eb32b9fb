"""A cache on disk of the pooled states of texts at every layer; it stays usable if the process is killed."""

import fcntl
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.errors import UserError

DIGEST_BYTES = 16


class StateCache:
    """Pooled states of texts at every layer, in append-only files.

    ``layer-NNN.f32`` has float32 rows of one layer, ``index`` the digests of their texts in the same order. The index
    is written last: rows without an entry in the index are written again.

    Args:
        folder: created if missing; only one process at a time can open it.
        layers: number of layers, one file each.
        width: numbers per row.

    Raises:
        UserError: another process uses the folder.
    """

    def __init__(self, folder: Path, *, layers: int, width: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._row_bytes = 4 * width
        self._width = width
        self._lock = _locked(folder / "lock")
        self._index = folder / "index"
        self._layers = [folder / f"layer-{layer:03}.f32" for layer in range(layers)]
        for path in (self._index, *self._layers):
            path.touch()
        rows = min(
            self._index.stat().st_size // DIGEST_BYTES,
            *(path.stat().st_size // self._row_bytes for path in self._layers),
        )
        # A row that is missing in one file is useless in the others.
        os.truncate(self._index, rows * DIGEST_BYTES)
        for path in self._layers:
            os.truncate(path, rows * self._row_bytes)
        digests = self._index.read_bytes()
        self._places = {
            digests[at : at + DIGEST_BYTES]: at // DIGEST_BYTES for at in range(0, len(digests), DIGEST_BYTES)
        }
        self._rows = rows

    def close(self) -> None:
        """Release the lock on the folder."""
        self._lock.close()

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Return the texts without states, each once, in order."""
        return [text for text in dict.fromkeys(texts) if _text_digest(text) not in self._places]

    def append(self, texts: Sequence[str], states: NDArray[np.float32]) -> None:
        """Write the states [n, layers, width] of n missing texts."""
        for layer, path in enumerate(self._layers):
            _write_at(path, self._rows * self._row_bytes, np.ascontiguousarray(states[:, layer], "<f4").tobytes())
        digests = [_text_digest(text) for text in texts]
        _write_at(self._index, self._rows * DIGEST_BYTES, b"".join(digests))
        self._places.update((digest, self._rows + row) for row, digest in enumerate(digests))
        self._rows += len(digests)

    def read(self, layer: int, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return states [n, width] of texts in the cache, in order."""
        places = np.array([self._places[_text_digest(text)] for text in texts], np.int64)
        if not len(places):
            return np.empty((0, self._width), np.float32)
        rows = np.memmap(self._layers[layer], dtype="<f4", mode="r", shape=(self._rows, self._width))
        return np.array(rows[places], np.float32)


def _locked(path: Path) -> IO[bytes]:
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"{path.parent} is in use by another process; wait for it, or name another folder") from None
    return file


def _write_at(path: Path, offset: int, data: bytes) -> None:
    """Overwrite the rest of an interrupted write, and flush to disk."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _text_digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
