"""Rotary position embedding: its parameters in config.json and GGUF metadata, and the frequencies that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from embedgrad.model.families import Family
from embedgrad.model.fields import Fields
from embedgrad.model.layer_kinds import FULL, SLIDING
from embedgrad.util.errors import ModelError
from embedgrad.util.shown import short

_DEFAULT_THETA = 10000.0
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # rotations within the original context; the YaRN paper's values
_KEYS = {
    "default": "",
    "linear": "",
    "llama3": "low_freq_factor high_freq_factor",
    "yarn": "attention_factor mscale mscale_all_dim beta_fast beta_slow truncate",
    "longrope": "attention_factor short_factor long_factor",
}
_ALIASES = {"su": "longrope"}  # Phi-3's first name for it
# Keys that every kind may have; one that does not read them ignores them, as transformers does.
_ALWAYS = "rope_type type rope_theta partial_rotary_factor factor original_max_position_embeddings finetuned"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    theta: base of the frequencies. kind: how the frequencies are scaled.
    - default: not at all.
    - linear: every frequency is divided by `factor`.
    - llama3: low frequencies are divided by `factor`, with a smooth transition (Llama 3.1).
    - yarn: likewise, with a transition between the pairs that turn `beta_slow` and `beta_fast` times within
      `original_max_position` tokens, whose indices are rounded outwards with `truncate`.
    - divisors: frequency i is divided by divisors[i]; GGUF files store llama3 scaling in this form.
    - longrope: the same (arXiv 2402.13753) within a context of `original_max_position` tokens, and in one of up to
      `longest` tokens with `long_divisors` instead, where the model was loaded with `long`. transformers chooses by
      the longest text of a batch and computes all keys anew where an answer grows beyond; vLLM and llama.cpp choose by
      the context that they are started with, as we do, so that a text's result does not depend on its neighbours.
    - none: nothing is rotated.
    attention_factor: cosines and sines are multiplied by it (yarn, longrope). part: the share of a head's columns that
    is rotated, the first ones.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()
    longest: int = 0
    long: bool = False
    attention_factor: float = 1.0
    beta_fast: float = _BETA_FAST
    beta_slow: float = _BETA_SLOW
    truncate: bool = True
    part: float = 1.0

    def rotated(self, head_dim: int) -> int:
        """How many of a head's columns are rotated; even."""
        return int(head_dim * self.part) // 2 * 2

    def context(self, stated: int) -> int:
        """The context length in tokens, where the configuration states `stated`.

        Configurations for YaRN may state the length before scaling (Qwen2.5's do).
        """
        if self.kind == "longrope":
            return self.longest if self.long else min(stated, self.original_max_position)
        return max(stated, int(self.factor * self.original_max_position)) if self.kind == "yarn" else stated


UNROTATED = RopeConfig(1.0, "none")


def rotary_order(rope: RopeConfig, head_dim: int) -> torch.Tensor | None:
    """The columns [D] of a head in an order in which pair i is (i, i + D/2); None where they stand so already.

    A model that rotates R of D columns pairs i with i + R/2. The pairs that follow are not rotated: their frequency is
    0. q and k in the same order have the same products.
    """
    turned, half = rope.rotated(head_dim), head_dim // 2
    if turned == head_dim:
        return None
    columns, rest = torch.arange(head_dim), half - turned // 2
    first, second = columns[: turned // 2], columns[turned // 2 : turned]
    return torch.cat([first, columns[turned : turned + rest], second, columns[turned + rest :]])


def rotation_table(
    rope: RopeConfig, head_dim: int, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, D/2] of position × inverse frequency, times the attention factor; 1 and 0 where nothing turns.

    `dtype` (float32 or float64) is the type of the angles.
    """
    turned = rope.rotated(head_dim) // 2 if rope.kind != "none" else 0
    angles = positions.to(dtype)[:, None] * _frequencies(rope, head_dim, dtype, positions.device)
    cos, sin = angles.cos(), angles.sin()
    if rope.attention_factor != 1:
        cos[:, :turned] *= rope.attention_factor
        sin *= rope.attention_factor
    return cos, sin


@lru_cache(maxsize=32)
def _frequencies(rope: RopeConfig, head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The frequencies on the device. They stay there, so that a decode step sends nothing."""
    return inverse_frequencies(rope, head_dim, dtype).to(device)


def inverse_frequencies(rope: RopeConfig, head_dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Angular frequency of each pair in radians per position: [D / 2] in `dtype` (float32 or float64).

    The pairs that are not rotated come last and have the frequency 0. RoFormer (arXiv 2104.09864) eq. 15:
    theta^(-2i/D), with the number of rotated columns as D. Linear scaling follows Chen et al. (arXiv 2306.15595), yarn
    Peng et al. (arXiv 2309.00071) section 3.2; llama3 scaling is that of Llama 3.1. In float32 the
    operations have the same order as in transformers, so that the results are equal bit for bit.
    """
    dim = rope.rotated(head_dim)
    if rope.kind == "none":
        return torch.zeros(head_dim // 2, dtype=dtype)
    if dim < head_dim:
        turned = inverse_frequencies(replace(rope, part=1.0), dim, dtype)
        return torch.cat([turned, turned.new_zeros(head_dim // 2 - len(turned))])
    wavelengths = rope.theta ** (torch.arange(0, dim, 2, dtype=dtype) / dim)  # [D/2], up to 2π
    frequency = 1.0 / wavelengths
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "divisors":
        return frequency / torch.tensor(rope.divisors, dtype=dtype)
    if rope.kind == "longrope":
        divisors = rope.long_divisors if rope.long else rope.divisors
        return 1.0 / (torch.tensor(divisors, dtype=dtype) * wavelengths)
    if rope.kind == "yarn":
        kept = 1 - _ramp(rope, dim).to(dtype)
        return 1.0 / (rope.factor * wavelengths) * (1 - kept) + frequency * kept
    if rope.kind != "llama3":
        return frequency
    longest = rope.original_max_position / rope.low_freq_factor
    shortest = rope.original_max_position / rope.high_freq_factor
    wavelength = 2 * math.pi / frequency
    scaled = torch.where(wavelength > longest, frequency / rope.factor, frequency)
    span = rope.high_freq_factor - rope.low_freq_factor
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / span
    between = (1 - smooth) * scaled / rope.factor + smooth * scaled
    return torch.where(~(wavelength < shortest) * ~(wavelength > longest), between, scaled)


def _ramp(rope: RopeConfig, dim: int) -> torch.Tensor:
    """YaRN's γ, reversed: for each pair from 0 (its frequency stays) to 1 (it is divided by the factor), [dim / 2]."""

    def pair(rotations: float) -> float:
        """The index of the pair that turns `rotations` times within the original context."""
        return dim * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """YaRN's √(1/t) for a scaling factor (arXiv 2309.00071, eq. 22), times DeepSeek's weight of its logarithm."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def hf_ropes(fields: Fields, kind: Family, max_position: int) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotations, and those of layers with a window where the family has others.

    Reads both forms: `rope_theta` and `rope_scaling`, or `rope_parameters` with everything inside, for each type of
    layer where there are two. Raises ModelError.
    """
    where = fields.where
    old, new = fields.take("rope_scaling"), fields.take("rope_parameters")
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, dict):
            raise ModelError(f'{where}: "{name}" is {short(value)}; it should be an object or null.')
    if kind.local_theta is None:
        if old and new and old != new:
            raise ModelError(f'{where}: "rope_scaling" and "rope_parameters" differ; only one of them should be there.')
        name = "rope_scaling" if old else "rope_parameters"
        return _hf_rope(fields, kind, old or new or {}, name, max_position), None
    parts: dict[str, Any] = {}
    for layers, theta in ((FULL, fields.take("rope_theta")), (SLIDING, fields.take("rope_local_base_freq"))):
        part = (new or {}).get(layers) or {}
        if not isinstance(part, Mapping):
            raise ModelError(f'{where}: "rope_parameters.{layers}" is {short(part)}; it should be an object or null.')
        default = kind.local_theta if layers == SLIDING else kind.defaults.get("rope_theta", _DEFAULT_THETA)
        theta = part.get("rope_theta", default if theta is None else theta)
        parts[layers] = {**part, **((old or {}) if layers == FULL else {}), "rope_theta": theta}
    beside = [name for name in new or {} if name not in parts]
    if beside:
        raise ModelError(f'{where}: "rope_parameters" has {short(beside[0])}; it should have {FULL} and {SLIDING}.')
    full, local = (_hf_rope(fields, kind, parts[layers], "rope_parameters", max_position) for layers in (FULL, SLIDING))
    return full, local


def _hf_rope(fields: Fields, kind: Family, given: Mapping[str, Any], name: str, max_position: int) -> RopeConfig:
    where, inside = fields.where, dict(given)
    outer_theta, outer_original = fields.take("rope_theta"), fields.take("original_max_position_embeddings")
    if inside.get("rope_theta") is None:
        default = kind.defaults.get("rope_theta", _DEFAULT_THETA)
        inside["rope_theta"] = default if outer_theta is None else outer_theta
    scaling = inside.get("rope_type") or inside.get("type") or "default"
    scaling = _ALIASES.get(scaling, scaling) if isinstance(scaling, str) else scaling
    if not isinstance(scaling, str) or scaling not in _KEYS:
        raise ModelError(
            f"{where}: rotary scaling of type {short(scaling)} is not supported; supported are {', '.join(_KEYS)}."
        )
    parameters = Fields(inside, where, f"{name}.")
    parameters.refuse_the_rest(frozenset(f"{_ALWAYS} {_KEYS[scaling]}".split()))
    part = 1.0
    for scope in (parameters, fields):
        if not kind.partial_rotation:
            scope.expect("partial_rotary_factor", 1.0)
        elif scope.take("partial_rotary_factor") is not None:
            part = scope.number("partial_rotary_factor")
            break
    if part > 1:
        raise ModelError(f'{where}: "partial_rotary_factor" is {part}; it should be at most 1.')
    theta = parameters.number("rope_theta")
    if scaling == "default":
        return RopeConfig(theta, part=part)
    if scaling == "linear":
        return RopeConfig(theta, "linear", parameters.number("factor"), part=part)
    if outer_original is not None:
        inside["original_max_position_embeddings"] = outer_original
    default = kind.defaults.get("original_max_position_embeddings", max_position)
    original = parameters.integer("original_max_position_embeddings", default, none=default)
    if scaling == "yarn":
        return replace(_yarn(parameters, theta, original, max_position), part=part)
    if scaling == "longrope":
        return replace(_longrope(parameters, theta, original, max_position), part=part)
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if low >= high:
        raise ModelError(f"{where}: {name}.low_freq_factor {low} should be smaller than high_freq_factor {high}.")
    return RopeConfig(theta, "llama3", parameters.number("factor"), low, high, original, part=part)


def _longrope(parameters: Fields, theta: float, original: int, max_position: int) -> RopeConfig:
    """LongRoPE by transformers' rules."""
    factor = max_position / original if parameters.take("factor") is None else parameters.number("factor")
    stated = parameters.take("attention_factor")
    attention = longrope_attention(factor, original) if stated is None else parameters.number("attention_factor")
    short_factors, long_factors = (_factors(parameters, name) for name in ("short_factor", "long_factor"))
    if not short_factors:
        raise ModelError(_no_factors(parameters, "short_factor"))
    return _long(theta, original, max_position, (short_factors, long_factors), attention)


def _factors(parameters: Fields, name: str) -> tuple[float, ...]:
    given = parameters.take(name)
    if given is None:
        return ()
    if not isinstance(given, list) or not given or not all(_positive(x) for x in given):
        raise ModelError(_no_factors(parameters, name))
    return tuple(map(float, given))


def _no_factors(parameters: Fields, name: str) -> str:
    given = short(parameters.take(name))
    return f'{parameters.where}: "{parameters.prefix}{name}" is {given}; it should be a list of positive numbers.'


def longrope_attention(factor: float, original: int) -> float:
    """LongRoPE's factor of cosines and sines for a context of `factor` times `original` tokens."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def _long(
    theta: float, original: int, longest: int, divisors: tuple[tuple[float, ...], tuple[float, ...]], attention: float
) -> RopeConfig:
    return RopeConfig(
        theta, "longrope", original_max_position=original, divisors=divisors[0], long_divisors=divisors[1],
        longest=longest, attention_factor=attention,
    )  # fmt: skip


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _yarn(parameters: Fields, theta: float, original: int, max_position: int) -> RopeConfig:
    """YaRN by transformers' rules, which also say what a missing or null key means."""

    def given(name: str) -> float | None:
        return None if parameters.take(name) in (None, 0) else parameters.number(name)

    factor = max_position / original if parameters.take("factor") is None else parameters.number("factor")
    scale, scale_all, attention = given("mscale"), given("mscale_all_dim"), parameters.take("attention_factor")
    if attention is not None:
        attention = parameters.number("attention_factor")
    elif scale and scale_all:
        attention = yarn_attention(factor, scale) / yarn_attention(factor, scale_all)
    else:
        attention = yarn_attention(factor)
    return _checked_yarn(
        RopeConfig(
            theta, "yarn", factor, original_max_position=original, attention_factor=attention,
            beta_fast=given("beta_fast") or _BETA_FAST, beta_slow=given("beta_slow") or _BETA_SLOW,
            truncate=parameters.boolean("truncate", True),
        ),
        parameters,
    )  # fmt: skip


def _checked_yarn(rope: RopeConfig, fields: Fields) -> RopeConfig:
    if rope.theta <= 1:
        raise ModelError(f"{fields.where}: the base {rope.theta} of yarn's frequencies should be above 1.")
    if rope.beta_slow > rope.beta_fast:
        raise ModelError(f"{fields.where}: {fields.prefix}beta_slow should not be above beta_fast.")
    return rope


Divisors = tuple[tuple[float, ...], tuple[float, ...]]
"""Of a GGUF file: rope_freqs.weight or rope_factors_short.weight, and rope_factors_long.weight; empty where missing."""


def gguf_ropes(
    fields: Fields, kind: Family, divisors: Divisors, max_position: int, head_dim: int
) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotations, and those of layers with a window where the family has others, from GGUF metadata.

    Raises ModelError.
    """
    turned = fields.integer("rope.dimension_count", head_dim)
    if turned != head_dim and (not kind.partial_rotation or turned > head_dim):
        raise ModelError(
            f"{fields.where}: {fields.prefix}rope.dimension_count is {turned}; supported is {head_dim} only."
        )
    part = 1.0 if turned == head_dim else (turned + 0.5) / head_dim  # in the middle, safe from rounding
    rope = replace(_gguf_rope(fields, kind, divisors, max_position), part=part)
    if rope.kind != "longrope":
        fields.expect("rope.scaling.attn_factor", 1.0)
    if kind.local_theta is None:
        return rope, None
    return rope, RopeConfig(fields.number("rope.freq_base_swa", kind.local_theta))


def _gguf_rope(fields: Fields, kind: Family, both: Divisors, max_position: int) -> RopeConfig:
    divisors = both[0]
    theta = fields.number("rope.freq_base", kind.defaults.get("rope_theta", _DEFAULT_THETA))
    if any(not 0 < value < math.inf for values in both for value in values):
        raise ModelError(f"{fields.where}: rope_freqs.weight should hold positive numbers.")
    attention = fields.take("rope.scaling.attn_factor")
    if kind.partial_rotation and divisors:  # Phi: the factors of LongRoPE
        original = fields.integer("rope.scaling.original_context_length", max_position)
        attention = longrope_attention(max_position / original, original) if attention is None else attention
        if not _positive(attention):
            fields.number("rope.scaling.attn_factor")
        return _long(theta, original, max_position, both, float(attention))
    scaling = fields.take("rope.scaling.type", "none")
    if scaling == "none" and fields.number("rope.scale_linear", 1.0) != 1:
        scaling = "linear"
    if not isinstance(scaling, str) or scaling not in ("none", "linear", "yarn"):
        raise ModelError(
            f"{fields.where}: rotary scaling of type {short(scaling)} is not supported; supported are none, linear, "
            f"yarn, and llama3 as rope_freqs.weight."
        )
    divisors = divisors if any(value != 1 for value in divisors) else ()
    if scaling == "yarn":
        return _gguf_yarn(fields, theta, divisors, max_position)
    if scaling == "linear":
        factor = fields.number("rope.scaling.factor" if "rope.scaling.factor" in fields.values else "rope.scale_linear")
        if divisors:
            return RopeConfig(theta, "divisors", divisors=tuple(factor * value for value in divisors))
        return RopeConfig(theta, "linear", factor)
    return RopeConfig(theta, "divisors", divisors=divisors) if divisors else RopeConfig(theta)


def _gguf_yarn(fields: Fields, theta: float, divisors: tuple[float, ...], max_position: int) -> RopeConfig:
    """YaRN with the paper's constants, which are those of llama.cpp."""
    if divisors:
        raise ModelError(f"{fields.where}: yarn together with rope_freqs.weight is not supported.")
    factor = fields.number("rope.scaling.factor")
    original = fields.integer("rope.scaling.original_context_length", max_position)
    return _checked_yarn(
        RopeConfig(theta, "yarn", factor, original_max_position=original, attention_factor=yarn_attention(factor)),
        fields,
    )
