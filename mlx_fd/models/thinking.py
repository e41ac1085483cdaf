"""Whether a model thinks before it replies, and how: found in its chat template and its tokens.

A template ends a prompt in one of several ways: with a thought that it has opened itself
(DeepSeek-R1's distills), with one that it has closed at once (Qwen3 with ``enable_thinking`` off),
or with nothing, and then the model opens one itself or not. In the turns before, the template
leaves thoughts out. So three things may stand before a reply, and :class:`Thinking` knows them as
tokens: what a reply without a thought is written after, what a thought is written after, and what
the reply stands behind in later turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.models.chat_template import THINKING_SWITCHES, ChatTemplate
from mlx_fd.problems.thoughts import FAMILIES, Family, split

# What nobody says: where it stands in a rendered chat is where the template puts a message.
_ASKED, _SAID = "\u241fasked\u241f", "\u241fsaid\u241f"
_OTHER = "Why?"
# Tokens before a reply's that say where it begins: "<|im_start|>assistant\n".
_ANCHOR = 4


@dataclass(frozen=True)
class ThinkingOptions:
    """Whether a model shall think.

    Attributes:
        on: whether it shall.
        limit: the most tokens of a thought, which is closed there.
    """

    on: bool = False
    limit: int = 1024

    @property
    def tokens(self) -> int:
        """The most tokens that are thought before a text."""
        return self.limit if self.on else 0


NOT_THINKING = ThinkingOptions()


@dataclass(frozen=True)
class Thinking:
    """How a model thinks.

    Attributes:
        family: its marks.
        on: whether it shall.
        limit: the most tokens of a thought, which is closed there.
        tail: the text that its template ends a prompt with, where a reply could already stand.
        closed: the text that stands there instead, so that a reply begins.
        anchor: ids of the last tokens before that; the same in every prompt.
        closed_ids: ids of ``closed``.
        opened_ids: ids after which it thinks.
        visible_ids: ids that a reply stands behind in later turns.
        after_ids: ids between the mark that ends a thought and the reply.
        force_ids: ids that close a thought at its limit; with the mark, and all up to the reply.
        end_id: id of the mark that ends a thought; -1: it is several tokens.
        banned_id: the token that would begin a thought though none shall be; -1: there is none.
        tail_id: the first token that the template writes after a reply; -1: it writes nothing.
        turn_end_id: the same where it is a token of its own, which text never becomes; -1: it is
            not.
    """

    family: Family
    on: bool
    limit: int
    tail: str
    closed: str
    anchor: tuple[int, ...]
    closed_ids: tuple[int, ...]
    opened_ids: tuple[int, ...]
    visible_ids: tuple[int, ...]
    after_ids: tuple[int, ...]
    force_ids: tuple[int, ...]
    end_id: int
    banned_id: int
    tail_id: int
    turn_end_id: int

    def ready(self, prompt: str) -> str:
        """A rendered prompt's text, with any thought that the template has opened closed."""
        return (
            prompt.removesuffix(self.tail) + self.closed if prompt.endswith(self.tail) else prompt
        )

    def taken_apart(self, prompt: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """A ready prompt's tokens before ``closed_ids``, and those after, the reply's first.

        Returns:
            ``None`` where the prompt is not one of the template's.
        """
        sought, tokens = (*self.anchor, *self.closed_ids), tuple(prompt)
        if not sought:
            return None
        for place in range(len(tokens) - len(sought), -1, -1):
            if tokens[place : place + len(sought)] == sought:
                return tokens[: place + len(self.anchor)], tokens[place + len(sought) :]
        return None

    def after(
        self, drawn: Sequence[int], *, finished: bool
    ) -> tuple[bool, tuple[int, ...], tuple[int, ...]]:
        """How a reply goes on from a thought.

        Args:
            drawn: the thought's tokens, as the model drew them.
            finished: whether the model ended them itself (else the limit did).

        Returns:
            Whether the model ended its whole turn within the thought, so that nothing is said; the
            tokens that the reply is written after, in place of ``closed_ids``; and those of them
            that the model did not draw, which are still to be read.
        """
        within = finished and drawn[-1] != self.end_id
        closing = () if within else self.after_ids if finished else self.force_ids
        kept = drawn[:-1] if within else drawn
        return within, (*self.opened_ids, *kept, *closing), closing


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements two sequences begin with alike."""
    most = min(len(one), len(other))
    return next((k for k in range(most) if one[k] != other[k]), most)


def switched(template: ChatTemplate, on: bool) -> ChatTemplate:
    """A template told whether to let its model think, where it knows a variable for that."""
    name = _switch(template)
    return template.with_kwargs(**{name: on}) if name else template


def _switch(template: ChatTemplate) -> str | None:
    return next((name for name in THINKING_SWITCHES if template.knows(name)), None)


def family_of(template: ChatTemplate, vocab: Any) -> Family | None:
    """The family whose marks a model's template or tokens have; ``None``: it does not think.

    Args:
        template: the model's.
        vocab: its tokens, by text.
    """
    for family in FAMILIES:
        if family.start in template.source:
            return family
        if not family.starts_reply and family.end in template.source:
            return family
    # Tokens alone say less: a model may have those of another one that it was made from.
    return next((one for one in FAMILIES if all(token in vocab for token in one.tokens)), None)


@dataclass(frozen=True)
class _Frame:
    """What a template writes around a reply: the text before, and what may come between."""

    before: str
    tail: str
    visible: str


def _frame(
    render: Callable[[Sequence[str]], str], family: Family | None, message: str
) -> _Frame | None:
    """``None`` where the template does not write a first turn as it writes it later."""
    prompt, chat = render([message]), render([message, _SAID, message])
    before, found, _ = chat.partition(_SAID)
    place = prompt.rfind(message) + len(message)
    shared = shared_length(prompt, before)
    mark = before.find(family.start, place) if family else -1
    shared = min(shared, mark) if mark >= 0 else shared
    if not found or shared < place or not prompt[:place].endswith(message):
        return None
    return _Frame(prompt[:shared], prompt[shared:], before[shared:])


def check_tail(template: ChatTemplate, vocab: Any) -> None:
    """Make sure that a template puts nothing before a new reply but a thought that is known.

    It is compared with what stands before an earlier reply, where the template writes those.

    Args:
        template: the model's.
        vocab: its tokens, by text.

    Raises:
        UserError: something else stands there, such as a mark that begins thoughts of a new kind:
            what is thought would count as the reply.
    """
    family = family_of(template, vocab)
    try:
        frame = _frame(template.render, family, _ASKED)
    except UserError:  # as of a template for single turns
        return
    tail = frame.tail if frame else ""
    unknown = split(tail, family).reply if family else tail.strip()
    if unknown:
        raise UserError(
            f"{template.owner}: its chat template puts {unknown!r:.80} before a new reply and not "
            "before an earlier one, and what that begins is not understood (a thought, perhaps, "
            "which would count as the reply); use another model, or take it out of the template"
        )


def _closed(frame: _Frame, family: Family) -> str:
    """What a reply without a thought is written after."""
    if family.starts_reply and family.starts_reply in frame.visible:
        return frame.visible
    if family.end in frame.tail or family.start not in frame.tail:
        return frame.tail
    return frame.tail.partition(family.start)[0] + family.open + family.close + family.reply


def _opened(frame: _Frame, family: Family) -> str | None:
    """What a thought is written after; ``None`` where the template does not let one be."""
    if family.start in frame.tail:
        return None if family.end in frame.tail else frame.tail
    if family.end in frame.tail:
        return None
    head, mark, _ = frame.visible.partition(family.start)
    return frame.tail + (head + mark if mark else family.open)


def find(
    template: ChatTemplate, tokenizer: Any, *, on: bool = False, limit: int = 0
) -> Thinking | None:
    """How a model thinks; ``None``: it does not, as far as its template and its tokens show.

    Args:
        template: the model's, told whether it shall think (:func:`switched`).
        tokenizer: its tokenizer.
        on: whether it shall think.
        limit: the most tokens of a thought.

    Raises:
        UserError: it shall think, and cannot, or in a way that is not understood.
    """
    if not template.source:
        return None
    vocab = tokenizer.get_vocab()
    family = family_of(template, vocab)
    if family is None:
        if on:
            raise UserError(
                f"{template.owner} does not think: neither its chat template nor its tokens have "
                "marks of a thought; turn thinking off"
            )
        return None
    without = switched(template, False)
    frame, off = (_frame(one.render, family, _ASKED) for one in (template, without))
    other = _frame(template.render, family, _OTHER)
    if frame is None or other is None or off is None:
        if on:
            raise UserError(
                f"{template.owner}: where a thought begins and ends in its chat template is not "
                "understood; turn thinking off"
            )
        # Thoughts that come all the same are told from what is said.
        return Thinking(
            family=family,
            on=False,
            limit=limit,
            tail="",
            closed="",
            anchor=(),
            closed_ids=(),
            opened_ids=(),
            visible_ids=(),
            after_ids=(),
            force_ids=(),
            end_id=-1,
            banned_id=-1,
            tail_id=-1,
            turn_end_id=-1,
        )
    closed, opened = _closed(off, family), _opened(frame, family)
    if on and opened is None:
        raise UserError(
            f"{template.owner}: its chat template closes every thought at once, so that it cannot "
            "think; turn thinking off"
        )
    if on and family.end not in vocab:
        raise UserError(
            f"{template.owner}: {family.end} is not one token of its own, so that the end of a "
            "thought cannot be seen in time; turn thinking off"
        )

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    after = family.reply
    for text in (frame.visible, closed):
        if family.end in text:
            after = text.rpartition(family.end)[2]
            break
    texts = (closed, opened or closed, frame.visible)
    whole = [encode(frame.before + text) for text in texts]
    bare = encode(frame.before)
    bare = bare[: min(shared_length(bare, one) for one in whole)]
    common = len(bare)
    same = min(shared_length(bare[::-1], encode(other.before)[::-1]), _ANCHOR)
    anchor = bare[common - same :]
    closes = family.end in closed or bool(family.starts_reply)
    tail = encode(template.render([_ASKED, _SAID, _ASKED]).partition(_SAID)[2])
    return Thinking(
        family=family,
        on=on,
        limit=limit,
        tail=frame.tail,
        closed=closed,
        anchor=anchor,
        closed_ids=whole[0][common:],
        opened_ids=whole[1][common:],
        visible_ids=whole[2][common:],
        after_ids=encode(after),
        force_ids=encode(family.close + after),
        end_id=vocab.get(family.end, -1),
        banned_id=-1 if on or closes else vocab.get(family.tokens[0], -1),
        tail_id=tail[0] if tail else -1,
        turn_end_id=tail[0] if tail and tail[0] in tokenizer.get_added_vocab().values() else -1,
    )
