"""The chat template that a student was trained with, in what other tools open."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from mlx_fd.feedback.judge import ModelRef
from mlx_fd.files import write_json
from mlx_fd.models.chat_template import ChatTemplate
from mlx_fd.models.loading import open_tokenizer, read_end_tokens, template_of
from mlx_fd.models.published_config import read_config
from mlx_fd.models.storage import read_json
from mlx_fd.models.template_sandbox import CLOCK
from mlx_fd.models.thinking import find

JINJA = "chat_template.jinja"
_TOKENIZER = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_OTHER = "chat_template.json"
_CONFIGS = ("config.json", "generation_config.json")


def carry_template(template: ChatTemplate, base: Path, folder: Path) -> None:
    """Make an export write chats and end turns as its student learned to.

    A student's base often has another template than the expert whose chats it was trained on. What
    is the same already is left as it is.

    Args:
        template: the student's.
        base: the directory of its base model.
        folder: an export: a whole directory that mlx-lm opens, where the template is put into the
            tokenizer's files; or an adapter, which has none, where ``chat_template.jinja`` stands
            beside it if the base's template is another. (A GGUF file has its own metadata.)

    Raises:
        UserError: a tokenizer cannot be opened.
    """
    if (folder / _TOKENIZER).exists():
        if _differs(template, folder):
            _write(template, folder)
    elif (folder / "adapter_config.json").exists() and _differs(template, base):
        (folder / JINJA).write_text(template.source, encoding="utf-8")


def _differs(template: ChatTemplate, folder: Path) -> bool:
    """Whether a directory's own template, special tokens or end tokens are others."""
    tokenizer, _ = open_tokenizer(folder, read_end_tokens(folder))
    own = template_of(tokenizer, folder)
    found = (tokenizer.chat_template, own.end_tokens)
    special = {name: own.special_tokens.get(name) for name in template.special_tokens}
    return found != (template.source, template.end_tokens) or special != template.special_tokens


def _write(template: ChatTemplate, folder: Path) -> None:
    for name in (_TOKENIZER, _SPECIAL):
        if (folder / name).exists():
            content = {**read_json(folder / name), **template.special_tokens}
            if name == _TOKENIZER:
                content["chat_template"] = template.source
            write_json(folder / name, content)
    (folder / _OTHER).unlink(missing_ok=True)
    if (folder / JINJA).exists():  # it counts for more
        (folder / JINJA).write_text(template.source, encoding="utf-8")
    ends = list(template.end_tokens)
    for name in _CONFIGS:
        if ends and (folder / name).exists():
            value = ends[0] if len(ends) == 1 else ends
            write_json(folder / name, {**read_json(folder / name), "eos_token_id": value})


def template_arguments(template: ChatTemplate) -> dict[str, Any]:
    """What ``apply_chat_template`` is given elsewhere, to write what the student read.

    The clock cannot be set there, but templates that ask it take a ``date_string``, too, mostly.
    """
    arguments = dict(template.kwargs)
    if CLOCK in template.source and template.knows("date_string"):
        day = datetime.date.fromisoformat(template.date)
        arguments.setdefault("date_string", day.strftime("%d %b %Y"))
    return arguments


def reply_opening(ref: ModelRef) -> str:
    """What a student's replies begin after, beyond what its template writes; mostly nothing.

    A template that opens a thought whatever it is told is one; the student was trained behind the
    thought, closed at once.
    """
    if ref.chat is None or ref.thinking.on:
        return ""
    tokenizer, _ = open_tokenizer(ref.model, read_config(ref.model))
    found = find(ref.chat, tokenizer)
    return "" if found is None else found.closed.removeprefix(found.tail)


def template_note(ref: ModelRef, folder: Path) -> str:
    """What the model card says of the template; empty where there is nothing to say."""
    template = ref.chat
    if template is None:
        return ""
    lines = []
    if ref.thinking.on:
        lines.append(
            "It was trained to think before its feedback: what it thinks is no part of that, and "
            "its score head reads behind the thought."
        )
    if opening := reply_opening(ref):
        lines.append(
            f"It was trained without thoughts: append `{json.dumps(opening)}` to what the chat "
            "template writes."
        )
    if (folder / JINJA).exists() and not (folder / _TOKENIZER).exists():
        lines.append(
            f"`{JINJA}` is the chat template that the student was trained with; its base has "
            f'another: `tokenizer.chat_template = open("{JINJA}").read()`.'
        )
    if template.kwargs:
        given = json.dumps(template.kwargs)
        lines.append(
            f"Its chats are written with the template's variables `{given}`: give them to "
            f"`apply_chat_template`, or to mlx-lm with `--chat-template-config '{given}'`."
        )
    if CLOCK in template.source:
        lines.append(f"The template prints the date; here it was {template.date}.")
    return "".join(f"{line}\n" for line in lines)
