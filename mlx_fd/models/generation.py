"""Batched generation over growing conversations, on mlx-lm's generator and prompt caches.

A conversation is the tokens so far and the model's state after exactly those tokens. Each turn adds
only its own tokens, so nothing is prefilled twice; ``reuse=False`` prefills everything again, the
naive way that tests and benchmarks compare with.

Keys and values can be cut back to any length. The state of a recurrence cannot, nor can a sliding
window that has run full; there a copy is made where somebody will come back to.

A model that thinks (:mod:`mlx_fd.models.thinking`) writes each turn in two phases: a thought, then
the reply. The turn has both; the conversation goes on without the thought, as the chat template
leaves it out of later turns: its tokens and its cache are those of a chat in which it never was.
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
from mlx_fd.errors import UserError
from mlx_fd.models.chat_template import check_conversation
from mlx_fd.models.loading import Loaded
from mlx_fd.models.thinking import Thinking, shared_length
from mlx_fd.models.view import Forward
from mlx_fd.problems.thoughts import split

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


@dataclass(frozen=True)
class Thought:
    """A thought, and where the reply goes on from it.

    Attributes:
        text: what was thought, without marks.
        opening: as :class:`Turn` has it.
        conversation: the conversation up to where the reply begins, but for the tokens of ``rest``.
        rest: tokens to be read before the reply, at least one.
        prefilled: prompt tokens that had to be run through the model for it.
        written: how many tokens the model drew.
        closed: whether it was closed by force, at its limit.
        end: the token that ended the whole turn within the thought, and its log-probability;
            ``None``: the reply can begin.
    """

    text: str
    opening: tuple[int, ...]
    conversation: Conversation
    rest: tuple[int, ...]
    prefilled: int
    written: int
    closed: bool
    end: tuple[int, float] | None


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
    """Tokens of a conversation's first user message, up to where the reply begins.

    Args:
        loaded: whose template and tokens.
        message: what the user says.
    """
    text = chat_text(loaded, [message])
    return tuple(loaded.tokenizer.encode(text, add_special_tokens=False))


def chat_text(loaded: Loaded, turns: Sequence[str]) -> str:
    """A conversation as the chat template writes it, up to where the reply begins.

    A thought that the template opens is closed.

    Args:
        loaded: whose template.
        turns: what user and assistant say in turn; the user's are first and last.
    """
    text = loaded.template.render(turns)
    return text if loaded.thinking is None else loaded.thinking.ready(text)


def said(loaded: Loaded, message: str, reply: Sequence[int]) -> tuple[int, ...]:
    """Tokens of a conversation in which a user's first message got a reply.

    Args:
        loaded: whose template and tokens.
        message: what the user says.
        reply: the reply's tokens, without any thought.
    """
    head, _ = _visible(loaded.thinking, first_prompt(loaded, message))
    ends = {*loaded.tokenizer.eos_token_ids}
    return (*head, *_as_ended(loaded.thinking, tuple(reply), ended=ends.issuperset(reply[-1:])))


def with_thought(loaded: Loaded, prompt: Sequence[int], opening: Sequence[int]) -> tuple[int, ...]:
    """A prompt with a thought at its end, after which a reply was written.

    Args:
        loaded: whose template and tokens.
        prompt: all tokens before the reply, as :func:`first_prompt` and the others give them.
        opening: as :class:`Turn` has it; empty: the prompt stays as it is.
    """
    apart = loaded.thinking.taken_apart(prompt) if loaded.thinking else None
    if apart is None or not opening:
        return tuple(prompt)
    return (*apart[0], *opening, *apart[1])


def _visible(
    thinking: Thinking | None, prompt: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt as it stands in later turns, and the reply's first tokens at its end."""
    apart = thinking.taken_apart(prompt) if thinking else None
    if thinking is None or apart is None:
        return tuple(prompt), ()
    return (*apart[0], *thinking.visible_ids), apart[1]


def followup_prompt(loaded: Loaded, message: str) -> tuple[int, ...]:
    """Tokens from the end of an assistant's turn, over a user message, to the next reply.

    They begin with the end-of-turn token. Text that the assistant wrote is never tokenised again,
    so the conversation keeps the very tokens that were generated.

    Args:
        loaded: whose template and tokens.
        message: what the user says.

    Raises:
        UserError: the template does not keep what was said in earlier turns.
    """
    check_conversation(loaded.template)
    text = chat_text(loaded, ["?", _SENTINEL, message])
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


def rewind_to(conversation: Conversation, tokens: Sequence[int]) -> Conversation:
    """As much of a conversation as some tokens begin with, too, but never all of the tokens."""
    length = min(shared_length(conversation.tokens, tokens), len(tokens) - 1)
    cut, mark = rewind(conversation, length), conversation.mark
    if cut.cache is None and mark is not None and mark.length < length:
        return rewind(conversation, mark.length)
    return cut


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
    if options.reuse:
        return _turns(loaded, conversations, prompts, sampling, options)
    alone = dataclasses.replace(options, keep=False, mark=False)
    return [
        _turns(loaded, [Conversation(old.tokens)], [prompt], sampling, alone)[0]
        for old, prompt in zip(conversations, prompts, strict=True)
    ]


def think(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    options: GenerateOptions = _DEFAULTS,
) -> list[Thought | None]:
    """Let a model think before replies that are written apart (:func:`replying`).

    Args:
        loaded: who thinks.
        prompts: all tokens before each reply.
        sampling: how to draw.
        options: whether all go together, and who is told.

    Returns:
        One thought for each prompt, in order; ``None`` where the model does not think.
    """
    thinking = loaded.thinking
    if thinking is None or not thinking.on:
        return [None] * len(prompts)
    mx.random.seed(sampling.seed)
    size = len(prompts) if options.reuse else 1
    found: list[Thought | None] = []
    for begin in range(0, len(prompts), size):
        starts = [_Start(Conversation(), tuple(one)) for one in prompts[begin : begin + size]]
        found += _thoughts(
            loaded, thinking, starts, sampling, dataclasses.replace(options, keep=False)
        )
    return found


def replying(loaded: Loaded) -> Loaded:
    """A model whose thoughts are in its prompts already (:func:`think`, :func:`with_thought`)."""
    if loaded.thinking is None:
        return loaded
    return dataclasses.replace(loaded, thinking=dataclasses.replace(loaded.thinking, on=False))


def after_thought(turn: Turn, thought: Thought | None) -> Turn:
    """A turn that was written after a thought, with the thought in it."""
    if thought is None:
        return turn
    turn = dataclasses.replace(
        turn,
        thought=_joined(thought.text, turn.thought),
        opening=thought.opening,
        prefilled=turn.prefilled + thought.prefilled,
        written=turn.written + thought.written,
        closed=thought.closed,
    )
    if thought.end is None:
        return turn
    # The turn ended within its thought: nothing was said.
    token, logprob = thought.end
    logprobs = (logprob,) if turn.logprobs else ()
    return dataclasses.replace(turn, text="", tokens=(token,), finished=True, logprobs=logprobs)


def _joined(*thoughts: str) -> str:
    return "\n".join(filter(None, thoughts))


@dataclass(frozen=True)
class _Start:
    """Where a turn is written from.

    Attributes:
        conversation: what is read already.
        prompt: what is to be read.
        prefilled: tokens that had to be read to get here.
        base: a state before the thought, to go back to, where a cache cannot be cut back.
    """

    conversation: Conversation
    prompt: tuple[int, ...]
    prefilled: int = 0
    base: Conversation | None = None


def _turns(
    loaded: Loaded,
    conversations: Sequence[Conversation],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    options: GenerateOptions,
) -> list[Turn]:
    """Thoughts, then replies; the conversations have what the template leaves of both."""
    thinking = loaded.thinking
    if thinking is None:
        return _generate(loaded, conversations, prompts, sampling, options)
    pairs = list(zip(conversations, map(tuple, prompts), strict=True))
    starts = [_Start(*pair) for pair in pairs]
    if options.keep:
        starts = [_start(loaded, thinking, *pair, sampling) for pair in pairs]
    ends = frozenset((thinking.turn_end_id,)) - {-1}
    thoughts: list[Thought | None] = [None] * len(starts)
    going_on = starts
    if thinking.on:
        going_on_from = dataclasses.replace(options, keep=True)
        found = _thoughts(loaded, thinking, starts, sampling, going_on_from)
        thoughts = [*found]
        going_on = [_Start(one.conversation, one.rest) for one in found if one.end is None]
    written = iter(
        _generate(
            loaded,
            [start.conversation for start in going_on],
            [start.prompt for start in going_on],
            sampling,
            options,
            ends,
        )
    )
    turns = []
    for (old, prompt), start, thought in zip(pairs, starts, thoughts, strict=True):
        if thought is not None and thought.end is not None:
            logprobs = (0.0,) if options.logprobs else ()
            turn = Turn("", (), True, thought.conversation, 0, logprobs)
        else:
            turn = next(written)
        turn = _without_thoughts(loaded, thinking, after_thought(turn, thought))
        turn = dataclasses.replace(turn, prefilled=turn.prefilled + start.prefilled)
        said = (*old.tokens, *_said(thinking, prompt, turn))
        conversation = Conversation(said)
        if options.keep:
            conversation = _moved(loaded, turn.conversation, said, start.base)
        turns.append(dataclasses.replace(turn, conversation=conversation))
    return turns


def _start(
    loaded: Loaded,
    thinking: Thinking,
    old: Conversation,
    prompt: tuple[int, ...],
    sampling: Sampling,
) -> _Start:
    """Where a turn is written from whose conversation will be kept without its thought."""
    apart = thinking.taken_apart(prompt)
    if apart is None or (not thinking.on and thinking.closed_ids == thinking.visible_ids):
        return _Start(old, prompt)
    most = len(old.tokens) + len(prompt) + sampling.max_tokens
    most += thinking.limit + len(thinking.opened_ids) + len(thinking.force_ids)
    cache = old.cache if old.cache is not None else make_prompt_cache(loaded.model)
    if _can_be_cut_back(cache, most):
        return _Start(old, prompt)
    head = apart[0]
    _, base = prefill(loaded, old, head)
    rest = (head[-1], *prompt[len(head) :])
    return _Start(base, rest, len(head) - 1 + (len(old.tokens) if old.cache is None else 0), base)


def _thoughts(
    loaded: Loaded,
    thinking: Thinking,
    starts: Sequence[_Start],
    sampling: Sampling,
    options: GenerateOptions,
) -> list[Thought]:
    """The first phase: the model thinks until it ends its thought, or to the limit."""
    whole = [thinking.taken_apart((*one.conversation.tokens, *one.prompt)) for one in starts]
    parts = [
        (part[0][len(one.conversation.tokens) :], part[1])
        for part, one in zip(whole, starts, strict=True)
        if part is not None
    ]
    if len(parts) < len(starts):
        raise UserError(
            f"{loaded.path}: a prompt ends otherwise than the chat template's prompts do, so that "
            "there is no place for a thought; turn thinking off"
        )
    turns = _generate(
        loaded,
        [one.conversation for one in starts],
        [(*head, *thinking.opened_ids) for head, _ in parts],
        dataclasses.replace(sampling, max_tokens=thinking.limit),
        dataclasses.replace(options, mark=False, logprobs=True),
        frozenset((thinking.end_id,)),
    )
    thoughts = []
    for turn, (_, begun) in zip(turns, parts, strict=True):
        last = turn.tokens[-1]
        ended = turn.finished and last == thinking.end_id
        end = None if ended or not turn.finished else (last, turn.logprobs[-1])
        drawn = turn.tokens[:-1] if end else turn.tokens
        closing = () if end else thinking.after_ids if ended else thinking.force_ids
        conversation, rest = turn.conversation, (*closing, *begun)
        if not rest:  # something has to be read, for the reply's first token to be drawn
            conversation, rest = rewind(conversation, len(conversation.tokens) - 1), (last,)
        thoughts.append(
            Thought(
                text=turn.text,
                opening=(*thinking.opened_ids, *drawn, *closing),
                conversation=conversation,
                rest=rest,
                prefilled=turn.prefilled,
                written=turn.written,
                closed=not turn.finished,
                end=end,
            )
        )
    return thoughts


def _said(thinking: Thinking, prompt: tuple[int, ...], turn: Turn) -> tuple[int, ...]:
    """What a turn adds to its conversation: prompt and reply as later turns have them."""
    head, begun = _visible(thinking, prompt)
    return (*head, *begun, *_as_ended(thinking, turn.tokens, ended=turn.finished))


def _as_ended(thinking: Thinking | None, reply: tuple[int, ...], *, ended: bool) -> tuple[int, ...]:
    """A reply as it stands in later turns: a template may end it in another way than the model."""
    if thinking is None or not reply or not ended or thinking.tail_id in (-1, reply[-1]):
        return reply
    return reply[:-1]


def _without_thoughts(loaded: Loaded, thinking: Thinking, turn: Turn) -> Turn:
    """A turn whose reply has no thought in it; unchanged where it had none."""
    decode, tokens = loaded.tokenizer.decode, turn.tokens
    whole = list(tokens[:-1] if turn.finished else tokens)
    text = decode(whole)
    if thinking.family.marks.search(text) is None:
        return turn
    found = split(text, thinking.family)
    lengths = [len(decode(whole[:count])) for count in range(len(whole) + 1)]
    first = max(k for k, length in enumerate(lengths) if length <= found.begin)
    last = min(k for k, length in enumerate(lengths) if length >= found.end)
    kept = list(range(first, last)) if found.reply else []
    if turn.finished or not kept:  # a reply has a token, if only the one at which it stopped
        kept.append(len(tokens) - 1)
    return dataclasses.replace(
        turn,
        text=found.reply,
        tokens=tuple(tokens[k] for k in kept),
        logprobs=tuple(turn.logprobs[k] for k in kept) if turn.logprobs else (),
        thought=_joined(turn.thought, found.thought),
    )


def _moved(
    loaded: Loaded, written: Conversation, tokens: tuple[int, ...], base: Conversation | None
) -> Conversation:
    """A conversation of other tokens than were written, with a cache of exactly them.

    Args:
        loaded: whose conversation.
        written: what was read and written, thoughts included.
        tokens: what is left of it.
        base: an earlier state, where that of ``written`` cannot be cut back.
    """
    if written.tokens == tokens:
        return written
    mark = None
    if base is not None and base.cache is not None:
        mark = Mark(len(base.tokens), base.cache)
        cut = Conversation(base.tokens, copy.deepcopy(base.cache))
    else:
        cut = rewind(written, shared_length(written.tokens, tokens))
    if cut.cache is None:
        return Conversation(tokens)
    if rest := tokens[len(cut.tokens) :]:
        loaded.model(mx.array(rest)[None], cache=cut.cache)
        mx.eval([layer.state for layer in cut.cache])
    return Conversation(tokens, cut.cache, mark)


def _generate(
    loaded: Loaded,
    conversations: Sequence[Conversation],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    options: GenerateOptions,
    ends: frozenset[int] = frozenset(),
) -> list[Turn]:
    """Let the model write until an end-of-turn token, or one of ``ends``."""
    if not conversations:
        return []
    if not loaded.batched:
        return [
            _generate_alone(loaded, old, prompt, sampling, options, ends)
            for old, prompt in zip(conversations, prompts, strict=True)
        ]
    eos = {*loaded.tokenizer.eos_token_ids, *ends}
    starts = [
        list(prompt) if old.cache is not None else [*old.tokens, *prompt]
        for old, prompt in zip(conversations, prompts, strict=True)
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
                written=len(tokens),
            )
        )
    return turns


def _generate_alone(
    loaded: Loaded,
    old: Conversation,
    prompt: Sequence[int],
    sampling: Sampling,
    options: GenerateOptions,
    ends: frozenset[int],
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
    draw, processors = _drawing(loaded, sampling), _processors(sampling)
    eos = {*loaded.tokenizer.eos_token_ids, *ends}
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
        written=len(written),
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
    values = _logprobs(rows, [response.token for response in responses], temperature, vocab)
    for response, value in zip(responses, values, strict=True):
        drawn_logprobs.setdefault(response.uid, []).append(value)


def _logprobs(rows: mx.array, tokens: Sequence[int], temperature: float, vocab: int) -> list[float]:
    """Log-probabilities of tokens at a temperature, of rows [n, V] of log-probabilities at 1."""
    rows = rows[:, :vocab].astype(mx.float32) / temperature
    drawn = mx.take_along_axis(rows, mx.array([*tokens])[:, None], axis=-1).squeeze(-1)
    values: Any = (drawn - mx.logsumexp(rows, axis=-1)).tolist()
    return [*values]
