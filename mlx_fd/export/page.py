"""A comparison as one HTML page that needs nothing beside it."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.export import table
from mlx_fd.files import write_atomic, write_json
from mlx_fd.marks import COMPARISON, claimed
from mlx_fd.runs import failed_write

_STYLE = """
:root { color-scheme: light dark; --text: #1d2126; --soft: #626b75; --line: #d9dde2;
  --back: #fff; --good: #1a7f37; --bad: #c0262d; --bar: #4878a8; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #98a2ad; --line: #343b43;
  --back: #15191d; --good: #4ac26b; --bad: #ff7b72; --bar: #7fb0dd; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.2rem .3rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; } tbody th, small { font-weight: 400; color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); }
.bar { display: inline-block; height: .7rem; background: var(--bar); min-width: 1px; }
code { font-size: .9em; overflow-wrap: anywhere; }
"""

_METHOD = """
<p>The reference is the model as it was when it was exported; the bundle holds its tokens and its
64 largest log-probabilities at each position. Every engine reads the same tokens.</p>
<ul>
<li><b>KL</b> is KL(reference || engine) in nats. The reference's top tokens stay apart and all
others are one outcome, the tail, so it is never above the divergence over the whole vocabulary. A
server tells only its own few top log-probabilities: then only the tokens that both name stay apart,
and only the continuation's positions count.</li>
<li><b>Greedy tokens agreeing</b> counts those before a continuation's first difference. After it
the two go different ways, and a near tie is enough for that.</li>
<li><b>Likeliest token the same</b>: teacher-forced, at every position. The verdict rests on it,
near ties of the reference's two likeliest tokens aside, on the mean KL and on equal tokens.</li>
<li><b>Perplexity</b> is that of the reference's own continuations.</li>
<li><b>Problems</b> are answered greedily; in brackets a 95 % Wilson interval.</li>
<li><b>Speed</b>: medians over the longest prompts, one sequence at a time.</li>
</ul>
"""


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = "".join(
        f"<th>{escape(engine)}<br><small>{'<br>'.join(map(escape, opened))}</small></th>"
        for engine, *opened in map(table.heading, rows)
    )
    texts = [table.measured(row) for row in rows]
    lines = [
        f"<tr><th>{escape(label)}</th>"
        + "".join(f"<td>{escape(found.get(label, 'n/a'))}</td>" for found in texts)
        + "</tr>"
        for label in dict.fromkeys(label for found in texts for label in found)
    ]
    verdicts = "".join(
        f'<td class="{"good" if row["parity"] else "bad"}">{escape(table.verdict(row))}</td>'
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr><th></th>{heads}</tr></thead><tbody>'
        f"<tr><th>verdict</th>{verdicts}</tr>{''.join(lines)}</tbody></table></div>"
    )


def _roles(row: Mapping[str, Any]) -> str:
    """Agreement and divergence by role: where an engine parts from the reference."""
    found = row["measures"]["roles"]
    largest = max((role["kl"]["mean"] or 0.0 for role in found.values()), default=0.0)
    lines = []
    for name, role in found.items():
        mean, top = role["kl"]["mean"], role["top1"]
        share = f"{top['agreeing'] / top['n']:.1%}" if top["n"] else "n/a"
        width = 0 if not mean or not largest else 10 * mean / largest
        shown = "n/a" if mean is None else f"{mean:.2g}"
        lines.append(
            f"<tr><th>{escape(name)}</th><td>{share}</td><td>{shown}</td>"
            f'<td><span class="bar" style="width:{width:.2f}rem"></span></td></tr>'
        )
    said = "".join(f"<li>{escape(note)}</li>" for note in table.notes(row))
    return (
        f"<h2>{escape(', '.join(table.heading(row)))}</h2><ul>{said}</ul>"
        "<table><thead><tr><th>role</th>"
        "<th>likeliest token the same</th><th>mean KL</th><th></th></tr></thead><tbody>"
        f"{''.join(lines)}</tbody></table>"
    )


def _bundle(folder: str, bundle: Mapping[str, Any]) -> str:
    facts = {
        "reference": bundle["reference"],
        "made with": bundle["versions"],
        "source": bundle["source"],
    }
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td><code>{escape(json.dumps(value, ensure_ascii=False))}"
        "</code></td></tr>"
        for name, value in facts.items()
    )
    return (
        f"<h2>Bundle of {escape(folder)}</h2><p>{bundle['prompts']} prompts, "
        f"{bundle['positions']} positions, {bundle['items']} problems.</p><table>{rows}</table>"
    )


def page(report: Mapping[str, Any]) -> str:
    """The page of a report as of :func:`mlx_fd.export.compare.report`."""
    parity = report["parity"]
    word = "The same model everywhere" if parity else "Not the same model everywhere"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>mlx-fd compare: {word}</title><style>{_STYLE}</style></head><body>"
        f'<h1 class="{"good" if parity else "bad"}">{word}</h1>'
        f"{_table(report['rows'])}"
        f"{''.join(_roles(row) for row in report['rows'] if row['measures'])}"
        f"<h2>What is compared</h2>{_METHOD}"
        f"{''.join(_bundle(folder, found) for folder, found in report['bundles'].items())}"
        "</body></html>\n"
    )


@contextlib.contextmanager
def report_folder(folder: Path) -> Iterator[None]:
    """Claim a folder and make sure, before hours of work, that a report can be written there.

    Raises:
        UserError: it is not ours, or it cannot be made or written to.
    """
    with claimed(folder, COMPARISON):
        # Permissions do not tell of a file system that is read-only.
        with _explained(folder), tempfile.TemporaryFile(dir=folder):
            pass
        yield


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write ``compare.json`` and ``compare.html`` into a :func:`report_folder`.

    Raises:
        UserError: they cannot be written.
    """
    with _explained(folder):
        write_json(folder / "compare.json", report)
        write_atomic(folder / "compare.html", page(report))


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: the comparison cannot be written there ({failed_write(error)}); choose "
            "another --out"
        ) from error
