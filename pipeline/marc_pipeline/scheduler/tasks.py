"""What the Python tasks of the DAGs do. Only paths, dates, ids and figures pass from task to task.

A function imports what it needs when it is called, so that Airflow parses the DAG files quickly.
"""

import logging
from collections.abc import Sequence
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marc_pipeline.deployment import Deployment

log = logging.getLogger(__name__)


def identify_night(*, ds: str, config: str) -> dict[str, str]:
    """Name the plan of a date: ds, configuration, plan_id, and the release if the plan is published already.

    Args:
        ds: date of the snapshot.
        config: configuration file; empty for the default.

    Raises:
        UserError: bad date or configuration, no catalogue, no bundle.
    """
    from marc_pipeline.config import parse_ds
    from marc_pipeline.nightly.plan_identity import identify_plan
    from marc_pipeline.nightly.run import already_published

    deployment, path = _opened(config)
    identity = identify_plan(deployment, ds=parse_ds(ds))
    release = already_published(deployment, identity)
    return {
        "ds": ds,
        "config": path,
        "plan_id": identity.plan_id,
        "published": release.release_id if release else "",
    }


def identify_backfills(
    *, first: str | None, last: str | None, buckets: Sequence[int], recompute: bool, config: str
) -> list[dict[str, Any]]:
    """Name the plan of every date from first to last: ds, configuration, plan_id and buckets.

    Args:
        first: first date.
        last: last date; empty: the first date alone.
        buckets: the buckets to replace; empty for whole dates.
        recompute: compute vectors of unchanged texts as well.
        config: configuration file; empty for the default.

    Raises:
        UserError: bad dates or configuration, no bundle, or dates without a catalogue, all of which are named.
    """
    from marc_pipeline.config import parse_ds
    from marc_pipeline.errors import UserError
    from marc_pipeline.nightly.plan_identity import identify_plan

    if not first:
        raise UserError("give the first date to backfill")
    deployment, path = _opened(config)
    start, end = date.fromisoformat(parse_ds(first)), date.fromisoformat(parse_ds(last or first))
    if end < start:
        raise UserError(f"the last date, {last}, is before the first, {first}")
    found, problems = [], []
    for day in ((start + timedelta(days=n)).isoformat() for n in range((end - start).days + 1)):
        try:
            identity = identify_plan(deployment, ds=day, chosen=buckets, recompute=recompute)
        except UserError as error:
            problems.append(f"{day}: {error}")
            continue
        facts = {"ds": day, "config": path, "plan_id": identity.plan_id}
        # A date without a release is run whole, also when the job is retried and the release exists by then.
        found.append({**facts, "buckets": list(identity.chosen or ()), "recompute": recompute})
    if problems:
        raise UserError(f"nothing was started: {'; '.join(problems)}")
    return found


def identify_training_run(*, ds: str, config: str) -> dict[str, str]:
    """Name the training set of a date: ds, configuration, training_id, and what was decided about layers.

    Args:
        ds: date of the catalogue.
        config: configuration file; empty for the default.

    Raises:
        UserError: bad date or configuration, no catalogue, no interactions.
    """
    from marc_pipeline.bundles.choices import LayerDecision, reviewed
    from marc_pipeline.config import parse_ds
    from marc_pipeline.training.training_set import identify_training

    opened, path = _opened(config)
    deployment, decision = reviewed(opened)
    train = deployment.settings.train
    training_id = identify_training(deployment, ds=parse_ds(ds)).training_id
    decided = LayerDecision(train.layers, train.pooling, decision)
    return {"ds": ds, "config": path, "training_id": training_id, "decided": str(decided)}


def promote_training(*, config: str, training_id: str, decided: str) -> dict[str, Any]:
    """Promote the bundle that a training made.

    Returns:
        The comparison with the current bundle, without the single scores.

    Raises:
        GateRefused: the bundle is worse than the current one, or its vectors are not sound.
    """
    from marc_pipeline.bundles.choices import LayerDecision, as_decided
    from marc_pipeline.bundles.promotion import promote_stage
    from marc_pipeline.bundles.stages import trained_bundle

    opened, _ = _opened(config)
    deployment, _ = as_decided(opened, LayerDecision.parse(decided))
    comparison = promote_stage(deployment, training_id, trained_bundle(deployment, training_id))
    return comparison.model_dump(exclude={"scores"})


def vacuum_files(*, config: str) -> dict[str, Any]:
    """Vacuum: retire releases beyond retention and delete what is no longer needed; returns its figures."""
    from marc_pipeline.releases.retention import vacuum

    deployment, _ = _opened(config)
    done = vacuum(deployment)
    log.info(
        "vacuum: %d releases retired, %d forgotten, %d files removed",
        *map(len, (done.retired, done.forgotten, done.files)),
    )
    return {
        "retired": list(done.retired),
        "forgotten": list(done.forgotten),
        "files": len(done.files),
        "bytes": done.bytes,
    }


def release_facts(*, ds: str, config: str) -> dict[str, Any]:
    """Facts of the newest release of a date, as ``marc run --json`` prints them."""
    from marc_pipeline.releases import log as release_log

    deployment, _ = _opened(config)
    return release_log.find_release(deployment.storage, deployment.settings.table_uri, ds=ds).facts()


def _opened(config: str) -> "tuple[Deployment, str]":
    """The deployment of a configuration, and the absolute path of its file for the tasks that follow."""
    from marc_pipeline.config import config_path, load_settings
    from marc_pipeline.deployment import open_deployment

    path = config_path(config)
    return open_deployment(load_settings(path)), str(path)
