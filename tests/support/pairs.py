"""A pair of tiny random models, opened as a run opens them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mlx_fd import problems
from mlx_fd.config import Config, override
from mlx_fd.models.tokenizer import open_template
from mlx_fd.problems import prompts
from mlx_fd.runs.plan import Plan
from support.tiny import make_model_dir, make_tokenizer

SMALL = {
    "batch_size": 2,
    "max_answer_tokens": 5,
    "max_feedback_tokens": 4,
    "max_merge_tokens": 3,
    "probe_size": 2,
    "episodes": 8,
    "checkpoint_every": 2,
    "lora_rank": 2,
    "lora_rate": 1e-2,
    "score_rate": 1e-2,
    # The tests that are about these say so.
    "answers_by": "expert",
    "answer_temperature": 0.0,
    "score_at": "prompt",
    "replay": 0.0,
    "lr_schedule": "constant",
}

# What of a checkpoint's state is not the same in two runs that are: seconds are in the logs.
MEASURED = ("files", "log_bytes", "log_sha256", "peak_memory_bytes", "content_sha256")

# As in the embedded pair's tokenizer: in pieces the prompts are most of what a small pair reads.
PROMPTS = (
    *(prompts.answer_prompt(""), prompts.feedback_prompt(), prompts.critique_prompt()),
    *(prompts.revise_prompt("").partition(". ")[2], prompts.final_prompt()),
    prompts.merge_prompt(prompts.Feedback("", None), None).rpartition("\n\n")[2],
)


def make_home(folder: Path, whole: Sequence[str] = PROMPTS) -> None:
    """``expert``, ``student`` and ``problems.jsonl``, for the command line.

    Args:
        folder: where.
        whole: texts that are one token each.
    """
    sizes = {"heads": 2, "kv_heads": 1, "tokenizer": make_tokenizer(whole=whole)}
    make_model_dir(folder / "expert", hidden=32, intermediate=64, **sizes)
    make_model_dir(folder / "student", hidden=16, layers=1, intermediate=32, seed=1, **sizes)
    rows = [
        {"question": f"Tom has {n} apples and buys {n + 1}. How many?", "answer": str(2 * n + 1)}
        for n in range(40)
    ]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_dirs(folder: Path, layers: tuple[int, int] = (3, 2)) -> tuple[Path, Path]:
    """An expert and a smaller student with the same tokenizer, of so many layers."""
    tokenizer = make_tokenizer(whole=PROMPTS)
    expert = make_model_dir(
        folder / "expert",
        arch="qwen2",
        hidden=32,
        layers=layers[0],
        intermediate=64,
        tokenizer=tokenizer,
    )
    student = make_model_dir(
        folder / "student",
        arch="qwen2",
        hidden=16,
        layers=layers[1],
        heads=2,
        kv_heads=1,
        intermediate=32,
        seed=1,
        tokenizer=tokenizer,
    )
    return expert, student


def make_plan(expert: Path, student: Path, **changes) -> Plan:
    """A plan without the checks of a real one, which have tests of their own."""
    names = {"expert": str(expert), "student": str(student)}
    config = override(Config(), {**SMALL, **names, **changes}, "test")
    found = problems.load("gsm8k", "train")
    probe, chosen, warm_up = problems.probe_and_train(
        found,
        config.episode.probe_size,
        config.problems.episodes,
        config.episode.seed,
        config.episode.warm_up_problems,
    )
    template = open_template(expert)
    return Plan(config, expert, student, 400, template, probe, chosen, {}, (), warm_up=warm_up)


def logits_of(view, final):
    """A model's own logits [..., V] of its final hidden states [..., d]."""
    logits = view.logits(final.reshape(-1, final.shape[-1]))
    return logits.reshape(*final.shape[:-1], -1)


def without_seconds(rows):
    """Rows of a log without their timings."""
    return [
        {key: value for key, value in row.items() if not key.endswith("seconds")} for row in rows
    ]
