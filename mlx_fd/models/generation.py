"""The turns of a chat: prompts as the chat template writes them, thoughts, and replies.

A model that thinks (:mod:`mlx_fd.models.thinking`) writes each turn in two phases: a thought, then
the reply. The turn has both; the conversation goes on without the thought, as the chat template
leaves it out of later turns: its tokens and its cache are those of a chat in which it never was.
"""

from __future__ import annotations

import copy
import dataclasses
from bisect import bisect_left
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from mlx_fd.errors import UserError
from mlx_fd.models import metering
from mlx_fd.models.chat_template import check_conversation
from mlx_fd.models.conversation import Conversation, Mark, can_be_cut_back, prefill, rewind
from mlx_fd.models.loading import Loaded
from mlx_fd.models.merging import fused
from mlx_fd.models.stepping import in_step
from mlx_fd.models.thinking import Thinking, shared_length
from mlx_fd.models.writing import DEFAULTS, GenerateOptions, Sampling, Text, Turn, write
from mlx_fd.problems.thoughts import split

Result = TypeVar("Result")

Writing = Generator[Text, Turn, Result]
"""What asks for texts, is sent the turns that they became, and ends in something made of them."""

_SENTINEL = "\u241fanswer\u241f"


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
        accepted: as :class:`Turn` has it.
    """

    text: str
    opening: tuple[int, ...]
    conversation: Conversation
    rest: tuple[int, ...]
    prefilled: int
    written: int
    closed: bool
    end: tuple[int, float] | None
    accepted: int | None = None


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


def messages_prompt(loaded: Loaded, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
    """Tokens of a conversation of anyone's messages, up to where the reply begins.

    Args:
        loaded: whose template and tokens.
        messages: (role, text) of each: ``"system"``, ``"user"`` or ``"assistant"``.

    Raises:
        UserError: the template does not take such messages, or leaves out or changes what system
            or user say.
    """
    text, end = loaded.template.render_said(messages), 0
    for role, said in messages:
        begin = text.find(said.strip(), end)
        if begin >= 0:
            end = begin + len(said.strip())
        elif role != "assistant":  # of an assistant's message a thought may be left out
            raise UserError(
                f"{loaded.template.owner}: its chat template leaves out or changes what the {role} "
                "says in such a conversation"
            )
    ready = text if loaded.thinking is None else loaded.thinking.ready(text)
    return tuple(loaded.tokenizer.encode(ready, add_special_tokens=False))


def said(loaded: Loaded, message: str, reply: Sequence[int]) -> tuple[int, ...]:
    """Tokens of a conversation in which a user's first message got a reply.

    Args:
        loaded: whose template and tokens.
        message: what the user says.
        reply: the reply's tokens, without any thought.
    """
    return replied(loaded, first_prompt(loaded, message), reply)


def replied(loaded: Loaded, prompt: Sequence[int], reply: Sequence[int]) -> tuple[int, ...]:
    """Tokens of a conversation as it stands after a reply.

    Args:
        loaded: whose template and tokens.
        prompt: all tokens before the reply, as :func:`messages_prompt` gives them.
        reply: the reply's tokens, without any thought.
    """
    head, _ = _visible(loaded.thinking, tuple(prompt))
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


def generate(
    loaded: Loaded,
    conversations: Sequence[Conversation],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    options: GenerateOptions = DEFAULTS,
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
    pairs = [(old, tuple(prompt)) for old, prompt in zip(conversations, prompts, strict=True)]
    with ExitStack() as stack:
        stack.enter_context(metering.part(metering.WRITING))
        if loaded.draft is not None:
            stack.enter_context(fused(loaded.draft.loaded.model))
        # A model's weights are fused into layers that draw random ones first.
        mx.random.seed(sampling.seed)
        stack.enter_context(fused(loaded.model))
        if options.reuse:
            return _together(loaded, [turn(loaded, *pair, sampling, options) for pair in pairs])
        alone = dataclasses.replace(options, keep=False, mark=False)
        return [
            _together(loaded, [turn(loaded, Conversation(old.tokens), prompt, sampling, alone)])[0]
            for old, prompt in pairs
        ]


def think(
    loaded: Loaded,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    options: GenerateOptions = DEFAULTS,
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
    if loaded.thinking is None or not loaded.thinking.on:
        return [None] * len(prompts)
    mx.random.seed(sampling.seed)
    size = len(prompts) if options.reuse else 1
    found: list[Thought | None] = []
    for begin in range(0, len(prompts), size):
        some = map(tuple, prompts[begin : begin + size])
        works = [thought_before(loaded, one, sampling, options) for one in some]
        found += _together(loaded, works)
    return found


def thought_before(
    loaded: Loaded, prompt: tuple[int, ...], sampling: Sampling, options: GenerateOptions
) -> Writing[Thought | None]:
    """What :func:`think` does before one reply.

    Yields:
        The text that is to be written, as :func:`turn` does.
    """
    thinking = loaded.thinking
    if thinking is None or not thinking.on:
        return None
    start = _Start(Conversation(), prompt)
    going_on = dataclasses.replace(options, keep=False)
    return (yield from _thought(loaded, thinking, start, sampling, going_on))


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
        accepted=_sum(turn.accepted, thought.accepted),
    )
    if thought.end is None:
        return turn
    # The turn ended within its thought: nothing was said.
    token, logprob = thought.end
    logprobs = (logprob,) if turn.logprobs else ()
    return dataclasses.replace(
        turn, text="", tokens=(token,), finished=True, logprobs=logprobs, states=()
    )


def _sum(*counts: int | None) -> int | None:
    """The sum of what there is; ``None`` where there is nothing."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


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


def turn(
    loaded: Loaded,
    conversation: Conversation,
    prompt: tuple[int, ...],
    sampling: Sampling,
    options: GenerateOptions,
) -> Writing[Turn]:
    """One turn: a thought, then the reply; the conversation has what the template leaves of both.

    Yields:
        Each text that the model is to write, to be sent the turn that it became.
    """
    thinking = loaded.thinking
    if thinking is None:
        return (yield Text(conversation, prompt, sampling, options))
    start = _Start(conversation, prompt)
    if options.keep:
        start = _start(loaded, thinking, conversation, prompt, sampling)
    thought, going_on = None, start
    if thinking.on:
        going_on_from = dataclasses.replace(options, keep=True)
        thought = yield from _thought(loaded, thinking, start, sampling, going_on_from)
        going_on = _Start(thought.conversation, thought.rest)
    if thought is not None and thought.end is not None:
        logprobs = (0.0,) if options.logprobs else ()
        made = Turn("", (), True, thought.conversation, 0, logprobs)
    else:
        ends = frozenset((thinking.turn_end_id,)) - {-1}
        made = yield Text(going_on.conversation, going_on.prompt, sampling, options, ends)
    made = without_thoughts(loaded, thinking, after_thought(made, thought))
    made = dataclasses.replace(made, prefilled=made.prefilled + start.prefilled)
    said = (*conversation.tokens, *_said(thinking, prompt, made))
    moved = Conversation(said)
    if options.keep:
        moved = _moved(loaded, made.conversation, said, start.base)
    return dataclasses.replace(made, conversation=moved)


def _together(loaded: Loaded, works: Sequence[Writing[Result]]) -> list[Result]:
    """What comes of turns that are written side by side, thoughts with thoughts."""
    return in_step(works, lambda texts: write(loaded, texts))


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
    if can_be_cut_back(cache, most):
        return _Start(old, prompt)
    head = apart[0]
    _, base = prefill(loaded, old, head)
    rest = (head[-1], *prompt[len(head) :])
    return _Start(base, rest, len(head) - 1 + (len(old.tokens) if old.cache is None else 0), base)


def _thought(
    loaded: Loaded,
    thinking: Thinking,
    start: _Start,
    sampling: Sampling,
    options: GenerateOptions,
) -> Writing[Thought]:
    """The first phase: the model thinks until it ends its thought, or to the limit."""
    apart = thinking.taken_apart((*start.conversation.tokens, *start.prompt))
    if apart is None:
        raise UserError(
            f"{loaded.path}: a prompt ends otherwise than the chat template's prompts do, so that "
            "there is no place for a thought; turn thinking off"
        )
    head, begun = apart[0][len(start.conversation.tokens) :], apart[1]
    made = yield Text(
        start.conversation,
        (*head, *thinking.opened_ids),
        dataclasses.replace(sampling, max_tokens=thinking.limit),
        dataclasses.replace(options, mark=False, logprobs=True, states=False),
        frozenset((thinking.end_id,)),
    )
    last = made.tokens[-1]
    within, opening, closing = thinking.after(made.tokens, finished=made.finished)
    end = (last, made.logprobs[-1]) if within else None
    conversation, rest = made.conversation, (*closing, *begun)
    if not rest:  # something has to be read, for the reply's first token to be drawn
        conversation, rest = rewind(conversation, len(conversation.tokens) - 1), (last,)
    return Thought(
        text=made.text,
        opening=opening,
        conversation=conversation,
        rest=rest,
        prefilled=made.prefilled,
        written=made.written,
        closed=not made.finished,
        end=end,
        accepted=made.accepted,
    )


def _said(thinking: Thinking, prompt: tuple[int, ...], turn: Turn) -> tuple[int, ...]:
    """What a turn adds to its conversation: prompt and reply as later turns have them."""
    head, begun = _visible(thinking, prompt)
    return (*head, *begun, *_as_ended(thinking, turn.tokens, ended=turn.finished))


def _as_ended(thinking: Thinking | None, reply: tuple[int, ...], *, ended: bool) -> tuple[int, ...]:
    """A reply as it stands in later turns: a template may end it in another way than the model."""
    if thinking is None or not reply or not ended or thinking.tail_id in (-1, reply[-1]):
        return reply
    return reply[:-1]


def without_thoughts(loaded: Loaded, thinking: Thinking, turn: Turn) -> Turn:
    """A turn whose reply has no thought in it; unchanged where it had none.

    Args:
        loaded: who wrote it.
        thinking: the marks of its thoughts.
        turn: as it was written.
    """
    decode, tokens = loaded.tokenizer.decode, turn.tokens
    whole = list(tokens[:-1] if turn.finished else tokens)
    text = decode(whole)
    if thinking.family.marks.search(text) is None:
        return turn
    found = split(text, thinking.family)

    def writing(end: int) -> int:
        """How many tokens it takes to write the text up to ``end``, whole characters of it."""
        counts = range(len(whole) + 1)
        return bisect_left(
            counts, True, key=lambda count: decode(whole[:count]).startswith(text[:end])
        )

    first, last = writing(found.begin), writing(found.end)
    if len(decode(whole[:first])) > found.begin:  # a token of both
        first -= 1
    kept = list(range(first, last)) if found.reply else []
    if turn.finished or not kept:  # a reply has a token, if only the one at which it stopped
        kept.append(len(tokens) - 1)
    return dataclasses.replace(
        turn,
        text=found.reply,
        tokens=tuple(tokens[k] for k in kept),
        logprobs=tuple(turn.logprobs[k] for k in kept) if turn.logprobs else (),
        thought=_joined(turn.thought, found.thought),
        states=(),
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
