"""mlx-lm on whatever MLX has here: Metal, CUDA or the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlx_fd.export.bundle import Bundle
from mlx_fd.export.engines.local import LocalEngine, peak_resident
from mlx_fd.export.logits import next_token_logits
from mlx_fd.models.backend import backend
from mlx_fd.models.loading import load
from mlx_fd.models.resolve import resolve


class MlxEngine(LocalEngine):
    """Opens an ``mlx`` or ``hf`` export.

    On the CPU the weights are made float32, as everywhere in this package: MLX's 16-bit and
    quantised products are many times slower there.
    """

    def __init__(self, folder: Path, bundle: Bundle):
        self._loaded = load(resolve(str(folder)))
        super().__init__(str(folder), bundle, self._loaded.vocab)
        self.quantized = "quantization" in self._loaded.config
        self._on = backend().device
        dtype = str(self._loaded.dtype).removeprefix("mlx.core.")
        self.about = f"mlx-lm {version('mlx-lm')}, mlx {version('mlx')} on {self._on}, {dtype}"

    def encode(self, text: str) -> tuple[int, ...]:
        """As the base class says."""
        return tuple(self._loaded.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """As the base class says."""
        return str(self._loaded.tokenizer.decode(list(tokens)))

    def logits(self, tokens: Sequence[int], begin: int) -> NDArray[np.float32]:
        """As the base class says."""
        return next_token_logits(self._loaded.model, tokens, begin, self.bundle.vocab)

    def greedy(self, tokens: Sequence[int], most: int) -> Iterator[int]:
        """As the base class says."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        def likeliest(logprobs: mx.array) -> mx.array:
            return mx.argmax(logprobs[..., : self.bundle.vocab], axis=-1)

        steps = generate_step(
            mx.array([*tokens]), self._loaded.model, max_tokens=most, sampler=likeliest
        )
        for token, _ in steps:
            yield int(token)
            if int(token) in self.bundle.eos:
                return

    def peak_memory(self) -> int | None:
        """The most memory MLX held on a GPU; on the CPU that of the process in RAM, in bytes."""
        import mlx.core as mx

        return peak_resident() if self._on == "cpu" else mx.get_peak_memory()
