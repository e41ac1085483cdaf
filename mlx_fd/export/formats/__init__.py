"""The formats that a model is exported in, one file each: how to write it, read it back, use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlx_fd import registry
from mlx_fd.registry import Entry, Registry

if TYPE_CHECKING:
    from pathlib import Path

    from mlx import nn

    from mlx_fd.export.form import Form
    from mlx_fd.export.gguf_file import Written
    from mlx_fd.export.source import Source
    from mlx_fd.models.loading import Loaded
    from mlx_fd.models.student import Student

OnSteps = Callable[[int, int], None]
"""Called with steps done, and their number."""

ON_A_GPU = """\
With an NVIDIA GPU this directory and one package are all it takes; the last line checks mlx-fd's
own CUDA kernels there:

    pip install "mlx-fd[cuda]"      # CUDA 13; "mlx-fd[cuda12]" for CUDA 12
    mlx-fd compare . --engine mlx
    mlx-fd doctor --kernels
"""


def _same_bits(form: Form) -> bool:
    return False


def _takes_any(source: Source, form: Form) -> None:
    return None


def _no_score_code(source: Source, form: Form, student: Student) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class ExportFormat(Entry):
    """A format.

    Attributes:
        write: writes the model of a source, with its live student, into a folder; gives what it
            has to report of a GGUF file, else ``None``.
        load_back: loads what was written, from the folder or from what ``convert_back`` made of it.
        check: refuses a source that the format has no place for, before the model is loaded.
        convert_back: makes of the folder, in an empty scratch folder, something that ``load_back``
            can load, and says where it is; ``None``: the folder is loaded as it is.
        use: how to open it, as Markdown for the model card.
        score_code: Python code that reads the score head there; empty: the card has none.
        library: what the hub calls the library that opens it.
        options: fields of :class:`mlx_fd.export.form.Form` that it takes beside ``format``,
            of adapter, dtype, q_bits, q_group_size, gguf_type and base_model.
        instead: for a field that it does not take, what to do instead.
        rounds: whether the weights are rounded, to 16 bits or fewer, so that the training could be
            lost.
        install: the command that installs what ``mlx-fd compare`` needs for it.
        on_a_gpu: how it is compared on a GPU, as Markdown.
    """

    write: Callable[[Source, Loaded, Path, Form, OnSteps], Written | None]
    load_back: Callable[[Source, Path, Form], Loaded]
    use: Callable[[Source, Form], str]
    library: Callable[[Form], str]
    check: Callable[[Source, Form], None] = _takes_any
    convert_back: Callable[[Path, Path, Form], Path] | None = None
    score_code: Callable[[Source, Form, Student], str] = _no_score_code
    options: frozenset[str] = frozenset()
    instead: Mapping[str, str] = field(default_factory=dict)
    rounds: Callable[[Form], bool] = _same_bits
    install: str = "pip install mlx-fd               # on Linux: mlx-fd[cpu]"
    on_a_gpu: str = ON_A_GPU


FORMATS: Registry[ExportFormat] = registry.FORMATS
register_format = FORMATS.register


def load_or_add(
    source: Source, folder: Path, form: Form, put_adapter: Callable[[nn.Module, Path], None]
) -> Loaded:
    """What was written: the model, or its base with the adapter that a folder has.

    Args:
        source: whose base it is.
        folder: what was written.
        form: as what.
        put_adapter: adds the adapter of a folder to a base model, in place.
    """
    from mlx_fd.models.loading import load

    if not form.adapter:
        return load(folder)
    loaded = load(source.ref.model)
    put_adapter(loaded.model, folder)
    return loaded
