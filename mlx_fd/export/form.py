"""What an export shall look like: its format and options, and which go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.export import gguf_file
from mlx_fd.registry import FORMATS

DTYPES = ("float16", "bfloat16", "float32")
Q_BITS = (4, 8)
Q_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Form:
    """What an export shall look like.

    Attributes:
        format: a name in :data:`mlx_fd.registry.FORMATS`.
        adapter: the adapter alone.
        dtype: of the weights; ``None``: the base's own (mlx), bfloat16 (hf).
        q_bits: for mlx: quantise; ``None``: leave dequantised.
        q_group_size: weights that share a scale.
        gguf_type: for gguf: type of the matrices.
        base_model: what a PEFT adapter calls its base; ``None``: as it was trained.
        parity_problems: problems of the parity bundle; 0: no bundle.
        seed: of the bundle's choice of problems.
        template_kwargs: further variables of the chat template, beside the run's, with which the
            bundle's prompts are written.
    """

    format: str = "mlx"
    adapter: bool = False
    dtype: str | None = None
    q_bits: int | None = None
    q_group_size: int | None = None
    gguf_type: str | None = None
    base_model: str | None = None
    parity_problems: int = 8
    seed: int = 0
    template_kwargs: Mapping[str, Any] | None = None


def check_form(form: Form) -> None:
    """Make sure that the options of an export go together.

    Raises:
        UserError: they do not.
    """
    for value, known in (
        (form.format, tuple(FORMATS)),
        (form.dtype, (None, *DTYPES)),
        (form.gguf_type, (None, *gguf_file.TYPES)),
        (form.q_bits, (None, *Q_BITS)),
        (form.q_group_size, (None, *Q_GROUP_SIZES)),
    ):
        if value not in known:
            raise UserError(f"{value} is none of {', '.join(str(k) for k in known if k)}")
    chosen = FORMATS[form.format]
    for option in ("adapter", "dtype", "q_bits", "gguf_type"):
        if getattr(form, option) not in (None, False) and option not in chosen.options:
            instead = chosen.instead.get(option, f"--format {form.format} does without")
            raise UserError(
                f"--{option.replace('_', '-')} is for --format {_taking(option)}; {instead}"
            )
    refused = {
        "--q-group-size goes with --q-bits": form.q_group_size is not None and form.q_bits is None,
        "--adapter: an adapter is written as it was trained; leave --dtype and --q-bits out": (
            form.adapter and (form.dtype is not None or form.q_bits is not None)
        ),
        f"--base-model goes with --format {_taking('base_model')} --adapter": (
            form.base_model is not None and not (form.adapter and "base_model" in chosen.options)
        ),
    }
    for text, wrong in refused.items():
        if wrong:
            raise UserError(text)


def _taking(option: str) -> str:
    """The formats that take an option: ``mlx and hf``."""
    return " and ".join(name for name, known in FORMATS.items() if option in known.options)
