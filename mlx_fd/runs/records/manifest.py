"""What a run was made of: ``manifest.json``."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

SCHEMA_VERSION = 1
"""Of the rows of a run, in its manifest. It changes where a key does; mlx-fd 0.2 wrote none."""


class ModelRow(TypedDict):
    """A model of a run; empty texts where there is none.

    Attributes:
        name: as it was named.
        path: where it was.
        sha256: of its content.
        fingerprint: how the digest was made.
    """

    name: str
    path: str
    sha256: str
    fingerprint: NotRequired[int | str]


class ProblemsRow(TypedDict):
    """The problems of a run.

    Attributes:
        name: of the source.
        split: of it.
        sha256: of all problems that the run's were drawn from.
        skipped_rows: rows of the source that were no problems.
        kind: of their answers; absent: number.
    """

    name: str
    split: str
    sha256: str
    skipped_rows: Any
    kind: NotRequired[str]


class LearnedRow(TypedDict):
    """Problems that an earlier run's student learned from.

    Attributes:
        name: of the source; a file's whole path.
        split: of it.
        columns: what its columns stand for, where they were named.
        sha256: of all problems of the source; of a file, of its bytes.
    """

    name: str
    split: str
    columns: str
    sha256: str


class ChatTemplateRow(TypedDict):
    """How chats are written for a run's student, beside the options that say so, too.

    Attributes:
        source: the template, in Jinja.
        special_tokens: texts by the name that the template has for them.
        end_tokens: ids of the tokens that end a turn.
        sha256: of the three as JSON.
    """

    source: str
    special_tokens: dict[str, str]
    end_tokens: list[int]
    sha256: str


class Manifest(TypedDict):
    """``manifest.json``: what a run was made of.

    Attributes:
        schema_version: of the run's rows.
        created: when, in UTC.
        versions: of Python, the system, mlx-fd and the packages that numbers depend on.
        backend: device, BLAS, threads and cores.
        seed: of all draws.
        expert: the expert; of self-distillation, the critic.
        student: the student's base model.
        problems: where the problems come from.
        shared_vocabulary: tokens that student and expert share; 0: they have different tokenizers.
        chat_template: how chats are written; runs of older versions have none.
        options: every option by name.
        learned_before: with ``--continue``, what the student had learned from: the earlier run's
            problems, and those of the runs before it; runs of older versions have none.
        ranks: how many processes make the run, where it is more than one.
    """

    schema_version: int
    created: str
    versions: dict[str, str]
    backend: dict[str, Any]
    seed: int
    expert: ModelRow
    student: ModelRow
    problems: ProblemsRow
    shared_vocabulary: int
    chat_template: NotRequired[ChatTemplateRow]
    options: dict[str, Any]
    learned_before: NotRequired[list[LearnedRow]]
    ranks: NotRequired[int]
