"""A model's tokenizer and chat template, as its files have them: no weight is read for them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd.errors import UserError
from mlx_fd.models import thinking
from mlx_fd.models.chat_template import DEFAULT_DATE, ChatTemplate, choose_source, fitted
from mlx_fd.models.directory import ADAPTER_CONFIG, CONFIG, blaming, check_files
from mlx_fd.models.published_config import read_config, text_config
from mlx_fd.models.storage import read_json
from mlx_fd.models.tokenizer_file import PLAIN_PROBES, read_tokenizer

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Tokenizer


TEMPLATE_FILE = "chat_template.jinja"


def open_tokenizer(path: Path, config: dict[str, Any]) -> tuple[TokenizerWrapper, int]:
    """A model directory's tokenizer, and how many tokens it has.

    No code that comes with it is run, and nobody is asked. Texts are split as tokenizer.json says.

    Args:
        path: the directory.
        config: the model's, of :func:`open_lazily`.

    Raises:
        UserError: it is damaged, needs code of its own, splits texts otherwise than tokenizer.json
            says, or has tokens for which the model has no weights.
    """
    from mlx_lm.utils import load_tokenizer

    with blaming(
        f"the tokenizer in {path} cannot be loaded (code that comes with a model is never run)"
    ):
        tokenizer = load_tokenizer(
            path,
            # Unset, transformers asks on the terminal whether to run the directory's code.
            {"trust_remote_code": False},
            eos_token_ids=config.get("eos_token_id"),
        )
        written = _written_tokenizer(path)
        count = _token_count(path, tokenizer, written)
    if written is not None:
        _split_as_written(tokenizer, written, path)
    rows = text_config(config, path / CONFIG).get("vocab_size")
    if isinstance(rows, int) and count > rows:
        # Gemma 3's text models have the token of the others' images, and no row for it.
        with blaming(f"the tokenizer in {path} has {count} tokens for {rows} rows of logits"):
            _forget_special_tokens(tokenizer, rows)
        count = _token_count(path, tokenizer, written)
        if count > rows:
            raise UserError(
                f"{path} has {count} tokens but only {rows} rows of logits (vocab_size in "
                "config.json); its tokenizer does not belong to it"
            )
    return tokenizer, count


def _written_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer that tokenizer.json describes; ``None``: there is no such file."""
    return read_tokenizer(path) if (path / "tokenizer.json").is_file() else None


def _split_as_written(tokenizer: TokenizerWrapper, written: Tokenizer, path: Path) -> None:
    """Let a tokenizer split texts as its tokenizer.json says.

    For some classes (GPT2Tokenizer, Qwen2Tokenizer) transformers has rules of its own, which are
    not those of every model that names the class. That Qwen2's makes NFC of a text stays.

    Raises:
        UserError: it cannot be told.
    """

    def differing() -> str | None:
        for text in PLAIN_PROBES:
            with blaming(f"the tokenizer of {path} fails on {text!r:.80}"):
                used = list(tokenizer.encode(text, add_special_tokens=False))
            if used != written.encode(text, add_special_tokens=False).ids:
                return text
        return None

    if differing() is None:
        return
    used = getattr(tokenizer._tokenizer, "backend_tokenizer", None)
    if used is not None:
        for part in ("model", "normalizer", "pre_tokenizer", "decoder"):
            setattr(used, part, getattr(written, part))
    if (text := differing()) is not None:
        raise UserError(
            f"the tokenizer in {path} splits {text!r:.80} otherwise than tokenizer.json says; "
            'write "tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json'
        )


def _forget_special_tokens(tokenizer: TokenizerWrapper, rows: int) -> None:
    """Take the special tokens from ``rows`` on out of a tokenizer: their text is plain then.

    Those that begin or end a text, or stand in the chat template, stay.
    """
    from tokenizers import Tokenizer

    fast = tokenizer._tokenizer
    backend_tokenizer = getattr(fast, "backend_tokenizer", None)
    if backend_tokenizer is None:
        return
    content = json.loads(backend_tokenizer.to_str())
    ends = {*tokenizer.eos_token_ids, tokenizer.bos_token_id}
    template = str(tokenizer.chat_template)
    content["added_tokens"] = [
        one
        for one in content["added_tokens"]
        if one["id"] < rows or not one["special"] or one["id"] in ends or one["content"] in template
    ]
    fast._tokenizer = Tokenizer.from_str(json.dumps(content))


def _token_count(path: Path, tokenizer: TokenizerWrapper, written: Tokenizer | None) -> int:
    """Tokens of a model directory: those that its files name, at the ids at which they are used.

    tokenizer.json need not have all: transformers adds what the other files have, such as the
    token that ends a turn. It may add one of its own beside them, too, such as ``<unk>``, which no
    text becomes.
    """
    vocab = tokenizer.get_vocab()
    if written is None:
        return int(max(vocab.values())) + 1
    settings = read_json(path / "tokenizer_config.json")
    named = {*written.get_vocab(), *read_json(path / "added_tokens.json")}
    for key in ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"):
        added = settings.get(key) or {}
        named.update(map(_token_text, added.values() if isinstance(added, dict) else added))
    named.update(_token_text(value) for key, value in settings.items() if key.endswith("_token"))
    return 1 + max(int(number) for token, number in vocab.items() if token in named)


def _token_text(token: Any) -> str:
    """A token's text as tokenizer_config.json has it: alone, or with how it is looked for."""
    return str(token.get("content") if isinstance(token, dict) else token)


def read_end_tokens(path: Path) -> dict[str, Any]:
    """config.json as mlx-lm reads it, with the end tokens of generation_config.json, if it has any.

    Raises:
        UserError: a file cannot be read.
    """
    ends = read_json(path / "generation_config.json").get("eos_token_id")
    return {**read_config(path), **({"eos_token_id": ends} if ends else {})}


def template_of(
    tokenizer: TokenizerWrapper,
    path: Path,
    kwargs: Mapping[str, Any] | None = None,
    date: str = "",
) -> ChatTemplate:
    """A model's own chat template, tried; without a source where it has none.

    What its files name as the end of a turn may be the end of a text alone, as in Gemma's GGUF
    files. The token that its template ends a reply with is an end token, too, then.

    Args:
        tokenizer: of :func:`open_tokenizer`.
        path: the model's directory.
        kwargs: further variables that the template reads.
        date: the day that it prints, ``YYYY-MM-DD``; empty: that outside of a run.

    Raises:
        UserError: as :func:`mlx_fd.models.chat_template.fitted` and
            :func:`mlx_fd.models.thinking.check_tail`; mlx-lm writes its chats with code instead of
            a template; or nothing says how a turn ends.
    """
    if tokenizer._chat_template is not None:
        kind = read_json(path / "tokenizer_config.json").get("chat_template_type")
        raise UserError(
            f"{path}: its chats are written by code ({kind or 'mlx-lm has some for this kind'}), "
            "and a template is needed that can go with what is trained; write one as "
            f"{path / 'chat_template.jinja'} and take chat_template_type out of "
            "tokenizer_config.json"
        )
    template = ChatTemplate(
        source=choose_source(tokenizer.chat_template, path),
        special_tokens=dict(tokenizer.special_tokens_map),
        kwargs=dict(kwargs or {}),
        date=date or DEFAULT_DATE,
        end_tokens=tuple(sorted(tokenizer.eos_token_ids)),
        owner=str(path),
    )
    if not template.source:
        return template
    template = fitted(template)
    vocab = tokenizer.get_vocab()
    thinking.check_tail(template, vocab)
    if (end := _unnamed_end(template, tokenizer, vocab)) is not None:
        ends = tuple(sorted({*template.end_tokens, end}))
        template = dataclasses.replace(template, end_tokens=ends)
    if not template.end_tokens:
        raise UserError(
            f"{path}: nothing says which token ends a turn; write its number as eos_token_id into "
            f"{path / 'generation_config.json'}"
        )
    return template


def _unnamed_end(
    template: ChatTemplate, tokenizer: TokenizerWrapper, vocab: Mapping[str, int]
) -> int | None:
    """The token that a template ends a reply with, where it writes none of its end tokens there."""
    text = template.after_reply().lstrip()
    with blaming(f"the tokenizer of {template.owner} fails on {text!r:.80}"):
        written = tokenizer.encode(text, add_special_tokens=False)
    if not written or set(written) & set(template.end_tokens):
        return None
    added = {number: token for token, number in tokenizer.get_added_vocab().items()}
    family = thinking.family_of(template, vocab)
    # gpt-oss ends a thought, too, with the token that stands behind a reply in later turns.
    marks = (family.end, *family.tokens) if family else ()
    end = int(written[0])
    return end if end in added and added[end] not in marks else None


def adopt(tokenizer: TokenizerWrapper, template: ChatTemplate) -> None:
    """Let a tokenizer write and end turns as a template does: what else asks it finds the same.

    What a student learned to end its turns with may not be what its base ends them with.

    Args:
        tokenizer: of the model that the template is not from; changed in place.
        template: the run's, or the model's own in its one form.
    """
    if template.source:
        tokenizer.chat_template = template.source
    for name, token in template.special_tokens.items():
        if getattr(tokenizer, name) != token:
            setattr(tokenizer, name, token)
    if template.end_tokens:
        tokenizer.eos_token_ids = set(template.end_tokens)


def open_template(
    path: Path, kwargs: Mapping[str, Any] | None = None, date: str = ""
) -> ChatTemplate:
    """:func:`template_of` a directory, before any weight is read.

    Raises:
        UserError: as there, as :func:`open_tokenizer`; or the directory has no chat template.
    """
    check_files(path)
    tokenizer, _ = open_tokenizer(path, read_end_tokens(path))
    template = template_of(tokenizer, path, kwargs, date)
    if not template.source:
        raise UserError(
            f"{path} has no chat template: an Instruct model is needed, not a base model"
        )
    return template


def template_beside(adapter: Path, model: Path) -> ChatTemplate | None:
    """The chat template that an adapter's directory has for it; ``None``: it has none.

    An exported adapter has one where its student was trained with another than its base's, and the
    tokens that end a turn in its adapter_config.json.

    Args:
        adapter: the adapter's directory.
        model: its base's, whose tokens the template is written in.

    Raises:
        UserError: as :func:`open_template`.
    """
    file = adapter / TEMPLATE_FILE
    if not file.exists():
        return None
    check_files(adapter)
    tokenizer, _ = open_tokenizer(model, read_end_tokens(model))
    with blaming(f"{file}: cannot be read"):
        source = file.read_text(encoding="utf-8")
    own = template_of(tokenizer, model)
    ends = read_json(adapter / ADAPTER_CONFIG).get("eos_token_id")
    if isinstance(ends, list) and ends and all(type(one) is int for one in ends):
        own = dataclasses.replace(own, end_tokens=tuple(ends))
    return fitted(dataclasses.replace(own, source=source, owner=str(file)))
