"""The report's page: runs, with every episode or attempt in it, from which page.js takes them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd.errors import UserError
from mlx_fd.files import clear_unfinished, failed_write, open_to_read, write_atomic
from mlx_fd.report import cascade, charts, packing, self_charts, self_tables, tables
from mlx_fd.report.drawing import Figure
from mlx_fd.report.reading import CascadeShown, LoopRun
from mlx_fd.report.rendering import GENERATOR, asset, render
from mlx_fd.report.run import Run
from mlx_fd.report.self_reading import SelfRun
from mlx_fd.report.speculation import acceptance_figure
from mlx_fd.report.trust import trust_figure
from mlx_fd.runs.labels import STEP_NAMES

_LOOKED_AT = 1000


@dataclass(frozen=True)
class _Embedded:
    """A run's records in the page."""

    name: str
    context: str
    total: int
    index: str
    parts: list[str]


@dataclass(frozen=True)
class _Kind:
    """What a page of one kind of run is made of.

    Attributes:
        one: what a record is called; also, in the plural, the template and the script.
        sections: ids and names.
        rows: a run's records.
        listed: a record's line in the list.
        packed: a record as the page keeps it.
        parts: what the template shows of the runs.
    """

    one: str
    sections: Mapping[str, str]
    rows: Callable[[Any], Sequence[Mapping[str, Any]]]
    listed: Callable[[Any], list[Any]]
    packed: Callable[[Any], Mapping[str, Any]]
    parts: Callable[[Any], dict[str, Any]]


def check_out(path: Path) -> None:
    """Make sure that a report may be written there.

    Raises:
        UserError: there is something else in its place.
    """
    if path.is_dir():
        raise UserError(f"{path}: this is a folder; --out takes the report's file.")
    if not path.exists():
        return
    with open_to_read(path) as file:
        if GENERATOR.encode() not in file.read(_LOOKED_AT):
            raise UserError(
                f"{path}: there is a file that is no page of mlx-fd, and it was left alone; "
                "choose another --out."
            )


def write_page(page: str, path: Path) -> None:
    """Write the report.

    Raises:
        UserError: it cannot be written, or something else is in its place.
    """
    check_out(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_unfinished(path.parent)
        write_atomic(path, page)
    except OSError as error:
        raise UserError(
            f"{path}: the report cannot be written there ({failed_write(error)}); choose another "
            "--out."
        ) from error


def make_page(
    runs: Sequence[LoopRun] | Sequence[SelfRun],
    most: int | None = None,
    on_progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> str:
    """The page of one run, or of several of a kind beside each other.

    Args:
        runs: what is reported.
        most: how many records of each run to put in; all of them where it is ``None``.
        on_progress: called with what is being made, how many of it are done, and of how many.
    """
    kind = _SELF if isinstance(runs[0], SelfRun) else _LOOP
    embedded = []
    for done, run in enumerate(runs):
        on_progress(f"packing {kind.one}s", done, len(runs))
        every = kind.rows(run)
        rows = packing.spread(every, most)
        embedded.append(
            _Embedded(
                run.name,
                str(run.manifest["options"].get("context", "")),
                len(every),
                packing.pack([kind.listed(row) for row in rows]),
                packing.parts([kind.packed(row) for row in rows]),
            )
        )
    on_progress(f"packing {kind.one}s", len(runs), len(runs))
    on_progress("drawing charts", 0, 1)
    counts = [min(run.total, most or run.total) for run in embedded]
    page = render(
        f"{kind.one}s.html",
        # The library comes last, so that the records need not wait for it.
        scripts=(asset(f"{kind.one}s.js") + asset("page.js"), chart_library()),
        brand="mlx-fd report",
        runs=runs,
        several=len(runs) > 1,
        title=f"{len(runs)} runs compared" if len(runs) > 1 else f"Run {runs[0].name}",
        one=kind.one,
        many=f"{kind.one}s",
        sections=kind.sections.items(),
        evaluations=[
            (
                run,
                evaluation,
                [(found, charts.system_figure(found)) for found in evaluation["sets"]],
            )
            for run in runs
            for evaluation in run.evaluations
        ],
        tables=tables,
        embedded=embedded,
        put_in=sum(counts),
        left_out=sum(run.total for run in embedded) - sum(counts),
        facts=packing.script_json(
            {
                "part": packing.PART,
                "steps": STEP_NAMES,
                "runs": [
                    {"name": run.name, "context": run.context, "parts": len(run.parts)}
                    for run in embedded
                ],
            }
        ),
        **kind.parts(runs),
    )
    on_progress("drawing charts", 1, 1)
    return page


def _loop_parts(runs: Sequence[LoopRun]) -> dict[str, Any]:
    probes = tables.probe_table(runs)
    judged = tables.judging_table(runs)
    worked = tables.work_table(runs)
    warm_ups = [run.warm_up for run in runs if run.warm_up]
    return {
        "lead": tables.lead,
        "headlines": tables.headlines,
        "totals": [
            tables.summary_table(runs),
            *([probes] if probes else []),
            *([judged] if judged else []),
            *([worked] if worked else []),
        ],
        "warm_up": self_tables.summary_table(warm_ups) if warm_ups else None,
        "warm_up_figures": [
            *_there(self_charts.held_out_figure(warm_ups)),
            *self_charts.attempt_figures(warm_ups),
        ],
        "losses": charts.loss_figures(runs),
        "by_run": [
            _gate(run, charts.weight_figure(run), charts.decision_figure(run), trust_figure(run))
            for run in runs
        ],
        "accuracy": _there(charts.accuracy_figure(runs)),
        "exam": _there(charts.exam_figure(runs)),
        "budget": [*charts.budget_figures(runs), *_there(acceptance_figure(runs))],
        "pareto": [(run, charts.pareto_figures(run)) for run in runs if run.pareto],
        "cascade": [(run, [_cascade(run.cascade)]) for run in runs if run.cascade],
        "origin": tables.origin_table(runs),
    }


def _cascade(found: CascadeShown) -> Figure:
    where = "held out" if found["held_out"] else "the calibration's problems"
    return cascade.figure(found["measured"], f"Accuracy against the share passed on, {where}")


def _self_parts(runs: Sequence[SelfRun]) -> dict[str, Any]:
    return {
        "lead": self_tables.lead,
        "headlines": self_tables.headlines,
        "totals": [self_tables.summary_table(runs)],
        "method": self_tables.method_table(runs),
        "by_expert": all(run.has_expert for run in runs),
        "has_context": any(run.has_context for run in runs),
        "headroom": self_tables.headroom_table(runs),
        "ungraded": any(self_tables.is_ungraded(run) for run in runs),
        "learning": [
            *_there(self_charts.held_out_figure(runs)),
            *self_charts.update_figures(runs),
        ],
        "by_run": [_gate(run) for run in runs],
        "statistics": self_charts.attempt_figures(runs),
        "budget": self_charts.budget_figures(runs),
        "origin": tables.origin_table(runs, "critic"),
    }


_LOOP = _Kind(
    "episode",
    {
        "summary": "Summary",
        "learning": "Learning",
        "answers": "Answers",
        "budget": "Budget",
        "frontier": "Frontier",
        "cascade": "Cascade",
        "evaluation": "Evaluation",
        "episodes": "Episodes",
        "configuration": "Configuration",
    },
    lambda run: run.episodes,
    packing.listed_episode,
    lambda row: row,
    _loop_parts,
)
_SELF = _Kind(
    "attempt",
    {
        "summary": "Summary",
        "method": "Method",
        "learning": "Learning",
        "statistics": "Statistics",
        "budget": "Budget",
        "evaluation": "Evaluation",
        "attempts": "Attempts",
        "configuration": "Configuration",
    },
    lambda run: run.attempts,
    packing.listed_attempt,
    packing.without_tokens,
    _self_parts,
)


def _there(figure: Figure | None) -> list[Figure]:
    return [figure] if figure else []


def _gate(run: Run, *more: Figure | None) -> tuple[Run, list[Figure], str, tables.Table | None]:
    """What is shown of a run's gate: figures, what there is in the gains' place, decisions."""
    gains = charts.gain_figure(run)
    figures = [figure for figure in (gains, *more) if figure]
    return run, figures, "" if gains else charts.no_gains(run), tables.decision_table(run)


@functools.cache
def chart_library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one JavaScript module, out of vl-convert."""
    import vl_convert

    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return _inside_script(bundle)


def _inside_script(code: str) -> str:
    """JavaScript that can stand in a ``<script>`` element: an end tag in a string is broken up."""
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")
