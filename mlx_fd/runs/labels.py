"""Names and numbers as people read them, in terminals and on pages."""

from __future__ import annotations

from mlx_fd.runs.records.metrics import AmountRow, TrustRow
from mlx_fd.runs.records.parts import ShareRow
from mlx_fd.runs.records.summary import ExpertVerdictsRow

STEP_NAMES = {
    "answer": "first answer",
    "student_feedback": "student's feedback",
    "student_solution": "student's own solution",
    "student_feedback_again": "student's feedback after learning",
    "expert_feedback": "expert's feedback",
    "privileged_feedback": "expert's feedback, told the right answer",
    "second_answer": "second answer",
    "second_student_feedback": "student's feedback on it",
    "second_student_solution": "student's own solution beside it",
    "second_expert_feedback": "expert's feedback on it",
    "second_privileged_feedback": "expert's feedback on it, told the right answer",
    "expert_solution": "expert's own solution",
    "merge": "merged feedback",
    "revise": "revision",
    "critique": "self-critique",
    "final": "final answer",
    "distil": "student learns",
    "headroom": "held-out problems, before and after",
    "exam": "examinations",
    "warm_up": "warm-up",
}
"""The steps of an episode, and what else takes time in a run."""


EXAM_NAMES = {
    "score_error": "error of the score head",
    "written_error": "error of the written score",
    "readable": "feedback readable",
    "first_error_on_wrong": "first error found",
    "first_error_on_right": "right answers passed",
    "first_error_f1": "F1 of the two",
    "solved": "problems solved",
}


def expert_verdicts_say(verdicts: ExpertVerdictsRow | None) -> str:
    """What became of the scores that the right answer contradicts; a dash where none is known."""
    if verdicts is None or not verdicts["known"]:
        return "-"
    fates = {
        "left out": verdicts["left_out"],
        "asked again": verdicts["asked_again"],
        "kept": verdicts["contradicted"] - verdicts["left_out"] - verdicts["asked_again"],
    }
    said = ", ".join(f"{count} {fate}" for fate, count in fates.items() if count)
    found = f"{verdicts['contradicted']} of {verdicts['known']}"
    return f"{found}: {said}" if said else found


def trust_says(trust: TrustRow) -> str:
    """Where the student needs no expert, and what that rests on."""
    if trust["threshold"] is None:
        return "the expert is always asked"
    return (
        f"the expert is not asked from a confidence of {trust['threshold']:g} on "
        f"({trust['coverage']:.0%} of audited verdicts); of the last {trust['audited']} there "
        f"{trust['disagreed']} differ, with 95 % at most {trust['bound']:.1%}"
    )


def share_says(share: ShareRow) -> str:
    """A share with its counts and its 95 % interval; a dash where it is of nothing."""
    if not share["n"]:
        return "-"
    low, high = share["interval"]
    value = share["right"] / share["n"]
    return f"{value:.1%} ({share['right']}/{share['n']}, 95 % {low:.1%} to {high:.1%})"


def duration(seconds: float) -> str:
    """Seconds as ``42 s``, ``3 min 5 s`` or ``2 h 14 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def number(value: float | None, form: str = ".3g") -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


WORK_NAMES = {
    "expert_prompts": "tokens of prompts, expert",
    "student_prompts": "tokens of prompts, student",
    "steps": "steps of writing",
    "written": "places of these steps",
    "expert_texts": "tokens read by the expert to teach",
    "measured": "tokens measured before the gate",
    "learned": "tokens learned from",
}
"""What :class:`mlx_fd.runs.records.metrics.WorkRow` counts."""


def beside_least(amount: AmountRow) -> str:
    """An amount of work, and how many times the least it is."""
    done, least = amount["done"], amount["least"]
    return f"{done:,}, {done / least:.2f} of the least" if least else f"{done:,}"


PART_NAMES = {
    "writing": "writing",
    "reading": "the expert's reading",
    "measuring": "losses before",
    "learning": "updates",
    "other": "gate, logs and all else",
}
"""The parts of the work."""
