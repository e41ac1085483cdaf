"""What the rows of a run of self-distillation add up to. Rows in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mlx_fd.problems.kinds import known
from mlx_fd.runs.records.parts import ShareRow
from mlx_fd.runs.records.self_distillation import (
    AttemptRow,
    AttemptsRow,
    ExpertAnswersRow,
    HealthRow,
    PositionRow,
    SelfHeadroomRow,
    SelfHealthRow,
    SelfMetricsRow,
    SelfSummary,
)
from mlx_fd.runs.summary import ENOUGH, WORRYING_SHARE, seconds_of, share_of, wilson_over_problems

# What the gate watches here: the share of held-out problems that are answered wrong.
WRONG = "wrong"
# Of the entropy of a uniform distribution: no text that says something comes near.
_UNIFORM = 0.9


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(math.fsum(known) / len(known), 6) if known else None


def students_own(rows: Sequence[AttemptRow]) -> Sequence[AttemptRow]:
    """The attempts that the student wrote; all of them where it wrote none."""
    return [row for row in rows if not row.get("by_expert")] or rows


def expert_answers(rows: Sequence[AttemptRow]) -> ExpertAnswersRow | None:
    """What the expert wrote in the student's place; ``None``: nothing."""
    written = [row for row in rows if row.get("by_expert")]
    if not written:
        return None
    return {
        "n": len(written),
        "right": sum(rights) if (rights := known(row["correct"] for row in written)) else None,
        "taught": sum(row["teaches"] for row in written),
    }


def health_over(metrics: Sequence[SelfMetricsRow]) -> SelfHealthRow | None:
    """How near student and teacher came; ``None`` where no teacher read attempts."""
    rows = [row["health"] for row in metrics if "health" in row]
    quarter = math.ceil(len(rows) / 4)
    if not rows:
        return None
    return {"first": _joined(rows[:quarter]), "last": _joined(rows[-quarter:])}


def _joined(rows: Sequence[HealthRow]) -> HealthRow:
    """The numbers of several batches as of one, every token counting the same."""

    def mean(values: Sequence[tuple[int, float]]) -> float:
        tokens = sum(count for count, _ in values)
        return round(math.fsum(count * value for count, value in values) / tokens, 6)

    at: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        for place in row["positions"]:
            at.setdefault(place["first"], []).append((place["tokens"], place["reverse_kl"]))
    positions: list[PositionRow] = [
        {"first": first, "tokens": sum(count for count, _ in at[first]), "reverse_kl": mean(values)}
        for first, values in sorted(at.items())
    ]
    return {
        "top_k": rows[0]["top_k"],
        "tokens": sum(row["tokens"] for row in rows),
        "overlap": mean([(row["tokens"], row["overlap"]) for row in rows]),
        "reverse_kl": mean([(row["tokens"], row["reverse_kl"]) for row in rows]),
        "positions": positions,
    }


def attempts_summary(rows: Sequence[AttemptRow]) -> AttemptsRow:
    """The statistics of some attempts.

    Args:
        rows: of ``attempts.jsonl``, at least one.

    Returns:
        How many there are and how many are right; the shares that teach and that ended themselves;
        means over attempts: reward, length in tokens, entropy in nats, abs(A_t), the share of
        negative A_t on right attempts; and the largest difference of a token's log-probability
        from when it was drawn. ``None`` where nothing is known.
    """
    return {
        "n": len(rows),
        "right": sum(rights) if (rights := known(row["correct"] for row in rows)) else None,
        "reward": _mean([row["reward"] for row in rows]),
        "teaches": _mean([row["teaches"] for row in rows]),
        "finished": _mean([row["finished"] for row in rows]),
        "tokens": _mean([len(row["tokens"]) for row in rows]),
        "entropy": _mean([row["entropy"] for row in rows]),
        "mean_abs_advantage": _mean([row["mean_abs_advantage"] for row in rows]),
        "negative_on_right": _mean([row["negative_advantage"] for row in rows if row["correct"]]),
        "logprob_gap": max(row["logprob_gap"] for row in rows),
    }


def held_out_share(losses: Mapping[str, float], n: int) -> ShareRow:
    """The share of n held-out problems answered right; of none where it is not known.

    Args:
        losses: the share answered wrong; empty where it is not known.
        n: how many there are.
    """
    right = round((1 - losses[WRONG]) * n) if WRONG in losses else 0
    return share_of(place < right for place in range(n if WRONG in losses else 0))


def _share_of_attempts(rows: Sequence[AttemptRow]) -> ShareRow:
    rights = [(row["id"], right) for row in rows if (right := row["correct"]) is not None]
    low, high = wilson_over_problems(rights)
    return {
        "right": sum(right for _, right in rights),
        "n": len(rights),
        "interval": [round(low, 4), round(high, 4)],
    }


def summarise(
    attempts: Sequence[AttemptRow],
    metrics: Sequence[SelfMetricsRow],
    probe_before: Mapping[str, float],
    probe_after: Mapping[str, float],
    probe_size: int,
    headroom: SelfHeadroomRow | None,
    seconds: Mapping[str, float] | None = None,
) -> SelfSummary:
    """The totals of a run: what ``summary.json`` holds.

    Args:
        attempts: rows of ``attempts.jsonl``.
        metrics: rows of ``metrics.jsonl``.
        probe_before: the share of held-out problems answered wrong, before the first update;
            empty where it is not known.
        probe_after: the same at the end.
        probe_size: of how many problems.
        headroom: counts of the headroom check.
        seconds: what was done beside the batches took, by its name.
    """
    updates = [update for row in metrics for update in row["updates"]]
    own = [row for row in attempts if not row.get("by_expert")]
    half = len(own) // 2
    clipped = [share for row in metrics for share in row["clipped"]]
    summary: SelfSummary = {
        "attempts": attempts_summary(students_own(attempts)) if attempts else None,
        "first_half": _share_of_attempts(own[:half]),
        "second_half": _share_of_attempts(own[half:]),
        "held_out": {
            "before": held_out_share(probe_before, probe_size),
            "after": held_out_share(probe_after, probe_size),
        },
        "probe": {"before": dict(probe_before), "after": dict(probe_after)},
        "headroom": headroom,
        "updates": {
            "batches": sum(bool(row["updates"]) for row in metrics),
            "steps": len(updates),
            "skipped": sum(update["skipped"] for update in updates),
            "tokens": sum(update["tokens"] for update in updates),
            "clipped": _mean(clipped),
        },
        "tokens": {
            "attempt": sum(len(row["tokens"]) for row in attempts),
            "prefilled": sum(row["prefilled"] for row in metrics),
        },
        "seconds": {
            **{
                step: round(sum(row["step_seconds"][step] for row in metrics), 1)
                for step in ("attempt", "context", "learn")
            },
            **seconds_of(metrics, seconds or {}),
        },
    }
    if (written := expert_answers(attempts)) is not None:
        summary["expert_answers"] = written
    if (health := health_over(metrics)) is not None:
        summary["health"] = health
    return summary


def find_warnings(
    metrics: Sequence[SelfMetricsRow], held_out: Sequence[ShareRow], rate: float, vocab: int
) -> dict[str, str]:
    """What a user should know of the last attempts, by kind of trouble; mostly empty.

    Args:
        metrics: rows of ``metrics.jsonl``, from the first batch on.
        held_out: problems answered right before the first update, and last time they were asked.
        rate: the learning rate.
        vocab: the tokens that a distribution is over.
    """
    found = {}
    advice = f"begin a new run with a lower learning rate (--lora-rate {rate:g} may be too high)"
    before, now = held_out
    # The intervals lie apart, so that a run which looks often is not warned by chance.
    if now["n"] and now["interval"][1] < before["interval"][0]:
        found["worse"] = (
            f"the student has become worse: of {now['n']} held-out problems it answers "
            f"{now['right']} right, {before['right']} before training; {advice}"
        )
    steps = [update["skipped"] for row in metrics for update in row["updates"]][-ENOUGH:]
    if len(steps) == ENOUGH and all(steps):
        found["skipped"] = (
            f"the last {ENOUGH} optimiser steps were left out, as loss or gradient was not finite: "
            f"nothing is learned; {advice}"
        )
    last = _last_attempts(metrics)
    if not last:
        return found
    many = sum(row["n"] for row in last)
    entropy = _mean([row["entropy"] for row in last])
    if entropy is not None and entropy > _UNIFORM * math.log(vocab):
        found["uniform"] = (
            f"the student writes at random: its distributions have an entropy of {entropy:.2f} "
            f"nats, and no more than {math.log(vocab):.2f} is possible; {advice}, or with a lower "
            "--temperature"
        )
    cut = round(sum(row["n"] * (1 - (row["finished"] or 0)) for row in last))
    if cut > WORRYING_SHARE * many:
        at_first = metrics[0]["attempts"]["finished"] or 0
        text = f"{cut} of the last {many} attempts were cut at the token limit"
        if 1 - at_first > WORRYING_SHARE:
            found["cut"] = f"{text}; raise --max-answer-tokens"
        else:
            found["endless"] = (
                f"{text}, {1 - at_first:.0%} in the first batch: answers no longer end; "
                f"{advice}, or raise --max-answer-tokens"
            )
    return found


def _last_attempts(metrics: Sequence[SelfMetricsRow]) -> list[AttemptsRow]:
    """Statistics of the last batches that have enough attempts together; empty: there are fewer."""
    last, many = list[AttemptsRow](), 0
    for row in reversed(metrics):
        last.append(row["attempts"])
        many += row["attempts"]["n"]
        if many >= ENOUGH:
            return last
    return []
