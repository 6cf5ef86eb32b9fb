"""spark-submit entry point of a backfill: all stages of one date, or of some of its buckets."""

from pipeline.entry import job
from pipeline.run import backfill

if __name__ == "__main__":
    with job(__doc__, backfill=True) as called:
        backfill(
            called.settings,
            ds=called.ds,
            buckets=called.buckets,
            recompute=called.recompute,
            expected=called.plan_id,
        )
