"""spark-submit entry point of the release stage."""

from pipeline.entry import job
from pipeline.run import release_stage

if __name__ == "__main__":
    with job(__doc__) as called:
        release_stage(called.settings, called.plan_id)
