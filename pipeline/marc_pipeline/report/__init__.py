"""Reports as folders: one list of sections, written as Markdown, as one HTML file, and as plots."""
