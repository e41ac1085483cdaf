"""Batched generation over growing conversations, on mlx-lm's generator and prompt caches.

A conversation is the tokens so far and the model's state after exactly those tokens. Each turn adds
only its own tokens, so nothing is prefilled twice; ``reuse=False`` prefills everything again, the
naive way that tests and benchmarks compare with.

Keys and values can be cut back to any length. The state of a recurrence cannot, nor can a sliding
window that has run full; there a copy is made where somebody will come back to.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_fd.config import GenerationOptions
from mlx_fd.models.chat_template import check_conversation
from mlx_fd.models.loading import Loaded
from mlx_fd.models.view import Forward

Cache = list[Any]
# mlx-lm's penalty looks at the last 20 tokens; the published ones at all.
_WHOLE_CONTEXT = 1 << 20
# Tokens of a prompt that are read at once, as in mlx-lm.
_PREFILL = 2048
_SENTINEL = "\u241fanswer\u241f"


@dataclass(frozen=True)
class Mark:
    """A model's state after a conversation's first ``length`` tokens, to come back to."""

    length: int
    cache: Cache


@dataclass(frozen=True)
class Conversation:
    """Tokens so far, and the prompt cache that holds exactly them (``None``: not kept).

    Conversations are values: generating from one leaves it as it was.

    Attributes:
        tokens: what was said.
        cache: the model's state after all of it.
        mark: its state further back, where ``cache`` cannot be cut back to it.
    """

    tokens: tuple[int, ...] = ()
    cache: Cache | None = None
    mark: Mark | None = None


@dataclass(frozen=True)
class Turn:
    """One generated turn.

    Attributes:
        text: what was written, without the end-of-turn token.
        tokens: the generated tokens, with the end-of-turn token where it came.
        finished: whether the model ended the turn itself (else the token limit did).
        conversation: the conversation up to and with this turn.
        prefilled: prompt tokens that had to be run through the model for it.
        logprobs: where they were asked for, the log-probability of each token when it was drawn, of
            the whole vocabulary at the sampling temperature (1 where that is 0).
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool
    conversation: Conversation
    prefilled: int
    logprobs: tuple[float, ...] = ()


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
    """What :func:`generate` does beside writing.

    Attributes:
        reuse: go on from the conversations' caches, all together where the model can; ``False``
            takes them one by one and prefills everything.
        keep: keep the caches, to go on from the turns; not where nobody will.
        mark: make sure that the turns' conversations can be rewound to all but the last token of
            the prompt.
        logprobs: keep the tokens' log-probabilities.
        on_token: called with the number of tokens written in each step, for progress.
    """

    reuse: bool = True
    keep: bool = True
    mark: bool = False
    logprobs: bool = False
    on_token: Callable[[int], None] | None = None


_DEFAULTS = GenerateOptions()


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


def first_prompt(loaded: Loaded, message: str) -> tuple[int, ...]:
    """Tokens of a conversation's first user message, up to where the assistant begins.

    Args:
        loaded: whose template and tokens.
        message: what the user says.
    """
    text = loaded.template.render([message])
    return tuple(loaded.tokenizer.encode(text, add_special_tokens=False))


def followup_prompt(loaded: Loaded, message: str) -> tuple[int, ...]:
    """Tokens from the end of an assistant's turn, over a user message, to the assistant's next.

    They begin with the end-of-turn token. Text that the assistant wrote is never tokenised again,
    so the conversation keeps the very tokens that were generated.

    Args:
        loaded: whose template and tokens.
        message: what the user says.

    Raises:
        UserError: the template does not keep what was said in earlier turns.
    """
    check_conversation(loaded.template)
    text = loaded.template.render(["?", _SENTINEL, message])
    tail = text.partition(_SENTINEL)[2]
    return tuple(loaded.tokenizer.encode(tail, add_special_tokens=False))


def without_repeated_eos(conversation: Conversation, turn: tuple[int, ...]) -> tuple[int, ...]:
    """A :func:`followup_prompt` without the tokens that the conversation ends with already."""
    ended = conversation.tokens and turn and conversation.tokens[-1] == turn[0]
    return turn[1:] if ended else turn


def rewind(conversation: Conversation, length: int) -> Conversation:
    """The conversation's first ``length`` tokens, with a cache of its own where there is one.

    It is cut from the conversation's, or copied from its mark.
    """
    tokens, mark = conversation.tokens[:length], conversation.mark
    if (cut := _cut_back(conversation.cache, len(conversation.tokens) - length)) is not None:
        return Conversation(tokens, cut)
    if mark is not None and mark.length == length:
        return Conversation(tokens, copy.deepcopy(mark.cache))
    return Conversation(tokens)


def _cut_back(cache: Cache | None, count: int) -> Cache | None:
    """A copy without the last ``count`` tokens; ``None`` where some layer no longer knows how."""
    if cache is None or not all(layer.is_trimmable() for layer in cache):
        return None
    cache = copy.deepcopy(cache)
    # A layer that lets go of what is far back may give less than it is asked for.
    return cache if all(layer.trim(count) == count for layer in cache) else None


def _can_be_cut_back(cache: Cache, length: int) -> bool:
    """Whether a cache that is extended to ``length`` tokens can still be cut back then."""
    return all(
        layer.is_trimmable() and length < min(_window(layer), default=length + 1) for layer in cache
    )


def _window(layer: Any) -> list[int]:
    """How many tokens a cache's layer can hold before it lets go of some, where that is limited."""
    parts = [layer, *getattr(layer, "caches", ())]
    limits = [getattr(part, name, None) for part in parts for name in ("max_size", "chunk_size")]
    return [limit for limit in limits if limit is not None]


def forward(loaded: Loaded, conversation: Conversation, tokens: Sequence[int]) -> Forward:
    """Hidden states [1, len(tokens), d] of ``tokens`` after a conversation, left unchanged."""
    return forward_with_cache(loaded, conversation, tokens)[0]


def forward_with_cache(
    loaded: Loaded, conversation: Conversation, tokens: Sequence[int]
) -> tuple[Forward, Cache]:
    """:func:`forward`, and the prompt cache after it, of the conversation and ``tokens``."""
    cache = copy.deepcopy(conversation.cache)
    if cache is not None:
        return loaded.view.forward(mx.array([*tokens])[None], cache), cache
    cache = make_prompt_cache(loaded.model)
    whole = loaded.view.forward(mx.array([*conversation.tokens, *tokens])[None], cache)
    begin = len(conversation.tokens)
    return Forward([layer[:, begin:] for layer in whole.layers], whole.final[:, begin:]), cache


def prefill(
    loaded: Loaded, conversation: Conversation, prompt: Sequence[int], *, reuse: bool = True
) -> tuple[mx.array, Conversation]:
    """Run a prompt through the model.

    Returns:
        The final hidden state [d] of the prompt's last token, and the conversation with the
        prompt but for that token: what :func:`generate` wants to go on from.
    """
    tokens = (*conversation.tokens, *prompt)
    if not reuse:
        return _read(loaded, make_prompt_cache(loaded.model), tokens), Conversation(tokens[:-1])
    cache, start = copy.deepcopy(conversation.cache), len(conversation.tokens)
    if cache is None:
        cache, start = make_prompt_cache(loaded.model), 0
    if _can_be_cut_back(cache, len(tokens)):
        final = _read(loaded, cache, tokens[start:])
        return final, rewind(Conversation(tokens, cache), len(tokens) - 1)
    if tokens[start:-1]:
        _read(loaded, cache, tokens[start:-1])
    before = Conversation(tokens[:-1], copy.deepcopy(cache))
    return _read(loaded, cache, tokens[-1:]), before


def _read(loaded: Loaded, cache: Cache, tokens: Sequence[int]) -> mx.array:
    """The final hidden state [d] at the last of some tokens; ``cache`` then holds them."""
    final = loaded.view.forward(mx.array([*tokens])[None], cache).final[0, -1]
    mx.eval(final, [layer.state for layer in cache])
    return final


def generate(
    loaded: Loaded,
    conversations: Sequence[Conversation],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    options: GenerateOptions = _DEFAULTS,
) -> list[Turn]:
    """Let the model write the next turn of each conversation.

    Args:
        loaded: who writes; rows of its logits beyond ``vocab`` are never drawn.
        conversations: what was said so far.
        prompts: the new tokens of each, at least one.
        sampling: how to draw, and the most tokens to write.
        options: what is kept and told.

    Returns:
        One turn for each conversation, in order.
    """
    if not conversations:
        return []
    mx.random.seed(sampling.seed)
    if options.reuse and loaded.batched:
        return _generate(loaded, conversations, prompts, sampling, options)
    if not options.reuse:
        options = dataclasses.replace(options, keep=False, mark=False)
        conversations = [Conversation(old.tokens) for old in conversations]
    if not loaded.batched:
        return [
            _generate_alone(loaded, old, prompt, sampling, options)
            for old, prompt in zip(conversations, prompts, strict=True)
        ]
    return [
        _generate(loaded, [old], [prompt], sampling, options)[0]
        for old, prompt in zip(conversations, prompts, strict=True)
    ]


def _generate(
    loaded: Loaded,
    conversations: Sequence[Conversation],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    options: GenerateOptions,
) -> list[Turn]:
    eos = set(loaded.tokenizer.eos_token_ids)
    starts = [
        list(prompt) if old.cache is not None else [*old.tokens, *prompt]
        for old, prompt in zip(conversations, prompts, strict=True)
    ]
    cached = [list(old.tokens) if old.cache is not None else [] for old in conversations]
    caches = [
        old.cache if old.cache is not None else make_prompt_cache(loaded.model)
        for old in conversations
    ]
    draw = _sampler(sampling)
    generator = BatchGenerator(
        loaded.model,
        stop_tokens=[[token] for token in eos],
        # Rows beyond the tokenizer are padding, and the other model may have fewer of them.
        sampler=lambda logprobs: draw(logprobs[..., : loaded.vocab]),
        logits_processors=_processors(sampling) or None,
        completion_batch_size=len(conversations),
        prefill_batch_size=len(conversations),
    )
    written: dict[int, list[int]] = {}
    finished: dict[int, bool] = {}
    kept: dict[int, Cache] = {}
    drawn_logprobs: dict[int, list[float]] = {}
    try:
        # The generator merges caches into new arrays, so conversations stay as they are.
        uids = generator.insert(
            starts,
            max_tokens=[sampling.max_tokens] * len(starts),
            caches=caches,
            all_tokens=cached,
        )
        marks = {
            uid: cache
            for uid, cache, old, prompt in zip(uids, caches, conversations, prompts, strict=True)
            if options.mark
            and not _can_be_cut_back(cache, len(old.tokens) + len(prompt) + sampling.max_tokens)
        }
        while True:
            prompted, responses = generator.next()
            if not prompted and not responses:
                break
            for part in prompted:
                # The generator stops before a prompt's last token, which is a part of its own.
                if part.uid in marks and part.end_of_segment and not part.end_of_prompt:
                    marks[part.uid] = generator.extract_cache([part.uid])[part.uid][0]
                    mx.eval([layer.state for layer in marks[part.uid]])
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
    finally:
        generator.close()
    turns = []
    for uid, old, prompt, start in zip(uids, conversations, prompts, starts, strict=True):
        tokens = tuple(written[uid])
        text = tokens[:-1] if finished[uid] else tokens
        before = (*old.tokens, *prompt)
        mark = Mark(len(before) - 1, marks[uid]) if uid in marks else None
        turns.append(
            Turn(
                text=loaded.tokenizer.decode(list(text)).strip(),
                tokens=tokens,
                finished=finished[uid],
                conversation=Conversation((*before, *tokens), kept.get(uid), mark),
                prefilled=len(start),
                logprobs=tuple(drawn_logprobs.get(uid, ())),
            )
        )
    return turns


def _generate_alone(
    loaded: Loaded,
    old: Conversation,
    prompt: Sequence[int],
    sampling: Sampling,
    options: GenerateOptions,
) -> Turn:
    """One turn, for models that mlx-lm's batched generator does not get right."""
    before = [*old.tokens, *prompt]
    cache = copy.deepcopy(old.cache) if old.cache is not None else make_prompt_cache(loaded.model)
    start = [*prompt] if old.cache is not None else before

    def run(tokens: Sequence[int]) -> mx.array:
        logits: mx.array = loaded.model(mx.array([[*tokens]]), cache=cache)[:, -1]
        mx.eval([layer.state for layer in cache])
        return logits

    for begin in range(0, len(start) - 1, _PREFILL):
        run(start[begin : min(begin + _PREFILL, len(start) - 1)])
    kept = _can_be_cut_back(cache, len(before) + sampling.max_tokens)
    mark = Mark(len(before) - 1, copy.deepcopy(cache)) if options.mark and not kept else None
    draw, processors = _sampler(sampling), _processors(sampling)
    eos = set(loaded.tokenizer.eos_token_ids)
    written: list[int] = []
    logprobs: list[float] = []
    while len(written) < sampling.max_tokens and not (written and written[-1] in eos):
        logits = run([*before, *written][-1:])
        for process in processors:
            logits = process(mx.array([*before, *written]), logits)
        rows = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        token: Any = draw(rows[..., : loaded.vocab]).item()
        written.append(token)
        if options.logprobs:
            drawn = _logprobs(rows, [token], sampling.temperature or 1.0, loaded.vocab)
            logprobs += drawn
        if options.on_token is not None:
            options.on_token(1)
    if options.keep:
        run(written[-1:])
    finished = written[-1] in eos
    return Turn(
        text=loaded.tokenizer.decode(written[:-1] if finished else written).strip(),
        tokens=tuple(written),
        finished=finished,
        conversation=Conversation((*before, *written), cache if options.keep else None, mark),
        prefilled=len(start),
        logprobs=tuple(logprobs),
    )


def _processors(sampling: Sampling) -> list[Callable[[mx.array, mx.array], mx.array]]:
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


def _keep_logprobs(
    responses: Sequence[Any], temperature: float, vocab: int, drawn_logprobs: dict[int, list[float]]
) -> None:
    """Add the log-probability of each response's token to what is known of its turn."""
    rows = mx.stack([response.logprobs for response in responses])
    values = _logprobs(rows, [response.token for response in responses], temperature, vocab)
    for response, value in zip(responses, values, strict=True):
        drawn_logprobs.setdefault(response.uid, []).append(value)


def _logprobs(rows: mx.array, tokens: Sequence[int], temperature: float, vocab: int) -> list[float]:
    """Log-probabilities of tokens at a temperature, of rows [n, V] of log-probabilities at 1."""
    rows = rows[:, :vocab].astype(mx.float32) / temperature
    drawn = mx.take_along_axis(rows, mx.array([*tokens])[:, None], axis=-1).squeeze(-1)
    values: Any = (drawn - mx.logsumexp(rows, axis=-1)).tolist()
    return [*values]
