"""Do two models speak the same tokens? Answered from their files, before weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd.errors import UserError
from mlx_fd.models.chat_template import ChatTemplate, check_conversation, fitted
from mlx_fd.models.directory import CONFIG, blaming, check_files
from mlx_fd.models.published_config import read_config, text_config
from mlx_fd.models.thinking import family_of, switched
from mlx_fd.models.tokenizer_file import PROBES

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper


@dataclass(frozen=True)
class Pairing:
    """What two models share.

    Attributes:
        shared_vocab: number of token ids, from 0, that mean the same to both; the logit loss is
            taken over them. 0: they have different tokenizers, and each reads the same text in
            its own tokens.
        expert_vocab: width of the expert's logits (padding included).
        student_vocab: width of the student's.
        template: how chats are written for both: as for the expert; with different tokenizers, for
            the student.
        warnings: differences that do not stop a run.
        expert_template: with different tokenizers, how chats are written for the expert.
        difference: with different tokenizers, in what they differ.
    """

    shared_vocab: int
    expert_vocab: int
    student_vocab: int
    template: ChatTemplate
    warnings: tuple[str, ...]
    expert_template: ChatTemplate | None = None
    difference: str = ""


def _vocab_size(path: Path) -> int:
    value = text_config(read_config(path), path / CONFIG).get("vocab_size")
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{path}/config.json has no vocab_size")
    return value


@dataclass(frozen=True)
class _Side:
    """One model of a pair, as far as it can be known without its weights.

    Attributes:
        path: its directory.
        tokenizer: as it is used: transformers' with mlx-lm's wrapper around it.
        count: how many tokens it has.
        template: how its chats are written.
    """

    path: Path
    tokenizer: TokenizerWrapper
    count: int
    template: ChatTemplate

    def encode(self, text: str) -> list[int]:
        with blaming(f"the tokenizer of {self.path} fails on {text!r:.80}"):
            return list(self.tokenizer.encode(text, add_special_tokens=False))

    def tokens(self, text: str) -> list[str]:
        return list(self.tokenizer.convert_ids_to_tokens(self.encode(text)))

    def names(self) -> dict[int, str]:
        """Its tokens by id; ids may have holes."""
        found = self.tokenizer.get_vocab().items()
        return {number: token for token, number in found if number < self.count}

    def added(self) -> set[str]:
        """Tokens that are looked for in a text before it is split."""
        found = self.tokenizer.added_tokens_decoder.items()
        return {str(token) for number, token in found if number < self.count}


def _open(role: str, path: Path, kwargs: Mapping[str, Any], date: str) -> _Side:
    from mlx_fd.models.tokenizer import open_tokenizer, read_end_tokens, template_of

    file = path / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{path} has no tokenizer.json, which is needed to compare tokenizers")
    check_files(path)
    tokenizer, count = open_tokenizer(path, read_end_tokens(path))
    template = template_of(tokenizer, path, kwargs, date)
    if not template.source:
        raise UserError(
            f"the {role} {path} has no chat template: an Instruct model is needed, not a base model"
        )
    return _Side(path, tokenizer, count, template)


def _other_tokens(expert: _Side, student: _Side, shared: int) -> str:
    """An id below ``shared`` that means two different things; empty where there is none."""
    expert_tokens, student_tokens = expert.names(), student.names()
    # Not each number below: an id may be anything that a file says.
    for number in sorted(number for number in {*expert_tokens, *student_tokens} if number < shared):
        if expert_tokens.get(number) != student_tokens.get(number):
            return (
                f"token {number} is {expert_tokens.get(number)!r} for the expert and "
                f"{student_tokens.get(number)!r} for the student"
            )
    return ""


def _other_splits(expert: _Side, student: _Side, shared: int) -> str:
    """A text that both split into different tokens; empty where there is none."""
    added = sorted(
        token
        for token in expert.added() | student.added()
        if expert.tokenizer.get_vocab().get(token, shared) < shared
    )
    around = [f"is {token} it" for token in added]
    probes = [*PROBES, "".join(around)]
    for probe in probes:
        if expert.encode(probe) == student.encode(probe):
            continue
        # Of hundreds of added tokens, name the one.
        single = (one for one in around if expert.encode(one) != student.encode(one))
        shown = probe if probe in PROBES else next(single, probe[:200])
        return (
            f"{shown!r} becomes {expert.tokens(shown)} for the expert and "
            f"{student.tokens(shown)} for the student"
        )
    return ""


def _unshared(side: _Side, role: str, template: ChatTemplate, shared: int) -> str:
    """A token that chats need and only one of the two has; empty where there is none."""
    if side.count <= shared:
        return ""
    ways = (template, switched(template, True), switched(template, False))
    texts = [way.render_example() for way in ways]
    family = family_of(template, side.tokenizer.get_vocab())
    texts += [family.start, family.end, *family.tokens] if family else []
    needed = {*template.end_tokens, *(number for text in texts for number in side.encode(text))}
    beyond = sorted(number for number in needed if shared <= number < side.count)
    if not beyond:
        return ""
    token = side.tokenizer.convert_ids_to_tokens(beyond[0])
    return f"chats of the {role} need token {beyond[0]}, {token!r}, which only the {role} has"


def check_pair(
    expert_dir: Path,
    student_dir: Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    date: str = "",
    trained: ChatTemplate | None = None,
) -> Pairing:
    """Compare two models' tokenizers, chat templates and end tokens.

    Tokenizers are compared as they are used, with what transformers makes of all their files.
    Tokens are compared one by one, added ones too, and texts must be split the same way, with
    added tokens in them and without. The widths of the models may differ by padding (Qwen2.5 7B
    has 152064 rows, 1.5B 151936, for the same 151665 tokens). One of them may have further tokens,
    as long as no chat needs them (Qwen3 has four more than Qwen2.5, and its chats need two).

    Args:
        expert_dir: the expert's directory.
        student_dir: the student's.
        kwargs: further variables of the chat template; with different tokenizers, of both.
        date: the day that it prints, ``YYYY-MM-DD``; empty: that outside of a run.
        trained: how chats were written for the student when it was trained; ``None``: it was not.

    Returns:
        The sizes of the vocabularies, the chat template of both, and warnings.

    Raises:
        UserError: a model has fewer rows than tokens, or one has no chat template that a
            conversation can be written with.
    """
    expert = _open("expert", expert_dir, kwargs or {}, date)
    student = _open("student", student_dir, {}, date)
    check_conversation(expert.template)
    expert_vocab, student_vocab = _vocab_size(expert_dir), _vocab_size(student_dir)
    shared = min(expert.count, student.count)
    difference = (
        _other_tokens(expert, student, shared)
        or _other_splits(expert, student, shared)
        or _unshared(expert, "expert", expert.template, shared)
        or (trained and _unshared(student, "student", trained, shared))
    )
    if difference:
        student_template = fitted(student.template.with_kwargs(**(kwargs or {})))
        check_conversation(student_template)
        warning = (
            f"expert and student have different tokenizers ({difference}): each reads the same "
            "text in its own tokens, with its own chat template, and logit and reasoning compare "
            "the two where both write the text with the same token; a student of the expert's "
            "family learns from every token"
        )
        return Pairing(
            shared_vocab=0,
            expert_vocab=expert_vocab,
            student_vocab=student_vocab,
            template=student_template,
            warnings=(warning,),
            expert_template=expert.template,
            difference=difference,
        )
    warnings = []
    if expert.count != student.count:
        warnings.append(
            f"the expert has {expert.count} tokens and the student {student.count}; the logit "
            f"loss uses the first {shared}"
        )
    ends = expert.template.end_tokens, student.template.end_tokens
    if ends[0] != ends[1]:
        warnings.append(
            f"different tokens end a turn: {list(ends[0])} for the expert, {list(ends[1])} "
            "for the student (a base model as the student?); the student learns to end with the "
            "expert's"
        )
    if expert.template.source != student.template.source:
        warnings.append(
            "expert and student have different chat templates; the expert's is used for both, and "
            "the student keeps it"
        )
    ids = [expert.encode(probe) for probe in PROBES]
    if [expert.tokenizer.decode(i) for i in ids] != [student.tokenizer.decode(i) for i in ids]:
        warnings.append(
            "expert and student write the same tokens as different text (spaces, for instance); "
            "the student's texts are written by its own tokenizer after the run"
        )
    return Pairing(shared, expert_vocab, student_vocab, expert.template, tuple(warnings))
