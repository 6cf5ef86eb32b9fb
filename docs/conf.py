"""Settings of the documentation: Sphinx with MyST Markdown, built without a network."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "marc-pipeline"
copyright = "the marc-pipeline authors, Apache-2.0"  # noqa: A001 - the name that Sphinx reads
release = version = installed("marc-pipeline")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference_pages"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_rtype = False
# Types of numpy, pyarrow and the standard library would need their inventories from the network.
nitpick_ignore_regex = [("py:(class|exc)", ".*")]

html_theme = "furo"
html_title = f"marc-pipeline {release}"
html_static_path: list[str] = []
