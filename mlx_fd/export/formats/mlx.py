"""mlx-lm's directory, of a whole model or of an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_fd.export.formats import ExportFormat, OnSteps, load_or_add, register_format

if TYPE_CHECKING:
    from mlx_fd.export.form import Form
    from mlx_fd.export.source import Source
    from mlx_fd.models.loading import Loaded
    from mlx_fd.models.student import Student


def write(source: Source, live: Loaded, folder: Path, form: Form, on_steps: OnSteps) -> None:
    """Write the model, or its adapter alone."""
    from mlx_fd.export import mlx_dir

    if form.adapter:
        mlx_dir.write_adapter(source, folder)
        return
    mlx_dir.write_model(
        source,
        folder,
        dtype=form.dtype,
        q_bits=form.q_bits,
        q_group_size=form.q_group_size or 64,
    )


def load_back(source: Source, folder: Path, form: Form) -> Loaded:
    """The model, or its base with the adapter."""
    from mlx_fd.export import mlx_dir

    return load_or_add(source, folder, form, mlx_dir.put_adapter)


def use(source: Source, form: Form) -> str:
    """With mlx-lm."""
    from mlx_fd.export.card import how_to_base, named_base

    if not form.adapter:
        return '    mlx_lm.generate --model . --prompt "..."\n'
    base = named_base(source)
    return f'    mlx_lm.generate --model {base} --adapter-path . --prompt "..."\n' + how_to_base(
        source, base, "mlx"
    )


def score_code(source: Source, form: Form, student: Student) -> str:
    """With mlx-lm."""
    from mlx_fd.export.card import mlx_score_code

    return mlx_score_code(source, form, student)


register_format(
    ExportFormat(
        name="mlx",
        help="for mlx-lm",
        order=10,
        write=write,
        load_back=load_back,
        use=use,
        score_code=score_code,
        library=lambda form: "mlx",
        options=frozenset({"adapter", "dtype", "q_bits", "q_group_size"}),
        rounds=lambda form: (
            not form.adapter and not (form.dtype == "float32" and form.q_bits is None)
        ),
    )
)
