"""Measure memory and time of the layer metrics for every layer of a backbone.

    python tests/benchmarks/layer_memory.py [--layers 48] [--texts 10000] [--width 1024] [--block 500] [--views 4]
        [--tokens 16]

Synthetic hidden states of all layers and of the embeddings go through ``LayerMoments`` block by block, with entropy
and curvature of every text's tokens. In the end all figures of all layers are computed. The table compares the peak
memory of the process with the size of its sums and with the size of all vectors in float32. ``--layers`` does not
count the embeddings; ``--tokens 0`` skips entropy and curvature.
"""

import argparse
from dataclasses import asdict, dataclass
from time import monotonic

import torch
from measuring import options, show, write_json
from processes import memory_mb

from marc_pipeline.layers.curvature import curvature
from marc_pipeline.layers.entropy import prompt_entropy
from marc_pipeline.layers.moments import LayerMoments

VIEW_NOISE = 0.3
PEAK = "VmHWM"


@dataclass(frozen=True)
class Measured:
    """MB of 2^20 bytes and seconds; ``held`` counts all pooled vectors and views, ``tokens_held`` also all tokens."""

    before_mb: float
    peak_mb: float
    sums_mb: float
    held_mb: float
    tokens_held_mb: float
    add_seconds: float
    figures_seconds: float
    figures: list[dict[str, float]]


def measure(given: argparse.Namespace) -> Measured:
    layers, texts, width = given.layers + 1, given.texts, given.width
    before, started = memory_mb(PEAK), monotonic()
    moments = [LayerMoments(width) for _ in range(layers)]
    for block, start in enumerate(range(0, texts, given.block)):
        n = min(given.block, texts - start)
        for layer, gathered in enumerate(moments):
            draw = torch.Generator().manual_seed(block * layers + layer)
            pooled = torch.randn(n, width, generator=draw)
            views = pooled[:, None] + VIEW_NOISE * torch.randn(n, given.views, width, generator=draw)
            figures = None
            if given.tokens:
                tokens = torch.randn(n, given.tokens, width, generator=draw)
                counts = torch.full((n,), float(given.tokens))
                figures = torch.stack([prompt_entropy(tokens), counts, curvature(tokens)], dim=1)
            gathered.add(pooled, figures, views, block=block)
    added = monotonic()
    found = [gathered.figures() for gathered in moments]
    ended = monotonic()
    one_vector_each = layers * texts * width * 4 / 2**20
    return Measured(
        before_mb=before,
        peak_mb=memory_mb(PEAK),
        sums_mb=sum(tensor.nbytes for gathered in moments for tensor in gathered.tensors().values()) / 2**20,
        held_mb=one_vector_each * (1 + given.views),
        tokens_held_mb=one_vector_each * (1 + given.views + given.tokens),
        add_seconds=added - started,
        figures_seconds=ended - added,
        figures=found,
    )


def main() -> None:
    given = options(__doc__, layers=48, texts=10_000, width=1024, block=500, views=4, tokens=16)
    found = measure(given)
    rows = [
        ("peak memory before", found.before_mb, None),
        ("adding all blocks", None, found.add_seconds),
        ("figures of all layers", None, found.figures_seconds),
        ("peak memory after", found.peak_mb, found.add_seconds + found.figures_seconds),
        ("  of this, the sums", found.sums_mb, None),
        (),
        ("all vectors and views in float32", found.held_mb, None),
        ("the same with all tokens", found.tokens_held_mb, None),
    ]
    title = (
        f"{given.layers} layers and the embeddings, width {given.width:,}; {given.texts:,} texts in blocks of "
        f"{given.block:,}, {given.views} views and {given.tokens} tokens each; {torch.get_num_threads()} threads"
    )
    show(title, "|MB:,.0f|seconds:,.1f", rows)
    write_json(given.json, asdict(found))


if __name__ == "__main__":
    main()
