"""Chats as problems: ``messages`` of roles and texts, as mlx-lm and others take them.

The user's last message is what is asked. What was said before it is its context, and an assistant's
reply after it one of many good ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SAID = {"user": "User", "assistant": "Assistant"}
# As ShareGPT and its like call them, in "from" and "value".
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
_INSTRUCTIONS = ("system", "developer")


def read(messages: Sequence[Any], reply: Any = None) -> tuple[str, str | None]:
    """What a chat asks, and the reply that it has.

    Args:
        messages: of a ``role`` and a ``content`` each, or of ``from`` and ``value``.
        reply: further messages, of a column of their own; anything else is passed over.

    Returns:
        The text to ask, and the assistant's last message; ``None`` where the user has the last
        word.

    Raises:
        ValueError: it is no chat, it has no message of the user, or there is more in it than texts.
    """
    turns = [_turn(message) for message in [*messages, *(reply if isinstance(reply, list) else ())]]
    said = None
    if turns and turns[-1][0] == "assistant":
        said = turns.pop()[1]
    if not turns or turns[-1][0] != "user":
        raise ValueError("a chat without a message of the user at its end, or before the reply")
    instructions = [text for role, text in turns if role in _INSTRUCTIONS]
    *before, (_, asked) = [turn for turn in turns if turn[0] not in _INSTRUCTIONS]
    if not asked:
        raise ValueError("the user's last message is empty")
    parts = [text for text in instructions if text]
    if before:
        parts.append("The conversation so far:")
        parts += [f"{_SAID[role]}: {text}" for role, text in before]
        parts.append("The next message, which is to be answered:")
    return "\n\n".join([*parts, asked]), said


def _turn(message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError("a list that is no chat: its messages are not of 'role' and 'content'")
    named, written = ("role", "content") if "role" in message else ("from", "value")
    role = message.get(named)
    if not isinstance(role, str):
        raise ValueError("a list that is no chat: its messages are not of 'role' and 'content'")
    role = _ROLES.get(role.lower(), role.lower())
    if message.get("tool_calls") or role not in (*_SAID, *_INSTRUCTIONS):
        raise ValueError(f"has a message of a tool ({role!r}); mlx-fd reads text only")
    return role, _text(message.get(written)).strip()


def _text(content: Any) -> str:
    """A message's text; that of its parts, where it has parts."""
    if isinstance(content, str):
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a message is not UTF-8 text (at character {error.start})") from None
        return content
    if not isinstance(content, list):
        raise ValueError(f"a message is not text but {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"a message has a part that is not text ({kind!r}); mlx-fd reads text only"
            )
        texts.append(part["text"])
    return "\n".join(texts)
