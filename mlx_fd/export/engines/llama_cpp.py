"""llama.cpp, through the C interface that llama-cpp-python brings: CPU, Metal or CUDA."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_fd.errors import UserError
from mlx_fd.export.bundle import Bundle
from mlx_fd.export.engines.local import LocalEngine

INSTALL = (
    "llama.cpp is not installed here; it is built while you wait:\n"
    '  pip install "mlx-fd[llama-cpp]"                             (CPU; Metal on a Mac)\n'
    '  CMAKE_ARGS="-DGGML_CUDA=on" pip install llama-cpp-python    (an NVIDIA GPU)'
)
_BATCH = 512
_ALL_LAYERS = 2**31 - 1  # -1 means all in new versions only
_FLOAT_TYPES = ("F32", "F16", "BF16")
_SHORTEST_CONTEXT = 1024


class LlamaCppEngine(LocalEngine):
    """Opens a ``.gguf`` file; all layers go to the GPU where llama.cpp was built for one."""

    def __init__(self, file: Path, bundle: Bundle):
        try:
            import llama_cpp
        except ImportError as error:
            raise UserError(INSTALL) from error
        except (OSError, RuntimeError) as error:
            raise UserError(f"llama-cpp-python is here but cannot be used: {error}") from error
        self._c: Any = llama_cpp
        self._c.llama_backend_init()
        settings = self._c.llama_model_default_params()
        settings.n_gpu_layers = _ALL_LAYERS
        self._model = self._c.llama_model_load_from_file(str(file).encode(), settings)
        if not self._model:
            raise UserError(
                f"llama.cpp cannot load {file}: it is damaged or cut off, or of an architecture "
                "that this version does not know; export again, or update llama-cpp-python"
            )
        self._vocab = self._c.llama_model_get_vocab(self._model)
        super().__init__(str(file), bundle, self._c.llama_vocab_n_tokens(self._vocab))
        longest = max(len(prompt.sequence) for prompt in bundle.prompts)
        self._length = max(longest, _SHORTEST_CONTEXT) + bundle.max_answer_tokens
        context = self._c.llama_context_default_params()
        context.n_ctx = self._length
        context.n_batch = context.n_ubatch = _BATCH
        context.n_threads = context.n_threads_batch = max(1, (os.cpu_count() or 2) // 2)
        self._context = self._c.llama_init_from_model(self._model, context)
        if not self._context:
            raise UserError(f"llama.cpp has not enough memory for {file}")
        self._memory = self._c.llama_get_memory(self._context)
        self._batch = self._c.llama_batch_init(_BATCH, 0, 1)
        kind = self._described()
        self.quantized = kind.rsplit(" ", 1)[-1] not in _FLOAT_TYPES
        gpu = self._c.llama_supports_gpu_offload()
        on = "GPU" if gpu else f"cpu with {context.n_threads} of its cores"
        self.about = f"llama-cpp-python {llama_cpp.__version__} on {on}, {kind}"
        if gpu:
            self.missing["peak memory"] = "llama.cpp does not say what it holds on the GPU"

    def _described(self) -> str:
        """Architecture, size and type, such as ``llama 135M Q4_1``."""
        text = ctypes.create_string_buffer(256)
        self._c.llama_model_desc(self._model, text, len(text))
        return text.value.decode(errors="replace")

    def encode(self, text: str) -> tuple[int, ...]:
        """As the base class says."""
        data = text.encode()
        tokens = (self._c.llama_token * (len(data) + 8))()
        count = self._c.llama_tokenize(
            self._vocab, data, len(data), tokens, len(tokens), False, True
        )
        if count < 0:
            raise UserError(f"{self._name}: llama.cpp cannot tokenise {text[:60]!r}")
        return tuple(tokens[:count])

    def decode(self, tokens: Sequence[int]) -> str:
        """As the base class says."""
        data = b""
        for token in tokens:
            piece = ctypes.create_string_buffer(256)
            size = self._c.llama_token_to_piece(self._vocab, token, piece, len(piece), 0, True)
            data += piece.raw[: max(size, 0)]
        return data.decode(errors="replace")

    def _run(self, tokens: Sequence[int], at: int, wanted: int) -> NDArray[np.float32]:
        """Read tokens that follow the ``at`` before them; logits after the last ``wanted`` ones."""
        if at + len(tokens) > self._length:
            raise UserError(
                f"{self._name}: a prompt of {at + len(tokens)} tokens is longer than the context "
                f"of {self._length}; take shorter problems"
            )
        rows, batch = [], self._batch
        for start in range(0, len(tokens), _BATCH):
            chunk = tokens[start : start + _BATCH]
            batch.n_tokens = len(chunk)
            scored = []
            for index, token in enumerate(chunk):
                batch.token[index] = token
                batch.pos[index] = at + start + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = start + index >= len(tokens) - wanted
                if batch.logits[index]:
                    scored.append(index)
            if self._c.llama_decode(self._context, batch):
                raise UserError(f"{self._name}: llama.cpp could not read {len(chunk)} tokens")
            for index in scored:
                row = self._c.llama_get_logits_ith(self._context, index)
                rows.append(np.ctypeslib.as_array(row, (self.bundle.vocab,)).copy())
        return np.stack(rows)

    def logits(self, tokens: Sequence[int], begin: int) -> NDArray[np.float32]:
        """As the base class says."""
        self._c.llama_memory_clear(self._memory, True)
        return self._run(tokens[:-1], 0, len(tokens) - 1 - begin)

    def greedy(self, tokens: Sequence[int], most: int) -> Iterator[int]:
        """As the base class says."""
        self._c.llama_memory_clear(self._memory, True)
        read, new = 0, list(tokens)
        for _ in range(most):
            token = int(self._run(new, read, 1)[0].argmax())
            yield token
            if token in self.bundle.eos:
                return
            read, new = read + len(new), [token]

    def peak_memory(self) -> int | None:
        """As the base class says; unknown on a GPU."""
        return None if "peak memory" in self.missing else super().peak_memory()
