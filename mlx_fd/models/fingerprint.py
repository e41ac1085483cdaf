"""Which model is it? A digest of every file that decides what a model says.

Weights are read whole, and once: the SHA-256 of a large file is kept in mlx-fd's cache under its
path, size, times and inode, and is read from there until one of them changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.models.storage import cache_dir

# What a fingerprint covers; goes into manifests, to tell an older kind from another model. Kind 1
# covered config.json and the first and last MiB of the weights.
FORMAT = 2
# What mlx-lm, transformers and this package read of a model directory.
_DECIDING = (
    *("*.safetensors", "*.safetensors.index.json"),
    *("config.json", "generation_config.json", "hf_quant_config.json"),
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab*", "merges*", "*.model", "*.tiktoken", "*.bpe", "*.spm"),
    *("chat_template*", "*.jinja", "additional_chat_templates/*"),
    *("sentence_bert_config.json", "1_Pooling/config.json"),
)
_MIB = 1 << 20
# Smaller files are hashed again each time, which is no slower than asking the cache.
_CACHED_BYTES = _MIB
_BUFFER_BYTES = 4 * _MIB
# A file that changed so shortly ago may change again without its times showing it.
_RACY_SECONDS = 2.0
_ENTRY_BYTES = 1 << 16
_MIN_SHOWN_SECONDS = 2.0


@dataclass
class _Spent:
    """What hashing has cost this process: bytes read, and seconds that callers waited."""

    bytes: int = 0
    seconds: float = 0.0


_spent = _Spent()
_lock = threading.Lock()
_running: dict[Path, Future[str]] = {}
# As on the disk, for caches that cannot be written.
_known: dict[str, str] = {}
_slots = threading.BoundedSemaphore(os.cpu_count() or 1)


def content_hash(path: Path) -> str:
    """SHA-256 over all that decides what a model says.

    That is config.json, generation_config.json, every file of the tokenizer, the chat templates
    and all bytes of all weights, each under its name in the directory. READMEs and the like are
    left out, and so is the path that a pruned model's config.json has of its origin: it is the
    same model after its origin has moved.

    Args:
        path: a model directory.

    Returns:
        64 hexadecimal digits.

    Raises:
        UserError: a file cannot be read, or changes while it is read.
    """
    begin = time.monotonic()
    started = [(file, _start(file)) for file in deciding_files(path)]
    digests = {file.relative_to(path).as_posix(): future.result() for file, future in started}
    _spent.seconds += time.monotonic() - begin
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file's bytes, out of the cache where it has not changed.

    Raises:
        UserError: it cannot be read, or changes while it is read.
    """
    return _start(file).result()


def prefetch(*paths: Path) -> None:
    """Begin to hash models in the background, for a :func:`content_hash` that comes later.

    Args:
        paths: model directories. What is wrong with them is said when the hash is asked for.
    """
    for path in paths:
        for file in deciding_files(path):
            _start(file)


def time_note() -> str | None:
    """What hashing cost this process, where that was more than two seconds."""
    if _spent.seconds < _MIN_SHOWN_SECONDS:
        return None
    return (
        f"{_spent.bytes / 1e9:.1f} GB of weights hashed, a wait of {_spent.seconds:.1f} s; "
        "they are not read for this again until they change"
    )


def hashed_bytes() -> int:
    """Bytes of large files that this process has read to hash them."""
    return _spent.bytes


def is_same(recorded: Mapping[str, Any], path: Path) -> bool:
    """Whether a model is the one that a manifest recorded, as far as the record can tell.

    Args:
        recorded: the manifest's entry, with ``sha256``, and ``fingerprint`` where it is not of
            kind 1.
        path: a model directory.
    """
    hashed = content_hash if _kind(recorded) == FORMAT else _kind_1_hash
    return bool(hashed(path) == recorded.get("sha256"))


def compare(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> bool | None:
    """Whether two entries of manifests are of one model, or of one set of problems.

    Args:
        recorded: an entry of an earlier manifest.
        now: that of the manifest that would be written now, with the model's ``path``.

    Returns:
        ``None``: what the earlier one recorded is the same, but it is not all that decides.
    """
    if _kind(recorded) == _kind(now):
        return bool(recorded["sha256"] == now["sha256"])
    same = _kind(recorded) == 1 and recorded["sha256"] == _kind_1_hash(Path(now["path"]))
    return None if same else False


def _kind(recorded: Mapping[str, Any]) -> Any:
    return recorded.get("fingerprint", 1)


def deciding_files(path: Path) -> list[Path]:
    """The files that a model's fingerprint covers, in order of name."""
    files = {file for pattern in _DECIDING for file in path.glob(pattern)}
    return sorted(file for file in files if not file.name.startswith("."))


# ------------------------------------------------------------------------------------------ hashing


def _start(file: Path) -> Future[str]:
    """A file's digest, made by a thread of its own or by one that is at it already."""
    with _lock:
        future = _running.get(file)
        if future is None:
            future = _running[file] = Future()
            # Not a pool: its threads would hold up the end of a process that has failed meanwhile.
            threading.Thread(target=_run, args=(file, future), daemon=True).start()
        return future


def _run(file: Path, future: Future[str]) -> None:
    try:
        with _slots:
            result = _digest(file)
    except BaseException as error:  # it is raised where the result is waited for
        _forget(file)
        future.set_exception(error)
    else:
        _forget(file)
        future.set_result(result)


def _forget(file: Path) -> None:
    """The next who asks looks at the file again: it may have changed."""
    with _lock:
        _running.pop(file, None)


def _digest(file: Path) -> str:
    try:
        # Opening a FIFO would otherwise wait for somebody to write into it.
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb", buffering=0) as handle:
            before = os.fstat(handle.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise UserError(f"{file}: is not a regular file; take it out of the model's folder")
            if file.name == "config.json":
                return hashlib.sha256(_without_source(handle.read())).hexdigest()
            if before.st_size < _CACHED_BYTES:
                return hashlib.sha256(handle.read()).hexdigest()
            key = _key(file, before)
            if (cached_digest := _known.get(_sealed(key)) or _cached(key)) is not None:
                return cached_digest
            digest = _read(handle, before.st_size)
            after = os.fstat(handle.fileno())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    if _key(file, after) != key:
        raise UserError(f"{file}: changed while it was read; run the command again when it is done")
    with _lock:
        _spent.bytes += after.st_size
    if time.time() - max(after.st_mtime, after.st_ctime) > _RACY_SECONDS:
        _known[_sealed(key)] = digest
        _keep(key, digest)
    return digest


def _read(handle: Any, size: int) -> str:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle.fileno(), 0, size, os.POSIX_FADV_SEQUENTIAL)
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER_BYTES))
    # Both release the interpreter for blocks as large as these.
    while count := handle.readinto(buffer):
        digest.update(buffer[:count])
    return digest.hexdigest()


# --------------------------------------------------------------------------------- digests on disk


def _key(file: Path, info: os.stat_result) -> dict[str, Any]:
    return {
        "path": str(file.resolve()),
        "size": info.st_size,
        "mtime_ns": info.st_mtime_ns,
        "ctime_ns": info.st_ctime_ns,
        "inode": info.st_ino,
        "device": info.st_dev,
    }


def _entry_path(key: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(str(key["path"]).encode("utf-8", "surrogateescape")).hexdigest()
    return cache_dir() / "digests" / f"{name[:32]}.json"


def _sealed(content: Mapping[str, Any]) -> str:
    """A digest of an entry, so that one wrong digit in it is noticed."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _cached(key: Mapping[str, Any]) -> str | None:
    """The kept digest of a file in this very state; ``None``: none, or none to rely on."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with os.fdopen(os.open(_entry_path(key), flags), "rb") as handle:
            info = os.fstat(handle.fileno())
            others = info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid() or others:
                return None
            entry = json.loads(handle.read(_ENTRY_BYTES))
        content = {"key": dict(key), "sha256": entry["sha256"]}
        return str(entry["sha256"]) if entry == {**content, "seal": _sealed(content)} else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _keep(key: Mapping[str, Any], digest: str) -> None:
    """Write an entry whole; where the cache cannot be written, the file is read again next time."""
    content = {"key": dict(key), "sha256": digest}
    path = _entry_path(key)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({**content, "seal": _sealed(content)}, file)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)


# ------------------------------------------------------------------------------- older fingerprints


def _without_source(config: bytes) -> bytes:
    """A config.json as it is, but for the path that pruning writes into it."""
    try:
        content = json.loads(config)
        del content["mlx_fd"]["source"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return config
    return json.dumps(content, indent=1).encode()


def _kind_1_hash(path: Path) -> str:
    """As runs before kind 2 recorded it; it still tells that a model is another one."""
    digest = hashlib.sha256()
    config = path / "config.json"
    if config.exists():
        digest.update(_without_source(config.read_bytes()))
    for file in sorted(path.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as handle:
            digest.update(handle.read(_MIB))
            handle.seek(max(0, size - _MIB))
            digest.update(handle.read())
    return digest.hexdigest()
