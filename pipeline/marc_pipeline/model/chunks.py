"""Long texts in chunks: groups of whole texts, and the mean of the states of their chunks, weighted by tokens."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# The states of this many chunks are in memory at a time, unless a single text has more.
CHUNKS_AT_ONCE = 512


def text_groups(counts: Sequence[int], at_once: int = CHUNKS_AT_ONCE) -> Iterator[slice]:
    """Yield slices of consecutive texts with at most ``at_once`` chunks together, or a single text.

    Args:
        counts: number of chunks of each text.
        at_once: limit of a group.
    """
    start = held = 0
    for text, count in enumerate(counts):
        if text > start and held + count > at_once:
            yield slice(start, text)
            start, held = text, 0
        held += count
    if counts:
        yield slice(start, len(counts))


def weighted_means(
    states: NDArray[np.float32], tokens: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return one state per text [n, ...]: the mean of the states of its chunks, weighted by their tokens.

    Args:
        states: of all chunks [c, ...], text after text.
        tokens: number of tokens of each chunk [c].
        counts: number of chunks of each text [n], at least 1.
    """
    starts = np.cumsum(counts) - counts
    shares = (tokens / np.repeat(np.add.reduceat(tokens, starts), counts)).astype(np.float32)
    weighted = states * shares.reshape(-1, *[1] * (states.ndim - 1))
    means: NDArray[np.float32] = np.add.reduceat(weighted, starts, axis=0)
    return means
