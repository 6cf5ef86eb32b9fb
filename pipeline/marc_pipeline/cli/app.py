"""The ``marc`` application: the list of commands, the common options, and the entry point."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from marc_pipeline.cli import example_data, layers, lookup, publishing, releases, training
from marc_pipeline.cli.options import State, print_lines
from marc_pipeline.config import CONFIG_VARIABLE, DEFAULT_CONFIG
from marc_pipeline.entry import configure_logging, reported_errors

app = typer.Typer(
    name="marc",
    help="Encode an item catalogue into MARC vectors: a Parquet feature table with a FAISS index.",
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
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show debug messages in the log.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""
    configure_logging(verbose=verbose)
    context.obj = State(config=config)


for group in (publishing, training, layers, example_data, releases, lookup):
    for command in group.COMMANDS:
        app.command()(command)


def main() -> None:
    """Run ``marc``. A known error prints one line and sets its exit code."""
    with reported_errors():
        app()
