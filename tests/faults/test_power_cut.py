"""Power cuts at random moments; ``python tests/faults/power_cut.py`` makes five hundred."""

import shutil
from pathlib import Path

import pytest
from power_cut import campaign

CUTS = 40


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_no_acknowledged_release_is_lost_and_every_log_opens(tmp_path: Path) -> None:
    wrong = campaign(tmp_path, cuts=CUTS, seed=1)
    assert not wrong, "\n".join(wrong)
