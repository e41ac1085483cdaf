"""Batches of trials, out of the cache or made: what every set of an evaluation works with."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from mlx_fd.config import GenerationOptions
from mlx_fd.evaluation.baselines import SYSTEMS, Setting, Trial
from mlx_fd.evaluation.baselines.trials import Who, trial
from mlx_fd.evaluation.cache import Cache, Rows, code_of
from mlx_fd.evaluation.target import Models, Target
from mlx_fd.feedback.asking import OnTokens, derive_seed, generate_step
from mlx_fd.feedback.pair import Pair
from mlx_fd.models.backend import backend
from mlx_fd.models.conversation import Conversation
from mlx_fd.models.generation import first_prompt
from mlx_fd.models.writing import GenerateOptions, Sampling
from mlx_fd.problems.prompts import Answer

Item = TypeVar("Item")
Uses = Literal["expert", "student", "untrained"]
_PARTS: dict[Uses, tuple[str, ...]] = {
    "expert": ("expert",),
    "student": ("student", "adapter"),
    "untrained": ("student",),
}
# Modules that a text can come from, beside models and options.
_CODE = (
    "mlx_fd.problems.prompts",
    "mlx_fd.problems.parsing",
    "mlx_fd.problems.kinds",
    "mlx_fd.models.chat_template",
    "mlx_fd.problems.thoughts",
    "mlx_fd.models.conversation",
    "mlx_fd.models.generation",
    "mlx_fd.models.template_sandbox",
    "mlx_fd.models.thinking",
    "mlx_fd.models.tokenizer",
    "mlx_fd.models.speculative",
    "mlx_fd.models.stepping",
    "mlx_fd.models.writing",
    "mlx_fd.feedback.asking",
    "mlx_fd.feedback.criticism",
    "mlx_fd.feedback.own_solutions",
    "mlx_fd.feedback.stages",
    "mlx_fd.feedback.turns",
    "mlx_fd.feedback.judge",
    "mlx_fd.feedback.gate",
    "mlx_fd.feedback.risk",
    "mlx_fd.feedback.two_tokenizers",
    "mlx_fd.models.shared_tokens",
    "mlx_fd.models.student",
    "mlx_fd.evaluation.baselines",
    # These say how something is asked, and what of it is kept.
    "mlx_fd.evaluation.agreeing",
    "mlx_fd.evaluation.bench",
    "mlx_fd.evaluation.cascade.outcomes",
    "mlx_fd.evaluation.choosing",
    "mlx_fd.evaluation.following",
    "mlx_fd.evaluation.instructing",
    "mlx_fd.evaluation.judging",
    "mlx_fd.evaluation.locating",
    "mlx_fd.evaluation.solving",
)
_PACKAGES = ("mlx", "mlx-lm", "transformers")


def _thinking(one: Uses, options: GenerationOptions) -> list[Any]:
    """Whether a model thinks, and how much at most."""
    switch = options.expert_thinking if one == "expert" else options.student_thinking
    return [switch, options.max_thinking_tokens if switch == "on" else 0]


@functools.cache
def code_digest() -> str:
    """A digest of the code that decides what is generated: prompts, steps and baselines."""
    digest = hashlib.sha256()
    for name in _CODE:
        module = importlib.util.find_spec(name)
        assert module is not None and module.origin is not None, name
        file = Path(module.origin)
        # A package stands for all its modules.
        for one in sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]:
            digest.update(one.read_bytes())
    return digest.hexdigest()


def outside_code(system: str) -> dict[str, str]:
    """What a cache key says of a system that is registered from outside; empty for our own."""
    digest = code_of(SYSTEMS[system].run)
    return {"outside_code": digest} if digest else {}


@dataclass(frozen=True)
class Bench:
    """What an evaluation generates with.

    Attributes:
        target: what is evaluated.
        models: its models.
        cache: of what was generated.
        seed: of all draws.
        samples: how often each problem is tried.
        first_temperature: of the first answers.
        bare_temperature: of the bare models' answers.
        progress: called with a step's name and its new tokens.
    """

    target: Target
    models: Models
    cache: Cache
    seed: int
    samples: int
    first_temperature: float
    bare_temperature: float
    progress: OnTokens

    def batches(self, items: Sequence[Item]) -> Iterator[tuple[int, Sequence[Item]]]:
        """Items by batch, each with its number; the last may be short."""
        size = self.target.config.generation.batch_size
        for number, begin in enumerate(range(0, len(items), size)):
            yield number, items[begin : begin + size]

    def seeds(self, batch: int, sample: int) -> Callable[[str], int]:
        """Step name to the seed of its draws."""
        return lambda step: derive_seed(self.seed, batch, f"{sample}/{step}")

    def setting(self, pair: Pair, answered_by: Who) -> Setting:
        """What the baselines share."""
        config = self.target.config
        return Setting(
            pair=pair,
            generation=config.generation,
            episode=config.episode,
            answered_by=answered_by,
            state=self.target.gate,
            own_solutions=config.gate.own_solutions,
        )

    def rows(
        self,
        key: dict[str, Any],
        size: int,
        uses: Sequence[Uses],
        make: Callable[[Pair], Rows],
    ) -> Rows:
        """A batch, out of the cache or made.

        Args:
            key: what it depends on beside models, code and versions.
            size: how many rows it has.
            uses: whose weights take part.
            make: generates the rows with the two models.
        """
        models, template = self.target.models, self.target.expert_template
        parts = [part for one in uses for part in _PARTS[one] if part in models]
        if self.target.adapter is not None and "untrained" in uses:
            # No run says what it was before: it is what it is.
            parts.append("adapter")
        whole = {
            "format": 1,
            "code": code_digest(),
            "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
            "device": backend().device,
            "dequantize": self.target.config.models.dequantize,
            "vocab": self.target.vocab,
            "models": {part: models[part]["sha256"] for part in (*parts, "chat_template")},
            "expert_template": template.digest() if template is not None else None,
            "thinking": {one: _thinking(one, self.target.config.generation) for one in uses},
            **key,
        }

        def made() -> Rows:
            with self.models.amateur(trained="untrained" not in uses) as pair:
                return make(pair)

        return self.cache.rows(whole, size, made)

    def trials(
        self,
        key: dict[str, Any],
        size: int,
        uses: Sequence[Uses],
        make: Callable[[Pair], list[Trial]],
    ) -> list[Trial]:
        """A batch of trials; arguments as for :meth:`rows`."""
        rows = self.rows(key, size, uses, lambda pair: [dict(one.to_json()) for one in make(pair)])
        return [Trial.from_json(row) for row in rows]

    def ask(
        self,
        who: Who,
        pair: Pair,
        messages: Sequence[str],
        sampling: Sampling,
    ) -> list[Trial]:
        """One turn of a model in each of some new conversations, which begin with a message."""
        loaded = pair.expert if who == "expert" else pair.student_lm
        turns, usages = generate_step(
            loaded,
            "answer",
            [Conversation()] * len(messages),
            [first_prompt(loaded, message) for message in messages],
            sampling,
            self.progress,
            GenerateOptions(reuse=not self.target.config.generation.sequential, keep=False),
        )
        setting = self.setting(pair, who)
        return [
            trial(setting, Answer(turn.text, None), usage, {})
            for turn, usage in zip(turns, usages, strict=True)
        ]
