"""Episodes a minute of one process against several that make one run.

python scripts/bench_ranks.py                          # SmolLM2, one process and two, by turns
python scripts/bench_ranks.py --rounds 3 --ranks 4 -- --expert tiny --episodes 64

What follows -- are options of `mlx-fd loop`. Each process has one BLAS thread. A run's batches are
timed, not its start and its probe set; the first batch is left out. Where other work is on the
machine, wall time says little, so that CPU time is counted as well: between two exchanges all ranks
wait for the one that has the most to do, and the sum of what that one takes is what a machine with
a free core for each rank would need, but for the exchanges themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SMOLLM2 = (
    *("--expert", "smollm2-135m", "--student", "smollm2-135m:layers=15", "--preset", "quick"),
    *("--episodes", "16", "--batch-size", "8", "--probe-size", "2", "--max-answer-tokens", "64"),
)


def record(file: Path, arguments: list[str]) -> None:
    """Be ``mlx-fd`` in one process, and write down what its batches took."""
    import mlx_fd.models.ranks
    import mlx_fd.training.loop
    from mlx_fd.cli import main

    # Any: functions of theirs are put in others' place.
    ranks: Any = mlx_fd.models.ranks
    loop: Any = mlx_fd.training.loop

    batches: list[dict[str, Any]] = []
    marks: list[float] = []
    exchange, add, run_batch = ranks._exchange, ranks.add_gradients, loop.run_batch

    def marked(call: Any) -> Any:
        def wrapper(argument: Any) -> Any:
            marks.append(time.process_time())
            made = call(argument)
            # What the exchange itself takes is no rank's own work.
            marks.append(time.process_time())
            return made

        return wrapper

    def timed(*arguments: Any) -> Any:
        wall, begin = time.perf_counter(), time.process_time()
        marks.clear()
        made = run_batch(*arguments)
        points = [begin, *marks, time.process_time()]
        own = [after - before for before, after in zip(points[::2], points[1::2], strict=True)]
        batches.append({"wall": time.perf_counter() - wall, "own": own})
        return made

    loop.run_batch = timed
    if ranks.launched():
        ranks._exchange, ranks.add_gradients = marked(exchange), marked(add)
    sys.argv = ["mlx-fd", "loop", *arguments, "--quiet"]
    try:
        main()
    finally:
        file.write_text(json.dumps(batches))


def run(count: int, options: list[str]) -> dict[str, float]:
    """Episodes a minute of a run: by the wall, and by the CPU that is waited for."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        env.pop("MLX_RANK", None)
        sockets = [socket.socket() for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        hosts = folder / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]))
        for one in sockets:
            one.close()
        processes = []
        for rank in range(count):
            if count > 1:
                env |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            record_to = folder / f"{rank}.json"
            words = [__file__, "--record", str(record_to), "--", *options, "--out", f"{name}/run"]
            processes.append(
                subprocess.Popen([sys.executable, *words], env=env, stdout=subprocess.DEVNULL)
            )
        if any(list(map(subprocess.Popen.wait, processes))):
            raise SystemExit("a run failed")
        of_ranks = [json.loads((folder / f"{rank}.json").read_text())[1:] for rank in range(count)]
        episodes = len((folder / "run" / "episodes.jsonl").read_text().splitlines())
    paths = [
        sum(max(parts) for parts in zip(*(batch["own"] for batch in same), strict=True))
        for same in zip(*of_ranks, strict=True)
    ]
    done = episodes * len(paths) / (len(paths) + 1)
    return {
        "wall": 60 * done / sum(batch["wall"] for batch in of_ranks[0]),
        "cpu": 60 * done / sum(paths),
        "exchanges": float(len(of_ranks[0][-1]["own"]) - 1),
        "evenness": sum(sum(map(sum, (b["own"] for b in of))) for of in of_ranks)
        / (count * sum(paths)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--record", type=Path)
    parser.add_argument("options", nargs="*")
    given = parser.parse_args()
    if given.record:
        record(given.record, given.options)
        return
    options = given.options or list(SMOLLM2)
    found: dict[int, list[dict[str, float]]] = {1: [], given.ranks: []}
    for round_number in range(given.rounds):
        for count, rows in found.items():
            rows.append(run(count, options))
            print(f"round {round_number + 1}, {count} processes: {rows[-1]}", flush=True)
    for name in ("wall", "cpu"):
        ratios = [two[name] / one[name] for one, two in zip(*found.values(), strict=True)]
        print(f"{name}: {given.ranks} processes make {statistics.median(ratios):.2f} times the")
        print(f"  episodes a minute of one ({', '.join(f'{r:.2f}' for r in ratios)})")


if __name__ == "__main__":
    main()
