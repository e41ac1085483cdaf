"""One tar file of an export: the same bytes every time, and safe to open whoever made it."""

from __future__ import annotations

import errno
import shutil
import tarfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mlx_fd.errors import UserError
from mlx_fd.models.storage import new_directory

# An export has some twenty files, the largest of tens of GB.
_MAX_MEMBERS = 1000
_MAX_BYTES = 200 << 30
_DEEPEST = 4
_MAX_NAME = 255  # bytes, of file systems


def write_archive(folder: Path, top: str, file: BinaryIO) -> None:
    """Write a folder as a tar file that depends on names and contents alone.

    Args:
        folder: what goes into it; times, owners and permissions do not.
        top: the folder that the members lie in.
        file: where the tar file goes.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            member = tarfile.TarInfo(f"{top}/{path.relative_to(folder).as_posix()}")
            member.size, member.mode = path.stat().st_size, 0o644
            with path.open("rb") as content:
                archive.addfile(member, content)


def open_archive(file: Path, folder: Path) -> Path:
    """Unpack an archive of :func:`write_archive` into a new folder.

    Only ordinary files are taken, under relative names without ``..``; anything else refuses the
    whole archive, and nothing of it is left behind.

    Args:
        file: the tar file.
        folder: the folder to make; it must not be there yet.

    Returns:
        The folder with the export's files.

    Raises:
        UserError: it is not a tar file, it is damaged or too large, or a member is not an ordinary
            file inside one folder.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already; choose another folder to unpack {file} into")
    try:
        with tarfile.open(file, "r:") as archive:
            members = _checked(archive, file)
            _check_room(members, file, folder)
            with new_directory(folder, shared=False) as working:
                for member, name in members:
                    target = working / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    content = archive.extractfile(member)
                    assert content is not None
                    with content, target.open("xb") as copy:
                        shutil.copyfileobj(content, copy, 1 << 20)
                    if target.stat().st_size != member.size:
                        raise UserError(f"{file} is incomplete: it ends within {member.name}")
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{file}: two of its members are {error.filename}") from error
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"{file} is not a tar file, or is damaged ({error})") from error
    except (OSError, MemoryError) as error:
        # Headers may claim any size: more than any memory, or a place before the file's beginning.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise UserError(
            f"{file} is not a tar file, or is damaged (a member has an impossible size)"
        ) from error
    return folder


def _checked(archive: tarfile.TarFile, file: Path) -> list[tuple[tarfile.TarInfo, str]]:
    """An archive's files with their names under its one folder."""
    files: list[tuple[tarfile.TarInfo, str]] = []
    top: str | None = None
    for count, member in enumerate(archive):
        if count == _MAX_MEMBERS:
            raise UserError(f"{file}: has more than {_MAX_MEMBERS} members; it is not an export")
        path = PurePosixPath(member.name)
        shown = ascii(member.name)
        if not member.isreg() or member.issparse():
            raise UserError(
                f"{file}: {shown} is not an ordinary file (a link, a device or a folder); "
                "nothing was unpacked"
            )
        parts = member.name.split("/")
        safe = all(map(is_plain, parts))
        if path.is_absolute() or not safe or not 2 <= len(parts) <= _DEEPEST:
            raise UserError(
                f"{file}: {shown} would be unpacked outside its folder, or is no file of an "
                "export; nothing was unpacked"
            )
        if top not in {None, parts[0]}:
            raise UserError(f"{file}: has several folders at its top; it is not an export")
        top = parts[0]
        files.append((member, "/".join(parts[1:])))
    if not files:
        raise UserError(f"{file}: is empty")
    return files


def is_plain(name: str) -> bool:
    """Whether a file or a folder of this name is unpacked everywhere, and nowhere else."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return False
    return (
        name not in {"", ".", ".."}
        and name.isprintable()
        and not {"/", "\\"} & set(name)
        and length <= _MAX_NAME
    )


def _check_room(members: list[tuple[tarfile.TarInfo, str]], file: Path, folder: Path) -> None:
    size = sum(member.size for member, _ in members)
    there = folder.absolute().parent
    while not there.exists():
        there = there.parent
    free = min(shutil.disk_usage(there).free, _MAX_BYTES)
    # Nothing is compressed, so the files cannot be larger than the archive.
    if size > min(free, file.stat().st_size):
        raise UserError(
            f"{file}: says that it holds {size / 1e9:.1f} GB; that does not fit here, or is more "
            "than the file itself"
        )
