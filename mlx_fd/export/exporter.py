"""From a run to a directory that other tools open: write, read back, compare, then describe.

What is written is loaded again and its logits compared with the live student's, before the
directory appears under its name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd.errors import NonFiniteWeights, UserError
from mlx_fd.export import archive, gguf_file
from mlx_fd.export.bundle import make_bundle, write_bundle
from mlx_fd.export.card import write_card
from mlx_fd.export.chat import carry_template
from mlx_fd.export.form import Form, check_form
from mlx_fd.export.formats import FORMATS
from mlx_fd.export.peft import transformers_opens_base
from mlx_fd.export.score_head import score_head
from mlx_fd.export.source import Source, open_source
from mlx_fd.export.verify import (
    Agreement,
    Logits,
    agreement,
    check_adapter_kept,
    check_precision,
    logits_of,
    role_chat,
)
from mlx_fd.feedback.judge import open_student
from mlx_fd.files import failed_write, replacing, working_folder
from mlx_fd.models.aliases import ALIASES
from mlx_fd.models.loading import Loaded, load
from mlx_fd.models.resolve import parse_name
from mlx_fd.models.score_head import SCORE_HEAD
from mlx_fd.models.storage import new_directory
from mlx_fd.runs import MANIFEST, SUMMARY

if TYPE_CHECKING:
    from mlx_fd.models.student import Student
    from mlx_fd.problems import Problem

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and their number."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        source: what it was made from.
        folder: the directory.
        files: name -> bytes.
        agreement: of what was written with the live model.
        kept: of the live student with its base; ``None`` where no weight was rounded.
        gguf: what the GGUF file holds.
        warnings: what the user should know.
    """

    source: Source
    folder: Path
    files: dict[str, int]
    agreement: Agreement
    kept: Agreement | None
    gguf: gguf_file.Written | None
    warnings: tuple[str, ...]


def check_out(folder: Path, *, with_archive: bool) -> None:
    """Make sure that the directory can be made.

    Raises:
        UserError: there is something there already.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: is a link or a file; choose another --out")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: there is something in this folder; choose another --out")
    if folder.is_dir() and folder.samefile(Path.cwd()):
        # It is replaced by a new one, and a shell that stands in the old one sees nothing of it.
        raise UserError(
            f"{folder}: is the folder that you are in; choose one that is not there yet"
        )
    name = folder.absolute().name
    if with_archive and not archive.is_plain(name):
        raise UserError(
            f"{folder}: a character of this name, or its length, is not for an archive; choose "
            "another --out"
        )
    if with_archive and archive_of(folder).exists():
        raise UserError(f"{archive_of(folder)}: is there already; choose another --out")


def archive_of(folder: Path) -> Path:
    """The tar file beside an export's directory."""
    return folder.with_name(f"{folder.name}.tar")


def export(
    name: str,
    folder: Path,
    form: Form,
    *,
    adapter: Path | None = None,
    with_archive: bool = False,
    progress: Progress,
) -> Exported:
    """Export a model.

    Args:
        name: a run directory, one of its checkpoints, or a model's name.
        folder: the directory to make; it appears complete or not at all.
        form: what it shall look like.
        adapter: an mlx-lm adapter to put on the model ``name`` (empty: on the one it names).
        with_archive: write ``FOLDER.tar`` too; both appear, or neither.
        progress: told of every step.

    Raises:
        UserError: nothing of that name, damaged files, options or an architecture that do not go
            together, or weights that lose the adapter when they are quantised.
    """
    # Not resolved: a link to nowhere is to be seen. But what follows needs a parent that is real.
    folder = Path(os.path.abspath(folder))  # noqa: PTH100
    check_form(form)
    check_out(folder, with_archive=with_archive)
    source = open_source(name, adapter, form.template_kwargs)
    FORMATS[form.format].check(source, form)
    progress("loading", 0, 1)
    judge = open_student(source.ref)
    live, student = judge.student_lm, judge.student
    chat = role_chat(live)
    with contextlib.ExitStack() as archived, contextlib.ExitStack() as held:
        with _wrap_write_errors(folder):
            working = held.enter_context(new_directory(folder, shared=False))
            written = _write(source, live, working, form, progress)
            if source.ref.template is not None:
                carry_template(source.ref.template, source.ref.model, working)
            if (head := score_head(source.ref, live)) is not None:
                head.write(working / SCORE_HEAD)
        progress("comparing", 0, 2)
        reference = logits_of(live, chat)
        progress("comparing", 1, 2)
        found = agreement(reference, _logits_again(source, working, folder, form, chat))
        kept = _kept(source, form, chat, reference)
        warnings = [
            check_precision(found),
            _untrained(source),
            _unstopped(written),
            _unopened(source, form),
        ]
        if kept is not None:
            warnings.append(check_adapter_kept(found, kept))
        if form.parity_problems:
            bundle = make_bundle(
                live,
                problems=_problems(source, form.parity_problems),
                seed=form.seed,
                source={
                    "name": source.name,
                    "base": source.base,
                    "format": form.format,
                    "mean_kl": found.mean_kl,
                },
                progress=lambda done, total: progress("parity bundle", done, total),
            )
            with _wrap_write_errors(folder):
                write_bundle(bundle, working)
        with _wrap_write_errors(folder):
            _describe(source, form, student, found, kept, written, working)
        sizes = {
            path.relative_to(working).as_posix(): path.stat().st_size
            for path in sorted(working.rglob("*"))
            if path.is_file()
        }
        if with_archive:
            progress("archive", 0, 1)
            # Before the directory has its name: one without its archive could not be made again.
            with _wrap_write_errors(archive_of(folder)):
                packed = archived.enter_context(replacing(archive_of(folder)))
                archive.write_archive(working, folder.name, packed)
                packed.flush()
                os.fsync(packed.fileno())
        with _wrap_write_errors(folder):
            # The directory appears under its name, and then its archive.
            held.close()
        try:
            archived.close()
        except OSError as error:
            raise UserError(
                f"{archive_of(folder)}: cannot be written ({error.strerror}), but {folder} is "
                "there and whole; to have both, remove it and run the same command again"
            ) from error
    return Exported(source, folder, sizes, found, kept, written, tuple(filter(None, warnings)))


@contextlib.contextmanager
def _wrap_write_errors(path: Path) -> Iterator[None]:
    """Turn a failed write into a message; what is read in there has messages of its own."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if (why := failed_write(error)) is None:
            raise
        raise UserError(
            f"{path}: cannot be written ({why}); nothing of this export was left behind. Make room "
            "and run the same command again, or choose another --out"
        ) from error


def _describe(
    source: Source,
    form: Form,
    student: Student | None,
    found: Agreement,
    kept: Agreement | None,
    written: gguf_file.Written | None,
    folder: Path,
) -> None:
    try:
        write_card(source, form, student, found, kept, written, folder)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{source.ref.run}: its {MANIFEST} or {SUMMARY} is not what mlx-fd wrote "
            f"({error!r}); restore the old file"
        ) from error


def _write(
    source: Source, live: Loaded, folder: Path, form: Form, progress: Progress
) -> gguf_file.Written | None:
    progress("writing", 0, 1)
    return FORMATS[form.format].write(
        source, live, folder, form, lambda done, total: progress("writing", done, total)
    )


def _logits_again(
    source: Source, folder: Path, final: Path, form: Form, chat: tuple[int, ...]
) -> Logits:
    """Logits of what was written, read back from the disk."""
    chosen = FORMATS[form.format]
    if chosen.convert_back is None:
        with _blaming_what_was_written(final, folder):
            return logits_of(chosen.load_back(source, folder, form), chat)
    with (
        working_folder(folder.parent) as scratch,
        _blaming_what_was_written(final, folder, scratch),
    ):
        with _wrap_write_errors(final):
            converted = chosen.convert_back(folder, scratch, form)
        return logits_of(chosen.load_back(source, converted, form), chat)


@contextlib.contextmanager
def _blaming_what_was_written(final: Path, *gone: Path) -> Iterator[None]:
    """Say what is wrong with what was written, and not where it was: that is gone by then."""
    try:
        yield
    except NonFiniteWeights as error:
        # Those of the source were looked at, and are.
        raise UserError(
            f"{error.name} has numbers that the type it is written in cannot hold, so nothing was "
            "written; choose another one (--dtype bfloat16 or float32)"
        ) from error
    except UserError as error:
        reason = str(error)
        for folder in gone:
            reason = reason.replace(str(folder), str(final))
        if reason == str(error):
            raise
        raise UserError(
            f"what was written cannot be read back, so nothing of it was left behind: {reason}"
        ) from error


def _kept(source: Source, form: Form, chat: tuple[int, ...], reference: Logits) -> Agreement | None:
    """The student against its base, where rounding may have lost what lies between them."""
    if source.ref.adapter_folder is None or not FORMATS[form.format].rounds(form):
        return None
    return agreement(reference, logits_of(load(source.ref.model), chat))


def _untrained(source: Source) -> str | None:
    checkpoint = source.ref.checkpoint
    if checkpoint is None or not checkpoint.name.isdigit() or int(checkpoint.name) > 0:
        return None
    return (
        f"checkpoint {checkpoint.name} is the student before its first update: on the probe set "
        "the run made it no better, and this export is the base model"
    )


def _unstopped(written: gguf_file.Written | None) -> str | None:
    if written is None or not written.unnamed_ends:
        return None
    return (
        "a GGUF file names three tokens that end a turn, and this model has more: llama.cpp may "
        f"write on after {', '.join(written.unnamed_ends)}; give it as a stop text, too. mlx-fd "
        "reads all of them"
    )


def _unopened(source: Source, form: Form) -> str | None:
    """Of an adapter for transformers: its base is not what transformers opens."""
    named = form.base_model is not None or "base_model" not in FORMATS[form.format].options
    if named or not form.adapter or transformers_opens_base(source):
        return None
    return (
        f"the adapter's base, {source.base}, has weights that MLX quantised, which transformers "
        "cannot open: the model card says how to write one that it can; --base-model NAME names "
        "another"
    )


def _problems(source: Source, count: int) -> tuple[Problem, ...]:
    """Problems of the kind that the model was made for."""
    from mlx_fd import problems
    from mlx_fd.config import PRESETS
    from mlx_fd.problems.sources import SOURCES

    config = source.ref.config
    wanted = config.problems.problems if config is not None else ""
    # The tiny models know no other problems than those of their preset.
    alias = None if source.local else ALIASES.get(parse_name(source.base).base)
    usual = PRESETS[alias.preset]["problems"] if alias and alias.preset else "gsm8k"
    name = wanted if wanted in SOURCES else usual
    return problems.load(name, "test").problems[:count]


def as_json_value(exported: Exported) -> dict[str, Any]:
    """What a script wants to know of an export."""
    return {
        "out": str(exported.folder),
        "source": exported.source.name,
        "base": exported.source.base,
        "files": exported.files,
        "bytes": sum(exported.files.values()),
        "positions": exported.agreement.positions,
        "largest_difference": exported.agreement.largest_difference,
        "mean_kl": exported.agreement.mean_kl,
        "worst_kl": exported.agreement.worst_kl,
        "top1": exported.agreement.top1,
        "mean_kl_of_base": exported.kept.mean_kl if exported.kept else None,
        "gguf_types": exported.gguf.kinds if exported.gguf else None,
        "gguf_carried_over": exported.gguf.carried if exported.gguf else None,
        "warnings": list(exported.warnings),
    }
