"""Shared by command line and jobs: logs on standard error, one clear line per error, exit codes."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deltalake.exceptions import DeltaError

from marc_pipeline.errors import PipelineError

log = logging.getLogger("marc_pipeline")


def configure_logging(*, verbose: bool = False) -> None:
    """Log to standard error as a timed outline; standard output belongs to results."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.getLogger("marc_pipeline").setLevel(logging.DEBUG if verbose else logging.INFO)
    # Progress bars and advice of the model libraries are noise in a nightly log.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextmanager
def reported_errors() -> Iterator[None]:
    """Turn a :class:`PipelineError` into one line and its exit code; errors of disk and store become one line too."""
    try:
        yield
    except PipelineError as error:
        log.error("%s", error)  # noqa: TRY400 - raised on purpose: the message says it all
        sys.exit(error.exit_code)
    except Exception as error:
        # Errors of boto3 share no base class, and boto3 is imported only where it is used.
        stores = type(error).__module__.startswith(("botocore.", "boto3."))
        if not stores and not isinstance(error, (OSError, ModuleNotFoundError, DeltaError)):
            raise
        log.error("%s: %s", type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))  # noqa: TRY400
        sys.exit(1)
