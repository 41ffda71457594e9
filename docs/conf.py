"""The site: ``pip install -e ".[docs]"``, then ``sphinx-build -W -n docs docs/_build``.

Nothing is fetched, neither by the build nor by a page: no other project's inventory, no fonts, no
scripts. Formulas are MathML, which browsers draw themselves.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import sklearn_medimb

project = "sklearn_medimb"
author = "The sklearn_medimb developers"
project_copyright = author
version = release = sklearn_medimb.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = [
    "_build",
    "README.md",
    "auto_examples/**/*.ipynb",
    "auto_examples/**/GALLERY_HEADER.rst",
]
suppress_warnings = ["config.cache"]  # the order of the gallery is a function, which has no hash

# What docstrings and pages refer to that is no page of this site, once and with the reason.
nitpick_ignore_regex = [
    # Other packages: their inventories would have to be fetched.
    ("py:.*", r"(sklearn|imblearn|skorch|torch|numpy|matplotlib)\..*"),
]

autosummary_generate = True
autosummary_imported_members = True
autodoc_typehints = "none"  # numpydoc's "Parameters" have the types
numpydoc_show_class_members = False  # the template of a class lists its own methods
numpydoc_xref_param_type = False

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

html_theme = "pydata_sphinx_theme"
html_title = "sklearn_medimb"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "header_links_before_dropdown": 7,
}


def own_members_only(_app: Any, _what: str, _name: str, found: Any, skip: bool, _: Any) -> bool:
    """Leave out what a class has from scikit-learn, torch or Python: it is documented there."""
    function = getattr(found, "fget", None) or inspect.unwrap(getattr(found, "__func__", found))
    module = getattr(function, "__module__", None) or ""
    return skip or not module.startswith("sklearn_medimb")


def escape_shapes(_app: Any, what: str, _name: str, _obj: Any, _options: Any, lines: Any) -> None:
    """Shapes are written as in Python, (n, *spatial), which the markup would read otherwise.

    What a room imports is for those who read its source.
    """
    if what == "module" and any(line.startswith("Import") for line in lines):
        first = next(i for i, line in enumerate(lines) if line.startswith("Import"))
        del lines[first:]
    star = re.compile(r"(``.*?``)|\*(?=(spatial|grid|sides|shape)\b)")
    lines[:] = [star.sub(lambda found: found[1] or r"\*", line) for line in lines]


# Where a link that leads out of this folder, for those who read the pages as files, leads here.
PLACES = [
    (r"\.\./examples/GALLERY_HEADER\.rst", "/auto_examples/index.rst"),
    (r"\.\./(?:\.\./)?examples/(\w+/plot_\w+)\.py", r"/auto_examples/\1.rst"),
    (r"\.\./(?:\.\./)?benchmarks/RESULTS\.md", "/tables.md"),
    (r"\.\./(?:\.\./)?benchmarks/PRETRAINED\.md", "/pretrained_networks.md"),
]


def lead_inside(_app: Any, _page: str, content: list[str]) -> None:
    """Let links to files of the repository lead to their pages."""
    for outside, inside in PLACES:
        content[0] = re.sub(rf"\]\({outside}\)", f"]({inside})", content[0])


def inline_formula(self: Any, node: nodes.Element) -> None:
    """Write a formula as MathML."""
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block_formula(self: Any, node: nodes.Element) -> None:
    """Write a formula on lines of its own."""
    self.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """Connect the functions above."""
    app.connect("source-read", lead_inside)
    app.connect("autodoc-skip-member", own_members_only)
    app.connect("autodoc-process-docstring", escape_shapes, priority=100)  # before numpydoc
    app.add_html_math_renderer("mathml", (inline_formula, None), (block_formula, None))


sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_",
    "ignore_pattern": r"^(?!plot_)",  # what has no cells is a command
    "plot_gallery": True,
    "download_all_examples": False,
    "write_computation_times": False,  # that page would fetch a script
    "show_memory": False,
    "show_signature": False,
    "remove_config_comments": True,
    "matplotlib_animations": False,
    "backreferences_dir": "api/examples",
    "doc_module": ("sklearn_medimb",),
    "inspect_global_variables": False,
    "min_reported_time": 1000,
    "abort_on_example_error": False,
    "within_subsection_order": "FileNameSortKey",
    "subsection_order": [
        f"../examples/{folder}"
        for folder in (
            "rare_classes",
            "patients",
            "few_labels",
            "decisions",
            "practice",
            "methods",
        )
    ],
}
