"""How one text of a running batch draws its tokens: independently of all others."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.sample_utils import apply_top_k, apply_top_p

from mlx_fd.models.loading import Loaded
from mlx_fd.models.writing import Draw, Sampling


def greedy(loaded: Loaded) -> Draw:
    """The likeliest tokens; one function for all texts of a batch, which then draw in one call."""
    allowed = _allowed(loaded)
    return lambda rows: mx.argmax(allowed(rows), axis=-1)


class Seeded:
    """Tokens drawn with random numbers of their own: one seed gives one text, whoever else writes.

    The temperature comes before what is cut off, as in :mod:`mlx_fd.models.writing`.

    Attributes:
        key: of the next draw.
    """

    def __init__(self, loaded: Loaded, sampling: Sampling):
        """Draws of one text.

        Args:
            loaded: who writes.
            sampling: its temperature is above 0.
        """
        self._allowed, self._sampling = _allowed(loaded), sampling
        self._top_k = sampling.top_k if sampling.top_k < loaded.vocab else 0
        self.key = mx.random.key(sampling.seed)

    def __call__(self, rows: mx.array) -> mx.array:
        """Draw a token [n] from each of some rows of log-probabilities [n, V]."""
        self.key, now = mx.random.split(self.key)
        rows = self._allowed(rows).astype(mx.float32) / self._sampling.temperature
        rows = rows - mx.logsumexp(rows, axis=-1, keepdims=True)
        if self._sampling.top_p < 1:
            rows = apply_top_p(rows, self._sampling.top_p)
        if self._top_k:
            rows = apply_top_k(rows, self._top_k)
        return mx.random.categorical(rows, key=now)


def _allowed(loaded: Loaded) -> Draw:
    """Rows without the model's padding, and without the token that begins a thought unasked."""
    vocab, thinking = loaded.vocab, loaded.thinking
    banned = -1 if thinking is None else thinking.banned_id
    if banned < 0:
        return lambda rows: rows[..., :vocab]
    return lambda rows: mx.where(mx.arange(vocab) == banned, -mx.inf, rows[..., :vocab])
