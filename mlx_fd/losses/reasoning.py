"""Reasoning path: the expert's distribution at every token of the reasoning, step by step.

A solution's reasoning is what comes before its final answer (:mod:`mlx_fd.losses.answer`), and each
of its lines is a step. With the tokens of step k in S_k::

    L = (1 / K) sum over k of (1 / |S_k|) sum over t in S_k of T^2 D(p_E(. | y_<t), p_S(. | y_<t))

the divergence of the logit loss (Hinton et al., arXiv 1503.02531), with a weight of
1 / |S_k| on each token: a step counts once, however many words it takes, and a long sentence does
not drown a short calculation. The published code of the feedback method has no such loss; the
weighting is ours. Both models read the same tokens. The sum is the engine's,
:mod:`mlx_fd.losses.divergence`, with the weights that this module finds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

from mlx_fd.losses.spans import Span


def step_weights(text: str, spans: Sequence[Span], answer: Span | None) -> list[float]:
    """What each token counts: 1 / (tokens of its step) in the reasoning, 0 elsewhere.

    A step is a line with something on it. White space and empty spans go with the token before
    them (at the beginning with the first step), so that line ends make no steps of their own.

    Args:
        text: the whole solution, a step in each line.
        spans: of :func:`mlx_fd.losses.spans.token_spans`.
        answer: of :func:`mlx_fd.losses.answer.answer_span`; the reasoning is what stands before it,
            the whole text where it is ``None``.

    Returns:
        One weight for each token; their sum is the number of steps.
    """
    stop = len(text) if answer is None else answer[0]
    breaks = [index for index, char in enumerate(text) if char == "\n"]
    line = bisect_left(breaks, len(text) - len(text.lstrip()))
    lines = []
    for begin, end in spans:
        if word := text[begin:end].lstrip():
            line = bisect_left(breaks, end - len(word))
        lines.append(line if end <= stop else None)
    sizes = Counter(lines)
    return [0.0 if line is None else 1 / sizes[line] for line in lines]
