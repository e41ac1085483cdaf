"""LoRA and DoRA on a model, as mlx-lm puts them there: on which modules, and with which dropout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_fd.config import ModelOptions
from mlx_fd.errors import UserError

_EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
_LINEAR = (nn.Linear, nn.QuantizedLinear)
# Linear modules that their blocks do not call but read the weight of: Gemma 3n's, Kimi K3's.
_READ = ("prediction_coefs", "correction_coefs", "self_attention_res_proj", "mlp_res_proj")
_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


class LoraDropout(nn.Module):
    """Dropout of what a LoRA matrix reads, with the random numbers of the step that it is in.

    Inverted dropout (Srivastava et al. 2014) as in ``nn.Dropout``, which takes MLX's global random
    state: a block that is run again for its gradient would then drop other entries than it had.
    Here nothing is dropped outside of :func:`dropping`, and within it the same entries every time.
    """

    def __init__(self, p: float, seed: int):
        """Make a module that drops nothing yet.

        Args:
            p: share of the entries to drop, below 1.
            seed: of this module's random numbers.
        """
        super().__init__()
        self._p = p
        self._seed = seed
        self._key: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """The input, with some entries 0 and the others larger by 1 / (1 - p)."""
        if self._key is None:
            return x
        kept = mx.random.bernoulli(1 - self._p, x.shape, key=self._key)
        return mx.where(kept, x / (1 - self._p), mx.zeros_like(x))

    def drop(self, *place: int) -> None:
        """Drop what belongs to a place in a run from here on; nothing, where none is given."""
        if not place:
            self._key = None
            return
        digest = hashlib.sha256("/".join(map(str, (self._seed, *place))).encode()).digest()
        self._key = mx.random.key(int.from_bytes(digest[:8], "big"))


@contextmanager
def dropping(model: nn.Module, *place: int) -> Iterator[None]:
    """Let a model's dropout act.

    Args:
        model: with LoRA or without.
        *place: where in the run this is (the step, the part of its samples): together with the
            run's seed it decides what is dropped.
    """
    modules = [module for module in model.modules() if isinstance(module, LoraDropout)]
    try:
        for module in modules:
            module.drop(*place)
        yield
    finally:
        for module in modules:
            module.drop()


def lora_layers(model: nn.Module, options: ModelOptions) -> int:
    """How many of the model's last blocks carry LoRA."""
    return min(options.lora_layers or len(model.layers), len(model.layers))


def lora_keys(model: nn.Module, options: ModelOptions) -> list[str] | None:
    """Names of the modules that carry LoRA, within their block.

    Args:
        model: the student, with LoRA or without.
        options: ``lora_keys``: the names. Where there are none: all linear modules, but in a
            mixture of experts neither the experts nor their router.

    Returns:
        The names for mlx-lm's ``lora_parameters.keys``; ``None`` for its own choice, all of them.

    Raises:
        UserError: no block that trains has a module of a name that LoRA goes on.
    """
    if options.train == "full":
        return None
    found = _modules(model, options)
    fit = {name: module for name, module in found.items() if _takes_lora(name, module)}
    if options.lora_keys:
        for key in options.lora_keys:
            if key not in fit:
                raise UserError(
                    f"lora_keys: no layer that trains has a module {key!r} for LoRA; there are "
                    f"{', '.join(fit)}"
                )
        return list(options.lora_keys)
    counts = {module.num_experts for module in found.values() if isinstance(module, _EXPERTS)}
    chosen = [
        name
        for name, module in fit.items()
        if not isinstance(module, _EXPERTS)
        # What is as wide as there are experts chooses among them.
        and not (isinstance(module, _LINEAR) and module.weight.shape[0] in counts)
    ]
    return None if len(chosen) == len(found) else chosen


def _takes_lora(name: str, module: nn.Module) -> bool:
    """Whether a block still runs with LoRA on a module, and mlx-lm reads it back."""
    # AFM's fused layers have a LoRA of their own, whose arrays mlx-lm's reader does not know.
    return name.rpartition(".")[2] not in _READ and not hasattr(module, "to_lora")


def _modules(model: nn.Module, options: ModelOptions) -> dict[str, nn.Module]:
    """Modules that LoRA goes on, or is on, in the blocks that train; by their names in a block."""
    found: dict[str, nn.Module] = {}
    kinds = (*_LINEAR, *_EXPERTS, *_EMBEDDINGS)
    for block in model.layers[-lora_layers(model, options) :]:
        inside: set[str] = set()
        for name, module in block.named_modules():
            base = module.get("linear", module.get("embedding")) if "lora_a" in module else module
            if "lora_a" in module:
                inside |= {f"{name}.linear", f"{name}.embedding"}
            if name not in inside and (hasattr(base, "to_lora") or isinstance(base, kinds)):
                found.setdefault(name, base)
    return dict(sorted(found.items()))


def lora_parameters(model: nn.Module, options: ModelOptions) -> dict[str, Any]:
    """mlx-lm's ``lora_parameters``, as they stand in adapter_config.json."""
    parameters: dict[str, Any] = {
        "rank": options.lora_rank,
        "scale": options.lora_scale,
        "dropout": options.lora_dropout,
    }
    keys = lora_keys(model, options)
    return parameters if keys is None else {**parameters, "keys": keys}


def put_lora(model: nn.Module, options: ModelOptions, seed: int = 0) -> None:
    """Freeze a model and put LoRA or DoRA on it, in place.

    Args:
        model: its weights may be on the disk still.
        options: kind, rank, scale, dropout, layers and modules.
        seed: of the dropout; the matrices are drawn from MLX's random state.

    Raises:
        UserError: there is no module of a name, or none at all, or DoRA cannot be had on one.
    """
    for module in model.modules():
        # A class of mlx-lm's (recurrent_gemma) leaves out what every module begins with.
        if not hasattr(module, "_no_grad"):
            nn.Module.__init__(module)
    model.freeze()
    parameters = lora_parameters(model, options)
    dora = options.train == "dora"
    if dora:
        _check_dora(model, options, parameters.get("keys"))
    linear_to_lora_layers(model, lora_layers(model, options), parameters, use_dora=dora)
    if not tree_flatten(model.trainable_parameters()):
        raise UserError(
            f"--train {options.train}: none of the blocks that train has a module for LoRA, so "
            "nothing would be learned; take another student, or more blocks (--lora-layers)"
        )
    if options.lora_dropout:
        adapted = [module for module in model.modules() if "lora_a" in module]
        for index, module in enumerate(adapted):
            digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
            module.dropout = LoraDropout(options.lora_dropout, int.from_bytes(digest[:4], "big"))


def _check_dora(model: nn.Module, options: ModelOptions, keys: list[str] | None) -> None:
    """Make sure that mlx-lm has DoRA for every module that it would go on.

    Raises:
        UserError: for one it has not.
    """
    for name, module in _modules(model, options).items():
        if keys is not None and name not in keys:
            continue
        bits = module.bits if isinstance(module, nn.QuantizedLinear) else 32
        # mlx-lm counts the columns of packed weights by 32 // bits.
        if not isinstance(module, _LINEAR) or 32 % bits:
            kind = f"{bits}-bit" if isinstance(module, _LINEAR) else type(module).__name__
            raise UserError(
                f"--train dora: mlx-lm has no DoRA for {name} ({kind}); leave it out with "
                "--lora-keys, or train LoRA (--train lora)"
            )
