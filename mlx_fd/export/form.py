"""What an export shall look like: its format and options, and which go together."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_fd.errors import UserError
from mlx_fd.export import gguf_file

FORMATS = ("mlx", "hf", "gguf")
DTYPES = ("float16", "bfloat16", "float32")
Q_BITS = (4, 8)
Q_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Form:
    """What an export shall look like.

    Attributes:
        format: one of ``FORMATS``.
        adapter: the adapter alone.
        dtype: of the weights; ``None``: the base's own (mlx), bfloat16 (hf).
        q_bits: for mlx: quantise; ``None``: leave dequantised.
        q_group_size: weights that share a scale.
        gguf_type: for gguf: type of the matrices.
        base_model: what a PEFT adapter calls its base; ``None``: as it was trained.
        parity_problems: problems of the parity bundle; 0: no bundle.
        seed: of the bundle's choice of problems.
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


def check_form(form: Form) -> None:
    """Make sure that the options of an export go together.

    Raises:
        UserError: they do not.
    """
    for value, known in (
        (form.format, FORMATS),
        (form.dtype, (None, *DTYPES)),
        (form.gguf_type, (None, *gguf_file.TYPES)),
        (form.q_bits, (None, *Q_BITS)),
        (form.q_group_size, (None, *Q_GROUP_SIZES)),
    ):
        if value not in known:
            raise UserError(f"{value} is none of {', '.join(str(k) for k in known if k)}")
    gguf = form.format == "gguf"
    refused = {
        "--adapter: a GGUF file holds the whole model; leave --adapter out": gguf and form.adapter,
        "--dtype is for --format mlx and hf; for gguf choose --gguf-type f16, bf16 or f32": (
            gguf and form.dtype is not None
        ),
        "--q-bits is for --format mlx; for gguf choose --gguf-type q8_0, q4_1 or q4_0": (
            form.format != "mlx" and form.q_bits is not None
        ),
        "--q-group-size goes with --q-bits": form.q_group_size is not None and form.q_bits is None,
        "--gguf-type is for --format gguf": not gguf and form.gguf_type is not None,
        "--adapter: an adapter is written as it was trained; leave --dtype and --q-bits out": (
            form.adapter and (form.dtype is not None or form.q_bits is not None)
        ),
        "--base-model goes with --format hf --adapter": (
            form.base_model is not None and not (form.format == "hf" and form.adapter)
        ),
    }
    for text, wrong in refused.items():
        if wrong:
            raise UserError(text)
