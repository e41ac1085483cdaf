"""Attacks on a run's files and on everything that comes from outside; each prints one figure.

python scripts/attack.py kills --kind loop --count 30          # killed once, gone on with, compared
python scripts/attack.py kills --kind self-distill --chain     # killed again and again until done
python scripts/attack.py disk --kind loop --count 500          # the n-th call on the disk fails
python scripts/attack.py texts --count 300000                  # what a model may say
python scripts/attack.py archives --count 5000
python scripts/attack.py bundles --count 5000
python scripts/attack.py configs --count 5000
python scripts/attack.py problems --count 5000
python scripts/attack.py models --count 200

Each takes --seed and --count; the same seed attacks the same way, but for the moment of a kill,
which is a share of the time that the whole run took here. An attack that gets through ends with an
assertion that shows what it was, and its status is 1. They take minutes to an hour and are no part
of scripts/test.sh, whose tests have a few of each. Runs are of a pair of tiny random models, in
processes forked from this one so that the packages are imported once; they need no network.
"""

# ruff: noqa: RUF001 - look-alike characters are what some attacks are made of
import builtins
import collections
import contextlib
import copy
import errno
import functools
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # sums are bit-repeatable
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import click

from mlx_fd.errors import UserError
from mlx_fd.problems import Problem, parsing
from mlx_fd.problems.kinds import KINDS, read_final

_MICRO = {
    "episodes": 4,
    "batch_size": 1,
    "max_answer_tokens": 6,
    "max_feedback_tokens": 6,
    "max_merge_tokens": 4,
    "probe_size": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 2,
    "lora_rank": 2,
    "lora_rate": 1e-2,
}
_KINDS = {
    "loop": {"epochs": 2, "teacher_top_k": 4, "gate": "always", "exam_size": 0, "kd_steps": 1},
    "self-distill": {"num_generations": 2},
}
_SECONDS, _BYTES = 120, 400 << 20  # bounds of one hostile file, on a slow and busy machine
_attack = [
    click.option("--seed", default=0, show_default=True),
    click.option("--count", type=click.IntRange(1), required=True, help="How many."),
]


def _attacks(function):
    for option in reversed(_attack):
        function = option(function)
    return function


@click.group()
def cli():
    """Try to break mlx-fd."""


@contextlib.contextmanager
def _arena():
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _progress(name, done, count):
    click.echo(f"{name}: {done} of {count}", err=True)


def _figure(name, begin, **found):
    counts = ", ".join(f"{value} {key.replace('_', ' ')}" for key, value in found.items())
    click.echo(f"{name}: {counts}; {time.monotonic() - begin:.0f} s")


# ------------------------------------------------------------------------------- runs in processes


def _import_all():
    """Import what a run needs, so that forked processes begin at once; compute nothing."""
    import mlx_fd.cli.terminal.run
    import mlx_fd.cli.terminal.self_distillation
    import mlx_fd.evaluation.exam
    import mlx_fd.feedback.pair
    import mlx_fd.training.loop
    import mlx_fd.training.selfdistill.training  # noqa: F401
    import training.test_damage  # noqa: F401
    from support import pairs  # noqa: F401


def _fork(function, log):
    """Call a function in a process of its own, whose output goes to a file; its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(out, 1)
        os.dup2(out, 2)
        function()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _wait(pid, seconds=None):
    """The exit status of a process, which is killed after so many seconds (then -9)."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, 0 if end is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            os.kill(pid, signal.SIGKILL)
            end = None
        else:
            time.sleep(0.002)


class _Runs:
    """Micro runs of one kind, and what an undisturbed one comes to."""

    def __init__(self, folder, kind, **changes):
        _import_all()
        self.folder, self.log, self.kind = folder, folder / "log", kind
        os.environ["MLX_FD_CACHE"] = str(folder / "cache")
        from support.pairs import make_dirs

        assert _wait(_fork(lambda: make_dirs(folder), self.log)) == 0, self.said()
        rows = [{"question": f"What is {n} + 1?", "answer": n + 1} for n in range(40)]
        questions = folder / "questions.jsonl"
        questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {**_MICRO, **_KINDS[kind], "problems": questions, **changes}
        if kind == "self-distill":
            given.pop("max_merge_tokens")
        options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        models = {
            "loop": ("loop", f"--expert={folder / 'expert'}", f"--student={folder / 'student'}"),
            "self-distill": ("self-distill", "--method=sdpo", f"--model={folder / 'student'}"),
        }
        self.begin = (*models[kind], *options, "--quiet")
        begin = time.monotonic()
        assert self.run(folder / "whole") == 0, self.said()
        self.seconds = time.monotonic() - begin
        self.whole = self.outcome(folder / "whole")

    def said(self):
        return self.log.read_text(errors="replace")

    def start(self, target, before=lambda: None):
        """Begin a run, or go on with it; the id of its process."""
        from mlx_fd import cli, runs

        go_on = ("resume", str(target), "--quiet")
        command = go_on if runs.is_run(target) else (*self.begin, f"--out={target}")

        def call():
            before()
            sys.argv = ["mlx-fd", *command]
            cli.main()

        return _fork(call, self.log)

    def run(self, target, seconds=None):
        return _wait(self.start(target), seconds)

    def outcome(self, target):
        """A digest of each thing that came of a run, but for how long it took."""
        found = self.folder / "outcome.json"

        def write():
            from training.test_damage import outcome

            digests = {
                name: hashlib.sha256(repr(value).encode()).hexdigest()
                for name, value in outcome(target).items()
            }
            found.write_text(json.dumps(digests))

        assert _wait(_fork(write, self.log)) == 0, self.said()
        return json.loads(found.read_text())

    def check_whole(self, target):
        """Go on with a run to its end, and hold it against the undisturbed one."""
        from mlx_fd import runs

        if not (target / runs.SUMMARY).exists():
            assert self.run(target) == 0, self.said()
            left = [p for p in target.rglob(".tmp-*") if runs.CUT not in p.parts]
            assert not left, left
        found = self.outcome(target)
        differ = [n for n in {*found, *self.whole} if found.get(n) != self.whole.get(n)]
        assert not differ, (str(target), differ)
        shutil.rmtree(target)


@cli.command()
@_attacks
@click.option("--kind", type=click.Choice(list(_KINDS)), required=True)
@click.option("--chain", is_flag=True, help="Kill what goes on, too, until a run gets through.")
def kills(seed, count, kind, chain):
    """Kill runs at random moments, go on with them, and compare every row and weight."""
    begin, draw = time.monotonic(), random.Random(seed)
    killed = whole = 0
    with _arena() as folder:
        runs = _Runs(folder, kind, exam_size=2) if kind == "loop" else _Runs(folder, kind)
        target = folder / "killed"
        while killed < count:
            share = draw.uniform(0.0, 1.0 if not chain else 0.6)
            status = runs.run(target, share * runs.seconds)
            assert status in (0, -signal.SIGKILL), runs.said()
            killed += status == -signal.SIGKILL
            if status == 0 or not chain:
                runs.check_whole(target)
                whole += 1
            _progress("kills", killed, count)
        if target.exists():
            runs.check_whole(target)
            whole += 1
    kinds = f"kills of {kind}" + (", in chains" if chain else "")
    _figure(kinds, begin, kills=killed, runs_bit_equal_to_the_undisturbed_one=whole)


# ------------------------------------------------------------------------------------------- disks

_ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
_CALLS = ("open", "fsync", "replace", "rename", "mkdir", "symlink", "ftruncate", "write")


class _Disk:
    """Counts this process's calls on the files of a folder, and lets one or more of them fail."""

    def __init__(self, folder, at, code, *, stays, note):
        self.folder, self.at, self.code, self.stays, self.note = str(folder), at, code, stays, note
        self.count = 0
        self.seen = collections.Counter()

    def call(self, name, *places):
        """Count a call; true where it is to fail."""
        for place in places:
            path = place
            if isinstance(place, int):
                with contextlib.suppress(OSError):
                    path = Path(f"/proc/self/fd/{place}").readlink()
            if str(path).startswith(self.folder):
                break
        else:
            return False
        self.count += 1
        self.seen[name] += 1
        hit = self.count == self.at or (self.stays and self.count > self.at)
        if self.count == self.at:
            self.note.write_text(f"{name} {path}")
        return hit

    def error(self, path=None):
        return OSError(self.code, os.strerror(self.code), None if path is None else str(path))

    def install(self):
        """Put it between this process and its disk."""
        import mlx.core as mx

        disk = self

        def wrapped(name, true):
            def call(*given, **named):
                if disk.call(name, *given[:2]):
                    raise disk.error(None if isinstance(given[0], int) else given[0])
                return true(*given, **named)

            return call

        for name in _CALLS:
            setattr(os, name, wrapped(name, getattr(os, name)))

        class Writer(io.BufferedWriter):
            def write(self, data):
                if disk.call("write", self.fileno()):
                    # What a full disk does: some of it is there.
                    super().write(bytes(data)[: len(data) // 2])
                    super().flush()
                    raise disk.error()
                return super().write(data)

        true_fdopen, true_open, true_save = os.fdopen, io.open, mx.save_safetensors

        def fdopen(descriptor, mode="r", *given, **named):
            if mode in ("wb", "ab") and not given and not named:
                return Writer(io.FileIO(descriptor, mode))
            return true_fdopen(descriptor, mode, *given, **named)

        def opened(path, mode="r", *given, **named):
            if isinstance(path, str | Path) and disk.call("open", path):
                raise disk.error(path)
            if mode in ("wb", "ab", "xb"):
                return Writer(io.FileIO(path, mode))
            return true_open(path, mode, *given, **named)

        def save(path, *given, **named):
            true_save(path, *given, **named)
            if disk.call("save_safetensors", path):
                os.truncate(path, Path(path).stat().st_size // 2)
                raise RuntimeError("[write] Unable to write to file: " + os.strerror(disk.code))

        os.fdopen, io.open, builtins.open = fdopen, opened, opened
        mx.save_safetensors = save


@cli.command()
@_attacks
@click.option("--kind", type=click.Choice(list(_KINDS)), required=True)
@click.option("--chain", default=6, show_default=True, help="Errors in a row before going on.")
def disk(seed, count, kind, chain):
    """Let the n-th call on a run's files fail, for n = 1, 2, ... and in what goes on after that."""
    begin, draw = time.monotonic(), random.Random(seed)
    injected = refused = whole = 0
    with _arena() as folder:
        runs = _Runs(folder, kind)
        target, note = folder / "disk", folder / "note"

        def attacked(at, code, *, stays):
            note.unlink(missing_ok=True)
            hit = _Disk(target, at, code, stays=stays, note=note)

            status = _wait(runs.start(target, hit.install), 60 + 20 * runs.seconds)
            said = runs.said()
            where = f"{note.read_text() if note.exists() else None}, {at}, {code}, {stays}"
            assert status in (0, 2), (where, status, said)
            assert "Traceback" not in said and "This is a bug" not in said, (where, said)
            return note.exists(), status

        at = 1
        while injected < count:
            hit, status = attacked(at, draw.choice(_ERRORS), stays=draw.random() < 0.3)
            at = at + 1 if hit else 1  # after the last call of a run, from its first again
            injected, refused = injected + hit, refused + (hit and status == 2)
            for _ in range(chain - 1):
                place = min(int(draw.expovariate(1 / 60)) + 1, 2000)
                hit, status = attacked(place, draw.choice(_ERRORS), stays=draw.random() < 0.3)
                injected, refused = injected + hit, refused + (hit and status == 2)
            runs.check_whole(target)
            whole += 1
            _progress("disk errors", injected, count)
    _figure(
        f"disk errors in {kind}",
        begin,
        injected=injected,
        ended_in_a_sentence=refused,
        runs_bit_equal_to_the_undisturbed_one=whole,
    )


# ------------------------------------------------------------------------------------------- texts

_PIECES = (
    *("score", "Score:", "**Score**: ", "Rating =", "Grade", "overall", "Verdict:", "/10", "/ 5"),
    *("out of ", "-0.5", "+1", "1.0", "1e9", "1e-400", "9" * 61, "0" * 40, ".", ",", "-", "−", "–"),
    *(
        "####",
        "#### ",
        "＃＃＃＃",
        "\\boxed{",
        "\\frac{1}{",
        "\\dfrac12",
        "}",
        "{",
        "$",
        "\\$",
        "%",
    ),
    *("<think>", "</think>", "<|im_end|>", "The answer is", "I give", "I rate this", "==", ">>"),
    *('{"score": ', '"feedback": "', '"}', "```json\n", "```", "null", "NaN", "Infinity", "true"),
    *("1,234", "1.234,5", "1 234", "1\u202f234", "½", "⅓", "٣", "３", "²", "𝟗", "१", "三", "Ⅷ"),
    *("1/0", "0/0", "3/4", "1 1/2", "1:30", "10^3", "10**9", "× 10^5", "2e5", "E", "i", "\\times"),
    *("\n", "\n\n", "\r\n", "\t", " ", "\x00", "\x1b[31m", "\u2028", "\u200b", "\ufeff", "\ud800"),
    *(
        "\udfff",
        "\U0010ffff",
        "e\u0301",
        "\u202e",
        "ß",
        "İ",
        "ſ",
        "K",
        "a",
        "Z",
        "_",
        "*",
        "`",
        "|",
    ),
    *("because step 2", "wrong", "correct", "no errors", "is", "was", "of", "be", "a", "to", "("),
    *(")", "[", "]", "<<", "&", ";", ":", "'", '"', "\\", "/", "..", "!", "?", "~", "@", "\u066b"),
)


def _text(draw):
    """A text that a model might write, or somebody who wants to do harm."""
    form = draw.random()
    if form < 0.02:
        unit = "".join(draw.choices(_PIECES, k=draw.randint(1, 4)))
        return "".join(draw.choices(_PIECES, k=3)) + unit * draw.randint(1, 2000)
    if form < 0.1:
        codes = (draw.choice((draw.randrange(128), draw.randrange(0x3000))) for _ in range(60))
        return "".join(map(chr, codes))
    return "".join(draw.choices(_PIECES, k=draw.randint(0, 24)))


def _read_text(text, gold):
    feedback = parsing.parse_feedback(text)
    assert feedback.written_score is None or -1 <= feedback.written_score <= 1
    assert isinstance(feedback.text, str)
    parsing.needs_merge(feedback, parsing.parse_feedback(gold))
    for how in ("auto", "strict", "flexible"):
        value = parsing.final_answer(text, how)
        assert value is None or (isinstance(value, Fraction) and len(str(value)) < 300)
    for kind in KINDS:
        final = read_final(text, Problem("p", "?", "", "", kind, ("a cat", "a dog")))
        assert final is None or final == final.strip() != ""
    value = parsing.number(text)
    assert value is None or isinstance(value, Fraction)
    for name in ("strict", "flexible"):
        assert isinstance(parsing.lm_eval_answer(text, name), str)
        parsing.lm_eval_match(text, gold, name)


@cli.command()
@_attacks
def texts(seed, count):
    """Read made-up texts through every reader of a model's text."""
    begin, draw = time.monotonic(), random.Random(seed)
    slowest, chars, gold = 0.0, 0, ""
    for number in range(count):
        text = _text(draw)
        if number % 5000 == 0:
            text = (text or "7") * (1 + 200_000 // max(len(text), 1))
        before = time.process_time()
        try:
            _read_text(text, gold)
        except Exception as error:
            raise AssertionError(repr(text[:500])) from error
        spent = time.process_time() - before
        assert spent < 0.5 + len(text) * 2e-5, (spent, len(text), text[:200])
        slowest, chars = max(slowest, spent), chars + len(text)
        gold = text[:200]
    _figure("texts", begin, read=count, characters=chars, seconds_for_the_slowest=f"{slowest:.2f}")


# --------------------------------------------------------------------------- archives and bundles


def _bounded(function, shown):
    """Call a function that either works or raises a UserError, in bounded time and memory."""

    def late(number, frame):
        raise BaseException(f"not done after {_SECONDS} s: {shown}")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        function()
        return True
    except UserError as error:
        assert 10 < len(str(error)) < 4000, str(error)
        return False
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}: {shown}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
        assert grown < _BYTES, (grown, shown)


_NAMES = (
    *("s/a", "s/b", "s/parity/bundle.json", "s/a/b", "s/a/b/c", "s", "t/a", "/etc/x", "../x"),
    *("s/../../x", "s/./a", "s//a", "s/\x01", "s/\u202ex", "s\\a", "s/" + "n" * 300, "s/é", ""),
    *("s/" + "d/" * 60 + "f", "s/\ud800", "~/x", "s/..", "/", ".", "C:/x", "s/con", "s/a\nb"),
)
_TYPES = (
    *[tarfile.REGTYPE] * 8,
    *(b"12345670"[i : i + 1] for i in range(8)),
    *(b"LKxgSVMDNX", b"\xff"),
)
_PAX = ("path", "size", "linkpath", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.name", "mtime")


def _tar(draw):
    """A tar file with anything in it."""
    file = io.BytesIO()
    form = draw.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    try:
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            for _ in range(draw.choice((0, 1, 1, 2, 3, 3, 5, 1100))):
                info = tarfile.TarInfo(draw.choice(_NAMES[:4] if draw.random() < 0.7 else _NAMES))
                kind = draw.choice(_TYPES)
                info.type = kind if len(kind) == 1 else bytes([draw.choice(kind)])
                info.linkname = draw.choice(("", "a", "/etc/passwd", "../../sentinel", "s/a"))
                info.mode = draw.choice((0o644, 0o4777, 0))
                data = draw.randbytes(draw.choice((0, 5, 700)))
                info.size = len(data)
                if draw.random() < 0.1:
                    info.size = draw.choice((1 << 33, 1 << 62, 10, 512, 513))
                if form == tarfile.PAX_FORMAT and draw.random() < 0.2:
                    value = draw.choice(("0", "-1", "9" * 40, "../x", "s/a", "1,2,3", "x", "1e9"))
                    info.pax_headers = {draw.choice(_PAX): value}
                archive.addfile(info, io.BytesIO(data + bytes(600)) if data else None)
    except (ValueError, OverflowError, UnicodeError, tarfile.TarError, OSError):
        pass  # what Python's writer cannot write; what it did write is taken
    data = bytearray(file.getvalue())
    for _ in range(draw.choice((0, 0, 1, 2, 8))):
        if data:
            header = 512 * draw.randrange(len(data) // 512 + 1)
            place = min(header + draw.randrange(512), len(data) - 1)
            data[place] = draw.choice(
                (0, 0x2E, 0x2F, 0x32, 0x37, 0x78, 0x67, 0x4C, 0x53, 0x80, 0xFF)
            )
            if draw.random() < 0.3 and header + 136 <= len(data):
                # A size in base 256, which may be anything.
                data[header + 124 : header + 136] = bytes([0x80]) + draw.randbytes(11)
    if draw.random() < 0.8:
        for place in range(0, len(data) - 511, 512):
            header = data[place : place + 512]
            if header[257:262] == b"ustar":
                header[148:156] = b" " * 8
                data[place + 148 : place + 156] = f"{sum(header):06o}\0 ".encode()
    return bytes(data[: draw.randrange(len(data) + 1)]) if draw.random() < 0.1 else bytes(data)


def _other_archive(draw):
    """What is no tar file: a zip file, a compressed one, or nothing of the kind."""
    file = io.BytesIO()
    form = draw.randrange(4)
    if form == 0:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(draw.choice(("s/a", "../x", "/etc/x")), bytes(100_000))
    elif form == 1:
        mode = draw.choice(("w:gz", "w:bz2", "w:xz"))
        with tarfile.open(fileobj=file, mode=mode) as archive:
            info = tarfile.TarInfo("s/a")
            info.size = 1 << 16
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    elif form == 2:
        return draw.randbytes(draw.randrange(5000))
    else:
        return bytes(draw.choice((0, 511, 512, 1024, 10240)))
    return file.getvalue()


@cli.command()
@_attacks
def archives(seed, count):
    """Open hostile archives: nothing is written outside, and nothing else is raised."""
    from mlx_fd.export.archive import open_archive

    begin, draw = time.monotonic(), random.Random(seed)
    opened = 0
    with _arena() as folder:
        (folder / "sentinel").write_text("here")
        inside = folder / "inside"
        inside.mkdir()
        for number in range(count):
            data = _tar(draw) if draw.random() < 0.9 else _other_archive(draw)
            file = folder / "a.tar"
            file.write_bytes(data)
            shown = f"archive {number} of seed {seed}: {data[:1200]!r}"
            if _bounded(functools.partial(open_archive, file, inside / "out"), shown):
                opened += 1
                for path in inside.rglob("*"):
                    assert path.is_file() != path.is_dir() and not path.is_symlink(), shown
                    assert path.is_dir() or path.stat().st_mode & 0o6111 == 0, shown
                shutil.rmtree(inside / "out")
            assert not list(inside.iterdir()), shown
            assert {p.name for p in folder.iterdir()} == {"sentinel", "inside", "a.tar"}, shown
            assert (folder / "sentinel").read_text() == "here"
    _figure("archives", begin, attacked=count, opened=opened, refused=count - opened)


@cli.command()
@_attacks
def bundles(seed, count):
    """Read hostile parity bundles: nothing but a UserError is raised."""
    import export.test_bundle as tests
    from export.test_bundle import ODD, arrays_of, content_of, places, sealed
    from mlx_fd.export.bundle_reading import read_bundle

    begin, draw = time.monotonic(), random.Random(seed)
    taken = 0
    with _arena() as folder:

        def write():
            from mlx_fd import problems
            from mlx_fd.models.loading import load
            from support.tiny import make_model_dir

            student = load(make_model_dir(folder / "model"))
            chosen = problems.load("arithmetic", "test").problems[:2]
            bundle = tests.make_bundle(student, problems=chosen, seed=0, source={"name": "a"})
            tests.write_bundle(bundle, folder)

        log = folder / "log"
        assert _wait(_fork(write, log)) == 0, log.read_text()
        content, arrays = content_of(folder), arrays_of(folder)
        content["prompts"], content["items"] = content["prompts"][:2], content["items"][:2]
        content["pieces"] = dict(list(content["pieces"].items())[:3])
        kept = sum(len(p["tokens"]) + len(p["greedy"]) - 1 - p["begin"] for p in content["prompts"])
        arrays = {name: array[:kept] for name, array in arrays.items()}
        sealed(folder, content, arrays)
        read_bundle(folder)
        everywhere = [path for path in places(content) if path]
        odd = (*ODD, "9" * 5000, "-" * 200_000, "1/" + "9" * 121, 1 << 64, -0.0, "\x00", {"": None})
        parity = folder / tests.FOLDER
        files = {name: (parity / name).read_bytes() for name in (tests.CONTENT, tests.REFERENCE)}
        for number in range(count):
            for name, data in files.items():
                (parity / name).write_bytes(data)
            form = draw.random()
            if form < 0.6:
                harmed = copy.deepcopy(content)
                for _ in range(draw.choice((1, 1, 2, 4))):
                    *parents, last = draw.choice(everywhere)
                    target = harmed
                    with contextlib.suppress(KeyError, IndexError, TypeError):
                        for key in parents:
                            target = target[key]
                        if isinstance(target, dict) == isinstance(last, str):
                            target[last] = copy.deepcopy(draw.choice(odd))
                sealed(folder, harmed)
            elif form < 0.8:
                harmed = {name: array.copy() for name, array in arrays.items()}
                name = draw.choice(list(harmed))
                with contextlib.suppress(IndexError, ValueError, OverflowError):
                    change = draw.randrange(5)
                    if change == 0:
                        harmed[name].reshape(-1)[draw.randrange(harmed[name].size)] = draw.choice(
                            (-1, 1e30, float("nan"), float("inf"), 1 << 30)
                        )
                    elif change == 1:
                        harmed[name] = harmed[name][: draw.randrange(3)]
                    elif change == 2:
                        harmed[name] = harmed[name].astype(
                            draw.choice(("f8", "f2", "i8", "u1", "?"))
                        )
                    elif change == 3:
                        del harmed[name]
                    else:
                        harmed[name] = harmed[name].reshape(1, *harmed[name].shape)
                sealed(folder, content, harmed)
            else:
                name = draw.choice(list(files))
                data = bytearray(files[name])
                for _ in range(draw.choice((1, 3))):
                    place = draw.randrange(min(len(data), draw.choice((200, 1 << 30))))
                    data[place : place + draw.choice((0, 1, 9))] = draw.randbytes(
                        draw.choice((0, 1, 3))
                    )
                (parity / name).write_bytes(data)
                if name == tests.REFERENCE:
                    sealed(folder, content)  # the digest belongs to the damaged arrays
            taken += _bounded(lambda: read_bundle(folder), f"bundle {number} of seed {seed}")
    _figure("bundles", begin, attacked=count, read=taken, refused=count - taken)


# ---------------------------------------------------------------- configurations, problems, models


@cli.command()
@_attacks
def configs(seed, count):
    """Read made-up TOML files: each is a configuration, or is refused with its name."""
    from test_config import fuzz

    begin = time.monotonic()
    with _arena() as folder:
        taken = fuzz(folder, count, seed)
    _figure("configs", begin, attacked=count, read=taken, refused=count - taken)


@cli.command()
@_attacks
def problems(seed, count):
    """Read made-up files of problems: each has problems, or is refused with its name."""
    from problems.test_sources import fuzz

    begin = time.monotonic()
    with _arena() as folder:
        taken = fuzz(folder, count, seed)
    _figure("problems", begin, attacked=count, read=taken, refused=count - taken)


@cli.command()
@_attacks
def models(seed, count):
    """Open model directories that are broken in up to three ways at once."""
    import models.test_hostile_models as tests
    from support.tiny import make_model_dir

    begin, draw = time.monotonic(), random.Random(seed)
    breaks = {**tests._REFUSED, **tests._ODD}
    used = 0
    with _arena() as folder:
        os.environ["MLX_FD_CACHE"] = str(folder / "cache")
        make_model_dir(folder / "sound")
        for number in range(count):
            path = folder / "m"
            shutil.copytree(folder / "sound", path)
            names = draw.sample(list(breaks), draw.choice((1, 2, 2, 3)))
            for name in names:
                # One break may have taken away what the next one changes.
                with contextlib.suppress(Exception):
                    breaks[name](path)
            shown = f"model {number} of seed {seed}: {names}"
            used += _bounded(functools.partial(tests.use, path), shown)
            shutil.rmtree(path)
    _figure("models", begin, attacked=count, used=used, refused=count - used)


if __name__ == "__main__":
    cli()
