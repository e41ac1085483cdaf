"""Every page of ours alike: the mark that it is ours, the policy, text that stays text."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from mlx_fd import __version__
from mlx_fd.report import comparison_page
from mlx_fd.report.page import make_page, write_page
from mlx_fd.report.reading import read_runs
from mlx_fd.text import strip_control_chars
from support import reported

BAD = " ".join(reported.HOSTILE)
VOID = ("meta", "br", "input", "rect")


class Reader(HTMLParser):
    """Elements with their attributes, the texts of elements, and whether all are closed."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.styles, self.scripts = [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        {"style": self.styles, "script": self.scripts}.get(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.styles[-1] += data
        elif self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    def meta(self, **wanted):
        return [
            found["content"]
            for tag, found in self.elements
            if tag == "meta" and wanted.items() <= found.items()
        ]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    loop = reported.hostile_run(folder / "a <b>&'\"run")
    self_run = reported.hostile_self_run(folder / "an <i>&'\"run")
    return {
        "report": make_page(read_runs([loop])),
        "attempts": make_page(read_runs([self_run])),
        "comparison": comparison_page.page(reported.comparison(BAD, failure=BAD)),
        "advantage": reported.advantage_page(BAD),
    }


NAMES = ["report", "attempts", "comparison", "advantage"]


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_that_it_is_ours(pages, name, tmp_path):
    found = Reader(pages[name])
    assert found.meta(name="generator") == [f"mlx-fd {__version__}"]
    assert found.elements[0][0] == "html"
    # By that a file of ours is known, which may be written over.
    write_page(pages[name], tmp_path / "page.html")
    write_page("<!doctype html>", tmp_path / "page.html")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_allows_its_own_styles_and_scripts_and_nothing_else(pages, name):
    found = Reader(pages[name])
    (policy,) = found.meta(**{"http-equiv": "Content-Security-Policy"})
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    digest = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in found.styles
    ]
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert [rules["style-src"]] == digest
    if name in ("comparison", "advantage"):
        assert rules["script-src"] == "'none'"
        assert found.scripts == []
    # What the policy forbids would silently not be there.
    assert not [attributes for _, attributes in found.elements if "style" in attributes]


@pytest.mark.parametrize("name", ["comparison", "advantage"])
def test_no_text_becomes_markup(pages, name):
    found = Reader(pages[name])
    assert not {tag for tag, _ in found.elements} & {"script", "img", "iframe", "object", "link"}
    for tag, attributes in found.elements:
        assert not [key for key in attributes if key.startswith("on")], tag
        assert attributes.get("href", "#").startswith("#")
    assert "<script>window.harmed = 1</script>" in found.text
    assert "{{ 7 * 7 }}" in found.text


@pytest.mark.parametrize("name", ["comparison", "advantage"])
def test_every_text_of_a_page_may_be_hostile(pages, name):
    """Wherever a made-up name stands, the hostile one does, unchanged but for what HTML cannot."""
    if name == "comparison":
        plain = comparison_page.page(reported.comparison("PLAIN", failure="PLAIN"))
    else:
        plain = reported.advantage_page("PLAIN")
    places = Reader(plain).text.count("PLAIN")
    assert places > 10
    assert Reader(pages[name]).text.count("<img src=x onerror=window.harmed=1>") == places


@pytest.mark.parametrize("name", NAMES)
def test_a_pages_bytes_are_valid(pages, name):
    pages[name].encode("utf-8")  # a half of a surrogate pair would raise
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e]", pages[name])


def test_what_html_cannot_hold_is_replaced():
    assert strip_control_chars("a\tb\nc é 漢 \u05d0") == "a\tb\nc é 漢 \u05d0"
    assert strip_control_chars("\x00\x1b[0m\x85\ud800\u202e") == "\ufffd\ufffd[0m\ufffd\ufffd\ufffd"


def test_the_comparisons_numbers_are_in_the_page():
    text = Reader(comparison_page.page(reported.comparison())).text
    for words in (
        "Not the same model everywhere",
        "3 of 4",
        "75.0% of 40",
        "NOT the same: a name",
        "could not be compared: no answer",
        "KL(reference || engine)",
        "1,234.5",
    ):
        assert words in text


def test_the_longest_bar_is_the_largest_divergence():
    found = Reader(comparison_page.page(reported.comparison()))
    bars = [attributes["width"] for tag, attributes in found.elements if tag == "rect"]
    assert bars == ["100.0", "25.0"] * 2


def test_a_comparison_without_a_failure_is_the_same_everywhere():
    report = reported.comparison(failure=None)
    report["rows"] = report["rows"][:1]
    found = Reader(comparison_page.page({**report, "parity": True}))
    assert "The same model everywhere" in found.text
    assert "Not the same" not in found.text
    assert ("h1", {"class": "good"}) in found.elements
