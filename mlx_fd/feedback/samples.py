"""What the student learns from: a text, and what the expert has to say about each of its tokens.

Both models read the same prompt and the same text (true teacher forcing). The expert reads it once;
what it says is kept with the text, for as many looks at the student as there are to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_fd.config import LossOptions
from mlx_fd.feedback.episode import Judged, student_prompt
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.teacher_cache import TeacherCache
from mlx_fd.losses.answer import answer_mask, answer_span, token_spans
from mlx_fd.losses.attention import head_mean
from mlx_fd.losses.divergence import TopK, teacher_top_k
from mlx_fd.losses.graph import pool
from mlx_fd.losses.hidden import aligned_layers
from mlx_fd.losses.reasoning import step_weights
from mlx_fd.models.attention_taps import attention_heads, log_attention
from mlx_fd.models.backend import backend
from mlx_fd.models.fingerprint import content_hash
from mlx_fd.models.generation import (
    Conversation,
    first_prompt,
    forward_with_cache,
    rewind_to,
    with_thought,
)
from mlx_fd.problems import Problem, prompts
from mlx_fd.problems.kinds import form_of
from mlx_fd.runs.records import SampleRow


@dataclass(frozen=True)
class TeacherOutputs:
    """What the expert has to say about a text of T tokens that it read after a prompt.

    Attributes:
        targets: where it predicts the tokens: its final hidden states [T, d_expert], or its k
            likeliest tokens.
        pooled: for each aligned student layer, the expert's mean hidden state [d_expert].
        attention: where it is matched, for each aligned student block the logarithm of the
            expert's attention [heads, T, S] from where it predicts the tokens to all S places.
    """

    targets: mx.array | TopK
    pooled: tuple[mx.array, ...]
    attention: tuple[mx.array, ...] = ()

    def arrays(self) -> dict[str, mx.array]:
        """Everything by its name, to be kept."""
        arrays = {"expects": self.targets} if isinstance(self.targets, mx.array) else {}
        if isinstance(self.targets, TopK):
            arrays |= {f"top_k.{name}": array for name, array in vars(self.targets).items()}
        for kind, layers in (("pooled", self.pooled), ("attention", self.attention)):
            arrays |= {f"{kind}.{index}": layer for index, layer in enumerate(layers)}
        return arrays

    @classmethod
    def of(cls, arrays: Mapping[str, mx.array]) -> TeacherOutputs:
        """What :meth:`arrays` gave.

        Raises:
            KeyError: something is missing.
        """

        def layers(kind: str) -> tuple[mx.array, ...]:
            count = sum(name.startswith(f"{kind}.") for name in arrays)
            return tuple(arrays[f"{kind}.{index}"] for index in range(count))

        if "expects" in arrays:
            return cls(arrays["expects"], layers("pooled"), layers("attention"))
        names = [field.name for field in fields(TopK)]
        top_k = TopK(**{name: arrays[f"top_k.{name}"] for name in names})
        return cls(top_k, layers("pooled"), layers("attention"))


@dataclass(frozen=True)
class Sample:
    """One feedback, or one solution, to learn from.

    Attributes:
        prompt: tokens of the conversation up to where the text begins.
        target: the T tokens of the text.
        expert: what the expert has to say about them.
        expert_score: in [-1, 1]; ``None`` where it could not be read, and then no loss sees it.
        on_policy: whether ``target`` is the student's own feedback; the language-model loss then
            leaves it out.
        answer: for each token of a solution, whether it writes some of the final answer.
        steps: for each token of a solution, what it counts in its step of the reasoning.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    expert: TeacherOutputs
    expert_score: float | None
    on_policy: bool = False
    answer: tuple[bool, ...] = ()
    steps: tuple[float, ...] = ()

    def to_json(self) -> SampleRow:
        """All but what the expert says."""
        return {
            "prompt": list(self.prompt),
            "target": list(self.target),
            "expert_score": self.expert_score,
            "on_policy": self.on_policy,
            "answer": list(self.answer),
            "steps": list(self.steps),
        }

    @classmethod
    def from_json(cls, value: SampleRow, expert: TeacherOutputs) -> Sample:
        """What :meth:`to_json` gave, also after a trip through JSON text.

        Raises:
            KeyError: something is missing.
        """
        return cls(
            tuple(value["prompt"]),
            tuple(value["target"]),
            expert,
            value["expert_score"],
            value["on_policy"],
            tuple(value["answer"]),
            tuple(value["steps"]),
        )


@dataclass(frozen=True)
class Batch:
    """Samples side by side, padded on the right to S tokens and T positions of the texts.

    What belongs to a token of a text is not padded: it is for the N tokens of all texts in a row.
    """

    tokens: mx.array  # [B, S]
    positions: mx.array  # [B, T]: where each token of the text is predicted
    mask: mx.array  # [B, T], float32
    rows: mx.array  # [N]: the indices of all tokens among B * T positions
    targets: mx.array  # [N]
    weights: dict[str, mx.array]  # [N]: of a loss on tokens, what each counts
    counts: dict[str, float]  # what each loss is divided by
    expert_expects: mx.array | TopK  # [N, d_expert], or the top k of N
    expert_pooled: list[mx.array]  # of [B, d_expert]
    expert_attention: list[mx.array]  # of [B, heads, T, S]
    scores: mx.array  # [B]
    score_mask: mx.array  # [B], float32


def read_text(
    pair: Pair,
    before: Conversation,
    prompt: tuple[int, ...],
    target: tuple[int, ...],
    options: LossOptions,
    cache: TeacherCache | None = None,
) -> TeacherOutputs:
    """Let the expert read a text, if it has not read it already.

    Args:
        pair: only the expert reads; the student says how many layers and heads it needs.
        before: a conversation that ``prompt`` begins with, without its last token at least.
        prompt: all tokens before the text.
        target: tokens of the text, at least one.
        options: what of the expert is wanted.
        cache: where what the expert says is kept, and looked up; the expert then reads all of the
            prompt again, so that its bits depend on the tokens alone.
    """
    if cache is None:
        reading = _read(pair, before, prompt, target, options)
        mx.eval(reading.arrays())
        return reading
    if (cached := cache.load(prompt, target)) is not None:
        return TeacherOutputs.of(cached)
    # What a conversation's keys and values are in their last digits depends on the batch that it
    # was generated in, and an entry must not.
    reading = _read(pair, Conversation(), prompt, target, options)
    cache.save(prompt, target, reading.arrays())
    return reading


def _read(
    pair: Pair,
    before: Conversation,
    prompt: tuple[int, ...],
    target: tuple[int, ...],
    options: LossOptions,
) -> TeacherOutputs:
    expert, student = pair.expert.view, pair.student.view
    rest = prompt[len(before.tokens) :]
    seen, caches = forward_with_cache(pair.expert, before, [*rest, *target[:-1]])
    first = len(rest) - 1  # where the target's first token is predicted
    mask = mx.ones((1, len(target)))
    states = _aligned(len(student.blocks) + 1, len(seen.layers), options)
    pooled = tuple(pool(seen.layers[index][:, first:], mask)[0] for index in states)
    final = seen.final[0, first:]
    targets: mx.array | TopK = final
    if options.teacher_top_k:
        targets = teacher_top_k(
            final,
            expert.head,
            k=options.teacher_top_k,
            temperature=options.loss_temperature,
            vocab=pair.vocab,
        )
    if not options.needs_attention:
        return TeacherOutputs(targets, pooled)
    positions = mx.arange(first, seen.final.shape[1])[None]

    def attention(index: int) -> mx.array:
        block, hidden = expert.blocks[index], seen.layers[index]
        return log_attention(block, hidden, positions=positions, cache=caches[index])[0]

    heads = attention_heads(student.blocks[0])
    blocks = _aligned(len(student.blocks), len(expert.blocks), options)
    return TeacherOutputs(
        targets,
        pooled,
        tuple(_compared_heads(attention(index), heads, options) for index in blocks),
    )


def cache_fingerprint(pair: Pair, options: LossOptions) -> dict[str, Any]:
    """All that a :class:`TeacherOutputs` depends on beside the tokens.

    The expert, what is kept, and what its last digits come from.
    """
    student, here = pair.student.view, backend()
    modules = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    return {
        "backend": [here.device, here.blas, version("mlx")],
        "expert": content_hash(pair.expert.path),
        "dtype": str(pair.expert.dtype),
        "quantized": any(isinstance(part, modules) for part in pair.expert.model.modules()),
        "vocab": pair.vocab,
        "top_k": options.teacher_top_k,
        "temperature": options.loss_temperature,
        "layers": [options.hidden_layers, len(student.blocks)],
        "heads": [options.attention_heads, attention_heads(student.blocks[0])]
        if options.needs_attention
        else None,
    }


def _aligned(n_student: int, n_expert: int, options: LossOptions) -> list[int]:
    """The expert's layers that go with the student's aligned ones."""
    if options.hidden_layers == "last":
        return [n_expert - 1]
    return aligned_layers(n_student, n_expert)


def _compared_heads(log_attention: mx.array, n_student: int, options: LossOptions) -> mx.array:
    """Of the expert's heads [H, T, S], their mean, or those that go with the student's."""
    if options.attention_heads == "mean":
        return head_mean(log_attention[None])[0]
    return log_attention[mx.array(aligned_layers(n_student, log_attention.shape[0]))]


def sample_of(
    pair: Pair,
    judged: Judged,
    options: LossOptions,
    *,
    on_policy: bool = False,
    cache: TeacherCache | None = None,
) -> Sample:
    """What the student can learn from a problem that the expert gave feedback on.

    Args:
        pair: only the expert reads; the student says how many layers and heads it needs.
        judged: an episode after step 2, with the expert's feedback.
        options: what of the expert is wanted.
        on_policy: learn from the student's own feedback, read by the expert.
        cache: as for :func:`read_text`.
    """
    assert judged.expert is not None
    expert = judged.expert.feedback
    feedback = judged.student.feedback if on_policy else expert
    prompt, target = student_prompt(pair, judged.answered), feedback.tokens
    thinking = pair.student_lm.thinking
    if thinking is not None and thinking.on and feedback.opening:
        # It reads the thought that the feedback came from, as it will read its own.
        whole = with_thought(pair.student_lm, prompt, feedback.opening)
        begin = len(whole)
        apart = thinking.taken_apart(prompt)
        if options.distil_thoughts and apart is not None:
            begin = len(apart[0]) + len(thinking.opened_ids)
        prompt, target = whole[:begin], (*whole[begin:], *target)
    before = rewind_to(judged.conversation, prompt)
    reading = read_text(pair, before, prompt, target, options, cache)
    return Sample(prompt, target, reading, expert.written_score, on_policy=on_policy)


def solution_of(
    pair: Pair,
    problem: Problem,
    solution: prompts.Answer,
    options: LossOptions,
    *,
    cache: TeacherCache | None = None,
) -> Sample:
    """What the student can learn of solving from a right solution.

    Args:
        pair: only the expert reads; the student says how many layers and heads it needs.
        problem: what it solves.
        solution: as one of the models wrote it.
        options: what of the expert is wanted.
        cache: as for :func:`read_text`.
    """
    tokenizer = pair.expert.tokenizer
    asked = prompts.answer_prompt(problem.question, form_of(problem))
    prompt = first_prompt(pair.student_lm, asked)
    text, spans = token_spans(tokenizer.decode, solution.tokens)
    answer = answer_span(text)
    return Sample(
        prompt,
        solution.tokens,
        read_text(pair, Conversation(), prompt, solution.tokens, options, cache),
        None,
        answer=tuple(answer_mask(spans, answer)),
        steps=tuple(step_weights(text, spans, answer)),
    )
