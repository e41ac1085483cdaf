"""scripts/install.sh among stand-ins of apt, pip and the like: what it does is said first."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support import ROOT

SHELL = shutil.which("sh")
pytestmark = pytest.mark.skipif(SHELL is None, reason="there is no sh here")

# What install.sh calls beside those below; found without /sbin.
TOOLS = ("cksum", "cut", "du", "grep", "mkdir", "rm", "tr", "cat")
NO_BLAS = 'echo "libc.so.6 (libc6,x86-64)"'
OPENBLAS = 'echo "libopenblas.so.0 (libc6,x86-64) => /usr/lib/libopenblas.so.0"'


@pytest.fixture
def install(tmp_path):
    """Runs install.sh in an empty checkout; in order what it says and, as "> ...", calls."""
    log = tmp_path / "log"
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in TOOLS:
        (bin_folder / name).symlink_to(shutil.which(name))
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    shutil.copy(ROOT / "pyproject.toml", checkout)

    def stand_in(path: Path, body: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!{SHELL}\necho "> {path.name} $*" >>"{log}"\n{body}\n')
        path.chmod(0o755)

    def run(*, extras="", user=0, ldconfig: str | None = NO_BLAS, venv=True, **environment):
        stand_in(bin_folder / "uname", "echo Linux")
        stand_in(bin_folder / "id", f"echo {user}")
        stand_in(bin_folder / "apt-get", "")
        stand_in(bin_folder / "nvidia-smi", "exit 1")
        if ldconfig is not None:
            stand_in(bin_folder / "ldconfig", ldconfig)
        # `python -m venv` works from the second time on where there is to be no venv yet.
        stand_in(
            bin_folder / "python3.12",
            '[ "$1" = -m ] || exit 0\n'
            "if [ ! -e tried ]; then : >tried; exit 1; fi\n"
            f"mkdir -p .venv/bin && cp {tmp_path}/pip .venv/bin/pip",
        )
        (bin_folder / "cp").unlink(missing_ok=True)
        (bin_folder / "cp").symlink_to(shutil.which("cp"))
        stand_in(tmp_path / "pip", "")
        if venv:
            stand_in(checkout / ".venv" / "bin" / "python", "")
            stand_in(checkout / ".venv" / "bin" / "pip", "")
        script = f'set -eu\nextras="{extras}"\n. "{ROOT}/scripts/install.sh"\n'
        log.write_text("")
        with log.open("a") as stderr:
            done = subprocess.run(
                [SHELL, "-c", script],
                cwd=checkout,
                env={"PATH": str(bin_folder), **environment},
                stdout=subprocess.PIPE,
                stderr=stderr,
                check=False,
            )
        assert done.stdout == b""
        lines = log.read_text().splitlines()
        return done.returncode, [x for x in lines if not x.startswith(("> uname", "> id ", "> nv"))]

    return run


def index(lines: list[str], text: str) -> int:
    found = [place for place, line in enumerate(lines) if text in line]
    assert found, f"{text!r} is not in {lines}"
    return found[0]


def test_as_root_it_says_why_before_it_calls_apt(install):
    status, lines = install()
    assert status == 0
    said = index(lines, "installing the system package libopenblas0-pthread with apt: float32")
    assert said < index(lines, "> apt-get install -y -qq libopenblas0-pthread")
    assert "MLX_FD_NO_APT=1" in lines[said]
    assert not any("mkl" in line for line in lines)


def test_every_installation_is_said_first(install):
    _, lines = install(extras="dev")
    # That one goes on beside the others.
    assert index(lines, "building llama.cpp meanwhile") < index(lines, "> pip wheel")
    lines = [line for line in lines if not line.startswith("> pip wheel")]
    for place, line in enumerate(lines):
        if line.startswith(("> pip install", "> apt-get install")):
            assert lines[place - 1].startswith(("installing ", "building ")), line


def test_for_the_tests_nothing_is_compiled_or_looked_for_twice(install):
    """Pip compiled all that it installed, and looked for every package once more for llama.cpp."""
    _, lines = install(extras="dev")
    calls = [line for line in lines if line.startswith("> pip install")]
    assert all("--no-compile" in line for line in calls)
    assert sum(" -e " in line for line in calls) == 1
    assert ".venv/wheels/llama_cpp_python-" in calls[-1]


def test_a_user_gets_bytecode(install):
    _, lines = install()
    calls = [line for line in lines if line.startswith("> pip install")]
    assert calls and not any("--no-compile" in line for line in calls)


@pytest.mark.parametrize("refusal", [{"user": 0, "MLX_FD_NO_APT": "1"}, {"user": 1000}])
def test_apt_is_left_alone_where_it_is_refused_and_where_nobody_is_root(install, refusal):
    status, lines = install(**refusal)
    assert status == 0 and not any("> apt-get" in line for line in lines)
    said = index(lines, "installing MKL into .venv, about 0.9 GB")
    assert "[mkl]" in lines[said + 1]


def test_an_openblas_that_is_there_is_used(install):
    status, lines = install(ldconfig=OPENBLAS)
    assert status == 0
    assert not any("apt" in line or "mkl" in line.lower() for line in lines)


@pytest.mark.skipif(
    not os.access("/sbin/ldconfig", os.X_OK)
    or "libopenblas.so.0" not in subprocess.getoutput("/sbin/ldconfig -p"),
    reason="there is no /sbin/ldconfig that knows an OpenBLAS here",
)
def test_an_openblas_is_found_without_sbin_on_the_path(install):
    status, lines = install(ldconfig=None, user=1000)
    assert status == 0 and not any("mkl" in line.lower() for line in lines)


def test_it_ends_with_the_disk_used_and_does_nothing_twice(install):
    _, lines = install(user=1000)
    assert lines[-1].startswith("done: .venv takes ") and lines[-1][-1].isalpha()
    status, again = install(user=1000)
    assert (status, again) == (0, [])


def test_a_python_without_venv_gets_debians_package_or_says_its_name(install):
    status, lines = install(venv=False)
    assert status == 0
    said = index(lines, "installing the system package python3-venv with apt")
    assert said < index(lines, "> apt-get install -y -qq python3-venv")


def test_without_apt_the_missing_package_is_named(install):
    status, lines = install(venv=False, MLX_FD_NO_APT="1")
    assert status == 1 and lines[-1].startswith("error: ") and "python3-venv" in lines[-1]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = sorted((ROOT / "scripts").glob("*.sh"))
    done = subprocess.run(
        ["shellcheck", "-s", "sh", *map(str, scripts)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
