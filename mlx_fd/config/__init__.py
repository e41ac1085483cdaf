"""A run's whole configuration: frozen dataclasses, TOML in and out, one place for every default."""

from mlx_fd.config.checking import check_command, override
from mlx_fd.config.files import options_in, read, to_toml
from mlx_fd.config.options import OPTIONS, Config, Option
from mlx_fd.config.presets import PRESETS, preset
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

__all__ = [
    "OPTIONS",
    "PRESETS",
    "Config",
    "EpisodeOptions",
    "GateOptions",
    "GenerationOptions",
    "LossOptions",
    "Method",
    "ModelOptions",
    "Option",
    "ProblemOptions",
    "TrainingOptions",
    "check_command",
    "options_in",
    "override",
    "preset",
    "read",
    "to_toml",
]
