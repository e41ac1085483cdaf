"""What trust saves, and what comes of it: whole runs of the loop in its default gate.

python scripts/bench_trust.py --runs DIR --seeds 0,1,2     # each run once; goes on where it stopped
python scripts/bench_trust.py --arms long --runs DIR       # the run of forty minutes
python scripts/bench_trust.py --table --plot               # docs/bench_trust.*, from the rows alone

Of the problems that need no expert a tenth, drawn by hash, is audited all the same. So the final
answers of audited problems and of those where the student stood alone are those of two random
samples of one run, and their difference is what not asking costs. Rows, one for each run, go to
docs/bench_trust.jsonl.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from bench_method import AFTER, HEIGHT, LEFT, TOP, WIDTH, Row, column, quality, run_arm, shown
from numpy.typing import NDArray
from several_runs import RunValue, of_problems, over_runs

from mlx_fd.evaluation.statistics import Estimate

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE, PLOT = (DOCS / f"bench_trust.{kind}" for kind in ("jsonl", "md", "svg"))
# {arm: options beside those of the preset tiny}
ARMS: dict[str, tuple[str, ...]] = {
    "main": (),
    "long": ("--episodes", "3200"),
}
# Of an episode, where a row has no number for it.
NOTHING = "-"


def row_of(arm: str, seed: int, folder: Path) -> Row:
    """A finished run as one row."""
    from mlx_fd import runs
    from mlx_fd.runs.summary import agreed

    summary = json.loads((folder / "summary.json").read_text())
    episodes = runs.read_episodes(folder)
    exam = json.loads((folder / "exam_after.json").read_text())["results"]

    def bits(values: Sequence[bool | None]) -> str:
        return "".join(NOTHING if value is None else str(int(value)) for value in values)

    return {
        "arm": arm,
        "seed": seed,
        "options": list(ARMS[arm]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "mlx": version("mlx"),
        "seconds": summary["seconds"]["total"],
        "tokens": [row["tokens"].get("expert_feedback", 0) for row in episodes],
        "asked": bits([row["expert_feedback"] is not None for row in episodes]),
        "trusted": bits([row["gate"]["trusted"] for row in episodes]),
        "agreed": bits([agreed(row) for row in episodes]),
        "right": bits([row["correct_after"] for row in episodes]),
        "wrong": bits([one["wrong"] for one in exam]),
        "found": ["", bits([one["found"] for one in exam])],
        "solved": ["", bits([one["solved"] for one in exam])],
    }


def read_rows(path: Path) -> dict[str, list[Row]]:
    """{arm: the last row of each seed}."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {(row["arm"], row["seed"]): row for row in map(json.loads, lines)}
    return {
        arm: found
        for arm in ARMS
        if (found := [rows[key] for key in sorted(rows) if key[0] == arm])
    }


# ---- what a row says ----


def marks(row: Row, name: str) -> NDArray[np.float64]:
    """A number for each episode, NaN where there is none."""
    return np.array([math.nan if value == NOTHING else float(value) for value in row[name]])


def saved(row: Row, begin: int = 0, end: int | None = None) -> float:
    """The share of the expert's feedback tokens that some episodes did not take.

    A feedback that was not written counts as the mean of the run's.
    """
    tokens, asked = np.array(row["tokens"], dtype=float), marks(row, "asked")
    alone = (1 - asked[begin:end]).sum() * tokens.sum() / asked.sum()
    whole = alone + tokens[begin:end].sum()
    return float(alone / whole) if whole else 0.0


def audits(row: Row) -> NDArray[np.float64]:
    """For each audited verdict where the student is trusted, whether it differs."""
    same = marks(row, "agreed")[marks(row, "trusted") == 1]
    return np.asarray(1 - same[~np.isnan(same)])


def cost(row: Row) -> RunValue:
    """Final answers right where the student stood alone, less those of audited problems."""
    trusted, asked, right = (marks(row, name) for name in ("trusted", "asked", "right"))
    alone, audited = (_share(right[(trusted == 1) & (asked == value)]) for value in (0, 1))
    return RunValue(alone.value - audited.value, math.hypot(alone.error, audited.error))


def _share(right: NDArray[np.float64]) -> RunValue:
    """A share near 1: where every answer is right the error is not 0 (Agresti and Coull, 1998)."""
    n = len(right)
    middle = (right.sum() + 1) / (n + 2)
    error = math.sqrt(middle * (1 - middle) / (n + 2))
    return RunValue(float(right.mean()) if n else math.nan, error)


MEASURES: dict[str, Callable[[Sequence[Row]], Estimate]] = {
    "expert's feedback tokens saved (%)": lambda rows: _over(rows, saved),
    "of them in the second half (%)": lambda rows: _over(
        rows, lambda row: saved(row, len(row["asked"]) // 2)
    ),
    "audited verdicts that differ (%)": lambda rows: over_runs(
        [of_problems([audits(row)]) for row in rows]
    )[0],
    "final answers right (%)": lambda rows: over_runs(
        [of_problems([marks(row, "right")]) for row in rows]
    )[0],
    "the same, alone less audited (points)": lambda rows: over_runs(list(map(cost, rows)))[0],
    "F1 of first errors (%)": quality,
    "problems solved (%)": lambda rows: over_runs(
        [of_problems([column(row, "solved", AFTER)]) for row in rows]
    )[0],
}


def _over(rows: Sequence[Row], value: Callable[[Row], float]) -> Estimate:
    return over_runs([RunValue(value(row), 0.0) for row in rows])[0]


def table(path: Path) -> str:
    """The rows as tables in Markdown, one for each arm."""
    lines: list[str] = []
    for arm, rows in read_rows(path).items():
        options = " ".join(["--preset tiny", *ARMS[arm]])
        lines += [
            f"**`mlx-fd loop {options}`**: {len(rows[0]['asked'])} episodes, "
            f"{len(rows[0]['wrong'])} questions at the end, the default gate. The mean over runs "
            "with its 95 % t interval over runs; then each run.",
            "",
            "| | all | " + " | ".join(f"seed {row['seed']}" for row in rows) + " |",
            f"|---|---|{'--:|' * len(rows)}",
        ]
        for name, measure in MEASURES.items():
            form = "+.1f" if "points" in name else ".1f"
            cells = [f"{measure([row]).value * 100:{form}}" for row in rows]
            cells.insert(0, shown(measure(rows), form))
            # What no run, or just one, says anything of.
            cells = ["-" if "nan" in cell else cell for cell in cells]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        counts: dict[str, Callable[[Row], str]] = {
            "audited verdicts, of which differ": lambda row: (
                f"{len(audits(row))}, {audits(row).sum():.0f}"
            ),
            "episodes before trust": lambda row: str(
                row["trusted"].index("1") if "1" in row["trusted"] else len(row["trusted"])
            ),
            "minutes": lambda row: f"{row['seconds'] / 60:.1f}",
        }
        lines += [
            f"| {name} | | {' | '.join(count(row) for row in rows)} |"
            for name, count in counts.items()
        ]
        lines.append("")
    return "\n".join(lines)


# ---- the plot ----

BINS = 10
CURVES: dict[str, tuple[str, Callable[[Row, slice], list[float]]]] = {
    "final answers right": ("#0a7d4b", lambda row, of: list(marks(row, "right")[of])),
    "expert not asked": ("#6d4fc4", lambda row, of: list(1 - marks(row, "asked")[of])),
    "expert's feedback tokens": ("#0369a1", lambda row, of: [1 - saved(row, of.start, of.stop)]),
    "trusted verdicts that differ": (
        "#c2410c",
        lambda row, of: list(1 - marks(row, "agreed")[of][marks(row, "trusted")[of] == 1]),
    ),
}


def plot(path: Path) -> str:
    """Coverage, risk, accuracy and tokens along each arm's runs, all seeds together, as SVG."""
    arms = read_rows(path)
    width = WIDTH - LEFT - 190

    def y(share: float) -> float:
        return TOP + (HEIGHT - 2 * TOP) * (1 - share)

    parts: list[str] = []
    for panel, (arm, rows) in enumerate(arms.items()):
        length, down = len(rows[0]["asked"]), panel * HEIGHT
        panel_parts = [
            f'<text x="{LEFT}" y="20" font-weight="bold">{arm}: shares along {len(rows)} runs of '
            f"{length} episodes (%)</text>"
        ]
        panel_parts += [
            f'<path d="M{LEFT} {y(share / 100):.1f}h{width}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6}" y="{y(share / 100) + 4:.1f}" text-anchor="end">{share}</text>'
            for share in range(0, 101, 20)
        ]
        panel_parts += [
            f'<text x="{LEFT + width * part / 4:.1f}" y="{HEIGHT - 18}" text-anchor="middle">'
            f"{length * part // 4}</text>"
            for part in range(5)
        ]
        for place, (name, (colour, values)) in enumerate(CURVES.items()):
            points = []
            for part in range(BINS):
                of = slice(length * part // BINS, length * (part + 1) // BINS)
                found = np.array([value for row in rows for value in values(row, of)])
                found = found[~np.isnan(found)]
                if len(found):
                    at = LEFT + width * (part + 0.5) / BINS
                    points.append(f"{at:.1f} {y(float(found.mean())):.1f}")
            panel_parts.append(
                f'<path d="M{"L".join(points)}" stroke="{colour}" stroke-width="2" fill="none"/>'
                if points
                else ""
            )
            panel_parts.append(
                f'<text x="{LEFT + width + 12}" y="{TOP + 20 + 20 * place}" fill="{colour}">'
                f"{name}</text>"
            )
        parts.append(f'<g transform="translate(0 {down})">\n' + "\n".join(panel_parts) + "\n</g>")
    height = HEIGHT * len(arms)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" '
        'fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What trust saves, and what comes of it.")
    parser.add_argument("--runs", type=Path, help="where the run directories go")
    parser.add_argument("--arms", default="main", help=f"of {', '.join(ARMS)}, comma-separated")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="comma-separated")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file with the rows")
    parser.add_argument("--table", action="store_true", help="write the table")
    parser.add_argument("--plot", action="store_true", help="write the plot")
    args = parser.parse_args()
    if args.runs:
        done = {(arm, row["seed"]) for arm, rows in read_rows(args.rows).items() for row in rows}
        for seed in map(int, args.seeds.split(",")):
            for arm in args.arms.split(","):
                if (arm, seed) not in done:
                    row = row_of(arm, seed, run_arm(arm, seed, args.runs, (), ARMS[arm]))
                    with args.rows.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    for wanted, path, make in ((args.table, TABLE, table), (args.plot, PLOT, plot)):
        if wanted:
            path.write_text(make(args.rows))
            print(path)


if __name__ == "__main__":
    main()
