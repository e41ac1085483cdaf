"""What engines share whose every logit can be read."""

from __future__ import annotations

import abc
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlx_fd.errors import UserError
from mlx_fd.export.bundle import Bundle, Prompt
from mlx_fd.export.engines import Continuation, Timing
from mlx_fd.export.logits import log_softmax


class LocalEngine(abc.ABC):
    """An engine in this process: subclasses tokenise, give logits, and continue greedily."""

    about: str
    quantized: bool | None
    missing: dict[str, str]

    def __init__(self, name: str, bundle: Bundle, vocab: int):
        if vocab < bundle.vocab:
            raise UserError(
                f"{name} has a vocabulary of {vocab} tokens, the bundle's reference one of "
                f"{bundle.vocab}: it is another model"
            )
        self.bundle = bundle
        self.missing = {}
        self._name = name

    @abc.abstractmethod
    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text whose special tokens are written out."""

    @abc.abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""

    @abc.abstractmethod
    def logits(self, tokens: Sequence[int], begin: int) -> NDArray[np.float32]:
        """As :func:`mlx_fd.export.logits.next_token_logits` gives them."""

    @abc.abstractmethod
    def greedy(self, tokens: Sequence[int], most: int) -> Iterator[int]:
        """The likeliest continuation, at most ``most`` tokens, up to and with an end token."""

    def count(self, prompt: Prompt) -> tuple[bool | None, str]:
        """As the protocol says."""
        return self.encode(prompt.text) == prompt.tokens, "ids"

    def score_continuation(self, prompt: Prompt) -> Continuation:
        """As the protocol says.

        Raises:
            UserError: the logits are not finite.
        """
        begin, first, agreed, written = time.perf_counter(), None, 0, 0
        for token in self.greedy(prompt.tokens, len(prompt.greedy)):
            first = first or time.perf_counter()
            agreed += agreed == written and token == prompt.greedy[written]
            written += 1
        end = time.perf_counter()
        first = first or end
        logprobs = log_softmax(self.logits(prompt.sequence, prompt.begin))
        if not np.isfinite(logprobs).all():
            raise UserError(
                f"{self._name}: the logits are not finite numbers on a {prompt.role} prompt; the "
                "weights are damaged: export again"
            )
        rows = np.arange(prompt.positions)
        return Continuation(
            agreed=agreed,
            rows=rows,
            logprobs=np.take_along_axis(logprobs, prompt.top_ids.astype(np.int64), -1),
            top=logprobs.argmax(-1) == prompt.top_ids[:, 0],
            next_logprobs=logprobs[rows, prompt.sequence[prompt.begin + 1 :]],
            timing=Timing(len(prompt.tokens), first - begin, end - first, written),
        )

    def answer(self, text: str, most: int) -> str:
        """As the protocol says."""
        tokens = list(self.greedy(self.encode(text), most))
        if tokens and tokens[-1] in self.bundle.eos:
            tokens.pop()
        return self.decode(tokens).strip()

    def peak_memory(self) -> int | None:
        """The most memory that this process had in RAM, in bytes."""
        return peak_resident()


def peak_resident() -> int:
    """The most memory that this process had in RAM, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux lets a process inherit ru_maxrss from the one that started it.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
