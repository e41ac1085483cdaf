"""Tools that run a model, each behind the same few calls. Nothing here needs torch.

A module an engine; :data:`ENGINES` has them by the name that ``mlx-fd compare --engine`` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_fd.export.bundle import ROLES, Bundle, Prompt

TIMED_ROLE = ROLES[-1]  # the longest prompts, and no two of them begin alike for long


@dataclass(frozen=True)
class Timing:
    """How long one continuation took.

    Attributes:
        prompt: tokens read.
        first: seconds until the first token.
        rest: seconds from the first token to the last.
        written: tokens written.
    """

    prompt: int
    first: float
    rest: float
    written: int


@dataclass(frozen=True, eq=False)
class Continuation:
    """What an engine makes of one prompt.

    Attributes:
        agreed: tokens of its own greedy continuation that are the reference's, up to the first
            that is not.
        rows: [R] the prompt's kept positions it could be asked about.
        logprobs: [R, TOP] its log-probabilities of the reference's ``top_ids``; NaN where it does
            not say.
        top: [R] whether its likeliest token is the reference's.
        next_logprobs: [R] its log-probabilities of the tokens that do come next; NaN likewise.
        timing: of the greedy continuation; ``None`` where none was taken.
    """

    agreed: int
    rows: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    top: NDArray[np.bool_]
    next_logprobs: NDArray[np.float64]
    timing: Timing | None


class Engine(Protocol):
    """A model, opened by one tool.

    Attributes:
        about: the tool, its version, what it runs on.
        quantized: whether the weights are; ``None`` where the tool does not say.
        missing: measures it cannot give, each with the reason.
    """

    about: str
    quantized: bool | None
    missing: dict[str, str]

    def count(self, prompt: Prompt) -> tuple[bool | None, str]:
        """Whether it makes the same tokens of a prompt's text (``None``: cannot be known), how."""
        ...

    def score_continuation(self, prompt: Prompt) -> Continuation:
        """Continue a prompt greedily, and read the reference's continuation."""
        ...

    def answer(self, text: str, most: int) -> str:
        """The greedy continuation of a prompt's text, of at most ``most`` tokens, as text."""
        ...

    def peak_memory(self) -> int | None:
        """Bytes, at the most, since it was opened."""
        ...


def _mlx(target: str, bundle: Bundle) -> Engine:
    from mlx_fd.export.engines.mlx import MlxEngine

    return MlxEngine(Path(target), bundle)


def _llama_cpp(target: str, bundle: Bundle) -> Engine:
    from mlx_fd.export.engines.llama_cpp import LlamaCppEngine

    return LlamaCppEngine(Path(target), bundle)


def _openai(target: str, bundle: Bundle) -> Engine:
    from mlx_fd.export.engines.openai import OpenAIEngine

    return OpenAIEngine(target, bundle)


ENGINES: dict[str, Callable[[str, Bundle], Engine]] = {
    "mlx": _mlx,
    "llama.cpp": _llama_cpp,
    "openai": _openai,
}
