"""What a run of self-distillation looks like while it goes, and its last word."""

from __future__ import annotations

import time

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mlx_fd.cli.terminal.run import Display
from mlx_fd.runs.events import BatchDone, Probed
from mlx_fd.runs.labels import duration, number
from mlx_fd.runs.records import SelfSummary, ShareRow
from mlx_fd.runs.self_distillation_summary import WRONG

_STEPS = {
    "headroom": "looking for headroom",
    "attempt": "attempts",
    "echo": "the clean teacher answers",
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
        self._held_out = 1 - event.last[WRONG]
        self._begin = time.monotonic()

    def _count(self, event: BatchDone) -> None:
        self._seen += len(event.rows)
        self._right_before += sum(row["correct"] for row in event.rows if "correct" in row)
        if event.metrics["probe"]:
            self._held_out = 1 - event.metrics["probe"][WRONG]

    def _begun_at(self, event: BatchDone) -> int:
        return event.done - len({row["id"] for row in event.rows})

    def _line(self, event: BatchDone, eta: str) -> str:
        return "  ".join([f"{event.done}/{event.total}", *self._parts(event), f"ETA {eta}"])

    def _parts(self, event: BatchDone) -> list[str]:
        metrics = event.metrics
        if "attempts" not in metrics:
            return []
        found, updates = metrics["attempts"], metrics["updates"]
        parts = [
            f"right {found['right']} of {found['n']}",
            f"teaching {found['teaches']:.0%}",
            f"tokens {number(found['tokens'])}",
            f"entropy {number(found['entropy'])}",
        ]
        if found["mean_abs_advantage"] is not None:
            parts.append(f"|A| {number(found['mean_abs_advantage'])}")
        if updates:
            losses = updates[-1]["losses"]
            parts.append(" ".join(f"{name} {number(value)}" for name, value in losses.items()))
        if any(metrics["clipped"]):
            parts.append(f"clipped {max(metrics['clipped']):.1%}")
        skipped = sum(update["skipped"] for update in updates)
        if skipped:
            parts.append(f"{skipped} steps skipped: not finite")
        if metrics["probe"]:
            parts.append(f"held out {1 - metrics['probe'][WRONG]:.1%} right")
        return parts

    def _panel(self) -> RenderableType:
        rows: list[RenderableType] = [self._bar, self._step_line()]
        if self._last is not None:
            rows.append(Text("  ".join(self._parts(self._last))))
            right = f"{self._right_before} of {self._seen} attempts right"
            if self._held_out is not None:
                right += f"; held out {self._held_out:.1%} right"
            rows.append(Text(right))
        return Panel(Group(*rows), title=self.title, title_align="left", border_style="dim")


def summary_table(summary: SelfSummary) -> Table:
    """A run's totals, as the run's last word."""
    table = Table(title="Summary", title_justify="left", show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column()

    def accuracy(value: ShareRow) -> str:
        if not value["n"]:
            return "-"
        low, high = value["interval"]
        share = value["right"] / value["n"]
        return f"{share:.1%} ({value['right']}/{value['n']}, 95 % {low:.1%} to {high:.1%})"

    head, found, updates = summary["headroom"], summary["attempts"], summary["updates"]
    held_out = summary["held_out"]
    table.add_row("held out, before", accuracy(held_out["before"]))
    table.add_row("held out, after", accuracy(held_out["after"]))
    table.add_row("attempts right, first half", accuracy(summary["first_half"]))
    table.add_row("attempts right, second half", accuracy(summary["second_half"]))
    if head and head["taught"]:
        table.add_row(
            "headroom",
            f"{head['without']} right without the context, {head['with_context']} with it, of the "
            f"{head['taught']} held-out problems that it has something to say about",
        )
    if head:
        table.add_row(
            "right and wrong attempts",
            f"at {head['mixed']} of {head['problems']} held-out problems, before the first update",
        )
    if found:
        table.add_row(
            "attempts",
            f"{found['n']}, {found['teaches']:.1%} teach, {found['finished']:.1%} end themselves; "
            f"mean of {number(found['tokens'])} tokens, entropy {number(found['entropy'])}",
        )
        if found["mean_abs_advantage"] is not None:
            table.add_row(
                "advantage of a token",
                f"{number(found['mean_abs_advantage'])} in the mean, whatever its sign; negative "
                f"on {number(found['negative_on_right'])} of right attempts' tokens",
            )
        table.add_row(
            "log-probabilities",
            f"read again, different by at most {number(found['logprob_gap'])}",
        )
    table.add_row(
        "student",
        f"{updates['steps']} steps in {updates['batches']} batches, {updates['skipped']} skipped; "
        f"{number(updates['clipped'])} of ratios cut",
    )
    table.add_row("best checkpoint", summary["best_checkpoint"])
    table.add_row("time", duration(summary["seconds"]["total"]))
    table.add_row("peak memory", f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB")
    return table
