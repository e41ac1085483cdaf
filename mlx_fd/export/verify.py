"""An export against the model that it was made from: logits on one chat through all roles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mlx_fd.errors import UserError
from mlx_fd.export.logits import log_softmax, next_token_logits
from mlx_fd.models.generation import first_prompt, followup_prompt
from mlx_fd.problems import prompts

if TYPE_CHECKING:
    from mlx_fd.models.loading import Loaded

Logits = NDArray[np.float32]

_QUESTION = (
    "Mia has 12 apples. Then she buys 3 bags with 4 apples each. How many apples does Mia have now?"
)
_SOLUTION = "3 * 4 = 12\n12 + 12 = 24\n#### 24"
_FEEDBACK = "Step 1 should be 3 * 4 = 12, it is 3 * 4 = 12: right."
# An export that is this share of the way from the student back to its base has lost the adapter.
_LOST = 0.5
_WORRYING = 0.1
# As much comes of sums in another order, in float32.
_NOISE = 1e-9
# Above this mean KL another precision is another model.
_OTHER_MODEL = 0.01


@dataclass(frozen=True)
class Agreement:
    """How near one model's logits are to another's.

    Attributes:
        positions: tokens that were predicted.
        largest_difference: of any two logits.
        mean_kl: mean over positions of KL(reference || other), in nats.
        worst_kl: its largest.
        top1: share of positions at which both find the same token likeliest.
    """

    positions: int
    largest_difference: float
    mean_kl: float
    worst_kl: float
    top1: float


def role_chat(loaded: Loaded) -> tuple[int, ...]:
    """Tokens of one chat in which every role has its say.

    Raises:
        UserError: the model has no chat template, or none for a chat of several turns.
    """
    feedback = prompts.Feedback(_FEEDBACK, 1.0)
    replies = (
        (prompts.feedback_prompt(), prompts.format_feedback(feedback)),
        (prompts.merge_prompt(feedback, feedback), _FEEDBACK),
        (prompts.revise_prompt(""), _SOLUTION),
        (prompts.critique_prompt(), _FEEDBACK),
        (prompts.final_prompt(), _SOLUTION),
    )

    def encode_reply(text: str) -> tuple[int, ...]:
        return tuple(loaded.tokenizer.encode(text, add_special_tokens=False))

    tokens = (*first_prompt(loaded, prompts.answer_prompt(_QUESTION)), *encode_reply(_SOLUTION))
    for message, reply in replies:
        tokens = (*tokens, *followup_prompt(loaded, message), *encode_reply(reply))
    return tokens


def logits_of(loaded: Loaded, tokens: tuple[int, ...]) -> Logits:
    """Logits [len(tokens) - 1, vocab] of a model on a chat."""
    return next_token_logits(loaded.model, tokens, 0, loaded.vocab)


def agreement(reference: Logits, other: Logits) -> Agreement:
    """Compare two models' logits [T, V] on the same tokens.

    Raises:
        UserError: the other's are not finite, or are of another vocabulary.
    """
    if other.shape[1] < reference.shape[1]:
        raise UserError(
            f"what was written has a vocabulary of {other.shape[1]} tokens, and the model "
            f"{reference.shape[1]}: it is another model"
        )
    other = other[:, : reference.shape[1]]
    if not np.isfinite(other).all():
        raise UserError(
            "what was written gives logits that are not finite: its weights do not fit into their "
            "type; choose another one (--dtype bfloat16 or float32, --gguf-type bf16 or f32)"
        )
    log_p, log_q = log_softmax(reference), log_softmax(other)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return Agreement(
        positions=len(reference),
        largest_difference=float(np.abs(reference - other).max()),
        # A sum of rounded terms may fall below 0, which a KL never is.
        mean_kl=max(0.0, float(divergence.mean())),
        worst_kl=max(0.0, float(divergence.max())),
        top1=float((reference.argmax(-1) == other.argmax(-1)).mean()),
    )


def check_precision(written: Agreement) -> str | None:
    """A warning, where the type that the weights were written in changes what the model says."""
    if written.mean_kl <= _OTHER_MODEL:
        return None
    return (
        f"in this type the model is another one: mean KL {written.mean_kl:.3g}, and "
        f"{written.top1:.1%} of the likeliest tokens are the same; a wider type keeps it"
    )


def check_adapter_kept(written: Agreement, base: Agreement) -> str | None:
    """Whether weights that were rounded again still hold what the student had learned.

    Args:
        written: the student against what was written.
        base: the student against its base, without the adapter.

    Returns:
        A warning, where rounding undoes a good part of the adapter.

    Raises:
        UserError: the adapter is lost.
    """
    if base.mean_kl == 0 or written.mean_kl <= _NOISE:
        return None
    share = written.mean_kl / base.mean_kl
    compared = f"{share:.0%} of that" if share < 1 else f"{share:.3g} times as far"
    message = (
        f"the adapter moved the model by a mean KL of {base.mean_kl:.3g}, and writing it in these "
        f"bits moves it by {written.mean_kl:.3g} ({compared})"
    )
    if share >= _LOST:
        raise UserError(
            f"{message}: most of what the student learned would be lost. Nothing was written. Take "
            "more bits; --dtype float32, or --gguf-type f32, keeps all of it."
        )
    return f"{message}; a wider type keeps more of it" if share >= _WORRYING else None
