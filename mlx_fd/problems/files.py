"""Problems from the user's files and from data sets of the hub.

JSON and CSV are read with the standard library, because ``datasets`` reports the first bad row
only, without file and line, and guesses column types; it reads Parquet and the hub.
"""

from __future__ import annotations

import contextlib
import csv
import decimal
import glob
import gzip
import hashlib
import io
import json
import re
import tempfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.problems import FILE_SUFFIXES, ProblemSet, suffixes_of
from mlx_fd.problems.columns import COLUMNS, ends_in_letter, question_and_answer
from mlx_fd.problems.rows import BadRow, Reading, problems_of, reasons_of
from mlx_fd.text import shown

_SHOWN = 10
_MAX_UNPACKED = 4 << 30
_GAP = re.compile(r"[ \t\r\n,]*")
_HUB_SECONDS = 5.0
# Where a file that is one object has its rows.
_ALL = frozenset({"data", "examples", "instances", "items", "problems", "questions", "rows"})
_COLUMNS = (
    "columns are question (or problem) and answer, and optionally choices, context, solution and "
    "id; --columns question=NAME,answer=NAME names others, --answer-kind none is without answers"
)

# Where a row is, and what is in it: its columns, or why it could not even be split into columns.
SourceRow = tuple[str, "dict[str, Any] | str"]


def load_file(path: Path, name: str, split: str, reading: Reading) -> ProblemSet:
    """Problems of one file, of those that :data:`mlx_fd.problems.FILE_SUFFIXES` names.

    Raises:
        UserError: the file cannot be read, or has bad rows that are not to be skipped.
    """
    rows, sha256 = _rows(path, reading.columns)
    stem = path.name[: -len("".join(suffixes_of(path)))]
    return _read(ProblemSet(name, split, (), sha256), rows, (str(path), stem), reading)


@dataclass(frozen=True)
class AnswerFile:
    """Answers to judge, in the file's order.

    Attributes:
        rows: the columns of each, as they stand in the file.
        problems: the problem of each.
        answers: the answer of each.
        sha256: of the file's bytes.
    """

    rows: tuple[dict[str, Any], ...]
    problems: tuple[str, ...]
    answers: tuple[str, ...]
    sha256: str


def load_answers(path: Path, reserved: Collection[str] = ()) -> AnswerFile:
    """Answers to judge, of one file, of those that :data:`mlx_fd.problems.FILE_SUFFIXES` names.

    Rows have ``question`` (or ``problem``) and ``answer``, the text that is judged, and maybe
    ``context`` and ``choices``, which are read with the question; other columns are kept.

    Args:
        path: the file.
        reserved: columns that the file must not have.

    Raises:
        UserError: the file cannot be read, or has bad rows; the message names the first ten.
    """
    if not suffixes_of(path):
        raise UserError(f"{path}: a file of answers ends in one of {', '.join(FILE_SUFFIXES)}")
    found, sha256 = _rows(path)
    rows = list(found)
    # One letter tells of all rows, as some of what is judged may be no answer at all.
    by_letter = any(
        ends_in_letter(row.get("answer")) for _, row in rows if not isinstance(row, str)
    )
    good: list[tuple[dict[str, Any], str, str]] = []
    bad: list[BadRow] = []
    for where, row in rows:
        try:
            if isinstance(row, str):
                raise ValueError(row)
            taken = sorted(set(reserved) & row.keys())
            if taken:
                raise ValueError(f"has {', '.join(map(repr, taken))}, which judging would write")
            _check_json(row)
            good.append((row, *question_and_answer(row, by_letter=by_letter)))
        except ValueError as error:
            bad.append(BadRow(where, str(error)))
    if bad:
        raise UserError(
            f"{path}: {len(bad)} of {len(bad) + len(good)} rows cannot be read:\n  "
            f"{listed(bad)}\nCorrect them (columns are question (or problem) and answer)"
        )
    if not good:
        raise UserError(f"{path} has no rows")
    raws, problems, answers = zip(*good, strict=True)
    return AnswerFile(raws, problems, answers, sha256)


def _check_json(row: dict[str, Any]) -> None:
    """Refuse a row that could not be written again."""
    for column, value in row.items():
        try:
            json.dumps({column: value}, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError):
            raise ValueError(f"{shown(column)} is {shown(value)}, which JSON cannot hold") from None


def _rows(path: Path, columns: tuple[tuple[str, str], ...] = ()) -> tuple[Iterable[SourceRow], str]:
    """A file's rows, each with its place, and the SHA-256 of its bytes."""
    content = _content(path)
    suffix, *_ = suffixes_of(path)
    if suffix == ".parquet":
        rows: Iterable[SourceRow] = _parquet(path)
    else:
        text = _decoded(path, _unpacked(path, content))
        rows = _csv(path, text, columns) if suffix in (".csv", ".tsv") else _json(path, text)
    return rows, hashlib.sha256(content).hexdigest()


def json_rows(path: Path) -> Iterator[SourceRow]:
    """The objects of a JSON array, or of a file with one per line, each with its place.

    Raises:
        UserError: the file cannot be read, is empty, or is no text.
    """
    return _json(path, _decoded(path, _unpacked(path, _content(path))))


def _content(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is not a file but a directory, a pipe or a device")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not content.strip():
        raise UserError(f"{path} is empty")
    return content


def _unpacked(path: Path, content: bytes) -> bytes:
    """A file's content, unpacked where it is packed.

    Raises:
        UserError: it is damaged, it unpacks to too much, or its format's package is missing.
    """
    packed = suffixes_of(path)[1:]
    if not packed:
        return content
    try:
        whole = _unzipped(content) if packed[0] == ".gz" else _unzstandard(content)
    except ValueError as error:
        raise UserError(f"{path}: cannot be unpacked ({error})") from error
    except ImportError:
        raise UserError(
            f'{path}: is packed as Zstandard, which needs a package: pip install "mlx-fd[zstd]", '
            "or unpack it"
        ) from None
    if len(whole) > _MAX_UNPACKED:
        raise UserError(f"{path}: unpacks to more than {_MAX_UNPACKED >> 30} GiB; split it")
    if not whole.strip():
        raise UserError(f"{path} is empty")
    return whole


def _unzipped(content: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            return stream.read(_MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(str(error)) from error


def _unzstandard(content: bytes) -> bytes:
    import zstandard

    parts: list[bytes] = []
    size, reader = 0, None
    try:
        for begin in range(0, len(content), 4096):  # small pieces: each may unpack to very much
            piece = content[begin : begin + 4096]
            while piece and size <= _MAX_UNPACKED:
                reader = reader or zstandard.ZstdDecompressor().decompressobj()
                parts.append(reader.decompress(piece))
                size += len(parts[-1])
                piece, reader = (reader.unused_data, None) if reader.eof else (b"", reader)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error
    if reader is not None and size <= _MAX_UNPACKED:
        raise ValueError("it ends too early")
    return b"".join(parts)


def _decoded(path: Path, content: bytes) -> str:
    if b"\0" in content[:65536]:
        raise UserError(
            f"{path} is not text but binary data (or UTF-16): save it as UTF-8 {path.suffix}"
        )
    # Bytes that are not UTF-8 become lone surrogates, so that they are found in their row.
    return content.decode("utf-8-sig", errors="surrogateescape")


def load_hub(name: str, split: str, reading: Reading) -> ProblemSet:
    """Problems of a data set of the Hugging Face hub.

    Args:
        name: ``owner/name`` or ``owner/name:config``.
        split: any split expression that ``datasets`` understands.
        reading: how rows are read.

    Raises:
        UserError: no network, no such data set, config or split, or bad rows.
    """
    import datasets
    import huggingface_hub

    repository, _, config = name.partition(":")
    try:
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            # datasets tries for 25 seconds where there is no network; one question tells.
            huggingface_hub.HfApi().dataset_info(repository, timeout=_HUB_SECONDS)
        with _no_progress_bars(datasets):
            loaded = datasets.load_dataset(
                repository,
                config or None,
                split=split,
                # Unset, older releases ask on the terminal whether to run the data set's code.
                trust_remote_code=False,
            )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"the data set {repository!r} (split {split!r}) could not be loaded from the hub: "
            f"{reason}\nCheck the name and the network; HF_HUB_OFFLINE=1 uses an earlier download. "
            "A data set with several configurations is named owner/name:config. The package "
            "itself brings gsm8k."
        ) from error
    listed = [dict(row) for row in loaded]
    digest = hashlib.sha256()
    for row in listed:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    rows = ((f"{repository}: row {place}", row) for place, row in enumerate(listed))
    empty = ProblemSet(name, split, (), digest.hexdigest())
    return _read(empty, rows, (name, repository.rpartition("/")[2]), reading)


@contextlib.contextmanager
def _no_progress_bars(datasets: Any) -> Iterator[None]:
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _parquet(path: Path) -> Iterator[SourceRow]:
    import datasets

    # A cache of its own: datasets would otherwise return what an older file of this name held.
    with tempfile.TemporaryDirectory() as cache, _no_progress_bars(datasets):
        try:
            loaded = datasets.load_dataset(
                "parquet",
                data_files=glob.escape(str(path)),  # ``[`` is a wildcard there
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
            )
            listed = [_shortest(dict(row), loaded.features) for row in loaded]
        except Exception as error:
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            raise UserError(f"{path}: cannot be read as Parquet ({reason})") from error
    yield from ((f"{path}: row {place}", row) for place, row in enumerate(listed))


def _shortest(row: dict[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose narrow floats are what they are written as: 0.1, not 0.10000000149011612."""
    import numpy as np

    narrow = {"float16": np.float16, "float32": np.float32}
    for name, value in row.items():
        if isinstance(value, decimal.Decimal):
            row[name] = int(value) if value == value.to_integral_value() else float(value)
            continue
        kind = narrow.get(getattr(features[name], "dtype", ""))
        if kind is not None and isinstance(value, float):
            row[name] = float(str(kind(value)))
    return row


def _json(path: Path, text: str) -> Iterator[SourceRow]:
    if not text.lstrip().startswith("["):
        if (whole := _one_object(path, text)) is not None:
            yield from whole
            return
        for count, content in enumerate(text.split("\n"), start=1):
            if content.strip():
                yield f"{path}:{count}", _object(content)
        return
    decoder = json.JSONDecoder(object_pairs_hook=_pairs)
    place = text.index("[") + 1
    line, counted = 1, 0
    while True:
        # An array's items one by one, so that each is known by its line.
        gap = _GAP.match(text, place)
        place = gap.end() if gap else place
        line, counted = line + text.count("\n", counted, place), place
        if text[place : place + 1] == "]":
            if rest := text[place + 1 :].strip():
                yield f"{path}:{line}", f"{shown(rest)} after the end of the array"
            return
        try:
            value, place = decoder.raw_decode(text, place)
        except _Twice as error:
            yield f"{path}:{line}", f"not JSON ({_json_reason(error)})"
            _, place = json.JSONDecoder().raw_decode(text, place)
            continue
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)
            if "}" in text[getattr(error, "pos", place) :]:
                # Where the next row begins nobody knows: rows would be lost without a word.
                raise UserError(
                    f"{path}:{line}: not JSON, and what follows cannot be read either "
                    f"({_json_reason(error)}); correct it"
                ) from None
            yield f"{path}:{line}", f"not JSON; the file ends in it ({_json_reason(error)})"
            return
        yield f"{path}:{line}", _as_row(value)


def _one_object(path: Path, text: str) -> list[SourceRow] | None:
    """The rows of a file that is one object, or of the list in it; ``None``: it is none."""
    first, _, rest = text.strip().partition("\n")
    try:
        if rest:
            with contextlib.suppress(ValueError):
                json.loads(first)
                return None  # one a line
        whole = json.loads(text, object_pairs_hook=_pairs)
    except (ValueError, RecursionError):
        return None
    if not isinstance(whole, dict):
        return None
    lists = [value for name, value in whole.items() if name in _ALL and isinstance(value, list)]
    if len(lists) == 1:
        return [(f"{path}: row {place}", _as_row(row)) for place, row in enumerate(lists[0])]
    return [(f"{path}:1", _as_row(whole))]


def _object(line: str) -> dict[str, Any] | str:
    try:
        return _as_row(json.loads(line, object_pairs_hook=_pairs))
    except (ValueError, RecursionError) as error:
        return f"not JSON ({_json_reason(error)})"


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names all differ; JSON itself would take the last of two."""
    _check_distinct([name for name, _ in pairs])
    return dict(pairs)


class _Twice(ValueError):
    """Two columns of one name."""


def _check_distinct(names: Sequence[str]) -> None:
    """Refuse columns that are there twice, by name."""
    twice = next((name for name, count in Counter(names).items() if name and count > 1), None)
    if twice is not None:
        raise _Twice(f"the column {shown(twice)} is there twice")


def _as_row(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"not an object but {type(value).__name__}"


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:80]


def _csv(path: Path, text: str, columns: tuple[tuple[str, str], ...]) -> Iterator[SourceRow]:
    # The module's own limit, 128 KiB, is less than a long context has, and the whole is in memory.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    mark = "\t" if suffixes_of(path)[0] == ".tsv" else _delimiter(text)
    stream = io.StringIO(text, newline="")
    reader = csv.reader(stream, delimiter=mark, strict=True)
    header: list[str] | None = None
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if reader.line_num > begin and stream.tell() == len(text):
                # An open quote took all lines to the end.
                raise UserError(
                    f"{path}:{begin}: not CSV, and what follows cannot be read either ({error}); "
                    "correct it"
                ) from None
            yield f"{path}:{begin}", f"not CSV ({error})"
            continue
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            named = dict(columns).get("question")
            if named not in header and not {n.lower() for n in header} & set(COLUMNS["question"]):
                raise UserError(
                    f"{path}:{begin}: the first line names the columns "
                    f"{', '.join(map(repr, header))[:200]}; {_COLUMNS}"
                )
            try:
                _check_distinct(header)
            except ValueError as error:
                raise UserError(f"{path}:{begin}: {error}; leave one of them out") from None
        elif len(cells) == len(header):
            yield f"{path}:{begin}", dict(zip(header, cells, strict=True))
        else:
            yield f"{path}:{begin}", f"{len(cells)} cells, but the header has {len(header)}"


def _delimiter(text: str) -> str:
    """What stands between the cells: a comma, or what a spreadsheet wrote into the header."""
    header = text.lstrip().partition("\n")[0]
    return next((mark for mark in ",;\t" if mark in header), ",")


def _read(
    empty: ProblemSet, rows: Iterable[SourceRow], names: tuple[str, str], reading: Reading
) -> ProblemSet:
    """Turn rows into problems.

    Args:
        empty: the set without them.
        rows: of it.
        names: what it is called in messages, and what its problems' ids begin with.
        reading: how rows are read.

    Raises:
        UserError: rows are bad and not to be skipped, or there is no good one.
    """
    name, stem = names
    found = problems_of(rows, stem, reading)
    bad, problems = found.bad, tuple(found.problems)
    if problems and (reading.skip_bad_rows or not bad):
        return replace(
            empty,
            problems=problems,
            skipped=len(bad),
            reasons=reasons_of(bad),
            unread=found.unread,
        )
    if not bad:
        raise UserError(f"{name} has no rows ({_COLUMNS})")
    first = listed(bad)
    if not problems:
        raise UserError(f"{name} has no row that can be read:\n  {first}\n({_COLUMNS})")
    as_kind = f" with answers of the kind {found.kind}" if reading.kind != found.kind else ""
    raise UserError(
        f"{name}: {len(bad)} of {len(bad) + len(problems)} rows cannot be read{as_kind}:\n"
        f"  {first}\nCorrect them, skip them with --skip-bad-rows, or choose another --answer-kind "
        f"({_COLUMNS})"
    )


def listed(bad: Sequence[BadRow]) -> str:
    """The first bad rows, a line each."""
    more = f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
    return "\n  ".join(map(str, bad[:_SHOWN])) + more
