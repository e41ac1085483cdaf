"""The address of a server, ``URL`` or ``URL#MODEL``, and what of it may be shown."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass

from mlx_fd.errors import UserError
from mlx_fd.text import strip_control_chars

_HIDDEN = "***"


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Attributes:
        root: ``http://HOST:PORT/PATH``, without ``/v1``.
        scheme: ``"http"`` or ``"https"``.
        host: its name or number.
        model: which of its models; empty: the only one.
    """

    root: str
    scheme: str
    host: str
    model: str


def without_secrets(url: str) -> str:
    """A URL as it may stand in messages and files: user, password and query are hidden.

    Works for what is no URL too: whatever stands before the last ``@`` is taken for a password.
    """
    scheme, mark, rest = url.rpartition("://") if url.count("://") == 1 else ("", "", url)
    location, hash_mark, model = rest.partition("#")
    if "@" in location or not _has_port(location):
        # A password may hold any character, # and ? too.
        before, at, rest = rest.rpartition("@")
        location, hash_mark, model = rest.partition("#")
        location = (_HIDDEN + at if at else before) + location
    path, question, _ = location.partition("?")
    shown = path + (question + _HIDDEN if question else "")
    return strip_control_chars(scheme + mark + shown + hash_mark + model)


def _has_port(location: str) -> bool:
    """Whether what stands before the path is a host, with a port that is a number if any."""
    try:
        return urllib.parse.urlsplit(f"//{location}").port is not None or ":" not in location
    except ValueError:
        return False


def parse_address(url: str) -> Address:
    """Take an address apart.

    Raises:
        UserError: it is none, or has a password or a query, which would get into files.
    """
    location, _, model = url.partition("#")
    try:
        parts = urllib.parse.urlsplit(location)
        port = parts.port
    except ValueError:
        parts, port = urllib.parse.urlsplit(""), None
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or "@" in parts.netloc
        or "?" in location
        or port == 0
    ):
        raise UserError(
            f"--engine openai:{without_secrets(url)}: give the server's address as "
            "http://HOST:PORT, without a password or a query (OPENAI_API_KEY in the environment "
            "is sent)"
        )
    root = location.rstrip("/").removesuffix("/v1")
    return Address(root, parts.scheme, parts.hostname, model)
