"""How much memory a run needs, asked of the models and of MLX before a weight is read.

Weights are those that mlx-lm's class has, caches those that its cache objects hold, activations
those of the graphs that a run computes (:mod:`.tracing`). What is left to count here is which of
them are there at the same time. ``scripts/bench_memory.py`` compares the sum with real runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from mlx_fd.errors import UserError
from mlx_fd.models.backend import backend
from mlx_fd.models.device_memory import available_memory
from mlx_fd.models.outline import (
    CACHE_STEP,
    cache_bytes,
    filled_caches,
    logit_rows,
    weight_bytes,
)
from mlx_fd.models.outline import hidden_width as width
from mlx_fd.models.tracing import Traced, grows_with_length, trace, trace_by_length
from mlx_fd.models.view import block_attention, block_states

# Bytes that the logits and what is made of them may take at a time in the losses.
LOGIT_BUDGET = 512 << 20
# Tokens of whole conversations that are read side by side.
_READ_AT_ONCE = 8192
_GIB = 1 << 30
# Where the attention loss is in use, of each head, text token and key.
_KEPT_ATTENTION = 4
# Float32 [tokens, vocabulary] that the losses take at a time, within the budget, and those of the
# few rows that stay in a CPU's cache.
_LOGIT_ARRAYS, _CPU_LOGIT_ARRAYS = 6, 4
_CACHED_ARRAYS, _CACHED_BYTES = 16, 32 << 20
# Of what is generated, for each conversation.
_DRAWN_ARRAYS = 4
# With so many own solutions of a problem no more is written side by side than feedback is.
_AS_JUDGED = 2
# Of what trains: the weight and AdamW's two moments stay; a step has the gradient and the clipped
# one beside them, and a batch in parts the sum so far.
_KEPT_OF_TRAINED, _STEP_OF_TRAINED = 2, 2
# Where the graph of a gradient cannot be gone through: what it needs of all that is made on the way
# forth; 0.49 to 0.56 where it can.
_KEPT_OF_MADE = 0.75
# With recomputed activations: blocks that are there as a whole, and copies of what blocks gave
# (itself, for the next one, and its gradient). 1.9 to 2.8, and 3.0, were measured.
_BLOCKS_RECOMPUTED, _COPIES_RECOMPUTED = 2.9, 3
_SHORTEST = 8
# What no graph shows: arrays of one number, samples, buffers of the device.
_MARGIN = 1.12
_SLACK = 4 << 20


@dataclass(frozen=True)
class Workload:
    """What decides the memory of a run, beside the models.

    Attributes:
        batch_size: conversations at once.
        micro_batch: samples of a distillation step at once; 0: nothing is learned.
        prompt_tokens: of the problem and the request for feedback, which both models read.
        later_tokens: of the requests that only the expert reads after them.
        request_tokens: of the longest of those.
        max_answer_tokens: most tokens of an answer.
        max_feedback_tokens: most tokens of a feedback.
        solutions: answers are learned from, too.
        grad_checkpoint: activations are recomputed.
        shared: the student's base weights are the expert's arrays.
        attention: the attention loss is in use.
        head_by_head: it compares head by head, not the means over heads.
        remembered: earlier samples that are kept to learn from again.
        own_solutions: of each problem that the student judges; all but one are drawn side by side.
        question_tokens: of the problem alone, which they are written after.
        overlaps: the next batch is begun before the end of one.
    """

    batch_size: int
    micro_batch: int
    prompt_tokens: int
    max_answer_tokens: int
    max_feedback_tokens: int
    later_tokens: int = 0
    request_tokens: int = 0
    grad_checkpoint: bool = False
    shared: bool = False
    solutions: bool = False
    attention: bool = False
    head_by_head: bool = False
    remembered: int = 0
    own_solutions: int = 0
    question_tokens: int = 0
    overlaps: bool = False

    @property
    def student_tokens(self) -> int:
        """Of the longest conversation that the student reads: an answer and a feedback on it."""
        return self.prompt_tokens + self.max_answer_tokens + self.max_feedback_tokens

    @property
    def expert_tokens(self) -> int:
        """Of the expert's: three answers, and texts of a feedback's length between them."""
        written = 2 * self.max_answer_tokens + 2 * self.max_feedback_tokens
        return self.student_tokens + self.later_tokens + written

    @property
    def text_tokens(self) -> int:
        """Of the longest text that is learned from."""
        answer = self.max_answer_tokens if self.solutions else 0
        return max(self.max_feedback_tokens, answer)


@dataclass(frozen=True)
class Memory:
    """An estimate in bytes.

    Attributes:
        parts: what the memory is for -> bytes, in the part of the run that needs most.
        total: their sum.
        note: what the user should know of the estimate; empty: nothing.
    """

    parts: dict[str, int]
    total: int
    note: str = ""


class Needs:
    """What two models need for some work, in batches of any size.

    The graphs are gone through when they are first asked for, and once.
    """

    def __init__(self, expert: nn.Module, student: nn.Module, work: Workload):
        """Ask the models for their weights; for the rest they are asked later.

        Args:
            expert: a model whose weights may be on the disk still, or nowhere.
            student: likewise, with what trains (LoRA) on it.
            work: the lengths; its batch sizes are where the estimate is exact.
        """
        self._expert, self._student, self._work = expert, student, work
        self._trained = sum(a.nbytes for _, a in tree_flatten(student.trainable_parameters()))
        aligned = 4 * width(student) * (width(expert) + 1)
        self._fixed = {
            "expert weights": weight_bytes(expert),
            "student weights": 0 if work.shared else weight_bytes(student) - self._trained,
            "trained weights": self._trained + aligned,
        }
        if work.micro_batch:
            self._trained += aligned
            self._fixed["optimizer"] = _KEPT_OF_TRAINED * self._trained
        if work.micro_batch and work.remembered:
            kept = self._said(work.remembered) + self._maps(work.remembered)
            self._fixed["earlier samples"] = 4 * kept
        self._row = 4 * max(logit_rows(expert), logit_rows(student))

    def at(self, batch: int, micro: int) -> Memory:
        """The estimate for batches of ``batch`` conversations, learned ``micro`` at a time."""
        phases = [self._answering(batch), self._judging(batch)]
        if self._work.own_solutions > _AS_JUDGED:
            phases.append(self._solving(batch))
        if self._work.overlaps:
            waiting = batch * self._expert_cache.exact(self._work.student_tokens)
            phases = [{**parts, "KV caches": parts["KV caches"] + waiting} for parts in phases]
        if self._work.micro_batch:
            phases.append(self._learning(batch, micro))
        most = max(phases, key=lambda parts: sum(parts.values()))
        most = {name: int(_MARGIN * size) for name, size in most.items()}
        parts = {**self._fixed, **most}
        parts["activations"] += _SLACK
        return Memory(parts, sum(parts.values()))

    def without_activations(self, batch: int) -> Memory:
        """What can be told of models whose computation MLX cannot describe."""
        parts = {
            **self._fixed,
            "KV caches": batch * self._expert_cache.exact(self._work.expert_tokens),
            "logits": _DRAWN_ARRAYS * batch * self._row,
        }
        total = sum(parts.values())
        note = (
            f"{total / _GIB:.1f} GiB are needed for weights and caches; how much more the "
            "activations need cannot be told of these models, so take a smaller --batch-size "
            "where memory runs out"
        )
        return Memory(parts, total, note)

    def _answering(self, batch: int) -> dict[str, int]:
        """The expert's turns: what they go on from, what is written, and what is kept of it."""
        work, cached = self._work, self._expert_cache
        last = work.expert_tokens
        before = last - work.max_answer_tokens
        drawn = _DRAWN_ARRAYS * batch * self._row
        first = {
            "KV caches": batch * cached.written(work.prompt_tokens + work.max_answer_tokens),
            "activations": max(self._expert_reads(batch), self._expert_text),
            "logits": drawn,
        }
        # The last turn's prompt is read, while what it goes on from is still there; or the caches
        # of the one before it are taken out of the batch's. What the feedback ended with is there.
        judged = cached.exact(work.student_tokens)
        reading = {
            "KV caches": batch * (cached.written(last) + cached.exact(before) + judged),
            "activations": self._expert_goes_on(batch),
            "logits": drawn,
        }
        keeping = {
            "KV caches": batch * (cached.written(before) + 2 * cached.exact(before) + judged),
            "activations": 0,
            "logits": drawn,
        }
        return max(first, reading, keeping, key=lambda parts: sum(parts.values()))

    def _judging(self, batch: int) -> dict[str, int]:
        """The student's feedback, while the expert's conversations wait."""
        work, student = self._work, self._student_cache
        answered = self._expert_cache.exact(work.student_tokens)
        tokens = work.student_tokens
        return {
            "KV caches": batch * (student.written(tokens) + student.exact(tokens) + answered),
            "activations": self._student_reads(min(batch, read_at_once(tokens))),
            "logits": _DRAWN_ARRAYS * batch * self._row,
        }

    def _solving(self, batch: int) -> dict[str, int]:
        """The student's own solutions, while the conversations wait in which it judged."""
        work, student = self._work, self._student_cache
        drawn = batch * (work.own_solutions - 1)  # the greedy ones were before
        waiting = student.exact(work.student_tokens) + self._expert_cache.exact(work.student_tokens)
        logits = _DRAWN_ARRAYS * drawn * self._row
        prompts = drawn * work.question_tokens
        reading = {
            "KV caches": drawn * student.exact(work.question_tokens) + batch * waiting,
            "activations": self._student_reads(-(-prompts // work.student_tokens)),
            "logits": logits,
        }
        written = student.written(work.question_tokens + work.max_answer_tokens)
        writing = {
            "KV caches": drawn * written + batch * waiting,
            "activations": 0,
            "logits": logits,
        }
        return max(reading, writing, key=lambda parts: sum(parts.values()))

    def _learning(self, batch: int, micro: int) -> dict[str, int]:
        """A distillation step, while the expert's conversations may still be there."""
        work = self._work
        rows = micro * work.text_tokens * self._row
        arrays = _CPU_LOGIT_ARRAYS if backend().on_cpu else _LOGIT_ARRAYS
        logits = min(rows * arrays, LOGIT_BUDGET)
        logits += min(rows * _CACHED_ARRAYS, _CACHED_BYTES)
        # Logits are there when all that is kept of the way forth is, and the way back is not.
        kept, peak = self._learns(micro)
        logits = max(0, kept + logits - peak)
        activations = max(peak, _STEP_OF_TRAINED * self._trained)
        activations += self._trained  # the gradients of the samples before
        parts = {
            "KV caches": batch * self._expert_cache.exact(work.student_tokens),
            "activations": activations + 4 * self._said(batch),
            "logits": logits,
        }
        if work.attention:
            parts["attention"] = self._attention(batch, micro)
        return parts

    def _said(self, samples: int) -> int:
        """Numbers, float32 at most, of what the expert said of some samples."""
        places = self._work.text_tokens + len(self._student.layers) + 1
        return samples * places * width(self._expert)

    def _maps(self, samples: int) -> int:
        """Numbers of the expert's attention on some samples: of the heads that are compared."""
        work = self._work
        if not work.attention:
            return 0
        heads = _heads(self._student) if work.head_by_head else 1
        places = work.text_tokens * work.student_tokens
        return samples * heads * len(self._student.layers) * places

    def _attention(self, batch: int, micro: int) -> int:
        """Of each sample the expert's, too, while the batch lasts: the heads that are compared."""
        work, heads = self._work, _heads(self._student)
        maps = micro * heads * _KEPT_ATTENTION
        maps += 2 * batch * (heads if work.head_by_head else 1)
        blocks = len(self._student.layers)
        return 4 * blocks * maps * work.text_tokens * work.student_tokens

    # ------------------------------------------------------------------------------------ measured

    @cached_property
    def _expert_cache(self) -> _Cache:
        return _Cache(self._expert)

    @cached_property
    def _student_cache(self) -> _Cache:
        return _Cache(self._student)

    @cached_property
    def _expert_grows(self) -> bool:
        return grows_with_length(lambda n: _prefill(self._expert, 1, n))

    @cached_property
    def _student_grows(self) -> bool:
        return grows_with_length(lambda n: _prefill(self._student, 1, n))

    @cached_property
    def _expert_reads(self) -> Callable[[int], int]:
        work = self._work

        def read(count: int) -> Traced:
            prompts = partial(_prefill, self._expert, count)
            return trace_by_length(prompts, work.prompt_tokens, grows=self._expert_grows)

        return _by_batch(lambda count: read(count).peak, work.batch_size)

    @cached_property
    def _expert_goes_on(self) -> Callable[[int], int]:
        work = self._work
        request = max(1, work.request_tokens)
        before = work.expert_tokens - work.max_answer_tokens - request

        def read(count: int) -> Traced:
            return _prefill(self._expert, count, request, before)

        if self._expert_grows:  # a request is short beside the first prompt
            return self._expert_reads
        return _by_batch(lambda count: read(count).peak, work.batch_size)

    @cached_property
    def _student_reads(self) -> Callable[[int], int]:
        work = self._work

        def read(count: int) -> Traced:
            conversations = partial(_prefill, self._student, count)
            return trace_by_length(conversations, work.student_tokens, grows=self._student_grows)

        most = min(work.batch_size, read_at_once(work.student_tokens))
        return _by_batch(lambda count: read(count).peak, most)

    @cached_property
    def _expert_text(self) -> int:
        """Of reading one text, with every block's hidden states."""
        text = partial(_reading, self._expert)
        return trace_by_length(text, self._work.student_tokens, grows=self._expert_grows).peak

    @cached_property
    def _learns(self) -> Callable[[int], tuple[int, int]]:
        """What is kept of the way forth, and the peak, by the number of samples."""
        work = self._work

        @cache
        def learn(count: int) -> Traced:
            way = (self._student, count, work.student_tokens)
            if work.grad_checkpoint:
                return _recomputed(*way, grows=self._student_grows)
            return _distillation(*way, grows=self._student_grows)

        kept = _by_batch(lambda count: learn(count).first, work.micro_batch)
        peak = _by_batch(lambda count: learn(count).peak, work.micro_batch)
        return lambda count: (kept(count), peak(count))


class _Cache:
    """Bytes of one conversation's prompt cache."""

    def __init__(self, model: nn.Module):
        self.stored = cache(partial(cache_bytes, model))

    def written(self, tokens: int) -> int:
        """Of a batch that is written: it has room for up to a step more."""
        return self.exact(tokens + CACHE_STEP)

    def exact(self, tokens: int) -> int:
        """Without room for more tokens."""
        step = self.stored(CACHE_STEP + 1) - self.stored(1)
        states = self.stored(1) - step
        return min(self.stored(tokens), states + step * tokens // CACHE_STEP)


def read_at_once(tokens: int) -> int:
    """How many whole conversations of so many tokens are read side by side."""
    return max(1, _READ_AT_ONCE // tokens)


def _by_batch(size_of: Callable[[int], int], asked: int) -> Callable[[int], int]:
    """A size by the number of sequences: exact for as many as are asked for, and for one."""
    found = cache(size_of)

    def peak(count: int) -> int:
        if asked in (count, 1):
            return int(found(asked) * count / asked)
        return int(found(1) + (found(asked) - found(1)) * (count - 1) / (asked - 1))

    return peak


def _tokens(count: int, length: int) -> mx.array:
    return mx.zeros((count, length), dtype=mx.int32)


def _prefill(model: nn.Module, count: int, length: int, before: int = 0) -> Traced:
    """Reading prompts; the caches, which are counted elsewhere, are not in the peak."""

    def run(tokens: mx.array) -> object:
        caches = filled_caches(model, count, before)
        model(tokens, cache=caches)
        return [cache.state for cache in caches if cache is not None]

    traced = trace(model, run, _tokens(count, length))
    return dataclasses.replace(traced, peak=traced.peak - traced.kept)


def _reading(model: nn.Module, length: int) -> Traced:
    """Reading one text after its prompt, with the hidden states of every block."""

    def run(tokens: mx.array) -> object:
        layers = block_states(model, tokens)
        return layers[-1], [layer.mean(axis=1) for layer in layers]

    return trace(model, run, _tokens(1, length))


def _distillation(model: nn.Module, count: int, length: int, *, grows: bool) -> Traced:
    """Samples forth and back, the losses aside."""

    def loss(tokens: mx.array) -> mx.array:
        layers = block_states(model, tokens)
        pooled = sum((layer.astype(mx.float32).mean() for layer in layers), mx.array(0.0))
        return layers[-1].astype(mx.float32).sum() + pooled

    def learn(tokens: mx.array) -> object:
        return nn.value_and_grad(model, loss)(tokens)

    def read(tokens: mx.array) -> object:
        return block_states(model, tokens)[-1]

    def by_length(run: Callable[[mx.array], object]) -> Traced:
        return trace_by_length(lambda n: trace(model, run, _tokens(count, n)), length, grows=grows)

    model.train()
    try:
        return by_length(learn)
    except ValueError:  # MLX cannot describe the gradient of a mixture's expert weights
        found = by_length(read)
    finally:
        model.eval()
    kept = sum(a.nbytes for _, a in tree_flatten(model.trainable_parameters()))
    peak = int(_KEPT_OF_MADE * found.made)
    return dataclasses.replace(found, peak=peak + kept, kept=kept, first=peak)


def _recomputed(model: nn.Module, count: int, length: int, *, grows: bool) -> Traced:
    """The same with recomputed activations, which MLX cannot describe.

    Some blocks are there as a whole; of the others, what they gave.
    """
    found = _distillation(model, count, length, grows=grows)
    layers = block_states(model, _tokens(count, min(length, _SHORTEST)))
    given = sum(layer.nbytes for layer in layers) * length // min(length, _SHORTEST)
    whole = min(1.0, _BLOCKS_RECOMPUTED / max(1, len(layers) - 1))
    peak = int(whole * found.peak) + _COPIES_RECOMPUTED * given
    return dataclasses.replace(found, peak=min(found.peak, peak), first=min(found.first, given))


def _heads(model: nn.Module) -> int:
    """The most heads that a block has."""
    return max(call.queries.shape[1] for calls in block_attention(model) for call in calls)


def estimate(expert: nn.Module, student: nn.Module, work: Workload) -> Memory:
    """Most memory that a run needs.

    Args:
        expert: the expert; its weights may be on the disk still, or nowhere
            (:func:`mlx_fd.models.outline.build`).
        student: the student, with what trains on it.
        work: batch sizes and lengths.

    Returns:
        Weights, and what the hungriest part of the run needs beside them: KV caches, activations,
        logits, and the optimiser's state.
    """
    return Needs(expert, student, work).at(work.batch_size, work.micro_batch)


def largest_batch(needs: Needs, work: Workload, available: int) -> tuple[int, int] | None:
    """The largest batch sizes, up to those asked for, that fit.

    Args:
        needs: of the two models.
        work: what is asked for.
        available: bytes that the run may take.

    Returns:
        The largest batch size, and for it the largest micro-batch (from halving); ``None`` where
        not even one conversation fits.
    """
    best: tuple[int, int] | None = None
    micro = work.micro_batch
    while True:
        low, high = 0, work.batch_size
        while low < high:
            middle = (low + high + 1) // 2
            if needs.at(middle, micro).total <= available:
                low = middle
            else:
                high = middle - 1
        if low > (best[0] if best else 0):
            best = low, micro
        micro //= 2
        if not micro:
            return best


def check_memory(
    expert: nn.Module, student: nn.Module, work: Workload, available: int | None = None
) -> Memory:
    """Make sure that a run fits before anything is loaded.

    Args:
        expert: as :func:`estimate` takes it.
        student: likewise.
        work: what is asked for.
        available: bytes; ``None`` asks :func:`mlx_fd.models.device_memory.available_memory`.

    Returns:
        The estimate.

    Raises:
        UserError: it does not fit; the message says what is needed and what would fit.
    """
    if available is None:
        available = available_memory()
    needs = Needs(expert, student, work)
    smaller = None
    try:
        memory = needs.at(work.batch_size, work.micro_batch)
        if memory.total > available:
            smaller = largest_batch(needs, work, available)
    except ValueError:
        memory = needs.without_activations(work.batch_size)
    if memory.total <= available:
        return memory
    largest = sorted(memory.parts.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in largest)
    message = (
        f"this run needs up to {memory.total / _GIB:.1f} GiB ({shares}) "
        f"and {available / _GIB:.1f} GiB are free."
    )
    if smaller is not None and work.micro_batch:
        raise UserError(
            f"{message} It fits with --batch-size {smaller[0]} --micro-batch {smaller[1]}."
        )
    if not work.micro_batch:
        raise UserError(f"{message} Take a 4-bit form of a model, or a smaller one.")
    raise UserError(
        f"{message} No batch size makes it fit: try --preset 16gb, shorter --max-answer-tokens and "
        "--max-feedback-tokens, --grad-checkpoint, a 4-bit expert, or a smaller expert."
    )
