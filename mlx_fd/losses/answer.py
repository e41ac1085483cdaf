"""Answer matching: how likely the student is to arrive at the expert's final answer.

For a solution y whose answer tokens are A::

    L = -log p_S(answer | question, reasoning) = - sum over t in A of log p_S(y_t | x, y_<t)

summed over samples and divided by their number: the surprise at the whole answer, so a number that
a tokenizer splits into five tokens weighs as much as one that is a single token. Where the
reasoning already states the result the student may copy it, and the loss is small from the start
(divide by its starting value with care); a text that is the answer alone leaves nothing to copy.

To give answer and reasoning a loss each, and to add them, is the multi-task objective of Hsieh et
al., "Distilling step-by-step" (arXiv 2305.02301), where label and rationale are two outputs; here
they are two parts of one text, and :mod:`mlx_fd.losses.reasoning` is for the other part. The
published code of the feedback method has no answer loss.

The sum is the engine's, :mod:`mlx_fd.losses.divergence`, with the weights that this module finds.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_fd.losses.spans import Span

_MARK = "####"


def answer_span(text: str, *, number: bool = True) -> Span | None:
    """The final answer's characters: the last #### that an answer follows, to the end of its line.

    Args:
        text: a solution, as it was generated (an end-of-turn token on that line belongs to it).
        number: whether answers are numbers: a digit must follow the mark then, maybe on the next
            line. Else anything does that is on the mark's own line.

    Returns:
        The half-open range, mark included; ``None`` where no mark has an answer.
    """
    behind = position = len(text)
    while (position := text.rfind(_MARK, 0, position)) >= 0:
        # From the next mark on this line has none: that was looked at already.
        after = text[position + len(_MARK) : behind]
        after = after if number else after.partition("\n")[0]
        rest = after.lstrip()
        line = rest.partition("\n")[0]
        if any(map(str.isdigit, line)) if number else line:
            begin = position + len(_MARK) + len(after) - len(rest)
            return position, begin + len(text[begin:].partition("\n")[0].rstrip())
        behind = position
    return None


def answer_mask(spans: Sequence[Span], answer: Span | None) -> list[bool]:
    """Which tokens write some of the answer.

    Args:
        spans: the characters that each of N tokens writes.
        answer: the characters of the final answer; ``None``: there is none.

    Returns:
        One truth value for each token; an empty span goes with the token before it.
    """
    mask: list[bool] = []
    for begin, end in spans:
        if begin == end:
            mask.append(bool(mask) and mask[-1])
        else:
            mask.append(answer is not None and begin < answer[1] and answer[0] < end)
    return mask
