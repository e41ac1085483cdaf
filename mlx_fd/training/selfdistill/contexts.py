"""What the self-teacher sees: the first axis of self-distillation.

Student and self-teacher are one model. It writes an attempt from the question alone; then it reads
the same attempt, token for token, once more, after a message that tells more. What it would have
written there is what is learned. A context makes that message. :data:`CONTEXTS` has one function
for each, all of the same shape: attempts and :class:`Materials` in, one :class:`View` an attempt
out.

Attempts may come from one problem or from many; siblings are attempts at the same problem.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from mlx_fd.errors import UserError
from mlx_fd.feedback.episode import feedback_request
from mlx_fd.models.generation import (
    Conversation,
    Sampling,
    first_prompt,
    followup_prompt,
    generate,
    without_repeated_eos,
)
from mlx_fd.models.loading import Loaded
from mlx_fd.problems import Problem, arithmetic, parsing
from mlx_fd.problems.prompts import FEEDBACK_OPENING, answer_prompt, revise_prompt
from mlx_fd.training.selfdistill.playbook import Playbook


@dataclass(frozen=True)
class Attempt:
    """What the student wrote on a problem.

    Attributes:
        problem: the problem.
        question: its text as the student read it, with noise if there was any.
        tokens: ids that were written, with the end-of-turn token where it came.
        text: the same without that token.
        final: the number arrived at, ``None`` where none could be read.
        correct: whether it is the problem's answer.
        logprobs: log-probability of each token when it was drawn, as long as ``tokens``.
    """

    problem: Problem
    question: str
    tokens: tuple[int, ...]
    text: str
    final: Fraction | None
    correct: bool
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class View:
    """The user's messages before one attempt. Its tokens follow each of them unchanged.

    Attributes:
        student: the message that the student read.
        teacher: the one that the self-teacher reads; ``None``: this attempt teaches nothing.
        wrong: the teacher's message with a wrong hint in the right one's place, for contrast.
        note: what was written on the attempt for this (a rewrite, a feedback, a reflection).
    """

    student: str
    teacher: str | None
    wrong: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Materials:
    """What contexts are made of, beside the attempts.

    Attributes:
        critic: a frozen model that writes critiques, feedback and reflections.
        truth: take the generator's true critique instead: an upper bound for every critic. Only
            for problems of ``mlx_fd.problems.arithmetic``.
        critic_sees: ``"reference"``: the critic rewrites with a reference solution before it, as
            published; ``"problem"``: it judges by itself, in the loop's own roles (feedback, then
            revision), which is what the models of this package know.
        critic_tokens: most tokens that the critic writes on one attempt.
        reference_style: ``"solution"``: a reference is the problem's solution as it stands;
            ``"prose"``: that of a generated problem is told in sentences, as another author would,
            where attempts have marked steps.
        demonstrations: by problem id, what is shown as demonstration; the problem's solution where
            there is none.
        playbook: what earlier rounds left, for reflections.
        most_wrong: most wrong hints for one attempt.
        seed: of the draws.
    """

    critic: Loaded | None = None
    truth: bool = False
    critic_sees: str = "reference"
    critic_tokens: int = 256
    reference_style: str = "solution"
    demonstrations: Mapping[str, str] = field(default_factory=dict)
    playbook: Playbook = field(default_factory=Playbook)
    most_wrong: int = 4
    seed: int = 0


Context = Callable[[Sequence[Attempt], Materials], list[View]]

# -------------------------------------------------------------------------------------- messages


_BLANK_LINES = re.compile(r"\n\s*\n+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def quoted(text: str) -> str:
    """A model's text without blank lines, so that it cannot pass for another part of a message."""
    return _BLANK_LINES.sub("\n", text.strip())


def _message(question: str, *parts: str) -> str:
    return answer_prompt("\n\n".join([question.strip(), *parts]))


def reference_message(question: str, solution: str) -> str:
    """The question with a reference solution."""
    return _message(
        question,
        f"A solution known to be right:\n{quoted(solution)}",
        "Understand it, then give your own; do not mention it.",
    )


def critique_message(question: str, rewrite: str) -> str:
    """The question with an attempt that a critic has mended."""
    return _message(
        question,
        f"Your attempt, kept as it was up to its first wrong step and mended from there:\n"
        f"{quoted(rewrite)}",
        "Give the solution; do not mention the attempt.",
    )


def feedback_message(question: str, feedback: str) -> str:
    """The question with feedback on an earlier attempt, which itself is not shown."""
    return _message(
        question,
        f"Feedback on an earlier attempt of yours:\n{quoted(feedback)}",
        "Mind it, and solve the problem anew.",
    )


def rubric_message(question: str, rubric: str) -> str:
    """The question with the criteria of a good answer."""
    return _message(question, f"A good answer meets these criteria:\n{quoted(rubric)}")


def demonstration_message(question: str, demonstration: str) -> str:
    """The question with a demonstration of how to answer it."""
    return _message(
        question,
        f"This is how a good answer to it looks:\n{quoted(demonstration)}",
        "Now answer in the same manner.",
    )


def hint_message(question: str, attempt: str) -> str:
    """The question with another attempt at it, of which is not said whether it is right."""
    return _message(question, f"Another attempt at it:\n{quoted(attempt)}")


def sibling_message(question: str, attempt: str) -> str:
    """The question with an attempt of the student's own that came out right."""
    return _message(question, f"An attempt of yours that came out right:\n{quoted(attempt)}")


def reflection_message(
    question: str, lessons: Sequence[str], attempt: str, reflection: str, solution: str
) -> str:
    """The question with what was learned from failing at it, and at others.

    Args:
        question: the question.
        lessons: of the playbook.
        attempt: the failed attempt; empty: it did not fail.
        reflection: on that attempt.
        solution: an earlier right solution of this very problem; empty: there is none.
    """
    parts = []
    if lessons:
        parts.append("Lessons from earlier mistakes:\n" + "\n".join(f"- {x}" for x in lessons))
    if attempt:
        parts.append(f"A failed attempt of yours:\n{quoted(attempt)}")
        parts.append(f"Your reflection on it:\n{quoted(reflection)}")
    if solution:
        parts.append(f"An earlier solution of yours that was right:\n{quoted(solution)}")
    return _message(question, *parts)


def rewrite_request(question: str, reference: str, attempt: str) -> str:
    """What a critic is asked who is to mend an attempt step by step, with the reference at hand."""
    return (
        f"Problem: {question.strip()}\n\n"
        f"A solution known to be right:\n{quoted(reference)}\n\n"
        f"A student's attempt:\n{quoted(attempt)}\n\n"
        "Write the attempt anew, step by step. Copy each right step word for word. Mend the first "
        "wrong step, and what follows from it, as close to the student's own way as can be. "
        "Write nothing but that solution. End with a line of its own: #### <number>"
    )


def reflection_request() -> str:
    """What the author of a failed attempt, just given, is asked."""
    return (
        "This answer is wrong. In one sentence, say which step goes wrong first and why. In a "
        "second sentence, say what to do otherwise in problems of this kind."
    )


# ---------------------------------------------------------------------------------------- writers


def _check_truth(attempts: Sequence[Attempt]) -> None:
    for attempt in attempts:
        if not arithmetic.is_generated(attempt.problem.solution):
            raise UserError(
                f"{attempt.problem.id}: the true critique is known for generated problems only: "
                "use --problems arithmetic, or a critic model"
            )


def true_rewrite(solution: str, answer: str) -> str:
    """An answer to a generated problem with its right steps verbatim and the others mended.

    Args:
        solution: the right solution.
        answer: the answer's text.
    """
    error = arithmetic.judge(solution, answer).first_error
    if not error:
        return answer
    kept: list[str] = []
    for line in answer.strip().split("\n"):
        if len(kept) == error - 1 or not arithmetic.read(line)[0]:
            break
        kept.append(line)
    return "\n".join([*kept, *solution.split("\n")[len(kept) :]])


def _batched(
    critic: Loaded, before: Sequence[tuple[int, ...]], limit: int, size: int = 32
) -> list[tuple[tuple[int, ...], str]]:
    """Greedy turns after token prompts: all tokens of each conversation, and the turn's text."""
    written = []
    for begin in range(0, len(before), size):
        chunk = before[begin : begin + size]
        turns = generate(critic, [Conversation()] * len(chunk), chunk, Sampling(limit), keep=False)
        written += [(turn.conversation.tokens, turn.text) for turn in turns]
    return written


def _answered(critic: Loaded, attempts: Sequence[Attempt]) -> list[tuple[int, ...]]:
    """Conversations in which the problem was put and the attempt is the answer."""
    return [
        (
            *first_prompt(critic.tokenizer, answer_prompt(attempt.problem.question)),
            *critic.tokenizer.encode(attempt.text, add_special_tokens=False),
        )
        for attempt in attempts
    ]


def _replies(
    critic: Loaded, before: Sequence[tuple[int, ...]], request: tuple[int, ...], limit: int
) -> list[tuple[tuple[int, ...], str]]:
    prompts = [(*said, *without_repeated_eos(Conversation(said), request)) for said in before]
    return _batched(critic, prompts, limit)


def _feedback(
    critic: Loaded, attempts: Sequence[Attempt], limit: int
) -> list[tuple[tuple[int, ...], str]]:
    """The critic's feedback on each attempt: the conversation's tokens, and the paragraph."""
    request = feedback_request(critic.tokenizer)
    replies = _replies(critic, _answered(critic, attempts), request, limit)
    return [
        (tokens, parsing.parse_feedback(f"{FEEDBACK_OPENING}{text}").text)
        for tokens, text in replies
    ]


def rewrites(attempts: Sequence[Attempt], materials: Materials) -> list[str]:
    """Each attempt mended step by step; empty where the critic did not come to the answer.

    Raises:
        UserError: there is neither critic nor truth, or the truth is not known.
    """
    if materials.truth:
        _check_truth(attempts)
        return [true_rewrite(a.problem.solution, a.text) for a in attempts]
    critic = _needed(materials)
    if materials.critic_sees == "reference":
        requests = [
            rewrite_request(
                a.problem.question,
                reference_of(a.problem, materials),
                a.text,
            )
            for a in attempts
        ]
        asked = [first_prompt(critic.tokenizer, request) for request in requests]
        written = _batched(critic, asked, materials.critic_tokens)
    else:
        judged = _feedback(critic, attempts, materials.critic_tokens)
        request = followup_prompt(critic.tokenizer, revise_prompt(""))
        written = _replies(
            critic, [tokens for tokens, _ in judged], request, materials.critic_tokens
        )
    return [
        text if parsing.same_answer(parsing.final_answer(text), attempt.problem.answer) else ""
        for (_, text), attempt in zip(written, attempts, strict=True)
    ]


def feedbacks(attempts: Sequence[Attempt], materials: Materials) -> list[str]:
    """Feedback on each attempt: true, a critic's, or else whether its final number is right."""
    if materials.truth:
        _check_truth(attempts)
        return [arithmetic.feedback_text(a.problem.solution, a.text) for a in attempts]
    if materials.critic is not None:
        given = _feedback(materials.critic, attempts, materials.critic_tokens)
        return [text for _, text in given]
    return [
        f"The final number is {'right' if a.correct else 'wrong'}."
        if a.final is not None
        else "It has no final number."
        for a in attempts
    ]


_LESSONS = {
    arithmetic.SLIP: "Calculate every step a second time before going on.",
    arithmetic.OPERATION: "Ask of each sentence whether things come, go or multiply.",
    arithmetic.QUANTITY: "Look up each number in the question again before using it.",
    arithmetic.MISSED: "Make a step of every sentence that changes the number asked for.",
    arithmetic.EXTRA: "Leave out what does not change the number asked for.",
    arithmetic.FINAL: "Repeat the last result as the final number.",
}


def reflections(attempts: Sequence[Attempt], materials: Materials) -> list[str]:
    """A reflection on each failed attempt: where it goes wrong, and what to do otherwise."""
    if materials.truth:
        _check_truth(attempts)
        written = []
        for attempt in attempts:
            kind = arithmetic.judge(attempt.problem.solution, attempt.text).kind
            said = arithmetic.feedback_text(attempt.problem.solution, attempt.text)
            written.append(f"{said} {_LESSONS[kind]}" if kind else said)
        return written
    if materials.critic is None or materials.critic_sees == "problem":
        return feedbacks(attempts, materials)
    critic = materials.critic
    request = followup_prompt(critic.tokenizer, reflection_request())
    written_by = _replies(critic, _answered(critic, attempts), request, materials.critic_tokens)
    return [text for _, text in written_by]


def lessons() -> list[str]:
    """The lessons that true reflections give, one for each kind of error."""
    return list(_LESSONS.values())


def lesson(reflection: str) -> str:
    """The lesson of a reflection: its last sentence; a general one where it names a known slip."""
    for kind, text in _LESSONS.items():
        if f": {kind}." in reflection:
            return text
    sentences = _SENTENCE_END.split(quoted(reflection).replace("\n", " "))
    return sentences[-1][:200]


def reference_of(problem: Problem, materials: Materials) -> str:
    """A problem's reference solution, in the style that was chosen."""
    if materials.reference_style == "prose" and arithmetic.is_generated(problem.solution):
        return arithmetic.prose(problem.solution)
    return problem.solution


def _needed(materials: Materials) -> Loaded:
    if materials.critic is None:
        raise UserError(
            "step-aligned critique needs a critic: name one with --critic, or take the truth "
            "about generated problems with --critic truth"
        )
    return materials.critic


_ORDER = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_VERBS = {"+": "adds", "-": "subtracts", "*": "multiplies", "x": "multiplies", "/": "divides"}
_MARK = re.compile(r"<<([^<>=]*)=[^<>]*>>")
_OPERATION = re.compile(r"(?<=[\d.%)])\s*([-+*x/])")
_GENERAL = (
    "Every number of the question that bears on what is asked is used, and no other.",
    "Every calculation is written out and right.",
    "The last line gives the final number.",
)


def rubric(problem: Problem) -> str:
    """Criteria of a good answer to a problem, without a digit of the answer or of any other number.

    Where the solution marks its calculations, as GSM8K's do, the rubric says what kind each is.
    """
    marks = [_OPERATION.findall(mark) for mark in _MARK.findall(problem.solution)]
    kinds = [" and ".join(dict.fromkeys(_VERBS[sign] for sign in mark)) for mark in marks if mark]
    lines = [
        f"The {order} step {verb}."
        for order, verb in zip(_ORDER, kinds, strict=False)
        if len(kinds) <= len(_ORDER)
    ]
    return "\n".join(f"- {line}" for line in [*lines, *_GENERAL])


# --------------------------------------------------------------------------------------- contexts


def _read(attempt: Attempt) -> str:
    return answer_prompt(attempt.question)


def _siblings(attempts: Sequence[Attempt], place: int, *, correct: bool) -> list[Attempt]:
    own = attempts[place]
    return [
        other
        for k, other in enumerate(attempts)
        if k != place and other.problem.id == own.problem.id and other.correct == correct
    ]


def none(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """Nothing more than the student saw."""
    return [View(_read(a), _read(a)) for a in attempts]


def reference(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """The reference solution (OPSD, arXiv 2601.18734)."""
    return [
        View(_read(a), reference_message(a.problem.question, reference_of(a.problem, materials)))
        for a in attempts
    ]


def step_critique(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """The attempt itself, right steps verbatim, mended from its first wrong one (2606.11173)."""
    return [
        View(_read(a), critique_message(a.problem.question, text) if text else None, note=text)
        for a, text in zip(attempts, rewrites(attempts, materials), strict=True)
    ]


def feedback(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """Feedback on the attempt, in a paragraph."""
    return [
        View(_read(a), feedback_message(a.problem.question, text), note=text)
        for a, text in zip(attempts, feedbacks(attempts, materials), strict=True)
    ]


def rubric_criteria(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """Criteria of a good answer, without the answer (RCSD, 2606.19327)."""
    return [
        View(_read(a), rubric_message(a.problem.question, text), note=text)
        for a, text in ((a, rubric(a.problem)) for a in attempts)
    ]


def demonstration(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """A demonstration for this very question (SDFT, 2601.19897)."""
    shown = (materials.demonstrations.get(a.problem.id, a.problem.solution) for a in attempts)
    return [
        View(_read(a), demonstration_message(a.problem.question, text))
        for a, text in zip(attempts, shown, strict=True)
    ]


def sibling(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """A sibling attempt that came out right, else feedback (SDPO, 2601.20802).

    Where there is neither critic nor truth an attempt without such a sibling teaches nothing.
    """
    right = [_siblings(attempts, k, correct=True) for k in range(len(attempts))]
    alone = [a for a, others in zip(attempts, right, strict=True) if not others]
    if materials.truth or materials.critic is not None:
        said = iter(feedback(alone, materials))
    else:
        said = iter([View(_read(a), None) for a in alone])
    return [
        View(_read(a), sibling_message(a.problem.question, others[0].text))
        if others
        else next(said)
        for a, others in zip(attempts, right, strict=True)
    ]


def reflection(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """Reflection on the failure, lessons of earlier ones, earlier solutions (Resd, 2605.12741)."""
    lessons = [lesson.text for lesson in materials.playbook.lessons]
    notes = iter(reflections([a for a in attempts if not a.correct], materials))
    views = []
    for attempt in attempts:
        solution = materials.playbook.solutions.get(attempt.problem.id, "")
        question = attempt.problem.question
        if not attempt.correct:
            note = next(notes)
            message = reflection_message(question, lessons, attempt.text, note, solution)
            views.append(View(_read(attempt), message, note=note))
        elif lessons or solution:
            message = reflection_message(question, lessons, "", "", solution)
            views.append(View(_read(attempt), message))
        else:
            views.append(View(_read(attempt), None))
    return views


def clean(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """The clean question, where the student read it with noise (EchoDistill, 2605.23954)."""
    return [View(_read(a), answer_prompt(a.problem.question)) for a in attempts]


def contrast(attempts: Sequence[Attempt], materials: Materials) -> list[View]:
    """A right sibling as hint, and wrong ones in the same words (RLCSD, 2606.11709)."""
    views = []
    for place, attempt in enumerate(attempts):
        right = _siblings(attempts, place, correct=True)
        wrong = _siblings(attempts, place, correct=False)
        if not right or not wrong:
            views.append(View(_read(attempt), None))
            continue
        rng = random.Random(f"contrast/{materials.seed}/{attempt.problem.id}/{place}")
        drawn = rng.sample(wrong, min(materials.most_wrong, len(wrong)))
        question = attempt.problem.question
        views.append(
            View(
                _read(attempt),
                hint_message(question, right[0].text),
                tuple(hint_message(question, other.text) for other in drawn),
            )
        )
    return views


CONTEXTS: dict[str, Context] = {
    "none": none,
    "reference": reference,
    "step-critique": step_critique,
    "feedback": feedback,
    "rubric": rubric_criteria,
    "demonstration": demonstration,
    "sibling": sibling,
    "reflection": reflection,
    "clean": clean,
    "contrast": contrast,
}

GROUPED = ("sibling", "contrast")
"""Contexts that want several attempts at each problem."""


def describe(name: str) -> str:
    """A context in one line.

    Raises:
        UserError: there is no such context.
    """
    if name not in CONTEXTS:
        raise UserError(f"there is no context {name!r}, only {', '.join(CONTEXTS)}")
    return (CONTEXTS[name].__doc__ or "").split("\n")[0]


def remember(playbook: Playbook, attempts: Sequence[Attempt], views: Sequence[View]) -> Playbook:
    """The playbook after a round of the context ``reflection``.

    Args:
        playbook: what the round began with.
        attempts: its attempts.
        views: what :func:`reflection` made of them.
    """
    lessons = [
        lesson(view.note)
        for attempt, view in zip(attempts, views, strict=True)
        if not attempt.correct and view.note
    ]
    right = {attempt.problem.id: attempt.text for attempt in attempts if attempt.correct}
    return playbook.after(lessons, right)
