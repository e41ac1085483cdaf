"""JSON files that carry the digest of what is in them, so that a changed one is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.files import read_text

DIGEST = "content_sha256"


class ChangedFile(ValueError):
    """A file is not what was written there; the message says how, without the file's name."""


def content_digest(value: Any) -> str:
    """SHA-256 of a value that JSON can write; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def with_digest(value: Mapping[str, Any]) -> dict[str, Any]:
    """An object as a JSON file is to hold it: the digest of its entries is the last of them."""
    # Through JSON first: tuples come back as lists, and keys as strings.
    plain = json.loads(json.dumps(dict(value), allow_nan=False))
    return {**plain, DIGEST: content_digest(plain)}


def parse_checked(text: str) -> tuple[Any, bool]:
    """What the text of a JSON file says, and whether a digest vouches for it.

    Returns:
        The value without its digest; ``False`` where it had none, as files of older versions.

    Raises:
        ChangedFile: it is not JSON, or its digest is that of something else.
    """
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or DIGEST not in value:
            return value, False
        digest = value.pop(DIGEST)
        if digest != content_digest(value):
            raise ChangedFile("it was changed after it was written")
    except RecursionError as error:
        raise ChangedFile("it is not JSON that mlx-fd writes") from error
    except json.JSONDecodeError as error:
        raise ChangedFile(f"it is not JSON ({error})") from error
    return value, True


def read_checked(path: Path) -> tuple[Any, bool]:
    """What a file has of :func:`with_digest`; returns and raises as :func:`parse_checked`.

    Raises:
        OSError: it cannot be read; ``FileNotFoundError`` where it is not there.
    """
    try:
        text = read_text(path)
    except UnicodeDecodeError as error:
        raise ChangedFile(f"it is not UTF-8 ({error})") from error
    except UserError as error:
        raise ChangedFile("it is not a regular file") from error
    return parse_checked(text)
