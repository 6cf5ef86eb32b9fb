"""A child process of the campaign that runs ``marc`` commands, one JSON line each.

``spark`` keeps one session and its Python workers open, so a command has no start-up time. ``fork`` has imported every
module that needs no Spark, and runs each command in a child process of its own.
"""

import io
import json
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from marc_pipeline.cli.app import main as marc
from marc_pipeline.config import load_settings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.entry import configure_logging, reported_errors
from marc_pipeline.nightly import stages

# Commands beside those of ``marc``: CONFIG DS [BUCKET …], and CONFIG PLAN_ID.
PREPARE, RELEASE = "@prepare", "@release"
ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)


def answer(**facts: Any) -> None:
    ANSWERS.write(json.dumps(facts) + "\n")


def perform(arguments: Sequence[str]) -> int:
    """Run a command; returns its exit code. Output goes to standard error."""
    try:
        if arguments[0] in {PREPARE, RELEASE}:
            configure_logging()
            with reported_errors():
                (prepare if arguments[0] == PREPARE else release)(*arguments[1:])
        else:
            sys.argv = ["marc", *arguments]
            marc()
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def prepare(config: str, ds: str, *buckets: str) -> None:
    """Run the stages before the index."""
    from marc_pipeline.nightly.plan_identity import identify_plan
    from marc_pipeline.spark.session import spark_session

    deployment = open_deployment(load_settings(config))
    identity = identify_plan(deployment, ds=ds, chosen=[int(bucket) for bucket in buckets])
    with spark_session(deployment.settings.spark, name="prepare") as spark:
        stages.plan_stage(spark, deployment, identity)
        stages.encode_stage(spark, deployment, identity.plan_id)
        stages.audit_stage(spark, deployment, identity.plan_id)


def release(config: str, plan_id: str) -> None:
    """Run the index and release stages, as the last two tasks of a nightly run."""
    deployment = open_deployment(load_settings(config))
    stages.index_stage(deployment, plan_id)
    stages.release_stage(deployment, plan_id)


def serve_spark(config: str) -> None:
    from marc_pipeline.spark.session import spark_session

    with spark_session(load_settings(config).spark, name="faults"):
        answer(ready=True)
        for line in sys.stdin:
            said = io.StringIO()
            with redirect_stdout(io.StringIO()), redirect_stderr(said):
                code = perform(json.loads(line)["arguments"])
            answer(code=code, said=said.getvalue())


def serve_forks() -> None:
    # Only imported here: modules that start threads run in the children.
    from marc_pipeline.reader import verify  # noqa: F401

    answer(ready=True)
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            output = os.open(command["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = perform(command["arguments"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        answer(pid=child)
        _, status = os.waitpid(child, 0)
        answer(code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    os.dup2(2, 1)
    if sys.argv[1] == "spark":
        serve_spark(sys.argv[2])
    else:
        serve_forks()
