"""One episode of Online Feedback Distillation: its six steps, over a batch of problems.

1. The expert answers.                         :func:`first_answers`
2. Expert and student each give feedback.      :func:`student_feedback`, :func:`expert_feedback`
3. The gate looks; 4. the student learns.      :mod:`.gate`, :mod:`.distill`
5. The feedback is merged, expert first.       :func:`finish`
6. The expert revises, criticises itself and gives the final answer.

The expert's turns on a problem are one growing conversation, so each token is prefilled once. The
student reads the same conversation up to the request for feedback, token for token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import mlx.core as mx

from mlx_fd.config import EpisodeOptions, GenerationOptions
from mlx_fd.feedback.pair import Pair
from mlx_fd.models.generation import (
    Conversation,
    Sampling,
    Turn,
    first_prompt,
    followup_prompt,
    forward,
    generate,
    prefill,
    sampling_for,
    without_repeated_eos,
)
from mlx_fd.models.loading import Loaded
from mlx_fd.models.student import Student
from mlx_fd.problems import Problem, parsing
from mlx_fd.problems.prompts import (
    FEEDBACK_OPENING,
    Answer,
    Feedback,
    answer_prompt,
    critique_prompt,
    feedback_prompt,
    final_prompt,
    merge_prompt,
    revise_prompt,
)

Progress = Callable[[str, int], None]
"""Called with the step's name and the tokens just written."""


@dataclass(frozen=True)
class Draft:
    """An episode under way, after step 2.

    Attributes:
        problem: the problem.
        answer: the first answer, the expert's unless ``answers_by`` says otherwise.
        after_answer: the expert's conversation up to and with that answer.
        request: tokens of the request for feedback, as they follow the answer.
        student_feedback: its text, the score parsed from it, and its tokens.
        student_score: its score head's score in (-1, 1), read where ``score_at`` says; ``None``:
            it has no opinion.
        expert_feedback: ``None`` where the student stands alone.
        after_feedback: the expert's conversation up to and with its feedback.
        tokens: tokens written, by step.
        prefilled: tokens read, by step.
        seconds: this problem's share of each step's time.
        capped: steps that ended at the token limit.
    """

    problem: Problem
    answer: Answer
    after_answer: Conversation
    request: tuple[int, ...] = ()
    student_feedback: Feedback = field(default_factory=lambda: Feedback("", None, ()))
    student_score: float | None = 0.0
    expert_feedback: Feedback | None = None
    after_feedback: Conversation | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    prefilled: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    capped: tuple[str, ...] = ()

    @property
    def prompt(self) -> tuple[int, ...]:
        """All tokens that both models read before they write their feedback."""
        return (*self.after_answer.tokens, *self.request)


@dataclass(frozen=True)
class Outcome:
    """The end of an episode, after step 6.

    Attributes:
        draft: steps 1 and 2, with the counts of all steps.
        score: the combined score, ``None`` where neither model gave one.
        merged: the feedback that the revision follows; empty where none was needed.
        revised: the revised answer's text; empty where the first answer was good enough.
        critique: the expert's critique of its revision.
        final: the final answer.
    """

    draft: Draft
    score: float | None
    merged: str
    revised: str
    critique: str
    final: Answer


def combined_score(expert: float | None, student: float | None, weight: float) -> float | None:
    """(weight * student + expert) / (1 + weight); the one that is there where the other is not."""
    if expert is None or student is None:
        return student if expert is None else expert
    return (weight * student + expert) / (1 + weight)


def is_correct(answer: Fraction | None, problem: Problem) -> bool:
    """Whether a final answer is the problem's, as a number."""
    return parsing.same_answer(answer, problem.answer)


def derive_seed(seed: int, batch: int, step: str) -> int:
    """The seed of one step's draws: it depends on nothing that came before."""
    digest = hashlib.sha256(f"{seed}/{batch}/{step}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def write(
    loaded: Loaded,
    drafts: Sequence[Draft],
    step: str,
    conversations: Sequence[Conversation],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    reuse: bool,
    progress: Progress,
    keep: bool = True,
) -> tuple[list[Draft], list[Turn]]:
    """One step: a turn in each conversation, and the drafts with its counts.

    Args:
        loaded: who writes.
        drafts: what the counts are added to.
        step: the step's name.
        conversations: what was said so far.
        prompts: the new tokens of each.
        sampling: how to draw.
        reuse: go on from the conversations' caches.
        progress: told of every token.
        keep: keep the caches, to go on from the turns.

    Returns:
        The drafts and the turns, in order.
    """
    begin = time.perf_counter()
    turns = generate(
        loaded,
        conversations,
        prompts,
        sampling,
        reuse=reuse,
        keep=keep,
        on_token=lambda count: progress(step, count),
    )
    share = (time.perf_counter() - begin) / max(len(turns), 1)
    return [
        dataclasses.replace(
            draft,
            tokens={**draft.tokens, step: len(turn.tokens)},
            prefilled={**draft.prefilled, step: turn.prefilled},
            seconds={**draft.seconds, step: draft.seconds.get(step, 0.0) + share},
            capped=draft.capped if turn.finished else (*draft.capped, step),
        )
        for draft, turn in zip(drafts, turns, strict=True)
    ], turns


def read_answer(turn: Turn, options: GenerationOptions) -> Answer:
    """A turn's text and the final number in it."""
    final = parsing.final_answer(turn.text, options.answer_filter)
    return Answer(turn.text, final, turn.tokens)


def answer(
    loaded: Loaded,
    problems: Sequence[Problem],
    options: GenerationOptions,
    seed: int,
    progress: Progress,
    *,
    temperature: float | None = None,
    keep: bool = True,
) -> list[Draft]:
    """Step 1: answers to the problems, by the expert (or, for comparison, another model).

    Args:
        loaded: the model that answers.
        problems: the problems.
        options: token limit and sampling.
        seed: of the draws.
        progress: told of every token.
        temperature: ``None``: that of first answers.
        keep: keep the caches, to go on from the answers.
    """
    blank = [Draft(p, Answer("", None, ()), Conversation()) for p in problems]
    prompts = [first_prompt(loaded.tokenizer, answer_prompt(p.question)) for p in problems]
    sampling = sampling_for(options, "answer", seed)
    if temperature is not None:
        sampling = dataclasses.replace(sampling, temperature=temperature)
    drafts, turns = write(
        loaded,
        blank,
        "answer",
        [Conversation()] * len(problems),
        prompts,
        sampling,
        not options.sequential,
        progress,
        keep=keep,
    )
    request = feedback_request(loaded.tokenizer)
    return [
        dataclasses.replace(
            draft,
            answer=read_answer(turn, options),
            after_answer=turn.conversation,
            request=without_repeated_eos(turn.conversation, request),
        )
        for draft, turn in zip(drafts, turns, strict=True)
    ]


def first_answers(
    pair: Pair,
    problems: Sequence[Problem],
    options: GenerationOptions,
    seed: int,
    progress: Progress,
) -> list[Draft]:
    """Step 1: the answers that are judged, by the model that ``answers_by`` names.

    What the student answers stands in the expert's conversation as if the expert had said it.
    """
    if options.answers_by == "expert":
        return answer(pair.expert, problems, options, seed, progress)
    drafts = answer(pair.student_lm, problems, options, seed, progress, keep=False)
    return [
        dataclasses.replace(draft, after_answer=Conversation(draft.after_answer.tokens))
        for draft in drafts
    ]


def feedback_request(tokenizer: Any, prompt: str = "") -> tuple[int, ...]:
    """Tokens of a request for feedback, up to and with the reply's first word.

    Args:
        tokenizer: whose tokens.
        prompt: what is asked; empty: the role's own prompt.
    """
    begun = tokenizer.encode(FEEDBACK_OPENING, add_special_tokens=False)
    return (*followup_prompt(tokenizer, prompt or feedback_prompt()), *begun)


def parsed(turn: Turn) -> Feedback:
    """What a model wrote after :func:`feedback_request`."""
    return parsing.parse_feedback(f"{FEEDBACK_OPENING} {turn.text}", turn.tokens)


def head_score(
    student: Student,
    student_lm: Loaded,
    hidden: mx.array,
    before: Conversation,
    prompt: Sequence[int],
    turn: Turn,
) -> float:
    """The score of the student's head on an answer that it gave feedback on.

    Args:
        student: the student.
        student_lm: its language model.
        hidden: its final hidden state [d] at the prompt's last token.
        before: its conversation up to that token, which it does not hold.
        prompt: all tokens before the feedback.
        turn: its feedback.
    """
    if student.score_at == "feedback":
        hidden = forward(student_lm, before, [prompt[-1], *turn.tokens[:-1]]).final[0, -1]
    return float(student.score(hidden))


def student_feedback(
    pair: Pair,
    drafts: Sequence[Draft],
    options: GenerationOptions,
    seed: int,
    progress: Progress,
) -> list[Draft]:
    """Step 2, the student's half: its feedback, and its score head's score."""
    read, conversations, states = [], [], []
    for draft in drafts:
        begin = time.perf_counter()
        hidden, before = prefill(
            pair.student_lm, Conversation(), draft.prompt, reuse=not options.sequential
        )
        conversations.append(before)
        states.append(hidden)
        read.append(
            dataclasses.replace(
                draft,
                seconds={**draft.seconds, "student_feedback": time.perf_counter() - begin},
            )
        )
    sampling = sampling_for(options, "student_feedback", seed)
    done, turns = write(
        pair.student_lm,
        read,
        "student_feedback",
        conversations,
        [draft.prompt[-1:] for draft in read],
        sampling,
        not options.sequential,
        progress,
        keep=False,
    )
    return [
        dataclasses.replace(
            draft,
            student_feedback=parsed(turn),
            student_score=head_score(
                pair.student, pair.student_lm, hidden, before, draft.prompt, turn
            ),
            prefilled={**draft.prefilled, "student_feedback": len(draft.prompt)},
        )
        for draft, turn, hidden, before in zip(done, turns, states, conversations, strict=True)
    ]


def expert_feedback(
    pair: Pair,
    drafts: Sequence[Draft],
    options: GenerationOptions,
    seed: int,
    progress: Progress,
) -> list[Draft]:
    """Step 2, the expert's half: its feedback, and the score parsed from it."""
    sampling = sampling_for(options, "expert_feedback", seed)
    done, turns = write(
        pair.expert,
        list(drafts),
        "expert_feedback",
        [draft.after_answer for draft in drafts],
        [draft.request for draft in drafts],
        sampling,
        not options.sequential,
        progress,
    )
    return [
        dataclasses.replace(
            draft,
            expert_feedback=parsed(turn),
            # The longer conversation's cache holds all of the shorter one's.
            after_answer=Conversation(draft.after_answer.tokens),
            after_feedback=turn.conversation,
        )
        for draft, turn in zip(done, turns, strict=True)
    ]


def expert_turn(
    pair: Pair,
    drafts: Sequence[Draft],
    step: str,
    before: Sequence[Conversation],
    requests: Sequence[tuple[int, ...]],
    role: str,
    options: GenerationOptions,
    seed: int,
    progress: Progress,
    keep: bool = True,
) -> tuple[list[Draft], list[Turn]]:
    """One more turn of the expert in each conversation.

    Args:
        pair: the models; only the expert writes.
        drafts: what the step's counts are added to.
        step: the step's name.
        before: the expert's conversations.
        requests: tokens of what it is asked, as :func:`mlx_fd.models.generation.followup_prompt`
        gives them.
        role: the step of :func:`mlx_fd.models.generation.sampling_for` that it is drawn like.
        options: token limits and sampling.
        seed: of the draws.
        progress: told of every token.
        keep: keep the caches, to go on from the turns.

    Returns:
        The drafts and the turns, in order.
    """
    prompts = [
        without_repeated_eos(conversation, asked)
        for conversation, asked in zip(before, requests, strict=True)
    ]
    sampling = sampling_for(options, role, seed)
    reuse = not options.sequential
    return write(pair.expert, drafts, step, before, prompts, sampling, reuse, progress, keep)


def finish(
    pair: Pair,
    drafts: Sequence[Draft],
    options: GenerationOptions,
    episode: EpisodeOptions,
    seeds: Callable[[str], int],
    progress: Progress,
) -> list[Outcome]:
    """Steps 5 and 6: merge, revise, criticise, final answer.

    An answer whose combined score reaches ``target_score`` is left as it is.

    Args:
        pair: the models; only the expert writes here.
        drafts: after step 2.
        options: token limits and sampling.
        episode: the target score and the student's weight in the combined score.
        seeds: step name to the seed of its draws.
        progress: told of every token.

    Returns:
        One outcome for each draft, in order.
    """
    outcomes: dict[int, Outcome] = {}
    open_drafts: list[tuple[int, Draft, float | None]] = []
    for place, draft in enumerate(drafts):
        expert_score = draft.expert_feedback.score if draft.expert_feedback else None
        # An expert whose score cannot be read is not overruled by the student that learns from it.
        unread = draft.expert_feedback is not None and expert_score is None
        student_score = None if unread else draft.student_score
        score = combined_score(expert_score, student_score, episode.student_weight)
        if score is not None and score >= episode.target_score:
            outcomes[place] = Outcome(draft, score, "", "", "", draft.answer)
        else:
            open_drafts.append((place, draft, score))

    def turn_of(
        step: str,
        todo: list[Draft],
        before: list[Conversation],
        messages: list[str],
        keep: bool = True,
    ) -> tuple[list[Draft], list[Turn]]:
        requests = [followup_prompt(pair.expert.tokenizer, text) for text in messages]
        return expert_turn(
            pair, todo, step, before, requests, step, options, seeds(step), progress, keep
        )

    todo = [draft for _, draft, _ in open_drafts]
    before = [draft.after_feedback or draft.after_answer for draft in todo]
    # Where the expert gave feedback it stands in the conversation, and need not be said again.
    expert_texts = [draft.expert_feedback.text if draft.expert_feedback else "" for draft in todo]
    student_texts = [draft.student_feedback.text for draft in todo]
    revision_requests = [
        "" if own else other for own, other in zip(expert_texts, student_texts, strict=True)
    ]
    feedback = [own or other for own, other in zip(expert_texts, student_texts, strict=True)]
    merging = [
        place
        for place, draft in enumerate(todo)
        if draft.expert_feedback
        and parsing.needs_merge(draft.expert_feedback, draft.student_feedback)
    ]
    merged, turns = turn_of(
        "merge",
        [todo[place] for place in merging],
        [before[place] for place in merging],
        [_merge_message(todo[place]) for place in merging],
    )
    for place, draft, turn in zip(merging, merged, turns, strict=True):
        todo[place], before[place], feedback[place] = draft, turn.conversation, turn.text

    # Each step's conversations take the place of the last one's, whose caches are let go.
    written: dict[str, list[str]] = {}
    for step, messages in (
        ("revise", [revise_prompt(text) for text in revision_requests]),
        ("critique", [critique_prompt()] * len(todo)),
        ("final", [final_prompt()] * len(todo)),
    ):
        todo, turns = turn_of(step, todo, before, messages, keep=step != "final")
        before = [turn.conversation for turn in turns]
        written[step] = [turn.text for turn in turns]
    for (place, _, score), draft, text, revised, critique, turn in zip(
        open_drafts, todo, feedback, written["revise"], written["critique"], turns, strict=True
    ):
        final = read_answer(turn, options)
        outcomes[place] = Outcome(draft, score, text, revised, critique, final)
    return [outcomes[place] for place in range(len(drafts))]


def _merge_message(draft: Draft) -> str:
    assert draft.expert_feedback is not None
    return merge_prompt(draft.expert_feedback, draft.student_feedback)


def _number(value: Fraction | None) -> str | None:
    return None if value is None else str(value)


def to_json(outcome: Outcome, index: int, gate: dict[str, Any]) -> dict[str, Any]:
    """An episode as one line of ``episodes.jsonl``.

    Args:
        outcome: the episode.
        index: its place in the run, from 0.
        gate: what the gate decided, and the losses before and after the update.
    """
    draft = outcome.draft
    expert, student = draft.expert_feedback, draft.student_feedback
    return {
        "episode": index,
        "id": draft.problem.id,
        "question": draft.problem.question,
        "reference": _number(draft.problem.answer),
        "answer": {"text": draft.answer.text, "final": _number(draft.answer.final)},
        "expert_feedback": expert and {"text": expert.text, "score": expert.score},
        "student_feedback": {
            "text": student.text,
            "score": draft.student_score,
            "written_score": student.score,
        },
        "gate": gate,
        "score": outcome.score,
        "merged": outcome.merged,
        "revised": outcome.revised,
        "critique": outcome.critique,
        "final": {"text": outcome.final.text, "final": _number(outcome.final.final)},
        "correct_before": is_correct(draft.answer.final, draft.problem),
        "correct_after": is_correct(outcome.final.final, draft.problem),
        "tokens": draft.tokens,
        "prefilled": draft.prefilled,
        "capped": list(draft.capped),
        "seconds": {step: round(value, 3) for step, value in draft.seconds.items()},
    }
