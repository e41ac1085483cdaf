"""A model is all that decides what it says, and nothing else; large files are read once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_fd.errors import UserError
from mlx_fd.evaluation.target import Models, open_target
from mlx_fd.models import fingerprint
from mlx_fd.models.fingerprint import content_hash, file_hash, hashed_bytes
from mlx_fd.models.resolve import resolve
from mlx_fd.runs.manifest import check_same
from support import tiny
from support.manifests import manifest
from support.shell import shell
from support.trained import make_run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_known", {})


def settle() -> None:
    """Wait until a file's times would show another change."""
    time.sleep(2.2)


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files that are worth a place in the cache, and that nobody has changed for a while."""
    folder = tmp_path_factory.mktemp("settled")
    for name, content in (
        ("one", np.random.default_rng(0).bytes(3 << 20)),
        ("other", bytes(2 << 20)),
    ):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(content)
    settle()
    return folder


@pytest.fixture
def large(settled: Path) -> Path:
    """The first of them; not to be written to."""
    return settled / "one" / "model.safetensors"


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "digests").glob("*"))


_DECIDING = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "qwen.tiktoken", "chat_template.jinja", "chat_template.json"),
    *("additional_chat_templates/tool_use.jinja", "model.safetensors.index.json"),
    *("model-00002-of-00002.safetensors", "1_Pooling/config.json"),
)
_DECIDING_NOTHING = (
    "README.md",
    ".gitattributes",
    "LICENSE",
    "LICENSE.txt",
    "figures.json",
    "a.py",
)


def test_every_byte_that_decides_counts(tmp_path: Path) -> None:
    path = tiny.make_model_dir(tmp_path / "m", hidden=128, vocab_size=4000, intermediate=512)
    for name in _DECIDING:
        if not (path / name).exists():
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text(json.dumps({"what": name}))
    original = content_hash(path)
    assert len(original) == 64
    seen = {original}
    for name in (*_DECIDING, "model.safetensors"):
        file = path / name
        data = file.read_bytes()
        # The middle of the weights too, which an earlier fingerprint left out.
        for position in {0, len(data) // 2, len(data) - 1}:
            changed = bytearray(data)
            changed[position] ^= 1
            file.write_bytes(changed)
            seen.add(content_hash(path))
        file.write_bytes(data)
        file.rename(file.with_name("x"))
        seen.add(content_hash(path))
        file.with_name("x").rename(file)
    assert len(seen) == 1 + 4 * (len(_DECIDING) + 1)
    assert content_hash(path) == original


def test_what_decides_nothing_does_not_count(tmp_path: Path) -> None:
    path = tiny.make_model_dir(tmp_path / "m")
    original = content_hash(path)
    for name in _DECIDING_NOTHING:
        (path / name).write_text("something")
    assert content_hash(path) == original
    shutil.copytree(path, tmp_path / "elsewhere")
    assert content_hash(tmp_path / "elsewhere") == original


def test_it_is_sha256_as_everywhere(large: Path) -> None:
    assert file_hash(large) == hashlib.sha256(large.read_bytes()).hexdigest()


def test_a_large_file_is_read_once(large: Path, tmp_path: Path) -> None:
    before = hashed_bytes()
    first = file_hash(large)
    assert hashed_bytes() - before == large.stat().st_size
    assert file_hash(large) == first
    assert hashed_bytes() - before == large.stat().st_size
    assert len(entries(tmp_path)) == 1
    # And not in another process either.
    program = (
        "import sys, pathlib; from mlx_fd.models import fingerprint as f\n"
        "print(f.file_hash(pathlib.Path(sys.argv[1])), f.hashed_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(large)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [first, "0"]


def test_a_change_is_noticed_whatever_the_times_say(tmp_path: Path, large: Path) -> None:
    large = Path(shutil.copy(large, tmp_path))
    settle()
    first = file_hash(large)
    found = large.stat()
    data = bytearray(large.read_bytes())
    data[1 << 20] ^= 1
    large.write_bytes(data)
    os.utime(large, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert large.stat().st_mtime_ns == found.st_mtime_ns
    assert file_hash(large) == hashlib.sha256(data).hexdigest() != first


def test_a_file_just_written_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(2 << 20))
    first = file_hash(path)
    assert entries(tmp_path) == []
    path.write_bytes(b"1" + bytes((2 << 20) - 1))
    assert file_hash(path) != first


@pytest.mark.parametrize("harm", ["digit", "cut", "empty", "other", "list", "link", "writable"])
def test_a_damaged_entry_is_made_again(
    harm: str, settled: Path, large: Path, tmp_path: Path
) -> None:
    good = file_hash(large)
    [entry] = entries(tmp_path)
    text = entry.read_text()
    wrong = "0" * 64
    if harm == "digit":
        entry.write_text(text.replace(good, good[:-1] + ("0" if good[-1] != "0" else "1")))
    elif harm == "other":  # sealed, but of another file
        file_hash(settled / "other" / "model.safetensors")
        [second] = [one for one in entries(tmp_path) if one != entry]
        shutil.copy(second, entry)
    elif harm == "link":
        aside = tmp_path / "aside"
        entry.rename(aside)
        entry.symlink_to(aside)
    elif harm == "writable":
        entry.chmod(0o666)
    else:
        entry.write_text({"cut": text[: len(text) // 2], "empty": "", "list": f'["{wrong}"]'}[harm])
    program = (
        "import sys, pathlib; from mlx_fd.models import fingerprint as f\n"
        "print(f.file_hash(pathlib.Path(sys.argv[1])), f.hashed_bytes())"
    )

    def again() -> list[str]:
        command = [sys.executable, "-c", program, str(large)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert again() == [good, str(large.stat().st_size)]
    assert again() == [good, "0"]


def test_a_cache_that_cannot_be_written_is_done_without(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_FD_CACHE", str(tmp_path / "file"))
    before = hashed_bytes()
    first = file_hash(large)
    assert file_hash(large) == first
    assert hashed_bytes() - before == large.stat().st_size


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "model.safetensors"])
def test_a_fifo_is_no_file(name: str, tmp_path: Path) -> None:
    path = tiny.make_model_dir(tmp_path / "m")
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    with pytest.raises(UserError, match="not a regular file"):
        content_hash(path)


def test_prefetching_reads_what_is_then_not_read_again(large: Path) -> None:
    before = hashed_bytes()
    fingerprint.prefetch(large.parent)
    assert len(content_hash(large.parent)) == 64
    assert hashed_bytes() - before == large.stat().st_size


def test_a_model_with_another_middle_is_pruned_again(tmp_path: Path) -> None:
    path = tiny.make_model_dir(tmp_path / "m", layers=3, hidden=256, vocab_size=4000)
    assert (path / "model.safetensors").stat().st_size > 3 << 20
    first = resolve(f"{path}:layers=2")
    assert resolve(f"{path}:layers=2") == first
    data = bytearray((path / "model.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "model.safetensors").write_bytes(data)
    second = resolve(f"{path}:layers=2")
    assert second != first
    content = json.loads((path / "tokenizer_config.json").read_text())
    content["chat_template"] += " "
    (path / "tokenizer_config.json").write_text(json.dumps(content))
    assert resolve(f"{path}:layers=2") not in (first, second)


# ------------------------------------------------------------------------- runs of earlier versions


def entry(path: Path, **changes: Any) -> dict[str, Any]:
    kind = fingerprint.FORMAT
    found = {"name": "s", "path": str(path), "sha256": content_hash(path), "fingerprint": kind}
    return {**found, **changes}


def test_a_run_of_an_earlier_version_goes_on_with_a_warning(tmp_path: Path) -> None:
    path = tiny.make_model_dir(tmp_path / "m")
    config = (path / "config.json").read_bytes()
    weights = (path / "model.safetensors").read_bytes()
    assert len(weights) < 1 << 20
    # As version 0.2.0 wrote it.
    digest = hashlib.sha256(config + json.dumps(["model.safetensors", len(weights)]).encode())
    digest.update(weights)
    digest.update(weights)
    recorded = {"name": "s", "path": str(path), "sha256": digest.hexdigest()}
    old, new = manifest(), manifest()
    old["student"], new["student"] = recorded, entry(path)
    [doubt] = check_same(old, new, tmp_path)
    assert "the student (s) is the same" in doubt and "cannot be told" in doubt
    assert fingerprint.is_same(recorded, path)
    # What the earlier fingerprint did cover still tells.
    (path / "config.json").write_bytes(config.replace(b"1e-05", b"1e-06"))
    new["student"] = entry(path)
    with pytest.raises(UserError, match="began with another student"):
        check_same(old, new, tmp_path)
    assert not fingerprint.is_same(recorded, path)


def test_a_run_of_this_version_is_held_to_every_byte(tmp_path: Path) -> None:
    path = tiny.make_model_dir(tmp_path / "m")
    old, new = manifest(), manifest()
    old["student"] = entry(path)
    new["student"] = entry(path)
    assert check_same(old, new, tmp_path) == []
    content = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**content, "chat_template": "x"}))
    assert not fingerprint.is_same(old["student"], path)
    with pytest.raises(UserError, match="began with another student"):
        check_same(old, {**new, "student": entry(path)}, tmp_path)


def evaluate(model: Path, cache: str, out: str, folder: Path) -> list[Any]:
    """What an evaluation's model said, and whether it was right."""
    options = ("--problems", "arithmetic", "--limit", "6", "--cache", cache, "--out", out)
    done = shell("eval", model, *options, "--quiet", cwd=folder)
    assert done.status == 0, done.err
    lines = (folder / out / "outputs.jsonl").read_text().splitlines()
    return [(row["turns"], row["correct"]) for row in map(json.loads, lines)]


def test_eval_takes_nothing_from_a_model_with_another_template(tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(resolve("tiny-student"), model)
    first = evaluate(model, "c1", "o1", tmp_path)
    file = model / "tokenizer_config.json"
    content = json.loads(file.read_text())
    source = "{% for message in messages %}{{ 'HELLO ' + message['content'] }}{% endfor %}"
    file.write_text(json.dumps({**content, "chat_template": source}))
    second = evaluate(model, "c1", "o2", tmp_path)
    truth = evaluate(model, "c2", "o3", tmp_path)
    assert second == truth != first


def test_an_evaluated_student_is_all_that_its_run_made_of_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "tiny-student")
    first = open_target(str(run), None).models
    assert open_target(str(run), None).models == first
    config, heads = run / "config.toml", run / "checkpoints" / "best" / "heads.safetensors"
    text, data = config.read_text(), bytearray(heads.read_bytes())
    # The student is made with the run's scale, whatever the adapter's own file says.
    assert "lora_scale = 3.0" in text
    config.write_text(text.replace("lora_scale = 3.0", "lora_scale = 4.0"))
    second = open_target(str(run), None).models
    assert second["adapter"] != first["adapter"] and second["student"] == first["student"]
    config.write_text(text)
    data[-1] ^= 1
    heads.write_bytes(data)
    assert open_target(str(run), None).models["adapter"] != first["adapter"]


@pytest.mark.parametrize("harm", ["cut", "fifo", "text", "rank"])
def test_a_damaged_adapter_is_named(harm: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "tiny-student")
    adapter = tmp_path / "adapter"
    shutil.copytree((run / "checkpoints" / "best").resolve(), adapter)
    weights, config = adapter / "adapters.safetensors", adapter / "adapter_config.json"
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif harm == "fifo":
        config.unlink()
        os.mkfifo(config)
    elif harm == "text":
        config.write_text("[1]")
    else:
        content = json.loads(config.read_text())
        config.write_text(json.dumps({**content, "lora_parameters": {"rank": "x"}}))
    with pytest.raises(UserError, match=str(adapter)):
        assert Models(open_target(str(adapter), None)).pair
