"""Sphinx configuration: make docs site with `sphinx-build docs docs/_build`."""

project = "recon3d"
author = "the recon3d developers"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
html_theme = "pydata_sphinx_theme"
exclude_patterns = ["_build"]
autodoc_typehints = "description"
