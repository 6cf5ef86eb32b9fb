"""Settings and a release that the tests of the plan stage share."""

from pathlib import Path

import pytest

import planning
from marc_pipeline.config import Settings
from marc_schemas.release import Release
from plan_cases import BEFORE, TODAY, write_day
from planning import settings_at


@pytest.fixture
def wanted(tmp_path: Path) -> Settings:
    """Settings with the catalogue of today."""
    return settings_at(tmp_path, write_day(tmp_path, TODAY))


@pytest.fixture
def live(wanted: Settings) -> Release:
    """A release of the planned date with the items of before."""
    return planning.publish(wanted, BEFORE)
