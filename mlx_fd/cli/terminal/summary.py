"""A run's totals, printed at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_fd.cli.terminal.layout import NamedValues
from mlx_fd.runs.acceptance import ALL
from mlx_fd.runs.labels import (
    EXAM_NAMES,
    PART_NAMES,
    WORK_NAMES,
    beside_least,
    duration,
    expert_verdicts_say,
    number,
    share_says,
    trust_says,
)
from mlx_fd.runs.records.metrics import WorkRow
from mlx_fd.runs.records.parts import EstimateRow
from mlx_fd.runs.records.self_distillation import SelfSummary
from mlx_fd.runs.records.summary import (
    ExpertUseRow,
    JudgingRow,
    ScoreGapRow,
    Summary,
    TopKRow,
    UpdatesRow,
)

Lines = Iterator[tuple[str, str]]
"""A name and a value each."""


def summary_table(summary: Summary) -> NamedValues:
    """A run's totals, part by part."""
    table = NamedValues("Summary")
    for name, value in _lines(summary):
        table.add_row(name, value)
    return table


def _lines(summary: Summary) -> Lines:
    if warmed_up := summary.get("warm_up"):
        yield _warm_up(warmed_up)
    yield from _answers(summary)
    yield from _losses(summary)
    yield _score_gap(summary["score_gap"])
    if judged := summary.get("judging"):
        yield from _judging(judged)
    yield _updates(summary["updates"])
    yield from _expert(summary["expert_feedback"], right_known="verdicts" not in summary)
    if "top_k" in summary:
        yield _top_k(summary["top_k"])
    yield from _scores(summary)
    yield from _exam(summary)
    if "acceptance" in summary:
        halves = summary["acceptance"][ALL]
        yield (
            "student's proposals",
            f"{_share(halves['first_half'])} of the expert's tokens in the first half, "
            f"{_share(halves['second_half'])} in the second",
        )
    if "work" in summary:
        yield from _work(summary["work"])
    yield "time", duration(summary["seconds"]["total"])
    yield "peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB"


def _warm_up(warmed_up: SelfSummary) -> tuple[str, str]:
    held_out, found = warmed_up["held_out"], warmed_up.get("health")
    nearness = (
        f"; KL(student, expert) {number(found['first']['reverse_kl'])} -> "
        f"{number(found['last']['reverse_kl'])}"
        if found
        else ""
    )
    return (
        "warm-up",
        f"held out right {share_says(held_out['before'])} -> {share_says(held_out['after'])}; "
        f"{warmed_up['updates']['steps']} steps{nearness}",
    )


def _answers(summary: Summary) -> Lines:
    if "verdicts" in summary:
        verdicts = summary["verdicts"]
        yield "right answers", "none are known: what follows is by the models' verdicts"
        yield "first answers good, by the expert", share_says(verdicts["first_answers"])
        yield "student's verdict is the expert's", share_says(verdicts["agreement"])
        yield "answers", f"{verdicts['kept']} kept, {verdicts['revised']} revised"
    else:
        yield "first answers right", share_says(summary["accuracy"]["first_answers"])
        yield "final answers right", share_says(summary["accuracy"]["final_answers"])


def _losses(summary: Summary) -> Lines:
    for name, before in summary["probe"]["before"].items():
        after = summary["probe"]["after"].get(name)
        change = "" if after is None or not before else f" ({after / before - 1:+.1%})"
        yield f"{name} loss, held out", f"{before:.4g} -> {number(after, '.4g')}{change}"


def _score_gap(gap: ScoreGapRow) -> tuple[str, str]:
    return (
        "score gap, student to expert",
        f"{number(gap['first_half'])} in the first half of the answers that both scored, "
        f"{number(gap['second_half'])} in the second (n {gap['n']})",
    )


def _judging(judged: JudgingRow) -> Lines:
    for name, score in (("score head", judged["head"]), ("written score", judged["written"])):
        yield (
            f"{name} as a verdict",
            f"AUC {_within(score['auc'], score.get('auc_interval'), '.2f')}, "
            f"Brier {_within(score['brier'], score.get('brier_interval'), '.3f')} against "
            f"the expert's, in the second half of the answers that it scored (n {score['n']})",
        )


def _updates(updates: UpdatesRow) -> tuple[str, str]:
    frozen = updates["frozen_after_batch"]
    return (
        "student",
        f"{updates['steps']} steps in {updates['batches']} batches, {updates['skipped']} skipped; "
        + (f"frozen after batch {frozen}" if frozen else "not frozen"),
    )


def _expert(feedback: ExpertUseRow, *, right_known: bool) -> Lines:
    yield (
        "expert feedback",
        f"{feedback['asked']} requested ({feedback['tokens_written']} tokens), "
        f"{feedback['not_asked']} skipped (about {feedback['tokens_saved']} tokens saved)",
    )
    if feedback["not_asked"]:
        whole, half = (
            "-" if share is None else f"{share:.1%}"
            for share in (feedback["share_saved"], feedback["share_saved_second_half"])
        )
        yield "saved, of its feedback tokens", f"{whole}; in the second half {half}"
    yield "trust", _trusted(feedback)
    if feedback["not_asked"] and right_known:
        yield (
            "right, requested / skipped",
            f"{share_says(feedback['accuracy_when_asked'])} / "
            f"{share_says(feedback['accuracy_when_not_asked'])}",
        )


def _trusted(feedback: ExpertUseRow) -> str:
    """Where the student needs no expert, and what the audits showed there."""
    trust, audits = feedback["trust"], feedback["audits"]
    now = "nowhere" if trust is None else trust_says(trust)
    if not audits["n"]:
        return f"at the end {now}"
    low, high = audits["interval"]
    return (
        f"at the end {now}; in the run's {audits['n']} audits {audits['disagreed']} differed "
        f"({audits['disagreed'] / audits['n']:.1%}, 95 % {low:.1%} to {high:.1%})"
    )


def _top_k(top_k: TopKRow) -> tuple[str, str]:
    return (
        f"expert's top {top_k['k']} tokens",
        f"omit {top_k['tail_mass']:.2%} of its probability; the logit loss misses "
        + (
            "an unknown amount"
            if top_k["missing_at_most"] is None
            else f"at most {top_k['missing_at_most']:.3g}"
        ),
    )


def _scores(summary: Summary) -> Lines:
    unread = summary["unreadable_scores"]
    yield (
        "unreadable scores",
        f"expert {unread['expert']}, student {unread['student']} of {summary['episodes']}",
    )
    if summary.get("expert_verdicts", {}).get("known"):
        yield "scores contradicted by gold", expert_verdicts_say(summary["expert_verdicts"])


def _exam(summary: Summary) -> Lines:
    for name, sides in summary.get("exam", {}).items():
        yield (
            f"exam: {EXAM_NAMES[name]}",
            f"{_estimate(sides['before'])} -> {_estimate(sides['after'])}, change "
            f"{_estimate(sides['change'], '+')} (n {sides['before']['n']})",
        )


def _work(work: WorkRow) -> Lines:
    for name, amount in work["counts"].items():
        yield WORK_NAMES[name], beside_least(amount)
    processor = work["processor_seconds"]
    total = sum(processor.values())
    for name, seconds in work["seconds"].items():
        share = processor[name] / total if total else 0.0
        yield (
            f"time: {PART_NAMES[name]}",
            f"{seconds:,.1f} s, {share:.1%} of the batches' processor time",
        )


def _estimate(value: EstimateRow, sign: str = "") -> str:
    """A number with its 95 % interval."""
    if value["value"] is None:
        return "-"
    middle = format(value["value"], f"{sign}.3f")
    return f"{middle} [{number(value['low'], '.3f')}, {number(value['high'], '.3f')}]"


def _share(value: EstimateRow) -> str:
    """A share with its 95 % interval."""
    if value["value"] is None:
        return "-"
    return f"{value['value']:.1%} [{number(value['low'], '.1%')}, {number(value['high'], '.1%')}]"


def _within(value: float | None, interval: Sequence[float] | None, form: str) -> str:
    """A number and its interval, which older runs do not have."""
    ends = ", ".join(format(end, form) for end in interval or ())
    return f"{number(value, form)} [{ends}]" if ends else number(value, form)
