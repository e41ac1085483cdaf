"""Throughput of `mlx-fd serve` with parallel clients, against bare batched generation.

    python scripts/bench_serve.py --student smollm2-135m --prompts 64

Both write the same replies to the same prompts, greedily, side by side in batches of as many as
there are clients: bare in one process with mlx-lm's BatchGenerator, and over HTTP. The rounds
alternate, so that what else the machine does falls on both. Per round: tokens per second of wall
time, and per second of CPU time of the process with the models, which another load changes less.

With ``--stream`` bare generation gets its prompts as the server does, each when another text has
ended, and what first tokens wait for is compared, too: for each request that joins a running batch,
its wait served less its wait bare, each its median over the rounds, in decode steps of bare
generation. The median over requests has an interval that resamples them. It is measured twice: by
the clock, and by the processor seconds of the process with the models, which are what the clock
would show if nothing else ran (and nothing was sent); a busy machine does not give both ways the
same share of its cores. ``engine`` is the mean
wait from when the models' thread is given a text to when its first token is there, by ``/metrics``;
what is left of the mean served wait is HTTP, the prompt's tokens, text held back, and the client.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import re
import resource
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from mlx_fd.evaluation.statistics import bootstrap
from support import serving

Span = tuple[float, float]
"""Seconds by the clock, and processor seconds of the process with the models."""
# What the first token of each prompt waited for.
Waits = dict[int, Span]
_FIRST = ("mlx_fd_first_token_seconds_sum", "mlx_fd_first_token_seconds_count")
# A stream's first event has no text yet.
_SAID = re.compile(rb'"content": "[^"]')


def _bare(student: str, prompts: list[str], size: int, most: int, joining: bool, pipe: Any) -> None:
    """Write the replies once for each message on a pipe.

    Sends tokens, seconds, CPU seconds, the decode steps' median, and by prompt what the first token
    waited for; with ``joining`` prompts come one by one, else all at once.
    """
    from mlx_fd.feedback.judge import open_student
    from mlx_fd.models.generation import messages_prompt

    loaded = open_student(student).student_lm
    tokens = [list(messages_prompt(loaded, [("user", prompt)])) for prompt in prompts]
    while pipe.recv():
        pipe.send(_round(loaded, tokens, size, most, joining))


def _round(
    loaded: Any, tokens: list[list[int]], size: int, most: int, joining: bool
) -> tuple[int, float, float, Span, Waits]:
    from mlx_lm.generate import BatchGenerator

    begin, cpu = time.perf_counter(), _cpu()
    generator = BatchGenerator(
        loaded.model,
        stop_tokens=[[end] for end in loaded.tokenizer.eos_token_ids],
        completion_batch_size=size,
        prefill_batch_size=min(size, 8),
        max_tokens=most,
    )
    left, numbers, written = iter(tokens), itertools.count(), 0
    since: dict[int, tuple[int, Span]] = {}
    waits: Waits = {}
    steps = []

    def now() -> Span:
        return time.perf_counter(), time.process_time()

    def insert(count: int) -> None:
        for uid in generator.insert(list(itertools.islice(left, count))):
            since[uid] = next(numbers), now()

    insert(size if joining else len(tokens))
    while True:
        before = now()
        read, responses = generator.next()
        if not read and not responses:
            break
        if not read:
            steps.append(_between(before, now()))
        for one in responses:
            written += 1
            if one.uid in since:
                number, given = since.pop(one.uid)
                waits[number] = _between(given, now())
        if joining:
            insert(sum(one.finish_reason is not None for one in responses))
    generator.close()
    took, used = time.perf_counter() - begin, _cpu() - cpu
    clock, processor = (statistics.median(column) for column in zip(*steps, strict=True))
    return written, took, used, (clock, processor), waits


def _between(begin: Span, end: Span) -> Span:
    return end[0] - begin[0], end[1] - begin[1]


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _cpu_of(pid: int) -> float:
    # Of those threads that are there; finer than the clock ticks of /proc/PID/stat.
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in threads) / 1e9


async def _clients(
    server: serving.Server, prompts: list[str], size: int, most: int, stream: bool
) -> tuple[int, Waits]:
    """As many clients as ``size``, each with one request at a time; tokens, first tokens' waits."""
    left, total = enumerate(prompts), 0
    waits: Waits = {}

    async def one() -> None:
        nonlocal total
        for number, prompt in left:
            body = {
                "model": "student",
                "max_tokens": most,
                "messages": [{"role": "user", "content": prompt}],
                "mlx_fd": {"verbatim": True},
                "stream": stream,
                **({"stream_options": {"include_usage": True}} if stream else {}),
            }
            data = serving.post("/v1/chat/completions", json.dumps(body).encode())
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            begin = time.perf_counter(), _cpu_of(server.process.pid)
            writer.write(data)
            found, waiting = b"", True
            while chunk := await reader.read(65536):
                found += chunk
                if stream and waiting and _SAID.search(found):
                    now = time.perf_counter(), _cpu_of(server.process.pid)
                    waits[number] = _between(begin, now)
                    waiting = False
            writer.close()
            total += int(found.rpartition(b'"completion_tokens": ')[2].partition(b",")[0])

    await asyncio.gather(*(one() for _ in range(size)))
    return total, waits


def _engine_waits(server: serving.Server) -> tuple[float, float]:
    """Seconds that first tokens have waited for in the models' thread, and of how many texts."""
    url, key = f"http://127.0.0.1:{server.port}/metrics", f"Bearer {serving.KEY}"
    asked = urllib.request.Request(url, headers={"Authorization": key})
    with urllib.request.urlopen(asked, timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    found = [dict(line.rsplit(" ", 1) for line in lines if name in line) for name in _FIRST]
    total, count = (sum(map(float, values.values())) for values in found)
    return total, count


def main() -> None:
    """Run the rounds and print a line of JSON for each, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--student", default="tiny-student")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stream", action="store_true")
    args = parser.parse_args()
    prompts = serving.questions(args.prompts)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    bare = context.Process(
        target=_bare,
        args=(args.student, prompts, args.clients, args.max_tokens, args.stream, there),
        daemon=True,
    )
    bare.start()
    ratios, steps = [], list[Span]()
    bare_waits, waits = list[Waits](), list[Waits]()
    options = ("--batch-size", str(args.clients))
    with serving.serving(Path(tempfile.mkdtemp()), args.student, *options) as server:
        for number in range(args.rounds + 1):
            here.send(True)
            written, seconds, cpu, step, bare_wait = here.recv()
            engine = _engine_waits(server)
            begin, before = time.perf_counter(), _cpu_of(server.process.pid)
            served, wait = asyncio.run(
                _clients(server, prompts, args.clients, args.max_tokens, args.stream)
            )
            took, used = time.perf_counter() - begin, _cpu_of(server.process.pid) - before
            row = {
                "round": number,
                "bare": {
                    "tokens": written,
                    "per_second": written / seconds,
                    "per_cpu": written / cpu,
                },
                "served": {"tokens": served, "per_second": served / took, "per_cpu": served / used},
                "ratio": served / took / (written / seconds),
                "ratio_cpu": served / used / (written / cpu),
                "load": os.getloadavg()[0],
            }
            if args.stream:
                total, count = map(float.__sub__, _engine_waits(server), engine)
                row["first_token_mean_seconds"] = {
                    "bare": statistics.mean(clock for clock, _ in bare_wait.values()),
                    "served": statistics.mean(clock for clock, _ in wait.values()),
                    "engine": total / count,
                    "step": step[0],
                }
            if number:  # the first warms both up
                ratios.append((row["ratio"], row["ratio_cpu"]))
                steps.append(step)
                bare_waits.append(bare_wait)
                waits.append(wait)
                print(json.dumps(row), flush=True)
    here.send(False)
    bare.join()
    for name, values in zip(("wall", "CPU"), zip(*ratios, strict=True), strict=True):
        listed = ", ".join(f"{value:.2f}" for value in values)
        print(f"served / bare by {name} time: {listed} (n {len(values)})")
    if args.stream:
        for index, by in enumerate(("by the clock", "in processor seconds")):
            step = statistics.median(span[index] for span in steps)
            print(by, first_tokens(bare_waits, waits, step, args.clients, index))


def first_tokens(
    bare: list[Waits], served: list[Waits], step: float, clients: int, index: int
) -> str:
    """How much later a served request's first token is than the same one's, written bare.

    Args:
        bare: of each round.
        served: likewise.
        step: a decode step's seconds.
        clients: so many first requests find no running batch, and do not count.
        index: of a span's part, the clock's or the processor's; ``step`` is of it, too.
    """
    asked = sorted(set.intersection(*map(set, (*bare, *served))))[clients:]

    def of(rounds: list[Waits]) -> Any:
        rows = [[waits[number][index] for number in asked] for waits in rounds]
        return np.median(rows, axis=0)

    found = bootstrap([(of(served) - of(bare)) / step], lambda column: float(np.median(column)))
    return (
        f"first token, served after bare: {found.value:+.2f} decode steps of {1000 * step:.1f} ms "
        f"(95 % {found.low:+.2f} to {found.high:+.2f}, n {found.n} requests, {len(bare)} rounds)"
    )


if __name__ == "__main__":
    main()
