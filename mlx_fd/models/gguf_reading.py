"""GGUF files as they lie on a disk: metadata and tensors, with every access checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlx_fd.errors import UserError

# No vocabulary is near this long; a longer array is a damaged length field.
_LONGEST_ARRAY = 1 << 21
# llama.cpp's names for the parts of a model: NAME-00002-of-00003.gguf.
_PART = "-00000-of-00000.gguf"


def parts(path: Path) -> list[Path]:
    """All files of a model, of which ``path`` is one.

    Raises:
        UserError: one of them is not there.
    """
    tail = path.name[-len(_PART) :]
    shape = "".join("0" if letter.isdecimal() else letter for letter in tail)
    if shape != _PART or not path.exists():
        return [path]
    stem, count = path.name[: -len(_PART)], int(tail[10:15])
    files = [path.with_name(f"{stem}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    for number, file in enumerate(files, 1):
        if not file.exists():
            raise UserError(
                f"{path}: part {number} of {count} is missing ({file.name}); all parts of a model "
                "have to lie in one folder"
            )
    return files or [path]


def name_without_part(path: Path) -> str:
    """A file's name without its ending, and without which part it is."""
    return path.stem if len(parts(path)) == 1 else path.name[: -len(_PART)]


class GgufFile:
    """A GGUF model's metadata and tensors, of one file or of several parts.

    Attributes:
        path: the file that was named, for messages.
        tensors: name -> ``gguf.ReaderTensor``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Any] = {}
        files = parts(path)
        for number, part in enumerate(files):
            reader = _read(part)
            if number == 0:
                self._fields = reader.fields
                count = self.get("split.count", int, 0)
                if max(count, 1) != len(files):
                    raise self.bad(
                        f"it says that it is one of {count} parts, and its name does not say "
                        f"which; call them NAME-00001-of-{count:05d}.gguf and so on"
                    )
            for tensor in reader.tensors:
                if tensor.name in self.tensors:
                    raise self.bad(f"the tensor {tensor.name} is in two parts")
                self.tensors[tensor.name] = tensor
        total = self.get("split.tensors.count", int, len(self.tensors))
        if total != len(self.tensors):
            raise self.bad(f"its parts have {len(self.tensors)} tensors, and should have {total}")

    def bad(self, what: str) -> UserError:
        """The error for a file that is not what it should be."""
        return UserError(f"{self.path}: {what}")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A metadata value of the given Python type, or ``default`` where it is missing."""
        field = self._fields.get(key)
        if field is None:
            return default
        try:
            value = field.contents()
        except Exception as error:  # the reader has no error class of its own
            raise self.bad(f"the metadata entry {key} cannot be read ({error})") from error
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.bad(f"the metadata entry {key} has an unexpected type")
        return value

    def need(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """A metadata value that must be there."""
        value = self.get(key, kind)
        if value is None:
            raise self.bad(f"the metadata entry {key} is missing; convert the model again")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A metadata value that is a positive count."""
        value = self.get(key, int, default)
        if value is None:
            raise self.bad(f"the metadata entry {key} is missing; convert the model again")
        if not 0 < value < 1 << 31:
            raise self.bad(f"the metadata entry {key} is {value}, which cannot be")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A metadata value that is a finite number, not negative.

        It is the shortest decimal of the float32 in the file: 1e-05 and not 9.999999747e-06.
        """
        value = self.get(key, (float, int), default)
        if value is None:
            raise self.bad(f"the metadata entry {key} is missing; convert the model again")
        if not (np.isfinite(value) and value >= 0):
            raise self.bad(f"the metadata entry {key} is {value}, which cannot be")
        return float(str(np.float32(value)))


def _read(path: Path) -> Any:
    """Open a GGUF file with the gguf package, which by itself reads past the end of a short one."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            """An array's values at once; value by value a vocabulary takes seconds."""
            array = gguf.GGUFValueType.ARRAY
            if raw_type != array:
                return super()._get_field_parts(orig_offs, raw_type)
            head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
            kind, length = gguf.GGUFValueType(head[0][0]), int(head[1][0])
            if length > _LONGEST_ARRAY:
                raise ValueError(f"it has an array of {length} values")
            begin = orig_offs + 12
            if kind == gguf.GGUFValueType.STRING:
                end, texts = self._texts(begin, length)
                return end - orig_offs, [*head, *texts], range(2, 2 + length), [array, kind]
            if kind not in self.gguf_scalar_to_np:
                raise ValueError(f"it has an array of {kind.name}")
            values = self._get(begin, self.gguf_scalar_to_np[kind], length)
            return 12 + values.nbytes, [*head, values], [2], [array, kind]

        def _texts(self, at: int, count: int) -> tuple[int, list[Any]]:
            """Where so many texts end, and their bytes."""
            # A slice of it costs a tenth of a memmap's.
            data, texts = np.asarray(self.data), []
            order = self.endianess.name.lower()
            for _ in range(count):
                begin = at + 8
                at = begin + int.from_bytes(data[at:begin].tobytes(), order)
                if at > len(data):
                    raise ValueError("it ends too early")
                texts.append(data[begin:at])
            return at, texts

    try:
        with path.open("rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise UserError(f"{path} is not a GGUF file")
    try:
        with np.errstate(over="ignore"):
            return Reader(path)
    except Exception as error:  # it has no error class of its own: anything means a damaged file
        raise UserError(
            f"{path} is damaged or incomplete ({error}); download or convert it again"
        ) from error
