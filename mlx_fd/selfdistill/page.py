"""Advantages as one HTML page that needs nothing beside it: attempts with their tokens coloured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from mlx_fd.evaluation.statistics import Estimate
from mlx_fd.selfdistill.advantage import AFTER, BEFORE, IN, PARTS, RIGHT, Scored, Summary
from mlx_fd.selfdistill.contexts import describe

# Advantages in nats from which on a token has the next shade.
SHADES = (0.1, 0.5, 2.0, 5.0)
_WORDS = {
    RIGHT: "in right attempts",
    BEFORE: "before the first wrong step",
    IN: "in it",
    AFTER: "after it",
}

# Orange and blue are told apart by all common kinds of colour blindness.
_STYLE = """
:root { color-scheme: light dark; --text: #1d2126; --soft: #5a636d; --line: #d9dde2; --back: #fff;
  --for: 0, 104, 190; --against: 224, 112, 0; }
@media (prefers-color-scheme: dark) { :root { --text: #e8ebee; --soft: #a3adb8; --line: #343b43;
  --back: #15191d; --for: 70, 150, 235; --against: 235, 130, 30; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.1rem .3rem 0;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; } small, .soft { color: var(--soft); font-weight: 400; }
.tokens { font: .95rem/1.9 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: .2rem 0 .4rem; }
.tokens span { border-radius: 3px; padding: .1em 0; }
.tokens .wrong { border-bottom: 2px solid currentColor; }
.f1 { background: rgba(var(--for), .12); } .f2 { background: rgba(var(--for), .25); }
.f3 { background: rgba(var(--for), .4); } .f4 { background: rgba(var(--for), .55); }
.a1 { background: rgba(var(--against), .15); } .a2 { background: rgba(var(--against), .3); }
.a3 { background: rgba(var(--against), .45); } .a4 { background: rgba(var(--against), .6); }
"""

_LEGEND = '<span class="tokens">{}</span>'.format(
    " ".join(
        [
            *(f'<span class="a{k}">-{SHADES[k - 1]:g} or less</span>' for k in (4, 3, 2, 1)),
            "near 0",
            *(f'<span class="f{k}">{SHADES[k - 1]:g} or more</span>' for k in (1, 2, 3, 4)),
        ]
    )
)
_METHOD = f"""
<p>One model reads each attempt twice: after the question, and after the question with a context.
A token's advantage is log&nbsp;p(token | question, context) - log&nbsp;p(token | question), in
nats: what self-distillation moves its probability by. The first wrong step is known, because the
problems are generated.</p>
<ul>
<li><b>Mass in the first wrong step</b>: its share of the sum of |advantage| over wrong attempts.
Beside it, its share of their tokens: what a context gives that spreads its mass evenly.</li>
<li><b>Right tokens spoken against</b>: of the tokens of right attempts and of those before a first
wrong step, the share whose advantage is below -0.01.</li>
<li>In brackets 95 % bootstrap intervals over problems.</li>
</ul>
<p>Colours: {_LEGEND}. The <span class="tokens"><span class="wrong">first wrong step</span></span>
is underlined. Under each attempt the same stands in words.</p>
"""


def shade(advantage: float) -> str:
    """The class of a token: ``f`` for, ``a`` against, with 1 to 4; empty near 0."""
    level = sum(abs(advantage) >= least for least in SHADES)
    return f"{'f' if advantage > 0 else 'a'}{level}" if level else ""


def visible(piece: str) -> str:
    """A token's text, escaped, with what cannot be seen made visible."""
    shown = "".join(
        "\u21b5\n" if c == "\n" else c if c.isprintable() else "\N{REPLACEMENT CHARACTER}"
        for c in piece
    )
    return escape(shown)


def _share(found: Estimate) -> str:
    if math.isnan(found.value):
        return "n/a"
    return f"{found.value:.0%} <small>({found.low:.0%} to {found.high:.0%})</small>"


def _mass(row: Summary) -> str:
    if math.isnan(row.tokens_in.value):
        return "n/a"
    return f"{_share(row.mass_in)}; {row.tokens_in.value:.0%} of the tokens"


def _nats(found: Estimate) -> str:
    if math.isnan(found.value):
        return "n/a"
    return f"{found.value:+.2f} <small>({found.low:+.2f} to {found.high:+.2f})</small>"


def _table(rows: Sequence[Summary]) -> str:
    heads = "".join(f"<th>mean {_WORDS[part]}</th>" for part in PARTS)
    lines = [
        f'<tr><th scope="row">{escape(row.context)}</th><td>{row.attempts or "no attempt"} '
        f"<small>({row.wrong} wrong)</small></td>"
        + "".join(f"<td>{_nats(row.mean[part])}</td>" for part in PARTS)
        + f"<td>{_mass(row)}</td>"
        f"<td>{_share(row.negative)}</td></tr>"
        for row in rows
    ]
    return (
        '<div class="scroll"><table><thead><tr><th>context</th><th>attempts</th>'
        f"{heads}<th>mass in the first wrong step</th><th>right tokens spoken against</th></tr>"
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def in_words(item: Scored, name: str) -> str:
    """What a context says of an attempt, for those who do not see the colours; not escaped."""
    values = item.advantages[name]
    against = [k for k, value in enumerate(values) if value < -SHADES[0]]
    speaks = [k for k, value in enumerate(values) if value > SHADES[0]]
    said = f"{len(values)} tokens, {len(speaks)} spoken for, {len(against)} against"
    if against:
        worst = min(against, key=lambda k: values[k])
        where = "" if item.parts[worst] == RIGHT else f" {_WORDS[item.parts[worst]]}"
        where = " in the first wrong step" if item.parts[worst] == IN else where
        where = " after the first wrong step" if item.parts[worst] == AFTER else where
        piece = item.pieces[worst].strip() or "a line's end"
        said += f"; most against {piece!r}{where}, {values[worst]:+.1f}"
    return f"{said}."


def _tokens(item: Scored, name: str) -> str:
    spans = []
    for piece, part, value in zip(item.pieces, item.parts, item.advantages[name], strict=True):
        classes = " ".join(filter(None, (shade(value), "wrong" if part == IN else "")))
        spans.append(f'<span class="{classes}" title="{value:+.2f}">{visible(piece)}</span>')
    return "".join(spans)


def _attempt(item: Scored) -> str:
    kind = "A right attempt" if RIGHT in item.parts else "A wrong attempt"
    views = "".join(
        f'<h3>{escape(name)}</h3><div class="tokens">{_tokens(item, name)}</div>'
        f'<p class="soft">{visible(in_words(item, name))}</p>'
        for name in item.advantages
    )
    return f"<section><h2>{kind}</h2><p>{visible(item.attempt.question)}</p>{views}</section>"


def chosen(scored: Sequence[Scored], wrong: int = 6, right: int = 2) -> list[Scored]:
    """The attempts that are shown: the first ones, each at another problem."""
    found: dict[str, Scored] = {}
    for is_right, most in ((False, wrong), (True, right)):
        fresh = [
            item
            for item in scored
            if (RIGHT in item.parts) == is_right
            and item.advantages
            and item.attempt.problem.id not in found
        ]
        different = {item.attempt.problem.id: item for item in reversed(fresh)}
        first = [item for item in fresh if different[item.attempt.problem.id] is item]
        found |= {item.attempt.problem.id: item for item in first[:most]}
    return list(found.values())


def page(target: str, rows: Sequence[Summary], scored: Sequence[Scored]) -> str:
    """The page.

    Args:
        target: the model or run that was looked at.
        rows: the table.
        scored: all attempts, of which some are shown.
    """
    listed = "".join(
        f"<li><b>{escape(row.context)}</b>: {escape(describe(row.context))}</li>" for row in rows
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>mlx-fd advantage: {visible(target)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Where each context puts its mass: {visible(target)}</h1>"
        f"{_table(rows)}<ul>{listed}</ul>{_METHOD}"
        f"{''.join(map(_attempt, chosen(scored)))}</body></html>\n"
    )
