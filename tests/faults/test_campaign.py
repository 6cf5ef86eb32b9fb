"""A short fault campaign with trials of every kind; ``make test-faults`` runs two hundred trials."""

from pathlib import Path

import pytest
from campaign import run_campaign
from trials import table

pytestmark = [pytest.mark.slow, pytest.mark.spark, pytest.mark.timeout(1800), pytest.mark.xdist_group("s3")]

TRIALS, SEED = 22, 1


def test_after_any_fault_a_retry_ends_as_a_run_without_a_fault(tmp_path: Path) -> None:
    done = run_campaign(TRIALS, seed=SEED, folder=tmp_path)
    lines = "\n".join(trial.line(TRIALS) for trial in done if trial.bad)
    assert not lines, f"{lines}\n{table(done)}"
    assert len(done) == TRIALS
    assert sum(trial.struck for trial in done) > TRIALS // 2
    assert all(trial.reads > 0 and trial.rows > 0 for trial in done)
