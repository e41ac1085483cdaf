"""How a page of ours is made: one HTML file that works offline, whatever was written into it.

Text goes into a page in two ways only: through Jinja, which escapes it, and as data in script
elements that no browser runs. A page's policy allows the styles and scripts whose digests are in
it, and nothing else: no other script can run, and nothing can be loaded or sent.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mlx_fd._version import __version__
from mlx_fd.report import packing
from mlx_fd.text import strip_control_chars

_HERE = Path(__file__).parent / "static"
# Stands in the first lines of every page of ours, with the version after it.
GENERATOR = '<meta name="generator" content="mlx-fd '


def asset(name: str) -> str:
    """A style or script of ours."""
    return (_HERE / name).read_text(encoding="utf-8")


def render(
    template: str, *, styles: Sequence[str] = (), scripts: Sequence[str] = (), **parts: Any
) -> str:
    """A page.

    Args:
        template: its name; it extends ``frame.html``.
        styles: names of the style sheets that go into it, beside the ``page.css`` of all pages.
        scripts: the code that runs in it; it may hold no end tag of a script.
        parts: what the template shows.
    """
    style = "".join(map(asset, ("page.css", *styles)))
    return _template(template).render(
        version=__version__,
        generator=Markup(GENERATOR),
        policy=_policy(style, scripts),
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        **parts,
    )


def _policy(style: str, scripts: Sequence[str]) -> str:
    allowed = " ".join(map(_digest, scripts)) or "'none'"
    return (
        f"default-src 'none'; style-src {_digest(style)}; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters["script_json"] = _script_json
    return environment.get_template(name)


def _finalize(value: Any) -> Any:
    return value if hasattr(value, "__html__") else strip_control_chars(str(value))


def _script_json(value: Any) -> Markup:
    return Markup(packing.script_json(value))
