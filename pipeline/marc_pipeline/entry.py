"""Entry points of command line and jobs: logging to standard error, one line per error, exit codes."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from deltalake.exceptions import DeltaError

from marc_pipeline.errors import PipelineError

log = logging.getLogger("marc_pipeline")
CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
"""Characters that would move the cursor or change the colours of a terminal, with their replacements."""


def visible(text: str) -> str:
    """Return a text that shows control characters, which ids and texts of a catalogue may contain."""
    return text.translate(CONTROL)


class _VisibleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def configure_logging(*, verbose: bool = False) -> None:
    """Log to standard error with times; results go to standard output."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_VisibleFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("marc_pipeline").setLevel(logging.DEBUG if verbose else logging.INFO)
    # Progress bars and hints of the model libraries do not belong in a nightly log.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextmanager
def reported_errors() -> Iterator[None]:
    """Log a :class:`PipelineError`, or an error of disk or store, in one line and exit with its code."""
    try:
        yield
    except PipelineError as error:
        log.error("%s", error)  # noqa: TRY400 - a deliberate error needs no traceback
        sys.exit(error.exit_code)
    except Exception as error:
        # Errors of boto3 have no common base class, and boto3 is imported only where it is used.
        stores = type(error).__module__.startswith(("botocore.", "boto3."))
        if not stores and not isinstance(error, (OSError, ModuleNotFoundError, DeltaError)):
            raise
        log.error("%s: %s", type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))  # noqa: TRY400
        sys.exit(1)
