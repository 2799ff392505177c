"""The documentation site: `python -m sphinx -W --keep-going -c docs . site` in the root.

The root is the source folder, so that pages link to the same files here as on the site. Nothing is
fetched while building, and what is built asks no other host for anything.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "site")]

project = "snf_ext"
author = "snf_ext contributors"
project_copyright = author
_version = (ROOT / "snf_ext" / "version.py").read_text(encoding="utf-8")
version = release = re.findall(r'__version__ = "(.+)"', _version)[0]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "docstrings"]
root_doc = "docs/index"
include_patterns = ["docs/**", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md"]
exclude_patterns = ["docs/site", "**/.ipynb_checkpoints"]

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True}
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_numpy_docstring = False
highlight_language = "none"
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

myst_heading_anchors = 3
nb_execution_mode = (
    "off"  # notebooks are kept with their outputs; tests/test_notebooks.py runs them
)

html_theme = "furo"
html_title = f"snf_ext {release}"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_extra_path = ["site/root"]
html_copy_source = False
templates_path: list[str] = []


def without_links_to_folders(app: Any, name: str, source: list[str]) -> None:
    """The site has no page for a folder of the repository: what links to one is plain text."""
    here = Path(app.env.doc2path(name)).parent

    def plain(link: re.Match[str]) -> str:
        return link[1] if (here / link[2]).is_dir() else link[0]

    if app.env.doc2path(name).suffix == ".md":
        source[0] = re.sub(r"\[([^\]]*)\]\(([^)#:\s]+)\)", plain, source[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", without_links_to_folders)
