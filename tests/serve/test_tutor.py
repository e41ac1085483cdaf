"""The tutor as a learner sees it: in a browser, on the command line, and as its page asks."""

import http.client
import json
import os
import shutil

import pytest
from click.testing import CliRunner

from mlx_fd.cli import cli
from support.serving import KEY, serving
from support.trained import make_run

QUESTION = (
    "Leo starts with 47 books. Eva gives Leo 2 books. Eva has 17 shells. Leo sells 16 books. "
    "How many books are left?"
)
WRONG, RIGHT = "47+2=49\n49-17=32", "47 + 2 = 49\n49-16=33"
HOSTILE = "<img src=x onerror='window.harmed=1'><script>window.harmed=1</script>\u202e</textarea>"
PATIENCE = 120_000
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A student that judges and solves as the tiny expert does; its score head says nothing."""
    return make_run(tmp_path_factory.mktemp("tutor") / "run", "tiny", strength=0.0)


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("tutor-server"), run) as server:
        yield server


def request(server, method, path, content=None, key=KEY):
    """Status, headers and body of a reply."""
    there = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    there.request(method, path, None if content is None else json.dumps(content), headers)
    reply = there.getresponse()
    return reply.status, dict(reply.headers), reply.read().decode()


def look(server, attempt, problem=QUESTION):
    status, _, body = request(server, "POST", "/v1/tutor", {"problem": problem, "attempt": attempt})
    assert status == 200, body
    return json.loads(body)


def test_an_attempt_is_marked_and_its_revision_found_right(server):
    found = look(server, f"{WRONG}\n#### 32")
    assert found["state"] == "wrong" and found["first_wrong_step"] == 2
    assert [step["mark"] for step in found["steps"]] == ["right", "wrong"]
    assert found["final"] == {"text": "32", "mark": "wrong"} and found["checked_by"] == "student"
    assert found["hints"][0] == "Look at step 2 again." and len(found["hints"]) == 3
    assert not any("33" in hint for hint in found["hints"]) and "33" in found["feedback"]
    found = look(server, f"{RIGHT}\n#### 33")
    assert found["state"] == "right" and found["hints"] == []
    assert [step["mark"] for step in found["steps"]] == ["right", "right"]
    assert found["final"]["mark"] == "right"
    # The same on the command line, word for word.
    assert look(server, f"{WRONG}\n#### 32") == look(server, f"Step 1: {WRONG}\nAnswer: 32")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"problem": QUESTION}, "Missing required parameter: 'attempt'"),
        ({"problem": " ", "attempt": "1"}, "'problem' is empty"),
        ({"problem": QUESTION, "attempt": "step 1:\n####"}, "neither a step nor an answer"),
        ({"problem": QUESTION, "attempt": "1+1=2\n" * 65}, "65 steps"),
        ({"problem": QUESTION, "attempt": "1", "hints": 3}, "Unrecognized request argument"),
        ({"problem": QUESTION * 900, "attempt": "1"}, "shorten it"),
    ],
)
def test_what_cannot_be_judged_is_refused(server, content, says):
    status, _, body = request(server, "POST", "/v1/tutor", content)
    assert status == 400 and says in body


def test_the_page_asks_nobody_else_and_judging_needs_the_key(server):
    for path, kind in (("/", "html"), ("/tutor.css", "css"), ("/tutor.js", "javascript")):
        status, headers, body = request(server, "GET", path, key="")
        assert status == 200 and kind in headers["content-type"]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "//" not in body.replace("// ", "") and "innerHTML" not in body
    content = {"problem": QUESTION, "attempt": "1"}
    assert request(server, "POST", "/v1/tutor", content, key="")[0] == 401
    assert request(server, "GET", "/tutor.py")[0] == 404


def test_on_the_command_line(run, server):
    given = ["tutor", str(run), "--problem", QUESTION, "--attempt", f"{WRONG}\n#### 32"]
    found = CliRunner().invoke(cli, [*given, "--json"])
    assert json.loads(found.stdout) == look(server, f"{WRONG}\n#### 32")
    sitting = f"{QUESTION}\n\n{WRONG}\n#### 32\n\nh\nh\nr\n{RIGHT}\n#### 33\n\n\n"
    found = CliRunner().invoke(cli, ["tutor", str(run)], input=sitting)
    assert found.exit_code == 0
    assert "Step 2: 49-17=32  the first wrong step" in found.stdout
    assert "Look at step 2 again." in found.stdout and "This looks right." in found.stdout
    assert "33" not in found.stdout.partition("[r]evise")[0]
    lonely = CliRunner().invoke(
        cli, ["tutor", str(run), "--problem", QUESTION], standalone_mode=False
    )
    assert "go together" in str(lonely.exception)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


def check(page, problem, steps, final):
    page.fill("#problem", problem)
    page.fill("#steps", steps)
    page.fill("#final", final)
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => !document.getElementById('check').disabled")


@pytest.mark.parametrize("look", [{"color_scheme": "light"}, {"color_scheme": "dark"}, "phone"])
def test_a_learner_in_a_browser(server, browser, look):
    phone = look == "phone"
    options = {"viewport": {"width": 360, "height": 740}, "has_touch": True} if phone else look
    context = browser.new_context(**options)
    page, wrong, asked = context.new_page(), [], []
    page.set_default_timeout(PATIENCE)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda one: asked.append(one.url))
    page.goto(f"{server.address}/")
    check(page, QUESTION, WRONG, "32")
    # The server has a key: the page asks for it, and once.
    assert "API key" in page.inner_text("#error")
    page.fill("#key", KEY)
    check(page, QUESTION, WRONG, "32")
    assert page.inner_text("#state") == "Not right yet"
    assert page.evaluate("document.activeElement.id") == "state"
    assert page.get_attribute("#marks li:nth-child(2)", "data-mark") == "wrong"
    assert not page.is_visible("#feedback") and page.inner_text("#hints") == ""
    for place in (1, 2, 3):
        page.press("#hint", "Enter")
        assert page.locator("#hints li").count() == place
    assert page.is_disabled("#hint") and "33" not in page.inner_text("#result")
    check(page, QUESTION, RIGHT, "33")
    assert page.inner_text("#state") == "This looks right" and not page.is_visible("#help")
    assert "2 tries" in page.inner_text("#past")
    # What is written while an attempt is checked is none of it.
    held = {}
    page.route("**/v1/tutor", lambda route: held.update(route=route))
    with page.expect_request("**/v1/tutor"):
        page.press("#steps", "Control+Enter")
    page.fill("#steps", "later")
    held["route"].continue_()
    page.wait_for_function("() => !document.getElementById('check').disabled")
    page.unroute("**/v1/tutor")
    page.click("#past li:nth-child(1) button")
    assert page.input_value("#steps") == RIGHT
    check(page, HOSTILE + QUESTION, HOSTILE, HOSTILE)
    assert page.evaluate("window.harmed") is None
    assert HOSTILE[:60] in page.inner_text("#marks")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # What is kept is the browser's: it is there again, can be opened, and forgotten.
    page.reload()
    page.click("#past li:nth-child(2) button")
    assert page.input_value("#problem") == QUESTION
    page.click("#forget")
    assert page.evaluate("localStorage.length") == 0
    assert wrong == [] and all(url.startswith(server.address) for url in asked)
    context.close()
