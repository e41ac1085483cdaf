"""Tables that fit the terminal: no number and no interval is ever broken over two lines."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from mlx_fd.text import strip_control_chars

_FILE_WIDTH = 400
_ANY_WIDTH = 1 << 16
_MIN_VALUE_WIDTH = 40
_USUAL_WIDTH = 80
_NO_BREAK = "\N{NO-BREAK SPACE}"
# A number with its interval, a bracket of numbers, a change, a number with its unit or its total.
_UNITS = re.compile(
    r"(?<!\S)\S++ (?:\[[^\]]{0,80}\]|-> \S++)|\([^)]{0,40}\)"
    r"|(?<![\d.])[\d.]++ (?:of [\d.]++|min|s|h|GiB|tokens|steps)\b"
)


def output_console() -> Console:
    """A console for results; a file or a pipe has no edge to break lines at."""
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


def print_whole(console: Console, table: RenderableType) -> None:
    """Print a table, with nothing of it cut off in a narrow terminal, which then breaks its lines.

    Args:
        console: where to; from now on it is as wide as the table's longest words, up to 80 columns.
        table: of columns, :class:`NamedValues` or a :class:`FittingTable`.
    """
    anywhere = console.options.update(max_width=_ANY_WIDTH)
    least = Measurement.get(console, anywhere, table).minimum
    console.width = max(console.width, min(least, _USUAL_WIDTH))
    console.print(table)


def warning(text: str) -> Text:
    """A warning as a line; what controls a terminal is shown and does nothing."""
    return Text.assemble(("warning: ", "yellow"), strip_control_chars(text))


def wrapped(text: str, width: int) -> str:
    """A text in lines of at most ``width`` characters, numbers whole.

    Args:
        text: one line.
        width: in characters; a number or word that is longer stays whole all the same.
    """
    held = _UNITS.sub(lambda match: match[0].replace(" ", _NO_BREAK), text)
    lines = textwrap.wrap(held, max(width, 1), break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace(_NO_BREAK, " ")


@dataclass(frozen=True)
class NamedValues:
    """Lines of a name and a value; each value under its name where the console is narrow."""

    title: str = ""
    rows: list[tuple[str, str]] = field(default_factory=list)

    def add_row(self, name: str, value: str) -> None:
        """Add a line."""
        self.rows.append((name, value))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """The width of the longest name, or number with its interval."""
        lines = [f" {strip_control_chars(name)}" for name, _ in self.rows]
        for _, value in self.rows:
            lines += [f"   {one}" for one in wrapped(strip_control_chars(value), 1).split("\n")]
        return Measurement(max(map(len, lines), default=0), options.max_width)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """The lines, as wide as the console."""
        if self.title:
            yield Text(self.title, "italic")
        rows = [(strip_control_chars(n), strip_control_chars(v)) for n, v in self.rows]
        names = max((len(name) for name, _ in rows), default=0)
        left = options.max_width - names - 3
        for name, value in rows:
            if left >= _MIN_VALUE_WIDTH:
                lines = wrapped(value, left).split("\n")
                yield _line(f" {name.ljust(names)}", f" {lines[0]}")
                for line in lines[1:]:
                    yield _line("", " " * (names + 2) + line)
            else:
                yield _line(f" {name}", "")
                for line in wrapped(value, options.max_width - 4).split("\n"):
                    yield _line("", f"   {line}")


def _line(dim: str, text: str) -> Text:
    return Text.assemble((dim, "dim"), text, no_wrap=True, overflow="ignore")


@dataclass(frozen=True)
class FittingTable:
    """A table, or a block for each of its entries where the console is too narrow for the table.

    Attributes:
        header: names of the columns; the first is the entries' own.
        rows: an entry each: its cells.
        title: above the table.
        styles: of the rows, by index.
        transposed: an entry is a column of the table, not a row.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    styles: Mapping[int, str] = field(default_factory=dict)
    transposed: bool = False

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """The width of the longest name or value of its blocks."""
        blocks = [block for block in self._blocks() if isinstance(block, NamedValues)]
        least = [block.__rich_measure__(console, options).minimum for block in blocks]
        return Measurement(max(least, default=0), options.max_width)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        """The table, or its blocks."""
        table = self._table()
        natural = Measurement.get(console, options.update(max_width=_ANY_WIDTH), table).maximum
        if self.title:
            yield Text(strip_control_chars(self.title), "bold")
        if natural <= options.max_width:
            yield table
        else:
            yield from self._blocks()

    def _table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
        header = [self.header[0], *(row[0] for row in self.rows)]
        lines: Sequence[Sequence[str]] = list(zip(*[self.header, *self.rows], strict=True))[1:]
        if not self.transposed:
            header, lines = list(self.header), list(self.rows)
        for index, name in enumerate(header):
            table.add_column(
                Text(strip_control_chars(name)),
                justify="right" if index else "left",
                no_wrap=True,
            )
        for index, cells in enumerate(lines):
            style = None if self.transposed else self.styles.get(index)
            texts = [Text(strip_control_chars(cell)) for cell in cells]
            table.add_row(*texts, style=style)
        return table

    def _blocks(self) -> Iterator[RenderableType]:
        for index, (name, *cells) in enumerate(self.rows):
            heading = strip_control_chars(" ".join(name.split("\n")))
            if self.header[0]:
                heading = f"{self.header[0]} {heading}"
            yield Text(heading, self.styles.get(index) or "bold")
            pairs = zip(self.header[1:], cells, strict=True)
            yield NamedValues(rows=[(label, cell) for label, cell in pairs if cell])
