"""Archives of an export: always the same bytes, and harmless whoever made them."""

from __future__ import annotations

import io
import itertools
import random
import tarfile
from pathlib import Path

import pytest

from mlx_fd.errors import UserError
from mlx_fd.export.archive import open_archive, write_archive
from mlx_fd.files import replacing
from support.draws import draws

FILES = {"README.md": b"# it\n", "model.safetensors": bytes(range(256)) * 30, "parity/b.json": b""}


@pytest.fixture
def folder(tmp_path) -> Path:
    out = tmp_path / "student"
    (out / "parity").mkdir(parents=True)
    for name, content in FILES.items():
        (out / name).write_bytes(content)
    return out


def pack(folder: Path, file: Path) -> None:
    with replacing(file) as packed:
        write_archive(folder, folder.name, packed)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_there_and_back(folder, tmp_path):
    pack(folder, tmp_path / "a.tar")
    assert open_archive(tmp_path / "a.tar", tmp_path / "back") == tmp_path / "back"
    assert contents(tmp_path / "back") == FILES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "back", "student"]


def test_the_same_bytes_whenever_and_whoever(folder, tmp_path):
    pack(folder, tmp_path / "a.tar")
    (folder / "README.md").chmod(0o600)
    (folder / "README.md").touch()
    pack(folder, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = archive.getmembers()
    assert [m.name for m in members] == sorted(f"student/{name}" for name in FILES)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}


def packed(path: Path, *members: tarfile.TarInfo | str, content: bytes = b"hello") -> Path:
    with tarfile.open(path, "w") as archive:
        for member in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isreg():
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


REFUSED = [
    "../evil",
    "a/../../evil",
    "a/../b",
    "/etc/evil",
    "//evil/x",
    "a//b",
    "a/./b",
    "a/b\\..\\c",
    "a/b\nc",
    "evil",
    "a/b/c/d/e",
    "a/" + 256 * "n",
    "a/" + 128 * "é",
    "",
    special("a/link", tarfile.SYMTYPE, "/etc/passwd"),
    special("a/link", tarfile.LNKTYPE, "a/b"),
    special("a/dev", tarfile.CHRTYPE),
    special("a/dev", tarfile.BLKTYPE),
    special("a/pipe", tarfile.FIFOTYPE),
    special("a/folder", tarfile.DIRTYPE),
]


@pytest.mark.parametrize("member", REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_strange_members_are_refused(tmp_path, member):
    inside = tmp_path / "inside"
    inside.mkdir()
    file = packed(tmp_path / "a.tar", "a/good", member)
    with pytest.raises(UserError, match=r"nothing was unpacked|no export"):
        open_archive(file, inside / "out")
    assert list(inside.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "inside"]


def test_other_refusals(folder, tmp_path):
    def refuse(text: str, file: Path) -> None:
        with pytest.raises(UserError, match=text):
            open_archive(file, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refuse("several folders", packed(tmp_path / "a.tar", "a/x", "b/x"))
    refuse("two of its members", packed(tmp_path / "a.tar", "a/x", "a/x"))
    refuse("two of its members", packed(tmp_path / "a.tar", "a/x", "a/x/y"))
    refuse("two of its members", packed(tmp_path / "a.tar", "a/x", "a/x/y/z"))
    refuse("two of its members", packed(tmp_path / "a.tar", "a/x/y", "a/x"))
    refuse("more than 1000", packed(tmp_path / "a.tar", *(f"a/{i}" for i in range(1001))))
    with tarfile.open(tmp_path / "a.tar", "w"):
        pass
    refuse("is empty", tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(b"hello there" * 100)
    refuse("is not a tar file", tmp_path / "a.tar")
    # A member that claims more than there is.
    info = tarfile.TarInfo("a/x")
    info.size = 1 << 40
    (tmp_path / "a.tar").write_bytes(info.tobuf() + bytes(1024))
    refuse(r"1099\.5 GB|damaged", tmp_path / "a.tar")
    # Sizes in base 256, which lead before the beginning of the file, or to more than any memory.
    for kind, size in itertools.product((tarfile.REGTYPE, tarfile.XHDTYPE), (-(1 << 40), 1 << 62)):
        info.type, header = kind, bytearray(info.tobuf())
        header[124:136] = (
            (size % (1 << 96)).to_bytes(12) if size < 0 else bytes([0x80, *size.to_bytes(11)])
        )
        header[148:156] = b" " * 8
        header[148:156] = f"{sum(header):06o}\0 ".encode()
        (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
        refuse("damaged", tmp_path / "a.tar")
    pack(folder, tmp_path / "a.tar")
    whole = (tmp_path / "a.tar").read_bytes()
    # A compressed one could hold anything in a few bytes.
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(folder, "student")
    refuse("is not a tar file", tmp_path / "a.tar.gz")
    (tmp_path / "a.tar").write_bytes(whole)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there already"):
        open_archive(tmp_path / "a.tar", tmp_path / "there")
    with pytest.raises(OSError, match="absent"):
        open_archive(tmp_path / "absent.tar", tmp_path / "out")


def test_damaged_archives_never_escape(folder, tmp_path):
    pack(folder, tmp_path / "a.tar")
    whole = (tmp_path / "a.tar").read_bytes()
    rng = random.Random(0)
    inside = tmp_path / "inside"
    inside.mkdir()
    outcomes = set()
    for number in range(draws(600)):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:
            headers = [m * 512 + rng.randrange(512) for m in (0, 2, 18)]
            for _ in range(rng.choice((1, 2, 8))):
                data[rng.choice(headers)] = rng.choice((0, 0x2E, 0x2F, 0x32, 0x78, 0x80, 0xFF))
            if number % 3 == 2:
                _mend_checksums(data)
        (tmp_path / "b.tar").write_bytes(bytes(data))
        try:
            open_archive(tmp_path / "b.tar", inside / "out")
            outcomes.add("opened")
            for path in inside.rglob("*"):
                assert path.resolve().is_relative_to(inside.resolve()) and not path.is_symlink()
            (inside / "out").rename(tmp_path / f"seen{number}")
        except UserError:
            outcomes.add("refused")
        assert list(inside.iterdir()) == [], number
    assert outcomes == {"opened", "refused"}


def _mend_checksums(data: bytearray) -> None:
    """Make damaged headers believable again, so that what they say is read."""
    for place in (0, 1024, 9216):
        header = data[place : place + 512]
        if len(header) == 512:
            header[148:156] = b" " * 8
            data[place + 148 : place + 156] = f"{sum(header):06o}\0 ".encode()
