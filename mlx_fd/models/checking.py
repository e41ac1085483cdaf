"""A model that was just loaded, held against itself on twelve tokens.

What a model gives for a text read at once is the truth. The parts that were found of it must make
the same logits; so must the text read in two pieces; and what of it is read in a batch of ragged
texts must be what it is alone. mlx-lm's models keep to that but for a few: Gemma 2 mixes up rows
where a batch has as many as the model has key heads (mlx-lm issue 1903), some recurrences read the
padding, and some caches cannot be put together at all.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from mlx_fd.errors import UserError
from mlx_fd.models.attention_taps import log_attention
from mlx_fd.models.logit_transform import LinearLogits
from mlx_fd.models.view import View, product

_LENGTH = 12
# A batch with as many rows as there are key heads is tried too, up to this many.
_MAX_ROWS = 16
# How far logits may be from the true ones, relative to how far those are from their mean. Rounding
# makes at most 1e-5 of it in float32 and some percent in half precision, where a row of a batch may
# be off by some times what it is alone. One that reads its padding is off by 0.06 and more.
_FLOAT32, _HALF, _HALF_ROW = 1e-3, 0.2, 0.04
_ROUNDINGS = 4
# How far a gradient may be from that without recomputing, which is the same arithmetic.
_RECOMPUTED = 1e-2


@dataclass(frozen=True)
class Piece:
    """A part of the text, as one row of a batch: what was read, is read, and is written.

    Attributes:
        begin: tokens before it, which a cache holds.
        read: the prompt's end.
        end: the last token that is written.
    """

    begin: int
    read: int
    end: int


@dataclass(frozen=True)
class _Batches:
    """What is tried in batches: a text, how many rows of it, and how far each may be off."""

    text: Sequence[int]
    sizes: Sequence[int]
    limit: float


_FIRST_TURN = (Piece(2, 8, 9), Piece(0, 2, 3))
_SECOND_TURN = (Piece(9, 11, 12), Piece(3, 7, 8))


def check_model(view: View, vocab: int) -> tuple[View, bool]:
    """Hold a model against itself.

    Args:
        view: of the model, its weights in memory.
        vocab: tokens it has.

    Returns:
        The view, which reads texts one by one where a batch of them gives other hidden states; and
        whether a batch of conversations is written as each one alone would be.

    Raises:
        UserError: the model's logits are not what the view makes of its hidden states, or not the
            same in two pieces as at once.
    """
    text = [(37 * index + 11) % vocab for index in range(_LENGTH)]
    tokens = mx.array([text])
    truth = _normalised(view.model(tokens, cache=make_prompt_cache(view.model))[0])
    seen, logits = view.forward_with_logits(tokens)
    full = seen.final.dtype == mx.float32
    limit = _FLOAT32 if full else _HALF
    if _error(_normalised(logits[0]), truth) > limit:
        # Writing is always with a cache, so what is learned has to be of that.
        view = dataclasses.replace(view, needs_cache=True)
        seen, logits = view.forward_with_logits(tokens)
    made = (logits[0], _logits(view, seen.final[0]))
    if any(not _error(_normalised(rows), truth) <= limit for rows in made):
        raise UserError(
            "its logits are not what its head makes of its hidden states; the losses would be of "
            "another model: choose another one"
        )
    cache = make_prompt_cache(view.model)
    first = _FIRST_TURN[0]
    pieces = [view.model(mx.array([text[: first.begin]]), cache=cache)]
    mx.eval(pieces, [layer.state for layer in cache])
    history = copy.deepcopy(cache)
    # The rest of the prompt, and then token by token.
    cuts = range(first.read, first.end + 2)
    for begin, end in zip((first.begin, *cuts), cuts, strict=False):
        pieces.append(view.model(mx.array([text[begin:end]]), cache=cache))
    rounding = _error(_normalised(mx.concatenate(pieces, axis=1)[0]), truth[: first.end + 1])
    if not rounding <= limit:
        raise UserError(
            "it gives other logits where a text is read in pieces than where it is read at once, "
            "so its caches cannot be used: choose another model"
        )
    if not full:
        limit = min(limit, max(_HALF_ROW, _ROUNDINGS * rounding))
    batches = _Batches(text, sorted({2, *_key_heads(cache)}), limit)
    reads = _reads_batches(view, batches, seen.final)
    return dataclasses.replace(view, batched=reads), _writes_batches(
        view.model, batches, truth, history
    )


def check_recompute(view: View) -> None:
    """Make sure that recomputed activations give a student the gradient that kept ones give.

    Where a block leaves something for a later one beside what it returns, what is computed again
    does not reach it. (Blocks with caches between them are not run again: see :class:`View`.)

    Args:
        view: of the student, with what it trains.

    Raises:
        UserError: they do not.
    """
    tokens = mx.array([[(37 * index + 11) % view.rows for index in range(_LENGTH)]])

    def squares(recompute: bool) -> mx.array:
        return mx.square(view.forward(tokens, recompute=recompute).final.astype(mx.float32)).mean()

    def gradient(recompute: bool) -> mx.array:
        _, tree = nn.value_and_grad(view.model, lambda: squares(recompute))()
        return mx.concatenate([part.astype(mx.float32).flatten() for _, part in tree_flatten(tree)])

    kept = gradient(False)
    mx.eval(kept)
    try:
        error = mx.linalg.norm(gradient(True) - kept) / mx.linalg.norm(kept)
        fits = bool((error <= _RECOMPUTED).item())
    except Exception:  # whatever a model's own code does not do twice
        fits = False
    if not fits:
        raise UserError(
            "--grad-checkpoint would teach this student something else, since its blocks leave "
            "states to each other: leave it out"
        )


def check_attention(view: View) -> None:
    """Make sure that the attention weights of a model make what its own attention makes.

    Args:
        view: of the model, its weights in memory.

    Raises:
        UserError: they do not.
    """
    tokens = mx.array([[(37 * index + 11) % view.rows for index in range(_LENGTH)]])
    limit = _FLOAT32 if view.forward(tokens).final.dtype == mx.float32 else _HALF
    for calls in view.forward(tokens, attention=True).attention:
        for call in calls if len(calls) == 1 and not calls[0].sinks else ():
            fused = mx.fast.scaled_dot_product_attention(
                call.queries, call.keys, call.values, scale=call.scale, mask=call.mask
            )
            weights = mx.exp(log_attention(calls))
            values = mx.repeat(call.values, weights.shape[1] // call.values.shape[1], axis=1)
            if not _error(weights @ values.astype(mx.float32), fused) <= limit:
                raise UserError(
                    "its attention weights do not make what its own attention makes; leave "
                    "attention out of the losses"
                )


def _logits(view: View, final: mx.array) -> mx.array:
    head = view.head
    if isinstance(head, LinearLogits):
        return head.transform.apply(product(head.module)(final))
    return head.call(final)


def _normalised(logits: mx.array) -> mx.array:
    wide = logits.astype(mx.float32)
    return wide - mx.logsumexp(wide, axis=-1, keepdims=True)


def _error(made: mx.array, truth: mx.array) -> float:
    """How far the worst of some rows [n, k] is from the true one, relative to its spread."""
    made, truth = made.astype(mx.float32), truth.astype(mx.float32)
    # What a model rules out is at minus infinity in both.
    both = mx.isinf(truth) & (made == truth)
    made, truth = mx.where(both, 0.0, made), mx.where(both, 0.0, truth)
    error = mx.sqrt(((made - truth) ** 2).sum(axis=-1))
    size = mx.sqrt(((truth - truth.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1))
    # Where nothing is spread there is nothing to be off by, either.
    worst: Any = (error / mx.maximum(size, 1e-9)).max().item()
    return float(worst)


def _key_heads(cache: Sequence[Any]) -> set[int]:
    """Second dimensions of what caches hold: of keys and values, the number of key heads."""
    arrays: list[mx.array] = []

    def collect(state: Any) -> None:
        if isinstance(state, mx.array):
            arrays.append(state)
        elif isinstance(state, (list, tuple)):
            for part in state:
                collect(part)

    collect([layer.state for layer in cache])
    heads = {array.shape[1] for array in arrays if array.ndim == 4}
    return {count for count in heads if 2 < count <= _MAX_ROWS}


def _reads_batches(view: View, batches: _Batches, final: mx.array) -> bool:
    """Whether texts that are padded on the right, as in training, are read as each one alone."""
    lengths = (8, 3)
    padded = [[*batches.text[:length], *[0] * (lengths[0] - length)] for length in lengths]
    for size in batches.sizes:
        rows = [index % 2 for index in range(size)]
        try:
            states = view.forward(mx.array([padded[row] for row in rows])).final
            errors = [
                _error(states[at, : lengths[row]], final[0, : lengths[row]])
                for at, row in enumerate(rows)
            ]
        except Exception:  # whatever a model's own code does not do with a batch
            return False
        if not all(error <= batches.limit for error in errors):
            return False
    return True


def _writes_batches(
    model: nn.Module, batches: _Batches, truth: mx.array, history: Sequence[Any]
) -> bool:
    """Whether mlx-lm's batched generation gives the same as reading at once."""
    turns = (_FIRST_TURN, _SECOND_TURN)
    for size in batches.sizes:
        caches = [copy.deepcopy(history) if row % 2 == 0 else None for row in range(size)]
        # Caches that come out of a batch go into the next: once is enough.
        for turn in turns if size == batches.sizes[0] else turns[:1]:
            pieces = [turn[row % 2] for row in range(size)]
            try:
                logprobs, caches = _write(model, batches.text, pieces, caches)
                errors = [
                    _error(_normalised(made), truth[piece.read - 1 : piece.end - 1])
                    for made, piece in zip(logprobs, pieces, strict=True)
                ]
            except Exception:  # some caches cannot be merged, some masks not be broadcast
                return False
            if not all(error <= batches.limit for error in errors):
                return False
    return True


def _write(
    model: nn.Module, text: Sequence[int], pieces: Sequence[Piece], caches: Sequence[Any]
) -> tuple[list[mx.array], list[Any]]:
    """What a batch gives for each token that is written, [n, V] for each piece, and its caches."""
    generator = BatchGenerator(
        model, completion_batch_size=len(pieces), prefill_batch_size=len(pieces)
    )
    logprobs: dict[int, list[mx.array]] = {}
    kept: dict[int, Any] = {}
    try:
        uids = generator.insert(
            [list(text[piece.begin : piece.read]) for piece in pieces],
            max_tokens=[piece.end - piece.read for piece in pieces],
            caches=[cache or make_prompt_cache(model) for cache in caches],
            all_tokens=[list(text[: piece.begin]) for piece in pieces],
            samplers=[_writer(text[piece.read :]) for piece in pieces],
        )
        while responses := generator.next_generated():
            for response in responses:
                logprobs.setdefault(response.uid, []).append(response.logprobs)
                if response.finish_reason is not None:
                    kept[response.uid] = response.prompt_cache
    finally:
        generator.close()
    return [mx.stack(logprobs[uid]) for uid in uids], [kept[uid] for uid in uids]


def _writer(tokens: Sequence[int]) -> Callable[[mx.array], mx.array]:
    """Draws given tokens, one after the other, whatever is likely; the last is drawn for ever."""
    left = list(tokens)
    return lambda _: mx.array([left.pop(0) if len(left) > 1 else left[0]])
