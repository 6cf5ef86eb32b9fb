"""Examples in Markdown pages: their code blocks, and a fresh folder in which their commands run as they are printed."""

import io
import os
import re
import runpy
import shlex
import sys
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from marc_pipeline.cli import main

# Commands that change the machine: a test checks that they exist, and runs none of them.
NOT_RUN = ("source", "make", "git", "cd", "pip", "pre-commit", "curl", "unzip", "mkdir", "export")


def pages(repository: Path) -> list[Path]:
    """The README and all documentation pages."""
    return [repository / "README.md", repository / "CONTRIBUTING.md", *sorted((repository / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Every command of the console blocks, split into words; comments are dropped."""
    lines = "".join(blocks(page, "console")).splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def prose(page: Path) -> list[str]:
    """The sentences of a page: no code, tables, headings or pictures."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = ("" if line.startswith(("|", "#", "!")) else line for line in text.splitlines())
    items = re.sub(r"^ *(-|\d+\.) ", "\n", "\n".join(lines), flags=re.MULTILINE)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", items))
    return [one for paragraph in paragraphs for one in re.split(r"(?<=[.!?:])\s+(?=[A-Z`])", paragraph) if one]


@dataclass
class Checkout:
    """A folder with what a fresh clone has; ``marc`` runs in this process, so that Spark and torch start once."""

    root: Path
    repository: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("marc.yaml", "examples"):
            (self.root / name).symlink_to(self.repository / name)

    def python(self, block: str, **names: object) -> dict[str, object]:
        """Run a Python block in the folder; returns its names."""
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.root)
            exec(block, names)  # noqa: S102 - the block of our own page
        return names

    def console(self, block: str) -> str:
        """Run every line of a console block; returns what all of them printed."""
        return "".join(self.line(line) for line in block.splitlines())

    def line(self, line: str) -> str:
        """Run one line; it must succeed."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.root)
            for name, value in self.env.items():
                patch.setenv(name, value)
            words = [os.path.expandvars(word) for word in shlex.split(line, comments=True)]
            if not words or words[0] in NOT_RUN:
                return ""
            patch.setattr(sys, "argv", words if words[0] == "marc" else words[1:])
            try:
                if words[0] == "marc":
                    main()
                else:
                    assert words[0] == "python", line
                    runpy.run_path(words[1], run_name="__main__")
            except SystemExit as stop:
                code = int(stop.code or 0)
        assert code == 0, f"{line}: exit code {code}\n{textwrap.indent(err.getvalue(), '  ')}"
        return out.getvalue()
