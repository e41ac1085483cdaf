"""Tokenizers as GGUF files hold them, and as tokenizer.json does: byte-level BPE, SentencePiece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_fd.models import gguf_sentencepiece

if TYPE_CHECKING:
    from mlx_fd.models.gguf_reading import GgufFile

# How llama.cpp's `tokenizer.ggml.pre` splits text before the merges: one split after another.
# The expressions are the models' own (their published tokenizer.json).
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K = (
    r"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
    r"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{contraction}"
    r"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+"
    r"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{contraction}"
    r"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CL100K.format(digits=r"\p{N}")
_LLAMA3 = _CL100K.format(digits=r"\p{N}{1,3}")
_GPT_4O = _O200K.format(contraction=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", digits=r"\p{N}{1,3}")
_TEKKEN = _O200K.format(contraction="", digits=r"\p{N}")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class PreTokenizer(NamedTuple):
    """What llama.cpp does before and instead of merging.

    Attributes:
        split: an expression, or ``"gpt2"`` for that of ``tokenizers``, or ``"digits+gpt2"``.
        ignore_merges: a whole word that is a token is taken without merging to it.
    """

    split: str
    ignore_merges: bool = False


PRETOKENIZERS = {
    "gpt-2": PreTokenizer("gpt2"),
    "smollm": PreTokenizer("digits+gpt2"),
    "refact": PreTokenizer("digits+gpt2"),
    "starcoder": PreTokenizer("digits+gpt2"),
    "command-r": PreTokenizer("digits+gpt2"),
    "llama-bpe": PreTokenizer(_LLAMA3, True),
    "llama3": PreTokenizer(_LLAMA3, True),
    "llama-v3": PreTokenizer(_LLAMA3, True),
    "dbrx": PreTokenizer(_LLAMA3),
    "smaug-bpe": PreTokenizer(_LLAMA3),
    "qwen2": PreTokenizer(_QWEN2),
    "deepseek-r1-qwen": PreTokenizer(_QWEN2),
    "qwen35": PreTokenizer(_QWEN35),
    "gpt-4o": PreTokenizer(_GPT_4O),
    "tekken": PreTokenizer(_TEKKEN, True),
}
# Their models normalise text to NFC before it is split.
_NFC = (_QWEN2, _QWEN35)
# Kinds of tokenizer in `tokenizer.ggml.model`.
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
# All ids that end a turn, where they are more than llama.cpp has names for.
END_TOKENS = "mlx_fd.end_token_ids"
# Kinds of token in `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def pre_tokenizer(kind: str) -> Any:
    """The ``tokenizers`` pre-tokenizer of one of :data:`PRETOKENIZERS`."""
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as pre

    split = PRETOKENIZERS[kind].split
    if split == "gpt2":
        return pre.ByteLevel(add_prefix_space=False)
    if split == "digits+gpt2":
        return pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        )
    return pre.Sequence(
        [
            pre.Split(Regex(split), behavior="isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def is_qwen2(kind: str) -> bool:
    """Whether text is split as Qwen2's tokenizer does, which transformers has a class for."""
    return PRETOKENIZERS[kind].split == _QWEN2


def token_id(file: GgufFile, name: str, count: int) -> int | None:
    """The id of a file's ``eos``, ``bos``, ... token, or ``None``.

    Raises:
        UserError: it is outside the vocabulary of ``count`` tokens.
    """
    value: int | None = file.get(f"tokenizer.ggml.{name}_token_id", int)
    if value is not None and not 0 <= value < count:
        raise file.bad(f"the {name} token {value} is outside the vocabulary of {count}")
    return value


def end_tokens(file: GgufFile, count: int) -> list[int]:
    """The ids that end a turn, the tokenizer's own first; of a vocabulary of ``count`` tokens.

    Raises:
        UserError: one is outside the vocabulary.
    """
    named = [token_id(file, name, count) for name in ("eos", "eot", "eom")]
    listed = file.get(END_TOKENS, list, [])
    if not all(type(token) is int and 0 <= token < count for token in listed):
        raise file.bad(f"{END_TOKENS} has what is no token of the vocabulary of {count}")
    return list(dict.fromkeys(token for token in (*named, *listed) if token is not None))


def read_tokens(file: GgufFile, rows: int) -> list[str]:
    """A file's tokens by id.

    Args:
        file: the file.
        rows: of the model's embedding.

    Raises:
        UserError: it has another kind of tokenizer, or more tokens than rows.
    """
    model = file.need("tokenizer.ggml.model", str)
    if model not in (BYTE_LEVEL, SENTENCEPIECE):
        raise file.bad(
            f"the tokenizer model {model} is not supported; {BYTE_LEVEL} (byte-level BPE) and "
            f"{SENTENCEPIECE} (SentencePiece) are"
        )
    tokens: list[str] = file.need("tokenizer.ggml.tokens", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise file.bad("its vocabulary is not a list of strings")
    if len(tokens) > rows:
        raise file.bad(f"{len(tokens)} tokens but only {rows} rows in token_embd.weight")
    return tokens


def _byte_level(
    file: GgufFile, known: PreTokenizer, kind: str, tokens: list[str], types: list[int]
) -> Any:
    """The tokenizer of a byte-level BPE vocabulary, without added tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = [tuple(m.split(" ", 1)) for m in file.need("tokenizer.ggml.merges", list)]
    # Unused ones fill the padding rows of the embedding; no text has them.
    vocabulary = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    try:
        tokenizer = Tokenizer(
            models.BPE(vocab=vocabulary, merges=merges, ignore_merges=known.ignore_merges)
        )
    except Exception as error:  # tokenizers raises the bare class
        raise file.bad(f"its merges do not fit its vocabulary ({error})") from error
    tokenizer.pre_tokenizer = pre_tokenizer(kind)
    if known.split in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: list[str], types: list[int]) -> Any:
    """The tokenizer of a SentencePiece vocabulary, without added tokens."""
    scores = file.need("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens) or not all(isinstance(score, float) for score in scores):
        raise file.bad("its vocabulary lacks scores")
    vocabulary = {token: number for number, token in enumerate(tokens) if types[number] != UNUSED}
    if missing := sorted(gguf_sentencepiece.BYTES - vocabulary.keys()):
        raise file.bad(f"its vocabulary has no token for the byte {missing[0]}")
    joined = {t: scores[n] for t, n in vocabulary.items() if types[n] == NORMAL}
    unknown = next((token for token, n in vocabulary.items() if types[n] == UNKNOWN), None)
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    try:
        return gguf_sentencepiece.new_tokenizer(joined, vocabulary, unknown, prefix=prefix)
    except Exception as error:  # tokenizers raises the bare class
        raise file.bad(f"its scores do not fit its vocabulary ({error})") from error


def write_tokenizer(file: GgufFile, arch: str, tokens: list[str], out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        file: the file.
        arch: its architecture.
        tokens: of :func:`read_tokens`.
        out: the folder to write to.

    Raises:
        UserError: the tokenizer is damaged, or splits text in a way that is not known here.
    """
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing

    types = file.need("tokenizer.ggml.token_type", list)
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise file.bad("its vocabulary has duplicate tokens or lacks token types")
    pieces = file.need("tokenizer.ggml.model", str) == SENTENCEPIECE
    tokenizer_class = "PreTrainedTokenizerFast"
    if pieces and arch == "phi3":
        raise file.bad(
            "tokens of Phi-3 take the spaces after them, which a GGUF file does not say; take the "
            "model from the hub (an mlx-community conversion)"
        )
    if pieces:
        tokenizer, begins = _sentencepiece(file, tokens, types), True
    else:
        kind = file.need("tokenizer.ggml.pre", str)
        if kind not in PRETOKENIZERS or (arch == "qwen2" and not is_qwen2(kind)):
            raise file.bad(
                f"the tokenizer kind {kind} is not supported for {arch}; "
                f"supported are {', '.join(PRETOKENIZERS)} (qwen2 models: qwen2)"
            )
        tokenizer = _byte_level(file, PRETOKENIZERS[kind], kind, tokens, types)
        # llama.cpp adds the first token for Llama 3's tokenizer unless the file says otherwise.
        begins = PRETOKENIZERS[kind] == PRETOKENIZERS["llama-bpe"]
        tokenizer_class = "Qwen2Tokenizer" if is_qwen2(kind) else tokenizer_class
    tokenizer.add_tokens(
        [
            AddedToken(token, special=number != USER_DEFINED, normalized=False)
            for token, number in zip(tokens, types, strict=True)
            if number in (CONTROL, USER_DEFINED, UNKNOWN)
        ]
    )
    names = {
        "bos_token": token_id(file, "bos", len(tokens)),
        "eos_token": token_id(file, "eos", len(tokens)),
        "pad_token": token_id(file, "padding", len(tokens)),
        "unk_token": token_id(file, "unknown", len(tokens)),
    }
    bos = names["bos_token"]
    if bos is not None and file.get("tokenizer.ggml.add_bos_token", bool, begins):
        tokenizer.post_processor = TemplateProcessing(
            single=[tokens[bos], "$A"],
            pair=[tokens[bos], "$A", tokens[bos], "$B"],
            special_tokens=[(tokens[bos], bos)],
        )
    settings: dict[str, Any] = {
        "tokenizer_class": tokenizer_class,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_max_length": file.size(f"{arch}.context_length", 2048),
        **{name: tokens[number] for name, number in names.items() if number is not None},
    }
    template = file.get("tokenizer.chat_template", str)
    if template:
        settings["chat_template"] = template
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8"
    )
