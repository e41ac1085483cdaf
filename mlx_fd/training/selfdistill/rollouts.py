"""What the student writes: groups of attempts, and the answers that headroom is measured by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from mlx_fd.config import Config
from mlx_fd.feedback.asking import derive_seed
from mlx_fd.models import ranks
from mlx_fd.models.conversation import Conversation, prefill
from mlx_fd.models.generation import first_prompt, generate
from mlx_fd.models.loading import Loaded
from mlx_fd.models.writing import GenerateOptions, Sampling, Turn
from mlx_fd.problems import Problem
from mlx_fd.problems.kinds import form_of, is_right, read_final
from mlx_fd.problems.prompts import answer_prompt
from mlx_fd.training.selfdistill.contexts import Attempt, View
from mlx_fd.training.selfdistill.noise import noisy
from mlx_fd.training.selfdistill.reading import read, views_of
from mlx_fd.training.selfdistill.rollout_stats import RolloutStats, gather_stats, text_after
from mlx_fd.training.selfdistill.teacher import Weights, adapter_swapped

OnToken = Callable[[int], None]


def as_read(problem: Problem, config: Config) -> str:
    """A problem's question as the student reads it, with noise if there is to be any."""
    options = config.selfdistill
    if options.noise == "none":
        return problem.question
    return noisy(problem.question, options.noise, options.noise_level, config.episode.seed)


def rollout_sampling(config: Config, seed: int) -> Sampling:
    """How the student's attempts are drawn."""
    options = config.selfdistill
    return Sampling(
        config.generation.max_answer_tokens,
        options.temperature,
        seed=seed,
        top_p=options.top_p,
        top_k=options.top_k,
    )


def sample_rollouts(
    student: Loaded,
    problems: Sequence[Problem],
    config: Config,
    seed: Callable[[int], int],
    on_token: OnToken | None = None,
    *,
    own: bool = True,
) -> tuple[list[list[Attempt]], int]:
    """``num_generations`` attempts at each problem; each question is read once for all of its own.

    Each rank makes those at its share of the problems, and has all of them.

    Args:
        student: what it writes is drawn as the method says.
        problems: at least one.
        config: sampling, token limit and batch sizes.
        seed: of the draws of the n-th call to the generator.
        on_token: called with the number of tokens written in each step.
        own: whether the writer is the student, and not the expert.

    Returns:
        The groups, and how many tokens were prefilled.
    """
    options = config.selfdistill
    questions = [as_read(problem, config) for problem in problems]
    size = options.num_generations
    rows = [index for index in ranks.part(len(problems)) for _ in range(size)]
    turns: list[Turn] = []
    begun: dict[int, Conversation] = {}
    prefilled = 0
    for number, begin in enumerate(range(0, len(rows), options.generation_batch_size)):
        chunk = rows[begin : begin + options.generation_batch_size]
        prompts = {
            index: first_prompt(student, answer_prompt(questions[index], form_of(problems[index])))
            for index in dict.fromkeys(chunk)
        }
        keep = GenerateOptions(keep=False, logprobs=True, on_token=on_token)
        sampling = rollout_sampling(config, seed(number))
        if student.thinking is not None and student.thinking.on:
            none, wholes = [Conversation()] * len(chunk), [prompts[index] for index in chunk]
            thought = generate(student, none, wholes, sampling, keep)
            prefilled += sum(turn.prefilled for turn in thought)
            turns += thought
            continue
        prefilled += sum(len(prompt) for index, prompt in prompts.items() if index not in begun)
        # A problem whose attempts go on from the last call's is not read again.
        begun = {
            index: begun.get(index) or prefill(student, Conversation(), prompt)[1]
            for index, prompt in prompts.items()
        }
        turns += generate(
            student,
            [begun[index] for index in chunk],
            [prompts[index][-1:] for index in chunk],
            sampling,
            keep,
        )
    attempts = [
        replace(_attempt(problems[place // size], questions[place // size], turn, config), own=own)
        for place, turn in enumerate(_gather_turns(turns))
    ]
    groups = [attempts[i : i + size] for i in range(0, len(attempts), size)]
    return groups, sum(ranks.gather([prefilled]))


def _gather_turns(turns: Sequence[Turn]) -> list[Turn]:
    """The turns of all ranks, without their caches."""
    if ranks.size() == 1:
        return list(turns)
    rows = [
        (turn.text, turn.tokens, turn.finished, turn.logprobs, turn.thought, turn.opening)
        for turn in turns
    ]
    return [
        Turn(
            text=text,
            tokens=tuple(tokens),
            finished=finished,
            conversation=Conversation(),
            prefilled=0,
            logprobs=tuple(logprobs),
            thought=thought,
            opening=tuple(opening),
        )
        for text, tokens, finished, logprobs, thought, opening in ranks.gather(rows)
    ]


def _attempt(problem: Problem, question: str, turn: Turn, config: Config) -> Attempt:
    final = read_final(turn.text, problem, config.generation.answer_filter)
    right = is_right(final, problem)
    return Attempt(
        problem=problem,
        question=question,
        tokens=turn.tokens,
        text=turn.text,
        final=final,
        correct=right,
        logprobs=turn.logprobs,
        opening=turn.opening,
        thought=turn.thought,
    )


def answers_to(
    student: Loaded,
    messages: Sequence[str],
    sampling: Sampling,
    size: int,
    on_token: OnToken | None = None,
) -> list[Turn]:
    """Answers to a user's messages, ``size`` at a time."""
    turns: list[Turn] = []
    for begin in range(0, len(messages), size):
        prompts = [first_prompt(student, text) for text in messages[begin : begin + size]]
        turns += generate(
            student,
            [Conversation()] * len(prompts),
            prompts,
            sampling,
            GenerateOptions(keep=False, on_token=on_token),
        )
    return turns


def grade_answers(
    student: Loaded,
    problems: Sequence[Problem],
    messages: Sequence[str],
    config: Config,
    on_token: OnToken | None = None,
) -> list[bool | None]:
    """Whether each problem is answered right after a message, by one answer.

    It is drawn as attempts are, every time with the same seed, so that two looks differ by the
    model and not by luck.
    """
    seed = derive_seed(config.episode.seed, 0, ranks.step_name("held out"))
    sampling = rollout_sampling(config, seed)
    problems, messages = ranks.share(problems), ranks.share(messages)
    turns = answers_to(
        student, messages, sampling, config.selfdistill.generation_batch_size, on_token
    )
    return ranks.gather(
        [
            is_right(read_final(turn.text, problem, config.generation.answer_filter), problem)
            for turn, problem in zip(turns, problems, strict=True)
        ]
    )


def echoes_of(
    student: Loaded,
    teacher: Weights,
    groups: Sequence[Sequence[Attempt]],
    views: Sequence[View],
    config: Config,
    on_token: OnToken | None = None,
) -> list[RolloutStats]:
    """For each group the clean teacher's greedy answer, with what it expects at each token of it.

    Args:
        student: the model; its adapter is put aside while the teacher writes.
        teacher: the self-teacher's LoRA weights, by name.
        groups: attempts, problem by problem.
        views: one for each attempt.
        config: sampling, token limit and batch sizes.
        on_token: called with the number of tokens written in each step.
    """
    mine = ranks.part(len(groups))
    firsts = [views_of(groups, views, range(number, number + 1))[0] for number in mine]
    if not firsts:
        return gather_stats([])
    messages = [view.teacher or view.student for view in firsts]
    with adapter_swapped(student.model, teacher):
        turns = answers_to(
            student,
            messages,
            Sampling(config.generation.max_answer_tokens),
            config.selfdistill.generation_batch_size,
            on_token,
        )
        clean = [
            text_after(student, message, turn.tokens, turn.opening)
            for message, turn in zip(messages, turns, strict=True)
        ]
        states = read(student.view, clean, config.training.micro_batch)
    return gather_stats(
        [
            RolloutStats(
                text=text_after(student, view.student, turn.tokens, turn.opening),
                group=number,
                reward=0.0,
                finished=turn.finished,
                old=mx.zeros(len(turn.tokens)),
                now=mx.zeros(len(turn.tokens)),
                entropy=mx.zeros(len(turn.tokens)),
                targets=targets,
            )
            for number, view, turn, targets in zip(mine, firsts, turns, states, strict=True)
        ]
    )
