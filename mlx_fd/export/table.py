"""A comparison's rows in words, and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

SAME, OTHER = "the same model", "NOT the same"
_NOTHING = "n/a"


def _share(count: Mapping[str, Any], key: str) -> str:
    if not count["n"]:
        return _NOTHING
    return f"{count[key]}/{count['n']} ({count[key] / count['n']:.1%})"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return _NOTHING if value is None else f"{value:{form}}{unit}"


def _accuracy(value: Mapping[str, Any]) -> str:
    if not value["n"]:
        return _NOTHING
    return f"{value['right']}/{value['n']} ({value['low']:.0%} to {value['high']:.0%})"


def heading(row: Mapping[str, Any]) -> tuple[str, str]:
    """A row's engine and the model it opened."""
    target = row["target"]
    return row["engine"], target if "://" in target else Path(target).name


def measured(row: Mapping[str, Any]) -> dict[str, str]:
    """What was measured, in words; empty where the engine failed."""
    found = row["measures"]
    if found is None:
        return {}
    tokens, greedy, kl = found["tokenisation"], found["greedy"], found["kl"]
    agreeing = _share(greedy, "agreeing")
    if greedy["first_divergence"]:
        agreeing += (
            f", {greedy['diverged']} of {greedy['prompts']} diverge, first at token "
            f"{greedy['first_divergence']}"
        )
    equal = f"{tokens['equal']}/{tokens['n']}" if tokens["n"] else _NOTHING
    speed, memory, accuracy = found["speed"], found["peak_memory"], found["accuracy"]
    lines = {
        "prompts with equal tokens": equal + (" (counts)" if tokens["by"] == "counts" else ""),
        "greedy tokens agreeing": agreeing,
        "mean KL": _number(kl["mean"], ".2g", " nats"),
        "worst KL": _number(kl["worst"], ".2g", " nats"),
        "likeliest token the same": _share(found["top1"], "agreeing"),
        "perplexity (reference)": (
            f"{_number(found['perplexity']['engine'], '.4f')} "
            f"({_number(found['perplexity']['reference'], '.4f')})"
        ),
    }
    if accuracy:
        lines["problems right"] = _accuracy(accuracy["engine"])
        lines["problems right, reference"] = _accuracy(accuracy["reference"])
        if known := accuracy["reference"]["n"]:
            lines["same answer as reference"] = f"{accuracy['same_answer']}/{known}"
    return lines | {
        "prefill": _number(speed["prefill"], ".3g", " tokens/s"),
        "decode": _number(speed["decode"], ".3g", " tokens/s"),
        "time to first token": _number(speed["first_token"], ".3g", " s"),
        "peak memory": _number(None if memory is None else memory / 2**20, ".0f", " MiB"),
    }


def notes(row: Mapping[str, Any]) -> list[str]:
    """How a row's numbers came about, and what is not among them."""
    found = row["measures"]
    if found is None:
        return []
    kl, tolerance = found["kl"], row["tolerance"]
    said = [f"ran on: {found['about']}"]
    if kl["n"]:
        said.append(
            f"KL over {kl['n']} positions, from {kl['tokens']:.0f} of the reference's top tokens a "
            "position and the tail"
        )
    said.append(
        f"tolerance for {row['weights']} weights: equal tokens, mean KL at most "
        f"{tolerance['mean_kl']:g}, likeliest token the same at {tolerance['top1']:.0%} or more"
    )
    return said + [f"{what}: n/a, {why}" for what, why in found["missing"].items()]


def verdict(row: Mapping[str, Any]) -> str:
    """The verdict with its reasons."""
    return SAME if row["parity"] else f"{OTHER}: {'; '.join(row['reasons'])}"


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One column a row of the report."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for row in rows:
        engine, model = heading(row)
        table.add_column(Text(f"{engine}\n{model}"))
    texts = [measured(row) for row in rows]
    labels = dict.fromkeys(label for lines in texts for label in lines)
    for label in labels:
        table.add_row(Text(label, "dim"), *(Text(lines.get(label, _NOTHING)) for lines in texts))
    marks = [Text(verdict(row), "green" if row["parity"] else "red") for row in rows]
    table.add_row(Text("verdict", "dim"), *marks)
    return table
