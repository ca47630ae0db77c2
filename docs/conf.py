"""Sphinx configuration. Build with ``sphinx-build --fail-on-warning docs docs/_build/html``."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "flame_dask"
author = "the flame_dask developers"
release = version = installed_version("flame-dask")
project_copyright = f"2026, {author}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "state_diagrams",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_google_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"flame_dask {release}"
html_show_sphinx = False
# The theme would otherwise ask for a copy of its source from a repository that is not known here.
html_copy_source = False
