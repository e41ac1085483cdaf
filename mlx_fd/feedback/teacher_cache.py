"""What the expert said about texts, on the disk, so that it need not read them again.

An entry is a safetensors file under the hash of all that decides what is in it: the tokens of
prompt and text, the expert's content and number format, and what of it is kept. So an entry is
found wherever the same text comes again, in a later epoch, after a resume or in another run, and
never in the place of another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fd.files import write_with
from mlx_fd.runs import wrap_write_errors

_ADVICE = (
    "this is the teacher cache: free some space, then go on with mlx-fd resume; or name another "
    "folder, with --teacher-cache in a new run, as teacher_cache in the config.toml of a begun one"
)


@dataclass(frozen=True)
class TeacherCache:
    """A folder of entries of one expert.

    Attributes:
        folder: where they are; it is made when the first one is.
        teacher: all that decides an entry beside its tokens.
        warn: called with a sentence about each entry that cannot be used.
    """

    folder: Path
    teacher: Mapping[str, Any]
    warn: Callable[[str], None]

    def load(self, prompt: Sequence[int], target: Sequence[int]) -> dict[str, mx.array] | None:
        """The arrays of a text's entry; ``None`` where there is none, or none that is whole.

        Args:
            prompt: all tokens before the text.
            target: the text's.
        """
        key = self._key(prompt, target)
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            arrays, about = mx.load(str(path), format="safetensors", return_metadata=True)
            assert isinstance(arrays, dict) and isinstance(about, dict)
            if about.get("key") == key and about.get("sha256") == _digest(arrays):
                return arrays
            fault = "it is not what was written there"
        except (OSError, RuntimeError, ValueError, UnicodeDecodeError) as error:
            fault = str(error)
        self.warn(f"{path}: passed over ({fault}); the expert reads this text again")
        return None

    def save(
        self, prompt: Sequence[int], target: Sequence[int], arrays: Mapping[str, mx.array]
    ) -> None:
        """Write a text's entry, whole or not at all.

        Args:
            prompt: all tokens before the text.
            target: the text's.
            arrays: by name.

        Raises:
            UserError: it cannot be written.
        """
        key = self._key(prompt, target)
        about = {"key": key, "sha256": _digest(arrays)}
        with wrap_write_errors(self.folder, _ADVICE):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_with(
                self._path(key),
                lambda path: mx.save_safetensors(str(path), dict(arrays), metadata=about),
            )

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _key(self, prompt: Sequence[int], target: Sequence[int]) -> str:
        material = json.dumps([list(prompt), list(target), dict(self.teacher)], sort_keys=True)
        return hashlib.sha256(material.encode()).hexdigest()


def _digest(arrays: Mapping[str, mx.array]) -> str:
    """SHA-256 over names, types, shapes and content."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(np.array(array.view(mx.uint8)).tobytes())
    return digest.hexdigest()
