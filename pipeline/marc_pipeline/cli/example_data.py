"""The command that writes example data: ``marc example``."""

from pathlib import Path
from typing import Annotated

import typer

from marc_pipeline.cli.options import Ds, Json, print_json, print_table
from marc_pipeline.config import parse_ds


def example(
    ds: Ds,
    folder: Annotated[Path, typer.Option(help="Output folder.")] = Path("data/example"),
    items: Annotated[int, typer.Option(min=50, help="Number of items on the first day.")] = 2000,
    as_json: Json = False,
) -> None:
    """Write an example catalogue for a date, and interactions. Existing files are kept."""
    from marc_pipeline.example.ratings import write_interactions
    from marc_pipeline.example.shop import write_catalogue

    catalogue = write_catalogue(folder / "catalogue", ds=parse_ds(ds), items=items)
    interactions = write_interactions(folder / "interactions.parquet", catalogue)
    if as_json:
        print_json({"catalogue": str(catalogue), "interactions": str(interactions)})
    else:
        print_table("Example data", ["", ""], [["catalogue", str(catalogue)], ["interactions", str(interactions)]])


COMMANDS = (example,)
