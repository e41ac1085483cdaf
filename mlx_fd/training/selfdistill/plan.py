"""From a configuration to the models and problems of a run of self-distillation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mlx_fd.config import Config
from mlx_fd.errors import UserError
from mlx_fd.models.chat_template import ChatTemplate, check_conversation, fitted
from mlx_fd.models.loading import check_can_think
from mlx_fd.models.resolve import resolve
from mlx_fd.models.tokenizer import open_template
from mlx_fd.runs.manifest import manifest_of
from mlx_fd.runs.plan import (
    Plan,
    absolute_model_name,
    check_run_memory,
    draw_problems,
    with_absolute_names,
    without_long,
)
from mlx_fd.training.selfdistill.combination import EXPERT, NO_MODEL, check_combination
from mlx_fd.training.selfdistill.ungraded import check_gold

_README = """\
# A run of mlx-fd {command}

| file | what it is |
|---|---|
| `config.toml` | all options; `mlx-fd {command} --config config.toml` repeats the run |
| `manifest.json` | versions, seed, models and data with their digests |
| `questions.txt` | SHA-256 of each question that the student learns from |
{rows}
| `checkpoints/` | `NNNNNN` by batch; `last` and `best` (on held-out problems) point to them |
| `summary.json` | the run's totals, written at its end |
| `cut/` | what `resume` removed: `tail/` after the last stop; everything else by date |
| `eval/` | with `mlx-fd eval`: `eval.json` and `outputs.jsonl` of each evaluation |
| `report.html` | the report of `mlx-fd report .` |
| `tracking.json` | with `--track`: the batches that each tracker has received |

    mlx-fd resume .                       # continue a stopped run
    mlx-fd report .                       # write report.html
    mlx-fd eval .                         # on a test split, with the base model
    mlx_lm.generate --model MODEL --adapter-path checkpoints/best --prompt TEXT

MODEL is the student's, named in `manifest.json`.
"""
_ROWS = {
    "self-distill": """\
| `attempts.jsonl` | one line per attempt: text, tokens, the self-teacher's context, advantages |
| `metrics.jsonl` | one line per batch: loss terms, statistics, probe evaluations |
| `headroom.json` | answers with and without the context before any update |""",
    "distil": """\
| `attempts.jsonl` | one line per answer: who wrote it, text, tokens, the expert's advantages |
| `metrics.jsonl` | one line per batch: loss terms, statistics, probe evaluations |
| `headroom.json` | answers of the student, before any update, and of the expert |
| `teacher/` | with `support = "teacher"`: the cache of the expert's top k on its own answers |""",
}


def readme(config: Config) -> str:
    """What the run directory's ``README.md`` says, of ``mlx-fd self-distill`` or ``distil``."""
    return _README.format(command=config.command, rows=_ROWS[config.command])


def make_plan(config: Config) -> Plan:
    """Check everything a run needs.

    Raises:
        UserError: a name, file, combination of options or amount of memory that will not do.
    """
    check_combination(config)
    config = with_absolute_names(config)
    options = config.selfdistill
    if options.critic not in NO_MODEL:
        critic_name = absolute_model_name(options.critic)
        config = dataclasses.replace(
            config, selfdistill=dataclasses.replace(options, critic=critic_name)
        )
    options = config.selfdistill
    drawn = draw_problems(config)
    check_gold(config, (*drawn.probe, *drawn.problems))
    student = resolve(config.models.student)
    critic = resolve(options.critic) if options.critic not in NO_MODEL else None
    drawn, notes = without_long(
        drawn,
        [path for path in (student, critic) if path],
        config,
        with_solutions=options.context != "none",
    )
    questions = [problem.question for problem in drawn.every]
    questions *= options.num_generations
    template, vocab = _template(student, config), 0
    if options.self_teacher == EXPERT:
        assert critic is not None
        template, vocab = _shared(critic, student, config)
    memory = check_run_memory(critic or student, student, questions, side_by_side(config), template)
    if config.generation.student_thinking == "on":
        check_can_think(student, template)
    if critic is not None:
        template_of_critic = template if vocab else _template(critic, config, trains=False)
        if config.generation.expert_thinking == "on":
            check_can_think(critic, template_of_critic)
    return Plan(
        config=config,
        expert_path=critic or student,
        student_path=student,
        vocab=vocab,
        template=template,
        probe=drawn.probe,
        problems=drawn.problems,
        manifest=manifest_of(config, critic, student, drawn.source, vocab, template),
        notes=(*notes, *filter(None, (memory.note,))),
        memory=memory.total,
    )


def side_by_side(config: Config) -> Config:
    """A configuration whose batch is as many attempts as are generated in parallel."""
    size = config.selfdistill.generation_batch_size
    return dataclasses.replace(
        config, generation=dataclasses.replace(config.generation, batch_size=size)
    )


def _shared(expert: Path, student: Path, config: Config) -> tuple[ChatTemplate, int]:
    """The chat template of an expert and its student, and how many tokens they share.

    Raises:
        UserError: they have different tokenizers.
    """
    from mlx_fd.models.pairing import check_pair

    options = config.models
    pairing = check_pair(
        expert, student, kwargs=options.chat_template_kwargs, date=options.template_date
    )
    if not pairing.shared_vocab:
        raise UserError(
            f"{expert} and {student} have different tokenizers ({pairing.difference}), and answers "
            "are distilled token by token: choose a student with the expert's tokenizer (mlx-fd "
            "loop takes both)"
        )
    return pairing.template, pairing.shared_vocab


def _template(path: Path, config: Config, *, trains: bool = True) -> ChatTemplate:
    """A model's own chat template with the run's variables and its day.

    Args:
        path: the model's directory.
        config: of the run.
        trains: whether it is the model that is trained, whose template must know all variables; a
            critic of another kind gets those that its own knows.
    """
    options = config.models
    if trains:
        return open_template(path, options.chat_template_kwargs, options.template_date)
    template = open_template(path, date=options.template_date)
    known = {k: v for k, v in options.chat_template_kwargs.items() if template.knows(k)}
    template = fitted(template.with_kwargs(**known))
    check_conversation(template)
    return template


def open_models(plan: Plan) -> Any:
    """Load the models of a plan.

    Returns:
        The :class:`mlx_fd.training.selfdistill.batch.Models`, the student with fresh LoRA.
    """
    from mlx_fd.feedback.pair import share_tokens
    from mlx_fd.models.loading import load, load_pair, with_thinking
    from mlx_fd.models.student import make_student
    from mlx_fd.training.selfdistill.batch import Models

    options = plan.config.models
    critic = None
    if plan.config.selfdistill.critic in NO_MODEL:
        base = load(plan.student_path, dequantize=options.dequantize)
    else:
        critic, base = load_pair(plan.expert_path, plan.student_path, dequantize=options.dequantize)
        if plan.vocab:
            critic, base = share_tokens(critic, base, plan.vocab, plan.template)
        else:
            template = _template(plan.expert_path, plan.config, trains=False)
            critic = dataclasses.replace(critic, template=template)
    generation = plan.config.generation
    limit = generation.max_thinking_tokens
    if critic is not None:
        critic = with_thinking(critic, on=generation.expert_thinking == "on", limit=limit)
    # Nothing is aligned here; one column stands for the projection that a checkpoint has.
    student = make_student(base.view, 1, options, plan.config.episode.seed)
    student_lm = dataclasses.replace(base, model=student.model, template=plan.template)
    thinks = generation.student_thinking == "on"
    return Models(student, with_thinking(student_lm, on=thinks, limit=limit), critic)
