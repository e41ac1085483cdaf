"""Do two models speak the same tokens? Answered from their files, before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd.errors import UserError
from mlx_fd.models import chat_template
from mlx_fd.models.directory import AGAIN, blaming
from mlx_fd.models.storage import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Digits, spaces, contractions, accents, several scripts, markup: where splitting rules differ.
_PROBES = (
    "Natalia sold clips to 48 of her friends in April.",
    "12345 + 67.5 = 12412.5, that's 3/4 of 100%",
    "  two spaces,\ttab\n\n\nthree lines\r\nand more  ",
    "I'll say they've DON'T we'd",
    "na\u00efve caf\u00e9 e\u0301 \u00dcn\u00efc\u00f6de \u2014 \u201cquotes\u201d",
    "\u65e5\u672c\u8a9e \u4e2d\u6587 \u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0663\u0664",
    "\U0001f642\U0001f44d\U0001f3fd x_y = [i**2 for i in range(10)]",
    "<|im_start|>user\nhi<|im_end|>\n#### 42",
)


@dataclass(frozen=True)
class Pairing:
    """What two models share.

    Attributes:
        shared_vocab: number of token ids, from 0, that mean the same to both; the logit loss is
            taken over them.
        expert_vocab: width of the expert's logits (padding included).
        student_vocab: width of the student's.
        warnings: differences that do not stop a run.
    """

    shared_vocab: int
    expert_vocab: int
    student_vocab: int
    warnings: tuple[str, ...]


def read_tokenizer(path: Path) -> Tokenizer:
    """A model's tokenizer, without its chat template.

    Raises:
        UserError: there is no tokenizer.json, or none that can be read.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{path} has no tokenizer.json, which is needed to compare tokenizers")
    if not file.is_file():  # opening a FIFO would wait for ever
        raise UserError(f"{file}: is not a regular file")
    with blaming(f"{file} cannot be read", AGAIN):
        return Tokenizer.from_file(str(file))


def _vocab_size(path: Path) -> int:
    value = read_json(path / "config.json").get("vocab_size")
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{path}/config.json has no vocab_size")
    return value


def _end_tokens(path: Path, tokenizer: Tokenizer) -> set[int]:
    """All ids that end a turn, as mlx-lm gathers them."""
    ids = read_json(path / "generation_config.json").get("eos_token_id")
    ids = ids or read_json(path / "config.json").get("eos_token_id")
    ends = {end for end in (ids if isinstance(ids, list) else [ids]) if isinstance(end, int)}
    token = read_json(path / "tokenizer_config.json").get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str):
        with blaming(f"{path}/tokenizer_config.json: its eos_token is no text"):
            number = tokenizer.token_to_id(token)
        ends |= set() if number is None else {number}
    return ends


def _chat_template(path: Path) -> Any:
    """The chat template, from any of the three places transformers knows."""
    jinja = path / "chat_template.jinja"
    if jinja.is_file():
        with blaming(f"{jinja}: cannot be read"):
            return jinja.read_text(encoding="utf-8")
    in_config = read_json(path / "tokenizer_config.json").get("chat_template")
    return in_config or read_json(path / "chat_template.json").get("chat_template")


def _check_template(path: Path, template: Any) -> None:
    """Make sure that a chat template keeps to its limits, before anything is loaded."""
    if isinstance(template, list):  # several, by name
        named = [one for one in template if isinstance(one, dict)]
        template = next((one.get("template") for one in named if one.get("name") == "default"), "")
    if not isinstance(template, str):
        raise UserError(f"{path} has a chat template that is no text: {template!r:.80}")
    tokens = {}
    for name, token in read_json(path / "tokenizer_config.json").items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    chat_template.check_source(template, tokens, path)


def _shared(expert: Tokenizer, student: Tokenizer) -> tuple[int, int, int]:
    """(shared ids, the expert's ids, the student's ids); ids may have holes.

    Raises:
        UserError: some id means two different things.
    """
    expert_tokens = {number: token for token, number in expert.get_vocab().items()}
    student_tokens = {number: token for token, number in student.get_vocab().items()}
    expert_count, student_count = (
        max(expert_tokens, default=-1) + 1,
        max(student_tokens, default=-1) + 1,
    )
    shared = min(expert_count, student_count)
    # Not each number below: an id may be anything that a file says.
    for number in sorted(number for number in {*expert_tokens, *student_tokens} if number < shared):
        if expert_tokens.get(number) != student_tokens.get(number):
            raise UserError(
                f"expert and student have different tokenizers: token {number} is "
                f"{expert_tokens.get(number)!r} for the expert and "
                f"{student_tokens.get(number)!r} for the student. The logit loss compares the two "
                "models token by token: choose a student of the expert's family"
            )
    return shared, expert_count, student_count


def check_pair(expert_dir: Path, student_dir: Path) -> Pairing:
    """Compare two models' tokenizers, chat templates and end tokens.

    Tokens are compared one by one, added ones too, and eight probe texts must be split the same
    way. The widths of the models may differ by padding (Qwen2.5 7B has 152064 rows, 1.5B 151936,
    for the same 151665 tokens).

    Args:
        expert_dir: the expert's directory.
        student_dir: the student's.

    Returns:
        The sizes of the vocabularies, and warnings.

    Raises:
        UserError: the tokenizers differ, a model has fewer rows than tokens, or one has no chat
            template.
    """
    for role, path in (("expert", expert_dir), ("student", student_dir)):
        template = _chat_template(path)
        if not template:
            raise UserError(
                f"the {role} {path} has no chat template: an Instruct model is needed, not a base "
                "model"
            )
        _check_template(path, template)
    expert, student = read_tokenizer(expert_dir), read_tokenizer(student_dir)
    shared, expert_count, student_count = _shared(expert, student)
    for probe in _PROBES:
        with blaming(f"the tokenizers of {expert_dir} and {student_dir} fail on {probe!r}"):
            expert_tokens, student_tokens = expert.encode(probe), student.encode(probe)
        if expert_tokens.ids != student_tokens.ids:
            raise UserError(
                f"expert and student have the same tokens but split text differently: {probe!r} "
                f"becomes {expert_tokens.tokens} for the expert and {student_tokens.tokens} for "
                "the student. The "
                "logit loss needs one tokenizer: choose a student of the expert's family"
            )
    expert_vocab, student_vocab = _vocab_size(expert_dir), _vocab_size(student_dir)
    for path, rows, count in (
        (expert_dir, expert_vocab, expert_count),
        (student_dir, student_vocab, student_count),
    ):
        if rows < count:
            raise UserError(
                f"{path} has {count} tokens but only {rows} rows of logits (vocab_size in "
                "config.json); its tokenizer does not belong to it"
            )
    warnings = []
    if expert_count != student_count:
        warnings.append(
            f"the expert has {expert_count} tokens and the student {student_count}; the logit "
            f"loss uses the first {shared}"
        )
    ends = _end_tokens(expert_dir, expert), _end_tokens(student_dir, student)
    if ends[0] != ends[1]:
        warnings.append(
            f"different tokens end a turn: {sorted(ends[0])} for the expert, {sorted(ends[1])} "
            "for the student (a base model as the student?)"
        )
    if _chat_template(expert_dir) != _chat_template(student_dir):
        warnings.append("expert and student have different chat templates")
    return Pairing(shared, expert_vocab, student_vocab, tuple(warnings))
