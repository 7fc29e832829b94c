# Copyright Contributors to the pyro_twist project.
# SPDX-License-Identifier: Apache-2.0

"""Sphinx configuration; `make docs` builds with warnings as errors, and without the network."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pyro_twist

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "pyro_twist"
author = "Contributors to the pyro_twist project"
copyright = author
version = release = pyro_twist.__version__

extensions = [
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_ext", "**/.ipynb_checkpoints", "**/.jupyter_cache"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
# Outputs are committed; `make tutorials` is what runs the notebooks.
nb_execution_mode = "off"

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
# References into this package must resolve; those to other projects need no network to build.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!pyro_twist\b).*")]
nitpick_ignore = [
    ("py:class", "pyro_twist.align.methods.Runnable"),
    # what a family keeps of a step for its own fit
    ("py:class", "pyro_twist.twists.events.TokenTable"),
    ("py:class", "pyro_twist.twists.hidden._HiddenTable"),
    ("py:class", "pyro_twist.twists.sequences._Gains"),
]
python_use_unqualified_type_names = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["mathml.css"]
# Formulas are rendered here and not by a script that a browser would fetch from elsewhere.
html_math_renderer = "mathml"
html_title = f"pyro_twist {release}"

# Sphinx reads nothing outside its own folder, and MyST follows symbolic links out of it.
shutil.rmtree(HERE / "tutorials", ignore_errors=True)
shutil.copytree(
    HERE.parent / "tutorials",
    HERE / "tutorials",
    ignore=shutil.ignore_patterns(".*", "__pycache__"),
)
