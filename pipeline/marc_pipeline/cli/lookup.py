"""The command that finds neighbours: ``marc lookup``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from marc_pipeline.cli.item_texts import item_texts, shortened
from marc_pipeline.cli.options import At, Json, MaybeDs, State, print_json, print_table
from marc_pipeline.cli.releases import open_chosen
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import UserError

if TYPE_CHECKING:
    from marc_pipeline.reader.release import OpenRelease

STANDARD_INPUT = Path("-")

ItemIds = Annotated[list[str] | None, typer.Option("--item", help="Find neighbours of this item (repeatable).")]
IdFile = Annotated[
    Path | None,
    typer.Option("--items", help="Find neighbours of the items in this file, one id per line; - reads standard input."),
]
Texts = Annotated[
    list[str] | None, typer.Option("--text", help="Find neighbours of this text (repeatable); needs the extra 'model'.")
]
VectorFile = Annotated[
    Path | None, typer.Option("--vector", help="Find neighbours of the vectors in this .npy file, [d] or [n, d].")
]
Within = Annotated[
    Path | None, typer.Option("--within", help="Return only items whose ids are in this file, one per line.")
]
Without = Annotated[
    Path | None, typer.Option("--without", help="Return no item whose id is in this file, one per line.")
]


def lookup(
    context: typer.Context,
    item: ItemIds = None,
    items: IdFile = None,
    text: Texts = None,
    vector: VectorFile = None,
    within: Within = None,
    without: Without = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours per query.")] = 10,
    rerank: Annotated[
        int,
        typer.Option(
            "--rerank",
            min=0,
            help="Number of candidates to rescore with the table's vectors; 0 keeps the index's scores.",
        ),
    ] = 0,
    ds: MaybeDs = None,
    at: At = None,
    as_json: Json = False,
) -> None:
    """Find the nearest items of items, texts or vectors."""
    deployment = context.ensure_object(State).deployment
    if sum(bool(option) for option in (item, items, text, vector)) != 1:
        raise UserError("give exactly one of --item, --items, --text and --vector; --item and --text may be repeated")
    if [items, within, without].count(STANDARD_INPUT) > 1:
        raise UserError("only one of --items, --within and --without can be standard input")
    ids = _ids(items, "--items") if items else item
    options: dict[str, Any] = {"rerank": rerank}
    if within:
        options["within"] = _ids(within, "--within")
    if without:
        options["without"] = _ids(without, "--without", may_be_empty=True)
    with open_chosen(deployment, ds, at) as release:
        k = min(k, len(release))
        if ids:
            asked, answer = ids, release.similar(ids, k, **options)
        elif text:
            from marc_pipeline.reader.texts import encode_texts

            vectors = encode_texts(release, text, settings=deployment.settings.encode)
            asked, answer = text, release.search(vectors, k, **options)
        else:
            vectors = _load(vector)
            asked = [f"row {row} of {vector}" for row in range(len(vectors))]
            answer = release.search(vectors, k, **options)
        found = [
            [(name, float(score)) for name, score in zip(names, scores, strict=True) if name is not None]
            for names, scores in zip(*answer, strict=True)
        ]
        _print(deployment, release, asked, found, as_json=as_json)


def _print(
    deployment: Deployment,
    release: "OpenRelease",
    asked: list[str],
    found: list[list[tuple[str, float]]],
    *,
    as_json: bool,
) -> None:
    texts = item_texts(deployment, release, {name for row in found for name, _ in row})
    if as_json:
        results = [[{"item_id": name, "score": score, "text": texts.get(name)} for name, score in row] for row in found]
        facts = {"release_id": release.facts.release_id, "ds": release.facts.ds}
        print_json({**facts, "queries": asked, "neighbours": results})
        return
    for query, row in zip(asked, found, strict=True):
        rows = [
            [str(rank), name, f"{score:.4f}", shortened(texts.get(name, ""))]
            for rank, (name, score) in enumerate(row, start=1)
        ]
        print_table(f"Nearest to {query}", ["rank", "item", "score", "text"], rows, right=(0, 2))


def _ids(path: Path, option: str, *, may_be_empty: bool = False) -> list[str]:
    """Item ids of a file, one per line; blank lines are skipped."""
    try:
        data = sys.stdin.buffer.read() if path == STANDARD_INPUT else path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{option} {path} is not UTF-8: byte {data[error.start]:#04x} in line {line}") from None
    # Ids may contain other line separators, so str.splitlines would break them.
    ids = [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line]
    if not ids and not may_be_empty:
        raise UserError(f"{option} {path} has no item ids; write one per line")
    return ids


def _load(path: Path | None) -> NDArray[np.float32]:
    try:
        loaded: Any = np.load(str(path), allow_pickle=False)
        vectors = np.atleast_2d(np.asarray(loaded, dtype=np.float32))
    except (OSError, EOFError, TypeError, ValueError) as error:
        raise UserError(f"--vector {path}: {error}") from None
    if not len(vectors):
        raise UserError(f"--vector {path} has no vectors")
    return vectors


COMMANDS = (lookup,)
