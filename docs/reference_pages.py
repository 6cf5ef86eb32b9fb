"""Sphinx extension: reference pages from the settings, the command line and the error classes.

The directives ``settings-reference``, ``command-reference`` and ``error-reference`` insert Markdown that is generated
from the code at build time. Therefore the pages never differ from the program.
"""

from collections.abc import Callable
from inspect import cleandoc
from typing import Any, Literal, get_args, get_origin

import typer
from docutils import nodes
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from marc_pipeline import errors
from marc_pipeline.cli.app import app
from marc_pipeline.config import Settings

BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def settings_reference() -> str:
    """One table per section of the configuration, one row per key.

    Raises:
        ValueError: a key has no description.
    """
    top = {name: field for name, field in Settings.model_fields.items() if _section(field) is None}
    parts = ["## Top level", _settings_table("", top)]
    for name, field in Settings.model_fields.items():
        section = _section(field)
        if section is not None:
            lead = cleandoc(section.__doc__ or "").split("\n\n")[0]
            parts += [f"## {name}", lead, _settings_table(f"{name}.", section.model_fields)]
    return "\n\n".join(parts) + "\n"


def _settings_table(prefix: str, fields: dict[str, FieldInfo]) -> str:
    """The table of one section."""
    lines = ["| key | default | values | description |", "|---|---|---|---|"]
    for name, field in fields.items():
        if not field.description:
            raise ValueError(f"the setting {prefix}{name} has no description; add Field(description=...)")
        cells = (f"`{prefix}{name}`", _default(field), _values(field), field.description)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a section; None for a plain key."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _default(field: FieldInfo) -> str:
    """The default of a key as YAML would spell it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{value}`".lower()
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _values(field: FieldInfo) -> str:
    """The type of a key, or its choices, and its limits."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{kind}`" for kind in kinds)
    kind = field.annotation if get_origin(field.annotation) in {tuple, dict} else kinds[0]
    name = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    limits = [
        f"{sign} {getattr(bound, key)}"
        for bound in field.metadata
        for key, sign in BOUNDS.items()
        if hasattr(bound, key)
    ]
    return " ".join([name, ", ".join(limits)]).strip()


def command_reference() -> str:
    """One section per command of ``marc``, with its arguments and options."""
    root: Any = typer.main.get_command(app)
    parts = ["## Options before the command", _options_table(root)]
    for name, command in root.commands.items():
        arguments = [parameter.name.upper() for parameter in command.params if _is_argument(parameter)]
        usage = " ".join(["marc", name, *arguments, "[OPTIONS]"])
        parts += [f"## marc {name}", cleandoc(command.help or ""), f"```text\n{usage}\n```", _options_table(command)]
    return "\n\n".join(parts) + "\n"


def _options_table(command: Any) -> str:  # noqa: ANN401 - click's classes come with typer under changing names
    """The arguments and options of a command."""
    lines = ["| option | default | description |", "|---|---|---|"]
    for parameter in command.params:
        if _is_argument(parameter):
            names = f"`{parameter.name.upper()}`"
        else:
            names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        default = "required" if parameter.required else _option_default(parameter.default)
        lines.append("| " + " | ".join(map(_cell, (names, default, getattr(parameter, "help", None) or ""))) + " |")
    return "\n".join(lines)


def _option_default(value: object) -> str:
    """The default of an option; empty for a switch that is off and for an option without default."""
    plain = isinstance(value, bool | int | float | str) or type(value).__name__.endswith("Path")
    return f"`{value}`".replace("`True`", "`on`") if plain and value not in {"", False} else ""


def _is_argument(parameter: Any) -> bool:  # noqa: ANN401 - as above
    return bool(parameter.param_type_name == "argument")


def error_reference() -> str:
    """One row per error class: its exit code and what it means."""
    lines = ["| error | exit code | meaning |", "|---|---|---|"]
    for error in sorted(_subclasses(errors.PipelineError), key=lambda kind: (kind.exit_code, kind.__name__)):
        meaning = " ".join(cleandoc(error.__doc__ or "").split("\n\n")[0].split())
        lines.append(f"| `{error.__name__}` | {error.exit_code} | {_cell(meaning)} |")
    return "\n".join(lines) + "\n"


def _subclasses(kind: type[errors.PipelineError]) -> set[type[errors.PipelineError]]:
    """All error classes of the module ``errors`` below a class, and the class itself."""
    below = {found for direct in kind.__subclasses__() for found in _subclasses(direct)}
    return {found for found in below | {kind} if found.__module__ == errors.__name__}


def _cell(text: str) -> str:
    """Text that stays within one cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())


def _directive(make: Callable[[], str]) -> type[SphinxDirective]:
    """A directive that inserts generated Markdown."""

    class Generated(SphinxDirective):
        """Inserts generated Markdown where it stands."""

        def run(self) -> list[nodes.Node]:
            """Parse the Markdown with the parser of the page."""
            return self.parse_text_to_nodes(make(), allow_section_headings=True)

    return Generated


def setup(sphinx: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    sphinx.add_directive("settings-reference", _directive(settings_reference))
    sphinx.add_directive("command-reference", _directive(command_reference))
    sphinx.add_directive("error-reference", _directive(error_reference))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
