"""A language model's head: what it makes of hidden states, and the gradient of that.

MLX can differentiate a head itself. Here both directions are plain functions, for a loss that makes
its gradient along with its value. What a model does to its head's product (a scale, a soft cap) is
with the head; the row functions apply it and differentiate it, a logit at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
from mlx import nn

from mlx_fd.models.backend import backend
from mlx_fd.models.logit_transform import DenseLogits, LinearLogits, LogitSource, LogitTransform

# What a weight may take in float32 where it is widened a tile at a time.
_TILE_BYTES = 4 * 2**20
# What a tile's logits take, but where it would be too narrow for a product; MLX works on as many as
# twenty of them at a time.
_LOGITS_BYTES, _NARROWEST = 2**20, 512
# Most of a softmax's gradient is smaller than what float16 can hold.
_FLOAT16_SCALE = 256.0

Parameters = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """The first V rows of a linear head: logits = transform(hidden @ weight.T + bias).

    Attributes:
        weight: [V, d], or packed integers.
        bias: [V], if it has one.
        packing: if it is quantised: scales and biases [V, d / group_size] (some modes have no
            biases), group_size, bits and mode.
        trained: which of ``weight`` and ``bias`` are learned.
        widen: multiply in float32, with a tile of the vocabulary's weights widened at a time.
        transform: what the model does to the product.
    """

    weight: mx.array
    bias: mx.array | None
    packing: Mapping[str, Any]
    trained: tuple[str, ...]
    widen: bool
    transform: LogitTransform

    @property
    def extra_arrays(self) -> int:
        """How many arrays of the logits' shape there are on the way to them."""
        return int(self.widen) + (not self.transform.is_identity)

    def parameters(self) -> Parameters:
        """What is learned, by its name."""
        return {name: getattr(self, name) for name in self.trained}

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [n, V] of hidden states [n, d]; float32 where it widens or transforms."""
        return self.transform.apply(self.product(hidden))

    def product(self, hidden: mx.array, used: mx.array | None = None) -> mx.array:
        """Logits [n, V] before their transform; float32 where it widens.

        Args:
            hidden: [n, d], any float type.
            used: a product [n, V] of other states, which nothing needs any more. On a CPU this one
                is written over it, tile by tile: fresh memory from the system costs as much as ten
                operations.
        """
        if self.widen or (used is not None and self._tiled):
            wide = hidden.astype(mx.float32) if self.widen else hidden
            logits = mx.zeros((len(hidden), len(self.weight)), wide.dtype) if used is None else used
            done: list[mx.array] = []
            for tile in self._tiles(len(hidden)):
                part = wide @ self._rows(tile, done).T
                done = [part]
                if self.bias is not None:
                    part = part + self.bias[tile]
                # In place, as nothing else needs the array as it was.
                logits = mx.slice_update(logits, part, mx.array([tile.start]), (1,))
            return logits
        if self.packing:
            logits = mx.quantized_matmul(hidden, self.weight, **self.packing)
        else:
            logits = hidden @ self.weight.T
        return logits if self.bias is None else logits + self.bias

    def input_gradient(self, grad: mx.array, hidden: mx.array) -> mx.array:
        """The gradient by the hidden states [n, d], from that by the product [n, V].

        Args:
            grad: float32, or the type of the product.
            hidden: [n, d]; its type is the one to multiply in, unless the head widens.
        """
        if self._tiled:
            sums: list[mx.array] = []
            for tile in self._tiles(len(grad)):
                part = grad[:, tile] @ self._rows(tile, sums)
                sums = [sums[0] + part] if sums else [part]
            return sums[0]
        if hidden.dtype == mx.float16:
            # By the logits again: their scale may have made it much smaller.
            scale = _FLOAT16_SCALE / abs(self.transform.scale)
            return self._way_back((grad * scale).astype(hidden.dtype)) / scale
        return self._way_back(grad.astype(hidden.dtype))

    def parameter_gradients(
        self, grad: mx.array, hidden: mx.array, weights: mx.array
    ) -> Parameters:
        """The gradients by what is learned, float32.

        Args:
            grad: [n, V], by the product of each row.
            hidden: [n, d].
            weights: [n], what each row counts.
        """
        gradients: Parameters = {}
        if "weight" in self.trained:
            counted = (hidden * weights[:, None]).astype(grad.dtype)
            gradients["weight"] = (grad.T @ counted).astype(mx.float32)
        if "bias" in self.trained:
            gradients["bias"] = weights @ grad.astype(mx.float32)
        return gradients

    def _way_back(self, grad: mx.array) -> mx.array:
        if self.packing:
            product = mx.quantized_matmul(grad, self.weight, transpose=False, **self.packing)
        else:
            product = grad @ self.weight
        return product.astype(mx.float32)

    @property
    def _tiled(self) -> bool:
        """Whether products are made a tile of the vocabulary at a time."""
        return self.widen or (backend().on_cpu and not self.packing)

    def _tiles(self, n: int) -> list[slice]:
        """Parts of the vocabulary, for products with n rows."""
        packed = 32 // self.packing["bits"] if self.packing else 1
        a_row = 4 * self.weight.shape[1] * packed
        of_logits = max(_NARROWEST, _LOGITS_BYTES // (4 * n))
        tile = max(1, _TILE_BYTES // a_row) if self.widen else of_logits
        return [slice(at, at + tile) for at in range(0, self.weight.shape[0], tile)]

    def _rows(self, tile: slice, after: list[mx.array]) -> mx.array:
        """Rows of the weight, in float32 if it widens; made only when ``after`` has been."""
        weight = self.weight[tile]
        if not self.widen:
            return weight
        if after:
            (weight,) = mx.depends([weight], after)
        if not self.packing:
            return weight.astype(mx.float32)
        packing = _unpacking(self.packing, tile)
        # The weights are made in their scales' type, which not every mode has as floats.
        if mx.issubdtype(packing["scales"].dtype, mx.floating):
            packing["scales"] = packing["scales"].astype(mx.float32)
        return mx.dequantize(weight, **packing).astype(mx.float32)


@dataclass(frozen=True)
class DenseHead:
    """The first V logits of a model that makes them in a way of its own; it learns nothing.

    Value and gradient are MLX's, of the model's own function: right whatever that does, and slower.

    Attributes:
        source: what makes the logits.
        vocab: V.
        transform: none, as there is no product that something would be done to.
    """

    source: DenseLogits
    vocab: int
    transform: ClassVar[LogitTransform] = LogitTransform()
    # How many of them the model makes on its way is not known: a cap and a type make two.
    extra_arrays: ClassVar[int] = 2

    def parameters(self) -> Parameters:
        """Nothing is learned."""
        return {}

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [n, V] of hidden states [n, d], in the type that the model makes them in."""
        return self.source.call(hidden)[:, : self.vocab]

    def product(self, hidden: mx.array, used: mx.array | None = None) -> mx.array:
        """The same, as :class:`Head` calls what its transform is still to be applied to."""
        return self.logits(hidden)

    def input_gradient(self, grad: mx.array, hidden: mx.array) -> mx.array:
        """The gradient by the hidden states [n, d], float32, from that by the logits [n, V]."""
        scale = _FLOAT16_SCALE if hidden.dtype == mx.float16 else 1.0

        def logits(states: mx.array) -> mx.array:
            return self.logits(states).astype(mx.float32)

        _, (gradient,) = mx.vjp(logits, [hidden], [grad.astype(mx.float32) * scale])
        return gradient.astype(mx.float32) / scale

    def parameter_gradients(
        self, grad: mx.array, hidden: mx.array, weights: mx.array
    ) -> Parameters:
        """Nothing is learned."""
        return {}


def head_rows(source: LogitSource) -> int:
    """How many logits a model makes, those of padding included.

    Raises:
        ValueError: it has no head that :func:`logit_head` takes.
    """
    if isinstance(source, DenseLogits):
        return source.rows
    module = source.module if isinstance(source, LinearLogits) else source
    heads = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)
    if not isinstance(module, heads):
        raise ValueError(f"a head is a linear layer or an embedding, not {type(module).__name__}")
    return int(module.weight.shape[0])


def logit_head(source: LogitSource, vocab: int) -> Head | DenseHead:
    """What makes the first ``vocab`` logits, as the model makes them.

    Args:
        source: a linear head with what the model does after it, or its own function. A bare
            ``nn.Linear``, ``nn.Embedding`` (a tied head) or the quantised form of one is a head
            with nothing after it.
        vocab: V; logits beyond are padding.

    Raises:
        ValueError: it is none of these, or makes fewer logits.
    """
    if vocab > (rows := head_rows(source)):
        raise ValueError(f"vocab = {vocab}, but the head has {rows} rows")
    if isinstance(source, DenseLogits):
        return DenseHead(source, vocab)
    linear = source if isinstance(source, LinearLogits) else LinearLogits(source)
    module = linear.module
    quantized = isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding))
    bias = module.get("bias")
    names = ("scales", "biases", "group_size", "bits", "mode") if quantized else ()
    return Head(
        module.weight[:vocab],
        None if bias is None else bias[:vocab],
        _unpacking({name: getattr(module, name) for name in names}, slice(vocab)),
        tuple(name for name in ("weight", "bias") if name in module.trainable_parameters()),
        # A CPU's half precision and quantised products are scalar loops.
        backend().on_cpu and (quantized or module.weight.dtype != mx.float32),
        linear.transform,
    )


def _unpacking(packing: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """What unpacks some rows of a quantised weight."""
    return {
        name: part[rows] if isinstance(part, mx.array) else part for name, part in packing.items()
    }
