"""Universal logit distance: compare next-token distributions over two different vocabularies.

Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for
LLMs" (arXiv 2402.12030). With all costs of transport equal, the Wasserstein distance of two
distributions is the L1 distance of their probabilities in order of size::

    L_t = sum over i of | p_(i) - q_(i) |      p_(1) >= p_(2) >= ..., the shorter padded with zeros

which lies in [0, 2]. It asks that the student be as sure as the expert, and as undecided between
as many tokens; not that it means the same tokens. So it goes with a loss that says which: in the
paper, the cross entropy.

When to use it: for a student of another family than the expert's, whose tokenizer differs. With
one tokenizer :mod:`mlx_fd.losses.divergence` says more.

Two tokenizers also cut a text into different numbers of tokens. As in the paper, position i of one
text is compared with position i of the other, and what is longer is left out: from the first word
that the two split differently, they are compared at different places of the text. Sounder is to
compare only where both have read the same characters: :func:`paired_positions` finds these places,
and rows taken there go into the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

Decode = Callable[[list[int]], str]


def uld_loss(
    student_logits: mx.array,
    teacher_logits: mx.array,
    student_mask: mx.array,
    teacher_mask: mx.array,
    *,
    temperature: float,
) -> tuple[mx.array, mx.array]:
    """Sum over the compared positions of the L1 distance of the sorted probabilities.

    Probabilities are softmax(logits / T), without a factor T^2, as published.

    Args:
        student_logits: [B, T_student, V_student], any float type, text on the left; cut padding
            rows of the vocabulary off first.
        teacher_logits: [B, T_teacher, V_teacher]; no gradient flows into them.
        student_mask: [B, T_student], 1 (true) where the position counts.
        teacher_mask: [B, T_teacher]; compared is what counts for both, up to the shorter.
        temperature: T, above 0.

    Returns:
        The sum and the number of compared positions, float32.
    """
    length = min(student_mask.shape[1], teacher_mask.shape[1])
    valid = student_mask[:, :length].astype(mx.bool_) & teacher_mask[:, :length].astype(mx.bool_)
    width = max(student_logits.shape[-1], teacher_logits.shape[-1])

    def ranked(logits: mx.array) -> mx.array:
        rows = mx.where(valid[..., None], logits[:, :length], 0).astype(mx.float32)
        p = mx.sort(mx.softmax(rows / temperature, axis=-1), axis=-1)
        return mx.pad(p, [(0, 0), (0, 0), (width - p.shape[-1], 0)])

    losses = mx.abs(ranked(student_logits) - ranked(mx.stop_gradient(teacher_logits))).sum(axis=-1)
    return mx.where(valid, losses, 0).sum(), valid.astype(mx.float32).sum()


def paired_positions(
    student_decode: Decode,
    student_tokens: Sequence[int],
    teacher_decode: Decode,
    teacher_tokens: Sequence[int],
) -> list[tuple[int, int]]:
    """The tokens before which both models have read the same characters of the same text.

    Args:
        student_decode: the student's tokens to text.
        student_tokens: the text.
        teacher_decode: the teacher's tokens to text.
        teacher_tokens: the same text.

    Returns:
        (student token, teacher token), by index, for each place where a token of both begins, in
        order: the rows of logits that predict them are to be compared.

    Raises:
        ValueError: the two are different texts.
    """
    text = student_decode(list(student_tokens))
    if teacher_decode(list(teacher_tokens)) != text:
        raise ValueError("the student's and the teacher's tokens are different texts")

    def begins(decode: Decode, tokens: Sequence[int]) -> dict[int, int]:
        read = [decode(list(tokens[:i])) for i in range(len(tokens))]
        # Half a character is no beginning. Of tokens at one place, all but the last write nothing.
        return {len(prefix): i for i, prefix in enumerate(read) if text.startswith(prefix)}

    student, teacher = (
        begins(student_decode, student_tokens),
        begins(teacher_decode, teacher_tokens),
    )
    return [(i, teacher[place]) for place, i in student.items() if place in teacher]
