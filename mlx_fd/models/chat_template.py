"""How a chat is written for a model, as a value that travels with a run.

A student knows one way of writing a chat: that in which it was trained, which is its expert's. So
the template is no property of a directory here: :class:`ChatTemplate` is read from one once
(:func:`mlx_fd.models.tokenizer.open_template`), with what else decides what it writes (the special
tokens it names, the user's further variables, the day it may print), is kept by the run, and is
what everything after the training writes its prompts with.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import keyword
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.models import template_sandbox
from mlx_fd.models.storage import read_json

DEFAULT_DATE = "2024-07-26"
"""The day that templates print outside of a run: the one that Llama's print where none is given."""
# What every rendering sets itself; tools would choose another template.
_RESERVED = frozenset(
    {"messages", "add_generation_prompt", "tools", "documents", template_sandbox.CLOCK}
)
THINKING_SWITCHES = ("enable_thinking", "thinking")
"""The variables that turn thinking on and off in published templates."""
_NAMED_DEFAULT = "default"
# Texts that a template must write as they are: quotes, markup and line ends are where some do not.
_ASKED = 'What is 1 + 2,\nif "1 < 2" & so on?'
_CHAT = (_ASKED, "It is 3.", "Is that right?", "Yes, 1 + 2 = 3.", "And what is 2 + 3?")
# What nobody says: where it stands in a rendered chat is where the template puts a message.
_REPLY, _NEXT = "\u241fsaid\u241f", "\u241fnext\u241f"
# Ways to hand over messages, the usual one first: (content as a list of parts, with a system
# message that says nothing).
_FORMS = ((False, False), (True, False), (False, True), (True, True))


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with everything that decides what it writes.

    A model of a run is given one by :func:`mlx_fd.models.loading.load` and carries it in
    ``Loaded.template``. Roles may differ in ``kwargs`` alone: what only the expert, or only the
    student, shall have is added with :meth:`with_kwargs` where the pair is opened
    (:mod:`mlx_fd.feedback.pair`), as in
    ``dataclasses.replace(expert, template=plan.template.with_kwargs(language="German"))``.
    :meth:`knows` says whether the template reads such a variable at all.

    Attributes:
        source: Jinja's source; empty: there is none, as in a base model.
        special_tokens: texts by name, as in ``{"eos_token": "<|im_end|>"}``.
        kwargs: further variables (``chat_template_kwargs``), JSON values.
        date: the day that the template prints where it asks for the date, ``YYYY-MM-DD``.
        end_tokens: ids of the tokens that end a turn; empty: those of the tokenizer at hand.
        parts: whether it takes a message's content as a list of parts.
        system: whether it cannot do without a system message; then there is an empty one.
        owner: the model's or the run's directory, for errors.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str = DEFAULT_DATE
    end_tokens: tuple[int, ...] = ()
    parts: bool = False
    system: bool = False
    owner: str = field(default="the model", compare=False)

    def render(self, turns: Sequence[str]) -> str:
        """A chat's text, up to where the assistant begins.

        Args:
            turns: what user and assistant say in turn; the user's are first and last.

        Raises:
            UserError: there is no template, or it cannot be rendered, takes too long, or writes
                too much.
        """
        return self.render_said(_in_turn(turns))

    def render_said(self, said: Sequence[tuple[str, str]]) -> str:
        """A chat's text, up to where the assistant begins; anyone may have spoken.

        Args:
            said: (role, text) of each message.

        Raises:
            UserError: as for :meth:`render`.
        """
        if not self.source:
            raise UserError(
                f"{self.owner} has no chat template: an Instruct model is needed, not a base model"
            )
        return template_sandbox.render(
            self.source, self._variables(said), self.date, where=self.owner
        )

    def render_example(self) -> str:
        """A chat of three messages, for whoever looks at what the template writes around them.

        Raises:
            UserError: as for :meth:`render`.
        """
        return self.render(_CHAT[:3])

    def after_reply(self) -> str:
        """What is written between a reply and the user's next message; empty: it is not seen."""
        try:
            text = self.render((_ASKED, _REPLY, _NEXT))
        except UserError:  # as of a template for single turns
            return ""
        return text.partition(_REPLY)[2].partition(_NEXT)[0]

    def with_kwargs(self, **more: Any) -> ChatTemplate:
        """The template with further variables; of two of one name the later counts."""
        return dataclasses.replace(self, kwargs={**self.kwargs, **more})

    def knows(self, name: str) -> bool:
        """Whether the template reads a variable, so that setting it may change what is written."""
        return name in template_sandbox.variables_read(self.source, self.owner)

    def digest(self) -> str:
        """SHA-256 of everything that decides what is written."""
        content = dataclasses.asdict(self)
        del content["owner"]
        if template_sandbox.CLOCK not in self.source:
            del content["date"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _variables(self, said: Sequence[tuple[str, str]]) -> dict[str, Any]:
        if self.system and all(role != "system" for role, _ in said):
            said = [("system", ""), *said]
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.parts else text}
            for role, text in said
        ]
        return {
            **self.special_tokens,
            **self.kwargs,
            "messages": messages,
            "add_generation_prompt": True,
            "tools": None,
            "documents": None,
        }


def _in_turn(turns: Sequence[str]) -> list[tuple[str, str]]:
    """What user and assistant say in turn, with who says it."""
    return [(("user", "assistant")[index % 2], text) for index, text in enumerate(turns)]


def choose_source(found: Any, path: Path) -> str:
    """The template that a chat without tools is written with.

    Args:
        found: what a tokenizer has: a text, several by name, or ``None``.
        path: the model's directory, whose chat_template.json counts where a tokenizer has none.

    Returns:
        Jinja's source; empty where there is none.

    Raises:
        UserError: there are several, none of them the default, or one is no text.
    """
    if not found:
        found = read_json(path / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        named = [one for one in found if isinstance(one, dict)]
        found = {one.get("name"): one.get("template") for one in named}
    if isinstance(found, Mapping):
        if _NAMED_DEFAULT not in found:
            names = ", ".join(sorted(map(str, found))) or "none"
            raise UserError(
                f"{path} has several chat templates ({names}) and none is named "
                f'"{_NAMED_DEFAULT}"; write the one to use as {path / "chat_template.jinja"}'
            )
        found = found[_NAMED_DEFAULT]
    if found and not isinstance(found, str):
        raise UserError(f"{path} has a chat template that is no text: {found!r:.80}")
    return found or ""


def fitted(template: ChatTemplate) -> ChatTemplate:
    """A template in the form of messages that it understands, tried and kept to its limits.

    A message's content is a text, or else a list of parts; and a template that cannot do without a
    system message gets an empty one.

    Raises:
        UserError: it cannot be rendered, wants more time or memory than it may have, leaves out or
            changes what the user says, or does not know one of the variables it is given.
    """
    _check_kwargs(template)
    first_fault: UserError | None = None
    for parts, system in _FORMS:
        candidate = dataclasses.replace(template, parts=parts, system=system)
        template_sandbox.check_limits(
            candidate.source,
            [candidate._variables(_in_turn(_CHAT[:length])) for length in (1, 3)],
            candidate.date,
            candidate.owner,
        )
        try:
            if _ASKED in candidate.render(_CHAT[:1]):
                return candidate
            raise UserError(
                f"{template.owner}: its chat template leaves out or changes what the user says; "
                "take an Instruct model's"
            )
        except template_sandbox.TooMuch:
            raise
        except UserError as error:
            # What it does to messages as most templates take them is the fault to tell.
            first_fault = first_fault or error
    assert first_fault is not None
    raise first_fault


def check_conversation(template: ChatTemplate) -> None:
    """Make sure that a chat of several turns is written with all that was said in it.

    Thoughts of earlier turns may be left out: what is written here has none.

    Raises:
        UserError: it is not, so that a conversation could not go on; or it cannot be rendered.
    """
    content = dataclasses.asdict(template)
    if fault := _conversation_fault(json.dumps(content, sort_keys=True)):
        raise UserError(f"{template.owner}: its chat template {fault}")


@functools.lru_cache(maxsize=64)
def _conversation_fault(content: str) -> str:
    """What a template does to a chat that goes on; empty where it keeps all of it."""
    template = ChatTemplate(**json.loads(content))
    text, end = template.render(_CHAT), 0
    for index, said in enumerate(_CHAT):
        begin = text.find(said, end)
        if begin < 0:
            who = ("user", "assistant")[index % 2]
            return (
                f"leaves out or changes what the {who} said in an earlier turn, so that no "
                "conversation can go on; take an Instruct model's"
            )
        end = begin + len(said)
    return ""


def _check_kwargs(template: ChatTemplate) -> None:
    """Make sure that a template reads each of the variables that it is given."""
    for name in template.kwargs:
        if name in _RESERVED:
            raise UserError(f"chat_template_kwargs: {name} is set by mlx-fd itself; leave it out")
        if name in THINKING_SWITCHES and template.kwargs[name] is not False:
            raise UserError(
                f"chat_template_kwargs: {name} alone does not tell a thought from an answer; leave "
                "it out, and set expert_thinking or student_thinking (--thinking) to on"
            )
        if not name.isidentifier() or keyword.iskeyword(name):
            raise UserError(f"chat_template_kwargs: {name!r} is no name of a variable")
    if unknown := [name for name in template.kwargs if not template.knows(name)]:
        read = template_sandbox.variables_read(template.source, template.owner)
        known = sorted(read - _RESERVED - set(template.special_tokens) - {"raise_exception"})
        raise UserError(
            f"chat_template_kwargs: the chat template of {template.owner} does not know "
            f"{', '.join(unknown)}; it knows {', '.join(known) or 'no further variables'}"
        )
