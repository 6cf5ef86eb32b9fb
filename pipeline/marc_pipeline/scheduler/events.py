"""The asset that a DAG updates when a release is published; the event carries the facts of the release."""

from airflow.sdk import Asset, Metadata

from marc_pipeline.scheduler.tasks import release_facts

ITEM_VECTORS = Asset("item_vectors", extra={"what": "MARC vectors of the item catalogue: table, index and bundle"})


def release_event(*, ds: str, config: str) -> Metadata:
    """Return the facts of a date's newest release, for DAGs that the asset triggers."""
    return Metadata(ITEM_VECTORS, extra=release_facts(ds=ds, config=config))
