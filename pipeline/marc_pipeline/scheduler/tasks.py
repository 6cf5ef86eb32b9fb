"""Python tasks of the DAGs. Tasks exchange only paths, dates, ids and figures.

In all tasks, ``ds`` is a date, and ``config`` is the path of marc.yaml, empty for the default. A function imports its
packages when it is called, so that Airflow parses the DAG files quickly.
"""

import logging
from collections.abc import Sequence
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marc_pipeline.deployment import Deployment

log = logging.getLogger(__name__)


def identify_nightly(*, ds: str, config: str) -> dict[str, str]:
    """Return ds, configuration file and plan_id of a date, and the release_id if the plan is already published.

    Raises:
        UserError: bad date or configuration, no catalogue, no bundle.
    """
    from marc_pipeline.config import parse_ds
    from marc_pipeline.nightly.plan_identity import identify_plan
    from marc_pipeline.nightly.run import already_published

    deployment, path = _opened(config)
    identity = identify_plan(deployment, ds=parse_ds(ds))
    release = already_published(deployment, identity)
    published = release.release_id if release else ""
    return {"ds": ds, "config": path, "plan_id": identity.plan_id, "published": published}


def identify_backfills(
    *, first: str | None, last: str | None, buckets: Sequence[int], recompute: bool, config: str
) -> list[dict[str, Any]]:
    """Return ds, configuration file, plan_id and buckets of every date from first to last.

    Args:
        first: first date.
        last: last date; default: the first date.
        buckets: the buckets to replace; empty for whole dates.
        recompute: re-encode unchanged items as well.
        config: configuration file.

    Raises:
        UserError: bad dates or configuration, no bundle, or dates without a catalogue; the message lists the dates.
    """
    from marc_pipeline.config import parse_ds
    from marc_pipeline.errors import UserError
    from marc_pipeline.nightly.plan_identity import identify_plan

    if not first:
        raise UserError("the parameter first is empty: give the first date to backfill")
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
        facts = {"ds": day, "config": path, "plan_id": identity.plan_id, "recompute": recompute}
        # A date without a release is run whole, even if its release exists when the job is retried.
        found.append({**facts, "buckets": list(identity.chosen or ())})
    if problems:
        raise UserError(f"nothing was started: {'; '.join(problems)}")
    return found


def identify_training_run(*, ds: str, config: str) -> dict[str, str]:
    """Return ds, configuration file, training_id and the decided layers of a date's training.

    Raises:
        UserError: bad date or configuration, no catalogue, no interactions, or interactions that cannot be used.
    """
    from marc_pipeline.bundles.choices import LayerDecision, reviewed
    from marc_pipeline.config import parse_ds
    from marc_pipeline.training.training_set import identify_training, require_interactions

    opened, path = _opened(config)
    deployment, decision = reviewed(opened)
    train = deployment.settings.train
    identity = identify_training(deployment, ds=parse_ds(ds))
    require_interactions(deployment, identity)
    decided = LayerDecision(train.layers, train.pooling, decision)
    return {"ds": ds, "config": path, "training_id": identity.training_id, "decided": str(decided)}


def promote_training(*, config: str, training_id: str, decided: str) -> dict[str, Any]:
    """Promote the bundle of a training; return its comparison with the current bundle, without the single scores.

    Raises:
        GateRefused: the bundle is worse than the current one, or its vectors are unusable.
    """
    from marc_pipeline.bundles.choices import LayerDecision, as_decided
    from marc_pipeline.bundles.promotion import promote_stage
    from marc_pipeline.bundles.stages import trained_bundle

    opened, _ = _opened(config)
    deployment, _ = as_decided(opened, LayerDecision.parse(decided))
    comparison = promote_stage(deployment, training_id, trained_bundle(deployment, training_id))
    return comparison.model_dump(exclude={"scores"})


def vacuum_files(*, config: str) -> dict[str, Any]:
    """Retire releases beyond retention and delete their files; return the figures of the vacuum."""
    from marc_pipeline.releases.retention import vacuum

    deployment, _ = _opened(config)
    done = vacuum(deployment)
    retired, forgotten, files = list(done.retired), list(done.forgotten), len(done.files)
    log.info("vacuum: %d releases retired, %d forgotten, %d files deleted", len(retired), len(forgotten), files)
    return {"retired": retired, "forgotten": forgotten, "files": files, "bytes": done.bytes}


def release_facts(*, ds: str, config: str) -> dict[str, Any]:
    """Return the facts of a date's newest release, as ``marc run --json`` prints them."""
    from marc_pipeline.releases import log as release_log

    deployment, _ = _opened(config)
    return release_log.find_release(deployment.storage, deployment.settings.table_uri, ds=ds).facts()


def _opened(config: str) -> "tuple[Deployment, str]":
    """Open the deployment of a configuration; return the absolute path of its file for later tasks as well."""
    from marc_pipeline.config import config_path, load_settings
    from marc_pipeline.deployment import open_deployment

    path = config_path(config)
    return open_deployment(load_settings(path)), str(path)
