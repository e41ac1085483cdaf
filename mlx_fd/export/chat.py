"""The chat template that a student was trained with, in what other tools open."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

from mlx_fd.feedback.judge import ModelRef
from mlx_fd.files import write_json
from mlx_fd.models.chat_template import ChatTemplate
from mlx_fd.models.directory import ADAPTER_CONFIG
from mlx_fd.models.published_config import read_config
from mlx_fd.models.storage import read_json
from mlx_fd.models.template_sandbox import CLOCK
from mlx_fd.models.thinking import find
from mlx_fd.models.tokenizer import TEMPLATE_FILE, open_tokenizer, read_end_tokens, template_of

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
            beside it if the base's template is another; what else the base has otherwise is set in
            it, and the tokens that end a turn are in mlx-lm's adapter_config.json. (A GGUF file has
            its own metadata.)

    Raises:
        UserError: a tokenizer cannot be opened.
    """
    if (folder / _TOKENIZER).exists():
        if _differs(template, _template_of(folder)):
            _write(template, folder)
    elif (folder / ADAPTER_CONFIG).exists() and _differs(template, own := _template_of(base)):
        (folder / TEMPLATE_FILE).write_text(_bound(template, own), encoding="utf-8")
        config = read_json(folder / ADAPTER_CONFIG)
        if "fine_tune_type" in config and template.end_tokens != own.end_tokens:
            ends = {"eos_token_id": list(template.end_tokens)}
            write_json(folder / ADAPTER_CONFIG, {**config, **ends})


def _template_of(folder: Path) -> ChatTemplate:
    """A directory's own template: the source that its tokenizer has, the ends that its files name.

    Others that its template ends a turn with (:func:`mlx_fd.models.tokenizer.template_of`) are
    known to mlx-fd alone.
    """
    tokenizer, _ = open_tokenizer(folder, read_end_tokens(folder))
    own, named = template_of(tokenizer, folder), tuple(sorted(tokenizer.eos_token_ids))
    return dataclasses.replace(own, source=tokenizer.chat_template, end_tokens=named)


def _differs(template: ChatTemplate, own: ChatTemplate) -> bool:
    """Whether a directory's own template, special tokens or end tokens are others."""
    return (own.source, own.end_tokens) != (template.source, template.end_tokens) or bool(
        _other_tokens(template, own)
    )


def _other_tokens(template: ChatTemplate, own: ChatTemplate) -> dict[str, str]:
    """The special tokens of a template that are none of another's, by their names."""
    named = template.special_tokens.items()
    return {name: token for name, token in named if own.special_tokens.get(name) != token}


def _bound(template: ChatTemplate, own: ChatTemplate) -> str:
    """A template's source that writes the same with the special tokens of another's tokenizer."""
    lines = [
        f"{{% set {name} = {json.dumps(token, ensure_ascii=False)} %}}\n"
        for name, token in _other_tokens(template, own).items()
        if template.knows(name)
    ]
    return "".join((*lines, template.source))


def _write(template: ChatTemplate, folder: Path) -> None:
    for name in (_TOKENIZER, _SPECIAL):
        if (folder / name).exists():
            content = {**read_json(folder / name), **template.special_tokens}
            if name == _TOKENIZER:
                content["chat_template"] = template.source
            write_json(folder / name, content)
    (folder / _OTHER).unlink(missing_ok=True)
    if (folder / TEMPLATE_FILE).exists():  # it counts for more
        (folder / TEMPLATE_FILE).write_text(template.source, encoding="utf-8")
    ends = list(template.end_tokens)
    for name in _CONFIGS:
        if ends and (folder / name).exists():
            value = ends[0] if len(ends) == 1 else ends
            write_json(folder / name, {**read_json(folder / name), "eos_token_id": value})


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
    if (folder / TEMPLATE_FILE).exists() and not (folder / _TOKENIZER).exists():
        lines.append(
            f"`{TEMPLATE_FILE}` is the chat template that the student was trained with; its base "
            f'has another: `tokenizer.chat_template = open("{TEMPLATE_FILE}").read()`.'
        )
        own = _template_of(ref.model).end_tokens
        if template.end_tokens != own:
            lines.append(
                f"Its turns end with the tokens {list(template.end_tokens)}, and its base's with "
                f"{list(own)}: stop at the first ones, too."
            )
    if template.kwargs:
        given = json.dumps(template.kwargs)
        lines.append(
            f"Its chats are written with the template's variables `{given}`: give them to "
            "`apply_chat_template`, or to mlx-lm with "
            f"`--chat-template-config {shlex.quote(given)}`."
        )
    if CLOCK in template.source:
        lines.append(f"The template prints the date; here it was {template.date}.")
    return "".join(f"{line}\n" for line in lines)
