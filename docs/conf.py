"""How Sphinx builds these pages: `make docs`."""

import tts_kernels

project = "tts_kernels"
author = "the tts_kernels authors"
release = version = tts_kernels.__version__
html_title = f"tts_kernels {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_copy_source = False
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings give shapes and dtypes
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "code"  # `name` in a docstring is code
