"""Write docs/reference.md from the command line and the configuration.

python scripts/make_reference.py            # writes it
python scripts/make_reference.py --check    # fails where it is not up to date
"""

import argparse
import inspect
import sys
from pathlib import Path

import click

from mlx_fd.cli.app import cli
from mlx_fd.cli.options import ConfiguredCommand
from mlx_fd.config import MAX_COUNT, OPTIONS, PRESETS
from mlx_fd.registry import REGISTRIES

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"


def shown(value):
    if isinstance(value, tuple):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:g}"


def limits(option):
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


def cell(text):
    """A text in a table, where a bar would begin the next column."""
    return (text or "").replace("|", "\\|")


def page():
    lines = [
        "# Reference",
        "",
        "Made by `scripts/make_reference.py` from the code; do not edit by hand.",
        "",
        "## Commands",
        "",
    ]
    for name, command in sorted(cli.commands.items()):
        lines += [f"### mlx-fd {name}", "", inspect.cleandoc(command.help), ""]
        configured = isinstance(command, ConfiguredCommand)
        own = [p for p in command.params if not (configured and p.name in OPTIONS)]
        lines += ["| argument | |", "|---|---|"]
        for param in own:
            label = param.name.upper() if isinstance(param, click.Argument) else param.opts[-1]
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
    return "\n".join(lines) + "\n"


def main():
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
