"""The ``marc`` application: its commands and what is common to them."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from marc_pipeline.cli import layers, learn, lookup, make, read
from marc_pipeline.cli.options import State, print_lines
from marc_pipeline.config import CONFIG_VARIABLE, DEFAULT_CONFIG
from marc_pipeline.entry import configure_logging, reported_errors

app = typer.Typer(
    name="marc",
    help="Offline embedding precompute: item catalogue to MARC vectors in Parquet, with a FAISS index.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    # Rich treats [n, d] in a help text as markup and drops it.
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print_lines([f"marc-pipeline {version('marc-pipeline')}"])
        raise typer.Exit


@app.callback()
def common(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help=f"Configuration file; default: {CONFIG_VARIABLE}, else {DEFAULT_CONFIG}."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""
    configure_logging(verbose=verbose)
    context.obj = State(config=config)


app.command()(make.plan)
app.command()(make.run)
app.command()(make.backfill)
app.command()(make.rollback)
app.command()(make.vacuum)
app.command()(learn.train)
app.command()(learn.evaluate)
app.command()(learn.promote)
app.command()(learn.demote)
app.command()(layers.layers)
app.command()(layers.scores)
app.command()(layers.mteb)
app.command()(make.example)
app.command()(read.files)
app.command()(lookup.lookup)
app.command()(read.verify)
app.command()(read.releases)
app.command()(read.summary)


def main() -> None:
    """Run ``marc``; errors raised on purpose end in one line and their exit code."""
    with reported_errors():
        app()
