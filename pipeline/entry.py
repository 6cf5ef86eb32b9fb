"""What every entry point does around the work: logs on standard error, one clear line per error, exit codes."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from deltalake.exceptions import DeltaError

from pipeline.config import DEFAULT_CONFIG, Settings, load_settings, parse_ds
from pipeline.errors import PipelineError

log = logging.getLogger("pipeline")


def configure_logging(*, verbose: bool = False) -> None:
    """Log to standard error as a timed outline; standard output belongs to results."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.getLogger("pipeline").setLevel(logging.DEBUG if verbose else logging.INFO)
    # Progress bars and advice of the model libraries are noise in a nightly log.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn a :class:`PipelineError` into one line and its exit code; what machine or store did in one line too."""
    try:
        yield
    except PipelineError as error:
        log.error("%s", error)  # noqa: TRY400 - raised on purpose: the message says it all
        sys.exit(error.exit_code)
    except (OSError, ModuleNotFoundError, DeltaError) as error:
        log.error("%s: %s", type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))  # noqa: TRY400
        sys.exit(1)


@dataclass(frozen=True)
class Job:
    """What a spark-submit entry point was called with: ``plan_id`` of a night, or ``training_id`` of a training."""

    settings: Settings
    ds: str
    plan_id: str = ""
    training_id: str = ""


@contextmanager
def job(description: str | None, *, of: Literal["plan_id", "training_id"] = "plan_id") -> Iterator[Job]:
    """Arguments, logging and error reporting of a spark-submit entry point.

    Args:
        description: the module docstring of the job.
        of: what the run announced.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="configuration file (default: %(default)s)")
    parser.add_argument("--ds", required=True, help="date of the snapshot, YYYY-MM-DD")
    parser.add_argument(f"--{of.replace('_', '-')}", required=True, help="what the run announced")
    arguments = parser.parse_args()
    configure_logging()
    with reported_errors():
        yield Job(settings=load_settings(arguments.config), ds=parse_ds(arguments.ds), **{of: getattr(arguments, of)})
