"""What a run's rows add up to, and what in them should worry the user. Rows in, numbers out."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from mlx_fd.problems.kinds import known
from mlx_fd.runs.records.episodes import EpisodeRow
from mlx_fd.runs.records.metrics import BatchMetricsRow, MetricsRow, WorkRow
from mlx_fd.runs.records.parts import ShareRow
from mlx_fd.runs.records.summary import (
    AuditsRow,
    ExpertVerdictsRow,
    HeadroomRow,
    Summary,
    VerdictsRow,
)

# A share of episodes above this is worth a warning, once there are enough of them.
WORRYING_SHARE = 0.2
ENOUGH = 8


def wilson(right: float, n: float) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share ``right / n`` (Wilson, 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share = right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def wilson_over_problems(rights: Sequence[tuple[str, bool]]) -> tuple[float, float]:
    """The 95 % interval of a share of attempts, several of which are at the same problem.

    Such attempts are alike, so the interval is Wilson's for the effective sample size (Kish, 1965;
    Korn and Graubard, 1998): the number of attempts over the design effect. Where all are right or
    all wrong it is the number of problems; with one attempt at each, that of attempts.

    Args:
        rights: of each attempt its problem, and whether it is right.
    """
    by_problem: dict[str, list[bool]] = {}
    for problem, right in rights:
        by_problem.setdefault(problem, []).append(right)
    return wilson_over_clusters([(sum(of), len(of)) for of in by_problem.values()])


def wilson_over_clusters(counts: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """The same of a share of anything that comes in clusters.

    Args:
        counts: of each cluster how many count, and of how many.
    """
    count, n = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
    if not 0 < count < n:
        return wilson(len(counts) if count else 0, len(counts))
    share = count / n
    squares = sum((right - share * size) ** 2 for right, size in counts)
    size = min(n, n * n * share * (1 - share) / squares) if squares else n
    return wilson(share * size, size)


def share_of(rights: Iterable[bool | None]) -> ShareRow:
    """The share of right ones among those of which it is known; n is 0 where it is of none."""
    of = known(rights)
    low, high = wilson(sum(of), len(of))
    return {"right": sum(of), "n": len(of), "interval": [round(low, 4), round(high, 4)]}


def _accuracy(
    rows: Sequence[EpisodeRow], key: Literal["correct_before", "correct_after"]
) -> ShareRow:
    return share_of(row[key] for row in rows)


def good_by_expert(row: EpisodeRow) -> bool | None:
    """Whether a first answer is good by the expert's verdict; ``None`` where it has none."""
    expert = row["expert_feedback"]
    score = expert["written_score"] if expert else None
    return None if score is None else score > 0


def _verdicts(rows: Sequence[EpisodeRow]) -> VerdictsRow:
    """The models' verdicts on answers of which nobody knows whether they are right."""
    # What the expert checked without revising it may be another answer, too.
    revised = sum(bool(row["revised"] or row["critique"]) for row in rows)
    return {
        "first_answers": share_of(good_by_expert(row) for row in rows),
        "agreement": share_of(map(agreed, rows)),
        "kept": len(rows) - revised,
        "revised": revised,
    }


def _frozen_after(metrics: Sequence[MetricsRow]) -> int | None:
    """The batch after which the student was frozen to the end; ``None``: it learned to the end."""
    to_the_end = list(itertools.takewhile(lambda row: row["frozen"], reversed(metrics)))
    return to_the_end[-1]["batch"] + 1 if to_the_end else None


def _sums(
    rows: Sequence[EpisodeRow], key: Literal["tokens", "prefilled", "seconds"]
) -> dict[str, float]:
    total: dict[str, float] = {}
    for row in rows:
        for step, value in row[key].items():
            total[step] = total.get(step, 0) + value
    return total


def student_verdict(row: EpisodeRow) -> float | None:
    """The score whose sign is the student's verdict: that of its text, else its head's."""
    student = row["student_feedback"]
    written = student["written_score"]
    return student["head_score"] if written is None else written


def agreed(row: EpisodeRow) -> bool | None:
    """Whether both verdicts on an answer were the same; ``None`` where one of them is missing."""
    expert, score = row["expert_feedback"], student_verdict(row)
    if expert is None or expert["written_score"] is None or score is None:
        return None
    return (expert["written_score"] > 0) == (score > 0)


def _audits(rows: Sequence[EpisodeRow]) -> AuditsRow:
    known = [same for row in rows if row["gate"]["trusted"] and (same := agreed(row)) is not None]
    disagreed = len(known) - sum(known)
    low, high = wilson(disagreed, len(known))
    return {
        "n": len(known),
        "disagreed": disagreed,
        "interval": [round(low, 4), round(high, 4)],
    }


def mean_feedback(rows: Sequence[EpisodeRow]) -> float:
    """Mean tokens of the expert's feedback on a first answer; 0 where it gave none."""
    written = [_feedback_tokens(row, "") for row in rows if row["expert_feedback"]]
    return sum(written) / len(written) if written else 0.0


def share_saved(rows: Sequence[EpisodeRow], mean: float) -> float | None:
    """Of the expert's feedback tokens in some episodes, the share that was saved.

    A feedback that was not written counts as the run's mean.
    """
    if not rows:
        return None
    there = sum(map(_all_feedback, rows))
    alone = sum(row["expert_feedback"] is None for row in rows)
    saved = alone * (mean or 1.0)
    return round(saved / (saved + there), 4) if saved + there else 0.0


def _all_feedback(row: EpisodeRow) -> int:
    """Tokens of the expert's feedback on an episode's answers."""
    return _feedback_tokens(row, "") + _feedback_tokens(row, "second_")


def _feedback_tokens(row: EpisodeRow, of: str) -> int:
    """Of one answer's, before the expert was told the right answer and after."""
    kinds = ("expert_feedback", "privileged_feedback")
    return sum(row["tokens"].get(of + kind, 0) for kind in kinds)


def summarise(
    episodes: Sequence[EpisodeRow],
    metrics: Sequence[MetricsRow],
    probe_before: Mapping[str, float],
    probe_after: Mapping[str, float],
    headroom: HeadroomRow | None,
    seconds: Mapping[str, float] | None = None,
) -> Summary:
    """The totals of a run.

    Args:
        episodes: rows of ``episodes.jsonl``.
        metrics: rows of ``metrics.jsonl``.
        probe_before: losses on the probe set before the first update.
        probe_after: the same at the end.
        headroom: counts of the headroom check.
        seconds: what was done beside the batches took, by its name.

    Returns:
        What ``summary.json`` holds. Accuracies come with their n and 95 % Wilson interval; where
        no right answer is known n is 0, and there are the models' verdicts. Expert
        feedback tokens saved are estimated as the mean length of those written, times the episodes
        in which the expert was not asked.
    """
    updates = [update for row in metrics for update in row["updates"]]
    asked = [row for row in episodes if row["expert_feedback"]]
    alone = [row for row in episodes if not row["expert_feedback"]]
    given = [row["expert_feedback"] for row in asked if row["expert_feedback"]]
    gaps = [
        abs(expert["written_score"] - head)
        for row in episodes
        if (expert := row["expert_feedback"])
        and expert["written_score"] is not None
        and (head := row["student_feedback"]["head_score"]) is not None
    ]
    half = len(gaps) // 2
    mean, later = mean_feedback(episodes), episodes[len(episodes) // 2 :]
    summary: Summary = {
        "episodes": len(episodes),
        "accuracy": {
            "first_answers": _accuracy(episodes, "correct_before"),
            "final_answers": _accuracy(episodes, "correct_after"),
        },
        "probe": {"before": dict(probe_before), "after": dict(probe_after)},
        "headroom": headroom,
        "score_gap": {
            "first_half": round(sum(gaps[:half]) / half, 4) if half else None,
            "second_half": round(sum(gaps[half:]) / len(gaps[half:]), 4) if gaps else None,
            "n": len(gaps),
        },
        "updates": {
            "batches": sum(bool(row["updates"]) for row in metrics),
            "steps": len(updates),
            "skipped": sum(update["skipped"] for update in updates),
            "tokens": sum(update["tokens"] for update in updates),
            "frozen_after_batch": _frozen_after(metrics),
        },
        "expert_feedback": {
            "asked": len(asked),
            "not_asked": len(alone),
            "tokens_written": sum(map(_all_feedback, episodes)),
            "tokens_saved": round(mean * len(alone)),
            "share_saved": share_saved(episodes, mean),
            "share_saved_second_half": share_saved(later, mean),
            "audits": _audits(asked),
            "trust": metrics[-1]["trust"] if metrics else None,
            "accuracy_when_asked": _accuracy(asked, "correct_after"),
            "accuracy_when_not_asked": _accuracy(alone, "correct_after"),
        },
        "unreadable_scores": {
            "expert": sum(expert["written_score"] is None for expert in given),
            "student": sum(row["student_feedback"]["written_score"] is None for row in episodes),
        },
        "expert_verdicts": _expert_verdicts(episodes),
        "tokens": _sums(episodes, "tokens"),
        "prefilled": _sums(episodes, "prefilled"),
        "seconds": {
            **{step: round(value, 1) for step, value in _sums(episodes, "seconds").items()},
            "distil": round(sum(row["distil_seconds"] for row in metrics), 1),
            **seconds_of(metrics, seconds or {}),
        },
    }
    if work := [row["work"] for row in metrics if "work" in row]:
        summary["work"] = total_work(work)
    if any(row["correct_before"] is None for row in episodes):
        summary["verdicts"] = _verdicts(episodes)
    return summary


def _expert_verdicts(episodes: Sequence[EpisodeRow]) -> ExpertVerdictsRow:
    # Runs of older versions did not look.
    given = [row.get("verdict") for row in episodes]
    given += [second["verdict"] for row in episodes if (second := row.get("second"))]
    counts = Counter(verdict["outcome"] for verdict in given if verdict)
    left_out = sum(counts[name] for name in ("left out", "wrong again", "leaks"))
    contradicted = counts["kept"] + left_out + counts["asked again"]
    return {
        "known": counts["agrees"] + contradicted,
        "contradicted": contradicted,
        "left_out": left_out,
        "asked_again": counts["asked again"],
    }


def total_work(rows: Sequence[WorkRow]) -> WorkRow:
    """The sum of several batches' work."""

    def added(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: round(sum(part.get(name, 0) for part in parts), 3) for name in names}

    names = dict.fromkeys(name for row in rows for name in row["counts"])
    return {
        "counts": {
            name: {
                "done": sum(row["counts"][name]["done"] for row in rows),
                "least": sum(row["counts"][name]["least"] for row in rows),
            }
            for name in names
        },
        "seconds": added([row["seconds"] for row in rows]),
        "processor_seconds": added([row["processor_seconds"] for row in rows]),
    }


def seconds_of(metrics: Sequence[BatchMetricsRow], beside: Mapping[str, float]) -> dict[str, float]:
    """The seconds of what was done beside the batches, and all of a run's in ``total``."""
    total = sum(row["seconds"] for row in metrics) + sum(beside.values())
    return {**{name: round(value, 1) for name, value in beside.items()}, "total": round(total, 1)}


def not_said_yet(found: Mapping[str, str], said: set[str]) -> list[str]:
    """Warnings, each kind of them once in a run.

    Args:
        found: text by kind of trouble.
        said: the kinds of which the user knows; those that are new are added.
    """
    new = {kind: text for kind, text in found.items() if kind not in said}
    said.update(new)
    return list(new.values())


def find_warnings(episodes: Sequence[EpisodeRow]) -> dict[str, str]:
    """What a user should know of the last episodes, by kind of trouble; mostly empty."""
    if len(episodes) < ENOUGH:
        return {}
    found = {}
    asked = [expert for row in episodes if (expert := row["expert_feedback"])]
    asked += [
        expert
        for row in episodes
        if (second := row.get("second")) and (expert := second["expert_feedback"])
    ]
    scores = [expert["written_score"] for expert in asked]
    unread = sum(score is None for score in scores)
    if asked and unread > WORRYING_SHARE * len(asked):
        found["unreadable"] = (
            f"no score could be read in {unread} of the last {len(asked)} expert feedbacks; "
            "raise --max-feedback-tokens, or choose an expert that follows instructions better"
        )
    verdicts = _expert_verdicts(episodes)
    if verdicts["contradicted"] > WORRYING_SHARE * len(asked):
        found["contradicted"] = (
            f"the right answer contradicts the expert's score in {verdicts['contradicted']} of its "
            f"last {len(asked)} feedbacks (learned from: "
            f"{verdicts['contradicted'] - verdicts['left_out']}); choose an expert that judges "
            "better, or see what --expert-verdicts does"
        )
    answers = {"answer", "expert_solution", "final", "second_answer"}
    capped = sum(bool(answers & set(row["capped"])) for row in episodes)
    if capped > WORRYING_SHARE * len(episodes):
        found["capped"] = (
            f"{capped} of the last {len(episodes)} episodes had an answer cut at the token limit; "
            "raise --max-answer-tokens"
        )
    spoiled, mended = _changes(episodes)
    # Of the answers that changed sides, more than half did so for the worse.
    if spoiled + mended >= ENOUGH and wilson(spoiled, spoiled + mended)[0] > 0.5:
        found["spoiled"] = (
            f"in the last {len(episodes)} episodes revising made {spoiled} right first answers "
            f"wrong and {mended} wrong ones right: the final answers are worse than the first; "
            "choose an expert that answers and judges better"
        )
    read = [score for score in scores if score is not None]
    if len(read) >= ENOUGH and len(set(read)) == 1:
        found["alike"] = (
            f"the expert's last {len(read)} scores are all {read[0]:g}: its scores say nothing, "
            "and the student's score head can only learn that number"
        )
    return found


def _changes(episodes: Sequence[EpisodeRow]) -> tuple[int, int]:
    """How many right first answers ended as wrong ones, and how many wrong ones as right ones."""
    changes = Counter((row["correct_before"], row["correct_after"]) for row in episodes)
    return changes[True, False], changes[False, True]
