"""`mlx-fd compare` as a user runs it: exports that are the same model, and ones that are not."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from html.parser import HTMLParser

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

from mlx_fd.cli.terminal.comparison import print_comparison
from mlx_fd.errors import UserError
from mlx_fd.export.bundle import FOLDER, make_bundle, write_bundle
from mlx_fd.export.bundle_reading import read_bundle
from mlx_fd.export.compare import Job, judged, opened, plan, run
from mlx_fd.models.loading import load
from mlx_fd.problems import load as load_problems
from mlx_fd.report.comparison_page import page
from mlx_fd.runs.marks import COMPARISON, write_mark
from support.shell import failed, shell
from support.tiny import make_model_dir


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The tiny student for mlx-lm, and for llama.cpp."""
    folder = tmp_path_factory.mktemp("exports")
    more = ("--parity-problems", 2, "--quiet", "--archive")
    for form in ("mlx", "gguf"):
        done = shell("export", "tiny-student", "--format", form, "--out", form, *more, cwd=folder)
        assert done.status == 0, done
    return folder


@pytest.fixture
def export(exports, tmp_path):
    """A copy of the mlx one, to be harmed."""
    return shutil.copytree(exports / "mlx", tmp_path / "student")


def change_weights(folder, change):
    weights = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(
        str(folder / "model.safetensors"), change(dict(weights)), metadata={"format": "mlx"}
    )


# ------------------------------------------------------------------------------------ what is same


def test_an_export_is_the_model_it_was_made_from(exports, tmp_path):
    done = shell("compare", exports / "mlx", "--out", tmp_path / "out", cwd=tmp_path)
    assert done.status == 0, done
    assert "mlx mlx: the same model" in done.out
    assert "tolerance for float weights: same tokens, mean KL at most 0.001" in done.out
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    [row] = found["rows"]
    assert found["parity"] and row["parity"] and row["reasons"] == []
    measures = row["measures"]
    assert measures["tokenisation"] == {"equal": 12, "n": 12, "by": "ids"}
    assert measures["greedy"]["agreeing"] == measures["greedy"]["n"]
    assert measures["greedy"]["first_divergence"] is None
    assert measures["top1"]["agreeing"] == measures["top1"]["n"]
    assert measures["kl"]["worst"] < 1e-6
    assert measures["accuracy"]["same_answer"] == 2
    assert measures["accuracy"]["engine"] == measures["accuracy"]["reference"]
    speed = measures["speed"]
    assert speed["prefill"] > 0 and speed["decode"] > 0 and speed["first_token"] > 0
    assert 10 << 20 < measures["peak_memory"] < 4 << 30
    assert "on cpu, float32" in measures["about"] or "on metal" in measures["about"]
    bundle = read_bundle(exports / "mlx")
    assert found["bundles"][str(exports / "mlx")]["positions"] == sum(
        prompt.positions for prompt in bundle.prompts
    )


def test_an_archive_is_opened_and_cleared_away(exports, tmp_path):
    shutil.copy(exports / "mlx.tar", tmp_path / "student.tar")
    done = shell("compare", "student.tar", "--json", "--limit", 0, cwd=tmp_path)
    assert done.status == 0, done
    found = json.loads(done.out)
    [row] = found["rows"]
    assert row["measures"]["accuracy"] is None
    # Not the folder it was unpacked in, which is gone.
    assert row["target"] == row["export"] == "student.tar"
    assert list(found["bundles"]) == ["student.tar"]
    assert ".tmp-" not in done.out + done.err
    assert [path.name for path in tmp_path.iterdir()] == ["student.tar"]


def test_other_problems_and_the_references_where_it_knows_them(exports, tmp_path):
    arguments = ("--problems", "arithmetic", "--limit", 4, "--json", "--quiet")
    done = shell("compare", exports / "mlx", "--engine", "mlx", *arguments, cwd=tmp_path)
    found = json.loads(done.out)["rows"][0]["measures"]["accuracy"]
    assert found["engine"]["n"] == 4 and found["reference"]["n"] == 2
    assert found["same_answer"] == 2


def test_no_problems_are_asked(exports, tmp_path):
    """It ended in an internal error."""
    arguments = ("--problems", "arithmetic", "--limit", 0, "--json", "--quiet")
    done = shell("compare", exports / "mlx", "--engine", "mlx", *arguments, cwd=tmp_path)
    assert done.status == 0, done
    assert json.loads(done.out)["rows"][0]["measures"]["accuracy"] is None


# ------------------------------------------------------------------------------------ what is not


def test_perturbed_weights_are_another_model(export):
    def perturb(weights):
        rng = np.random.default_rng(0)
        return {
            name: w * (1 + 0.1 * mx.array(rng.standard_normal(w.shape), w.dtype))
            for name, w in weights.items()
        }

    change_weights(export, perturb)
    done = shell("compare", export, "--limit", 0, cwd=export.parent)
    assert done.status == 1
    assert "NOT the same: mean KL" in done.out and "is above 0.001" in done.out
    assert "Traceback" not in done.err


def nan(folder):
    change_weights(folder, lambda w: {**w, "model.norm.weight": w["model.norm.weight"] * mx.nan})


def cut(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def of_another_model(folder):
    """The bundle of a model with more tokens."""
    other = load(make_model_dir(folder.parent / "other", vocab_size=512, tokenizer=large()))
    shutil.rmtree(folder / FOLDER)
    one = load_problems().problems[:1]
    write_bundle(make_bundle(other, problems=one, seed=0, source={}), folder)


def large():
    from support.tiny import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<word{i}>" for i in range(100)])
    return tokenizer


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (nan, "has numbers that are not finite"),
        (cut, "is damaged or incomplete"),
        (without_tokenizer, "it has no tokenizer.json"),
        (of_another_model, "has a vocabulary of"),
    ],
)
def test_a_broken_export_is_refused_with_the_reason(export, harm, text):
    harm(export)
    done = shell("compare", export, "--limit", 0, cwd=export.parent)
    assert done.status == 1
    assert "could not be compared" in done.out and text in done.out
    assert "Traceback" not in done.err


def test_another_tokenizer_is_noticed(export):
    """Two tokens that changed places: the same numbers everywhere, for other texts."""
    path = export / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    path.write_text(json.dumps(tokenizer))
    job = Job("mlx", str(export), export, read_bundle(export))
    row = judged(job, run(job, (), lambda *done: None))
    assert not row["parity"]
    assert any("prompts get other tokens" in reason for reason in row["reasons"])


def test_an_engine_that_takes_its_process_down_is_reported(exports, monkeypatch, tmp_path):
    (tmp_path / "llama_cpp.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    gguf = exports / "gguf"
    job = Job("llama.cpp", str(gguf / "model-f16.gguf"), gguf, read_bundle(gguf))
    outcome = run(job, (), lambda *done: None)
    assert outcome["failure"].startswith(f"llama.cpp ended with status {-signal.SIGABRT}")


def test_no_code_of_an_export_is_run(export):
    """Neither from its folder, where the user may stand, nor by its configuration."""
    for name in ("numpy", "mlx", "json", "llama_cpp", "custom"):
        (export / f"{name}.py").write_text("open('ran', 'w')\n")
    done = shell("compare", ".", "--limit", 0, cwd=export)
    assert done.status == 0, done
    assert f"mlx {export.name}: the same model" in done.out
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps({**config, "model_file": "custom.py"}))
    done = shell("compare", ".", "--limit", 0, cwd=export)
    assert done.status == 1 and "could not be compared" in done.out
    assert not (export / "ran").exists()


def test_llama_cpp_that_is_not_installed_comes_with_its_build_line(exports, tmp_path):
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('not here')\n")
    env = {"PYTHONPATH": str(tmp_path)}
    done = shell("compare", exports / "gguf", cwd=tmp_path, env=env)
    assert done.status == 1
    assert "-DGGML_CUDA=on" in done.out and "mlx-fd[llama-cpp]" in done.out


def test_without_a_backend_only_mlx_cannot_run(exports, tmp_path):
    package = tmp_path / "mlx"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object')")
    env = {"PYTHONPATH": str(tmp_path)}
    done = shell("compare", exports / "mlx", cwd=tmp_path, env=env)
    assert done.status == 1 and "could not be compared: MLX has no backend here" in done.out
    assert 'pip install "mlx-fd[cuda]"' in done.out
    pytest.importorskip("llama_cpp")
    done = shell("compare", exports / "gguf", "--limit", 0, cwd=tmp_path, env=env)
    assert done.status == 0, done


def test_what_the_user_got_wrong_is_said(exports, export, tmp_path):
    mlx = exports / "mlx"
    for arguments, texts in {
        (mlx, "--engine", "llama.ccp"): ["did you mean 'llama.cpp'?"],
        (mlx, "--engine", "openai"): ["give its address: --engine openai:URL"],
        (mlx, "--engine", "mlx:4"): ["it takes no address"],
        (mlx, "--engine", "llama.cpp"): ["nothing in", "has a .gguf file"],
        (tmp_path / "nothing",): ["there is no such directory or archive"],
        (mlx, "--problems", "gsm9k"): ["did you mean 'gsm8k'?"],
        (mlx / FOLDER / "bundle.json",): ["is not a tar file"],
    }.items():
        failed(shell("compare", *arguments, cwd=tmp_path), *texts)
    # One of two was left out without a word, and both were said to be the same model.
    with pytest.raises(UserError, match=r"gguf: none of --engine mlx opens it"):
        plan([mlx, exports / "gguf"], ["mlx"])
    (export / "config.json").unlink()
    adapter = shell("compare", mlx, export, cwd=tmp_path)
    failed(adapter, f"{export}: neither config.json nor a .gguf file", "an adapter alone is no")
    assert [job.engine for job in plan([mlx, exports / "gguf"], [])] == ["mlx", "llama.cpp"]
    shutil.rmtree(export / FOLDER)
    failed(shell("compare", export, cwd=tmp_path), "bundle.json is missing: name a directory made")


def test_where_the_report_cannot_be_written(exports, tmp_path):
    """Said before an engine runs; where it fails only at the end, the table is there by then."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "llama_cpp.py").write_text("open('ran', 'w')\nraise ImportError('not here')\n")
    env = {"PYTHONPATH": str(package)}
    (tmp_path / "file").write_text("")
    done = shell("compare", exports / "gguf", "--out", "file/out", cwd=tmp_path, env=env)
    failed(done, "file/out: cannot be written (Not a directory)")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "out" / "compare.json").mkdir(parents=True)
    write_mark(tmp_path / "out", COMPARISON)
    done = shell("compare", exports / "gguf", "--out", "out", cwd=tmp_path, env=env)
    assert (tmp_path / "ran").exists()
    assert done.status == 2 and "could not be compared" in done.out
    assert "out: the comparison cannot be written there" in done.err
    assert "Traceback" not in done.err and "a bug in mlx-fd" not in done.err


def test_what_is_wrong_in_an_archive_names_the_archive(exports, tmp_path):
    bundle = read_bundle(exports / "mlx")
    folder = tmp_path / ".tmp-1" / "student"
    job = Job("llama.cpp", str(folder / "model.gguf"), folder, bundle, "student.tar")
    outcome = run(job, (), lambda label, done, total: None)
    row = judged(job, outcome)
    assert (row["export"], row["target"]) == ("student.tar", "student.tar/model.gguf")
    [reason] = row["reasons"]
    assert "student.tar/parity/bundle.json is missing" in reason and ".tmp-1" not in reason
    config = tmp_path / "config.json"
    config.write_text("{}")
    with tarfile.open(tmp_path / "bare.tar", "w") as archive:
        archive.add(config, "student/config.json")
    done = shell("compare", "bare.tar", cwd=tmp_path)
    failed(done, "bare.tar/parity/bundle.json is missing")
    assert ".tmp-" not in done.err


def test_where_an_archive_cannot_be_unpacked(tmp_path):
    """A folder where nothing can be made, whoever tries: it named a temporary folder alone."""
    longest = os.pathconf(tmp_path, "PC_PATH_MAX")
    folder = tmp_path
    while (left := longest - len(str(folder)) - len("/a.tar") - 2) > 1:
        folder /= "a" * min(left, 200)
    folder.mkdir(parents=True)
    (folder / "a.tar").touch()
    with (
        pytest.raises(UserError, match=r"a\.tar: it cannot be unpacked beside .* elsewhere"),
        opened(folder / "a.tar"),
    ):
        pass


def test_an_unsafe_archive_is_refused(tmp_path):
    file = tmp_path / "evil.tar"
    with tarfile.open(file, "w") as archive:
        archive.addfile(tarfile.TarInfo("student/../../evil"))
    failed(shell("compare", file, cwd=tmp_path), "would be unpacked outside its folder")
    assert [path.name for path in tmp_path.iterdir()] == ["evil.tar"]


# -------------------------------------------------------------------------------------- the page


def test_a_servers_control_characters_do_not_reach_the_terminal(exports, capsys):
    mlx = exports / "mlx"
    job = Job("openai", "http://a", mlx, read_bundle(mlx))
    print_comparison([judged(job, {"failure": "\x1b]0;title\x07 [red]no\nway"})], Console())
    out = capsys.readouterr().out
    assert "]0;title" in out and "[red]no\nway" in out
    assert not set(out) & {"\x1b", "\x07"}


class _Page(HTMLParser):
    VOID = ("meta", "br")

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_alone_and_harmless(exports):
    mlx = exports / "mlx"
    job = Job("mlx", str(mlx), mlx, read_bundle(mlx))
    good = judged(job, run(job, (), lambda *done: None))
    bad = judged(job, {"failure": "<script>alert(1)</script>"})
    rows = [good, bad]
    report = {
        "parity": False,
        "rows": rows,
        "bundles": {
            "<b>": {
                "prompts": 1,
                "positions": 2,
                "items": 3,
                "reference": {"sha256": "</code><script>"},
                "versions": {},
                "source": {},
            }
        },
        "versions": {},
    }
    text = page(report)
    seen = _Page()
    seen.feed(text)
    seen.close()
    assert seen.open == [] and seen.links == ["#main"]
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert 'http-equiv="Content-Security-Policy"' in text
    for words in ("Not the same model everywhere", "could not be compared", "feedback", "KL(ref"):
        assert words in text


# ------------------------------------------------------------------------------ servers, llama.cpp


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def server(tmp_path):
    """Starts a server module on loopback, and stops it at the end."""
    started = []

    def start(module, *arguments):
        port = free_port()
        where = ("--host", "127.0.0.1", "--port", str(port))
        with (tmp_path / "server.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments), *where],
                stdout=log,
                stderr=log,
            )
        started.append(process)
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    return f"http://127.0.0.1:{port}"
            time.sleep(0.2)
        raise AssertionError((tmp_path / "server.log").read_text())

    yield start
    for process in started:
        process.terminate()
        process.wait(10)


def test_mlx_lms_server_serves_the_same_model(exports, server, tmp_path):
    url = server("mlx_lm.server", "--model", exports / "mlx")
    engine = f"openai:{url}/v1"
    done = shell("compare", exports / "mlx", "--engine", engine, "--json", cwd=tmp_path)
    assert done.status == 0, done
    [row] = json.loads(done.out)["rows"]
    measures = row["measures"]
    continuations = sum(len(p.greedy) for p in read_bundle(exports / "mlx").prompts)
    assert measures["tokenisation"] == {"equal": 12, "n": 12, "by": "counts"}
    assert measures["greedy"]["n"] == measures["top1"]["n"] == continuations
    assert measures["kl"]["n"] == continuations and measures["kl"]["tokens"] == 10
    assert measures["kl"]["mean"] < 1e-4
    assert measures["accuracy"]["same_answer"] == 2
    assert measures["speed"]["decode"] > 0 and measures["peak_memory"] is None
    assert "a server does not say" in measures["missing"]["peak memory"]


def test_llama_cpp_runs_the_same_model(exports, tmp_path):
    pytest.importorskip("llama_cpp")
    done = shell("compare", "gguf", "mlx", "--limit", 1, "--json", cwd=exports)
    assert done.status == 0, done
    rows = {row["engine"]: row for row in json.loads(done.out)["rows"]}
    assert set(rows) == {"mlx", "llama.cpp"}
    found = rows["llama.cpp"]
    assert found["weights"] == "float" and found["measures"]["tokenisation"]["equal"] == 12
    assert found["measures"]["kl"]["mean"] < 1e-3
    assert found["measures"]["top1"]["agreeing"] >= 0.99 * found["measures"]["top1"]["n"]
    file = exports / "gguf" / "model-f16.gguf"
    short = tmp_path / "short"
    shutil.copytree(exports / "gguf", short)
    os.truncate(short / file.name, file.stat().st_size // 2)
    done = shell("compare", short, cwd=tmp_path)
    assert done.status == 1 and "it is damaged or cut off" in done.out


def test_llama_cpps_server_serves_the_same_model(exports, server, tmp_path):
    for module in ("llama_cpp", "uvicorn", "fastapi", "sse_starlette", "starlette_context"):
        pytest.importorskip(module)
    file = exports / "gguf" / "model-f16.gguf"
    more = ("--logits_all", "true", "--n_ctx", 512)
    url = server("llama_cpp.server", "--model", file, *more)
    # Its repeat_penalty would be 1.1, at temperature 0 too.
    with urllib.request.urlopen(f"{url}/v1/models", timeout=30) as response:
        assert json.load(response)["data"][0]["id"] == str(file)
    engine = f"openai:{url}#{file}"
    arguments = ("--engine", engine, "--limit", 0, "--json")
    done = shell("compare", exports / "gguf", *arguments, cwd=tmp_path)
    assert done.status == 0, done
    measures = json.loads(done.out)["rows"][0]["measures"]
    assert measures["kl"]["mean"] < 1e-3 and measures["kl"]["tokens"] > 15
