"""Models in memory: loading, float32 on the CPU backend, weights shared by expert and student."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import glob
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_fd.errors import NonFiniteWeights, UserError
from mlx_fd.models import thinking
from mlx_fd.models.backend import backend
from mlx_fd.models.chat_template import ChatTemplate
from mlx_fd.models.dense import dequantize
from mlx_fd.models.device_memory import available_memory
from mlx_fd.models.directory import CONFIG, blaming, check_directory
from mlx_fd.models.published_config import read_config
from mlx_fd.models.thinking import Thinking
from mlx_fd.models.tokenizer import adopt, open_tokenizer, template_of

if TYPE_CHECKING:
    import mlx.core as mx
    from mlx import nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_fd.models.view import View

# Share of the free memory that float32 weights may take; generation and training need the rest.
_WEIGHT_SHARE = 0.5


@dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    Attributes:
        model: mlx-lm's module.
        view: its parts.
        tokenizer: mlx-lm's tokenizer wrapper.
        config: the checkpoint's configuration.
        path: the directory it came from.
        dtype: of its activations.
        vocab: tokens it may write: ids below this. The model's rows beyond them are padding.
        template: how chats are written for it: its own way, or that of the run it belongs to.
        batched: whether conversations in a batch are written as each one alone would be; else they
            are written one by one.
        thinking: how it thinks before it replies; ``None``: it has no marks of a thought.
        draft: who proposes its tokens where it writes a text by itself; ``None``: nobody.
        remarks: how it is run otherwise than its files say.
    """

    model: nn.Module
    view: View
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path
    dtype: mx.Dtype
    vocab: int
    template: ChatTemplate
    batched: bool = True
    thinking: Thinking | None = None
    draft: Draft | None = None
    remarks: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how it is run."""
        found = [f"{self.path.name}: {remark}" for remark in self.remarks]
        if not self.batched:
            found.append(
                f"{self.path.name} is written one conversation at a time, which takes longer: in "
                "mlx-lm's batches its replies would be others"
            )
        if not self.view.batched:
            found.append(
                f"{self.path.name} is read one text at a time, which takes longer: in a batch its "
                "hidden states would be others"
            )
        return tuple(found)


@dataclass(frozen=True)
class Draft:
    """A model that proposes another one's tokens.

    Attributes:
        loaded: the model; it reads the same tokens.
        tokens: how many it proposes at a time.
    """

    loaded: Loaded
    tokens: int


def _float32_bytes(model: nn.Module) -> int:
    """Memory of the weights once they are dequantised to float32."""
    from mlx_lm.utils import get_total_parameters

    return 4 * int(get_total_parameters(model))


@contextlib.contextmanager
def _without_wildcards(path: Path) -> Iterator[Path]:
    """A directory under a name in which mlx-lm finds its weights: ``[`` is a wildcard there."""
    if glob.escape(str(path)) == str(path):
        yield path
        return
    # Files that were opened through the link are read on when it is gone.
    with tempfile.TemporaryDirectory(prefix="mlx-fd-") as scratch:
        link = Path(scratch, "model")
        link.symlink_to(path.resolve())
        yield link


def open_lazily(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A model whose weights are still on the disk, and its configuration.

    Raises:
        UserError: files are missing or damaged, or mlx-lm does not know the architecture.
    """
    from mlx_lm.utils import load_model

    from mlx_fd.models.config_check import check_model

    if not (path / "config.json").exists() or not any(path.glob("model*.safetensors")):
        raise UserError(
            f"{path} is not an mlx-lm model: config.json or model*.safetensors is missing"
        )
    check_directory(path)
    # mlx-lm takes the end tokens from generation_config.json, where that has some.
    read = {key: value for key, value in read_config(path).items() if key != "eos_token_id"}
    with blaming(f"the model in {path} cannot be loaded"), _without_wildcards(path) as plain:
        model, config = load_model(
            plain, lazy=True, trust_remote_code=False, model_config=copy.deepcopy(read)
        )
    check_model(model, read, path / CONFIG)
    # It changes what it is given; of that only what it found out about the weights is kept.
    found = ("quantization", "quantization_config")
    return model, {**config, **{key: read[key] for key in read if key not in found}}


def _wants_float32(dequantize: str) -> bool:
    return dequantize == "auto" and backend().on_cpu


def _is_quantized(model: nn.Module) -> bool:
    from mlx.utils import tree_flatten

    return any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters()))


def _make_fast(model: nn.Module, *, dense: bool) -> None:
    """Make a model float32, the only fast type on the CPU backend; weights stay lazy.

    Args:
        model: the model, changed in place.
        dense: whether quantised weights are dequantised too, or only their scales converted.
    """
    import mlx.core as mx

    # First the scales: 16-bit ones would round every dequantised weight.
    model.set_dtype(mx.float32)
    if dense:
        dequantize(model)


def _fits_dense(model: nn.Module) -> bool:
    return _float32_bytes(model) < _WEIGHT_SHARE * available_memory()


def _loaded(
    path: Path, model: nn.Module, config: dict[str, Any], template: ChatTemplate | None = None
) -> Loaded:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    tokenizer, vocab = open_tokenizer(path, config)
    remarks = []
    if template is None:
        template = template_of(tokenizer, path)
        for end in sorted(set(template.end_tokens) - tokenizer.eos_token_ids):
            remarks.append(
                f"{tokenizer.convert_ids_to_tokens(end)} ends its turns, for its chat template "
                "writes it behind every reply, though eos_token_id does not name it"
            )
    adopt(tokenizer, template)
    with blaming(f"the model in {path} cannot be loaded"):
        mx.eval(model.parameters())
    check_weights(path, model)
    # What config.json has of a wrong kind may show only now.
    with blaming(f"the model in {path} cannot be loaded: it fails on a few tokens"):
        view, batched = _checked_view(path, model, vocab)
    # Scales or unquantised weights; norms are among them in every architecture.
    floating = (v.dtype for _, v in tree_flatten(model.parameters()))
    dtype = next(d for d in floating if mx.issubdtype(d, mx.floating))
    loaded = Loaded(
        model=model,
        view=view,
        tokenizer=tokenizer,
        config=config,
        path=path,
        dtype=dtype,
        vocab=vocab,
        template=template,
        batched=batched,
        remarks=tuple(remarks),
    )
    return with_thinking(loaded, on=False)


def check_can_think(path: Path, template: ChatTemplate) -> None:
    """Make sure that a model can think before it replies, before any weight is read.

    Args:
        path: the model's directory.
        template: how chats are written for it.

    Raises:
        UserError: it cannot, or in a way that is not understood.
    """
    tokenizer, _ = open_tokenizer(path, read_config(path))
    thinking.find(thinking.switched(template, True), tokenizer, on=True, limit=1)


def with_thinking(loaded: Loaded, *, on: bool, limit: int = 0) -> Loaded:
    """A model that thinks before it replies, or does not.

    Args:
        loaded: the model.
        on: whether it shall think.
        limit: the most tokens of a thought.

    Raises:
        UserError: it shall think, and cannot.
    """
    template = thinking.switched(loaded.template, on)
    found = thinking.find(template, loaded.tokenizer, on=on, limit=limit)
    return dataclasses.replace(loaded, template=template, thinking=found)


def _checked_view(path: Path, model: nn.Module, vocab: int) -> tuple[View, bool]:
    """A model's parts, held against itself; refusals have its directory in them."""
    from mlx_fd.models.checking import check_model
    from mlx_fd.models.view import find_view

    try:
        view = find_view(model)
        if vocab > view.rows:
            raise UserError(
                f"it has {vocab} tokens but makes only {view.rows} logits; its tokenizer does not "
                "belong to it"
            )
        return check_model(view, vocab)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_weights(path: Path, model: nn.Module) -> None:
    """Make sure that a model's weights are finite numbers.

    Args:
        path: the model's directory.
        model: with its weights in memory.

    Raises:
        UserError: they are damaged.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    arrays = dict(tree_flatten(model.parameters()))
    for name, array in arrays.items():
        if name.endswith(".weight") and mx.issubdtype(array.dtype, mx.integer):
            # Packed ones have their scales beside them. MLX reads FP8 as the bytes that it is.
            module = name.removesuffix("weight")
            if mx.issubdtype(array.dtype, mx.signedinteger) or not (
                {f"{module}scales", f"{module}weight_scale"} & arrays.keys()
            ):
                raise UserError(
                    f"the model in {path} cannot be loaded: {name} is of {array.dtype}, which is "
                    "neither a weight nor quantised (FP8 without scales, perhaps): take the model "
                    "in bfloat16, or an mlx-community conversion"
                )
        # A sum costs a fraction of looking at each weight; it may overflow, so it does not decide.
        if not mx.issubdtype(array.dtype, mx.floating) or mx.isfinite(array.sum()).item():
            continue
        if not mx.isfinite(array).all().item():
            raise NonFiniteWeights(
                f"the model in {path} cannot be loaded: {name} has numbers that are not finite; "
                "its weights are damaged: download or make them again",
                name,
            )


def load(
    path: Path,
    *,
    dequantize: str = "auto",
    template: ChatTemplate | None = None,
    sharded: bool = False,
) -> Loaded:
    """Load an mlx-lm model directory.

    On the CPU backend ``"auto"`` makes it float32 (dequantised where half of the free memory is
    enough for that), since half precision and quantised products are slow there. On Metal and
    CUDA the weights stay as they are.

    Args:
        path: the directory.
        dequantize: ``"never"``: keep quantised and half-precision weights on a CPU, too.
        template: how chats are written for it, that of the run it belongs to; ``None``: its own.
        sharded: let each rank have its part of the weights (:mod:`mlx_fd.models.sharding`); all of
            them must then call the model alike.

    Returns:
        The model with its weights in memory.

    Raises:
        UserError: files are missing or damaged, or mlx-lm does not know the architecture.
    """
    opened = open_as_loaded(path, dequantize=dequantize, sharded=sharded)
    return _loaded(path, *opened, template)


def open_as_loaded(
    path: Path, *, dequantize: str = "auto", sharded: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """A model as :func:`load` makes it, its weights still on the disk; and its configuration.

    Args:
        path: the directory.
        dequantize: as for :func:`load`.
        sharded: likewise.

    Raises:
        UserError: files are missing or damaged, mlx-lm does not know the architecture, or its
            blocks are not run as distillation needs it; or it cannot be divided among the ranks.
    """
    backend()
    from mlx_fd.models.view import check_blocks

    model, config = open_lazily(path)
    try:
        check_blocks(model)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if _wants_float32(dequantize):
        dense = _fits_dense(model)
        # A 16-bit model that does not fit as float32 is left as it is: slow, but it runs.
        if dense or _is_quantized(model):
            _make_fast(model, dense=dense)
    if sharded:
        from mlx_fd.models.sharding import shard

        shard(path, model, config)
    return model, config


def _origin(
    expert: Loaded, student_path: Path, config: dict[str, Any]
) -> Callable[[str], str | None] | None:
    """What the expert calls a student's weight; ``None``: the student is another model."""
    from mlx_fd.models.prune import list_of_layers, renamed

    if expert.path.resolve() == student_path.resolve():
        return str
    origin = config.get("mlx_fd") or {}
    if origin.get("source") != str(expert.path.resolve()):
        return None
    layer_of, holder = dict(enumerate(origin["layers"])), list_of_layers(expert.model)
    return lambda name: renamed(name, layer_of, holder)


def load_pair(
    expert_path: Path, student_path: Path, *, dequantize: str = "auto", sharded: bool = False
) -> tuple[Loaded, Loaded]:
    """Load expert and student; equal weights of one origin are one array in memory.

    They are shared where both paths are the same, or where the student was pruned from the
    expert. A pruned student's arrays are compared with the expert's one by one, so weights that
    were changed since the pruning stay the student's own. The modules are never shared: what is
    added to the student (LoRA) or replaced in it leaves the expert as it is.

    Args:
        expert_path: the expert's directory.
        student_path: the student's directory.
        dequantize: as for ``load``.
        sharded: let each rank have its part of the expert's weights; none is the student's then.

    Returns:
        Expert and student.

    Raises:
        UserError: as for ``load``.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map, tree_unflatten

    expert = load(expert_path, dequantize=dequantize, sharded=sharded)
    model, config = open_lazily(student_path)
    name_of = None if sharded else _origin(expert, student_path, config)
    if name_of is None:
        return expert, load(student_path, dequantize=dequantize)
    if _wants_float32(dequantize) and expert.dtype == mx.float32:
        # Dequantised or not, the student goes the expert's way, to have the same arrays.
        _make_fast(model, dense=not _is_quantized(expert.model))
    expert_arrays = dict(tree_flatten(expert.model.parameters()))
    parameters = dict(tree_flatten(model.parameters()))
    # The module must not keep alive what is compared and dropped, array by array.
    model.update(tree_map(lambda _: mx.array(0.0), model.parameters()))
    same_files = expert_path.resolve() == student_path.resolve()
    chosen = []
    for name in list(parameters):
        array = parameters.pop(name)
        candidate = expert_arrays.get(name_of(name) or "")
        if candidate is not None and (same_files or _equal(candidate, array)):
            array = candidate
        chosen.append((name, array))
    model.update(tree_unflatten(chosen))
    return expert, _loaded(student_path, model, config)


def _equal(a: mx.array, b: mx.array) -> bool:
    import mlx.core as mx

    return a.shape == b.shape and a.dtype == b.dtype and bool(mx.array_equal(a, b).item())
