"""The command line ``marc``."""

from pipeline.cli.app import main

__all__ = ["main"]
