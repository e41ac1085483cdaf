"""A report's page as a browser would take it apart."""

import base64
import gzip
import html.parser
import json
import sys

import altair as alt
import pytest
from altair.utils.schemapi import validate_jsonschema

from mlx_fd import cli


class Scripts(html.parser.HTMLParser):
    """A page's elements and attributes as a browser's parser would come to them."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.text, self._in = [], [], [], None

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._in = tag
        if tag == "script":
            self.scripts.append((dict(attrs), []))

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in == "script":
            self.scripts[-1][1].append(data)
        else:
            self.text.append(data)


def parsed(page):
    parser = Scripts()
    parser.feed(page)
    parser.close()
    return parser


def check_charts(page):
    """Make sure that a page's charts keep to Vega-Lite's schema; how many there are."""
    written = [
        json.loads("".join(text))
        for attributes, text in parsed(page).scripts
        if attributes.get("type") == "application/json"
    ]
    charts = [one for one in written if isinstance(one, dict) and "$schema" in one]
    for chart in charts:
        # It goes to Vega as it is, with a layout of legends that Vega-Lite's schema has not.
        del chart["config"]["legend"]["layout"]
        validate_jsonschema(chart, alt.load_schema())
    return len(charts)


def unpacked(text):
    return json.loads(gzip.decompress(base64.b64decode(text)))


def run_cli(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mlx-fd", "report", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code, out, err
