"""What a run looks like while it goes: a live panel in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mlx_fd.cli.terminal.layout import warning
from mlx_fd.runs.events import (
    BatchDone,
    Event,
    Note,
    Probed,
    Probing,
    Started,
    Step,
    WarmedUp,
    Warned,
)
from mlx_fd.runs.labels import STEP_NAMES, duration, number, trust_says
from mlx_fd.runs.records.metrics import MetricsRow
from mlx_fd.runs.records.parts import CountRow
from mlx_fd.runs.records.self_distillation import SelfMetricsRow
from mlx_fd.runs.records.summary import HeadroomRow
from mlx_fd.runs.summary import good_by_expert
from mlx_fd.text import strip_control_chars


class Display:
    """A view of a run's events. Use as a context manager, and call with each event.

    Args:
        console: where to print; a terminal gets the live panel.
        quiet: print warnings only.
    """

    title = "mlx-fd loop"
    counted = "episodes"
    step_names: Mapping[str, str] = STEP_NAMES

    def __init__(self, console: Console, *, quiet: bool = False):
        self._console = console
        self._quiet = quiet
        self._live: Live | None = None
        self._begin = time.monotonic()
        self._done_at_begin: int | None = None
        self._step, self._step_tokens, self._step_begin = "", 0, time.monotonic()
        self._right_before = self._right_after = self._good = self._seen = 0
        # How many of them it is known of whether they are right, and how many the expert scored.
        self._known = self._judged = 0
        self._losses_first: Mapping[str, float] = {}
        self._losses_last: Mapping[str, float | None] = {}
        self._last: BatchDone | None = None
        self._temperature: float | None = None
        self._frozen = False
        self._threshold: float | None = None
        self._reason = "waiting for the first batch"
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
        )
        self._task = self._bar.add_task("loading models", total=None, eta="")

    def __enter__(self) -> Display:
        if self._console.is_interactive and not self._quiet:
            self._live = Live(
                get_renderable=self._panel, console=self._console, refresh_per_second=4
            )
            self._live.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*failure)

    def __call__(self, event: Event) -> None:
        """Take an event."""
        if isinstance(event, Warned):
            self._console.print(warning(event.text), soft_wrap=not self._console.is_terminal)
        elif isinstance(event, Note):
            self._say(event.text)
        elif isinstance(event, Step):
            self._take_step(event)
        elif isinstance(event, Probing):
            self._show_count("headroom", event.done, event.total)
        elif isinstance(event, Probed):
            self._take_probe(event)
        elif isinstance(event, Started):
            self._done_at_begin = event.done
            self._show_count(self.counted, event.done, event.total)
        elif isinstance(event, WarmedUp):
            self._say(str(event))
        else:
            self._take_batch(event)

    def _say(self, text: str) -> None:
        if not self._quiet:
            # Text: a folder called "[red]" is no style.
            self._console.print(
                Text(strip_control_chars(text)), soft_wrap=not self._console.is_terminal
            )

    def _show_count(self, what: str, done: int, total: int, eta: str = "") -> None:
        """Put a count into the panel's bar."""
        self._bar.update(
            self._task, description=f"{what}: {done}/{total}", total=total, completed=done, eta=eta
        )

    def _take_step(self, event: Step) -> None:
        if event.step != self._step:
            self._step, self._step_tokens = event.step, 0
            self._step_begin = time.monotonic()
        self._step_tokens += event.tokens

    def _take_probe(self, event: Probed) -> None:
        self._losses_first, self._losses_last = event.first, event.last
        counts = event.headroom
        assert "expert_right" in counts  # self-distillation has a display of its own
        self._say(_headroom(counts))
        self._begin = time.monotonic()

    def _take_batch(self, event: BatchDone) -> None:
        self._last = event
        self._count(event)
        eta = self._eta(event)
        self._show_count(self.counted, event.done, event.total, f"ETA {eta}")
        self._say_gate(event.metrics)
        if self._live is None:
            self._say(self._line(event, eta))

    def _say_gate(self, metrics: MetricsRow | SelfMetricsRow) -> None:
        """Say what the gate changed: that the student freezes or thaws, or where it is trusted."""
        if metrics["frozen"] != self._frozen:
            self._frozen = metrics["frozen"]
            self._say(f"gate: {'freeze' if self._frozen else 'thaw'}: {self._reason}")
        if "trust" in metrics and metrics["trust"]["threshold"] != self._threshold:
            self._threshold = metrics["trust"]["threshold"]
            self._say(f"gate: {trust_says(metrics['trust'])}")

    def _count(self, event: BatchDone) -> None:
        self._seen += len(event.rows)
        episodes = [row for row in event.rows if "correct_after" in row]
        self._known += sum(row["correct_before"] is not None for row in episodes)
        self._right_before += sum(bool(row["correct_before"]) for row in episodes)
        self._right_after += sum(bool(row["correct_after"]) for row in episodes)
        goods = [good_by_expert(row) for row in episodes]
        self._judged += sum(good is not None for good in goods)
        self._good += sum(bool(good) for good in goods)
        if event.metrics["probe"]:
            self._losses_last = event.metrics["probe"]
        stop = event.metrics["stop"]
        if stop:
            self._reason = stop["reason"]
        elif episodes:
            self._reason = episodes[-1]["gate"]["reason"]

    def _eta(self, event: BatchDone) -> str:
        done = event.done - (self._done_at_begin or 0)
        elapsed = time.monotonic() - self._begin
        return duration(elapsed / max(done, 1) * (event.total - event.done))

    def _line(self, event: BatchDone, eta: str) -> str:
        updates = event.metrics["updates"]
        losses = updates[-1]["losses"] if updates else {}
        parts = [f"{event.done}/{event.total}"]
        if event.rows:  # else a later epoch's
            parts += [
                f"right {self._right_before} -> {self._right_after} of {self._known}"
                if self._known
                else f"good by the expert {self._good} of {self._judged}",
                f"score expert {self._expert_score()} student {self._student_score()}",
            ]
        parts.append(
            "frozen" if event.metrics["frozen"] else f"distilled {event.metrics['lagging']}"
        )
        if wrong := self._wrong_verdicts():
            parts.append(f"wrong verdicts {wrong}")
        if "answer_temperature" in event.metrics:
            temperature = event.metrics["answer_temperature"]
            if None not in (temperature, self._temperature) and temperature != self._temperature:
                parts.append(f"answers at temperature {temperature:g} from now on")
            self._temperature = temperature
        if losses:
            parts.append(" ".join(f"{name} {number(value)}" for name, value in losses.items()))
        alone = sum("expert_feedback" in row and not row["expert_feedback"] for row in event.rows)
        if alone:
            parts.append(f"expert not asked {alone}")
        skipped = sum(update["skipped"] for update in updates)
        if skipped:
            parts.append(f"{skipped} steps skipped: gradient not finite")
        return "  ".join([*parts, f"ETA {eta}"])

    def _expert_score(self) -> str:
        """The mean written score of the last batch's expert feedback."""
        assert self._last is not None
        return _mean(
            expert["written_score"]
            for row in self._last.rows
            if "expert_feedback" in row and (expert := row["expert_feedback"])
        )

    def _wrong_verdicts(self) -> int:
        """The last batch's scores of the expert that the right answer contradicts."""
        assert self._last is not None
        metrics = self._last.metrics
        verdicts = metrics.get("expert_verdicts", {}) if "trust" in metrics else {}
        return sum(count for name, count in verdicts.items() if name not in ("agrees", "unknown"))

    def _student_score(self) -> str:
        """The mean head score of the last batch's student feedback."""
        assert self._last is not None
        return _mean(
            row["student_feedback"]["head_score"]
            for row in self._last.rows
            if "student_feedback" in row
        )

    def _step_line(self) -> Text:
        elapsed = max(time.monotonic() - self._step_begin, 1e-9)
        if not self._step:
            return Text("")
        step = self.step_names.get(self._step, self._step.replace("_", " "))
        rate = self._step_tokens / elapsed
        return Text(f"{step}: {self._step_tokens} tokens, {rate:.1f} tokens/s")

    def _framed(self, rows: list[RenderableType]) -> RenderableType:
        """The panel around some rows.

        The cursor stays on an empty line below it: there a terminal echoes ``^C``, which would
        otherwise wrap behind the border and leave a part of it on the screen at the next refresh.
        """
        panel = Panel(Group(*rows), title=self.title, title_align="left", border_style="dim")
        return Group(panel, Text(""))

    def _panel(self) -> RenderableType:
        rows: list[RenderableType] = [self._bar, self._step_line()]
        if self._losses_first:
            weights = self._last.metrics["weights"] if self._last else {}
            table = Table(box=None, padding=(0, 2), header_style="dim")
            for column in ("loss (held out)", "initial", "now", "weight"):
                table.add_column(column, justify="left" if column[0] == "l" else "right")
            for name, first in self._losses_first.items():
                table.add_row(
                    name,
                    number(first),
                    number(self._losses_last.get(name)),
                    number(weights.get(name), ".2f"),
                )
            rows.append(table)
        if self._last is not None:
            state = "frozen" if self._last.metrics["frozen"] else "distilling"
            answers = (
                f"right: {self._right_before} before, {self._right_after} after, of {self._known}"
                if self._known
                else f"first answers good by the expert's verdict: {self._good} of {self._judged}"
            )
            rows.append(
                Text.assemble(
                    f"{answers}; score: expert {self._expert_score()}, student "
                    f"{self._student_score()}\ngate: ",
                    (state, "cyan"),
                    f" ({self._reason})"
                    + (
                        f"\ntrust: {trust_says(self._last.metrics['trust'])}"
                        if "trust" in self._last.metrics
                        else ""
                    ),
                )
            )
        return self._framed(rows)


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(sum(known) / len(known), "+.2f") if known else "-"


def _of(value: CountRow) -> str:
    return f"{value['count']} of {value['n']}"


def _headroom(counts: HeadroomRow) -> str:
    """The headroom check in a sentence."""
    on = f"headroom on {counts['problems']} held-out problems"
    if "verdicts" in counts:
        verdicts = counts["verdicts"]
        return (
            f"{on}, without right answers: good by the expert's verdict (a score above 0), of "
            f"those it scored: its own answers {_of(verdicts['expert'])}, the student's "
            f"{_of(verdicts['student'])}; the student's verdict is the expert's on "
            f"{_of(verdicts['agreement'])}"
        )
    return (
        f"{on}: right answers: expert {counts['expert_right']}, student "
        f"{counts['student_right']}; right judgements, of readable scores: expert "
        f"{counts['expert_judged_right']} of {counts['expert_judged']}, student "
        f"{counts['student_judged_right']} of {counts['student_judged']}"
    )
