"""What distillation needs of an mlx-lm model, found in the model itself.

mlx-lm's models agree on little: blocks are in ``model.layers``, ``transformer.h``,
``backbone.layers`` or ``language_model.model.layers``, heads are tied or not, and some scale or
bound what a head gives. None of it is read from names. The blocks are those that the model lists
in its property ``layers``; where its hidden states become logits is found by running its own
``__call__`` with a module of it replaced by one that returns given states.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_fd.errors import UserError
from mlx_fd.models.attention_taps import Attentions, joined
from mlx_fd.models.logit_fit import ROUNDING, fit
from mlx_fd.models.logit_transform import DenseLogits, LinearLogits, LogitTransform
from mlx_fd.models.stand_ins import (
    ModulePath,
    Recorder,
    Returns,
    Silent,
    Tap,
    hidden_states,
    module_at,
    modules,
    replaced,
)

_PROBE_TOKENS = (1, 2, 3, 5)
_HEADS = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class Forward:
    """What one pass over tokens of shape [B, T] gives.

    Attributes:
        layers: the embeddings, then the output of each block: n_layers + 1 arrays [B, T, d].
        final: what the head reads [B, T, d]: the last one after the model's final norm.
        attention: what each block gave to MLX's attention, for
            :func:`mlx_fd.models.attention_taps.log_attention`; empty where it was not asked for.
    """

    layers: list[mx.array]
    final: mx.array
    attention: list[Attentions] = dataclasses.field(default_factory=list)

    def last(self, count: int) -> Forward:
        """That of the last tokens alone."""
        begin = self.final.shape[1] - count
        return Forward(
            [layer[:, begin:] for layer in self.layers],
            self.final[:, begin:],
            [tuple(call.last(count) for call in calls) for calls in self.attention],
        )


@dataclass(frozen=True)
class View:
    """Where a model's parts are; see :func:`find_view`.

    The parts are looked up at each use, since LoRA replaces modules.

    Attributes:
        model: mlx-lm's module.
        block_paths: where its blocks are, in the order in which they run.
        final_path: the module whose output are the final hidden states: the one that holds the
            blocks, or the last norm.
        head_path: the module whose product with them makes the logits; ``None``: no one module
            does, and logits are made by the model itself.
        transform: what the model does to that product.
        width: size d of its hidden states.
        rows: how many logits it makes of each, padding included.
        batched: whether a batch of texts gives each one the hidden states that it has alone; else
            they are read one by one.
        needs_cache: whether a text is read right only with a prompt cache at hand, from which later
            blocks take the keys of earlier ones (Gemma 3n); one is made for it.
    """

    model: nn.Module
    block_paths: tuple[ModulePath, ...]
    final_path: ModulePath
    head_path: ModulePath | None
    transform: LogitTransform
    width: int
    rows: int
    batched: bool = True
    needs_cache: bool = False

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in the order in which they run."""
        return [module_at(self.model, path) for path in self.block_paths]

    @property
    def body(self) -> str | None:
        """Python for the module that makes final hidden states of tokens, of a model ``model``.

        It is called with the tokens and ``cache=None``. ``None``: no one module does from these.
        """
        depth = len(self.final_path)
        holds_blocks = all(path[:depth] == self.final_path for path in self.block_paths)
        call = inspect.signature(type(module_at(self.model, self.final_path)).__call__)
        _, _, *further = call.parameters.values()
        alone = all(one.default is not one.empty for one in further if one.name != "cache")
        if self.needs_cache or not holds_blocks or not alone or "cache" not in call.parameters:
            return None
        parts = (f".{key}" if isinstance(key, str) else f"[{key}]" for key in self.final_path)
        return "".join(("model", *parts))

    @property
    def head(self) -> LinearLogits | DenseLogits:
        """What makes logits of final hidden states."""
        if self.head_path is None:
            return DenseLogits(self.logits, self.rows)
        return LinearLogits(module_at(self.model, self.head_path), self.transform)

    @contextmanager
    def finals(self) -> Iterator[list[mx.array]]:
        """Keep the final hidden states [B, T, d] of each call of the model, whoever makes it."""
        kept: list[mx.array] = []
        with self.watched(kept.append):
            yield kept

    @contextmanager
    def watched(self, tell: Callable[[mx.array], None]) -> Iterator[None]:
        """Tell the final hidden states [B, T, d] of each call of the model, whoever makes it."""
        recorder = Recorder(module_at(self.model, self.final_path), tell)
        with replaced(self.model, {self.final_path: recorder}):
            yield

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [n, rows] of final hidden states [n, d], made by the model's own ``__call__``."""
        return _logits_by_model(self.model, self.final_path, hidden)

    def forward(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        *,
        recompute: bool = False,
        attention: bool = False,
    ) -> Forward:
        """Run the model as far as its final hidden states.

        Its own ``__call__`` is run; the logits that it would make too are never computed.

        Args:
            tokens: [B, T]; right padding is harmless under the causal mask.
            cache: the prompt cache of what comes before ``tokens``; it is extended in place.
            recompute: keep only the blocks' outputs for the backward pass and compute the rest
                again.
            attention: keep what the attention weights are made of, too.
        """

        def run(texts: mx.array) -> Forward:
            return self.forward_with_logits(texts, cache, recompute=recompute, attention=attention)[
                0
            ]

        if self.batched or len(tokens) == 1:
            return run(tokens)
        rows = [run(row) for row in mx.split(tokens, len(tokens))]
        layers = zip(*(row.layers for row in rows), strict=True)
        return Forward(
            [mx.concatenate(list(layer)) for layer in layers],
            mx.concatenate([row.final for row in rows]),
            [joined(calls) for calls in zip(*(row.attention for row in rows), strict=True)],
        )

    def forward_with_logits(
        self,
        tokens: mx.array,
        cache: list[Any] | None = None,
        *,
        recompute: bool = False,
        attention: bool = False,
    ) -> tuple[Forward, mx.array]:
        """:meth:`forward`, and the model's own logits [B, T, rows]."""
        if cache is None and self.needs_cache:
            cache = make_prompt_cache(self.model)
        layers: list[mx.array] = []
        finals: list[mx.array] = []
        calls: list[Attentions] | None = [] if attention else None
        taps: dict[ModulePath, Any] = {
            path: Tap(module_at(self.model, path), layers, recompute, calls)
            for path in self.block_paths
        }
        taps[self.final_path] = Recorder(module_at(self.model, self.final_path), finals.append)
        with replaced(self.model, taps):
            logits = self.model(tokens, cache=cache)
        return Forward(layers, finals[-1], calls or []), logits


def _refusal(model: nn.Module, why: str) -> UserError:
    kind = type(model).__module__.rpartition(".")[2]
    return UserError(f"mlx-fd cannot distil mlx-lm's {kind} models: {why}; choose another model")


def block_paths(model: nn.Module) -> tuple[ModulePath, ...]:
    """Where a model's blocks are, in its own order; nothing is run and no weight is read.

    Raises:
        UserError: it lists none, or they are not among its modules.
    """
    blocks = list(getattr(model, "layers", None) or ())
    if not blocks:
        raise _refusal(model, "they list no blocks (layers)")
    where: dict[int, ModulePath] = {}
    for path, module in modules(model):
        where.setdefault(id(module), path)
    missing = [index for index, block in enumerate(blocks) if id(block) not in where]
    if missing or len({id(block) for block in blocks}) < len(blocks):
        raise _refusal(model, "their blocks are not modules of their own")
    return tuple(where[id(block)] for block in blocks)


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """A model's blocks, in its own order; nothing is run and no weight is read.

    Raises:
        UserError: as for :func:`block_paths`.
    """
    return [module_at(model, path) for path in block_paths(model)]


def check_blocks(model: nn.Module) -> None:
    """Make sure that a model's blocks are run as distillation needs it, from shapes alone.

    Nothing is computed and no weight is made, so that a configuration can be judged by it.

    Args:
        model: as mlx-lm makes it; its weights may be anything.

    Raises:
        UserError: it has no blocks that are run one after the other, once each, over hidden
            states [B, T, d].
    """
    paths = block_paths(model)
    called: list[tuple[ModulePath, Any]] = []
    try:
        mx.compile(lambda tokens: _watched(model, paths, called, tokens))(mx.array([_PROBE_TOKENS]))
    except Exception:  # code that needs numbers to go on is asked again when there are some
        return
    _check_order(model, paths, called)


def _watched(
    model: nn.Module,
    paths: Sequence[ModulePath],
    called: list[tuple[ModulePath, Any]],
    tokens: mx.array,
) -> mx.array:
    """A model's logits; what its blocks and the modules around them give is added to ``called``."""
    watched = [*paths, *_above(model, paths)]
    recorders = {path: Recorder(module_at(model, path), _teller(called, path)) for path in watched}
    with replaced(model, recorders):
        logits: mx.array = model(tokens, cache=None)
    return logits


def block_states(model: nn.Module, tokens: mx.array) -> list[mx.array]:
    """The hidden states before the first block and after each, as :class:`Forward` has them.

    Nothing is evaluated: the model's weights may be on the disk still, or nowhere.

    Args:
        model: any text model of mlx-lm.
        tokens: [B, T].

    Raises:
        UserError: the model lists no blocks.
    """
    layers: list[mx.array] = []
    paths = block_paths(model)
    taps = {path: Tap(module_at(model, path), layers, False) for path in paths}
    with replaced(model, taps):
        model(tokens, cache=None)
    return layers


def block_attention(model: nn.Module) -> list[Attentions]:
    """What each block gives to MLX's attention on a few tokens, as :class:`Forward` has it.

    Nothing is evaluated: the model's weights may be on the disk still, or nowhere.

    Raises:
        UserError: the model lists no blocks.
    """
    calls: list[Attentions] = []
    taps = {path: Tap(module_at(model, path), [], False, calls) for path in block_paths(model)}
    with replaced(model, taps):
        model(mx.array([_PROBE_TOKENS]), cache=make_prompt_cache(model))
    return calls


def find_view(model: nn.Module) -> View:
    """Find the parts of a model by running it, on four tokens and then on given hidden states.

    Args:
        model: any text model of mlx-lm, its weights in memory. It is left as it was, and MLX's
            random numbers too.

    Raises:
        UserError: it has no blocks that are run one after the other, once each, over hidden
            states [B, T, d], or no module gives final hidden states that its logits depend on
            alone; or its logits are not numbers.
    """
    paths = block_paths(model)
    called: list[tuple[ModulePath, Any]] = []
    tokens = mx.array([_PROBE_TOKENS])
    logits = _watched(model, paths, called, tokens)
    if mx.isnan(logits).any().item():
        raise _refusal(
            model, "logits of this one are not numbers: its weights or config.json are damaged"
        )
    width = _check_order(model, paths, called)
    rows = int(logits.shape[-1])
    last = max(index for index, (path, _) in enumerate(called) if path == paths[-1])
    # From the outside in: what the model does to its body's output, then to its norm's.
    states = [
        (path, out)
        for path, out in reversed(called[last + 1 :])
        if isinstance(out, mx.array) and out.shape == (*tokens.shape, width)
    ]
    dense = None
    for path, final in states:
        if not _is_final(model, path, final, logits):
            continue
        view = View(model, paths, path, None, LogitTransform(), width, rows)
        fitted = _linear(view, final.dtype)
        if fitted is not None:
            return fitted
        dense = dense or view
    if dense is None:
        raise _refusal(model, "no module of them gives the hidden states that their logits are of")
    return dense


def _teller(called: list[tuple[ModulePath, Any]], path: ModulePath) -> Callable[[Any], None]:
    return lambda out: called.append((path, out))


def _above(model: nn.Module, blocks: Sequence[ModulePath]) -> list[ModulePath]:
    """The modules that blocks are in, and what else those consist of."""
    holders = {path[:depth] for path in blocks for depth in range(len(path))}
    inside = set(blocks)
    return [
        path
        for path, _ in modules(model)
        if path
        and path not in inside
        and path[:-1] in holders
        # A list of blocks is no module; what stands in one beside them is none of these.
        and isinstance(module_at(model, path[:-1]), nn.Module)
    ]


def _check_order(
    model: nn.Module, paths: Sequence[ModulePath], called: Sequence[tuple[ModulePath, Any]]
) -> int:
    """Make sure that each block ran once, in order, on states [B, T, d]; d."""
    blocks = set(paths)
    ran = [(path, out) for path, out in called if path in blocks]
    if [path for path, _ in ran] != list(paths):
        raise _refusal(model, "their blocks are not run one after the other, once each")
    shapes = set()
    for _, out in ran:
        try:
            shapes.add(tuple(hidden_states(out).shape))
        except TypeError as error:
            raise _refusal(model, "their blocks give no hidden states") from error
    shape = shapes.pop()
    if shapes or len(shape) != 3 or shape[:2] != (1, len(_PROBE_TOKENS)):
        raise _refusal(model, "their blocks do not pass on one hidden state for each token")
    return shape[-1]


def _logits_by_model(model: nn.Module, path: ModulePath, hidden: mx.array) -> mx.array:
    """A model's logits [n, rows] where the module at a path gives ``hidden`` [n, d]."""
    tokens = mx.zeros((1, len(hidden)), mx.int32)
    with replaced(model, {path: Returns(module_at(model, path), hidden[None])}):
        logits: mx.array = model(tokens, cache=None)
    return logits[0]


def _is_final(model: nn.Module, path: ModulePath, final: mx.array, logits: mx.array) -> bool:
    """Whether a module's output alone makes the model's logits."""
    made = _logits_by_model(model, path, final[0])
    return made.shape == logits.shape[1:] and _close(made, logits[0])


def _close(made: mx.array, wanted: mx.array) -> bool:
    """Whether logits are the same but for their type's rounding, relative to the largest."""
    wide, other = made.astype(mx.float32), wanted.astype(mx.float32)
    # Rows that a model rules out are at minus infinity in both.
    both = mx.isinf(wide) & (wide == other)
    wide, other = mx.where(both, 0.0, wide), mx.where(both, 0.0, other)
    error = mx.abs(wide - other).max()
    rounding = ROUNDING.get(wanted.dtype, ROUNDING[mx.float32])
    return bool((error <= rounding * mx.abs(other).max()).item())


def _linear(view: View, dtype: mx.Dtype) -> View | None:
    """The view with the head whose product, scaled and bounded, are the model's logits."""
    blocks = set(view.block_paths)
    for path, module in modules(view.model):
        if any(path[: len(block)] == block for block in blocks) or not isinstance(module, _HEADS):
            continue
        if _shape(module) != (view.rows, view.width):
            continue
        transform = fit(view.logits, product(module), view.width, dtype)
        # Embedding and head may hold the same numbers and still be two, of which one is learned.
        if transform is not None and _makes_logits(view, path, dtype):
            return dataclasses.replace(view, head_path=path, transform=transform)
    return None


def _makes_logits(view: View, path: ModulePath, dtype: mx.Dtype) -> bool:
    """Whether a module is what the model multiplies its final hidden states with."""
    hidden = mx.ones((1, view.width), dtype)
    before = view.logits(hidden)
    with replaced(view.model, {path: Silent(module_at(view.model, path), view.rows)}):
        after = view.logits(hidden)
    return not mx.array_equal(before, after, equal_nan=True).item()


def _shape(module: nn.Module) -> tuple[int, int]:
    """Rows and columns of a head's weight, packed or not."""
    rows, columns = module.weight.shape
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        columns = columns * 32 // module.bits
    return rows, columns


def product(module: nn.Module) -> Callable[[mx.array], mx.array]:
    """What a head multiplies hidden states with."""
    tied = isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
    multiply: Callable[[mx.array], mx.array] = module.as_linear if tied else module
    return multiply
