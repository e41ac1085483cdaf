"""Other ways to criticise: the expert thinks first, or writes its feedback in drafts.

As in the experiments of the published project, chain of thought and chain of drafts are ways to
write *feedback* here; one revision follows. No student takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_fd.config import EpisodeOptions, GenerationOptions
from mlx_fd.evaluation.baselines import register_system
from mlx_fd.evaluation.baselines.trials import Seeds, Setting, Stage, System, Trial, trial
from mlx_fd.problems import prompts
from mlx_fd.problems.kinds import form_of

if TYPE_CHECKING:
    from mlx_fd.feedback.asking import OnTokens
    from mlx_fd.feedback.stages import Answered, Usage
    from mlx_fd.models.conversation import Conversation
    from mlx_fd.models.loading import Loaded


@dataclass(frozen=True)
class Criticised:
    """An answer after a critic's last stage.

    Attributes:
        answered: the answer.
        usage: of the answer and of all turns since.
        feedback: what the last stage came to.
        turns: what each stage wrote.
        conversation: the expert's, up to and with the last stage.
    """

    answered: Answered
    usage: Usage
    feedback: prompts.Feedback
    turns: dict[str, str]
    conversation: Conversation


def feedback_stage(step: str, expert: Loaded, prompt: str = "") -> Stage:
    """A stage that writes a score and feedback; ``prompt`` as for ``feedback_request``."""
    from mlx_fd.feedback.criticism import feedback_request

    return Stage(step, feedback_request(expert, prompt), f"{prompts.FEEDBACK_OPENING} ")


def thoughts(expert: Loaded) -> tuple[Stage, ...]:
    """Chain of thought: stepwise reasoning, then the feedback."""
    from mlx_fd.models.generation import followup_prompt

    return (
        Stage("reasoning", followup_prompt(expert, prompts.reasoning_prompt())),
        feedback_stage("feedback", expert),
    )


def drafts_of_feedback(expert: Loaded) -> tuple[Stage, ...]:
    """Chain of drafts: three feedbacks with a score each, the last one counts."""
    return tuple(
        feedback_stage(f"draft_{stage}", expert, prompts.draft_prompt(stage))
        for stage in range(1, prompts.DRAFTS + 1)
    )


def good_enough(feedback: prompts.Feedback, options: EpisodeOptions) -> bool:
    """Whether an answer stays as it is."""
    return feedback.written_score is not None and feedback.written_score >= options.target_score


def criticise(
    setting: Setting,
    answered: Sequence[Answered],
    stages: Sequence[Stage],
    seeds: Seeds,
    on_tokens: OnTokens,
) -> list[Criticised]:
    """Let the expert go through a critic's stages, one turn each."""
    from mlx_fd.feedback.criticism import parsed
    from mlx_fd.feedback.turns import expert_turn
    from mlx_fd.models.writing import GenerateOptions, sampling_for

    options = setting.generation
    before = [one.conversation for one in answered]
    usages = [one.usage for one in answered]
    written: list[dict[str, str]] = [{} for _ in answered]
    for stage in stages:
        turns, added = expert_turn(
            setting.pair,
            stage.step,
            before,
            [stage.request] * len(answered),
            sampling_for(options, "expert_feedback", seeds(stage.step)),
            on_tokens,
            GenerateOptions(reuse=not options.sequential),
        )
        before = [turn.conversation for turn in turns]
        usages = [so_far + more for so_far, more in zip(usages, added, strict=True)]
        for stage_texts, turn in zip(written, turns, strict=True):
            stage_texts[stage.step] = stage.begun + turn.text
    return [
        Criticised(one, usage, parsed(turn), stage_texts, turn.conversation)
        for one, usage, turn, stage_texts in zip(answered, usages, turns, written, strict=True)
    ]


def revise(
    setting: Setting,
    judged: Sequence[Criticised],
    step: str,
    seeds: Seeds,
    on_tokens: OnTokens,
    *,
    keep: bool = True,
) -> list[Criticised]:
    """Let the expert apply the feedback that it has just given."""
    from mlx_fd.feedback.turns import expert_turn
    from mlx_fd.models.generation import followup_prompt
    from mlx_fd.models.writing import GenerateOptions, sampling_for

    options: GenerationOptions = setting.generation
    requests = [
        followup_prompt(
            setting.pair.expert, prompts.revise_prompt("", form_of(item.answered.problem))
        )
        for item in judged
    ]
    turns, added = expert_turn(
        setting.pair,
        step,
        [item.conversation for item in judged],
        requests,
        sampling_for(options, "revise", seeds(step)),
        on_tokens,
        GenerateOptions(reuse=not options.sequential, keep=keep),
    )
    return [
        Criticised(
            item.answered,
            item.usage + usage,
            item.feedback,
            {**item.turns, step: turn.text},
            turn.conversation,
        )
        for item, usage, turn in zip(judged, added, turns, strict=True)
    ]


def criticise_and_revise(
    setting: Setting,
    answered: Sequence[Answered],
    stages: Sequence[Stage],
    seeds: Seeds,
    on_tokens: OnTokens,
) -> list[Trial]:
    """Let the expert go through a critic's stages, and revise what is not good enough once."""
    judged = criticise(setting, answered, stages, seeds, on_tokens)
    todo = [k for k, item in enumerate(judged) if not good_enough(item.feedback, setting.episode)]
    revised = revise(setting, [judged[k] for k in todo], "revise", seeds, on_tokens, keep=False)
    for k, item in zip(todo, revised, strict=True):
        judged[k] = item
    return [
        trial(
            setting,
            item.answered.answer,
            item.usage,
            item.turns,
            "revise" if "revise" in item.turns else "answer",
            item.feedback.written_score,
        )
        for item in judged
    ]


def cot(
    setting: Setting, answered: Sequence[Answered], seeds: Seeds, on_tokens: OnTokens
) -> list[Trial]:
    """Chain of thought (arXiv 2201.11903) as a critic, and one revision."""
    stages = thoughts(setting.pair.expert)
    return criticise_and_revise(setting, answered, stages, seeds, on_tokens)


def cod(
    setting: Setting, answered: Sequence[Answered], seeds: Seeds, on_tokens: OnTokens
) -> list[Trial]:
    """Chain of drafts as a critic: three staged drafts of the feedback, and one revision."""
    stages = drafts_of_feedback(setting.pair.expert)
    return criticise_and_revise(setting, answered, stages, seeds, on_tokens)


register_system(
    System(
        name="cot",
        help="the expert thinks step by step, then criticises (arXiv 2201.11903), then revises",
        order=30,
        label="Chain-of-thought critic",
        begins_with="first",
        amateur=None,
        run=cot,
        stages=thoughts,
    )
)
register_system(
    System(
        name="cod",
        help="the expert criticises in three drafts, then revises",
        order=40,
        label="Chain-of-drafts critic",
        begins_with="first",
        amateur=None,
        run=cod,
        stages=drafts_of_feedback,
    )
)
