import io
import json
import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from rich.console import Console

from mlx_fd.cli import checks as doctor
from mlx_fd.cli.app import cli
from mlx_fd.losses import kernels
from mlx_fd.models.aliases import ALIASES
from mlx_fd.models.backend import Backend
from support.tiny import make_model_dir

pytest_plugins = ["support.metal.fixtures"]


def rows_of(**env: str) -> dict[str, dict[str, str]]:
    """The checks of a process with this environment, by what they look at."""
    code = "import json; from mlx_fd.cli.checks import checks; print(json.dumps(checks()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return {row["what"]: row for row in json.loads(done.stdout)}


def printed(table) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    return console.file.getvalue()


def test_a_machine_that_has_everything(tmp_path):
    rows = rows_of(MLX_FD_CACHE=str(tmp_path / "cache"), OPENBLAS_NUM_THREADS="3")
    assert {"versions", "backend", "memory", "disk", "models here"} <= set(rows)
    assert "mlx-lm" in rows["versions"]["text"] and rows["backend"]["state"] == "good"
    assert str(tmp_path / "cache") in rows["disk"]["text"]
    assert not (tmp_path / "cache").exists()
    assert not any(row["state"] == "bad" for row in rows.values())
    if "cpu" in rows["backend"]["text"]:
        assert "OPENBLAS_NUM_THREADS=3" in rows["BLAS threads"]["text"]


@pytest.mark.parametrize("variable", ["MLX_FD_CACHE", "HF_HUB_CACHE"])
def test_a_cache_that_cannot_be_written(variable, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/mlx-fd"):
        row = rows_of(**{variable: str(folder)})["disk"]
        assert row["state"] == "bad", row
        assert f"{folder} cannot be written (" in row["text"] and f"set {variable}" in row["text"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_cache_on_a_full_disk(tmp_path, monkeypatch):
    import resource

    monkeypatch.setenv("MLX_FD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be cut off, too
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        row = next(row for row in doctor.checks() if row["what"] == "disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert row["state"] == "bad" and "File too large" in row["text"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's CPU backend alone looks for a BLAS")
@pytest.mark.parametrize(
    ("chosen", "text"),
    [("off", "MLX_FD_BLAS=off"), ("/none/libblas.so", "/none/libblas.so cannot be loaded")],
)
def test_a_slow_blas_is_noted(chosen, text):
    rows = rows_of(MLX_FD_BLAS=chosen, OPENBLAS_NUM_THREADS="")
    if "cpu" not in rows["backend"]["text"]:
        pytest.skip("not the CPU backend")
    assert rows["BLAS"]["state"] == "note" and text in rows["BLAS"]["text"]
    assert rows["BLAS threads"]["state"] == "note"


def test_two_backends_that_own_one_file(monkeypatch):
    monkeypatch.setattr(doctor, "_BACKEND_PACKAGES", ("mlx", "numpy", "none-such"))
    row = next(row for row in doctor.checks() if row["what"] == "backends")
    assert row["state"] == "bad" and "pip uninstall mlx numpy" in row["text"]


def test_brackets_are_printed():
    text = printed(
        doctor.checks_table([doctor._row("backend", "bad", 'pip install "mlx-fd[cpu]"')])
    )
    assert 'error  backend  pip install "mlx-fd[cpu]"' in text


def test_models_found_here_are_marked(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("MLX_FD_CACHE", str(tmp_path / "cache"))
    sizes = {"hidden": 16, "layers": 1, "intermediate": 32, "heads": 2, "kv_heads": 1}
    for repo in (ALIASES["qwen2.5-0.5b-4bit"].repo, "someone/model"):
        make_model_dir(
            tmp_path / f"models--{repo.replace('/', '--')}" / "snapshots" / "abc", **sizes
        )
    multimodal = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    speech = {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}
    for name, entries in (("vision", multimodal), ("speech", speech)):
        path = make_model_dir(tmp_path / f"models--someone--{name}" / "snapshots" / "abc", **sizes)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **entries}))
    listed = doctor.model_rows()
    rows = {row["name"]: row for row in listed}
    assert "someone/vision" in rows and "someone/speech" not in rows
    assert len(rows) == len(listed)
    assert rows["qwen2.5-0.5b-4bit"]["here"] and not rows["qwen2.5-7b-4bit"]["here"]
    assert rows["someone/model"]["here"] and "someone" in rows["someone/model"]["source"]
    assert set(ALIASES) <= set(rows)
    assert "mlx-community/Qwen2.5-0.5B-Instruct-4bit" not in rows
    text = next(row for row in doctor.checks() if row["what"] == "models here")["text"]
    assert "qwen2.5-0.5b-4bit" in text and "someone/model" in text
    table = printed(doctor.models_table(list(rows.values())))
    words = [line.split() for line in table.splitlines()]
    assert any(line[:3] == ["qwen2.5-0.5b-4bit", "yes", ":layers=12"] for line in words)
    assert any(line[:2] == ["qwen2.5-7b-4bit", "qwen2.5-1.5b-4bit"] for line in words)


def test_a_folder_whose_name_steers_the_terminal_is_listed_without_it():
    row = {"name": "a\x1b[2J", "here": True, "student": "", "note": "", "source": "b\x07"}
    listed = printed(doctor.models_table([row]))
    assert "a\ufffd[2J" in listed and "b\ufffd" in listed
    assert "\x1b" not in listed and "\x07" not in listed


def test_kernels_are_compared_with_float64(monkeypatch):
    monkeypatch.delenv("MLX_FD_KERNELS", raising=False)
    done = CliRunner().invoke(cli, ["doctor", "--kernels", "--json"])
    used, *rows = json.loads(done.stdout)
    assert done.exit_code == 0 and used["text"] == kernels.chosen()
    assert {row["what"].split(":")[0] for row in rows} == set(kernels.runnable())
    for name in ("forward KL", "reverse KL", "JSD", "alignment, pooled", "per token", "top k"):
        for dtype in ("float32", "bfloat16", "float16"):
            found = [row for row in rows if name in row["what"] and dtype in row["what"]]
            assert found and all(0 <= row["error"] <= row["limit"] < 0.1 for row in found)


def test_a_wrong_kernel_is_an_error(emulator, monkeypatch, tmp_path):
    """On a GPU that is emulated, with a text that is wrong and one that does not compile."""
    monkeypatch.setattr(kernels, "backend", lambda: Backend("metal", None, ""))
    monkeypatch.setenv("MLX_FD_KERNELS", "metal")
    folder = shutil.copytree(kernels.source_folder(), tmp_path / "kernels")
    for name, said, mistaken in (
        ("top_k.metal", "all.most + log", "all.most - log"),
        ("alignment.metal", "uint kept = 0;", "uint kept = ;"),
    ):
        text = (folder / name).read_text()
        assert said in text
        (folder / name).write_text(text.replace(said, mistaken))
    monkeypatch.setattr(kernels, "source_folder", lambda: folder)

    done = CliRunner().invoke(cli, ["doctor", "--kernels", "--json"])
    assert done.exit_code == 1
    rows = {row["what"]: row for row in json.loads(done.stdout)}
    assert rows["used in runs"]["text"] == "metal"
    assert rows["metal: forward KL, float32"]["state"] == "good"
    assert rows["metal: top k, float32"]["state"] == "bad"
    assert rows["metal: top k, float32"]["error"] > 0.1
    assert rows["graph: top k, float32"]["state"] == "good"
    refused = rows["metal: alignment, pooled, float16"]
    assert refused["state"] == "bad" and refused["error"] is None
    assert "does not compile" in refused["text"]

    shown = CliRunner().invoke(cli, ["doctor", "--kernels"])
    assert shown.exit_code == 1
    assert any(
        line.split()[:4] == ["error", "metal:", "top", "k,"] for line in shown.stdout.splitlines()
    )


def test_forcing_what_cannot_run_is_said(monkeypatch):
    monkeypatch.setenv("MLX_FD_KERNELS", "vulkan")
    done = CliRunner().invoke(cli, ["doctor", "--kernels"])
    assert "MLX_FD_KERNELS=vulkan" in str(done.exception)
