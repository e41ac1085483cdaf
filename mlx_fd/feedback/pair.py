"""Expert and student in memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd.config import Config, GenerationOptions, override
from mlx_fd.models import ranks
from mlx_fd.models.chat_template import ChatTemplate
from mlx_fd.models.loading import Draft, Loaded
from mlx_fd.models.shared_tokens import SharedTokens, shared_tokens
from mlx_fd.models.student import Student
from mlx_fd.runs.plan import Plan, with_absolute_names


@dataclass(frozen=True)
class Pair:
    """The two models of a run.

    Attributes:
        expert: answers, gives feedback, merges, revises and criticises itself.
        student: the student's trainable parts around its language model.
        student_lm: that language model with the expert's tokenizer, so that both read the same
            tokens; with its own where the two have different ones.
        vocab: tokens the two share (padding of either vocabulary is left out); where they have
            different tokenizers, the student's.
        shared: tokens of both that write the same, where they have different tokenizers.
    """

    expert: Loaded
    student: Student
    student_lm: Loaded
    vocab: int
    shared: SharedTokens | None = None


def open_pair(plan: Plan, projection: int | None = None) -> Pair:
    """Load the models of a plan.

    Args:
        plan: of the run.
        projection: size of the hidden states that the projection was made for; ``None``: the
            expert's.

    Returns:
        The models, the student with fresh LoRA and heads.
    """
    paths = plan.expert_path, plan.student_path
    templates = plan.template, plan.expert_template
    return _open(paths, plan.config, plan.vocab, templates, projection)


def load_pair(expert: str, student: str = "", *, seed: int = 0, **options: Any) -> Pair:
    """Load an expert and a student by their names, for training code of one's own.

    The pair is checked as a run's is, and may have two tokenizers as there. Weights that both have
    are one array in memory.

    Args:
        expert: an alias, a hub name or an mlx-lm directory.
        student: likewise; empty: the expert's default student.
        seed: of the LoRA and projection initialisation.
        **options: of the models, by their names in docs/reference.md: ``train``, ``lora_rank``,
            ``lora_scale``, ``lora_layers``, ``lora_keys``, ``lora_dropout``, ``score_at``,
            ``dequantize``, ``chat_template_kwargs``, ``template_date``.

    Returns:
        The models, the student with fresh LoRA and heads, ready to train.

    Raises:
        UserError: an unknown name or option, two models that do not fit, or files that are damaged.
    """
    from mlx_fd.models.pairing import check_pair
    from mlx_fd.models.resolve import resolve

    given = {"expert": str(expert), "student": str(student), "seed": seed, **options}
    config = with_absolute_names(override(Config(), given, "load_pair"))
    paths = resolve(config.models.expert), resolve(config.models.student)
    chosen = config.models
    pairing = check_pair(*paths, kwargs=chosen.chat_template_kwargs, date=chosen.template_date)
    templates = pairing.template, pairing.expert_template
    return _open(paths, config, pairing.shared_vocab, templates, None)


def share_tokens(
    expert: Loaded, student: Loaded, vocab: int, template: ChatTemplate
) -> tuple[Loaded, Loaded]:
    """Expert and student that read the same tokens.

    They were compared token by token, so one tokenizer does for both, and one chat template: the
    one that the student is trained with.

    Args:
        expert: the expert as it was loaded.
        student: the student, likewise.
        vocab: tokens that they share.
        template: the run's.
    """
    tokenizer = expert.tokenizer
    tokenizer.eos_token_ids = tokenizer.eos_token_ids | set(template.end_tokens)
    shared = {"tokenizer": tokenizer, "vocab": vocab, "template": template}
    return dataclasses.replace(expert, **shared), dataclasses.replace(student, **shared)


def _open(
    paths: tuple[Path, Path],
    config: Config,
    vocab: int,
    templates: tuple[ChatTemplate, ChatTemplate | None],
    projection: int | None,
) -> Pair:
    from mlx_fd.models.loading import load_pair as load_models
    from mlx_fd.models.student import make_student

    options = config.models
    sharded = options.shard_expert and ranks.processes() > 1
    expert, base = load_models(*paths, dequantize=options.dequantize, sharded=sharded)
    width = projection or expert.view.width
    student = make_student(base.view, width, options, config.episode.seed)
    student.scores = config.losses.trains_head
    pair = thinking_as(joined(expert, base, student, vocab, *templates), config.generation)
    return pair if sharded else with_draft(pair, config.generation.speculate)


def joined(
    expert: Loaded,
    base: Loaded,
    student: Student,
    vocab: int,
    template: ChatTemplate,
    expert_template: ChatTemplate | None,
) -> Pair:
    """Two loaded models as a pair.

    Args:
        expert: the expert as it was loaded.
        base: the student's language model, likewise.
        student: the student's trainable parts around it.
        vocab: tokens that the two share; 0: they have different tokenizers.
        template: the run's.
        expert_template: the expert's, where the tokenizers differ.
    """
    if vocab:
        expert, base = share_tokens(expert, base, vocab, template)
        return Pair(expert, student, dataclasses.replace(base, model=student.model), vocab)
    expert = _with_template(expert, expert_template or expert.template)
    base = _with_template(base, template)
    shared = shared_tokens(expert.tokenizer, base.tokenizer, (expert.vocab, base.vocab))
    student_lm = dataclasses.replace(base, model=student.model)
    return Pair(expert, student, student_lm, base.vocab, shared)


def _with_template(loaded: Loaded, template: ChatTemplate) -> Loaded:
    """A model whose chats are written in a given way, and end as that says."""
    tokenizer = loaded.tokenizer
    tokenizer.eos_token_ids = tokenizer.eos_token_ids | set(template.end_tokens)
    return dataclasses.replace(loaded, template=template)


def with_draft(pair: Pair, tokens: int) -> Pair:
    """A pair whose student proposes what the expert writes, as it is at that time.

    Args:
        pair: the models; where they have different tokenizers it stays as it is.
        tokens: how many are proposed at a time; 0: none.
    """
    draft = Draft(pair.student_lm, tokens) if tokens and pair.shared is None else None
    return dataclasses.replace(pair, expert=dataclasses.replace(pair.expert, draft=draft))


def thinking_as(pair: Pair, options: GenerationOptions) -> Pair:
    """A pair whose models think, or do not, as a run's options say.

    Raises:
        UserError: one shall think, and cannot.
    """
    from mlx_fd.models.loading import with_thinking

    def with_switch(loaded: Loaded, switch: str) -> Loaded:
        return with_thinking(loaded, on=switch == "on", limit=options.max_thinking_tokens)

    return dataclasses.replace(
        pair,
        expert=with_switch(pair.expert, options.expert_thinking),
        student_lm=with_switch(pair.student_lm, options.student_thinking),
    )
