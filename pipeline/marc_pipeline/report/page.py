"""A report as a folder: its JSON, a Markdown page, an HTML page and plots as PNG."""

from pathlib import Path

from marc_pipeline.report.plots import save, svg
from marc_pipeline.report.sections import ReportPage
from marc_schemas.files import Contract

FORMATS = ("md", "html")


def write_folder(name: str, data: Contract, page: ReportPage, folder: Path) -> list[Path]:
    """Write ``name.json``, ``name.md``, ``name.html`` and every plot of the page.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"json": data.model_dump_json(indent=1)} | {form: render(page, form) for form in FORMATS}
    written = [folder / f"{name}.{ending}" for ending in texts]
    for path, text in zip(written, texts.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    plots = [plot for section in page.sections for plot in section.plots]
    return [*written, *(save(plot.figure, folder / plot.file) for plot in plots)]


def render(page: ReportPage, form: str) -> str:
    """The page as one text.

    Args:
        page: the content.
        form: ``md``, with links to the PNG files; or ``html``, one file with style and plots inside: it opens without
            a network, on light and dark screens and on paper.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    templates = Environment(
        loader=PackageLoader("marc_pipeline.report"),
        autoescape=select_autoescape(["html.jinja"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"escaped": markdown_text, "svg": svg}
    return templates.get_template(f"page.{form}.jinja").render(page=page).rstrip() + "\n"


def markdown_text(text: str) -> str:
    """Plain text on one line of Markdown: characters with a meaning in Markdown or HTML are escaped."""
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.replace("&", "&amp;").split())
