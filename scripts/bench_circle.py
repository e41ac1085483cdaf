"""The circle of learning: what the expert had to answer is learned from; is it asked less then?

    python scripts/bench_circle.py --runs DIR    # the short runs of bench_cascade.py; adds rows
    python scripts/bench_circle.py --table       # docs/bench_circle.md, from the rows alone

Of each run DIR/s1, DIR/s2, .. (trained where it is not there): a threshold of the answer's
probability is calibrated on the validation split (`--accuracy 0.85`), and `mlx-fd serve --keep`
answers 200 problems of the train split that the run has not seen. What it passed on is learned by
`mlx-fd loop --problems KEPT --continue RUN`. Both students then answer the same 300 problems of the
test split: at the threshold that the server goes on with, and after a calibration of the new one.
Rows go to docs/bench_circle.jsonl, one for each run.
"""

import argparse
import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from bench_cascade import OPTIONS, answered, of_one_length, outcomes_of, over
from finished_run import finished_run
from rows import Row, add, latest, made, shown

from mlx_fd.evaluation.cascade.choice import ACCURACY, choose
from mlx_fd.evaluation.cascade.outcome import Outcome
from mlx_fd.evaluation.cascade.scores import ANSWER

DOCS = Path(__file__).parents[1] / "docs"
ROWS, TABLE = (DOCS / f"bench_circle.{kind}" for kind in ("jsonl", "md"))
PAIR, PROMISE, TRAFFIC, PARALLEL = "tiny", 0.85, 200, 8


# ---- running ----


def row_of(seed: int, run: Path) -> Row:
    """A turn of the circle."""
    before = {what: answered(run, PAIR, split) for what, split in SPLITS.items()}
    kept = run.with_name(f"{run.name}-kept.jsonl")
    if not kept.exists():
        served(run, kept, threshold_of({"calibration": before["calibration"]}))
    following = run.with_name(f"{run.name}-next")
    finished_run(following, ["--problems", str(kept), "--continue", str(run), "--exam-size", "0"])
    return {
        "seed": seed,
        **made(),
        "episodes": count(run / "episodes.jsonl"),
        "asked": TRAFFIC,
        "kept": count(kept),
        "learned_from": count(following / "episodes.jsonl"),
        "before": before,
        "after": {what: answered(following, PAIR, split) for what, split in SPLITS.items()},
    }


SPLITS = {"calibration": "validation", "held_out": "test"}


def count(file: Path) -> int:
    """Lines of a file."""
    return len(file.read_text(encoding="utf-8").splitlines())


def threshold_of(columns: Row) -> float | None:
    """The threshold that is calibrated on a student's answers; ``None``: all is passed on."""
    return choose(outcomes_of(columns, "calibration"), ANSWER, ACCURACY, PROMISE)["threshold"]


def served(run: Path, kept: Path, threshold: float | None) -> None:
    """Let a server answer problems, and keep what the expert had to answer."""
    from mlx_fd import problems

    seen = {json.loads(line)["id"] for line in (run / "episodes.jsonl").open(encoding="utf-8")}
    drawn = [one for one in problems.load("arithmetic", "train").problems if one.id not in seen]
    command = [sys.executable, "-P", "-m", "mlx_fd", "serve", "--student", str(run)]
    command += ["--expert", PAIR]
    # No answer but a certain one has a score of 1.
    limit = "1" if threshold is None else repr(threshold)
    command += ["--score", "answer", "--threshold", limit, "--port", "0", "--json"]
    partial = kept.with_name(f"{kept.stem}-partial.jsonl")
    partial.unlink(missing_ok=True)
    with subprocess.Popen(
        [*command, "--keep", str(partial)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout is not None
        address = json.loads(server.stdout.readline())["address"]
        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(lambda one: ask(address, one.question), drawn[-TRAFFIC:]))
        server.send_signal(signal.SIGTERM)
    if not partial.exists():
        raise SystemExit(f"{run}: its student passed on nothing, so there is nothing to learn")
    partial.rename(kept)


def ask(address: str, question: str) -> None:
    """Ask the cascade one question."""
    body = {"model": "cascade", "messages": [{"role": "user", "content": question}]}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        reply.read()


# ---- what the rows say ----


def read_rows() -> list[Row]:
    """The rows that are there."""
    return [*latest(ROWS, "seed").values()]


def used(found: Sequence[Outcome], threshold: float | None) -> list[np.ndarray]:
    """Of each problem, whether it is passed on, and whether it is right in the end (1, 0)."""
    passed = np.array([threshold is None or one.score < threshold for one in found])
    student, expert = (
        np.array([getattr(one, who) for one in found]) for who in ("student", "expert")
    )
    return [passed * 1.0, np.where(passed, expert, student) * 1.0, student * 1.0]


WAYS = ("before", "after, the same threshold", "after, calibrated again")


def ways(row: Row) -> dict[str, list[np.ndarray]]:
    """The columns of each way to use a run's students."""
    old = threshold_of(row["before"])
    before, after = (outcomes_of(row[when], "held_out") for when in ("before", "after"))
    uses = (used(before, old), used(after, old), used(after, threshold_of(row["after"])))
    return dict(zip(WAYS, uses, strict=True))


def mean_of(runs: Sequence[np.ndarray], form: str) -> str:
    """The mean of each run's column, with its interval, in per cent."""
    return shown(over([[one] for one in runs], lambda c: float(c.mean())), form)


def table(rows: Sequence[Row]) -> str:
    """docs/bench_circle.md."""
    rows = of_one_length(rows)
    seeds, kept, learned = (
        ", ".join(str(row[key]) for row in rows) for key in ("seed", "kept", "learned_from")
    )
    n, episodes = len(rows[0]["before"]["held_out"]["scores"]), rows[0]["episodes"]
    lines = [
        f"Pair `{PAIR}`, runs of seeds {seeds} after {episodes} episodes each. A server passed on "
        f"{kept} of {rows[0]['asked']} problems (`--accuracy {PROMISE:g}`, calibrated on "
        f"{len(rows[0]['before']['calibration']['scores'])} of the validation split); the student "
        f"learned from {learned} of them. Then {n} problems of the test split, the same for all. "
        "In brackets 95 % intervals over runs and problems (Student's t); changes are paired by "
        "both.",
        "",
        "| | passed on (%) | right (%) | the student alone right (%) |",
        "|---|---|---|---|",
    ]
    found = [ways(row) for row in rows]
    for way in WAYS:
        cells = [mean_of([one[way][place] for one in found], ".1f") for place in range(3)]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    for way in WAYS[1:]:
        changes = [[one[way][k] - one[WAYS[0]][k] for k in range(3)] for one in found]
        cells = [mean_of([one[place] for one in changes], "+.1f") for place in range(3)]
        lines.append(f"| change, {way.partition(', ')[2]} (points) | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    for seed in args.seeds if args.runs else []:
        if (seed,) in latest(ROWS, "seed"):
            continue
        folder = args.runs / f"s{seed}"
        if not (folder / "episodes.jsonl").exists():
            finished_run(folder, ["--preset", PAIR, "--seed", str(seed), *OPTIONS])
        add(ROWS, row_of(seed, folder))
    if args.table:
        TABLE.write_text(table(read_rows()), encoding="utf-8")


if __name__ == "__main__":
    main()
