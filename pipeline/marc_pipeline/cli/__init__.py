"""The command line ``marc``."""

from marc_pipeline.cli.app import main

__all__ = ["main"]
