"""The parts of a text template: a field that is empty is left out together with the literal text that joins it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

# The end of a field, such as ")", "'s" or " pages"; the separator; and the beginning of the next field, such as "(".
BETWEEN = (
    re.compile(r"(?P<suffix>[^.,;!?|\n]*\w[^.,;!?|\n]*)(?P<separator>[.,;!?|\n]+\s*)(?P<prefix>.*)", re.DOTALL),
    re.compile(
        r"(?P<suffix>[^\s.,;:!?|/·•–—(\[{<«“-]*)(?P<separator>\s*[^\w\s(\[{<«“\"'#$€£@]*\s*)(?P<prefix>.*)", re.DOTALL
    ),
)


@dataclass(frozen=True)
class TemplateField:
    """One field of a template, with the literal text that belongs to it.

    Attributes:
        column: name of the column.
        separator: literal text between an earlier field and this one.
        prefix, suffix: literal text that stands only beside this field.
    """

    column: str
    separator: str
    prefix: str
    suffix: str


def template_fields(template: str) -> list[TemplateField]:
    """Return the fields of a template in order. All literal text before the first field is its prefix."""
    literals, columns = [""], []
    for literal, name, _, _ in Formatter().parse(template):
        literals[-1] += literal
        if name is not None:
            columns.append(name)
            literals.append("")
    suffixes, separators, prefixes = [], [""], [literals[0]]
    for literal in literals[1:-1]:
        match = next(match for pattern in BETWEEN if (match := pattern.fullmatch(literal)))
        suffixes.append(match["suffix"])
        separators.append(match["separator"])
        prefixes.append(match["prefix"])
    suffixes.append(literals[-1])
    return [TemplateField(*parts) for parts in zip(columns, separators, prefixes, suffixes, strict=True)]


def join_fields(template: Sequence[TemplateField], texts: Sequence[str]) -> str:
    """Return the text of an item from its fields, without the empty ones."""
    text = ""
    for field, value in zip(template, texts, strict=True):
        if value:
            text += (field.separator if text else "") + field.prefix + value + field.suffix
    return text
