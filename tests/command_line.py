"""Runs ``marc`` in this process, on the site below a folder."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pipeline.cli.app import app


def marc(root: Path, *arguments: str, stdin: bytes | None = None) -> Result:
    """What ``marc`` prints and raises; the configuration is written below ``root`` at the first call."""
    config = root / "marc.yaml"
    if not config.exists():
        config.write_text(f'root: {root}\ncatalogue: {{uri: "none/{{ds}}.csv", template: "{{title}}"}}\n')
    with pytest.MonkeyPatch.context() as patch:
        # The log would go on to the runner's standard error when that is closed.
        patch.setattr("pipeline.cli.app.configure_logging", lambda **_: None)
        return CliRunner().invoke(app, ["--config", str(config), *arguments], input=stdin)
