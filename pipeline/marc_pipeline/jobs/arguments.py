"""Arguments, logs, exit codes, deployment and session of the Spark jobs."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from marc_pipeline.config import load_settings, parse_ds
from marc_pipeline.deployment import Deployment, open_deployment
from marc_pipeline.entry import configure_logging, reported_errors

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclass(frozen=True)
class Job:
    """Arguments of a job.

    Attributes:
        plan_id, training_id: id that an earlier task of the run announced.
        decided: LAYERS:POOLING:DECISION, as the training run announced it; empty for a job that is started alone.
        buckets: buckets that a backfill replaces; empty for the whole date.
        recompute: whether a backfill re-encodes unchanged items as well.
    """

    deployment: Deployment
    ds: str
    plan_id: str = ""
    training_id: str = ""
    decided: str = ""
    buckets: tuple[int, ...] = ()
    recompute: bool = False


@contextmanager
def job(
    description: str | None,
    *,
    of: Literal["plan_id", "training_id"] = "plan_id",
    announced: bool = True,
    backfill: bool = False,
) -> Iterator[Job]:
    """Parse the arguments of a job, configure its logs and report its errors.

    Args:
        description: docstring of the job, for ``--help``.
        of: which id the job takes as an option.
        announced: whether this option is required.
        backfill: whether buckets can be chosen.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", help="configuration file (default: MARC_CONFIG, else marc.yaml)")
    parser.add_argument("--ds", required=True, help="date of the snapshot, YYYY-MM-DD")
    parser.add_argument(f"--{of.replace('_', '-')}", required=announced, default="", help="id that the run announced")
    if of == "training_id":
        parser.add_argument("--decided", default="", help="LAYERS:POOLING:DECISION, as the run announced it")
    if backfill:
        parser.add_argument("--bucket", type=int, action="append", default=[], help="replace only these buckets")
        parser.add_argument("--recompute", action="store_true", help="re-encode unchanged items as well")
    arguments = vars(parser.parse_args())
    configure_logging()
    with reported_errors():
        yield Job(
            deployment=open_deployment(load_settings(arguments["config"])),
            ds=parse_ds(arguments["ds"]),
            buckets=tuple(arguments.get("bucket", ())),
            recompute=arguments.get("recompute", False),
            decided=arguments.get("decided", ""),
            **{of: arguments[of]},
        )


@contextmanager
def spark_job(
    description: str | None, name: str, *, of: Literal["plan_id", "training_id"] = "plan_id", gpu_tasks: bool = False
) -> "Iterator[tuple[Job, SparkSession]]":
    """Call :func:`job` and start a Spark session.

    Args:
        description: docstring of the job, for ``--help``.
        name: name of the session, without the date.
        of: which id the job takes as an option.
        gpu_tasks: whether every task takes a whole GPU.
    """
    from marc_pipeline.spark.session import configured_session

    with (
        job(description, of=of) as called,
        configured_session(called.deployment.settings, name=f"marc {name} {called.ds}", gpu_tasks=gpu_tasks) as spark,
    ):
        yield called, spark
