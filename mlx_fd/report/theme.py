"""How every chart looks, on the report's page and in a file of its own.

Charts are Vega-Lite, made with Altair. On the page their colours are the page's CSS variables, so
that a chart follows the theme, and the printer, without being drawn again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt

from mlx_fd.files import write_atomic


@dataclass(frozen=True)
class Palette:
    """Colours: of text, of less important text, of lines, and of what is told apart."""

    text: str
    soft: str
    line: str
    back: str
    series: tuple[str, ...]


# The series are Okabe and Ito's colours, which the colour-blind can tell apart, the light ones
# darkened until they have three times the contrast of white; page.css has them for dark pages too.
PAPER = Palette(
    "#1d2126",
    "#5c6570",
    "#d9dde2",
    "#ffffff",
    ("#0072b2", "#c25400", "#00805d", "#a8487a", "#7a6a00", "#3f7fae", "#4d5560"),
)
PAGE = Palette(
    "var(--text)",
    "var(--soft)",
    "var(--line)",
    "transparent",
    tuple(f"var(--series-{place})" for place in range(1, len(PAPER.series) + 1)),
)


def themed(chart: alt.TopLevelMixin, palette: Palette = PAGE) -> dict[str, Any]:
    """A chart's Vega-Lite specification with a palette's colours and the page's type."""
    letters = {"labelFont": _FONT, "titleFont": _FONT, "labelFontSize": 12, "titleFontSize": 12}
    quiet = {"labelColor": palette.soft, "titleColor": palette.soft, "titleFontWeight": "normal"}
    config = {
        "background": palette.back,
        "font": _FONT,
        "view": {"stroke": None},
        "axis": {
            **letters,
            **quiet,
            "gridColor": palette.line,
            "domainColor": palette.line,
            "tickColor": palette.line,
        },
        # Numbers that touch are read as one number.
        "axisQuantitative": {"labelOverlap": "greedy", "labelSeparation": 6},
        "legend": {
            **letters,
            **quiet,
            "labelColor": palette.text,
            "orient": "top",
            "title": None,
            # Two legends stand below each other: beside each other a phone would cut the second.
            "layout": {"top": {"direction": "vertical", "anchor": "start"}},
        },
        "header": {**letters, **quiet},
        "title": {"color": palette.text, "font": _FONT, "fontSize": 13, "anchor": "start"},
        "range": {"category": list(palette.series)},
        "mark": {"color": palette.series[0]},
        "rule": {"color": palette.soft},
        "text": {"color": palette.text, "font": _FONT},
        "line": {"strokeWidth": 2},
    }
    # That charts keep to Vega-Lite's schema is tested, and not looked at for each page anew.
    specification: dict[str, Any] = chart.to_dict(validate=False)
    # Altair writes a size of its own there, for charts that have none.
    specification["config"] = config
    return specification


def save_svg(chart: alt.TopLevelMixin, path: Path) -> None:
    """Write a chart as an SVG file, on white."""
    import vl_convert

    write_atomic(path, vl_convert.vegalite_to_svg(themed(chart, PAPER)))


_FONT = "system-ui, sans-serif"
