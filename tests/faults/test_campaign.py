"""The short fault campaign: some trials of every kind, seeded; ``make test-faults`` goes through two hundred."""

from pathlib import Path

import pytest
from campaign import run_campaign, table

pytestmark = [pytest.mark.slow, pytest.mark.spark, pytest.mark.timeout(1800)]

TRIALS, SEED = 22, 1


def test_whatever_is_struck_a_retry_leaves_what_an_undisturbed_run_leaves(tmp_path: Path) -> None:
    done = run_campaign(TRIALS, seed=SEED, folder=tmp_path)
    lines = "\n".join(trial.line(TRIALS) for trial in done if trial.bad)
    assert not lines, f"{lines}\n{table(done)}"
    assert len(done) == TRIALS
    assert sum(trial.struck for trial in done) > TRIALS // 2
    assert all(trial.reads > 0 and trial.rows > 0 for trial in done)
