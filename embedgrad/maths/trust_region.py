"""Trust regions: how far an optimised prompt may move from its anchor, and the way back when a step went too far.

The paper (EmbedGrad, arXiv 2508.03533) names a per-token cosine similarity but publishes no formula. Every definition
here is our own. A region is handed `e` `[k, d]` (the prompt) and `anchor` `[k, d]` (the embedding rows it starts from)
and knows three verbs: `project` (back to the region), `penalty` and `penalty_gradient` (a term added to the loss).

Sums are taken in float64 and the result is rounded to `e`'s type. Rounding moves a projected row by the last bits of
that type. So the cosine cone puts rows that much inside, and the measured cosine is never below tau; the other regions
count rows closer than `TOLERANCE` of their length as inside. Projections are therefore idempotent bit for bit, and rows
inside come back with their bits unchanged.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from embedgrad.util.errors import ConfigError
from embedgrad.util.shown import short

# Rounding moves a row by at most 2^-24 (float32) or 2^-53 (float64) of its length. A factor of four covers the anchor's
# share and the norm band; in float64 the sums themselves round, hence the wider margin.
TOLERANCE = {torch.float32: 2.0**-22, torch.float64: 1e-13}
PARALLEL = 1e-14  # below this share of a row's length, its part across the anchor is rounding noise of float64
# A cosine measured in float64 is off by some 1e-15 whatever the order of its sum. A row counts as inside a cone only if
# its cosine exceeds tau by more than that, so that everybody who measures it finds at least tau.
MEASURED = 2.0**-48


@dataclass(frozen=True)
class Numbers:
    """What a kernel needs to know of a region for prompts of one type; every backend projects by these.

    code: 0 no bound, 1 cosine cone, 2 L2 ball, 3 mean cosine. inside: the least cosine that counts as inside a cone.
    cosine, sine: of the angle that a row outside is turned to. close: a row also counts as inside where its part across
    the anchor is at most this share of its length (0 except for cones that are thinner than rounding). norm_min,
    norm_max: −1 for none. penalty: weight of the term that pulls to the anchor.
    """

    code: int
    tau: float = 0.0
    inside: float = -2.0
    cosine: float = 0.0
    sine: float = 0.0
    close: float = 0.0
    norm_min: float = -1.0
    norm_max: float = -1.0
    radius: float = 0.0
    relative: bool = True
    penalty: float = 0.0
    tolerance: float = TOLERANCE[torch.float32]


class TrustRegion(ABC):
    """A set of prompts around an anchor. Immutable; two regions with the same numbers are equal."""

    kind: ClassVar[str]

    @abstractmethod
    def project(self, e: Tensor, anchor: Tensor) -> Tensor:
        """The prompt `[k, d]` brought into the region, in `e`'s type; `e` itself is not changed."""

    def numbers(self, dtype: torch.dtype) -> Numbers:
        """The region for prompts of the type `dtype`, as kernels take it."""
        return Numbers(0)

    def penalty(self, e: Tensor, anchor: Tensor) -> float:
        """What the region adds to the loss; 0 for all regions but `Penalty`."""
        return 0.0

    def penalty_gradient(self, e: Tensor, anchor: Tensor) -> Tensor | None:
        """Gradient `[k, d]` of `penalty` with respect to `e`, in `e`'s type; None where there is no penalty."""
        return None

    def describe(self) -> dict[str, Any]:
        """The region as JSON-able values; `from_dict` is the inverse."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrustRegion:
        """The region that `describe` gave; `kind` may be left out for the default, "cosine".

        Raises ConfigError naming the key that is unknown or not usable.
        """
        rest = dict(values)
        kind = rest.pop("kind", CosineCone.kind)
        if not isinstance(kind, str) or kind not in KINDS:
            raise ConfigError(f"kind is {short(kind)}, but a trust region is one of {', '.join(KINDS)}.")
        allowed = [field.name for field in fields(KINDS[kind])]  # type: ignore[arg-type]
        for key in rest:
            if key not in allowed:
                near = difflib.get_close_matches(str(key), allowed, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(allowed) or 'no settings'}."
                raise ConfigError(f"the trust region {kind!r} has no setting {short(key)}{hint}")
        return KINDS[kind](**rest)


@dataclass(frozen=True)
class CosineCone(TrustRegion):
    """Per token, the circular cone `cos(e, e0) ≥ tau`, cut by an optional band `norm_min ≤ ‖e‖/‖e0‖ ≤ norm_max`.

    With û = e0/‖e0‖, a = e·û, w = e − a û, b = ‖w‖, s = √(1 − τ²), κ = a τ + b s, the nearest point of the cone is

        e                    where a ≥ τ ‖e‖
        0                    where κ ≤ 0 (the polar cone)
        κ (τ û + s w/b)      otherwise

    and the band then scales the row, which keeps its cosine. For τ ≥ 0 the cone is convex and its projection
    non-expansive. With the band the result is still the nearest point, except for a row that the cone sends to 0 with
    a floor: it is put on the ray, at `norm_min · e0`. Stated answers: τ = 1 gives the ray through e0; τ = −1 leaves the
    direction alone; a row opposite to its anchor (b = 0, a < 0) goes to 0 for τ ≥ 0, and for τ < 0, where all points
    of a circle are equally near, to the one in the plane of û and the coordinate axis that û is farthest from (to 0
    for d = 1); e = 0 is in every cone and moves only by the floor; a row that is not finite is left as it is, and so
    is one with e0 = 0, which has no direction and no scale to be held to.
    """

    tau: float = 0.95
    norm_min: float | None = None
    norm_max: float | None = None
    kind: ClassVar[str] = "cosine"

    def __post_init__(self) -> None:
        """Raises ConfigError where a number is outside its range."""
        _check_number("tau", self.tau, -1.0, 1.0)
        if self.norm_min is not None:
            _check_number("norm_min", self.norm_min, 0.0)
        if self.norm_max is not None:
            _check_number("norm_max", self.norm_max, 0.0)
        if self.norm_min is not None and self.norm_max is not None and self.norm_min > self.norm_max:
            raise ConfigError(f"norm_min ({self.norm_min}) must not be larger than norm_max ({self.norm_max}).")

    def numbers(self, dtype: torch.dtype) -> Numbers:
        """A row is put inside the cone by an angle that rounding cannot undo, so that its cosine, measured, is at least
        tau. A cone thinner than that angle (tau = 1) has no such inside: there a row within it counts as inside.
        """
        tolerance = TOLERANCE[dtype]
        angle = min(math.acos(self.tau) - tolerance, math.acos(min(self.tau + 2 * MEASURED, 1.0)))
        return Numbers(
            code=1,
            tau=self.tau,
            inside=self.tau + MEASURED if self.tau > -1.0 else -2.0,
            cosine=math.cos(max(angle, 0.0)),
            sine=math.sin(max(angle, 0.0)),
            close=2 * tolerance if angle < tolerance else 0.0,
            norm_min=-1.0 if self.norm_min is None else self.norm_min,
            norm_max=-1.0 if self.norm_max is None else self.norm_max,
            tolerance=tolerance,
        )

    def project(self, e: Tensor, anchor: Tensor) -> Tensor:
        """See the class; `e` and `anchor` `[k, d]`."""
        numbers = self.numbers(e.dtype)
        wide, wide_anchor = e.double(), anchor.double()
        anchor_norm = wide_anchor.norm(dim=1, keepdim=True)
        movable = (anchor_norm > 0) & torch.isfinite(wide).all(dim=1, keepdim=True)  # [k, 1]
        projected = torch.where(movable, _onto_cone(wide, wide_anchor, numbers), wide)
        projected = torch.where(movable, _into_band(projected, wide_anchor, anchor_norm, numbers), projected)
        return torch.where(movable & (projected != wide).any(dim=1, keepdim=True), projected.to(e.dtype), e)


def _onto_cone(e: Tensor, anchor: Tensor, n: Numbers) -> Tensor:
    unit, across, a, b = _split(e, anchor)
    length = e.norm(dim=1, keepdim=True)
    inside = (a >= n.inside * length) | ((a > 0) & (b <= n.close * length) & (n.close > 0))
    kappa = a * n.cosine + b * n.sine
    boundary = kappa * (n.cosine * unit + n.sine * across)
    has_plane = (across != 0).any(dim=1, keepdim=True) | (n.tau >= 0)
    boundary = torch.where((kappa > 0) & has_plane, boundary, torch.zeros_like(e))
    return torch.where(inside, e, boundary)


def _into_band(e: Tensor, anchor: Tensor, anchor_norm: Tensor, n: Numbers) -> Tensor:
    length = e.norm(dim=1, keepdim=True)
    if n.norm_max >= 0:
        ceiling = n.norm_max * anchor_norm
        e = torch.where(length > ceiling * (1 + n.tolerance), e * (ceiling / length), e)
    if n.norm_min >= 0:
        floor = n.norm_min * anchor_norm
        raised = torch.where(length > 0, e * (floor / length), n.norm_min * anchor)
        e = torch.where(length < floor * (1 - n.tolerance), raised, e)
    return e


@dataclass(frozen=True)
class MeanCosine(TrustRegion):
    """The whole prompt: the mean over its tokens of `cos(e_i, e0_i)` is at least `tau`.

    `project` is not the nearest point (the region is not convex, and the nearest point has no closed form). It is
    this: where the mean is below τ, find the one cosine t with `mean_i max(cos_i, t) = τ`, and turn every token whose
    cosine is below t towards its anchor, in the plane of the two and with its length kept, until its cosine is t. So
    the tokens that strayed farthest pay, all to the same angle, and the others keep their bits. The result is
    feasible, idempotent, and equivariant to rotation and to scale.

    Stated answers: a token that has no such plane (e = 0; or opposite to its anchor with d = 1) is put at its anchor
    if it has to move; e = 0 counts as cosine 0; one opposite to its anchor turns as in `CosineCone`; tokens with
    e0 = 0, and tokens that are not finite, are left alone and out of the mean.
    """

    tau: float = 0.95
    kind: ClassVar[str] = "mean_cosine"

    def __post_init__(self) -> None:
        """Raises ConfigError where tau is outside [-1, 1]."""
        _check_number("tau", self.tau, -1.0, 1.0)

    def numbers(self, dtype: torch.dtype) -> Numbers:
        """The mean that is asked for."""
        return Numbers(code=3, tau=self.tau, tolerance=TOLERANCE[dtype])

    def project(self, e: Tensor, anchor: Tensor) -> Tensor:
        """See the class; `e` and `anchor` `[k, d]`."""
        rows = (anchor != 0).any(dim=1) & torch.isfinite(e).all(dim=1)
        if not bool(rows.any()):
            return e.clone()
        wide, wide_anchor = e[rows].double(), anchor[rows].double()
        unit, across, a, b = _split(wide, wide_anchor)
        length = wide.norm(dim=1, keepdim=True)
        cosine = torch.where(length > 0, a / length, torch.zeros_like(a))
        sine = torch.where(length > 0, b / length, torch.ones_like(b))
        # Rounding turns a row by at most half of `tolerance`, and its cosine by the sine of its angle times that.
        tolerance = TOLERANCE[e.dtype]
        if float(cosine.mean()) >= self.tau - tolerance * float(sine.mean()) - tolerance**2:
            return e.clone()
        level = _water_level(cosine.flatten(), self.tau)
        turned = length * (level * unit + math.sqrt(max(0.0, 1.0 - level**2)) * across)
        has_plane = (length > 0) & (across != 0).any(dim=1, keepdim=True)
        moved = torch.where(has_plane | (level >= 1.0) & (length > 0), turned, wide_anchor)
        result = e.clone()
        result[rows] = torch.where(cosine < level, moved.to(e.dtype), e[rows])
        return result


@dataclass(frozen=True)
class L2Ball(TrustRegion):
    """Per token, `‖e − e0‖ ≤ radius`, times ‖e0‖ where `relative` (as PEFT's CPT bounds its tokens). Nearest point:
    `e0 + (e − e0) · radius/‖e − e0‖`; convex, so non-expansive. A row with e0 = 0 and a relative radius stays at 0.
    """

    radius: float = 0.3
    relative: bool = True
    kind: ClassVar[str] = "l2_ball"

    def __post_init__(self) -> None:
        """Raises ConfigError where the radius is negative or `relative` is not a truth value."""
        _check_number("radius", self.radius, 0.0)
        if not isinstance(self.relative, bool):
            raise ConfigError(f"relative is {short(self.relative)}, but must be true or false.")

    def numbers(self, dtype: torch.dtype) -> Numbers:
        """The radius, and what it is measured by."""
        return Numbers(code=2, radius=self.radius, relative=self.relative, tolerance=TOLERANCE[dtype])

    def project(self, e: Tensor, anchor: Tensor) -> Tensor:
        """See the class; `e` and `anchor` `[k, d]`."""
        wide_anchor = anchor.double()
        anchor_norm = wide_anchor.norm(dim=1, keepdim=True)
        radius = self.radius * anchor_norm if self.relative else torch.full_like(anchor_norm, self.radius)
        offset = e.double() - wide_anchor
        distance = offset.norm(dim=1, keepdim=True)
        # The rounding is of `e`, as long as its anchor, not of the offset, which may be much shorter.
        outside = distance > radius + TOLERANCE[e.dtype] * (anchor_norm + radius)
        scaled = wide_anchor + offset * (radius / distance.clamp_min(torch.finfo(torch.float64).tiny))
        return torch.where(outside, scaled.to(e.dtype), e)


@dataclass(frozen=True)
class Penalty(TrustRegion):
    """No bound, but `weight · Σ_i ½ ‖e_i − e0_i‖² / ‖e0_i‖²` is added to the loss (`‖e_i‖²/2` where e0_i = 0).

    Relative, so that it means the same in every model. Its gradient joins the loss's before clipping and AdamW's
    moments, as L2 regularisation does; unlike AdamW's weight decay, which pulls towards zero, it pulls to the anchor.
    """

    weight: float = 0.01
    kind: ClassVar[str] = "penalty"

    def __post_init__(self) -> None:
        """Raises ConfigError where the weight is negative."""
        _check_number("weight", self.weight, 0.0)

    def numbers(self, dtype: torch.dtype) -> Numbers:
        """No bound; the weight."""
        return Numbers(code=0, penalty=self.weight)

    def project(self, e: Tensor, anchor: Tensor) -> Tensor:
        """A copy of `e`: nothing is out of bounds."""
        return e.clone()

    def penalty(self, e: Tensor, anchor: Tensor) -> float:
        """The term itself, summed in float64."""
        offset, scale = self._offset(e, anchor)
        return float(0.5 * self.weight * (offset.square().sum(dim=1, keepdim=True) / scale).sum())

    def penalty_gradient(self, e: Tensor, anchor: Tensor) -> Tensor | None:
        """`weight · (e_i − e0_i) / ‖e0_i‖²` `[k, d]`."""
        offset, scale = self._offset(e, anchor)
        return (self.weight * offset / scale).to(e.dtype)

    @staticmethod
    def _offset(e: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        squared = anchor.double().square().sum(dim=1, keepdim=True)
        return e.double() - anchor.double(), torch.where(squared > 0, squared, torch.ones_like(squared))


@dataclass(frozen=True)
class NoRegion(TrustRegion):
    """The prompt may go anywhere."""

    kind: ClassVar[str] = "none"

    def project(self, e: Tensor, anchor: Tensor) -> Tensor:
        """A copy of `e`."""
        return e.clone()


KINDS: dict[str, type[TrustRegion]] = {
    region.kind: region for region in (CosineCone, MeanCosine, L2Ball, Penalty, NoRegion)
}


def cosine_similarity(e: Tensor, anchor: Tensor) -> Tensor:
    """Cosine of each row of `e` `[k, d]` with its anchor, `[k]` float64, summed in float64.

    Undefined cosines have a stated value: 0 where e = 0, 1 where e0 = 0 (such a row cannot leave its direction).
    """
    wide, wide_anchor = e.double(), anchor.double()
    length, anchor_norm = wide.norm(dim=1), wide_anchor.norm(dim=1)
    product = (wide / _nonzero(length)[:, None] * (wide_anchor / _nonzero(anchor_norm)[:, None])).sum(dim=1)
    return torch.where(anchor_norm > 0, product.clamp(-1.0, 1.0), torch.ones_like(product))


def norm_ratio(e: Tensor, anchor: Tensor) -> Tensor:
    """‖e‖/‖e0‖ per row, `[k]` float64; 1 where e0 = 0."""
    length, anchor_norm = e.double().norm(dim=1), anchor.double().norm(dim=1)
    return torch.where(anchor_norm > 0, length / _nonzero(anchor_norm), torch.ones_like(length))


def _nonzero(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, torch.ones_like(values))


def _check_number(name: str, value: object, low: float, high: float | None = None) -> None:
    allowed = f"a number from {low:g} to {high:g}" if high is not None else f"a number of at least {low:g}"
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not usable or value < low or (high is not None and value > high):  # type: ignore[operator]
        raise ConfigError(f"{name} is {short(value)}, but must be {allowed}.")


def _split(e: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """û `[k, d]`, the unit vector across it towards e `[k, d]`, and e's coordinates a, b `[k, 1]` on the two.

    Where e has no part across û, the vector across is the first of the coordinate axes that û is farthest from, made
    orthogonal to û, and b = 0; with d = 1 there is none, and it is 0.
    """
    unit = anchor / _nonzero(anchor.norm(dim=1, keepdim=True))
    a = (e * unit).sum(dim=1, keepdim=True)
    w = e - a * unit
    w = w - (w * unit).sum(dim=1, keepdim=True) * unit
    b = w.norm(dim=1, keepdim=True)
    parallel = b <= PARALLEL * e.norm(dim=1, keepdim=True)
    b = torch.where(parallel, torch.zeros_like(b), b)
    axis = torch.zeros_like(unit)
    axis.scatter_(1, unit.abs().argmin(dim=1, keepdim=True), 1.0)
    axis = axis - (axis * unit).sum(dim=1, keepdim=True) * unit
    axis = torch.zeros_like(axis) if e.shape[1] == 1 else axis
    w = torch.where(parallel, axis, w)
    across = w / _nonzero(w.norm(dim=1, keepdim=True))
    # A w of few bits is not quite orthogonal after its first pass; now it has unit length, so the second one holds.
    across = across - (across * unit).sum(dim=1, keepdim=True) * unit
    return unit, across / _nonzero(across.norm(dim=1, keepdim=True)), a, b


def _water_level(cosine: Tensor, tau: float) -> float:
    """The t with mean(max(cosine, t)) = tau, for cosines `[k]` whose mean is below tau."""
    ordered = torch.sort(cosine).values.cpu()
    count = ordered.numel()
    rest = torch.cat([ordered.flip(0).cumsum(0).flip(0)[1:], ordered.new_zeros(1)])  # sum of all above index j
    filled = torch.arange(1, count + 1, dtype=ordered.dtype, device=ordered.device)
    levels = (count * tau - rest) / filled  # the level if the j + 1 lowest are raised
    # The right number of raised tokens is the first for which the level stays below the next token.
    following = torch.cat([ordered[1:], ordered.new_full((1,), math.inf)])
    return min(1.0, float(levels[int((levels <= following).int().argmax())]))
