"""Which part of the method helps, and by how much: one loop per arm and seed, on the tiny pair.

python scripts/bench_method.py --runs DIR      # every arm, three seeds; goes on where it stopped
python scripts/bench_method.py --arms 'always;gated' --seeds 0 --runs DIR
python scripts/bench_method.py --table         # docs/bench_method.md, from the rows alone
python scripts/bench_method.py --plot          # docs/bench_method.svg, from the rows alone

An arm is a command: `mlx-fd loop --preset tiny`, and the options that the arm stands for. All arms
of a seed see the same problems in the same order, begin with the same student and end with the
same examination. But for the gates, arms that are compared learn from equally many problems in
equally many steps. Rows go to docs/bench_method.jsonl, one for each run, with what the
student made of every question; tables and intervals come from nothing else.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from finished_run import finished_run
from numpy.typing import NDArray
from rows import Row, add, bits, bold, latest, made, of_arms, shown
from several_runs import of_problems, over_runs

from mlx_fd.evaluation.processbench import f1
from mlx_fd.evaluation.statistics import Estimate

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE, PLOT = (DOCS / f"bench_method.{kind}" for kind in ("jsonl", "md", "svg"))
# Those of the preset when the arms were chosen; what an arm says itself comes after them.
SIZES = ("--episodes", "480", "--batch-size", "32")
SHORT = ("--gate", "always", "--episodes", "240")
SEVEN = ("--losses", "lm,hidden,score,logit,answer,reasoning,attention")
# As the table shows them: what a group is about, the arm that its others are held against, and each
# arm's options beside --preset tiny.
GROUPS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "When the student learns": (
        "always",
        {"never": ("--gate", "never"), "always": ("--gate", "always"), "gated": ()},
    ),
    "From which losses": (
        "all four",
        {
            "all four": SHORT,
            "lm alone": (*SHORT, "--losses", "lm"),
            "logit alone": (*SHORT, "--losses", "logit"),
            "hidden alone": (*SHORT, "--losses", "hidden"),
            "score alone": (*SHORT, "--losses", "score"),
            "feedback only": (*SHORT, "--no-solutions"),
        },
    ),
    "With which weights, of all seven losses": (
        "seven, fixed",
        {
            "seven, fixed": (*SHORT, *SEVEN, "--loss-weights", "fixed"),
            "seven, ema": (*SHORT, *SEVEN),
            "seven, phases": (*SHORT, *SEVEN, "--loss-weights", "phases"),
        },
    ),
    "On whose feedback": (
        "logit alone",
        {"on-policy": (*SHORT, "--losses", "logit", "--on-policy-fraction", "1")},
    ),
}
ARMS = {name: options for _, arms in GROUPS.values() for name, options in arms.items()}


# ---- running ----


def run_arm(
    arm: str, seed: int, runs: Path, extra: Sequence[str], options: Sequence[str] | None = None
) -> Path:
    """The run directory of an arm and seed, its run finished.

    Args:
        arm: its name.
        seed: of the run.
        runs: where run directories go.
        extra: further options of ``mlx-fd loop``.
        options: those of the arm; ``None``: as :data:`ARMS` has them.
    """
    folder = runs / f"{arm.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    given = [*((*SIZES, *ARMS[arm]) if options is None else options)]
    return finished_run(folder, ["--preset", "tiny", *given, "--seed", str(seed), *extra])


def row_of(arm: str, seed: int, folder: Path) -> Row:
    """A finished run as one row."""
    summary = json.loads((folder / "summary.json").read_text())
    before, after = (
        json.loads((folder / f"exam_{when}.json").read_text())["results"]
        for when in ("before", "after")
    )

    def of(results: Sequence[Row], name: str) -> str:
        return bits(result[name] for result in results)

    return {
        "arm": arm,
        "seed": seed,
        "options": list(ARMS[arm]),
        **made(),
        "episodes": summary["episodes"],
        "updates": summary["updates"]["steps"],
        "tokens": summary["updates"]["tokens"],
        "distil_seconds": summary["seconds"]["distil"],
        "expert_feedback_tokens": summary["expert_feedback"]["tokens_written"],
        "frozen_after_batch": summary["updates"]["frozen_after_batch"],
        "right_first": summary["accuracy"]["first_answers"]["right"],
        "right_final": summary["accuracy"]["final_answers"]["right"],
        "wrong": of(before, "wrong"),
        "found": [of(before, "found"), of(after, "found")],
        "solved": [of(before, "solved"), of(after, "solved")],
        "readable": [of(before, "readable"), of(after, "readable")],
        "score_error": [[round(result["score_error"], 3) for result in r] for r in (before, after)],
    }


# ---- what the rows say ----


BEFORE, AFTER = 0, 1


def column(row: Row, name: str, when: int | None = None) -> NDArray[np.float64]:
    """One number for each of a run's questions."""
    return np.array([float(value) for value in (row[name] if when is None else row[name][when])])


def quality(rows: Sequence[Row]) -> Estimate:
    """F1 of the first errors after the run, with its interval."""
    return over_runs(
        [of_problems([column(row, "found", AFTER), column(row, "wrong")], f1) for row in rows]
    )[0]


def change(rows: Sequence[Row], name: str, only_wrong: bool = False) -> Estimate:
    """After the run against before it, paired."""
    gains = []
    for row in rows:
        gain = column(row, name, AFTER) - column(row, name, BEFORE)
        gains.append(of_problems([gain[column(row, "wrong") == 1] if only_wrong else gain]))
    return over_runs(gains)[0]


def head_error(rows: Sequence[Row]) -> Estimate:
    """The score head's mean error after the run."""
    return over_runs([of_problems([column(row, "score_error", AFTER)]) for row in rows])[0]


def against(rows: Sequence[Row], others: Sequence[Row]) -> Estimate:
    """The difference of F1 to another arm on the same questions and seeds, paired."""
    reference = {row["seed"]: column(row, "found", AFTER) for row in others}
    differences = [
        of_problems(
            [column(row, "found", AFTER), reference[row["seed"]], column(row, "wrong")],
            lambda a, b, wrong: f1(a, wrong) - f1(b, wrong),
        )
        for row in rows
        if row["seed"] in reference
    ]
    return over_runs(differences)[0]


def table(path: Path) -> str:
    arms = of_arms(path, ARMS)
    some = next(iter(arms.values()))
    lines = [
        f"Tiny pair, seeds {', '.join(str(row['seed']) for row in some)}, "
        f"{len(some[0]['wrong'])} questions a seed, half of the answers wrong. In brackets 95 % "
        "t intervals over runs, each with questions of its own, paired where it is a change or a "
        "difference; bold where they leave 0 out. Tokens are what the student read while it "
        "learned, each step counted; seconds are those of one core, shared with other work.",
    ]
    for title, (reference, names) in GROUPS.items():
        present = [name for name in names if name in arms]
        if not present or reference not in arms:
            continue
        lines += [
            "",
            f"**{title}** ({arms[present[0]][0]['episodes']} episodes)",
            "",
            f"| | first errors found (points) | F1 (%) | F1 against *{reference}* (points) | "
            "problems solved (points) | error of the score head | updates | 1,000 tokens | seconds "
            "| expert's 1,000 tokens of feedback | final answers right |",
            "|---|---|---|---|---|---|--:|--:|--:|--:|--:|",
        ]
        for name in present:
            rows = arms[name]

            def total(key: str, rows: Sequence[Row] = rows) -> float:
                return float(np.mean([row[key] for row in rows]))

            cells = [
                name,
                bold(change(rows, "found", only_wrong=True)),
                shown(quality(rows), ".1f"),
                "" if name == reference else bold(against(rows, arms[reference])),
                bold(change(rows, "solved")),
                shown(head_error(rows), ".2f", 1),
                f"{total('updates'):.0f}",
                f"{total('tokens') / 1000:.0f}",
                f"{total('distil_seconds'):.0f}",
                f"{total('expert_feedback_tokens') / 1000:.1f}",
                f"{total('right_final') / total('episodes'):.1%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


WIDTH, HEIGHT, LEFT, TOP = 640, 380, 60, 40
COLOURS = ("#0a7d4b", "#c2410c", "#6d4fc4", "#777777", "#0369a1")


def written(labels: Sequence[tuple[float, float, str, str]]) -> list[str]:
    """Labels (x, y, text, colour) beside their points, each moved down until it is free."""
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for at, height, text, colour in sorted(labels, key=lambda label: label[1:]):
        left, low = at + 60, height
        width = 6 * len(text)
        while any(
            abs(low - other) < 12 and left < end and begin < left + width
            for begin, end, other in taken
        ):
            low += 3
        taken.append((left, left + width, low))
        parts.append(
            f'<path d="M{at + 5:.1f} {height:.1f}L{left - 3:.1f} {low:.1f}" stroke="{colour}" '
            f'stroke-width="0.5" fill="none"/><text x="{left:.1f}" y="{low + 4:.1f}" '
            f'fill="{colour}" font-size="11">{text}</text>'
        )
    return parts


def plot(path: Path) -> str:
    """F1 with its interval over the tokens learned from, as SVG."""
    arms = of_arms(path, ARMS)
    most = max(float(np.mean([row["tokens"] for row in rows])) for rows in arms.values())
    top = math.ceil(10 * max(quality(rows).high for rows in arms.values())) / 10

    def x(tokens: float) -> float:
        return LEFT + (WIDTH - LEFT - 130) * tokens / most

    def y(value: float) -> float:
        return TOP + (HEIGHT - 2 * TOP) * (1 - value / top)

    parts = [
        f'<text x="{LEFT}" y="20" font-weight="bold">F1 of first errors found, by tokens that the '
        "student learned from (thousands)</text>"
    ]
    for step in range(round(top * 10) + 1):
        height = y(step / 10)
        parts.append(
            f'<path d="M{LEFT} {height:.1f}H{WIDTH - 20}" stroke="#ddd"/><text x="{LEFT - 6}" '
            f'y="{height + 4:.1f}" text-anchor="end">{step / 10:.1f}</text>'
        )
    for tokens in range(0, int(most) + 1, 100_000):
        parts.append(
            f'<text x="{x(tokens):.1f}" y="{HEIGHT - 18}" text-anchor="middle">'
            f"{tokens // 1000}</text>"
        )
    labels = []
    for colour, (_, names) in zip(COLOURS, GROUPS.values(), strict=False):
        # Arms of a group have the same tokens: side by side, or they would hide each other.
        for place, name in enumerate(name for name in names if name in arms):
            rows = arms[name]
            seen = quality(rows)
            at = x(float(np.mean([row["tokens"] for row in rows]))) + 9 * place
            parts.append(
                f'<path d="M{at:.1f} {y(seen.low):.1f}V{y(seen.high):.1f}" stroke="{colour}"/>'
                f'<circle cx="{at:.1f}" cy="{y(seen.value):.1f}" r="4" fill="{colour}"/>'
            )
            labels.append((at, y(seen.value), name, colour))
    parts += written(labels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" '
        'fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    # Options that are passed on must not be taken for shortened ones of this script.
    parser = argparse.ArgumentParser(
        description="Ablation of the method on the tiny pair.", allow_abbrev=False
    )
    parser.add_argument("--runs", type=Path, help="where the run directories go")
    parser.add_argument("--arms", default=";".join(ARMS), help="separated by ;")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file with the rows")
    parser.add_argument("--table", action="store_true", help="write the table")
    parser.add_argument("--plot", action="store_true", help="write the plot")
    args, extra = parser.parse_known_args()
    if extra and (not args.runs or args.rows == ROWS):
        parser.error(f"{' '.join(extra)}: options of mlx-fd loop go with --runs and other --rows")
    arms = [name.strip() for name in args.arms.split(";")]
    if unknown := [name for name in arms if name not in ARMS]:
        parser.error(f"there is no arm {unknown[0]!r}; there are: {', '.join(ARMS)}")
    if not (args.runs or args.table or args.plot):
        parser.error("say where the run directories go: --runs DIR (or --table, --plot)")
    if args.runs:
        done = latest(args.rows, "arm", "seed")
        # Seed by seed, so that a part of the work is a whole comparison.
        for seed in map(int, args.seeds.split(",")):
            for arm in arms:
                if (arm, seed) not in done:
                    folder = run_arm(arm, seed, args.runs, extra)
                    add(args.rows, row_of(arm, seed, folder))
    for wanted, path, make in ((args.table, TABLE, table), (args.plot, PLOT, plot)):
        if wanted:
            path.write_text(make(args.rows))
            print(path)


if __name__ == "__main__":
    main()
