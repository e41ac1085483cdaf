"""Writing a text by itself with a draft (speculative decoding, Leviathan et al., arXiv 2211.17192).

A small model proposes the next few tokens, and the large one reads them in one step. At each place
the large one draws its own token, with the random number that it would draw it with alone; proposed
tokens are kept up to the first that is another. So the text is the large model's, token for token,
whatever the draft. Where tokens are drawn by lot the draft takes the same random numbers, and
proposes the same token as often as the two distributions allow without knowing of each other
(Daliri et al., arXiv 2408.07978).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_fd.errors import UserError
from mlx_fd.models import metering
from mlx_fd.models.conversation import Cache, can_be_cut_back, read_alone
from mlx_fd.models.loading import Draft, Loaded, open_lazily
from mlx_fd.models.thinking import shared_length


class RandomNumbers(Protocol):
    """Where draws take their random numbers from; the key can be read, and put back."""

    key: mx.array


class SharedNumbers:
    """MLX's own random numbers."""

    @property
    def key(self) -> mx.array:
        """The key of the next draw."""
        key: mx.array = mx.random.state[0]  # type: ignore[index]
        return key

    @key.setter
    def key(self, key: mx.array) -> None:
        # Its two numbers are the halves of a seed that makes it.
        halves: Any = key.tolist()
        mx.random.seed(halves[0] << 32 | halves[1])


@dataclass(frozen=True)
class Drawing:
    """How the tokens of one text are drawn.

    Attributes:
        draw: draws tokens [1] from rows of log-probabilities [1, V].
        max_tokens: the most to write, at least one.
        ends: tokens that end the text.
        processors: of logits [1, V], by the tokens so far.
        numbers: what ``draw`` takes random numbers from; ``None``: it takes none.
    """

    draw: Callable[[mx.array], mx.array]
    max_tokens: int
    ends: frozenset[int] = frozenset()
    processors: Sequence[Callable[[mx.array, mx.array], mx.array]] = ()
    numbers: RandomNumbers | None = None

    def next(
        self, tokens: mx.array, logits: mx.array, vocab: int
    ) -> tuple[mx.array, mx.array, mx.array | None]:
        """Draw the token after some others.

        Args:
            tokens: all so far [n].
            logits: of the next one [1, V].
            vocab: rows beyond it are never drawn.

        Returns:
            The token [1], the log-probabilities [1, V] that it is drawn by, and the key of the
            draw after it.
        """
        for process in self.processors:
            logits = process(tokens, logits)
        rows = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token = self.draw(rows[..., :vocab]).astype(mx.uint32)
        return token, rows, self.numbers.key if self.numbers else None

    def go_on_from(self, key: mx.array | None) -> None:
        """Let the next draw be with a key that there was before."""
        if self.numbers is not None and key is not None:
            self.numbers.key = key


def can_draft(loaded: Loaded, cache: Cache, length: int) -> bool:
    """Whether a model has a draft with which a text can be written.

    What is proposed in vain has to be taken out of both models' caches again.

    Args:
        loaded: who writes.
        cache: what it has read.
        length: of the whole text at its end.
    """
    if loaded.draft is None:
        return False
    most = length + loaded.draft.tokens
    caches = cache, make_prompt_cache(loaded.draft.loaded.model)
    return all(can_be_cut_back(one, most) for one in caches)


def check_draft(expert: Path, student: Path) -> None:
    """Make sure that two models' texts can be cut back, from their shapes; no weight is read.

    Args:
        expert: directory of the model that writes.
        student: of its draft.

    Raises:
        UserError: one of them has layers that do not know their earlier states.
    """
    for path in (expert, student):
        if not can_be_cut_back(make_prompt_cache(open_lazily(path)[0]), 0):
            raise UserError(
                "with speculate, tokens that were proposed in vain are taken back, and layers of "
                f"{path} keep no earlier state to go back to: leave speculate out"
            )


def drawn_with_draft(
    loaded: Loaded, cache: Cache, before: Sequence[int], drawing: Drawing
) -> Iterator[tuple[int, mx.array, bool]]:
    """Tokens of one text to its end, as :func:`mlx_fd.models.writing.drawn_alone` draws them.

    Args:
        loaded: who writes; its draft can be used (:func:`can_draft`).
        cache: holds all of ``before`` but its last token; with the last token that is given it
            holds all but that.
        before: all tokens so far.
        drawing: how they are drawn.

    Yields:
        Each token, the log-probabilities [1, V] that it was drawn by, and whether the draft had
        proposed it.
    """
    assert loaded.draft is not None
    drafting = _Drafting(loaded.draft, loaded.vocab, drawing)
    tokens, end = [*before], len(before) + drawing.max_tokens
    while True:
        # The step writes a token beside those that it takes over.
        proposed = drafting.propose(tokens, min(loaded.draft.tokens, end - len(tokens) - 1))
        drawn, rows, keys = _drawn(loaded, cache, tokens, proposed, drawing)
        kept = shared_length(proposed, drawn)
        new = drawn[: kept + 1]
        last = next((at for at, token in enumerate(new) if token in drawing.ends), kept)
        new = new[: last + 1]
        drawing.go_on_from(keys[last])
        _cut(cache, len(proposed) - last)
        drafting.keep(len(tokens) + kept)
        tokens += new
        for at, token in enumerate(new):
            yield token, rows[at], at < kept
        if new[-1] in drawing.ends or len(tokens) == end:
            return


def _drawn(
    loaded: Loaded,
    cache: Cache,
    tokens: Sequence[int],
    proposed: Sequence[int],
    drawing: Drawing,
) -> tuple[list[int], list[mx.array], list[mx.array | None]]:
    """What a model draws after some tokens, and after each that is proposed; in one step.

    Returns:
        Of each place the token, the log-probabilities [1, V] it is drawn by, and the key of the
        draw after it.
    """
    known = mx.array([*tokens, *proposed], mx.uint32)
    with metering.step_of_several():
        logits: mx.array = loaded.model(known[None, len(tokens) - 1 :], cache=cache)
    found = [
        drawing.next(known[: len(tokens) + at], logits[:, at], loaded.vocab)
        for at in range(len(proposed) + 1)
    ]
    drawn: Any = mx.concatenate([token for token, _, _ in found]).tolist()
    return drawn, [rows for _, rows, _ in found], [key for _, _, key in found]


class _Drafting:
    """A draft that goes along with a text."""

    def __init__(self, draft: Draft, vocab: int, drawing: Drawing):
        self._model, self._vocab, self._drawing = draft.loaded, vocab, drawing
        self._cache: Cache = make_prompt_cache(draft.loaded.model)
        self._length = 0

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """The next tokens as the draft would draw them; the random numbers are not used up."""
        if count == 0:
            return []
        if self._length == 0:
            read_alone(self._model, self._cache, tokens[:-1])
            self._length = len(tokens) - 1
        numbers = self._drawing.numbers
        key = numbers.key if numbers else None
        known = mx.array([*tokens], mx.uint32)
        for _ in range(count):
            unread = known[None, self._length :]
            with metering.step_of_several():
                logits: mx.array = self._model.model(unread, cache=self._cache)
            self._length = known.size
            token, _, _ = self._drawing.next(known, logits[:, -1], self._vocab)
            known = mx.concatenate([known, token])
        self._drawing.go_on_from(key)
        found: Any = known.tolist()
        return list(found[len(tokens) :])

    def keep(self, length: int) -> None:
        """Forget what was read beyond the first ``length`` tokens."""
        if self._length > length:
            _cut(self._cache, self._length - length)
            self._length = length


def _cut(cache: Cache, count: int) -> None:
    """Take the last ``count`` tokens out of a cache that can be cut back."""
    for layer in cache:
        layer.trim(count)
