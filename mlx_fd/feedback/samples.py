"""What the student learns from: a text, and what the expert has to say about each of its tokens.

Both models read the same prompt and the same text (true teacher forcing). The expert reads it once;
what it says is kept with the text, for as many looks at the student as there are to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_fd.config import LossOptions
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.stages import Judged
from mlx_fd.feedback.teacher_cache import TeacherCache
from mlx_fd.feedback.turns import student_prompt
from mlx_fd.feedback.two_tokenizers import same_tokens, to_expert, to_student
from mlx_fd.losses.answer import answer_mask, answer_span
from mlx_fd.losses.attention import head_mean
from mlx_fd.losses.graph import pool
from mlx_fd.losses.head import logit_head
from mlx_fd.losses.hidden import aligned_layers
from mlx_fd.losses.reasoning import step_weights
from mlx_fd.losses.spans import token_spans
from mlx_fd.losses.teacher import TopK, teacher_top_k
from mlx_fd.models import metering, ranks
from mlx_fd.models.attention_taps import log_attention, only
from mlx_fd.models.backend import backend
from mlx_fd.models.conversation import Conversation, forward, rewind_to
from mlx_fd.models.fingerprint import content_hash
from mlx_fd.models.generation import first_prompt, with_thought
from mlx_fd.models.loading import Loaded
from mlx_fd.models.view import block_attention
from mlx_fd.problems import Problem, prompts
from mlx_fd.problems.kinds import form_of
from mlx_fd.runs.checked import content_digest
from mlx_fd.runs.records.episodes import SampleRow

# Of the expert's distribution over tokens that both models have; the rest is one more outcome.
_SHARED_TOP_K = 256


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

    @property
    def are_finite(self) -> bool:
        """Whether all of it is; where a state overflowed in the expert it is not."""
        targets = self.targets
        final = targets if isinstance(targets, mx.array) else targets.log_sum_exp
        found = [mx.isfinite(array).all() for array in (final, *self.pooled, *self.attention)]
        return bool(mx.stack(found).all().item())

    def at(self, matches: Sequence[int | None]) -> TeacherOutputs:
        """The top k of some of the T tokens, for another tokenizer's tokens of the text.

        Args:
            matches: for each of those the token to take, ``None`` for any.
        """
        assert isinstance(self.targets, TopK)
        rows = mx.array([match or 0 for match in matches])
        picked = TopK(**{name: array[rows] for name, array in vars(self.targets).items()})
        return replace(self, targets=picked)


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
        matched: where the models have different tokenizers, for each token whether the expert has
            the same at the same place, so that its distribution is known.
        expert_prompt: what the expert read in the place of ``prompt``: the same in its own tokens,
            or with the right answer in sight; empty: the same tokens.
        expert_target: ``target`` in its own tokens; empty likewise.
        own: with ``score_at`` ``own``, all that the student read and wrote up to the end of its own
            feedback on the same answer.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    expert: TeacherOutputs
    expert_score: float | None
    on_policy: bool = False
    answer: tuple[bool, ...] = ()
    steps: tuple[float, ...] = ()
    matched: tuple[bool, ...] = ()
    expert_prompt: tuple[int, ...] = ()
    expert_target: tuple[int, ...] = ()
    own: tuple[int, ...] = ()

    def without_own(self) -> Sample:
        """Without what the student said itself, and so without a part in the score loss.

        That is of the student as it was; what it said then it no longer says, and a head that
        learns on that comes to distrust what it says now.
        """
        return replace(self, own=(), expert_score=None) if self.own else self

    def to_json(self) -> SampleRow:
        """All but what the expert says."""
        row: SampleRow = {
            "prompt": list(self.prompt),
            "target": list(self.target),
            "expert_score": self.expert_score,
            "on_policy": self.on_policy,
            "answer": list(self.answer),
            "steps": list(self.steps),
        }
        if self.matched:
            row["matched"] = list(self.matched)
        if self.expert_target:
            row["expert_prompt"] = list(self.expert_prompt)
            row["expert_target"] = list(self.expert_target)
        if self.own:
            row["own"] = list(self.own)
        return row

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
            tuple(value.get("matched", ())),
            tuple(value.get("expert_prompt", ())),
            tuple(value.get("expert_target", ())),
            tuple(value.get("own", ())),
        )


def gather_samples(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of all ranks (:mod:`mlx_fd.models.ranks`), rank 0's first."""
    if ranks.size() == 1:
        return list(samples)
    rows = ranks.gather([one.to_json() for one in samples])
    arrays = ranks.gather_arrays([one.expert.arrays() for one in samples])
    return [
        Sample.from_json(row, TeacherOutputs.of(named))
        for row, named in zip(rows, arrays, strict=True)
    ]


@dataclass(frozen=True)
class OwnTexts:
    """The student's own feedback in a batch, for the score head: K texts, padded on the right."""

    tokens: mx.array  # [K, S], each without its last token, and without what is read already
    ends: mx.array  # [K]: where that is predicted
    rows: mx.array  # [K]: whose they are, among the batch's samples
    begun: mx.array | None  # [K]: how many tokens are read with the samples; None: none


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
    expert_expects: mx.array | TopK  # [N, d_expert], or the top k of N
    expert_pooled: list[mx.array]  # of [B, d_expert]
    expert_attention: list[mx.array]  # of [B, heads, T, S]
    scores: mx.array  # [B]
    score_mask: mx.array  # [B], float32
    own: OwnTexts | None  # of the samples with a score; None: of none is it known


@metering.counted(metering.READING)
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


def read_both(
    pair: Pair,
    before: Conversation,
    prompt: tuple[int, ...],
    target: tuple[int, ...],
    student_target: tuple[int, ...],
    options: LossOptions,
    cache: TeacherCache | None = None,
) -> tuple[TeacherOutputs, tuple[bool, ...]]:
    """:func:`read_text` for a student with a tokenizer of its own.

    Args:
        pair: the models.
        before: as for :func:`read_text`.
        prompt: all tokens before the text, the expert's.
        target: the expert's tokens of the text.
        student_target: the student's, T of them.
        options: what of the expert is wanted.
        cache: as for :func:`read_text`.

    Returns:
        What the expert says at each of the student's tokens, and whether it has the same token
        there; where it has not, its distribution is another token's.
    """
    matches = same_tokens(pair, target, student_target)
    outputs = read_text(pair, before, prompt, target, options, cache).at(matches)
    return outputs, tuple(match is not None for match in matches)


def _read(
    pair: Pair,
    before: Conversation,
    prompt: tuple[int, ...],
    target: tuple[int, ...],
    options: LossOptions,
) -> TeacherOutputs:
    expert, student = pair.expert.view, pair.student.view
    rest = prompt[len(before.tokens) :]
    wanted = options.needs_attention
    seen = forward(pair.expert, before, [*rest, *target[:-1]], attention=wanted)
    first = len(rest) - 1  # where the target's first token is predicted
    mask = mx.ones((1, len(target)))
    states = _aligned(len(student.blocks) + 1, len(seen.layers), options)
    pooled = tuple(pool(seen.layers[index][:, first:], mask)[0] for index in states)
    final = seen.final[0, first:]
    targets: mx.array | TopK = final
    if options.teacher_top_k or pair.shared:
        shared = pair.shared
        targets = teacher_top_k(
            final,
            expert.head,
            k=options.teacher_top_k or _SHARED_TOP_K,
            temperature=options.loss_temperature,
            vocab=pair.expert.vocab,
            among=None if shared is None else mx.array(shared.expert),
        )
        if shared is not None:
            targets = replace(targets, indices=mx.array(shared.student)[targets.indices])
    if not wanted:
        return TeacherOutputs(targets, pooled)
    positions = mx.arange(first, seen.final.shape[1])[None]
    length = len(prompt) + len(target) - 1
    blocks = _aligned(len(student.blocks), len(expert.blocks), options)
    maps = [
        log_attention(seen.attention[index], positions=positions, keys=length)[0]
        for index in blocks
    ]
    if options.attention_heads == "mean":
        return TeacherOutputs(targets, pooled, tuple(head_mean(part[None])[0] for part in maps))
    heads = _student_heads(pair, options)
    return TeacherOutputs(
        targets,
        pooled,
        tuple(
            part[mx.array(aligned_layers(count, part.shape[0]))]
            for part, count in zip(maps, heads, strict=True)
        ),
    )


def _student_heads(pair: Pair, options: LossOptions) -> list[int]:
    """How many heads each block of the student has whose attention is compared."""
    blocks = block_attention(pair.student.model)
    compared = blocks[-1:] if options.hidden_layers == "last" else blocks
    return [only(calls, "a block of the student").queries.shape[1] for calls in compared]


def reader_fingerprint(expert: Loaded) -> dict[str, Any]:
    """All of an expert and of this machine that what it says of tokens depends on."""
    here, head = backend(), logit_head(expert.view.head, expert.vocab)
    modules = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    return {
        "backend": [
            *(here.device, here.blas.name, here.blas.kernels, here.cpu_math),
            version("mlx"),
        ],
        "expert": content_hash(expert.path),
        "dtype": str(expert.dtype),
        "quantized": any(isinstance(part, modules) for part in expert.model.modules()),
        "logits": [type(head).__name__, head.transform.scale, head.transform.soft_cap],
    }


def cache_fingerprint(pair: Pair, options: LossOptions) -> dict[str, Any]:
    """All that a :class:`TeacherOutputs` depends on beside the tokens.

    The expert, what is kept, and what its last digits come from.
    """
    student, shared = pair.student.view, pair.shared
    return {
        **reader_fingerprint(pair.expert),
        "vocab": pair.vocab,
        "shared": shared and content_digest([shared.expert, shared.student]),
        "top_k": options.teacher_top_k,
        "temperature": options.loss_temperature,
        "layers": [options.hidden_layers, len(student.blocks)],
        "heads": [options.attention_heads, *_student_heads(pair, options)]
        if options.needs_attention
        else None,
    }


def _aligned(n_student: int, n_expert: int, options: LossOptions) -> list[int]:
    """The expert's layers that go with the student's aligned ones."""
    if options.hidden_layers == "last":
        return [n_expert - 1]
    return aligned_layers(n_student, n_expert)


def sample_of(
    pair: Pair,
    judged: Judged,
    options: LossOptions,
    *,
    on_policy: bool = False,
    cache: TeacherCache | None = None,
    apart: bool = False,
) -> Sample:
    """What the student can learn from a problem that the expert gave feedback on.

    Args:
        pair: only the expert reads; the student says how many layers and heads it needs.
        judged: an episode after step 2, with the expert's feedback.
        options: what of the expert is wanted.
        on_policy: learn from the student's own feedback, read by the expert.
        cache: as for :func:`read_text`.
        apart: let the expert read all of the prompt again, as with a cache.
    """
    assert judged.expert is not None
    expert = judged.expert.feedback
    feedback = judged.student.feedback if on_policy else expert
    if pair.shared is not None:
        return _sample_in_two(pair, judged, options, on_policy=on_policy, cache=cache, apart=apart)
    prompt, target = student_prompt(pair, judged.answered), feedback.tokens
    thinking = pair.student_lm.thinking
    if thinking is not None and thinking.on and feedback.opening:
        # It reads the thought that the feedback came from, as it will read its own.
        whole = with_thought(pair.student_lm, prompt, feedback.opening)
        begin = len(whole)
        parts = thinking.taken_apart(prompt)
        if options.distil_thoughts and parts is not None:
            begin = len(parts[0]) + len(thinking.opened_ids)
        prompt, target = whole[:begin], (*whole[begin:], *target)
    # An expert that was told the right answer reads the text as it wrote it: it would not have
    # given its score otherwise.
    own_prompt = judged.expert.prompt
    reads = own_prompt or prompt
    before = Conversation() if apart else rewind_to(judged.conversation, reads)
    reading = read_text(pair, before, reads, target, options, cache)
    return Sample(
        prompt,
        target,
        reading,
        expert.written_score,
        on_policy=on_policy,
        expert_prompt=own_prompt,
        expert_target=target if own_prompt else (),
        own=_own_text(pair, judged),
    )


def _own_text(pair: Pair, judged: Judged) -> tuple[int, ...]:
    """What the student read and wrote up to its feedback's end, where its head reads there."""
    if pair.student.score_at != "own":
        return ()
    feedback = judged.student.feedback
    prompt = student_prompt(pair, judged.answered)
    return (*with_thought(pair.student_lm, prompt, feedback.opening), *feedback.tokens)


def _sample_in_two(
    pair: Pair,
    judged: Judged,
    options: LossOptions,
    *,
    on_policy: bool,
    cache: TeacherCache | None,
    apart: bool,
) -> Sample:
    """:func:`sample_of` for two tokenizers: each model reads the feedback in its own tokens."""
    assert judged.expert is not None
    prompt = judged.expert.prompt or judged.answered.prompt
    before = prompts.FEEDBACK_OPENING
    if on_policy:
        own = judged.student.feedback.tokens
        expert_tokens = to_expert(pair, own, before=before)
    else:
        expert_tokens = judged.expert.feedback.tokens
        own = to_student(pair, expert_tokens, before=before)
    read = Conversation() if apart else rewind_to(judged.conversation, prompt)
    outputs, matched = read_both(pair, read, prompt, expert_tokens, own, options, cache)
    return Sample(
        student_prompt(pair, judged.answered),
        own,
        outputs,
        judged.expert.feedback.written_score,
        on_policy=on_policy,
        matched=matched,
        expert_prompt=prompt,
        expert_target=expert_tokens,
        own=_own_text(pair, judged),
    )


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
    asked = prompts.answer_prompt(problem.question, form_of(problem))
    prompt, target = first_prompt(pair.expert, asked), to_student(pair, solution.tokens)
    own = first_prompt(pair.student_lm, asked)
    matched: tuple[bool, ...] = ()
    if pair.shared is None:
        reading = read_text(pair, Conversation(), own, target, options, cache)
    else:
        reading, matched = read_both(
            pair, Conversation(), prompt, solution.tokens, target, options, cache
        )
    text, spans = token_spans(pair.student_lm.tokenizer.decode, target)
    answer = answer_span(text, number=problem.kind == "number")
    sample = Sample(
        own,
        target,
        reading,
        None,
        answer=tuple(answer_mask(spans, answer)),
        steps=tuple(step_weights(text, spans, answer)),
    )
    if pair.shared is None:
        return sample
    return replace(
        sample,
        steps=tuple(weight * known for weight, known in zip(sample.steps, matched, strict=True)),
        matched=matched,
        expert_prompt=prompt,
        expert_target=solution.tokens,
    )
