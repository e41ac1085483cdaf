"""The turns of an episode: what each model is asked, and what its reply is read as.

Each function with ``write`` in its name is one episode's, as :mod:`mlx_fd.feedback.asking` has it;
the others carry a batch of them on together.

The expert's turns on a problem are one growing conversation, so each token is prefilled once. The
student reads the same conversation up to the request for feedback, token for token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mlx_fd.config import EpisodeOptions, GenerationOptions
from mlx_fd.feedback.asking import (
    Ask,
    OnTokens,
    Seeds,
    Turns,
    ask_in_step,
    asked,
    generate_step,
    usage_of,
)
from mlx_fd.feedback.criticism import Criticism, feedback_request, head_score, parsed
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.stages import (
    Answered,
    ExpertFeedback,
    Finished,
    Judged,
    StudentFeedback,
    Usage,
    combined_score,
)
from mlx_fd.feedback.two_tokenizers import to_expert, to_student
from mlx_fd.models.conversation import Conversation, without_repeated_eos
from mlx_fd.models.generation import first_prompt, followup_prompt, said
from mlx_fd.models.loading import Loaded
from mlx_fd.models.writing import GenerateOptions, Sampling, Turn, sampling_for
from mlx_fd.problems import Problem, parsing
from mlx_fd.problems.kinds import form_of, is_comparable, read_final, same_final
from mlx_fd.problems.prompts import (
    Answer,
    answer_prompt,
    critique_prompt,
    final_prompt,
    merge_prompt,
    revise_prompt,
)

# ---- step 1 ----


def read_answer(turn: Turn, problem: Problem, options: GenerationOptions) -> Answer:
    """A turn's text and the final answer in it."""
    final = read_final(turn.text, problem, options.answer_filter)
    return Answer(turn.text, final, turn.tokens, turn.opening)


def write_answer(
    loaded: Loaded,
    problem: Problem,
    options: GenerationOptions,
    *,
    temperature: float | None = None,
    keep: bool = True,
    step: str = "answer",
) -> Turns[Answered]:
    """Step 1: an answer to a problem, as :func:`answer` gives them; counted as ``step``."""
    sampling = sampling_for(options, "answer", 0)
    if temperature is not None:
        sampling = dataclasses.replace(sampling, temperature=temperature)
    prompt = first_prompt(loaded, answer_prompt(problem.question, form_of(problem)))
    how = GenerateOptions(reuse=not options.sequential, keep=keep)
    reply = yield from asked(Ask(loaded, step, Conversation(), prompt, sampling, how))
    before = reply.turn.conversation
    return Answered(
        problem,
        read_answer(reply.turn, problem, options),
        before,
        without_repeated_eos(before, feedback_request(loaded)),
        usage_of(step, reply.turn, reply.seconds),
    )


def answer(
    loaded: Loaded,
    problems: Sequence[Problem],
    options: GenerationOptions,
    seed: int,
    on_tokens: OnTokens,
    *,
    temperature: float | None = None,
    keep: bool = True,
) -> list[Answered]:
    """Step 1: answers to the problems, by the expert (or, for comparison, another model).

    Args:
        loaded: the model that answers.
        problems: the problems.
        options: token limit and sampling.
        seed: of the draws.
        on_tokens: called for every token.
        temperature: ``None``: that of first answers.
        keep: keep the caches, to go on from the answers.
    """
    works = [
        write_answer(loaded, one, options, temperature=temperature, keep=keep) for one in problems
    ]
    return ask_in_step(works, lambda step: seed, on_tokens)


def write_first_answer(pair: Pair, problem: Problem, options: GenerationOptions) -> Turns[Answered]:
    """Step 1: the answer that an episode goes on from, by the model that ``answers_by`` names."""
    if options.answers_by == "student":
        return (yield from write_student_answer(pair, problem, options))
    temperature = options.expert_temperature if options.answers_by == "both" else None
    return (yield from write_answer(pair.expert, problem, options, temperature=temperature))


def first_answers(
    pair: Pair,
    problems: Sequence[Problem],
    options: GenerationOptions,
    seed: int,
    on_tokens: OnTokens,
) -> list[Answered]:
    """Step 1: the answers that the episodes go on from, by the model that ``answers_by`` names."""
    works = [write_first_answer(pair, problem, options) for problem in problems]
    return ask_in_step(works, lambda step: seed, on_tokens)


def write_student_answer(
    pair: Pair, problem: Problem, options: GenerationOptions
) -> Turns[Answered]:
    """Step 1 by the student.

    What it answers stands in the expert's conversation as if the expert had said it.
    """
    answered = yield from write_answer(pair.student_lm, problem, as_student(options), keep=False)
    (said_so,) = said_by_expert(pair, [answered])
    return said_so


def as_student(options: GenerationOptions) -> GenerationOptions:
    """The options of a student that answers: its own repetition penalty."""
    return dataclasses.replace(
        options, expert_repetition_penalty=options.student_repetition_penalty
    )


def said_by_expert(pair: Pair, answered: Sequence[Answered]) -> list[Answered]:
    """The student's answers in conversations of the expert, as if that had given them."""
    request = feedback_request(pair.expert)
    return [
        dataclasses.replace(
            one,
            answer=dataclasses.replace(one.answer, tokens=tokens),
            conversation=before,
            request=without_repeated_eos(before, request),
            by_student=True,
        )
        for one in answered
        for tokens in (to_expert(pair, one.answer.tokens),)
        for before in (Conversation(_answered_chat(pair.expert, one.problem, tokens)),)
    ]


def _answered_chat(loaded: Loaded, problem: Problem, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The chat of an answer, as if a model had given it itself."""
    return said(loaded, answer_prompt(problem.question, form_of(problem)), tokens)


# ---- step 2 ----


def student_prompt(pair: Pair, answered: Answered) -> tuple[int, ...]:
    """All tokens that the student reads before its feedback, but for what it thinks.

    They are the expert's, or where the two have different templates or tokenizers, the same text as
    the student's write it.
    """
    if pair.shared is None and pair.student_lm.template == pair.expert.template:
        return answered.prompt
    tokens = to_student(pair, answered.answer.tokens)
    chat = _answered_chat(pair.student_lm, answered.problem, tokens)
    return (*chat, *without_repeated_eos(Conversation(chat), feedback_request(pair.student_lm)))


def write_student_feedback(
    pair: Pair, answered: Answered, options: GenerationOptions, step: str = "student_feedback"
) -> Turns[StudentFeedback]:
    """Step 2, the student's half: its feedback on an answer, and its score head's score."""
    reply = yield from asked(
        Ask(
            pair.student_lm,
            step,
            Conversation(),
            student_prompt(pair, answered),
            sampling_for(options, "student_feedback", 0),
            GenerateOptions(reuse=not options.sequential, logprobs=True),
            alone=True,
        )
    )
    turn, score = reply.turn, None
    if pair.student.scores:
        score = head_score(pair.student, pair.student_lm, Criticism(turn, reply.prompt))
    return StudentFeedback(
        parsed(turn),
        score,
        usage_of(step, turn, reply.seconds),
        min(sum(turn.logprobs), 0.0),
    )


def student_feedback(
    pair: Pair,
    answered: Sequence[Answered],
    options: GenerationOptions,
    seed: int,
    on_tokens: OnTokens,
) -> list[StudentFeedback]:
    """Step 2, the student's half: its feedback, and its score head's score."""
    works = [write_student_feedback(pair, one, options) for one in answered]
    return ask_in_step(works, lambda step: seed, on_tokens)


def write_expert_feedback(
    pair: Pair, answered: Answered, options: GenerationOptions, step: str = "expert_feedback"
) -> Turns[ExpertFeedback]:
    """Step 2, the expert's half: its feedback on an answer, and the score written in it.

    Args:
        pair: the models; only the expert writes.
        answered: an episode after step 1.
        options: token limits and sampling.
        step: what it is counted as.
    """
    reply = yield from asked(
        Ask(
            pair.expert,
            step,
            answered.conversation,
            answered.request,
            sampling_for(options, "expert_feedback", 0),
            # Whoever learns from it reads it from where it begins.
            GenerateOptions(reuse=not options.sequential, mark=True),
        )
    )
    usage = usage_of(step, reply.turn, reply.seconds)
    return ExpertFeedback(parsed(reply.turn), reply.turn.conversation, usage)


def expert_feedback(
    pair: Pair,
    answered: Sequence[Answered],
    options: GenerationOptions,
    seed: int,
    on_tokens: OnTokens,
) -> list[ExpertFeedback]:
    """Step 2, the expert's half: its feedback, and the score written in it.

    Args:
        pair: the models; only the expert writes.
        answered: episodes after step 1.
        options: token limits and sampling.
        seed: of the draws.
        on_tokens: called for every token.
    """
    works = [write_expert_feedback(pair, one, options) for one in answered]
    return ask_in_step(works, lambda step: seed, on_tokens)


def judged_by(
    answered: Answered, student: StudentFeedback, expert: ExpertFeedback | None
) -> Judged:
    """An episode with the feedback that was given on its answer."""
    if expert is None:
        return Judged(answered, student, None)
    # The cache of the conversation with the feedback holds all of the one without it.
    before = Conversation(answered.conversation.tokens)
    return Judged(dataclasses.replace(answered, conversation=before), student, expert)


def judge(
    answered: Sequence[Answered],
    students: Sequence[StudentFeedback],
    experts: Mapping[int, ExpertFeedback],
) -> list[Judged]:
    """Episodes with the feedback that was given on them.

    Args:
        answered: after step 1.
        students: the student's feedback on each.
        experts: the expert's by index, where it was asked.
    """
    return [
        judged_by(one, student, experts.get(index))
        for index, (one, student) in enumerate(zip(answered, students, strict=True))
    ]


def said_again(judged: Judged, student: StudentFeedback) -> Judged:
    """An episode with what the student says after it learned; the gate saw what it said before."""
    return dataclasses.replace(judged, student=student, before=judged.student)


# ---- step 5 ----


def expert_turn(
    pair: Pair,
    step: str,
    before: Sequence[Conversation],
    requests: Sequence[tuple[int, ...]],
    sampling: Sampling,
    on_tokens: OnTokens,
    options: GenerateOptions,
) -> tuple[list[Turn], list[Usage]]:
    """One more turn of the expert in each conversation, outside of an episode.

    Args:
        pair: the models; only the expert writes.
        step: the step's name.
        before: the expert's conversations.
        requests: tokens of what it is asked, as :func:`mlx_fd.models.generation.followup_prompt`
            gives them.
        sampling: token limit, temperature and seed.
        on_tokens: called for every token.
        options: how it is run; ``keep`` the caches to go on from the turns.

    Returns:
        The turns and what each took, in order.
    """
    prompts = [
        without_repeated_eos(conversation, request)
        for conversation, request in zip(before, requests, strict=True)
    ]
    return generate_step(pair.expert, step, before, prompts, sampling, on_tokens, options)


def _score(judged: Judged, student_weight: float) -> float | None:
    if judged.expert is None:
        return judged.student.score
    # An expert whose score cannot be read is not overruled by the student that learns from it.
    if judged.expert.feedback.written_score is None:
        return None
    return combined_score(
        judged.expert.feedback.written_score, judged.student.score, student_weight
    )


def _stays(judged: Judged, score: float | None, episode: EpisodeOptions) -> bool:
    """Whether an answer is left as it is."""
    sees_enough = judged.expert is not None or not episode.check_alone
    return sees_enough and score is not None and score >= episode.target_score


def _finds_it_right(student: StudentFeedback, episode: EpisodeOptions) -> bool:
    """Whether the student's text leaves nothing to revise."""
    written = student.feedback.written_score
    return written is not None and written >= episode.target_score


def _write_solution(
    pair: Pair, answered: Answered, options: GenerationOptions
) -> Turns[Answered | None]:
    """The expert's own solution, where it tells something of an answer; else ``None``.

    It tells nothing where the expert gave the answer itself, or finals of its kind that differ can
    both be right.
    """
    problem = answered.problem
    if not answered.by_student or not is_comparable(answered.answer.final, problem):
        return None
    temperature, step = options.expert_temperature, "expert_solution"
    return (
        yield from write_answer(
            pair.expert, problem, options, temperature=temperature, keep=False, step=step
        )
    )


def write_final(
    pair: Pair, judged: Judged, options: GenerationOptions, episode: EpisodeOptions
) -> Turns[Finished]:
    """Step 5: merge, revise, criticise, final answer, as :func:`merge_and_revise` has it."""
    score = _score(judged, episode.student_weight)
    if _stays(judged, score, episode):
        return Finished(judged, score, "", "", "", judged.answered.answer, judged.usage)
    conversation, usage = judged.conversation, judged.usage
    student, expert, form = judged.student, judged.expert, form_of(judged.problem)
    found_right = expert is None and _finds_it_right(student, episode)
    own: Answer | None = None
    if found_right and (solved := (yield from _write_solution(pair, judged.answered, options))):
        own, usage = solved.answer, usage + solved.usage
        first = judged.answered.answer
        if same_final(own.final, first.final, judged.problem):
            return Finished(judged, score, "", "", "", first, usage, own)

    def say(step: str, message: str) -> Turns[Turn]:
        nonlocal conversation, usage
        request = without_repeated_eos(conversation, followup_prompt(pair.expert, message))
        sampling = sampling_for(options, step, 0)
        how = GenerateOptions(reuse=not options.sequential, keep=step != "final")
        ask = Ask(pair.expert, step, conversation, request, sampling, how)
        reply = yield from asked(ask)
        # It takes the place of the one before, whose cache is let go.
        conversation = reply.turn.conversation
        usage = usage + usage_of(step, reply.turn, reply.seconds)
        return reply.turn

    merged = revised = ""
    if expert and parsing.needs_merge(expert.feedback, student.feedback):
        merged = (yield from say("merge", merge_prompt(expert.feedback, student.feedback))).text
    if not found_right:
        merged = merged or (expert or student).feedback.text
        # Where the expert gave feedback it stands in the conversation, and need not be said again.
        request = "" if expert and expert.feedback.text else student.feedback.text
        revised = (yield from say("revise", revise_prompt(request, form))).text
    # Else there is nothing to revise by, and the expert looks at the answer without having read
    # that it is right, which it would believe; nor what came of its own solution.
    critique = yield from say("critique", critique_prompt())
    final = yield from say("final", final_prompt(form))
    return Finished(
        judged,
        score,
        merged,
        revised,
        critique.text,
        read_answer(final, judged.problem, options),
        usage,
        own,
    )


def merge_and_revise(
    pair: Pair,
    judged: Sequence[Judged],
    options: GenerationOptions,
    episode: EpisodeOptions,
    seeds: Seeds,
    on_tokens: OnTokens,
) -> list[Finished]:
    """Step 5: merge, revise, criticise, final answer.

    An answer whose combined score reaches ``target_score`` is left as it is, if the expert judged
    it or ``check_alone`` is off. What the student alone judged, and finds right, the expert checks:
    it solves the problem itself, and where that comes to another final answer (or, as
    :func:`_write_solution` has it, tells nothing) it criticises the answer, and then gives its
    final one.

    Args:
        pair: the models; only the expert writes here.
        judged: episodes after step 2.
        options: token limits and sampling.
        episode: the target score and the student's weight in the combined score.
        seeds: step name to the seed of its draws.
        on_tokens: called for every token.

    Returns:
        One finished episode for each, in order.
    """
    works = [write_final(pair, one, options, episode) for one in judged]
    return ask_in_step(works, seeds, on_tokens)
