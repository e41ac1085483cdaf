"""Directories that ``mlx_lm.load`` opens: the whole model, or the adapter alone."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd.export.source import (
    GENERATION_CONFIG,
    Source,
    adapter_config,
    copy_file,
    copy_tokenizer,
    fused,
    stored_dtype,
)
from mlx_fd.files import write_json
from mlx_fd.models.directory import ADAPTER_CONFIG
from mlx_fd.models.loading import open_lazily
from mlx_fd.models.student import ADAPTER_WEIGHTS

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx import nn

# What mlx-lm and this package write into config.json, and nobody else reads.
MLX_KEYS = ("quantization", "quantization_config", "mlx_fd")


def write_model(
    source: Source,
    folder: Path,
    *,
    dtype: str | None = None,
    q_bits: int | None = None,
    q_group_size: int = 64,
) -> None:
    """Write the whole model, the adapter fused into it.

    Args:
        source: what to write.
        folder: an empty folder.
        dtype: of the weights, and of the scales of quantised ones, but for those that the model's
            class keeps as they are (decays, the biases that choose experts); ``None``: the base's
            own, of each.
        q_bits: quantise to 4 or 8 bits; ``None``: leave the weights dequantised.
        q_group_size: weights that share a scale.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map_with_path
    from mlx_lm.utils import quantize_model, save_config, save_model

    base, config = open_lazily(source.ref.model)
    model = fused(source.ref)
    wanted = getattr(mx, dtype) if dtype else stored_dtype(base)
    of_base = {name: array.dtype for name, array in tree_flatten(base.parameters())}
    # As in mlx_lm.convert.
    is_cast: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _: True)

    def stored(name: str, array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        own = of_base.get(name, wanted)
        kept = (dtype is None or not is_cast(name)) and mx.issubdtype(own, mx.floating)
        return array.astype(own if kept else wanted)

    model.update(tree_map_with_path(stored, model.parameters()))
    for key in (*MLX_KEYS, "dtype"):
        config.pop(key, None)
    config["torch_dtype"] = str(wanted).removeprefix("mlx.core.")
    if q_bits is not None:
        # It prints, and standard output may belong to a script.
        with contextlib.redirect_stdout(io.StringIO()):
            model, config = quantize_model(model, config, q_group_size, q_bits)
    save_model(folder, model, donate_model=True)
    save_config(config, folder / "config.json")
    copy_tokenizer(source.ref.model, folder)
    copy_file(source.ref.model / GENERATION_CONFIG, folder)


def write_adapter(source: Source, folder: Path) -> None:
    """Write the adapter alone, as mlx-lm writes it, with its base model's name or directory."""
    base = source.base if source.on_hub else str(source.ref.model)
    config: dict[str, Any] = {**adapter_config(source.ref), "model": base}
    assert source.ref.adapter_folder is not None
    shutil.copyfile(source.ref.adapter_folder / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    write_json(folder / ADAPTER_CONFIG, config)


def put_adapter(model: nn.Module, folder: Path) -> None:
    """Put an adapter that :func:`write_adapter` wrote onto its base model, as mlx-lm does."""
    from mlx_lm.tuner.utils import load_adapters

    load_adapters(model, str(folder))
    model.eval()
