"""What the routes share: models, limits, rule, counters."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mlx_fd.serve.limits import Admission, Limits
from mlx_fd.serve.models import AS_IN_THE_RUN, Thoughts

if TYPE_CHECKING:
    from mlx_fd.serve.engine import Engine
    from mlx_fd.serve.kept import Kept
    from mlx_fd.serve.logs import Log
    from mlx_fd.serve.metrics import Metrics
    from mlx_fd.serve.models import Served
    from mlx_fd.serve.rule import Rule

T = TypeVar("T")

# Of models that are no run's.
_TOKENS, _FEEDBACK_TOKENS = 512, 192


@dataclass(frozen=True)
class Options:
    """How the server was started.

    Attributes:
        student: the run, checkpoint or model, as it was named.
        expert: likewise; ``None``: there is none.
        host: where it listens.
        port: likewise; 0: any free one.
        key: what a client must show; ``None``: nothing.
        limits: what clients may take.
        score: what the student's answers are scored by; ``None``: as the run was calibrated.
        threshold: below which the expert is asked; ``None``: likewise.
        verbatim: whether a single question is sent as it is, without the form of the training.
        log_texts: whether logs have what was asked and answered.
        keep: a file that problems are kept in; ``None``: none are.
        keep_most: problems that it holds.
        thoughts: who thinks before it writes.
        speculate: tokens that the student proposes at a time of what the expert writes; 0: none.
    """

    student: str
    expert: str | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = None
    limits: Limits = field(default_factory=Limits)
    score: str | None = None
    threshold: float | None = None
    verbatim: bool = False
    log_texts: bool = False
    keep: Path | None = None
    keep_most: int = 1000
    thoughts: Thoughts = AS_IN_THE_RUN
    speculate: int = 0


@dataclass
class Service:
    """A server's parts; of one event loop.

    Attributes:
        options: how it was started.
        engine: the thread with the models.
        served: the models.
        rule: when the expert is asked.
        metrics: counters.
        log: where requests are noted.
        admission: who may come in.
        kept: problems that are kept to be learned from.
        student: whose weights are served, as it was named last.
    """

    options: Options
    engine: Engine
    served: Served
    rule: Rule
    metrics: Metrics
    log: Log
    admission: Admission
    kept: Kept | None = None
    student: str = ""
    # One thread: a tokenizer is not made for several.
    _aside: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="prompts")
    )

    @property
    def default_tokens(self) -> int:
        """The most tokens of a reply, where a request does not say: as in the run."""
        config = self.served.judge.ref.config
        tokens = _TOKENS if config is None else config.generation.max_answer_tokens
        return min(tokens, self.options.limits.max_tokens)

    @property
    def feedback_tokens(self) -> int:
        """The most tokens of a feedback, likewise."""
        tokens = self.served.judge.ref.feedback_tokens or _FEEDBACK_TOKENS
        return min(tokens, self.options.limits.max_tokens)

    async def aside(self, function: Callable[[], T]) -> T:
        """Do what takes a while, such as making tokens of a long text, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._aside, function)

    def close(self) -> None:
        """End the thread of :meth:`aside`."""
        self._aside.shutdown(wait=False, cancel_futures=True)
