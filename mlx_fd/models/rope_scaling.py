"""Scaled rotary positions as mlx-lm computes them, in the words of GGUF and of transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_fd.errors import UserError

if TYPE_CHECKING:
    from mlx_fd.models.families import Family

FREQS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TABLES = frozenset({FREQS, LONG, SHORT})
# Positions are turned as by "default" on text: the three sections of mrope are equal there.
UNSCALED = ("default", "mrope")
# Longrope's entries for long texts, which mlx-lm takes for all texts, and those for short ones.
_BY_LENGTH = {"long_factor": "short_factor", "long_mscale": "short_mscale"}
_PUBLISHED = "published_"
# mlx_lm.models.rope_utils takes these where a model's configuration has none.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
# Further entries of YaRN change its attention factor, for which GGUF has another rule.
_PLAIN_YARN = {"mscale": 1, "mscale_all_dim": 0}


@dataclass(frozen=True)
class Scaling:
    """What a file holds of it.

    Attributes:
        metadata: key (after the architecture) -> value.
        tables: name of a tensor -> numbers, float32.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, np.ndarray] = field(default_factory=dict)


def kind_of(scaling: dict[str, Any] | None) -> str:
    """The kind of a ``rope_scaling``, which two keys may say; one name for each.

    ``"su"`` is longrope, and what scales nothing on text is the default.
    """
    scaling = scaling or {}
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    if kind in UNSCALED:
        return "default"
    return "longrope" if kind == "su" else kind


def rotary_dims(args: Any, head_dim: int) -> int:
    """How many of a head's numbers are rotated."""
    return int(head_dim * (getattr(args, "partial_rotary_factor", None) or 1.0))


def long_attention_factor(longest: int, original: int) -> float:
    """By how much longrope multiplies queries and keys (Phi-3's reference code)."""
    if longest <= original:
        return 1.0
    return math.sqrt(1 + math.log(longest / original) / math.log(original))


def is_for_short_texts(scaling: dict[str, Any]) -> bool:
    """Whether longrope's entries for short texts stand in the place of those for long ones."""
    return any(_PUBLISHED + long in scaling for long in _BY_LENGTH)


def for_short_texts(scaling: dict[str, Any]) -> dict[str, Any]:
    """A ``rope_scaling`` with which mlx-lm computes what is published for short texts.

    Published models of longrope have factors for texts up to their original length, and others for
    longer ones. mlx-lm has the others for every text.

    Args:
        scaling: as it is published; or made here, and then it is the same again.

    Returns:
        What was in an entry's place is beside it, for :func:`as_published`.
    """
    made = dict(scaling)
    for long, short in _BY_LENGTH.items() if kind_of(scaling) == "longrope" else ():
        if scaling.get(short) is not None and scaling.get(long) not in (None, scaling[short]):
            made |= {_PUBLISHED + long: scaling[long], long: scaling[short]}
    return made


def as_published(scaling: dict[str, Any]) -> dict[str, Any]:
    """The ``rope_scaling`` that :func:`for_short_texts` was given."""
    own = {key: value for key, value in scaling.items() if not key.startswith(_PUBLISHED)}
    return {**own, **{key: scaling.get(_PUBLISHED + key, value) for key, value in own.items()}}


def for_transformers(family: Family, args: Any) -> dict[str, Any] | None:
    """A ``rope_scaling`` from which transformers computes what mlx-lm does; ``None``: no entry.

    transformers reads entries that mlx-lm passes over, and has other values for missing ones.

    Args:
        family: the model's.
        args: its ``ModelArgs``.
    """
    scaling: dict[str, Any] = dict(getattr(args, "rope_scaling", None) or {})
    kind = kind_of(scaling)
    if kind == "default":
        return {"rope_type": "default"} if family.scaled_in_transformers else None
    if kind == "yarn":
        filled = {**_YARN, **_PLAIN_YARN, **scaling}
        top, bottom = (
            0.1 * scale * math.log(filled["factor"]) + 1.0 if filled["factor"] > 1 else 1.0
            for scale in (filled["mscale"], filled["mscale_all_dim"])
        )
        del filled["mscale"], filled["mscale_all_dim"]
        # The range of frequencies that are mixed has whole numbers for its ends.
        return {**scaling, **filled, "attention_factor": top / bottom, "truncate": True}
    if kind == "longrope":
        original = getattr(args, "original_max_position_embeddings", None)
        original = original or scaling["original_max_position_embeddings"]
        factor = long_attention_factor(args.max_position_embeddings, original)
        return {**as_published(scaling), "attention_factor": factor}
    return scaling


def to_file(family: Family, args: Any, head_dim: int) -> Scaling:
    """What a file says of a model's scaling.

    Args:
        family: the model's.
        args: its ``ModelArgs``.
        head_dim: size of a head.

    Raises:
        UserError: a kind that llama.cpp does not compute as mlx-lm does.
    """
    scaling: dict[str, Any] = dict(getattr(args, "rope_scaling", None) or {})
    kind = kind_of(scaling)
    unusual = sorted(key for key, usual in _PLAIN_YARN.items() if scaling.get(key, usual) != usual)
    if kind not in family.rope or (kind == "yarn" and unusual):
        why = f" with {unusual[0]}" if kind == "yarn" and unusual else ""
        raise UserError(
            f"--format gguf: rotary positions of type {kind}{why} are not written for "
            f"{family.name}; {', '.join(sorted(family.rope))} are"
        )
    if kind == "linear":
        return Scaling(
            {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
        )
    if kind == "yarn":
        filled = {**_YARN, **scaling}
        return Scaling(
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": float(filled["factor"]),
                "rope.scaling.original_context_length": filled["original_max_position_embeddings"],
                "rope.scaling.yarn_beta_fast": float(filled["beta_fast"]),
                "rope.scaling.yarn_beta_slow": float(filled["beta_slow"]),
            }
        )
    if kind == "llama3":
        filled = {**_LLAMA3, **scaling}
        divisors = llama3_divisors(
            args.rope_theta,
            head_dim,
            filled["factor"],
            filled["low_freq_factor"],
            filled["high_freq_factor"],
            filled["original_max_position_embeddings"],
        )
        return Scaling(tables={FREQS: divisors.astype(np.float32)})
    if kind == "longrope":
        original = args.original_max_position_embeddings
        factors = np.asarray(scaling["long_factor"], dtype=np.float32)
        factor = long_attention_factor(args.max_position_embeddings, original)
        # llama.cpp chooses a table by the context that it is started with, not by the text; the one
        # that the student was trained with must count.
        return Scaling(
            {
                "rope.scaling.type": "longrope",
                "rope.scaling.original_context_length": original,
                "rope.scaling.attn_factor": factor,
            },
            {LONG: factors, SHORT: factors},
        )
    return Scaling()


def llama3_divisors(
    base: float, head_dim: int, factor: float, low: float, high: float, original: int
) -> np.ndarray:
    """What Llama 3 divides each rotary frequency by, [head_dim / 2] (Llama 3.1's reference code).

    Args:
        base: the rotary base.
        head_dim: size of a head.
        factor: by how much the lowest frequencies are slowed down.
        low: waves longer than ``original / low`` are slowed down whole.
        high: waves shorter than ``original / high`` stay as they are.
        original: the context length before the scaling.
    """
    wavelength = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


@dataclass(frozen=True)
class Stored:
    """What a file has.

    Attributes:
        kind: ``rope.scaling.type``.
        factor: ``rope.scaling.factor``, if there.
        original: ``rope.scaling.original_context_length``, if there.
        attention: ``rope.scaling.attn_factor``, if there.
        beta_fast: of YaRN, if there.
        beta_slow: of YaRN, if there.
        tables: those of :data:`TABLES` that are there, in float64.
    """

    kind: str
    factor: float | None
    original: int | None
    attention: float | None
    beta_fast: float | None
    beta_slow: float | None
    tables: dict[str, np.ndarray]


def from_file(
    stored: Stored, family: Family, config: dict[str, Any], dims: int
) -> dict[str, Any] | None:
    """The ``rope_scaling`` of a file, or ``None``.

    GGUF keeps Llama 3's frequency scaling only as a table of divisors. Its rule (Llama 3.1
    reference code) has four parameters, three of them the same in every published model, so the
    largest divisor gives the fourth; the table is then computed again and compared.

    Args:
        stored: what the file has.
        family: the model's.
        config: what is known of its configuration.
        dims: numbers of a head that are rotated.

    Raises:
        ValueError: what is wrong with it, or not supported.
    """
    kind = stored.kind
    if kind == "none":
        # Llama 3's is said by its table alone, and longrope was once.
        by_table = "longrope" if {LONG, SHORT} <= stored.tables.keys() else "default"
        kind = "llama3" if FREQS in stored.tables else by_table
    tables = {"llama3": {FREQS}, "longrope": {LONG, SHORT}}.get(kind, set())
    if kind not in family.rope or stored.tables.keys() != tables:
        raise ValueError(
            f"rotary scaling of type {stored.kind}"
            + (f" with {', '.join(sorted(stored.tables))}" if stored.tables else "")
            + f" is not supported for {family.gguf}; "
            f"{', '.join(sorted(family.rope))} are"
        )
    for name, numbers in stored.tables.items():
        if numbers.size != dims // 2 or not np.all(np.isfinite(numbers)) or (numbers <= 0).any():
            raise ValueError(f"the tensor {name} has an unexpected shape or numbers")
    if kind in ("linear", "yarn") and not stored.factor:
        raise ValueError("the metadata entry rope.scaling.factor is missing")
    if kind in ("yarn", "longrope") and not stored.original:
        raise ValueError("the metadata entry rope.scaling.original_context_length is missing")
    if kind != "longrope" and stored.attention not in (None, 1):
        raise ValueError(f"mlx-lm has no rope.scaling.attn_factor ({stored.attention}) for {kind}")
    if kind == "linear":
        return {"type": "linear", "factor": stored.factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn",
            "factor": stored.factor,
            "original_max_position_embeddings": stored.original,
            "beta_fast": _YARN["beta_fast"] if stored.beta_fast is None else stored.beta_fast,
            "beta_slow": _YARN["beta_slow"] if stored.beta_slow is None else stored.beta_slow,
        }
    if kind == "longrope":
        longest, original = config["max_position_embeddings"], stored.original
        assert original is not None
        wanted = long_attention_factor(longest, original)
        if not math.isclose(stored.attention or wanted, wanted, rel_tol=1e-3):
            raise ValueError(f"its attention factor {stored.attention} is not longrope's {wanted}")
        return {
            "type": "longrope",
            "original_max_position_embeddings": original,
            # The shortest decimals of float32 numbers.
            "long_factor": [float(str(np.float32(x))) for x in stored.tables[LONG]],
            "short_factor": [float(str(np.float32(x))) for x in stored.tables[SHORT]],
        }
    if kind == "llama3":
        divisors = stored.tables[FREQS]
        factor = float(np.round(divisors.max(), 3))
        low, high, original = 1.0, 4.0, 8192
        again = llama3_divisors(config["rope_theta"], dims, factor, low, high, original)
        if not np.allclose(again, divisors, rtol=1e-3):
            raise ValueError("its rotary frequencies (rope_freqs.weight) are not Llama 3's")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
    return None
