"""The page of `mlx-fd compare`: a comparison's numbers, and where engines part."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.export import wording
from mlx_fd.files import failed_write, write_atomic, write_json
from mlx_fd.report.rendering import render
from mlx_fd.report.tables import Cell, Table, TableRow, table
from mlx_fd.runs.marks import COMPARISON, claimed_for_later

_NOTHING = "n/a"


def page(report: Mapping[str, Any]) -> str:
    """The page of a report as of :func:`mlx_fd.export.compare.report`."""
    parity = report["parity"]
    return render(
        "comparison.html",
        brand="mlx-fd comparison",
        title="The same model everywhere" if parity else "Not the same model everywhere",
        verdict="good" if parity else "bad",
        measures=_measures(report["rows"]),
        engines=[
            (", ".join(wording.heading(row)), wording.notes(row), _roles(row))
            for row in report["rows"]
            if row["measures"]
        ],
        bundles=[_bundle(folder, bundle) for folder, bundle in report["bundles"].items()],
    )


def _measures(rows: list[Mapping[str, Any]]) -> Table:
    texts = [wording.measured(row) for row in rows]
    verdicts = [Cell(wording.verdict(row), kind="good" if row["parity"] else "bad") for row in rows]
    lines: list[TableRow] = [("verdict", *verdicts)]
    for label in dict.fromkeys(label for found in texts for label in found):
        lines.append((label, *(found.get(label, _NOTHING) for found in texts)))
    return table(
        "What each engine says of an export, against what was said where it was exported",
        ("", *(", ".join(wording.heading(row)) for row in rows)),
        lines,
        numbers=False,
    )


def _roles(row: Mapping[str, Any]) -> Table:
    """Agreement and divergence by role: where an engine parts from the reference."""
    found = row["measures"]["roles"]
    largest = max((role["kl"]["mean"] or 0.0 for role in found.values()), default=0.0)
    lines: list[TableRow] = []
    for name, role in found.items():
        mean, top = role["kl"]["mean"], role["top1"]
        kl = Cell(_NOTHING)
        if mean is not None:
            kl = Cell(f"{mean:.2g}", bar=max(mean, 0.0) / largest if largest > 0 else 0.0)
        lines.append((name, f"{top['agreeing'] / top['n']:.1%}" if top["n"] else _NOTHING, kl))
    return table("By role", ("role", "same top-1 token", "mean KL, nats"), lines, numbers=False)


def _bundle(folder: str, bundle: Mapping[str, Any]) -> tuple[str, str, Table]:
    counts = (
        f"{bundle['prompts']} prompts, {bundle['positions']} positions, {bundle['items']} problems."
    )
    facts = {
        "reference": bundle["reference"],
        "made with": bundle["versions"],
        "source": bundle["source"],
    }
    lines: list[TableRow] = [
        (name, json.dumps(value, ensure_ascii=False)) for name, value in facts.items()
    ]
    return folder, counts, table("Where it comes from", ("", "value"), lines, numbers=False)


@contextlib.contextmanager
def report_folder(folder: Path) -> Iterator[None]:
    """Claim a folder and make sure, before hours of work, that a report can be written there.

    Raises:
        UserError: it is not ours, or it cannot be made or written to.
    """
    with claimed_for_later(folder, COMPARISON):
        yield


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write ``compare.json`` and ``compare.html`` into a :func:`report_folder`.

    Raises:
        UserError: they cannot be written.
    """
    with _wrap_write_errors(folder):
        write_json(folder / "compare.json", report)
        write_atomic(folder / "compare.html", page(report))


@contextlib.contextmanager
def _wrap_write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: the comparison cannot be written there ({failed_write(error)}); choose "
            "another --out"
        ) from error
