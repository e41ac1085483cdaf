"""Is the exported model the same model in another tool? Bundles held against engines."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd import problems
from mlx_fd.errors import UserError
from mlx_fd.export.archive import open_archive
from mlx_fd.export.bundle import Bundle, Item
from mlx_fd.export.bundle_reading import read_bundle
from mlx_fd.export.engines import ENGINES
from mlx_fd.export.engines.address import parse_address, without_secrets
from mlx_fd.files import clear_unfinished, failed_write, working_folder
from mlx_fd.problems import Problem

WEIGHTS = ("auto", "float", "quantized")
_ADDRESS = "openai"
_PROBLEMS = 100

Progress = Callable[[str, int, int], None]
"""Called with the engine and what it opened, prompts and problems done, and their number."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Tolerance:
    """What still counts as the same model.

    Attributes:
        mean_kl: nats, at most.
        top1: share of positions with the same likeliest token, at least; where the reference's two
            likeliest are a near tie, either will do.
    """

    mean_kl: float
    top1: float


# llama.cpp quantises the activations too where the weights are: 0.002 to 0.005 nats on SmolLM2.
TOLERANCES = {"float": Tolerance(1e-3, 0.99), "quantized": Tolerance(1e-2, 0.90)}


@dataclass(frozen=True)
class Job:
    """One engine on one model.

    Attributes:
        engine: its name.
        target: the file, folder or address it opens.
        folder: the export whose bundle it is held against.
        bundle: that bundle.
        name: what the user calls the export, which may be an archive; empty: as its folder.
    """

    engine: str
    target: str
    folder: Path
    bundle: Bundle
    name: str = ""

    @property
    def export(self) -> str:
        """The export, as it may stand in messages and files."""
        return self.name or str(self.folder)

    @property
    def shown(self) -> str:
        """What it opens, likewise: an address without its secrets."""
        if self.engine == _ADDRESS:
            return without_secrets(self.target)
        return _named(self.target, self.folder, self.export)


def _named(text: str, folder: Path, name: str) -> str:
    """A text that speaks of an export by its name, not by where it is unpacked for a while."""
    for path in (folder.resolve(), folder):
        if str(path) != name:
            text = text.replace(str(path), name)
    return text


def _parsed(engine: str) -> tuple[str, str]:
    """An engine's name and, for a server, its address."""
    name, _, address = engine.partition(":")
    if name not in ENGINES:
        near = difflib.get_close_matches(name, ENGINES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"--engine {without_secrets(engine)}: there is mlx, llama.cpp and openai:URL{hint}"
        )
    if name == _ADDRESS and address:
        # Before anything is opened, and before its name gets anywhere.
        parse_address(address)
    if (name == _ADDRESS) != bool(address):
        how = "give its address: --engine openai:URL" if name == _ADDRESS else "it takes no address"
        raise UserError(f"--engine {without_secrets(engine)}: {how}")
    return name, address


def _targets(name: str, address: str, folder: Path) -> list[str]:
    """What an engine can open in an export."""
    if name == _ADDRESS:
        return [address]
    if name == "mlx":
        return [str(folder)] if (folder / "config.json").exists() else []
    return [str(file) for file in sorted(folder.glob("*.gguf"))]


@contextlib.contextmanager
def opened(export: Path) -> Iterator[Path]:
    """An export's folder; that of an archive is unpacked beside it, and removed at the end.

    Errors that come while it is there name the archive.

    Raises:
        UserError: there is nothing of that name, or the archive is not safe to open.
    """
    if export.is_dir():
        yield export
    elif export.is_file():
        clear_unfinished(export.parent)
        with _scratch(export) as scratch:
            folder = open_archive(export, scratch / export.stem)
            try:
                yield folder
            except UserError as error:
                raise UserError(_named(str(error), folder, str(export))) from error
    else:
        raise UserError(f"{export}: there is no such directory or archive")


@contextlib.contextmanager
def _scratch(export: Path) -> Iterator[Path]:
    """A folder beside an archive, to unpack it in."""
    with contextlib.ExitStack() as stack:
        try:
            scratch = stack.enter_context(working_folder(export.parent))
        except OSError as error:
            raise UserError(
                f"{export}: it cannot be unpacked beside itself ({failed_write(error)}); unpack it "
                f"elsewhere (tar -xf {shlex.quote(str(export))} -C DIR) and name its folder there"
            ) from error
        yield scratch


def questions(
    source: str | None,
    limit: int | None,
    *,
    skip_bad_rows: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> Callable[[Job], Sequence[Problem | Item]]:
    """What each job has to answer.

    Args:
        source: problems as :func:`mlx_fd.problems.load` takes them; ``None``: the bundle's.
        limit: the first so many; ``None``: all of the bundle's, 100 of a source.
        skip_bad_rows: leave out rows of the source that cannot be read.
        warn: told how many were left out, and why.

    Raises:
        UserError: the source cannot be read; or, of what is returned, its answers are of another
            kind than those that the export's prompts ask for.
    """
    if source is None:
        return lambda job: job.bundle.items[:limit]
    problem_set = problems.load(source, "test", skip_bad_rows=skip_bad_rows)
    for text in problem_set.notes:
        warn(text)
    chosen = problem_set.problems[: _PROBLEMS if limit is None else limit]

    def asked(job: Job) -> Sequence[Problem | Item]:
        wanted = job.bundle.items[0].kind
        if chosen and chosen[0].kind != wanted:
            raise UserError(
                f"{source}: its answers are of the kind {chosen[0].kind}, but the prompts of "
                f"{job.export} ask for the kind {wanted}; name --problems of that kind, or none"
            )
        return chosen

    return asked


def plan(
    folders: Sequence[Path], engines: Sequence[str], names: Mapping[Path, str] | None = None
) -> list[Job]:
    """Each engine with each export that it can open.

    Args:
        folders: exports, each with a parity bundle.
        engines: as the command line names them; none: all that find something to open.
        names: what folders are called, where that is not their path.

    Raises:
        UserError: a bundle is broken, an engine unknown, or there is nothing for it to open.
    """
    named = [_parsed(engine) for engine in engines] or [
        (name, "") for name in ENGINES if name != _ADDRESS
    ]
    names = names or {}
    bundles = {folder: read_bundle(folder) for folder in dict.fromkeys(folders)}
    jobs = []
    for name, address in named:
        openable = [
            Job(name, target, folder, bundle, names.get(folder, ""))
            for folder, bundle in bundles.items()
            for target in _targets(name, address, folder)
        ]
        if not openable and engines:
            opens = "a .gguf file" if name == "llama.cpp" else "config.json (an mlx or hf export)"
            raise UserError(
                f"--engine {name}: nothing in {', '.join(map(str, folders))} has {opens}"
            )
        jobs.extend(openable)
    opened_by_some = {job.folder for job in jobs}
    for folder in bundles:
        # Of one that is left out nobody would know that it was not compared.
        if folder not in opened_by_some:
            raise UserError(_unopened(folder, names.get(folder, str(folder)), engines))
    return jobs


def _unopened(folder: Path, name: str, engines: Sequence[str]) -> str:
    """Why no engine takes an export."""
    if any(_targets(engine, "", folder) for engine in ENGINES if engine != _ADDRESS):
        return (
            f"{name}: none of --engine {', '.join(map(without_secrets, engines))} opens it; name "
            "one that does, or none"
        )
    return (
        f"{name}: neither config.json nor a .gguf file to open; an adapter alone is no model: "
        "export it fused"
    )


def _as_request(job: Job, problems_to_solve: Sequence[Problem | Item]) -> str:
    return json.dumps(
        {
            "engine": job.engine,
            "target": job.target,
            "folder": str(job.folder),
            "asked": [
                dataclasses.asdict(p.problem if isinstance(p, Item) else p)
                for p in problems_to_solve
            ],
        }
    )


def run(
    job: Job,
    problems_to_solve: Sequence[Problem | Item],
    progress: Progress,
    *,
    debug: bool = False,
) -> dict[str, Any]:
    """Measure an engine, in a process of its own.

    Args:
        job: the engine, the export and its bundle.
        problems_to_solve: the engine answers them greedily; none: no accuracy.
        progress: called with a label, the prompts and problems done, and their number.
        debug: let through what the engine prints on standard error.

    Returns:
        ``{"measures": ...}`` as of :func:`mlx_fd.export.measures.measure`, or ``{"failure": ...}``
        with the reason, also where the engine took its process down.
    """
    label = f"{job.engine} {Path(job.shown).resolve().name}"
    with subprocess.Popen(
        # -P: the current directory may be an export of someone else's, with a numpy.py in it.
        [sys.executable, "-P", "-m", "mlx_fd.export.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if debug else subprocess.DEVNULL,
        encoding="utf-8",
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(_as_request(job, problems_to_solve))
                process.stdin.close()
            for line in process.stdout:
                message: dict[str, Any] = json.loads(line)
                if "failure" in message:
                    return {"failure": _named(message["failure"], job.folder, job.export)}
                if "done" not in message:
                    return message
                progress(label, message["done"], message["total"])
        finally:
            process.kill()
    return {
        "failure": f"{job.engine} ended with status {process.returncode} on {job.shown}; run it "
        "again with --debug to see what it printed"
    }


def _reasons(measures: Mapping[str, Any], tolerance: Tolerance) -> list[str]:
    """Why it is not the same model; empty where it is."""
    reasons = []
    tokens, kl, clear = measures["tokenisation"], measures["kl"], measures["clear"]
    perplexity = measures["perplexity"]
    if tokens["equal"] < tokens["n"]:
        reasons.append(f"{tokens['n'] - tokens['equal']} of {tokens['n']} prompts get other tokens")
    if kl["mean"] is not None and kl["mean"] > tolerance.mean_kl:
        reasons.append(f"mean KL {kl['mean']:.2g} is above {tolerance.mean_kl:g}")
    if kl["mean"] is None and kl["n"]:
        reasons.append("the mean KL is not finite")
    if perplexity["engine"] is None and 0 < perplexity["n"] == perplexity["known"]:
        reasons.append("the perplexity is not finite")
    if clear["agreeing"] < tolerance.top1 * clear["n"]:
        share = clear["agreeing"] / clear["n"]
        reasons.append(f"{share:.1%} of the likeliest tokens agree, not {tolerance.top1:.0%}")
    if not measures["top1"]["n"]:
        reasons.append("nothing could be compared")
    return reasons


def judged(job: Job, outcome: Mapping[str, Any], weights: str = "auto") -> Row:
    """A row of the report.

    Args:
        job: the engine, the export and its bundle.
        outcome: what :func:`run` returned.
        weights: whose tolerances apply; ``"auto"``: as the engine says of the weights, float where
            it does not.
    """
    measures = outcome.get("measures")
    kind = weights
    if kind == "auto":
        kind = "quantized" if measures and measures["quantized"] else "float"
    tolerance = TOLERANCES[kind]
    reasons = _reasons(measures, tolerance) if measures else [outcome["failure"]]
    rounded = job.bundle.source.get("mean_kl")
    if reasons and isinstance(rounded, float) and rounded > tolerance.mean_kl:
        reasons.append(f"its weights were rounded to a mean KL of {rounded:.2g} at the export")
    return {
        "engine": job.engine,
        "target": job.shown,
        "export": job.export,
        "weights": kind,
        "tolerance": {"mean_kl": tolerance.mean_kl, "top1": tolerance.top1},
        "parity": not reasons,
        "reasons": reasons,
        "measures": measures,
    }


def report(jobs: Sequence[Job], rows: Sequence[Row]) -> dict[str, Any]:
    """Everything, as JSON."""
    from mlx_fd.runs.manifest import versions

    bundles = {job.export: job.bundle for job in jobs}
    return {
        "parity": all(row["parity"] for row in rows),
        "rows": list(rows),
        "bundles": {
            folder: {
                "prompts": len(bundle.prompts),
                "positions": sum(prompt.positions for prompt in bundle.prompts),
                "items": len(bundle.items),
                "reference": bundle.reference,
                "versions": bundle.versions,
                "source": bundle.source,
            }
            for folder, bundle in bundles.items()
        },
        "versions": versions(),
    }
