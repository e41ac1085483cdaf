"""What `mlx-fd compare` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from mlx_fd.cli.terminal.layout import FittingTable, print_whole
from mlx_fd.export.wording import _NOTHING, heading, measured, notes, verdict
from mlx_fd.text import strip_control_chars


def _text(text: str, style: str = "") -> Text:
    return Text(strip_control_chars(text), style)


def print_comparison(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The table, a column a row of the report, and under it the verdicts with what they rest on."""
    texts = [measured(row) for row in rows]
    labels = list(dict.fromkeys(label for lines in texts for label in lines))
    entries = [
        ["\n".join(heading(row)), *(lines.get(label, _NOTHING) for label in labels)]
        for row, lines in zip(rows, texts, strict=True)
    ]
    if labels:
        print_whole(console, FittingTable(["", *labels], entries, transposed=True))
    for row in rows:
        style = "green" if row["parity"] else "red"
        name = _text(f"{' '.join(heading(row))}: ", "bold").append_text(_text(verdict(row), style))
        console.print(name, soft_wrap=True)
        for text in notes(row):
            console.print(_text(f"  {text}", "dim"), soft_wrap=True)
