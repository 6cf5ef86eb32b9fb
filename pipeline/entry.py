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
from pydantic import TypeAdapter

from pipeline.config import DEFAULT_CONFIG, Settings, load_settings, parse_ds
from pipeline.errors import PipelineError, UserError
from schemas.bundle import Pooling
from schemas.layers import Decision

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
    except Exception as error:
        # boto3's errors have no base that Python knows, and boto3 is only there where it is used.
        stores = type(error).__module__.startswith(("botocore.", "boto3."))
        if not stores and not isinstance(error, (OSError, ModuleNotFoundError, DeltaError)):
            raise
        log.error("%s: %s", type(error).__name__, error, exc_info=log.isEnabledFor(logging.DEBUG))  # noqa: TRY400
        sys.exit(1)


@dataclass(frozen=True)
class Job:
    """What a spark-submit entry point was called with.

    Attributes:
        settings: the configuration.
        ds: date of the snapshot.
        plan_id: of a night or a backfill; training_id: of a training.
        decided: by a training when it began: layers to keep (None: clicks choose), pooling, and what decided.
        buckets: that a backfill replaces; empty for the whole day.
        recompute: whether a backfill computes vectors of unchanged texts as well.
    """

    settings: Settings
    ds: str
    plan_id: str = ""
    training_id: str = ""
    decided: tuple[int | None, Pooling, Decision] | None = None
    buckets: tuple[int, ...] = ()
    recompute: bool = False


def parse_decided(text: str) -> tuple[int | None, Pooling, Decision]:
    """What a training decided when it began, from ``LAYERS:POOLING:DECISION``; 0 layers: clicks choose.

    Raises:
        UserError: it is something else.
    """
    try:
        layers, pooling, decision = text.split(":")
        return (
            int(layers) or None,
            TypeAdapter[Pooling](Pooling).validate_python(pooling),
            (TypeAdapter[Decision](Decision).validate_python(decision)),
        )
    except ValueError:
        raise UserError(
            f"--decided {text!r} is not LAYERS:POOLING:DECISION, as `identify` of marc_train hands it on"
        ) from None


@contextmanager
def job(
    description: str | None,
    *,
    of: Literal["plan_id", "training_id"] = "plan_id",
    announced: bool = True,
    backfill: bool = False,
) -> Iterator[Job]:
    """Arguments, logging and error reporting of a spark-submit entry point.

    Args:
        description: the module docstring of the job.
        of: what the run announced.
        announced: whether it must have.
        backfill: whether buckets can be chosen.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="configuration file (default: %(default)s)")
    parser.add_argument("--ds", required=True, help="date of the snapshot, YYYY-MM-DD")
    parser.add_argument(f"--{of.replace('_', '-')}", required=announced, default="", help="what the run announced")
    if of == "training_id":
        parser.add_argument("--decided", default="", help="layers and pooling, as the run decided when it began")
    if backfill:
        parser.add_argument("--bucket", type=int, action="append", default=[], help="replace only these buckets")
        parser.add_argument("--recompute", action="store_true", help="compute vectors of unchanged texts as well")
    arguments = vars(parser.parse_args())
    configure_logging()
    with reported_errors():
        yield Job(
            settings=load_settings(arguments["config"]),
            ds=parse_ds(arguments["ds"]),
            buckets=tuple(arguments.get("bucket", ())),
            recompute=arguments.get("recompute", False),
            decided=parse_decided(arguments["decided"]) if arguments.get("decided") else None,
            **{of: arguments[of]},
        )
