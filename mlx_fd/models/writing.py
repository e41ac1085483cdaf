"""Writing on from conversations, many at once, on mlx-lm's batched generator.

What is written here is all that the model says, its thoughts among it;
:mod:`mlx_fd.models.generation` takes them apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_fd.config import GenerationOptions
from mlx_fd.models import ranks
from mlx_fd.models.conversation import Cache, Conversation, Mark, can_be_cut_back, read_alone
from mlx_fd.models.loading import Loaded
from mlx_fd.models.memory import read_at_once
from mlx_fd.models.speculative import (
    Drawing,
    RandomNumbers,
    SharedNumbers,
    can_draft,
    drawn_with_draft,
)

Draw = Callable[[mx.array], mx.array]
"""Draws tokens from rows of log-probabilities [n, V]."""

# mlx-lm's penalty looks at the last 20 tokens; the published ones at all.
_WHOLE_CONTEXT = 1 << 20


@dataclass(frozen=True)
class Turn:
    """One generated turn.

    Attributes:
        text: what was said, without thoughts and the end-of-turn token; empty where a thought was
            cut off before anything was.
        tokens: the reply's tokens, with the end-of-turn token where it came; at least one.
        finished: whether the model ended the turn itself (else the token limit did).
        conversation: the conversation up to and with this turn, without its thought.
        prefilled: prompt tokens that had to be run through the model for it.
        logprobs: where they were asked for, the log-probability of each token when it was drawn, of
            the whole vocabulary at the sampling temperature (1 where that is 0).
        thought: what was thought before, without marks; empty: nothing.
        opening: the tokens that the reply was written after in place of the prompt's own
            (:attr:`mlx_fd.models.thinking.Thinking.closed_ids`): the thought with its marks.
        written: how many tokens the model drew, those of thoughts included.
        closed: whether a thought was closed by force, at its limit.
        states: where they were asked for, the final hidden states [d] at the prompt's last token
            and where the last one of ``tokens`` was predicted; empty where what was written was
            changed after.
        accepted: how many of the tokens that the model drew its draft had proposed; ``None``: it
            was written without one.
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool
    conversation: Conversation
    prefilled: int
    logprobs: tuple[float, ...] = ()
    thought: str = ""
    opening: tuple[int, ...] = ()
    written: int = 0
    closed: bool = False
    states: tuple[mx.array, ...] = ()
    accepted: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens.

    Attributes:
        max_tokens: the most to write.
        temperature: 0 is greedy.
        repetition_penalty: 1 is none.
        seed: of MLX's random numbers; without effect where the temperature is 0.
        top_p: draw among the likeliest tokens that together have this probability; 1: all.
        top_k: draw among the k likeliest; 0: all.
    """

    max_tokens: int
    temperature: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class GenerateOptions:
    """What :func:`mlx_fd.models.generation.generate` does beside writing.

    Attributes:
        reuse: go on from the conversations' caches, all together where the model can; ``False``
            takes them one by one and prefills everything.
        keep: keep the caches, to go on from the turns; not where nobody will.
        mark: make sure that the turns' conversations can be rewound to all but the last token of
            the prompt.
        logprobs: keep the tokens' log-probabilities.
        states: keep the hidden states that score heads read.
        on_token: called with the number of tokens written in each step, for progress.
    """

    reuse: bool = True
    keep: bool = True
    mark: bool = False
    logprobs: bool = False
    states: bool = False
    on_token: Callable[[int], None] | None = None


DEFAULTS = GenerateOptions()


@dataclass(frozen=True)
class Text:
    """What a model is to write in one go: a thought, or a reply.

    Attributes:
        conversation: what was said so far.
        prompt: what is to be read, at least one token.
        sampling: how to draw, and the most tokens to write.
        options: what is kept.
        ends: tokens that end it beside the model's own.
    """

    conversation: Conversation
    prompt: tuple[int, ...]
    sampling: Sampling
    options: GenerateOptions
    ends: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Drawn:
    """The tokens of a text.

    Attributes:
        tokens: as they were drawn, at least one.
        finished: whether the model ended it itself (else the token limit did).
        cache: the model's state after them, where it was to be kept.
        mark: its state before the prompt's last token, where ``cache`` cannot be cut back to it.
        logprobs: of the tokens, where they were asked for.
        states: where they were asked for, as :class:`Turn` has them.
        accepted: likewise.
    """

    tokens: tuple[int, ...]
    finished: bool
    cache: Cache | None = None
    mark: Cache | None = None
    logprobs: tuple[float, ...] = ()
    states: tuple[mx.array, ...] = ()
    accepted: int | None = None


@dataclass(frozen=True)
class Step:
    """One token of a text.

    Attributes:
        number: the text's, as :meth:`mlx_fd.models.lanes.Lane.add` gave it.
        token: its id.
        ended: ``"stop"``: the model ended it; ``"length"``: the limit did; ``None``: it goes on.
        cache: the model's state after an ended text's last token, where it is wanted.
        mark: likewise its state before the prompt's last token.
        logprob: where it is wanted, the token's log-probability [1], which the device may still
            compute: whoever reads it at once waits for the next token, too.
        states: of an ended text, where they are wanted, the final hidden states [d] at the prompt's
            last token and where this token was predicted.
        accepted: whether the model's draft had proposed it; ``None``: it was drawn without one.
    """

    number: int
    token: int
    ended: str | None = None
    cache: Cache | None = None
    mark: Cache | None = None
    logprob: mx.array | None = None
    states: tuple[mx.array, ...] = ()
    accepted: bool | None = None


def turn_of(loaded: Loaded, text: Text, drawn: Drawn) -> Turn:
    """A text that is written, as a turn of its conversation."""
    old, tokens = text.conversation, drawn.tokens
    before = (*old.tokens, *text.prompt)
    return Turn(
        text=loaded.tokenizer.decode(list(tokens[:-1] if drawn.finished else tokens)).strip(),
        tokens=tokens,
        finished=drawn.finished,
        conversation=Conversation(
            (*before, *tokens),
            drawn.cache,
            None if drawn.mark is None else Mark(len(before) - 1, drawn.mark),
        ),
        prefilled=len(text.prompt) + (len(old.tokens) if old.cache is None else 0),
        logprobs=drawn.logprobs,
        written=len(tokens),
        states=drawn.states,
        accepted=drawn.accepted,
    )


def sampling_for(options: GenerationOptions, step: str, seed: int) -> Sampling:
    """How one step of an episode draws its tokens.

    Args:
        options: the token limits, temperatures and penalties of both models.
        step: ``"answer"`` (whoever answers), ``"student_feedback"``, or one of the expert's:
            ``"expert_feedback"``, ``"merge"``, ``"revise"``, ``"critique"``, ``"final"``.
        seed: of MLX's random numbers; without effect where the temperature is 0.
    """
    limits = {
        "answer": options.max_answer_tokens,
        "student_feedback": options.max_feedback_tokens,
        "expert_feedback": options.max_feedback_tokens,
        "merge": options.max_merge_tokens,
        "revise": options.max_answer_tokens,
        "critique": options.max_merge_tokens,
        "final": options.max_answer_tokens,
    }
    temperature, penalty = options.expert_temperature, options.expert_repetition_penalty
    if step == "answer":
        temperature = options.answer_temperature
    elif step == "student_feedback":
        temperature, penalty = options.student_temperature, options.student_repetition_penalty
    return Sampling(limits[step], temperature, penalty, seed)


def write(loaded: Loaded, texts: Sequence[Text]) -> list[Turn]:
    """Let a model write texts side by side, each until an end-of-turn token or one of its ends.

    Args:
        loaded: who writes.
        texts: all with the same sampling, options and ends.
    """
    if not texts:
        return []
    if not loaded.batched or _drafted(loaded, texts):
        return [_write_alone(loaded, text) for text in texts]
    sampling, options = texts[0].sampling, texts[0].options
    conversations = [text.conversation for text in texts]
    eos = {*loaded.tokenizer.eos_token_ids, *texts[0].ends}
    starts = [
        list(text.prompt) if old.cache is not None else [*old.tokens, *text.prompt]
        for old, text in zip(conversations, texts, strict=True)
    ]
    cached = [list(old.tokens) if old.cache is not None else [] for old in conversations]
    caches = [
        old.cache if old.cache is not None else make_prompt_cache(loaded.model)
        for old in conversations
    ]
    draw = _drawing(loaded, sampling)
    generator = BatchGenerator(
        loaded.model,
        stop_tokens=[[token] for token in eos],
        # Rows beyond the tokenizer are padding, and the other model may have fewer of them.
        sampler=lambda logprobs: draw(logprobs[..., : loaded.vocab]),
        logits_processors=logits_processors(sampling) or None,
        completion_batch_size=len(conversations),
        prefill_batch_size=min(
            len(starts), read_at_once(max(map(len, starts))) if options.states else len(starts)
        ),
        stream=ranks.stream(),
    )
    written: dict[int, list[int]] = {}
    finished: dict[int, bool] = {}
    kept: dict[int, Cache] = {}
    drawn_logprobs: dict[int, list[float]] = {}
    states = _States()
    with closing(generator), finals(loaded, wanted=options.states) as seen:
        # The generator merges caches into new arrays, so conversations stay as they are.
        uids = generator.insert(
            starts,
            max_tokens=[sampling.max_tokens] * len(starts),
            caches=caches,
            all_tokens=cached,
        )
        marks = {
            uid: cache
            for uid, cache, text in zip(uids, caches, texts, strict=True)
            if _needs_mark(text, cache)
        }
        while True:
            seen.clear()
            prompted, responses = generator.next()
            if not prompted and not responses:
                break
            for part in prompted:
                # The generator stops before a prompt's last token, which is a part of its own.
                if part.uid in marks and part.end_of_segment and not part.end_of_prompt:
                    marks[part.uid] = generator.extract_cache([part.uid])[part.uid][0]
                    mx.eval([layer.state for layer in marks[part.uid]])
            if options.states:
                states.keep(seen, prompted, responses)
            if not responses:
                continue
            if options.logprobs:
                _keep_logprobs(responses, sampling.temperature or 1.0, loaded.vocab, drawn_logprobs)
            for response in responses:
                written.setdefault(response.uid, []).append(response.token)
                if response.finish_reason is not None:
                    finished[response.uid] = response.finish_reason == "stop"
                    if options.keep:
                        # Lazy slices would hold the whole batch's cache of this very step.
                        mx.eval([layer.state for layer in response.prompt_cache])
                        kept[response.uid] = response.prompt_cache
            if options.on_token is not None:
                options.on_token(len(responses))
    mx.eval(states.first, states.last)
    return [
        turn_of(
            loaded,
            text,
            Drawn(
                tokens=tuple(written[uid]),
                finished=finished[uid],
                cache=kept.get(uid),
                mark=marks.get(uid),
                logprobs=tuple(drawn_logprobs.get(uid, ())),
                states=(states.first[uid], states.last[uid]) if options.states else (),
            ),
        )
        for uid, text in zip(uids, texts, strict=True)
    ]


def _drafted(loaded: Loaded, texts: Sequence[Text]) -> bool:
    """Whether it is one text, and a draft proposes its tokens."""
    if loaded.draft is None or len(texts) > 1 or texts[0].options.states:
        return False
    old = texts[0].conversation
    cache = old.cache if old.cache is not None else make_prompt_cache(loaded.model)
    return can_draft(loaded, cache, _longest(texts[0]))


def longest(conversation: Conversation, prompt: Sequence[int], sampling: Sampling) -> int:
    """Tokens of a conversation after a text that takes all that it may."""
    return len(conversation.tokens) + len(prompt) + sampling.max_tokens


def _needs_mark(text: Text, cache: Cache) -> bool:
    """Whether a text's conversation can be rewound only to a copy that is made on the way."""
    return text.options.mark and not can_be_cut_back(cache, _longest(text))


def _longest(text: Text) -> int:
    return longest(text.conversation, text.prompt, text.sampling)


def finals(loaded: Loaded, *, wanted: bool) -> AbstractContextManager[list[mx.array]]:
    """The model's final hidden states of each call while this is open, where they are wanted."""
    return loaded.view.finals() if wanted else nullcontext([])


class _States:
    """The final hidden states [d] of a batch's conversations, taken while they are written.

    Attributes:
        first: by uid, at the prompt's last token.
        last: where the last token was predicted.
    """

    def __init__(self) -> None:
        self.first: dict[int, mx.array] = {}
        self.last: dict[int, mx.array] = {}
        # The call in which each conversation's next token is predicted, and its row there.
        self._now: dict[int, tuple[mx.array, int]] = {}

    def keep(
        self, finals: Sequence[mx.array], prompted: Sequence[Any], responses: Sequence[Any]
    ) -> None:
        """Take what a step of the generator made.

        Args:
            finals: of its calls of the model: the one that reads the tokens which it gives, the one
                for the last tokens of prompts, and those for other parts of prompts.
            prompted: what it says of prompts.
            responses: its tokens, which were predicted in the step before.
        """
        for response in responses:
            if response.finish_reason is not None:
                final, row = self._now[response.uid]
                self.last[response.uid] = final[row, -1]
        reading = [response.uid for response in responses]
        begun = [part.uid for part in prompted if part.end_of_prompt]
        calls = [uids for uids in (reading, begun) if uids]
        for uids, final in zip(calls, finals[: len(calls)], strict=True):
            self._now.update({uid: (final, row) for row, uid in enumerate(uids)})
        for uid in begun:
            final, row = self._now[uid]
            self.first[uid] = final[row, -1]


def _write_alone(loaded: Loaded, text: Text) -> Turn:
    """One turn by itself, with MLX's own random numbers."""
    sampling, options = text.sampling, text.options
    draw, numbers = _drawing(loaded, sampling), SharedNumbers() if sampling.temperature else None
    at = (sampling.temperature or 1.0) if options.logprobs else 0.0
    tokens: list[int] = []
    logprobs: list[Any] = []
    accepted = 0
    for step in written_alone(loaded, text, draw, numbers, at):
        tokens.append(step.token)
        accepted += bool(step.accepted)
        if step.logprob is not None:
            logprobs.append(step.logprob.item())
        if options.on_token is not None:
            options.on_token(1)
    if step.accepted is not None and loaded.batched:
        # mlx-lm's generator draws one token more than it gives, and so does this: the text that is
        # written next has the random numbers that it has without a draft.
        draw(mx.zeros((1, loaded.vocab)))
    return turn_of(
        loaded,
        text,
        Drawn(
            tokens=tuple(tokens),
            finished=step.ended == "stop",
            cache=step.cache,
            mark=step.mark,
            logprobs=tuple(logprobs),
            states=step.states,
            accepted=None if step.accepted is None else accepted,
        ),
    )


def written_alone(
    loaded: Loaded,
    text: Text,
    draw: Draw,
    numbers: RandomNumbers | None,
    logprobs: float = 0.0,
    number: int = 0,
) -> Iterator[Step]:
    """Write a text by itself: with a draft, or of a model that mlx-lm's batches do not get right.

    Args:
        loaded: who writes.
        text: of its options only what is kept at its end.
        draw: of rows of log-probabilities of the model's vocabulary.
        numbers: what ``draw`` takes random numbers from; ``None``: it takes none.
        logprobs: the temperature of the tokens' log-probabilities; 0: they are not wanted.
        number: the text's, for its steps.
    """
    old, most, options = text.conversation, text.sampling.max_tokens, text.options
    before, read = [*old.tokens, *text.prompt], len(old.tokens)
    cache = copy.deepcopy(old.cache)
    if cache is None:
        cache, read = make_prompt_cache(loaded.model), 0
    read_alone(loaded, cache, before[read:-1])
    mark = copy.deepcopy(cache) if _needs_mark(text, cache) else None
    processors = logits_processors(text.sampling)
    ends = text.ends.union(loaded.tokenizer.eos_token_ids)
    drafted = not options.states and can_draft(loaded, cache, _longest(text))
    if drafted:
        drawing = Drawing(draw, most, ends, processors, numbers)
        made = drawn_with_draft(loaded, cache, before, drawing)
    else:
        made = drawn_alone(loaded, cache, before, draw, processors)
    with finals(loaded, wanted=options.states) as seen:
        for count, (token, rows, proposed) in enumerate(made, 1):
            logprob = token_logprobs(rows, [token], logprobs, loaded.vocab) if logprobs else None
            accepted = proposed if drafted else None
            if token in ends or count == most:
                break
            yield Step(number, token, logprob=logprob, accepted=accepted)
            del seen[1:]  # only the first and the last one are wanted
    if options.keep:
        read_alone(loaded, cache, [token])
    yield Step(
        number,
        token,
        "stop" if token in ends else "length",
        cache if options.keep else None,
        mark,
        logprob,
        (seen[0][0, -1], seen[-1][0, -1]) if seen else (),
        accepted,
    )


def drawn_alone(
    loaded: Loaded,
    cache: Cache,
    before: Sequence[int],
    draw: Draw,
    processors: Sequence[Callable[[mx.array, mx.array], mx.array]],
) -> Iterator[tuple[int, mx.array, bool]]:
    """Tokens of one conversation, for ever, each with the log-probabilities [1, V] it is drawn by.

    No draft had proposed any of them, as the third value says.

    Args:
        loaded: who writes.
        cache: holds all of ``before`` but its last token; it goes along, a token behind.
        before: all tokens so far.
        draw: of rows of log-probabilities of the model's vocabulary.
        processors: of logits, by the tokens so far.
    """
    tokens = [*before]
    while True:
        logits: mx.array = loaded.model(mx.array([tokens[-1:]]), cache=cache)[:, -1]
        mx.eval([layer.state for layer in cache])
        for process in processors:
            logits = process(mx.array(tokens), logits)
        rows = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token: Any = draw(rows[..., : loaded.vocab]).item()
        tokens.append(token)
        yield token, rows, False


def logits_processors(sampling: Sampling) -> list[Callable[[mx.array, mx.array], mx.array]]:
    """What changes logits [1, V] before a token is drawn, by the tokens so far."""
    if sampling.repetition_penalty == 1:
        return []
    made: list[Callable[[mx.array, mx.array], mx.array]] = make_logits_processors(
        repetition_penalty=sampling.repetition_penalty, repetition_context_size=_WHOLE_CONTEXT
    )
    return made


def _sampler(sampling: Sampling) -> Callable[[mx.array], mx.array]:
    """Draws tokens from rows of log-probabilities [n, V]."""
    temperature = sampling.temperature
    if not temperature or (sampling.top_p == 1 and not sampling.top_k):
        plain: Callable[[mx.array], mx.array] = make_sampler(temp=temperature)
        return plain
    # Elsewhere, and so in every published setting, the temperature comes before what is cut off.
    draw: Callable[[mx.array], mx.array] = make_sampler(
        temp=1.0, top_p=sampling.top_p, top_k=sampling.top_k
    )

    def tempered(rows: mx.array) -> mx.array:
        rows = rows.astype(mx.float32) / temperature
        return draw(rows - mx.logsumexp(rows, axis=-1, keepdims=True))

    return tempered


def _drawing(loaded: Loaded, sampling: Sampling) -> Callable[[mx.array], mx.array]:
    """Draws tokens, but never the one that would begin a thought unasked."""
    draw, thinking = _sampler(sampling), loaded.thinking
    if thinking is None or thinking.banned_id < 0:
        return draw
    banned = thinking.banned_id
    return lambda rows: draw(mx.where(mx.arange(rows.shape[-1]) == banned, -mx.inf, rows))


def _keep_logprobs(
    responses: Sequence[Any], temperature: float, vocab: int, drawn_logprobs: dict[int, list[float]]
) -> None:
    """Add the log-probability of each response's token to what is known of its turn."""
    rows = mx.stack([response.logprobs for response in responses])
    tokens = [response.token for response in responses]
    values: Any = token_logprobs(rows, tokens, temperature, vocab).tolist()
    for response, value in zip(responses, values, strict=True):
        drawn_logprobs.setdefault(response.uid, []).append(value)


def token_logprobs(
    rows: mx.array, tokens: Sequence[int] | mx.array, temperature: float | mx.array, vocab: int
) -> mx.array:
    """Log-probabilities [n] of tokens at a temperature, float32.

    Args:
        rows: log-probabilities [n, V] at temperature 1.
        tokens: one of each row.
        temperature: above 0; one for all, or one [n, 1] of each.
        vocab: rows beyond it are padding, and never drawn.
    """
    rows = rows[:, :vocab].astype(mx.float32) / temperature
    chosen = tokens if isinstance(tokens, mx.array) else mx.array([*tokens])
    drawn = mx.take_along_axis(rows, chosen[:, None], axis=-1).squeeze(-1)
    return drawn - mx.logsumexp(rows, axis=-1)
