"""Write docs/reference.md from the command line and the configuration.

python scripts/make_reference.py            # writes it
python scripts/make_reference.py --check    # fails where it is not up to date
"""

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any, is_typeddict

import click

from mlx_fd.cli.app import cli
from mlx_fd.cli.options import ConfiguredCommand
from mlx_fd.config import OPTIONS, PRESETS, Option
from mlx_fd.config.fields import MAX_COUNT
from mlx_fd.registry import REGISTRIES
from mlx_fd.runs import records
from mlx_fd.runs.records.files import FILES
from mlx_fd.runs.records.manifest import SCHEMA_VERSION

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {shown(item)}" for name, item in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:g}"


def limits(option: Option) -> str:
    if option.choices:
        return ", ".join(option.choices)
    if option.names:
        return ", ".join([*option.names, "..."])
    if option.kind in (int, float):
        low = "" if option.low is None else f"{option.low:g}"
        # What no integer of 32 bits can be goes without saying.
        high = "" if option.high is None or option.high >= MAX_COUNT else f"{option.high:g}"
        return f"{low} .. {high}" if low or high else ""
    return ""


def cell(text: str | None) -> str:
    """A text in a table, where a bar would begin the next column."""
    return (text or "").replace("|", "\\|")


def documented(record: type) -> tuple[str, dict[str, str]]:
    """What a record is, and the meaning of the fields that its docstring lists."""
    page = inspect.cleandoc(record.__doc__ or "").replace("``", "`")
    text, _, listed = page.partition("\n\nAttributes:\n")
    found = re.findall(r"^    ([\w.]+): (.*(?:\n        .*)*)", listed, re.MULTILINE)
    return " ".join(text.split()), {name: " ".join(meaning.split()) for name, meaning in found}


@cache
def declared() -> list[Any]:
    """All that the modules of the package of records define."""
    modules = [info.name for info in pkgutil.iter_modules(records.__path__, f"{records.__name__}.")]
    return [value for name in modules for value in vars(importlib.import_module(name)).values()]


def meanings(record: type) -> tuple[str, dict[str, str]]:
    """What a record is, and each field's meaning; that of a base's field is the base's."""
    fields: dict[str, str] = {}
    for base in declared():
        # At runtime a TypedDict knows no base: it has all of its fields, with their types.
        if (
            is_typeddict(base)
            and base.__doc__
            and base.__annotations__.items() <= record.__annotations__.items()
        ):
            fields |= documented(base)[1]
    text, own = documented(record)
    return text, fields | own


def record_lines(record: type) -> list[str]:
    """A record as a table of its fields."""
    text, fields = meanings(record)
    types = record.__annotations__
    if set(fields) != set(types):
        sys.exit(f"{record.__name__}: its docstring does not have the fields that it has")
    lines = ["", f"**{record.__name__}**: {cell(text)}", "", "| key | type | |", "|---|---|---|"]
    for name, annotation in types.items():
        kind = annotation.__forward_arg__
        optional = re.fullmatch(r"NotRequired\[(.*)\]", kind)
        absent = ", may be absent" if optional else ""
        kind = cell(optional[1] if optional else kind)
        lines.append(f"| `{name}` | `{kind}`{absent} | {cell(fields[name])} |")
    return lines


def page() -> str:
    lines = [
        "# Reference",
        "",
        "Made by `scripts/make_reference.py` from the code; do not edit by hand.",
        "",
        "## Commands",
        "",
    ]
    for name, command in sorted(cli.commands.items()):
        lines += [f"### mlx-fd {name}", "", inspect.cleandoc(command.help or ""), ""]
        configured = isinstance(command, ConfiguredCommand)
        own = [p for p in command.params if not (configured and p.name in OPTIONS)]
        lines += ["| argument | |", "|---|---|"]
        for param in own:
            label = (
                param.name.upper() if isinstance(param, click.Argument) else ", ".join(param.opts)
            )
            lines.append(f"| `{label}` | {cell(getattr(param, 'help', None))} |")
        lines.append("")
    lines += [
        "## Options of a run",
        "",
        "Each is a flag of `mlx-fd loop` (`--batch-size 4`, `--sequential`) and a key of its table "
        "in a TOML file (`[generation]`, `batch_size = 4`).",
        "",
    ]
    section = None
    for option in OPTIONS.values():
        if option.section != section:
            section = option.section
            lines += [
                "",
                f"### [{section}]",
                "",
                "| key | default | limits | |",
                "|---|---|---|---|",
            ]
        cells = (
            f"`{option.name}`",
            f"`{shown(option.default)}`",
            limits(option),
            cell(option.help),
        )
        lines.append(f"| {' | '.join(cells)} |")
    for title, registry in REGISTRIES.items():
        lines += ["", f"## {title}", "", "| name | |", "|---|---|"]
        lines += [f"| `{entry.name}` | {cell(entry.help)} |" for entry in registry.values()]
    lines += ["", "## Presets", "", "What each changes against the defaults.", ""]
    for name, changes in PRESETS.items():
        settings = ", ".join(f"`{key} = {shown(value)}`" for key, value in changes.items())
        lines += [f"- **{name}**: {settings}"]
    lines += [
        "",
        "## Files",
        "",
        "Every row and file is JSON. The types are those of `mlx_fd/runs/records/`; the "
        f"manifest's `schema_version` is {SCHEMA_VERSION}, and runs with another one are "
        "refused.",
    ]
    for name, found in FILES.items():
        lines += ["", f"### {name}"]
        for record in found:
            lines += record_lines(record)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the page is out of date")
    wanted = page()
    if parser.parse_args().check:
        if not PAGE.exists() or PAGE.read_text() != wanted:
            sys.exit(f"{PAGE} is out of date: run python scripts/make_reference.py")
        return
    PAGE.write_text(wanted)


if __name__ == "__main__":
    main()
