"""An evaluation in the terminal: progress while it goes, and a table for each set."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from mlx_fd.cli.terminal.layout import FittingTable, print_whole
from mlx_fd.evaluation.names import is_share, shown_name
from mlx_fd.evaluation.running import Attempted
from mlx_fd.runs.labels import duration
from mlx_fd.text import strip_control_chars

_COSTS = {"expert_tokens": "expert tokens", "tokens": "all tokens"}
_NOTHING = "-"


class EvalDisplay:
    """Progress of an evaluation: a bar in a terminal, a line for each system elsewhere.

    Args:
        console: where to print.
        total: trials in all.
        quiet: print nothing.
    """

    def __init__(self, console: Console, total: int, *, quiet: bool = False):
        self._console, self._total, self._quiet = console, total, quiet
        self._begin = time.monotonic()
        self._before = self._done = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[step]}"),
            console=console,
            disable=quiet or not console.is_interactive,
        )
        self._task = self._bar.add_task("", total=total, step="")
        self._step, self._step_tokens = "", 0

    def __enter__(self) -> EvalDisplay:
        self._bar.start()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._bar.stop()

    def step(self, name: str, tokens: int) -> None:
        """Take some tokens of a step."""
        if name != self._step:
            self._step, self._step_tokens = name, 0
        self._step_tokens += tokens
        self._bar.update(self._task, step=f"{name.replace('_', ' ')}, {self._step_tokens} tokens")

    def __call__(self, event: Attempted) -> None:
        """Take a batch that is done."""
        self._done = self._before + event.done
        self._bar.update(
            self._task, completed=self._done, description=f"{event.set}  {event.system}"
        )
        if event.done < event.total:
            return
        self._before += event.total
        if not self._quiet and not self._console.is_interactive:
            spent = time.monotonic() - self._begin
            left = spent / self._done * (self._total - self._done)
            self._console.print(
                Text(
                    strip_control_chars(
                        f"{event.set}: {event.system} done, {event.done}; ETA {duration(left)}"
                    )
                ),
                soft_wrap=True,
            )


def print_results(
    results: Mapping[str, Any], shown: Sequence[Sequence[str]], console: Console
) -> None:
    """A table for each set.

    Args:
        results: what ``eval.json`` holds.
        shown: for each set, the measures that have a column.
        console: where to print.
    """
    for found, names in zip(results["sets"], shown, strict=True):
        print_whole(console, _measures(found, names))
        print_whole(console, _differences_and_costs(found))
        if cut := _cut(found):
            console.print(Text(strip_control_chars(cut), "yellow"), soft_wrap=True)
    temperatures = results["temperature"]
    said = [
        f"first answers by the {results['answers_by']} at temperature "
        f"{temperatures['first_answers']:g}, "
        f"direct answers at {temperatures['bare']:g}, k = {results['k']}"
    ]
    said += [f"{kind}: {model}" for kind, model in results["text_models"].items()]
    for text in said:
        console.print(Text(strip_control_chars(text), "dim"), soft_wrap=True)


def _measures(found: Mapping[str, Any], shown: Sequence[str]) -> FittingTable:
    """Each system's measures, with their intervals."""
    systems = found["systems"]
    known = [
        name
        for name in shown
        if any(system["measures"].get(name, {}).get("n") for system in systems)
    ]
    rows = [
        [
            system["label"],
            *(_estimate(name, system["measures"].get(name), found["n"]) for name in known),
        ]
        for system in systems
    ]
    title = f"{found['name']}: n = {found['n']}, 95 % intervals"
    return FittingTable(["", *map(shown_name, known)], rows, title)


def _cut(found: Mapping[str, Any]) -> str:
    """Which share of each system's trials had a text cut at its limit; empty where none had."""
    shares = [
        f"{system['label']} {_estimate('cut', share, found['n'])} %"
        for system in found["systems"]
        if (share := system["measures"].get("cut")) and share["value"]
    ]
    return f"cut at the token limit (--max-tokens): {', '.join(shares)}" if shares else ""


def _differences_and_costs(found: Mapping[str, Any]) -> FittingTable:
    """How far the first system is from the others in its main measure, and what a problem costs."""
    systems, comparisons = found["systems"], found["comparisons"]
    measure = comparisons[0]["measure"] if comparisons else ""
    against = {row["against"]: row for row in comparisons if row["measure"] == measure}
    header, rows = [""], []
    if against:
        header += [f"{_unit(measure)}: {systems[0]['name']} minus this", "p (Holm)"]
    header += _COSTS.values()
    for system in systems:
        cells = [system["label"]]
        if against:
            row = against.get(system["name"])
            cells += [_difference(row), _p(row["p_holm"])] if row else ["", ""]
        cells += [_count(system["cost_estimates"][name]) for name in _COSTS]
        rows.append(cells)
    return FittingTable(header, rows)


def _unit(measure: str) -> str:
    # A difference of two percentages is in points.
    return shown_name(measure).replace(", %", ", points")


def _estimate(measure: str, value: Mapping[str, Any] | None, n: int) -> str:
    """A number with its interval, and its n where that is not the set's."""
    if value is None or value["value"] is None:
        return _NOTHING
    number = _percent if is_share(measure) else _plain
    own = f" of {value['n']}" if value["n"] != n else ""
    if value["low"] is None:
        return f"{number(value['value'])}{own}"
    return f"{number(value['value'])} [{number(value['low'])}, {number(value['high'])}]{own}"


def _difference(row: Mapping[str, Any]) -> str:
    value = row["difference"]
    if value["value"] is None:
        return _NOTHING
    number = _percent if is_share(row["measure"]) else _plain
    return (
        f"{number(value['value'], '+')} [{number(value['low'], '+')}, {number(value['high'], '+')}]"
    )


def _percent(value: float | None, sign: str = "") -> str:
    return _NOTHING if value is None else format(100 * value, f"{sign}.1f")


def _plain(value: float | None, sign: str = "") -> str:
    return _NOTHING if value is None else format(value, f"{sign}.3f")


def _count(value: Mapping[str, Any]) -> str:
    form = ".0f" if value["value"] >= 100 else ".3g"
    if value["low"] == value["high"]:
        return format(value["value"], form)
    return f"{value['value']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def _p(value: float | None) -> str:
    if value is None:
        return _NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
