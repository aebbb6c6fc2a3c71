"""The site: python -m sphinx -W --keep-going -j auto docs site

Every code cell is executed. A warning fails the build; so does a public name without a
page or without an example, and a link that leads nowhere.
"""

import importlib
import inspect
import os
import re
import sys
import typing
from pathlib import Path

from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ["PYTHONPATH"] = str(ROOT)  # of the kernels, for `benchmarks`
sys.path.insert(0, str(ROOT))
typing.GENERATING_DOCUMENTATION = True  # jaxtyping then shows types as they are written

import tdjax  # noqa: E402

MODULES = ("tdjax", "tdjax.linen", "tdjax.nnx", "tdjax.keras")

project = "tdjax"
version = release = tdjax.__version__
author = "the tdjax authors"
copyright = author
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["pictures"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!tdjax\.).*")]  # JAX, Flax, Keras and typing

html_theme = "sphinx_book_theme"
html_title = "tdjax"
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # The search is in the sidebar.
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_render_markdown_format = "myst"

autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 60
napoleon_attr_annotations = False


def setup(app):
    app.connect("autodoc-process-docstring", mark_code_and_links, priority=100)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("object-description-transform", drop_vague_types, priority=100)
    app.connect("env-check-consistency", check_public_names)


def mark_code_and_links(app, what, name, obj, options, lines):
    """From a docstring's Markdown: code in backticks, and links to pages."""
    text = "\n".join(lines)
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", text)
    text = re.sub(r"docs/\w+\.md#([\w-]+)", r":ref:`\1`", text)
    text = re.sub(r"docs/(\w+)\.md", r":doc:`/\1`", text)
    lines[:] = text.split("\n")


# What a default is called, for what it looks like.
DEFAULTS = {
    r"=_NO_FUNCTION": "",
    r"<class 'jax\.numpy\.(\w+)'>": r"jnp.\1",
    r"<function variance_scaling\.<locals>\.init[^>]*>": "lecun_normal()",
    r"<function zeros[^>]*>": "zeros",
    r"default_(per_step_)?kernel_init": "lecun_normal()",
    r"default_bias_init": "zeros",
    r", parent=<.*": ")",  # Every Linen module has it, and a name.
}


def shorten_signature(app, what, name, obj, options, signature, returns):
    """Names defaults; NNX modules show the arguments of `__init__`."""
    if signature == "(*args, **kwargs)" and what == "class":
        parameters = [*inspect.signature(obj.__init__).parameters.values()][1:]
        plain = [x.replace(annotation=inspect.Parameter.empty) for x in parameters]
        signature = str(inspect.Signature(plain))
    for default, word in DEFAULTS.items():
        signature = re.sub(default, word, signature or "")
    return (signature, returns) if signature else None


def drop_vague_types(app, domain, kind, content):
    """Any says nothing, and private names lead nowhere; shapes are in the docstring."""
    for types in app.env.current_document.autodoc_annotations.values():
        for name, text in [*types.items()]:
            text = text.replace("tdjax._tuning.result.Tuning", "tdjax.Tuning")
            types[name] = text
            if "Any" in text or "tdjax._" in text:
                del types[name]


def check_public_names(app, env):
    """Warns of every public name that has no page or no example."""
    logger = logging.getLogger(__name__)
    documented = env.domaindata["py"]["objects"]
    for module in map(importlib.import_module, MODULES):
        for name in sorted(set(module.__all__) - {"linen", "nnx", "keras"}):
            full = f"{module.__name__}.{name}"
            if full not in documented:
                logger.warning("%s is public and has no page in docs/api", full)
            if ">>>" not in (getattr(module, name).__doc__ or ""):
                logger.warning("%s is public and its docstring has no example", full)
