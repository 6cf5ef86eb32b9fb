"""spark-submit entry point of the index stage."""

from pipeline.entry import job
from pipeline.run import index_stage

if __name__ == "__main__":
    with job(__doc__) as called:
        index_stage(called.settings, called.plan_id)
