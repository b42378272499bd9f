"""Sphinx configuration. `sphinx-build -W -b html docs docs/_build/html` builds the pages, without a network."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

import kantor

project = "Kantor"
author = "The Kantor developers"
project_copyright = "The Kantor developers"
release = version = kantor.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
root_doc = "index"
default_role = "code"  # single backticks in docstrings are names
exclude_patterns = ["_build", "gallery/*"]
nitpicky = True  # every cross reference must lead somewhere ...
nitpick_ignore_regex = [
    (r"py:.*", r"(?!kantor).*")
]  # ... except the types of other packages: no network, no inventories

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # types stand in the parameter sections
autosummary_generate = False
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
strip_signature_backslash = True  # so that names with an underscore at their end keep it

root = Path(__file__).resolve().parent.parent
doctest_global_setup = f"""
import os, pathlib, warnings
import torch
ROOT = pathlib.Path({str(root)!r})
torch.manual_seed(0)
warnings.simplefilter("ignore")  # a solve that does not converge warns; the pages show its result instead
"""
doctest_global_cleanup = "os.chdir(ROOT)"
doctest_test_doctest_blocks = "default"

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "gallery_built",
    "filename_pattern": r"plot_",
    "abort_on_example_error": True,
    "capture_repr": (),
    "copyfile_regex": "",
    "download_all_examples": False,
    "matplotlib_animations": False,
    "remove_config_comments": True,
    "reset_modules": (),
    "show_memory": False,
    "show_signature": False,
    "within_subsection_order": "ExampleTitleSortKey",
    "write_computation_times": False,
}
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
torch.set_num_threads(min(torch.get_num_threads(), 2))  # a build is no reason to take a whole machine

html_theme = "furo"
html_title = f"Kantor {release}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["kantor.css"]
linkcheck_ignore = [r"https?://"]  # inner links and files only: no network
