"""A configuration as TOML."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import tomli_w

from mlx_fd.config.checking import override
from mlx_fd.config.options import OPTIONS, Config
from mlx_fd.config.self_distillation import Method
from mlx_fd.config.values import suggest
from mlx_fd.errors import UserError
from mlx_fd.text import shown

_MAX_BYTES = 1 << 20


def read(path: Path, config: Config | None = None) -> Config:
    """The configuration in a TOML file, over ``config`` (default: the defaults).

    Options stand in their table (``[gate]``) or at the top of the file, as one likes.

    Raises:
        UserError: the file cannot be read or parsed (with the line), or an option is wrong.
    """
    return override(config or Config(), options_in(path), str(path))


def options_in(path: Path) -> dict[str, Any]:
    """The options that stand in a TOML file: name to value, none of them checked.

    Raises:
        UserError: the file cannot be read or parsed, or something in it is no option.
    """
    sections = [item.name for item in fields(Config)]
    changes: dict[str, Any] = {}
    for key, value in _parsed(path).items():
        # At the top of the file, or in a table.
        table = isinstance(value, dict) and not (key in OPTIONS and OPTIONS[key].kind is dict)
        given = value if table else {key: value}
        if table:
            # Some names (gate, losses, problems) are an option's and a table's.
            if key not in sections and key in OPTIONS:
                raise UserError(f"{path}: {key} is an option, not a table: write {key} = ...")
            if key not in sections:
                raise UserError(
                    f"{path}: there is no table [{shown(key)[1:-1]}]{suggest(key, sections)}"
                )
        elif key in sections and key not in OPTIONS:
            raise UserError(f"{path}: {key} is a table: write [{key}], and its options below it.")
        for name, setting in given.items():
            if table and name in OPTIONS and OPTIONS[name].section != key:
                raise UserError(
                    f"{path}: {name} belongs in [{OPTIONS[name].section}], not [{key}]."
                )
            if name in changes:
                raise UserError(
                    f"{path}: {shown(name)[1:-1]} is there twice, at the top and in its table."
                )
            changes[name] = setting
    return changes


def _parsed(path: Path) -> dict[str, Any]:
    """What a TOML file holds.

    Raises:
        UserError: it cannot be read or parsed.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UserError(f"{path}: not a configuration: larger than {_MAX_BYTES >> 20} MiB")
        return tomllib.loads(content.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"{path}: not a TOML file: nested too deeply") from error
    # TOMLDecodeError and UnicodeDecodeError are ValueErrors, as is what Python says of an integer
    # of thousands of digits.
    except ValueError as error:
        raise UserError(f"{path}: not a TOML file: {error}") from error


def to_toml(config: Config) -> str:
    """The configuration as TOML that :func:`read` gives back unchanged."""
    tables = dataclasses.asdict(config)
    if not config.models.chat_template_kwargs:  # a table without a line says nothing
        del tables["models"]["chat_template_kwargs"]
    if config.selfdistill == Method():
        del tables["selfdistill"]
    return tomli_w.dumps(tables)
