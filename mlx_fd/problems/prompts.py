"""What the models are asked: the prompts of each role, and what they answer with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A model's answer to a problem.

    Attributes:
        text: what it wrote.
        final: what it arrived at, in its kind's canonical form
            (:mod:`mlx_fd.problems.kinds`); ``None`` where that could not be read.
        tokens: ids of the generated tokens.
        opening: ids of the thought before it, with its marks; empty where there was none.
    """

    text: str
    final: str | None
    tokens: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()


@dataclass(frozen=True)
class Feedback:
    """A model's judgement of an answer.

    Attributes:
        text: the paragraph, without labels and score.
        written_score: in [-1, 1]; ``None`` where none could be read.
        tokens: ids of the generated tokens, labels and score included.
        opening: ids of the thought before it, with its marks; empty where there was none.
    """

    text: str
    written_score: float | None
    tokens: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()


# --------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Form:
    """How a reply to a problem is asked for.

    Attributes:
        end: how it is to end; empty: as it likes.
        steps: whether it is to go step by step.
    """

    end: str
    steps: bool = True


NUMBER = Form("End with a line of its own: #### <number>")
SCALE = "1 is excellent, 0.5 fair, 0 useless, -0.5 mostly wrong, -1 harmful"
FEEDBACK_OPENING = "Score:"


def format_feedback(feedback: Feedback) -> str:
    """Feedback in the form the prompts ask for, which :func:`parse_feedback` reads back.

    Args:
        feedback: the score is written with at most four decimals, and left out where ``None``.
    """
    if feedback.written_score is None:
        return f"Feedback: {feedback.text}"
    score = f"{feedback.written_score:.4f}".rstrip("0").rstrip(".")
    return f"Score: {'0' if score == '-0' else score}\nFeedback: {feedback.text}"


def answer_prompt(question: str, form: Form = NUMBER) -> str:
    """Turn 1: solve the problem."""
    asked = " ".join(filter(None, ("Solve step by step." if form.steps else "", form.end)))
    return "\n\n".join(filter(None, (question.strip(), asked)))


def feedback_prompt() -> str:
    """Turn 2, for expert and student alike: score and criticise the answer just given.

    The rubric is that of the published method (expert feedback, scores from -1 to 1). The reply
    begins with :data:`FEEDBACK_OPENING`, which is put into the model's mouth: even a model of 135M
    parameters then writes a score that can be read. There is no example, because such a model
    copies it.
    """
    return (
        "Write feedback on the answer above: a score from -1 to 1, then a paragraph.\n"
        f"{SCALE}. The paragraph is specific and constructive, about 70 words: it names the "
        "first wrong step and says how to mend it, or says why every step is right."
    )


def privileged_feedback_prompt(gold: str) -> str:
    """Turn 2 once more, for an expert whose first score the right answer contradicts.

    Args:
        gold: the right answer, which whoever learns from the reply will not see.
    """
    return (
        f"The right final answer is {gold}. Judge by it, but write as if you had not been told: "
        f"find the first wrong step by checking each one.\n{feedback_prompt()}"
    )


def merge_prompt(expert: Feedback, student: Feedback | None) -> str:
    """Turn 3: one feedback out of two. Ask for it only where :func:`needs_merge` says so.

    Args:
        expert: the feedback that wins disagreements.
        student: the feedback whose own useful points are kept.
    """
    other = student.text if student else ""
    return (
        f"Expert's feedback: {expert.text}\n\nAmateur's feedback: {other}\n\n"
        "Merge them into one paragraph of at most 70 words. Where they disagree the expert is "
        "right. Keep useful points that only the amateur makes. Write only the paragraph."
    )


def revise_prompt(feedback_text: str, form: Form = NUMBER) -> str:
    """Turn 4: the corrected solution.

    Args:
        feedback_text: the feedback to apply; empty: the one in the turn before.
        form: how the solution is to be written.
    """
    text = feedback_text.strip()
    source = f"this feedback: {text}\n\n" if text else "the feedback above. "
    return f"Apply {source}{_written('Write the full corrected', form)}"


def critique_prompt() -> str:
    """Turn 5: the author's own look at the revision."""
    return (
        "Check your solution in about 70 words: its strengths, its gaps, any wrong calculation. "
        "Do not rewrite it."
    )


def final_prompt(form: Form = NUMBER) -> str:
    """Turn 6: the last solution."""
    return f"Apply that check and {_written('write the final', form)}"


def _written(what: str, form: Form) -> str:
    if not form.steps:
        return " ".join(filter(None, (f"{what} answer.", form.end)))
    return f"{what} solution, step by step. {form.end}"


# What the baselines ask beside these (mlx_fd/baselines).


def reasoning_prompt() -> str:
    """Chain of thought: the critic thinks before it is asked for feedback."""
    return (
        "Before any feedback, think about the answer above step by step: do each calculation "
        "again and say whether the answer has it right. Give no score yet."
    )


DRAFTS = 3


def draft_prompt(stage: int) -> str:
    """Chain of drafts: feedback in stages, each with a score; the reply begins as feedback does.

    Args:
        stage: from 1 to :data:`DRAFTS`; the last draft is the feedback.
    """
    if stage == 1:
        return (
            "Write a first draft of feedback on the answer above, your first impression: a score "
            f"from -1 to 1, then one or two sentences.\n{SCALE}."
        )
    if stage == 2:
        return (
            "Write a second draft that looks deeper: a score from -1 to 1, then what the first "
            f"draft missed or got wrong.\n{SCALE}."
        )
    return f"Now the last draft, which has the best of both. {feedback_prompt()}"


def instruction_prompt(instruction: str, given: str = "") -> str:
    """An instruction of an Alpaca-format file, with the text that it is about, if any."""
    return "\n\n".join(part for part in (instruction.strip(), given.strip()) if part)
