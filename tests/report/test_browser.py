"""The report in a real browser: no harm, no errors, search, keyboard, themes, phone, print.

Needs Chromium (or Chrome) and the Python package playwright; skipped where one is missing.
"""

import base64
import contextlib
import functools
import itertools
import os
import shutil

import pytest

from mlx_fd.files import write_json
from mlx_fd.report import comparison_page
from mlx_fd.report.page import make_page, write_page
from mlx_fd.report.reading import read_runs
from support import reported
from support.draws import by_day

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium here")
# A busy machine is no defect of the page.
PATIENCE = 60_000


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox does not start for root, as whom containers often run tests.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports of a plain run, of two, of a hostile one; the same of self-distillation."""
    folder = tmp_path_factory.mktemp("reports")
    rows = [reported.episode(n, correct_after=n % 3 > 0) for n in range(120)]
    rows[7]["correct_before"], rows[7]["correct_after"] = True, False
    rows[9]["student_feedback"]["written_score"] = None
    rows[0]["tokens"] |= {"student_solution": 7, "later_step": 9}
    rows[11]["question"] = "The zebra's question, of which there is one."
    rows += [reported.alone(n, correct_before=True) for n in range(120, 130)]
    rows[121]["expert_solution"] = {"text": "3 + 4 = 7\n#### 7", "final": "7"}
    metrics = [reported.metric(n, frozen=n == 5) for n in range(6)]
    one = reported.write_run(folder / "one", rows, metrics)
    (one / "eval" / "fast").mkdir(parents=True)
    write_json(one / "pareto.json", reported.pareto(one))
    write_json(one / "eval" / "fast" / "eval.json", reported.evaluation())
    two = reported.write_run(folder / "two", finished=False, options={"seed": 1})
    made = {
        "one": [one],
        "both": [one, two],
        "hostile": [reported.hostile_run(folder / "<script>window.harmed=1<" / "script>&\"'")],
    }
    attempts = [reported.attempt(n, correct=n % 4 == 1, teaches=n < 60) for n in range(120)]
    attempts[8] |= {"finished": False, "final": None, "teacher": None, "note": ""}
    metrics = [reported.self_metric(n, wrong=0.5 - n / 20, frozen=n == 5) for n in range(6)]
    three = reported.write_self_run(folder / "three", attempts, metrics)
    four = reported.write_self_run(folder / "four", finished=False, options={"method": "sdft"})
    made |= {
        "attempts": [three],
        "methods": [three, four],
        "harm": [reported.hostile_self_run(folder / "<b>" / "<i>")],
    }
    # Lines of a single point.
    brief = reported.write_run(folder / "brief", [reported.episode(0)], [reported.metric(0)])
    once = [reported.self_metric(n, wrong=0.5 if n == 3 else None) for n in range(4)]
    batch = reported.write_self_run(
        folder / "batch", [reported.attempt(0)], [reported.self_metric(0)], finished=False
    )
    made |= {
        "brief": [brief],
        "once": [reported.write_self_run(folder / "once", None, once)],
        "batch": [batch],
    }
    for name, folders in made.items():
        write_page(make_page(read_runs(folders)), folder / f"{name}.html")
    for name, text in (("", "a name"), ("hostile-", " ".join(reported.HOSTILE))):
        compared = comparison_page.page(reported.comparison(text, failure=text))
        write_page(compared, folder / f"{name}comparison.html")
        write_page(reported.advantage_page(text), folder / f"{name}advantage.html")
    return folder


def has_script(name):
    return not name.endswith(("comparison", "advantage"))


PHONE = {"width": 390, "height": 844}


@contextlib.contextmanager
def opening(browser, pages):
    """Opens a page as a file, waits for all of it, and checks that nothing complained."""
    contexts, said = [], []

    def open_page(name, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: said.append("dialog"))
        page.on(
            "request",
            lambda request: (
                said.append(request.url) if not request.url.startswith("file:") else None
            ),
        )
        page.goto((pages / f"{name}.html").as_uri())
        if has_script(name):
            page.wait_for_selector("html[data-charts=drawn]")
            page.wait_for_selector("#record h3")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture
def opened(browser, pages):
    """Pages for one test, which may change what they show."""
    with opening(browser, pages) as open_page:
        yield open_page


@pytest.fixture(scope="module")
def shared(browser, pages):
    """Pages that are only looked at: each is drawn once, for all tests that do so."""
    with opening(browser, pages) as open_page:
        yield functools.cache(
            lambda name, phone=False: open_page(name, **({"viewport": PHONE} if phone else {}))
        )


def wait_title(page, title):
    page.wait_for_function(
        "title => document.querySelector('#record h3')?.textContent === title", arg=title
    )


def luminance(colour):
    channels = [int(c) / 255 for c in colour[4:-1].split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def count(page):
    return page.inner_text("#count")


def wait_count(page, text):
    page.wait_for_function(
        "text => document.querySelector('#count').textContent === text", arg=text
    )


@pytest.mark.parametrize(
    ("name", "least"), [("one", 13), ("both", 13), ("attempts", 12), ("methods", 12)]
)
def test_every_chart_is_drawn_with_a_text_in_its_place(shared, name, least):
    page = shared(name)
    charts = page.query_selector_all(".chart")
    assert len(charts) >= least
    for chart in charts:
        assert chart.query_selector("svg")
        assert len(chart.get_attribute("aria-label")) > 20
        marks = chart.query_selector_all(
            "svg .mark-line path, svg .mark-symbol path, svg .mark-rect path"
        )
        assert marks


@pytest.mark.parametrize("name", ["one", "both", "attempts", "methods", "brief", "once", "batch"])
def test_no_chart_is_empty(shared, name):
    page = shared(name)
    empty = page.evaluate(
        """[...document.querySelectorAll('figure')].filter(figure => ![...figure.querySelectorAll(
            '.mark-line path, .mark-symbol path, .mark-rect path'
        )].some(mark => {
            if (mark.closest('.role-legend')) return false;
            const style = getComputedStyle(mark), box = mark.getBoundingClientRect();
            return +style.opacity > 0.5 && Math.max(box.width, box.height) >= 5;
        })).map(figure => figure.querySelector('h3, h4').textContent)"""
    )
    assert empty == []


LEGENDS = """[...document.querySelectorAll('figure')].flatMap(figure => {
    const head = figure.querySelector('h3, h4').getBoundingClientRect();
    return [...figure.querySelectorAll('.role-legend-symbol path')].map(mark => {
        const style = getComputedStyle(mark);
        const filled = !['none', 'transparent', 'rgba(0, 0, 0, 0)'].includes(style.fill);
        return {
            title: figure.querySelector('h3, h4').textContent,
            colour: filled ? style.fill : style.stroke,
            opacity: style.opacity * (filled ? style.fillOpacity : style.strokeOpacity),
            under: mark.getBoundingClientRect().top - head.bottom,
        };
    });
})"""


CUT = """[...document.querySelectorAll('.chart svg text')].filter(text => {
    const box = text.getBoundingClientRect();
    return text.textContent && (box.left < 0 || box.right > innerWidth);
}).map(text => text.textContent)"""


@pytest.mark.parametrize("name", by_day(["one", "attempts", "both", "hostile", "methods", "harm"]))
def test_legends_are_whole_and_seen(shared, name):
    """In both themes, on a phone, and when a window becomes as narrow as one."""
    page = shared(name, phone=True)
    for width in (390, 800, 390):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_function(
            "width => Math.abs(document.querySelector('.chart svg').clientWidth - width) < 80",
            arg=width if width < 800 else 736,
        )
        assert page.evaluate(CUT) == []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            back = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (luminance(back) > 0.5) == (scheme == "light")
            swatches = page.evaluate(LEGENDS)
            assert swatches
            for swatch in swatches:
                assert swatch["opacity"] == 1, swatch
                assert contrast(back, swatch["colour"]) >= 3, swatch
                assert swatch["under"] >= 0, swatch  # not over the figure's title


EDGES = """image => new Promise(resume => {
    const shown = new Image();
    shown.onload = () => {
        const canvas = Object.assign(document.createElement('canvas'), {
            width: shown.width, height: shown.height
        });
        const context = canvas.getContext('2d');
        context.drawImage(shown, 0, 0);
        const row = shown.height - 6;
        const at = x => [...context.getImageData(x, row, 1, 1).data].slice(0, 3);
        resume([at(1), at(shown.width - 2)]);
    };
    shown.src = image;
})"""


@pytest.mark.parametrize(
    ("name", "width"),
    by_day(
        [
            ("one", 390),
            ("attempts", 390),
            ("hostile-comparison", 390),
            ("advantage", 390),
            ("both", 800),
            ("advantage", 800),
        ]
    ),
)
def test_a_table_that_goes_on_shows_it_and_can_be_scrolled_by_keyboard(
    opened, browser, name, width
):
    page = opened(name, viewport={"width": width, "height": 844})
    page.evaluate("document.querySelectorAll('details').forEach(it => it.open = true)")
    regions = page.query_selector_all("main *:has(> table)")
    # Where less is out of sight, it is the margin of the last column.
    wide = [it for it in regions if it.evaluate("it => it.scrollWidth > it.clientWidth + 16")]
    assert wide
    for region in wide:
        assert region.get_attribute("tabindex") == "0"
        assert region.get_attribute("role") == "region"
        assert region.get_attribute("aria-label")
        assert region.evaluate("""it => {
            const words = document.createRange();
            words.selectNodeContents(it.querySelector('caption'));
            const lines = [...words.getClientRects()];
            return lines.every(line => line.right <= it.getBoundingClientRect().right + 1);
        }""")
    student_lm = browser.new_page()
    region = wide[-1]

    def shaded():
        """Whether there is a shadow at the left and at the right edge."""
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        plain = [int(channel) for channel in back[4:-1].split(",")]
        image = base64.b64encode(region.screenshot()).decode()
        edges = student_lm.evaluate(EDGES, f"data:image/png;base64,{image}")
        return [
            sum(abs(one - other) for one, other in zip(edge, plain, strict=True)) > 60
            for edge in edges
        ]

    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        region.evaluate("it => { it.scrollLeft = 0; }")
        assert shaded() == [False, True]
        region.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("it => it.scrollLeft > 0", arg=region)
        # A smooth scroll goes on for a while.
        page.wait_for_timeout(500)
        region.evaluate("it => { it.scrollLeft = it.scrollWidth; }")
        assert shaded() == [True, False]
    student_lm.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "name", ["comparison", "advantage", "hostile-comparison", "hostile-advantage"]
)
def test_pages_without_a_script(opened, name, scheme):
    """The policy lets their styles through, and they are read on a phone and in both themes."""
    page = opened(name, viewport=PHONE, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("window.harmed") is None
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(back) > 0.5) == (scheme == "light")
    words = page.evaluate(
        """[...document.querySelectorAll('main *, header *')]
            .filter(it => it.checkVisibility() && it.textContent.trim() && !it.children.length)
            .map(it => [getComputedStyle(it).color, it.textContent.trim()])"""
    )
    assert len(words) > 40
    assert [word for colour, word in words if contrast(back, colour) < 4.5] == []
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(it => +it.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_bars_of_a_comparison_are_as_long_as_their_numbers(opened):
    page = opened("comparison")
    widths = [rect.bounding_box()["width"] for rect in page.query_selector_all(".amount rect")]
    assert widths[0] == pytest.approx(160, abs=1)
    assert widths[1] == pytest.approx(40, abs=1)


@pytest.mark.parametrize("media", ["screen", "print"])
def test_a_tokens_shade_is_seen_and_printed(opened, media):
    page = opened("advantage", color_scheme="dark")
    page.emulate_media(media=media)
    found = {
        shade: page.evaluate(
            """shade => {
                const style = getComputedStyle(document.querySelector(`.${shade}[title]`));
                return [style.backgroundColor, style.printColorAdjust];
            }""",
            shade,
        )
        for shade in ("f1", "f2", "f3", "f4", "a1", "a2", "a3", "a4")
    }
    assert len({colour for colour, _ in found.values()}) == 8
    if media == "print":
        assert {adjust for _, adjust in found.values()} == {"exact"}
        assert luminance(page.evaluate("getComputedStyle(document.body).color")) < 0.1
        assert page.pdf(format="A4")[:5] == b"%PDF-"


def test_a_chart_answers_the_pointer(opened):
    page = opened("one")
    page.locator("figure:has-text('lm loss') .mark-symbol path").nth(2).hover(force=True)
    tip = page.wait_for_selector("#vg-tooltip-element.visible")
    assert "held out" in tip.inner_text() or "training" in tip.inner_text()


def test_search_finds_words_in_any_text(opened):
    page = opened("one")
    assert count(page) == "130 of 130 episodes"
    page.fill("#search", "ZEBRA question")
    wait_count(page, "1 of 130 episodes")
    assert page.inner_text("#record h3") == "Episode 11"
    page.fill("#search", "problem-00104")
    wait_count(page, "1 of 130 episodes")
    page.fill("#search", "no such words")
    wait_count(page, "0 of 130 episodes")
    assert "No episode" in page.inner_text("#record")


def test_filters(opened):
    page = opened("one")
    for kind, n, first in (
        ("mended", 79, 1),
        ("spoiled", 1, 7),
        ("wrong", 40, 0),
        ("right", 10, 120),
        ("unreadable", 1, 9),
        ("alone", 10, 120),
        ("learned", 120, 0),
    ):
        page.select_option("#filter", kind)
        wait_count(page, f"{n} of 130 episodes")
        assert f"({n})" in page.inner_text(f"#filter option[value={kind}]")
        if kind != "learned":  # which the episode before is among, and stays open
            wait_title(page, f"Episode {first}")
    page.select_option("#filter", "capped")
    wait_count(page, "0 of 130 episodes")


def test_the_keyboard_is_enough(opened):
    page = opened("one")
    page.focus("#later")
    page.keyboard.press("Enter")
    assert page.inner_text("#page") == "page 2 of 3"
    page.focus("#earlier")
    page.keyboard.press("Enter")
    page.focus("#list button[tabindex='0']")
    title = """title => document.querySelector('#record h3').textContent === title
        && document.activeElement.getAttribute('aria-current') === 'true'"""
    for key, shown in (
        ("ArrowDown", 1),
        ("ArrowDown", 2),
        ("ArrowUp", 1),
        ("End", 129),
        ("Home", 0),
        ("PageDown", 50),
    ):
        page.keyboard.press(key)
        page.wait_for_function(title, arg=f"Episode {shown}")
    assert page.inner_text("#page") == "page 2 of 3"
    # One stop for the whole list.
    assert len(page.query_selector_all("#list button[tabindex='0']")) == 1
    page.click("text=Next >> nth=1")
    wait_title(page, "Episode 51")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_both_feedbacks_stand_side_by_side_with_their_differences(opened):
    page = opened("one")
    marks = [m.inner_text() for m in page.query_selector_all(".pair .expert mark")]
    assert " ".join(marks).split() == ["should", "be", "one", "less"]
    assert [m.inner_text() for m in page.query_selector_all(".pair .student mark")] == [
        "is",
        "right",
    ]
    boxes = [page.locator(f".pair .{side} pre").bounding_box() for side in ("expert", "student")]
    assert boxes[0]["y"] == pytest.approx(boxes[1]["y"], abs=30)
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
    colour = "getComputedStyle(document.querySelector('.pair mark')).backgroundColor"
    before = page.evaluate(colour)
    page.click("text=mark the words")
    assert page.evaluate(colour) != before


def test_what_each_step_took_is_shown_of_all_steps(opened):
    page = opened("one")
    cells = page.eval_on_selector_all(
        "#record tbody th", "heads => heads.map(h => [h.textContent, h.nextSibling.textContent])"
    )
    assert ["student's own solution", "7"] in cells and ["later step", "9"] in cells


def test_it_is_said_why_an_answer_stayed(opened, pages, browser):
    page = opened("one")
    for number, why in ((120, "combined score reached the target"), (121, "came to the same")):
        page.goto((pages / "one.html").as_uri() + f"#e-0-{number}")
        page.reload()
        wait_title(page, f"Episode {number}")
        text = page.inner_text("#record")
        assert why in text
        assert ("Expert's own solution" in text) == ("3 + 4 = 7" in text) == (number == 121)


def test_an_episode_can_be_linked_to(opened, pages, browser):
    page = opened("both")
    page.goto((pages / "both.html").as_uri() + "#e-1-5")
    page.reload()
    wait_title(page, "two, episode 5")
    page.click("text=The same problem in one")
    wait_title(page, "one, episode 5")
    page.select_option("#of", "1")
    wait_count(page, "12 of 142 episodes")


def test_nothing_a_model_wrote_does_harm(opened):
    page = opened("hostile")
    for number in range(5):
        page.evaluate("n => document.querySelectorAll('#list button')[n].click()", number)
        wait_title(page, f"Episode {number}")
    page.hover("figure .chart svg >> nth=0", position={"x": 150, "y": 100})
    assert page.evaluate("window.harmed") is None
    assert not page.query_selector_all("main img, main iframe, main b, figure a[href]")
    page.evaluate("document.querySelectorAll('#list button')[0].click()")
    wait_title(page, "Episode 0")
    shown = page.inner_text("#record")
    assert "<script>window.harmed = 1</script>" in shown
    assert "\u2400\u2401" in shown  # control characters, as pictures
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_attempts_are_found_by_what_they_are(opened):
    page = opened("attempts")
    assert count(page) == "120 of 120 attempts"
    for kind, n, first in (
        ("right", 30, 1),
        ("wrong", 90, 0),
        ("silent", 60, 60),
        ("cut", 1, 8),
        ("unread", 1, 8),
    ):
        page.select_option("#filter", kind)
        wait_count(page, f"{n} of 120 attempts")
        wait_title(page, f"Attempt {first}")
    assert "Nothing more than the student" in page.inner_text("#record")
    page.select_option("#filter", "all")
    page.fill("#search", "41 mended")
    wait_title(page, "Attempt 41")
    # What a critic has changed is marked; the other attempt at the problem is a button away.
    assert [m.inner_text() for m in page.query_selector_all("#record mark")] == ["mended", "mended"]
    page.click("#record button:has-text('#40 wrong')")
    wait_title(page, "Attempt 40")


def test_methods_are_compared_problem_by_problem(opened):
    page = opened("methods")
    page.select_option("#of", "1")
    wait_title(page, "four, attempt 0")
    page.click("text=The same problem in three")
    wait_title(page, "three, attempt 0")


def test_nothing_written_in_an_attempt_does_harm(opened):
    page = opened("harm")
    for number in (1, 2, 3, 0):
        page.evaluate("n => document.querySelectorAll('#list button')[n].click()", number)
        wait_title(page, f"Attempt {number}")
    assert page.evaluate("window.harmed") is None
    assert not page.query_selector_all("main img, main iframe, main b, figure a[href]")
    shown = page.inner_text("#record")
    assert "<script>window.harmed = 1</script>" in shown
    assert "\u2400\u2401" in shown


def test_a_long_text_is_folded_and_whole(opened):
    page = opened("hostile")
    page.evaluate("document.querySelectorAll('#list button')[3].click()")
    button = page.wait_for_selector("#record button[aria-expanded]")
    assert button.inner_text() == "Show all 100,000 characters"
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    assert page.evaluate(
        "[...document.querySelectorAll('#record pre')].some(p => p.textContent.length === 100000)"
    )


@pytest.mark.parametrize("name", ["one", "both", "hostile", "methods", "harm"])
def test_a_phone_scrolls_in_one_direction(shared, name):
    page = shared(name, phone=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_both_themes_and_the_toggle(opened, scheme):
    page = opened("one", color_scheme=scheme)

    def colours():
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        texts = {
            s: page.evaluate("s => getComputedStyle(document.querySelector(s)).color", s)
            for s in ("body", "caption", "a[href='#summary']", "#list .good", "#list .bad")
        }
        line = page.evaluate(
            "getComputedStyle(document.querySelector('.chart .mark-line path')).stroke"
        )
        return back, texts, line

    back, texts, line = colours()
    assert (luminance(back) > 0.5) == (scheme == "light")

    # WCAG 2.2 AA: text 4.5, graphics 3.
    assert {s: contrast(back, c) for s, c in texts.items() if contrast(back, c) < 4.5} == {}
    assert contrast(back, line) >= 3
    assert page.inner_text("#theme") == ("Dark theme" if scheme == "light" else "Light theme")
    page.click("#theme")
    other, _, other_line = colours()
    assert (luminance(other) > 0.5) != (scheme == "light")
    assert other_line != line


@pytest.mark.parametrize("name", ["both", "methods"])
def test_landmarks_headings_and_labels(shared, name):
    page = shared(name)
    assert [
        page.locator(tag).count() for tag in ("main", "header", "footer", "nav[aria-label]")
    ] == [1, 1, 1, 1]
    levels = page.evaluate(
        """[...document.querySelectorAll('h1, h2, h3, h4')]
            .filter(head => head.checkVisibility()).map(head => +head.tagName[1])"""
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    unnamed = page.evaluate("""[...document.querySelectorAll('input, select, button')].filter(
        e => !e.labels?.length && !e.textContent.trim() && !e.ariaLabel).length""")
    assert unnamed == 0
    assert page.evaluate(
        """[...document.querySelectorAll('main table')].every(
            table => table.caption && table.querySelector('th[scope=row]'))"""
    )
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_it_prints_on_white_without_controls(opened):
    page = opened("one", color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert luminance(page.evaluate("getComputedStyle(document.body).color")) < 0.1
    assert not page.is_visible("#search")
    assert page.is_visible(".chart svg >> nth=0")
    assert page.pdf(format="A4")[:5] == b"%PDF-"
