"""One episode of Online Feedback Distillation: its five steps, over a batch of problems.

1. The expert answers.                         :func:`first_answers`
2. Student and expert each give feedback.      :func:`student_feedback`, :func:`expert_feedback`
3. The gate decides who learns.                :mod:`.gate`
4. The student learns,                         :mod:`.distill`
   and gives its feedback again.               :func:`student_feedback`, :func:`said_again`
5. The expert merges both feedbacks, revises, criticises its revision and gives the final answer.
                                               :func:`merge_and_revise`

After step 1 an episode is :class:`Answered`, after step 2 :class:`Judged`, after step 5
:class:`Finished`; each holds the one before it.

The expert's turns on a problem are one growing conversation, so each token is prefilled once. The
student reads the same conversation up to the request for feedback, token for token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_fd.config import EpisodeOptions, GenerationOptions
from mlx_fd.feedback.pair import Pair
from mlx_fd.feedback.two_tokenizers import to_expert, to_student
from mlx_fd.models.conversation import Conversation, forward, without_repeated_eos
from mlx_fd.models.generation import (
    after_thought,
    first_prompt,
    followup_prompt,
    generate,
    replying,
    said,
    think,
    with_thought,
)
from mlx_fd.models.loading import Loaded
from mlx_fd.models.student import Student
from mlx_fd.models.writing import GenerateOptions, Sampling, Turn, sampling_for
from mlx_fd.problems import Problem, parsing
from mlx_fd.problems.kinds import form_of, is_right, read_final
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
from mlx_fd.runs.records import (
    AnswerRow,
    EpisodeRow,
    ExpertFeedbackRow,
    GateRow,
    StudentFeedbackRow,
    VerdictRow,
    thought_columns,
)

# What a verdict loses in log-probability where the student's own solutions contradict it (so much
# that these verdicts are the last to be trusted; more changes nothing), and for each unit that the
# score head's score is away from it.
CONTRADICTED, DOUBTED = 6.0, 2.0

OnTokens = Callable[[str, int], None]
"""Called with the step's name and how many tokens were just written or learned from."""


@dataclass(frozen=True)
class Usage:
    """What steps of an episode took, each by the step's name.

    Attributes:
        tokens: tokens written.
        prefilled: tokens read.
        seconds: this problem's share of the batch's time.
        capped: steps that ended at the token limit.
        thoughts: what was thought before a step's text, where something was.
        closed: steps whose thought was closed at its limit.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    prefilled: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    capped: tuple[str, ...] = ()
    thoughts: dict[str, str] = field(default_factory=dict)
    closed: tuple[str, ...] = ()

    def __add__(self, other: Usage) -> Usage:
        """The steps of both, this one's first; a step is in one of them only."""
        return Usage(
            {**self.tokens, **other.tokens},
            {**self.prefilled, **other.prefilled},
            {**self.seconds, **other.seconds},
            (*self.capped, *other.capped),
            {**self.thoughts, **other.thoughts},
            (*self.closed, *other.closed),
        )


@dataclass(frozen=True)
class Answered:
    """An episode after step 1.

    Attributes:
        problem: the problem.
        answer: the first answer, the expert's unless ``answers_by`` says otherwise.
        conversation: the expert's conversation up to and with that answer.
        request: tokens of the request for feedback, as they follow the answer.
        usage: of the answer.
    """

    problem: Problem
    answer: Answer
    conversation: Conversation
    request: tuple[int, ...]
    usage: Usage = field(default_factory=Usage)

    @property
    def prompt(self) -> tuple[int, ...]:
        """All tokens that the expert reads before its feedback, but for what it thinks."""
        return (*self.conversation.tokens, *self.request)

    @property
    def is_correct(self) -> bool | None:
        """Whether the first answer is right; ``None`` where nobody knows."""
        return is_right(self.answer.final, self.problem)


@dataclass(frozen=True)
class StudentFeedback:
    """What the student says of an answer.

    Attributes:
        feedback: its text, the score written in it, and its tokens.
        head_score: its score head's score in (-1, 1), read where ``score_at`` says; ``None``: it
            has no trained head.
        usage: of the feedback.
        logprob: log-probability of the feedback's tokens, all together, when they were drawn.
        solves_alike: the share of its own solutions of the problem that come to the answer's
            final; ``None``: not known.
    """

    feedback: Feedback
    head_score: float | None
    usage: Usage = field(default_factory=Usage)
    logprob: float = 0.0
    solves_alike: float | None = None

    @property
    def score(self) -> float | None:
        """The score that counts in the combined one: the head's, else the written one."""
        return self.feedback.written_score if self.head_score is None else self.head_score

    @property
    def verdict(self) -> float | None:
        """The score whose sign is its verdict: that of its text, which is what stands alone.

        The head's where none can be read.
        """
        written = self.feedback.written_score
        return self.head_score if written is None else written

    @property
    def confidence(self) -> float | None:
        """How sure it is of its verdict, in [0, 1]; ``None`` without one.

        1 / (1 + -log p) of the text that it wrote, which counts as less likely, by
        :data:`CONTRADICTED` nats where all of its own solutions say otherwise, and by up to twice
        :data:`DOUBTED` the less its head agrees. Together they tell best where it says what the
        expert says (docs/log.md).
        """
        if self.verdict is None:
            return None
        doubt, right = -self.logprob, self.verdict > 0
        if self.solves_alike is not None:
            doubt += CONTRADICTED * (1 - self.solves_alike if right else self.solves_alike)
        if self.head_score is not None:
            doubt += DOUBTED * (1 - self.head_score if right else 1 + self.head_score)
        return round(1 / (1 + doubt), 6)


@dataclass(frozen=True)
class ExpertFeedback:
    """What the expert says of an answer.

    Attributes:
        feedback: its text, the score written in it, and its tokens.
        conversation: the expert's conversation up to and with it.
        usage: of the feedback.
        prompt: all tokens before it where they are not those of the episode: it was asked with the
            right answer in sight (:mod:`mlx_fd.feedback.verdicts`).
    """

    feedback: Feedback
    conversation: Conversation
    usage: Usage = field(default_factory=Usage)
    prompt: tuple[int, ...] = ()


@dataclass(frozen=True)
class Judged:
    """An episode after step 2.

    Attributes:
        answered: the episode after step 1.
        student: the student's feedback.
        expert: the expert's; ``None`` where the student stands alone.
        before: the student's first feedback, where it gave another one after it learned.
    """

    answered: Answered
    student: StudentFeedback
    expert: ExpertFeedback | None
    before: StudentFeedback | None = None

    @property
    def problem(self) -> Problem:
        """The episode's problem."""
        return self.answered.problem

    @property
    def conversation(self) -> Conversation:
        """The expert's conversation so far."""
        return self.expert.conversation if self.expert else self.answered.conversation

    @property
    def usage(self) -> Usage:
        """Of steps 1 and 2."""
        found = self.answered.usage + self.student.usage
        found = found + self.before.usage if self.before else found
        return found + self.expert.usage if self.expert else found


@dataclass(frozen=True)
class Finished:
    """The end of an episode, after step 5.

    Attributes:
        judged: the episode after step 2.
        score: the combined score, ``None`` where neither model gave one.
        merged: the feedback that the revision follows; empty where none was needed.
        revised: the revised answer's text; empty where the first answer was good enough.
        critique: the expert's critique of its revision; empty likewise.
        final: the final answer.
        usage: of all steps.
    """

    judged: Judged
    score: float | None
    merged: str
    revised: str
    critique: str
    final: Answer
    usage: Usage

    @property
    def problem(self) -> Problem:
        """The episode's problem."""
        return self.judged.problem

    @property
    def is_correct(self) -> bool | None:
        """Whether the final answer is right; ``None`` where nobody knows."""
        return is_right(self.final.final, self.problem)


def combined_score(expert: float | None, student: float | None, weight: float) -> float | None:
    """(weight * student + expert) / (1 + weight); the one that is there where the other is not."""
    if expert is None or student is None:
        return student if expert is None else expert
    return (weight * student + expert) / (1 + weight)


def derive_seed(seed: int, batch: int, step: str) -> int:
    """The seed of one step's draws: it depends on nothing that came before."""
    digest = hashlib.sha256(f"{seed}/{batch}/{step}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def generate_step(
    loaded: Loaded,
    step: str,
    conversations: Sequence[Conversation],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_tokens: OnTokens,
    options: GenerateOptions,
) -> tuple[list[Turn], list[Usage]]:
    """One step: a turn in each conversation.

    Args:
        loaded: who writes.
        step: the step's name.
        conversations: what was said so far.
        prompts: the new tokens of each.
        sampling: how to draw.
        on_tokens: called for every token.
        options: what is kept.

    Returns:
        The turns and what each took, in order.
    """
    begin = time.perf_counter()
    turns = generate(
        loaded,
        conversations,
        prompts,
        sampling,
        dataclasses.replace(options, on_token=lambda count: on_tokens(step, count)),
    )
    share = (time.perf_counter() - begin) / max(len(turns), 1)
    return turns, [usage_of(step, turn, share) for turn in turns]


def usage_of(step: str, turn: Turn, seconds: float) -> Usage:
    """What a step took whose text is a turn."""
    return Usage(
        tokens={step: turn.written},
        prefilled={step: turn.prefilled},
        seconds={step: seconds},
        capped=() if turn.finished else (step,),
        thoughts={step: turn.thought} if turn.thought else {},
        closed=(step,) if turn.closed else (),
    )


def read_answer(turn: Turn, problem: Problem, options: GenerationOptions) -> Answer:
    """A turn's text and the final answer in it."""
    final = read_final(turn.text, problem, options.answer_filter)
    return Answer(turn.text, final, turn.tokens, turn.opening)


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
    sampling = sampling_for(options, "answer", seed)
    if temperature is not None:
        sampling = dataclasses.replace(sampling, temperature=temperature)
    turns, usages = generate_step(
        loaded,
        "answer",
        [Conversation()] * len(problems),
        [first_prompt(loaded, answer_prompt(p.question, form_of(p))) for p in problems],
        sampling,
        on_tokens,
        GenerateOptions(reuse=not options.sequential, keep=keep),
    )
    request = feedback_request(loaded)
    return [
        Answered(
            problem,
            read_answer(turn, problem, options),
            turn.conversation,
            without_repeated_eos(turn.conversation, request),
            usage,
        )
        for problem, turn, usage in zip(problems, turns, usages, strict=True)
    ]


def first_answers(
    pair: Pair,
    problems: Sequence[Problem],
    options: GenerationOptions,
    seed: int,
    on_tokens: OnTokens,
) -> list[Answered]:
    """Step 1: the answers that the episodes go on from, by the model that ``answers_by`` names."""
    if options.answers_by == "student":
        return student_answers(pair, problems, options, seed, on_tokens)
    temperature = options.expert_temperature if options.answers_by == "both" else None
    return answer(pair.expert, problems, options, seed, on_tokens, temperature=temperature)


def student_answers(
    pair: Pair,
    problems: Sequence[Problem],
    options: GenerationOptions,
    seed: int,
    on_tokens: OnTokens,
) -> list[Answered]:
    """Step 1 by the student.

    What it answers stands in the expert's conversation as if the expert had said it.
    """
    answered = answer(pair.student_lm, problems, as_student(options), seed, on_tokens, keep=False)
    return said_by_expert(pair, answered)


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
        )
        for one in answered
        for tokens in (to_expert(pair, one.answer.tokens),)
        for before in (Conversation(_answered_chat(pair.expert, one.problem, tokens)),)
    ]


def _answered_chat(loaded: Loaded, problem: Problem, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The chat of an answer, as if a model had given it itself."""
    return said(loaded, answer_prompt(problem.question, form_of(problem)), tokens)


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


def _without_cache(answered: Answered) -> Answered:
    return dataclasses.replace(answered, conversation=Conversation(answered.conversation.tokens))


def feedback_request(loaded: Loaded, prompt: str = "") -> tuple[int, ...]:
    """Tokens of a request for feedback, up to and with the reply's first word.

    Args:
        loaded: whose template and tokens.
        prompt: what is asked; empty: the role's own prompt.
    """
    begun = loaded.tokenizer.encode(FEEDBACK_OPENING, add_special_tokens=False)
    return (*followup_prompt(loaded, prompt or feedback_prompt()), *begun)


def parsed(turn: Turn) -> Feedback:
    """What a model wrote after :func:`feedback_request`; nothing where its thought was cut off."""
    if not turn.text:
        return Feedback("", None, turn.tokens, turn.opening)
    read = parsing.parse_feedback(f"{FEEDBACK_OPENING} {turn.text}", turn.tokens)
    return dataclasses.replace(read, opening=turn.opening)


@dataclass(frozen=True)
class Criticism:
    """A feedback that was written by itself.

    Attributes:
        turn: the feedback, with what was thought before it.
        prompt: all tokens before the feedback, the thought among them.
        before: a conversation that the prompt begins with, but for its last token at least.
    """

    turn: Turn
    prompt: tuple[int, ...]
    before: Conversation = field(default_factory=Conversation)


def criticisms(
    loaded: Loaded,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sampling,
    options: GenerateOptions,
) -> list[Criticism]:
    """Feedback after each of some prompts, which end as :func:`feedback_request` does.

    Args:
        loaded: who writes.
        prompts: all tokens before each.
        sampling: how to draw.
        options: whether caches are used, and who is told of tokens.
    """
    thoughts = think(loaded, prompts, sampling, options)
    prompts = [
        with_thought(loaded, prompt, thought.opening if thought else ())
        for prompt, thought in zip(prompts, thoughts, strict=True)
    ]
    turns = generate(
        replying(loaded),
        [Conversation()] * len(prompts),
        prompts,
        sampling,
        dataclasses.replace(options, keep=False, states=True),
    )
    return [
        Criticism(after_thought(turn, thought), prompt)
        for turn, thought, prompt in zip(turns, thoughts, prompts, strict=True)
    ]


def head_score(
    student: Student,
    student_lm: Loaded,
    criticism: Criticism,
) -> float:
    """The score of the student's head on an answer that it gave feedback on.

    Args:
        student: the student.
        student_lm: its language model, which reads the feedback where the states that it was
            written from are not known.
        criticism: its feedback.
    """
    at_end, turn, before = student.scores_at_end, criticism.turn, criticism.before
    if turn.states:
        return float(student.score(turn.states[at_end]))
    text = (*criticism.prompt, *(turn.tokens[:-1] if at_end else ()))
    seen = forward(student_lm, before, text[len(before.tokens) :])
    return float(student.score(seen.final[0, -1]))


def student_feedback(
    pair: Pair,
    answered: Sequence[Answered],
    options: GenerationOptions,
    seed: int,
    on_tokens: OnTokens,
    step: str = "student_feedback",
) -> list[StudentFeedback]:
    """Step 2, the student's half: its feedback, and its score head's score."""
    begin = time.perf_counter()
    prompts = [student_prompt(pair, one) for one in answered]
    written = criticisms(
        pair.student_lm,
        prompts,
        sampling_for(options, "student_feedback", seed),
        GenerateOptions(
            reuse=not options.sequential,
            logprobs=True,
            on_token=lambda count: on_tokens(step, count),
        ),
    )
    share = (time.perf_counter() - begin) / max(len(written), 1)
    return [
        StudentFeedback(
            parsed(one.turn),
            head_score(pair.student, pair.student_lm, one),
            usage_of(step, one.turn, share),
            min(sum(one.turn.logprobs), 0.0),
        )
        for one in written
    ]


def expert_feedback(
    pair: Pair,
    answered: Sequence[Answered],
    options: GenerationOptions,
    seed: int,
    on_tokens: OnTokens,
    *,
    step: str = "expert_feedback",
) -> list[ExpertFeedback]:
    """Step 2, the expert's half: its feedback, and the score written in it.

    Args:
        pair: the models; only the expert writes.
        answered: episodes after step 1.
        options: token limits and sampling.
        seed: of the draws.
        on_tokens: called for every token.
        step: what it is counted as.
    """
    sampling = sampling_for(options, "expert_feedback", seed)
    turns, usages = generate_step(
        pair.expert,
        step,
        [one.conversation for one in answered],
        [one.request for one in answered],
        sampling,
        on_tokens,
        # Whoever learns from it reads it from where it begins.
        GenerateOptions(reuse=not options.sequential, mark=True),
    )
    return [
        ExpertFeedback(parsed(turn), turn.conversation, usage)
        for turn, usage in zip(turns, usages, strict=True)
    ]


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
        # The cache of the conversation with the feedback holds all of the one without it.
        Judged(_without_cache(one) if index in experts else one, student, experts.get(index))
        for index, (one, student) in enumerate(zip(answered, students, strict=True))
    ]


def said_again(judged: Judged, student: StudentFeedback) -> Judged:
    """An episode with what the student says after it learned; the gate saw what it said before."""
    return dataclasses.replace(judged, student=student, before=judged.student)


def expert_turn(
    pair: Pair,
    step: str,
    before: Sequence[Conversation],
    requests: Sequence[tuple[int, ...]],
    sampling: Sampling,
    on_tokens: OnTokens,
    options: GenerateOptions,
) -> tuple[list[Turn], list[Usage]]:
    """One more turn of the expert in each conversation.

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


def merge_and_revise(
    pair: Pair,
    judged: Sequence[Judged],
    options: GenerationOptions,
    episode: EpisodeOptions,
    seeds: Callable[[str], int],
    on_tokens: OnTokens,
) -> list[Finished]:
    """Step 4: merge, revise, criticise, final answer.

    An answer whose combined score reaches ``target_score`` is left as it is.

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
    finished: dict[int, Finished] = {}
    scores = [_score(one, episode.student_weight) for one in judged]
    for index, (one, score) in enumerate(zip(judged, scores, strict=True)):
        if score is not None and score >= episode.target_score:
            finished[index] = Finished(one, score, "", "", "", one.answered.answer, one.usage)
    wanting = [index for index in range(len(judged)) if index not in finished]
    todo = [judged[index] for index in wanting]
    before = [one.conversation for one in todo]
    usages = [one.usage for one in todo]

    def take_turn(step: str, which: Sequence[int], messages: Sequence[str]) -> list[Turn]:
        """A turn in some of the open conversations, which go on from it."""
        turns, added = expert_turn(
            pair,
            step,
            [before[place] for place in which],
            [followup_prompt(pair.expert, text) for text in messages],
            sampling_for(options, step, seeds(step)),
            on_tokens,
            GenerateOptions(reuse=not options.sequential, keep=step != "final"),
        )
        # Each step's conversations take the place of the last one's, whose caches are let go.
        for place, turn, usage in zip(which, turns, added, strict=True):
            before[place] = turn.conversation
            usages[place] = usages[place] + usage
        return turns

    merged = [(one.expert or one.student).feedback.text for one in todo]
    merging = {
        place: (one.expert.feedback, one.student.feedback)
        for place, one in enumerate(todo)
        if one.expert and parsing.needs_merge(one.expert.feedback, one.student.feedback)
    }
    turns = take_turn(
        "merge",
        list(merging),
        [merge_prompt(expert, student) for expert, student in merging.values()],
    )
    for place, turn in zip(merging, turns, strict=True):
        merged[place] = turn.text

    everyone = range(len(todo))
    # Where the expert gave feedback it stands in the conversation, and need not be said again.
    requests = [
        "" if one.expert and one.expert.feedback.text else one.student.feedback.text for one in todo
    ]
    forms = [form_of(one.problem) for one in todo]
    revised = take_turn(
        "revise",
        everyone,
        [revise_prompt(text, form) for text, form in zip(requests, forms, strict=True)],
    )
    critiques = take_turn("critique", everyone, [critique_prompt()] * len(todo))
    finals = take_turn("final", everyone, [final_prompt(form) for form in forms])
    for place, index in enumerate(wanting):
        finished[index] = Finished(
            judged[index],
            scores[index],
            merged[place],
            revised[place].text,
            critiques[place].text,
            read_answer(finals[place], judged[index].problem, options),
            usages[place],
        )
    return [finished[index] for index in range(len(judged))]


def _answer_row(given: Answer) -> AnswerRow:
    return {"text": given.text, "final": given.final}


def with_second(
    row: EpisodeRow, judged: Judged, gate: GateRow, verdict: VerdictRow | None
) -> EpisodeRow:
    """An episode's row with the student's answer beside the expert's (``answers_by`` ``both``).

    What it took is among the row's tokens and seconds, each step's name after ``second_``.
    """
    usage = judged.usage

    def named(values: Mapping[str, Any]) -> dict[str, Any]:
        return {f"second_{step}": value for step, value in values.items()}

    return {
        **row,
        "tokens": {**row["tokens"], **named(usage.tokens)},
        "prefilled": {**row["prefilled"], **named(usage.prefilled)},
        "seconds": {
            **row["seconds"],
            **named({step: round(value, 3) for step, value in usage.seconds.items()}),
        },
        "second": {
            "answer": _answer_row(judged.answered.answer),
            "correct": judged.answered.is_correct,
            "expert_feedback": _expert_row(judged),
            "student_feedback": _feedback_row(judged.student),
            "gate": gate,
            "verdict": verdict,
        },
    }


def _expert_row(judged: Judged) -> ExpertFeedbackRow | None:
    if judged.expert is None:
        return None
    feedback = judged.expert.feedback
    return {"text": feedback.text, "written_score": feedback.written_score}


def _feedback_row(student: StudentFeedback) -> StudentFeedbackRow:
    return {
        "text": student.feedback.text,
        "head_score": student.head_score,
        "written_score": student.feedback.written_score,
        "solves_alike": student.solves_alike,
        "confidence": student.confidence,
    }


def episode_row(
    finished: Finished, index: int, gate: GateRow, verdict: VerdictRow | None
) -> EpisodeRow:
    """An episode as one line of ``episodes.jsonl``.

    Args:
        finished: the episode.
        index: its place in the run, from 0.
        gate: what the gate decided, and the losses before and after the update.
        verdict: the expert's score against the right answer.
    """
    judged, usage = finished.judged, finished.usage
    answered, student = judged.answered, judged.before or judged.student
    return {
        "episode": index,
        "id": finished.problem.id,
        "question": finished.problem.question,
        "reference": finished.problem.answer or None,
        "answer": _answer_row(answered.answer),
        "expert_feedback": _expert_row(judged),
        "student_feedback": _feedback_row(student),
        "student_feedback_again": _feedback_row(judged.student) if judged.before else None,
        "gate": gate,
        "verdict": verdict,
        "score": finished.score,
        "merged": finished.merged,
        "revised": finished.revised,
        "critique": finished.critique,
        "final": _answer_row(finished.final),
        "correct_before": answered.is_correct,
        "correct_after": finished.is_correct,
        "second": None,
        "tokens": usage.tokens,
        "prefilled": usage.prefilled,
        "capped": list(usage.capped),
        "seconds": {step: round(value, 3) for step, value in usage.seconds.items()},
        **thought_columns(usage.thoughts, usage.closed),
    }
