"""Several processes that make one run together, started by ``mlx.launch`` on MLX's own runtime.

Each process is a rank. All of them go through the same lines: each takes its :func:`share` of a
batch, and what it made of it is :func:`gather`-ed, so that every rank decides from the same rows
and holds the same weights. Where the process is alone, all of this gives back what it is given.

Every function that exchanges something must be called by all ranks, in the same order.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from mlx_fd.errors import UserError

Item = TypeVar("Item")
Row = TypeVar("Row")
Made = TypeVar("Made")

# Bytes of a large message that are sent at once.
_PIECE = 1 << 26
# Where mlx.launch (for NCCL), Open MPI, MPICH and Intel MPI say how many processes they started.
_SIZES = ("MLX_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
# What MLX's errors begin with that are of an exchange.
_EXCHANGES = ("[ring]", "[mpi]", "[nccl]", "[jaccl]")


class RankLost(UserError):
    """Another rank has ended, or cannot be reached any more."""


@dataclass
class _Here:
    """This process among the others; changed by :func:`join` and :func:`share_batches` alone."""

    group: Any = None
    rank: int = 0
    processes: int = 1
    shares: bool = True


_here = _Here()


def launched() -> bool:
    """Whether something like ``mlx.launch`` started this process as one of several."""
    environment = os.environ
    if sizes := [environment[name] for name in _SIZES if environment.get(name)]:
        return any(size != "1" for size in sizes)
    hosts = environment.get("MLX_HOSTFILE")
    # With -n 1 the file is there, and empty.
    alone = hosts is not None and not Path(hosts).read_text(encoding="utf-8").strip()
    return bool(environment.get("MLX_RANK")) and not alone


def join() -> None:
    """Meet the other processes, where there are any.

    Raises:
        UserError: they cannot be reached.
    """
    if not launched() or _here.group is not None:
        return
    from mlx_fd.models.backend import backend

    backend()
    import mlx.core as mx

    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the other processes of this run cannot be reached ({error}); see that each address "
            "of the hostfile is this cluster's, and that its port is free"
        ) from error
    if group.size() == 1:
        # Each of them would do all of the run.
        raise UserError(
            "several processes were started, and MLX here has no backend that connects them: see "
            "that it has the one that was named (mlx.launch --backend), and MPI its library"
        )
    _here.group, _here.rank, _here.processes = group, group.rank(), group.size()


def share_batches(shares: bool) -> None:
    """Whether each rank does its share of a batch, or every one all: the expert is divided."""
    _here.shares = shares


def rank() -> int:
    """This process's number, from 0."""
    return _here.rank


def processes() -> int:
    """How many processes make the run."""
    return _here.processes


def size() -> int:
    """How many ranks a batch is divided among."""
    return _here.processes if _here.shares else 1


def index() -> int:
    """Which of :func:`size` shares is this rank's."""
    return _here.rank if _here.shares else 0


def first() -> bool:
    """Whether this is the rank that writes the run directory and shows the run."""
    return _here.rank == 0


def group() -> Any:
    """MLX's group of all ranks; ``None`` where the process is alone."""
    return _here.group


def stream() -> Any:
    """The stream on which a model is to write; ``None``: where mlx-lm has its models write.

    The generator has one token more computed than it gives. On a stream of its own that goes on
    while the next thing is exchanged, and a model that is divided exchanges, too: two streams would
    read from the same sockets, each what is meant for the other.
    """
    if _here.group is None:
        return None
    import mlx.core as mx

    return mx.default_stream(mx.default_device())


def command(text: str) -> str:
    """A command that is to be run by as many processes as this one."""
    return text if _here.processes == 1 else f"mlx.launch -n {_here.processes} {text}"


def step_name(step: str) -> str:
    """A step's name for its draws: ranks must not draw the same numbers."""
    return f"{step} of rank {index()}" if index() else step


def part(count: int) -> range:
    """The places of this rank's share among ``count`` items: whole, in order, as even as can be."""
    begin, end = (count * one // size() for one in (index(), index() + 1))
    return range(begin, end)


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This rank's share of some items: those at :func:`part`."""
    mine = part(len(items))
    return items[mine.start : mine.stop]


def deal(costs: Sequence[int]) -> list[int]:
    """The places of this rank's items where each has a cost: dealt out, so that sums are even.

    Args:
        costs: of all items, in any unit.
    """
    dearest_last = sorted(range(len(costs)), key=lambda place: costs[place])
    return sorted(dearest_last[index() :: size()])


def gather(rows: Sequence[Row]) -> list[Row]:
    """The rows of all ranks, rank 0's first.

    Args:
        rows: this rank's, of what JSON can hold; floats come back bit for bit.
    """
    if size() == 1:
        return list(rows)
    return [row for text in _all_bytes(json.dumps(list(rows)).encode()) for row in json.loads(text)]


def gather_arrays(arrays: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Named arrays of all ranks, in the order of :func:`gather`.

    Args:
        arrays: for each of this rank's rows its arrays, by their names.
    """
    if size() == 1:
        return [dict(one) for one in arrays]
    import mlx.core as mx

    named = {
        f"{place}/{name}": array for place, of in enumerate(arrays) for name, array in of.items()
    }
    own = io.BytesIO()
    mx.save_safetensors(own, named)
    found: list[dict[str, Any]] = []
    for count, content in zip(gather([len(arrays)]), _all_bytes(own.getvalue()), strict=True):
        of_rank: list[dict[str, Any]] = [{} for _ in range(count)]
        loaded: Any = mx.load(io.BytesIO(content), format="safetensors")
        for name, array in loaded.items():
            place, _, what = name.partition("/")
            of_rank[int(place)][what] = array
        found += of_rank
    mx.eval(found)
    return found


def add(values: Mapping[str, float]) -> dict[str, float]:
    """Named numbers, each summed over all ranks."""
    rows = gather([dict(values)])
    return {name: math.fsum(row[name] for row in rows) for name in values}


def add_gradients(gradients: Any) -> Any:
    """Gradients, a tree of arrays, summed over all ranks; the sums are the same bits on each."""
    if size() == 1:
        return gradients
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_map

    count = size()
    means = nn.average_gradients(gradients, _here.group)
    try:
        mx.eval(means)
    except RuntimeError as error:
        raise lost(error) from error
    return tree_map(lambda mean: mean * count, means)


def any_of(flag: bool) -> bool:
    """Whether it is so on any rank."""
    return flag if _here.processes == 1 else b"1" in _all_bytes(b"1" if flag else b"0")


def check_same(digest: Callable[[], str], what: str) -> None:
    """Make sure that something is the same on all ranks.

    Args:
        digest: makes this rank's; called where there are several.
        what: its name, for the message.

    Raises:
        UserError: it is not; on rank 0.
        SystemExit: likewise, on the others.
    """
    if _here.processes == 1:
        return
    digests = [text.decode() for text in _all_bytes(digest().encode())]
    other = next((place for place, one in enumerate(digests) if one != digests[0]), None)
    if other is not None:
        _end(f"{what} not the same on rank {other} as on rank 0")


def from_first(make: Callable[[], bytes]) -> bytes:
    """What rank 0 makes, on all ranks.

    Args:
        make: called on rank 0 alone.
    """
    if _here.processes == 1:
        return make()
    import mlx.core as mx
    import numpy as np

    content = make() if first() else b""
    length = int(_exchange(lambda: mx.distributed.all_sum(mx.array([len(content)], mx.int64)))[0])
    whole = bytearray()
    for begin in range(0, length, _PIECE):
        size = min(_PIECE, length - begin)
        piece = np.zeros(size, np.uint8)
        if first():
            piece[:] = np.frombuffer(content[begin : begin + size], np.uint8)
        whole += _exchange(partial(mx.distributed.all_sum, mx.array(piece))).tobytes()
    return bytes(whole)


def together(work: Callable[[], Made]) -> Made:
    """Do something on all ranks that a user may have to mend: what is wrong is said once.

    Args:
        work: exchanges nothing itself.

    Raises:
        UserError: it failed on some rank; on rank 0, with the first failing rank's message.
        SystemExit: likewise, on the others.
    """
    if _here.processes == 1:
        return work()
    made: Made | None = None
    failed = ""
    try:
        made = work()
    except UserError as error:
        failed = str(error)
    texts = [text.decode() for text in _all_bytes(failed.encode())]
    for place, text in enumerate(texts):
        if text:
            _end(f"on rank {place}: {text}" if place else text)
    return made  # type: ignore[return-value]


def _end(text: str) -> NoReturn:
    """End all ranks, which know of it, with a message that is printed once."""
    if first():
        raise UserError(text)
    raise SystemExit(2)


def _all_bytes(own: bytes) -> list[bytes]:
    """The bytes of each rank."""
    import mlx.core as mx
    import numpy as np

    lengths = _exchange(lambda: mx.distributed.all_gather(mx.array([len(own)], mx.int64)))
    if not lengths.max():
        return [b""] * len(lengths)
    padded = np.zeros((1, int(lengths.max())), np.uint8)
    padded[0, : len(own)] = np.frombuffer(own, np.uint8)
    rows = _exchange(lambda: mx.distributed.all_gather(mx.array(padded)))
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def _exchange(work: Callable[[], Any]) -> Any:
    """What an exchange gives, as a NumPy array.

    Raises:
        RankLost: it failed.
    """
    import mlx.core as mx
    import numpy as np

    array = work()
    try:
        # mx.eval raises where a rank is lost. Converting the array alone does not, and gives
        # anything (docs/log.md).
        mx.eval(array)
    except RuntimeError as error:
        raise lost(error) from error
    return np.array(array)


def lost(error: RuntimeError) -> RankLost:
    """What the user is told where an exchange failed."""
    return RankLost(f"another process of this run has ended or cannot be reached ({error})")


def is_lost(error: RuntimeError) -> bool:
    """Whether an error of MLX is one of an exchange: a model on several ranks has them, too."""
    return _here.processes > 1 and str(error).startswith(_EXCHANGES)
