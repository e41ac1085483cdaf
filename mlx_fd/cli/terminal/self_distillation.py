"""What a run of self-distillation looks like while it goes, and its last word."""

from __future__ import annotations

import time

from rich.console import RenderableType
from rich.text import Text

from mlx_fd.cli.terminal.layout import NamedValues
from mlx_fd.cli.terminal.run import Display
from mlx_fd.problems.kinds import known
from mlx_fd.runs.events import BatchDone, Probed
from mlx_fd.runs.labels import duration, number, share_says
from mlx_fd.runs.records.self_distillation import SelfSummary
from mlx_fd.runs.self_distillation_summary import WRONG

_STEPS = {
    "headroom": "headroom",
    "attempt": "attempts",
    "echo": "clean teacher answers",
    "learn": "student learns",
    "probe": "held-out problems",
}


class SelfDisplay(Display):
    """A view of a run's events, as :class:`mlx_fd.cli.terminal.run.Display` is of the loop's."""

    title = "mlx-fd self-distill"
    counted = "problems"
    step_names = _STEPS
    _held_out: float | None = None

    def _take_probe(self, event: Probed) -> None:
        if WRONG in event.last:
            self._held_out = 1 - event.last[WRONG]
        self._begin = time.monotonic()

    def _count(self, event: BatchDone) -> None:
        own = [row for row in event.rows if "correct" in row and not row.get("by_expert")]
        self._seen += len(own)
        rights = known(row["correct"] for row in own)
        self._known += len(rights)
        self._right_before += sum(rights)
        if event.metrics["probe"]:
            self._held_out = 1 - event.metrics["probe"][WRONG]

    def _line(self, event: BatchDone, eta: str) -> str:
        return "  ".join([f"{event.done}/{event.total}", *self._parts(event), f"ETA {eta}"])

    def _parts(self, event: BatchDone) -> list[str]:
        metrics = event.metrics
        if "attempts" not in metrics:
            return []
        found, updates = metrics["attempts"], metrics["updates"]
        right = [] if found["right"] is None else [f"right {found['right']} of {found['n']}"]
        parts = [
            *right,
            f"trained on {found['teaches']:.0%}",
            f"tokens {number(found['tokens'])}",
            f"entropy {number(found['entropy'])}",
        ]
        if found["mean_abs_advantage"] is not None:
            parts.append(f"|A| {number(found['mean_abs_advantage'])}")
        if health := metrics.get("health"):
            parts.append(f"KL {number(health['reverse_kl'])} top-k shared {health['overlap']:.0%}")
        if updates:
            losses = updates[-1]["losses"]
            parts.append(" ".join(f"{name} {number(value)}" for name, value in losses.items()))
        if any(metrics["clipped"]):
            parts.append(f"clipped {max(metrics['clipped']):.1%}")
        skipped = sum(update["skipped"] for update in updates)
        if skipped:
            parts.append(f"{skipped} steps skipped: gradient not finite")
        if metrics["probe"]:
            parts.append(f"held out {1 - metrics['probe'][WRONG]:.1%} right")
        return parts

    def _panel(self) -> RenderableType:
        rows: list[RenderableType] = [self._bar, self._step_line()]
        if self._last is not None:
            rows.append(Text("  ".join(self._parts(self._last))))
            right = (
                f"{self._right_before} of {self._known} attempts right"
                if self._known
                else f"{self._seen} attempts; no right answers are known"
            )
            if self._held_out is not None:
                right += f"; held out {self._held_out:.1%} right"
            rows.append(Text(right))
        return self._framed(rows)


def summary_table(summary: SelfSummary, *, has_context: bool) -> NamedValues:
    """A run's totals, printed at its end.

    Args:
        summary: of the run.
        has_context: whether its self-teacher reads one.
    """
    table = NamedValues("Summary")

    head, found, updates = summary["headroom"], summary["attempts"], summary["updates"]
    held_out = summary["held_out"]
    if found and found["right"] is None:
        table.add_row(
            "right answers",
            "none are known, so it is not known either whether the model gives more of them now",
        )
    else:
        table.add_row("held out, before", share_says(held_out["before"]))
        table.add_row("held out, after", share_says(held_out["after"]))
    if written := summary.get("expert_answers"):
        right = "" if written["right"] is None else f"{written['right']} right of "
        table.add_row("expert's answers", f"{right}{written['n']}, {written['taught']} trained on")
    if summary["second_half"]["n"]:
        table.add_row("attempts right, first half", share_says(summary["first_half"]))
        table.add_row("attempts right, second half", share_says(summary["second_half"]))
    if head and head["taught"] and head["right"] is not None and has_context:
        table.add_row(
            "headroom",
            f"{head['without']} right without the context, {head['with_context']} with it, of "
            f"{head['taught']} held-out problems with a context",
        )
    if head and "expert" in head:
        table.add_row(
            "headroom",
            f"student {head['right']} right, expert {head['expert']}, of {head['problems']} "
            "held-out problems, before the first update",
        )
    if head and head["mixed"] is not None:
        table.add_row(
            "mixed attempts",
            f"{head['mixed']} of {head['problems']} held-out problems have both right and wrong "
            "attempts, before the first update",
        )
    if found:
        table.add_row(
            "attempts",
            f"{found['n']}, {found['teaches']:.1%} trained on, {found['finished']:.1%} finished; "
            f"mean length {number(found['tokens'])} tokens, entropy {number(found['entropy'])}",
        )
        if found["mean_abs_advantage"] is not None:
            table.add_row(
                "token advantage",
                f"mean absolute value {number(found['mean_abs_advantage'])}"
                + (
                    ""
                    if found["negative_on_right"] is None
                    else f"; negative on {number(found['negative_on_right'])} of the tokens of "
                    "right attempts"
                ),
            )
        if health := summary.get("health"):
            first, last = health["first"], health["last"]
            table.add_row(
                "student and teacher",
                f"KL(student, teacher) {number(first['reverse_kl'])} in the first quarter, "
                f"{number(last['reverse_kl'])} in the last; of the {first['top_k']} likeliest "
                f"tokens {first['overlap']:.1%} shared, then {last['overlap']:.1%}",
            )
        table.add_row(
            "log-probabilities",
            f"recomputed, maximum difference {number(found['logprob_gap'])}",
        )
    table.add_row(
        "student",
        f"{updates['steps']} steps in {updates['batches']} batches, {updates['skipped']} skipped; "
        f"{number(updates['clipped'])} of ratios clipped",
    )
    table.add_row("best checkpoint", summary["best_checkpoint"])
    table.add_row("time", duration(summary["seconds"]["total"]))
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB")
    return table
