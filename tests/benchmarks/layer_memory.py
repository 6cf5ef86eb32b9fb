"""How much memory it takes to judge every layer of a backbone, and how long.

    python tests/benchmarks/layer_memory.py [--layers 48] [--texts 10000] [--width 1024] [--block 500] [--views 4]
        [--tokens 16]

Synthetic hidden states of all layers and the embeddings go through ``LayerMoments`` block by block, with the entropy
and the curvature of every text's tokens; at the end all figures of all layers are taken. Beside the highest memory of
the process stands what its sums take, and what the vectors would take if they were held (float32).
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from marc_pipeline.layers.curvature import curvature
from marc_pipeline.layers.entropy import prompt_entropy
from marc_pipeline.layers.moments import LayerMoments

VIEW_NOISE = 0.3


@dataclass(frozen=True)
class Measured:
    """MB are 2^20 bytes; ``held`` is every pooled vector and view of every layer, ``tokens_held`` every token too."""

    before_mb: float
    peak_mb: float
    sums_mb: float
    held_mb: float
    tokens_held_mb: float
    add_seconds: float
    figures_seconds: float
    figures: list[dict[str, float]]


def measure(arguments: argparse.Namespace) -> Measured:
    layers, texts, width = arguments.layers + 1, arguments.texts, arguments.width
    before, started = peak_mb(), time.monotonic()
    moments = [LayerMoments(width) for _ in range(layers)]
    for block, start in enumerate(range(0, texts, arguments.block)):
        n = min(arguments.block, texts - start)
        for layer, gathered in enumerate(moments):
            draw = torch.Generator().manual_seed(block * layers + layer)
            pooled = torch.randn(n, width, generator=draw)
            views = pooled[:, None] + VIEW_NOISE * torch.randn(n, arguments.views, width, generator=draw)
            figures = None
            if arguments.tokens:
                tokens = torch.randn(n, arguments.tokens, width, generator=draw)
                counts = torch.full((n,), float(arguments.tokens))
                figures = torch.stack([prompt_entropy(tokens), counts, curvature(tokens)], dim=1)
            gathered.add(pooled, figures, views, block=block)
    added = time.monotonic()
    found = [gathered.figures() for gathered in moments]
    ended = time.monotonic()
    number = layers * texts * width * 4 / 2**20
    return Measured(
        before_mb=before,
        peak_mb=peak_mb(),
        sums_mb=sum(nbytes(gathered) for gathered in moments) / 2**20,
        held_mb=number * (1 + arguments.views),
        tokens_held_mb=number * (1 + arguments.views + arguments.tokens),
        add_seconds=added - started,
        figures_seconds=ended - added,
        figures=found,
    )


def nbytes(moments: LayerMoments) -> int:
    return sum(tensor.nbytes for tensor in moments.tensors().values())


def peak_mb() -> float:
    """Not getrusage's figure: a process inherits that from the one that started it."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main() -> None:
    arguments = parse()
    found = measure(arguments)
    show(found, arguments, Console(width=150))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(found), indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48, help="beside the embeddings")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--block", type=int, default=500, help="texts at once")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16, help="of each text; 0 leaves them out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as well")
    return parser.parse_args()


def show(found: Measured, arguments: argparse.Namespace, console: Console) -> None:
    title = (
        f"{arguments.layers} layers and the embeddings, width {arguments.width:,}; {arguments.texts:,} texts\n"
        f"in blocks of {arguments.block:,}, {arguments.views} views and {arguments.tokens} tokens each; "
        f"threads: {torch.get_num_threads()}"
    )
    table = Table(title=title, title_justify="left", min_width=80)
    table.add_column("")
    table.add_column("MB", justify="right")
    table.add_column("seconds", justify="right")
    table.add_row("highest memory before", f"{found.before_mb:,.0f}", "")
    table.add_row("adding all blocks", "", f"{found.add_seconds:,.1f}")
    table.add_row("figures of all layers", "", f"{found.figures_seconds:,.1f}")
    table.add_row("highest memory after", f"{found.peak_mb:,.0f}", f"{found.add_seconds + found.figures_seconds:,.1f}")
    table.add_row("  of this, the sums", f"{found.sums_mb:,.0f}", "")
    table.add_section()
    table.add_row("all vectors and views held, float32", f"{found.held_mb:,.0f}", "")
    table.add_row("and all tokens", f"{found.tokens_held_mb:,.0f}", "")
    console.print(table)


if __name__ == "__main__":
    main()
