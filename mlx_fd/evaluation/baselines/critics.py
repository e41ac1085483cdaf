"""Other ways to criticise: the expert thinks first, or writes its feedback in drafts.

As in the experiments of the published project, chain of thought and chain of drafts are ways to
write *feedback* here; one revision follows. No student takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_fd.config import EpisodeOptions, GenerationOptions
from mlx_fd.evaluation.baselines.trials import Seeds, Setting, Trial, trial
from mlx_fd.feedback.episode import Draft, Progress, expert_turn, feedback_request, parsed
from mlx_fd.models.generation import Conversation, followup_prompt
from mlx_fd.problems import prompts


@dataclass(frozen=True)
class Stage:
    """One turn of a critic.

    Attributes:
        step: its name.
        request: tokens of what the expert is asked.
        begun: what those put into its mouth.
    """

    step: str
    request: tuple[int, ...]
    begun: str = ""


@dataclass(frozen=True)
class Criticised:
    """An answer after a critic's last stage.

    Attributes:
        draft: with the stages' counts.
        feedback: what the last stage came to.
        turns: what each stage wrote.
        conversation: the expert's, up to and with the last stage.
    """

    draft: Draft
    feedback: prompts.Feedback
    turns: dict[str, str]
    conversation: Conversation


def feedback_stage(step: str, tokenizer: Any, prompt: str = "") -> Stage:
    """A stage that writes a score and feedback; ``prompt`` as for ``feedback_request``."""
    return Stage(step, feedback_request(tokenizer, prompt), f"{prompts.FEEDBACK_OPENING} ")


def thoughts(tokenizer: Any) -> tuple[Stage, ...]:
    """Chain of thought: stepwise reasoning, then the feedback."""
    return (
        Stage("reasoning", followup_prompt(tokenizer, prompts.reasoning_prompt())),
        feedback_stage("feedback", tokenizer),
    )


def drafts_of_feedback(tokenizer: Any) -> tuple[Stage, ...]:
    """Chain of drafts: three feedbacks with a score each, the last one counts."""
    return tuple(
        feedback_stage(f"draft_{stage}", tokenizer, prompts.draft_prompt(stage))
        for stage in range(1, prompts.DRAFTS + 1)
    )


STAGES = {"cot": thoughts, "cod": drafts_of_feedback}


def good_enough(feedback: prompts.Feedback, options: EpisodeOptions) -> bool:
    """Whether an answer stays as it is."""
    return feedback.score is not None and feedback.score >= options.target_score


def criticise(
    setting: Setting,
    drafts: Sequence[Draft],
    stages: Sequence[Stage],
    seeds: Seeds,
    progress: Progress,
) -> list[Criticised]:
    """Let the expert go through a critic's stages, one turn each."""
    options = setting.generation
    before = [draft.after_answer for draft in drafts]
    written: list[dict[str, str]] = [{} for _ in drafts]
    for stage in stages:
        drafts, turns = expert_turn(
            setting.pair,
            drafts,
            stage.step,
            before,
            [stage.request] * len(drafts),
            "expert_feedback",
            options,
            seeds(stage.step),
            progress,
        )
        before = [turn.conversation for turn in turns]
        for stage_texts, turn in zip(written, turns, strict=True):
            stage_texts[stage.step] = stage.begun + turn.text
    return [
        Criticised(draft, parsed(turn), stage_texts, turn.conversation)
        for draft, turn, stage_texts in zip(drafts, turns, written, strict=True)
    ]


def revise(
    setting: Setting,
    judged: Sequence[Criticised],
    step: str,
    seeds: Seeds,
    progress: Progress,
    *,
    keep: bool = True,
) -> list[Criticised]:
    """Let the expert apply the feedback that it has just given."""
    options: GenerationOptions = setting.generation
    request = followup_prompt(setting.pair.expert.tokenizer, prompts.revise_prompt(""))
    drafts, turns = expert_turn(
        setting.pair,
        [item.draft for item in judged],
        step,
        [item.conversation for item in judged],
        [request] * len(judged),
        "revise",
        options,
        seeds(step),
        progress,
        keep,
    )
    return [
        Criticised(draft, item.feedback, {**item.turns, step: turn.text}, turn.conversation)
        for item, draft, turn in zip(judged, drafts, turns, strict=True)
    ]


def _system(
    name: str, setting: Setting, drafts: Sequence[Draft], seeds: Seeds, progress: Progress
) -> list[Trial]:
    stages = STAGES[name](setting.pair.expert.tokenizer)
    judged = criticise(setting, drafts, stages, seeds, progress)
    todo = [k for k, item in enumerate(judged) if not good_enough(item.feedback, setting.episode)]
    revised = revise(setting, [judged[k] for k in todo], "revise", seeds, progress, keep=False)
    for k, item in zip(todo, revised, strict=True):
        judged[k] = item
    return [
        trial(
            setting,
            item.draft,
            item.turns,
            "revise" if "revise" in item.turns else "answer",
            item.feedback.score,
        )
        for item in judged
    ]


def cot(setting: Setting, drafts: Sequence[Draft], seeds: Seeds, progress: Progress) -> list[Trial]:
    """Chain of thought (arXiv 2201.11903) as a critic, and one revision."""
    return _system("cot", setting, drafts, seeds, progress)


def cod(setting: Setting, drafts: Sequence[Draft], seeds: Seeds, progress: Progress) -> list[Trial]:
    """Chain of drafts as a critic: three staged drafts of the feedback, and one revision."""
    return _system("cod", setting, drafts, seeds, progress)
