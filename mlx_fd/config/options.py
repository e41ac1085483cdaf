"""A run's whole configuration, and the list of its options."""

from __future__ import annotations

import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mlx_fd.config.fields import MAX_COUNT, MAX_FLOAT, Words, names_of
from mlx_fd.config.sections import (
    EpisodeOptions,
    GateOptions,
    GenerationOptions,
    LossOptions,
    ModelOptions,
    ProblemOptions,
    TrainingOptions,
)
from mlx_fd.config.self_distillation import Method


@dataclass(frozen=True)
class Config:
    """Everything that decides what a run does; saved with it as ``config.toml``."""

    models: ModelOptions = field(default_factory=ModelOptions)
    problems: ProblemOptions = field(default_factory=ProblemOptions)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    losses: LossOptions = field(default_factory=LossOptions)
    gate: GateOptions = field(default_factory=GateOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    episode: EpisodeOptions = field(default_factory=EpisodeOptions)
    selfdistill: Method = field(default_factory=Method)

    @property
    def learns_last(self) -> bool:
        """Whether the student learns after the final answers: it needs what they came from."""
        return self.episode.order == "learn-last" or self.losses.student_context != "none"

    @property
    def self_distils(self) -> bool:
        """Whether this is a run of ``mlx-fd self-distill`` or ``mlx-fd distil``."""
        return bool(self.selfdistill.method)

    @property
    def command(self) -> str:
        """The command that makes such a run: ``loop``, ``distil`` or ``self-distill``."""
        if not self.self_distils:
            return "loop"
        return "distil" if self.selfdistill.self_teacher == "expert" else "self-distill"


@dataclass(frozen=True)
class Option:
    """One setting, as the command line, TOML files and the reference page see it.

    Attributes:
        section: TOML table, e.g. ``"gate"``.
        name: key within it, unique over all sections; ``--name-with-dashes`` on the command line.
        kind: ``bool``, ``int``, ``float``, ``str``, ``tuple`` or ``dict``.
        default: the default value.
        help: one sentence.
        words: the allowed words, or empty.
        names: a registry whose names are among the allowed words, or empty.
        low: smallest value, or ``None``.
        high: largest value, or ``None``.
        free: a list of names that only a model knows.
    """

    section: str
    name: str
    kind: type
    default: Any
    help: str
    words: Words = ()
    names: Collection[str] = ()
    low: float | None = None
    high: float | None = None
    free: bool = False

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed words, or empty."""
        return names_of(self.words)


def _options() -> dict[str, Option]:
    found = {}
    largest = {int: MAX_COUNT, float: MAX_FLOAT}
    sections = typing.get_type_hints(Config)
    for section in fields(Config):
        hints = typing.get_type_hints(sections[section.name])
        for item in fields(sections[section.name]):
            kind = typing.get_origin(hints[item.name]) or hints[item.name]
            kind = dict if kind is Mapping else kind
            limits = {"high": largest[kind]} if kind in largest else {}
            default = {} if kind is dict else item.default
            found[item.name] = Option(
                section.name, item.name, kind, default, **{**limits, **item.metadata}
            )
    return found


OPTIONS: dict[str, Option] = _options()
