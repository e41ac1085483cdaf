"""What contexts have written: rewrites, feedback and reflections, by a critic or by the truth."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_fd.errors import UserError
from mlx_fd.feedback.criticism import feedback_request
from mlx_fd.models.conversation import Conversation, without_repeated_eos
from mlx_fd.models.generation import first_prompt, followup_prompt, generate, said
from mlx_fd.models.loading import Loaded
from mlx_fd.models.writing import GenerateOptions, Sampling
from mlx_fd.problems import Problem, parsing
from mlx_fd.problems.kinds import form_of, is_right, read_final
from mlx_fd.problems.prompts import FEEDBACK_OPENING, answer_prompt, revise_prompt
from mlx_fd.problems.sources import Truth, names_with_truth, truth_about
from mlx_fd.training.selfdistill.materials import Attempt, Materials, quoted, reference_of

# Conversations that are written side by side.
_TOGETHER = 32


def rewrite_request(problem: Problem, reference: str, attempt: str) -> str:
    """What a critic is asked who is to mend an attempt step by step, with the reference at hand."""
    asked = (
        "Write the attempt anew, step by step. Copy each right step word for word. Mend the first "
        "wrong step, and what follows from it, as close to the student's own way as can be. "
        "Write nothing but that solution."
    )
    return (
        f"Problem: {problem.question.strip()}\n\n"
        f"A solution known to be right:\n{quoted(reference)}\n\n"
        f"A student's attempt:\n{quoted(attempt)}\n\n"
        + " ".join(filter(None, (asked, form_of(problem).end)))
    )


def reflection_request() -> str:
    """What the author of a failed attempt, just given, is asked."""
    return (
        "This answer is wrong. In one sentence, say which step goes wrong first and why. In a "
        "second sentence, say what to do otherwise in problems of this kind."
    )


def rubric_request(question: str, reference: str) -> str:
    """What a critic is asked who is to say what makes an answer good, as RCSD's generator is.

    Args:
        question: the problem's.
        reference: a reference solution, as the published generator reads it; empty: the problem is
            all there is.
    """
    shown = f"A solution known to be right:\n{quoted(reference)}\n\n" if reference else ""
    return (
        f"Problem: {question.strip()}\n\n{shown}"
        'Write what a good answer has to meet, one criterion a line, each beginning with "- ". '
        "Copy nothing of a solution and give no number of it."
    )


def _truths(attempts: Sequence[Attempt]) -> list[Truth]:
    """What is known of each attempt's problem."""
    found = []
    for attempt in attempts:
        if (truth := truth_about(attempt.problem)) is None:
            raise UserError(
                f"{attempt.problem.id}: the true critique is known for generated problems only: "
                f"use --problems {names_with_truth()}, or a critic model"
            )
        found.append(truth)
    return found


def _needed(materials: Materials) -> Loaded:
    if materials.critic is None:
        raise UserError(
            "step-aligned critique needs a critic: name one with --critic, or take the truth "
            "about generated problems with --critic truth"
        )
    return materials.critic


def _batched(
    critic: Loaded, before: Sequence[tuple[int, ...]], limit: int
) -> list[tuple[tuple[int, ...], str]]:
    """Greedy turns after token prompts: all tokens of each conversation, and the turn's text."""
    written = []
    for begin in range(0, len(before), _TOGETHER):
        chunk = before[begin : begin + _TOGETHER]
        turns = generate(
            critic,
            [Conversation()] * len(chunk),
            chunk,
            Sampling(limit),
            GenerateOptions(keep=False),
        )
        written += [(turn.conversation.tokens, turn.text) for turn in turns]
    return written


def _answered(critic: Loaded, attempts: Sequence[Attempt]) -> list[tuple[int, ...]]:
    """Conversations in which the problem was put and the attempt is the answer."""
    return [
        said(
            critic,
            answer_prompt(attempt.problem.question, form_of(attempt.problem)),
            critic.tokenizer.encode(attempt.text, add_special_tokens=False),
        )
        for attempt in attempts
    ]


def _replies(
    critic: Loaded,
    before: Sequence[tuple[int, ...]],
    requests: Sequence[tuple[int, ...]],
    limit: int,
) -> list[tuple[tuple[int, ...], str]]:
    prompts = [
        (*chat, *without_repeated_eos(Conversation(chat), request))
        for chat, request in zip(before, requests, strict=True)
    ]
    return _batched(critic, prompts, limit)


def _feedback(
    critic: Loaded, attempts: Sequence[Attempt], limit: int
) -> list[tuple[tuple[int, ...], str]]:
    """The critic's feedback on each attempt: the conversation's tokens, and the paragraph."""
    requests = [feedback_request(critic)] * len(attempts)
    replies = _replies(critic, _answered(critic, attempts), requests, limit)
    return [
        (tokens, parsing.parse_feedback(f"{FEEDBACK_OPENING}{text}").text if text else "")
        for tokens, text in replies
    ]


def rewrites(attempts: Sequence[Attempt], materials: Materials) -> list[str]:
    """Each attempt mended step by step; empty where the critic did not come to the answer.

    Raises:
        UserError: there is neither critic nor truth, or the truth is not known.
    """
    if materials.truth:
        truths = zip(_truths(attempts), attempts, strict=True)
        return [truth.rewrite(a.problem, a.text) for truth, a in truths]
    critic = _needed(materials)
    if materials.critic_sees == "reference":
        requests = [
            rewrite_request(a.problem, reference_of(a.problem, materials), a.text) for a in attempts
        ]
        asked = [first_prompt(critic, request) for request in requests]
        written = _batched(critic, asked, materials.critic_tokens)
    else:
        judged = _feedback(critic, attempts, materials.critic_tokens)
        follow_ups = [
            followup_prompt(critic, revise_prompt("", form_of(a.problem))) for a in attempts
        ]
        written = _replies(
            critic, [tokens for tokens, _ in judged], follow_ups, materials.critic_tokens
        )
    return [
        text if is_right(read_final(text, attempt.problem), attempt.problem) else ""
        for (_, text), attempt in zip(written, attempts, strict=True)
    ]


def _noun(problem: Problem) -> str:
    return "number" if problem.kind == "number" else "answer"


def feedbacks(attempts: Sequence[Attempt], materials: Materials) -> list[str]:
    """Feedback on each attempt: true, a critic's, or else whether its final answer is right."""
    if materials.truth:
        truths = zip(_truths(attempts), attempts, strict=True)
        return [truth.feedback(a.problem, a.text) for truth, a in truths]
    if materials.critic is not None:
        given = _feedback(materials.critic, attempts, materials.critic_tokens)
        return [text for _, text in given]
    return [
        f"The final {_noun(a.problem)} is {'right' if a.correct else 'wrong'}."
        if a.final is not None
        else f"It has no final {_noun(a.problem)}."
        for a in attempts
    ]


def reflections(attempts: Sequence[Attempt], materials: Materials) -> list[str]:
    """A reflection on each failed attempt: where it goes wrong, and what to do otherwise."""
    if materials.truth:
        written = []
        for truth, attempt in zip(_truths(attempts), attempts, strict=True):
            kind = truth.judge(attempt.problem, attempt.text).kind
            text = truth.feedback(attempt.problem, attempt.text)
            written.append(" ".join(filter(None, [text, truth.lessons.get(kind)])))
        return written
    if materials.critic is None or materials.critic_sees == "problem":
        return feedbacks(attempts, materials)
    critic = materials.critic
    requests = [followup_prompt(critic, reflection_request())] * len(attempts)
    written_by = _replies(critic, _answered(critic, attempts), requests, materials.critic_tokens)
    return [text for _, text in written_by]


def rubrics(problems: Sequence[Problem], materials: Materials) -> list[str]:
    """Criteria of a good answer to each problem, written by the critic; they may be empty."""
    critic = _needed(materials)
    shown = [
        reference_of(problem, materials) if materials.critic_sees == "reference" else ""
        for problem in problems
    ]
    asked = [
        first_prompt(critic, rubric_request(problem.question, reference))
        for problem, reference in zip(problems, shown, strict=True)
    ]
    return [text.strip() for _, text in _batched(critic, asked, materials.critic_tokens)]
