"""Batched generation over growing conversations, on mlx-lm's generator and prompt caches.

A conversation is the tokens so far and the keys and values of exactly those tokens. Each turn adds
only its own tokens, so nothing is prefilled twice; ``reuse=False`` prefills everything again, the
naive way that tests and benchmarks compare with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_fd.config import GenerationOptions
from mlx_fd.errors import UserError
from mlx_fd.models import chat_template, taps
from mlx_fd.models.loading import Loaded

Cache = list[Any]
# mlx-lm's penalty looks at the last 20 tokens; the published ones at all.
_WHOLE_CONTEXT = 1 << 20
_SENTINEL = "\u241fanswer\u241f"


@dataclass(frozen=True)
class Conversation:
    """Tokens so far, and the prompt cache that holds exactly them (``None``: not kept).

    Conversations are values: generating from one leaves it as it was.
    """

    tokens: tuple[int, ...] = ()
    cache: Cache | None = None


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


def first_prompt(tokenizer: Any, message: str) -> tuple[int, ...]:
    """Tokens of a conversation's first user message, up to where the assistant begins."""
    with chat_template.rendering(tokenizer):
        return tuple(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": message}], tokenize=True, **chat_template.ARGUMENTS
            )
        )


def chat_text(tokenizer: Any, turns: Sequence[str]) -> str:
    """A conversation as the chat template writes it, up to where the assistant begins.

    Args:
        tokenizer: whose template it is.
        turns: what user and assistant say in turn; the user's are first and last.
    """
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(turns)
    ]
    with chat_template.rendering(tokenizer):
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, **chat_template.ARGUMENTS)
        )


def followup_prompt(tokenizer: Any, message: str) -> tuple[int, ...]:
    """Tokens from the end of an assistant's turn, over a user message, to the assistant's next.

    They begin with the end-of-turn token. Text that the assistant wrote is never tokenised again,
    so the conversation keeps the very tokens that were generated.
    """
    _, separator, tail = chat_text(tokenizer, ["?", _SENTINEL, message]).partition(_SENTINEL)
    if not separator:
        raise UserError(
            f"{getattr(tokenizer, 'name_or_path', 'the model')}: its chat template leaves out what "
            "the assistant said, so that no conversation can go on; take an Instruct model's"
        )
    return tuple(tokenizer.encode(tail, add_special_tokens=False))


def without_repeated_eos(conversation: Conversation, turn: tuple[int, ...]) -> tuple[int, ...]:
    """A :func:`followup_prompt` without the tokens that the conversation ends with already."""
    ended = conversation.tokens and turn and conversation.tokens[-1] == turn[0]
    return turn[1:] if ended else turn


def rewind(conversation: Conversation, length: int) -> Conversation:
    """The conversation's first ``length`` tokens, with a cache of its own where one can be cut."""
    cache = conversation.cache
    if cache is None or not can_trim_prompt_cache(cache):
        return Conversation(conversation.tokens[:length])
    cache = copy.deepcopy(cache)
    trim_prompt_cache(cache, len(conversation.tokens) - length)
    return Conversation(conversation.tokens[:length], cache)


def forward(loaded: Loaded, conversation: Conversation, tokens: Sequence[int]) -> taps.Forward:
    """Hidden states [1, len(tokens), d] of ``tokens`` after a conversation, left unchanged."""
    return forward_with_cache(loaded, conversation, tokens)[0]


def forward_with_cache(
    loaded: Loaded, conversation: Conversation, tokens: Sequence[int]
) -> tuple[taps.Forward, Cache]:
    """:func:`forward`, and the prompt cache after it, of the conversation and ``tokens``."""
    cache = copy.deepcopy(conversation.cache)
    if cache is not None:
        return taps.forward(loaded.model, mx.array([*tokens])[None], cache), cache
    cache = make_prompt_cache(loaded.model)
    whole = taps.forward(loaded.model, mx.array([*conversation.tokens, *tokens])[None], cache)
    begin = len(conversation.tokens)
    return taps.Forward([layer[:, begin:] for layer in whole.layers], whole.final[:, begin:]), cache


def prefill(
    loaded: Loaded, conversation: Conversation, prompt: Sequence[int], *, reuse: bool = True
) -> tuple[mx.array, Conversation]:
    """Run a prompt through the model.

    Returns:
        The final hidden state [d] of the prompt's last token, and the conversation with the
        prompt but for that token: what :func:`generate` wants to go on from.
    """
    tokens = (*conversation.tokens, *prompt)
    cache = copy.deepcopy(conversation.cache) if reuse else None
    start = len(conversation.tokens) if cache is not None else 0
    if cache is None:
        cache = make_prompt_cache(loaded.model)
    final = taps.forward(loaded.model, mx.array(tokens[start:])[None], cache).final[0, -1]
    mx.eval(final, [layer.state for layer in cache])
    if not reuse:
        return final, Conversation(tokens[:-1])
    return final, rewind(Conversation(tokens, cache), len(tokens) - 1)


def generate(
    loaded: Loaded,
    conversations: Sequence[Conversation],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    reuse: bool = True,
    keep: bool = True,
    logprobs: bool = False,
    on_token: Callable[[int], None] | None = None,
) -> list[Turn]:
    """Let the model write the next turn of each conversation.

    Args:
        loaded: who writes; rows of its logits beyond ``vocab`` are never drawn.
        conversations: what was said so far.
        prompts: the new tokens of each, at least one.
        sampling: how to draw, and the most tokens to write.
        reuse: go on from the conversations' caches, all together; ``False`` takes them one by one
            and prefills everything.
        keep: keep the caches, to go on from the turns; not where nobody will.
        logprobs: keep the tokens' log-probabilities.
        on_token: called with the number of tokens written in each step, for progress.

    Returns:
        One turn for each conversation, in order.
    """
    if not conversations:
        return []
    mx.random.seed(sampling.seed)
    write = partial(_generate, loaded, sampling=sampling, logprobs=logprobs, on_token=on_token)
    if reuse:
        return write(conversations, prompts, keep_cache=keep)
    return [
        write([Conversation(old.tokens)], [prompt], keep_cache=False)[0]
        for old, prompt in zip(conversations, prompts, strict=True)
    ]


def _generate(
    loaded: Loaded,
    conversations: Sequence[Conversation],
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    keep_cache: bool,
    logprobs: bool,
    on_token: Callable[[int], None] | None,
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
    penalty = sampling.repetition_penalty
    draw = _sampler(sampling)
    generator = BatchGenerator(
        loaded.model,
        stop_tokens=[[token] for token in eos],
        # Rows beyond the tokenizer are padding, and the other model may have fewer of them.
        sampler=lambda logprobs: draw(logprobs[..., : loaded.vocab]),
        logits_processors=make_logits_processors(
            repetition_penalty=penalty, repetition_context_size=_WHOLE_CONTEXT
        )
        if penalty != 1
        else None,
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
        while responses := generator.next_generated():
            if logprobs:
                _keep_logprobs(responses, sampling.temperature or 1.0, loaded.vocab, drawn_logprobs)
            for response in responses:
                written.setdefault(response.uid, []).append(response.token)
                if response.finish_reason is not None:
                    finished[response.uid] = response.finish_reason == "stop"
                    if keep_cache:
                        # Lazy slices would hold the whole batch's cache of this very step.
                        mx.eval([layer.state for layer in response.prompt_cache])
                        kept[response.uid] = response.prompt_cache
            if on_token is not None:
                on_token(len(responses))
    finally:
        generator.close()
    turns = []
    for uid, old, prompt, start in zip(uids, conversations, prompts, starts, strict=True):
        tokens = tuple(written[uid])
        text = tokens[:-1] if finished[uid] else tokens
        turns.append(
            Turn(
                text=loaded.tokenizer.decode(list(text)).strip(),
                tokens=tokens,
                finished=finished[uid],
                conversation=Conversation((*old.tokens, *prompt, *tokens), kept.get(uid)),
                prefilled=len(start),
                logprobs=tuple(drawn_logprobs.get(uid, ())),
            )
        )
    return turns


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
    rows = mx.stack([response.logprobs[:vocab] for response in responses]).astype(mx.float32)
    rows = rows / temperature
    tokens = mx.array([response.token for response in responses])
    drawn = mx.take_along_axis(rows, tokens[:, None], axis=-1).squeeze(-1)
    values: Any = (drawn - mx.logsumexp(rows, axis=-1)).tolist()
    for response, value in zip(responses, values, strict=True):
        drawn_logprobs.setdefault(response.uid, []).append(value)
