"""Write the table of architectures in docs/models.md: what became of a small random model of each.

python scripts/make_models_table.py            # writes it
python scripts/make_models_table.py --check    # fails where it is not up to date

Each is opened as a run opens it. tests/models/test_architectures.py makes sure that those that are
not refused are right.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mlx_fd.errors import UserError
from support.architectures import ARCHITECTURES, config_of, make_architecture

if TYPE_CHECKING:
    from mlx_fd.models.loading import Loaded

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN = "<!-- architectures: written by scripts/make_models_table.py -->"
END = "<!-- end of architectures -->"
_STATES = {
    "KVCache": "keys and values",
    "RotatingKVCache": "window",
    "ChunkedKVCache": "chunk",
    "ArraysCache": "recurrence",
}
# Settings of the models that there are, where the small ones have others for the tests to see:
# whether llama.cpp computes a model is asked with these.
_PUBLISHED = {"no_rope_layer_interval": 4, "mlp_only_layers": []}


@dataclass(frozen=True)
class Row:
    """What became of one architecture.

    Attributes:
        model_type: as config.json names it.
        result: whether it is run, and how; or why not.
        states: what its layers keep of what they have read.
        formats: what its students can be exported to.
    """

    model_type: str
    result: str
    states: str
    formats: str


def row_of(name: str, found: Loaded | UserError, folder: Path) -> Row:
    """The row of an architecture, from the model that was opened in a folder, or the refusal."""
    model_type = config_of(name)["model_type"]
    if isinstance(found, UserError):
        # The directory is nobody's, and what another library said is another one's next time.
        own, directory, why = str(found).partition(f"{folder}: ")
        why = why if directory else own.replace(f" in {folder}", "").partition(": ")[0]
        return Row(model_type, f"refused: {why}", "", "")
    result = "right" if found.batched else "right, one conversation at a time"
    return Row(model_type, result, _states(found), _formats(name, folder))


def _states(loaded: Loaded) -> str:
    from mlx_lm.models.cache import make_prompt_cache

    def kinds(layers: Iterable[Any]) -> Iterable[str]:
        for layer in layers:
            name = type(layer).__name__
            yield from kinds(layer.caches) if hasattr(layer, "caches") else [name]

    found = set(kinds(make_prompt_cache(loaded.model)))
    return ", ".join(sorted(_STATES.get(kind, kind) for kind in found))


def _formats(name: str, folder: Path) -> str:
    config = config_of(name)
    text = config.get("text_config", config)
    published = {**text, **{key: _PUBLISHED[key] for key in text.keys() & _PUBLISHED.keys()}}
    if published == text:
        return _taken_by(folder)
    with TemporaryDirectory() as directory:
        changes = published if text is config else {"text_config": published}
        return _taken_by(make_architecture(Path(directory), name, **changes))


def _taken_by(folder: Path) -> str:
    """The formats that have a place for the model in a folder."""
    from mlx_fd.export.form import Form
    from mlx_fd.export.formats import FORMATS
    from mlx_fd.export.source import open_source

    source, taken = open_source(str(folder)), []
    for name, kind in FORMATS.items():
        with contextlib.suppress(UserError):
            kind.check(source, Form(format=name))
            taken.append(name)
    return ", ".join(taken)


def table(rows: Mapping[str, Row]) -> str:
    """The rows as Markdown, between the marks."""
    lines = ["| `model_type` | in mlx-fd | layers keep | exports |", "|---|---|---|---|"]
    # Several of one type differ in what their configurations say; one line where they agree.
    found = sorted(
        set(rows.values()), key=lambda row: (row.model_type.lower(), row.states, row.formats)
    )
    return "\n".join([BEGIN, "", *lines, *map(line, found), "", END])


def line(row: Row) -> str:
    """A row as Markdown."""
    cells = (f"`{row.model_type}`", row.result, row.states, row.formats)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def with_table(page: str, rows: Mapping[str, Row]) -> str:
    """The page with the table in place of the one that it has."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{PAGE}: the marks around the table are gone")
    return before + table(rows) + after


def opened(name: str, folder: Path) -> Loaded | UserError:
    """A small model of an architecture, or why it is refused."""
    from mlx_fd.models.loading import load

    try:
        return load(make_architecture(folder, name))
    except UserError as error:
        return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    rows = {}
    for name in ARCHITECTURES:
        with TemporaryDirectory() as directory:
            folder = Path(directory) / "model"
            rows[name] = row_of(name, opened(name, folder), folder)
    page = PAGE.read_text(encoding="utf-8")
    made = with_table(page, rows)
    if arguments.check and made != page:
        sys.exit(f"{PAGE.name} is not up to date: run scripts/make_models_table.py")
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
