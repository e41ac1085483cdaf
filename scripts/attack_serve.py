"""1,000 ill requests, and 200 parallel ones, against `mlx-fd serve` on the tiny pair.

The tests send fewer (tests/serve/test_serve.py); these are the same, with more draws:

    python scripts/attack_serve.py
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import serving

_BODY = 65536


def main() -> int:
    """Attack a server; how many faults were found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ill", type=int, default=1000, help="ill requests")
    parser.add_argument("--parallel", type=int, default=200, help="requests at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    run = serving.tiny_run(folder / "run")
    asked = serving.questions(args.parallel)
    options = ("--expert", "tiny", "--queue", str(args.parallel), "--read-timeout", "60")
    with serving.serving(folder, run, *options) as server:
        begin = time.monotonic()
        together = asyncio.run(serving.in_parallel(server, asked))
        seconds = time.monotonic() - begin
        # In another order they stand in other batches.
        again = asyncio.run(serving.in_parallel(server, asked[::-1]))[::-1]
        mixed = sum(a != b for a, b in zip(together, again, strict=True))
        print(
            f"{len(asked)} parallel: {len(set(together))} different replies, {mixed} other in "
            f"another order, {seconds:.1f} s",
            flush=True,
        )
    options = ("--expert", "tiny", "--max-body", str(_BODY), "--read-timeout", "1")
    with serving.serving(folder, run, *options) as server:
        faults: list[str] = []
        statuses: dict[int, int] = {}
        parts = 5
        for part in range(parts):
            outcome = asyncio.run(
                serving.attack(server, args.ill // parts, args.seed * parts + part, _BODY)
            )
            faults += outcome.faults
            for status, count in outcome.statuses.items():
                statuses[status] = statuses.get(status, 0) + count
            memory, files = server.memory() / 2**20, server.files()
            print(
                f"ill {args.ill // parts * (part + 1)}: {memory:.0f} MiB, {files} open files",
                flush=True,
            )
        print(f"statuses (0: closed without a reply) {dict(sorted(statuses.items()))}")
        print("\n".join(faults) or "no faults")
    return len(faults) + int(mixed)


if __name__ == "__main__":
    sys.exit(main())
