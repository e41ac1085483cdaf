"""README and docs: links lead somewhere, commands are what they say, the site builds."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mlx_fd
from mlx_fd.cli.app import cli
from mlx_fd.config import OPTIONS
from mlx_fd.runs.plan import configuration
from mlx_fd.runs.unused import check_used
from mlx_fd.training.selfdistill.methods import configured
from support import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
GITHUB = "https://github.com/mlx-fd/mlx-fd/"
LINK = re.compile(r"\]\(([^)\s]+)\)")
SETTING = re.compile(r"`([a-z][a-z_]*)\s=\s[^`=]{1,60}`")
# What was true then stays there.
HISTORY = ("CHANGELOG.md", "docs/log.md")


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", text)


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"(?m)^#+ (.*)$", prose(page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def missing(target: str, page: Path) -> str | None:
    """Why a link of a page leads nowhere; ``None`` where it does, or leads to another site."""
    for prefix in (f"{GITHUB}blob/main/", "https://raw.githubusercontent.com/mlx-fd/mlx-fd/main/"):
        if target.startswith(prefix):
            target, page = target.removeprefix(prefix).removesuffix("?sanitize=true"), ROOT / "x"
    if target.startswith(("https://", "http://")):
        return None
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.exists():
        return f"{target}: there is no such file"
    if anchor and anchor not in anchors(path):
        return f"{target}: there is no such heading"
    return None


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_pictures_lead_somewhere(page):
    links = LINK.findall(prose(page.read_text(encoding="utf-8")))
    assert [found for link in links if (found := missing(link, page))] == []


@pytest.mark.parametrize("page", sorted({*NAMES} - {*HISTORY}))
def test_settings_are_options(page):
    named = SETTING.findall((ROOT / page).read_text(encoding="utf-8"))
    assert sorted({*named} - OPTIONS.keys()) == []


def test_links_that_lead_nowhere_are_found():
    page = ROOT / "README.md"
    assert missing("docs/methods.md#one-episode", page) is None
    assert "file" in missing("docs/nowhere.md", page)
    assert "heading" in missing("docs/methods.md#nowhere", page)
    assert "file" in missing(f"{GITHUB}blob/main/docs/nowhere.md", page)


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 220
    plain = prose("\n".join(lines)).splitlines()
    assert [line for line in plain if len(line) > 100 and not line.startswith("|")] == []


def test_the_page_on_a_package_index_needs_no_repository():
    pytest.importorskip("hatch_fancy_pypi_readme", reason="hatch-fancy-pypi-readme is missing")
    command = [sys.executable, "-m", "hatch_fancy_pypi_readme", str(ROOT / "pyproject.toml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    links = LINK.findall(prose(done.stdout))
    assert len(links) >= 20
    assert [link for link in links if not link.startswith("https://")] == []
    assert [found for link in links if (found := missing(link, ROOT / "README.md"))] == []
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", done.stdout)
    assert pictures and all("raw.githubusercontent.com" in picture for picture in pictures)
    assert "mermaid" not in done.stdout and "[A diagram of an episode](" in done.stdout


def test_the_diagram_stands_on_the_site_as_in_the_readme():
    diagrams = [
        re.findall(r"(?ms)^```mermaid.*?^```$", (ROOT / name).read_text(encoding="utf-8"))
        for name in ("README.md", "docs/index.md")
    ]
    assert len(diagrams[0]) == 1 and diagrams[0] == diagrams[1]


def commands(page: Path) -> list[list[str]]:
    """The arguments of each command that a page's console blocks call."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"(?ms)^```console$(.*?)^```$", text)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    shown = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    parts = [part for line in shown for part in line.split(" && ")]
    return [shlex.split(re.split(r" < ", part)[0], comments=True) for part in parts]


CALLS = [(name, call) for name, page in zip(NAMES, PAGES, strict=True) for call in commands(page)]


@pytest.mark.parametrize(
    ("page", "call"),
    [pair for pair in CALLS if pair[1][0].removeprefix(".venv/bin/") == "mlx-fd"],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_commands_have_the_options_that_they_are_shown_with(page, call):
    _, name, *arguments = call
    with cli.commands[name].make_context(name, arguments) as context:
        given = {key: value for key, value in context.params.items() if value is not None}
    if "config_file" in given or name not in ("loop", "self-distill", "distil"):
        return
    # And each option has an effect.
    preset, changes = given.get("preset_name"), {k: v for k, v in given.items() if k in OPTIONS}
    if name == "loop":
        configuration(preset, None, changes, page)
    else:
        method = given.get("method", "on-policy" if name == "distil" else "custom")
        check_used(configured(method, changes, preset=preset), changes, page)


def test_scripts_that_are_called_are_there():
    called = {
        word
        for _, call in CALLS
        if call[0].removeprefix(".venv/bin/") in {"sh", "python"}
        for word in call
        if word.startswith("scripts/")
    }
    assert {"scripts/loop.sh", "scripts/test.sh", "scripts/make_reference.py"} <= called
    assert [name for name in called if not (ROOT / name).is_file()] == []


def test_the_site_lists_every_page():
    """What its strict build asks, without the package that builds it."""
    listed = re.findall(r"(?m)^ +- (?:[^:\n]+: )?(\S+\.md)$", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_site_builds(tmp_path):
    pytest.importorskip("material", reason="the extra docs is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert '<pre class="mermaid">' in (tmp_path / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        folder = tmp_path if page.stem == "index" else tmp_path / page.stem
        assert (folder / "index.html").is_file()


# Files that tools read


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("citation-file-format", "CITATION.cff"),
        ("github-workflows", ".github/workflows/*.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
    ],
)
def test_files_follow_their_schemas(schema, pattern):
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    paths = [str(path) for path in sorted(ROOT.glob(pattern))]
    assert paths
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_citation_names_this_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["version"] == mlx_fd.__version__
    assert found["license"] == "MIT" and found["repository-code"] + "/" == GITHUB


def test_the_changelog_has_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"(?m)^## \[?([^\]\s]+)\]?", text)
    assert versions[:2] == ["Unreleased", mlx_fd.__version__]


def test_workflows_call_what_is_there():
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    for path in workflows:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        for job in found["jobs"].values():
            script = "\n".join(step.get("run", "") for step in job["steps"])
            for name in re.findall(r"scripts/[\w.]+", script):
                assert (ROOT / name).is_file(), name
            for call in re.findall(r"mlx-fd (?!--)(.*)", script):
                name, *arguments = shlex.split(call)
                with cli.commands[name].make_context(name, arguments):
                    pass
