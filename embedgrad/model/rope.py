"""Rotary position embedding: its parameters in config.json and GGUF metadata, and the frequencies that follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from embedgrad.model.fields import Fields
from embedgrad.util.errors import ModelError
from embedgrad.util.shown import short

_DEFAULT_THETA = 10000.0
_BETA_FAST, _BETA_SLOW = 32.0, 1.0  # rotations within the original context; the YaRN paper's values
_KEYS = {
    "default": "",
    "linear": "",
    "llama3": "low_freq_factor high_freq_factor",
    "yarn": "attention_factor mscale mscale_all_dim beta_fast beta_slow truncate",
}
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
    attention_factor: cosines and sines are multiplied by it (yarn).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    divisors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    beta_fast: float = _BETA_FAST
    beta_slow: float = _BETA_SLOW
    truncate: bool = True

    def context(self, stated: int) -> int:
        """The context length in tokens, where the configuration states `stated`.

        Configurations for YaRN may state the length before scaling (Qwen2.5's do).
        """
        return max(stated, int(self.factor * self.original_max_position)) if self.kind == "yarn" else stated


def inverse_frequencies(rope: RopeConfig, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Angular frequency of each rotated pair in radians per position: [dim / 2] in `dtype` (float32 or float64).

    dim: head size D. RoFormer (arXiv 2104.09864) eq. 15: theta^(-2i/D). Linear scaling follows Chen et al. (arXiv
    2306.15595), yarn Peng et al. (arXiv 2309.00071) section 3.2; llama3 scaling is that of Llama 3.1. In float32 the
    operations have the same order as in transformers, so that the results are equal bit for bit.
    """
    wavelengths = rope.theta ** (torch.arange(0, dim, 2, dtype=dtype) / dim)  # [D/2], up to 2π
    frequency = 1.0 / wavelengths
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "divisors":
        return frequency / torch.tensor(rope.divisors, dtype=dtype)
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


def hf_rope(fields: Fields, max_position: int) -> RopeConfig:
    """Reads both forms: `rope_theta` and `rope_scaling`, or `rope_parameters` with everything inside.

    Raises ModelError.
    """
    where = fields.where
    old, new = fields.take("rope_scaling"), fields.take("rope_parameters")
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, dict):
            raise ModelError(f'{where}: "{name}" is {short(value)}; it should be an object or null.')
    if old and new and old != new:
        raise ModelError(f'{where}: "rope_scaling" and "rope_parameters" differ; only one of them should be there.')
    inside: dict[str, Any] = dict(old or new or {})
    name = "rope_scaling" if old else "rope_parameters"
    outer_theta, outer_original = fields.take("rope_theta"), fields.take("original_max_position_embeddings")
    if inside.get("rope_theta") is None:
        inside["rope_theta"] = _DEFAULT_THETA if outer_theta is None else outer_theta
    kind = inside.get("rope_type") or inside.get("type") or "default"
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ModelError(
            f"{where}: rotary scaling of type {short(kind)} is not supported; supported are {', '.join(_KEYS)}."
        )
    parameters = Fields(inside, where, f"{name}.")
    parameters.refuse_the_rest(frozenset(f"{_ALWAYS} {_KEYS[kind]}".split()))
    for scope in (fields, parameters):
        scope.expect("partial_rotary_factor", 1.0)
    theta = parameters.number("rope_theta")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", parameters.number("factor"))
    if outer_original is not None:
        inside["original_max_position_embeddings"] = outer_original
    original = parameters.integer("original_max_position_embeddings", max_position, none=max_position)
    if kind == "yarn":
        return _yarn(parameters, theta, original, max_position)
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if low >= high:
        raise ModelError(f"{where}: {name}.low_freq_factor {low} should be smaller than high_freq_factor {high}.")
    return RopeConfig(theta, "llama3", parameters.number("factor"), low, high, original)


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


def gguf_rope(fields: Fields, divisors: tuple[float, ...], max_position: int) -> RopeConfig:
    """Reads GGUF metadata. divisors: contents of `rope_freqs.weight`, empty where there is none. Raises ModelError."""
    theta = fields.number("rope.freq_base", _DEFAULT_THETA)
    kind = fields.take("rope.scaling.type", "none")
    if kind == "none" and fields.number("rope.scale_linear", 1.0) != 1:
        kind = "linear"
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn"):
        raise ModelError(
            f"{fields.where}: rotary scaling of type {short(kind)} is not supported; supported are none, linear, yarn, "
            f"and llama3 as rope_freqs.weight."
        )
    if any(not 0 < value < math.inf for value in divisors):
        raise ModelError(f"{fields.where}: rope_freqs.weight should hold positive numbers.")
    divisors = divisors if any(value != 1 for value in divisors) else ()
    if kind == "yarn":
        return _gguf_yarn(fields, theta, divisors, max_position)
    if kind == "linear":
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
