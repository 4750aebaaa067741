"""Maps from the embedding space of one model to that of another, fitted on the tokens that both have.

S [n, d_s] and T [n, d_t] are the embeddings of the n shared tokens, centred on their means. What is mapped is a
displacement δ = e − e₀, so that the means play no part.

- ridge: δ W with W = (SᵀS + λ I)⁻¹ Sᵀ T; λ is the one of a grid with the smallest error on tokens that were held out.
- orthogonal: s · δ U Vᵀ with Sᵀ T = U Σ Vᵀ: the map without stretching that comes nearest (Schönemann, "A generalized
  solution of the orthogonal Procrustes problem", Psychometrika 31, 1966), for d_s ≠ d_t its semi-orthogonal form, and
  s = ΣΣ / ‖S‖² the best common factor.
- relative: after the relative representations of Moschella et al., arXiv 2209.15430, in which a point is told by where
  it stands to anchors that both spaces have. Ours: the anchors are the shared tokens nearest to the row's own token,
  A [m, d_s] and B [m, d_t] their offsets from that token in both spaces, and δ is told by the coordinates c with the
  smallest ‖c A − δ‖² + μ ‖c‖²; the result is c B.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.util.errors import ConfigError

NAMES = ("ridge", "orthogonal", "relative")
LEAST = 32  # shared tokens without which nothing can be fitted
HELD_OUT = 10  # 1/HELD_OUT of the shared tokens measure the fit and choose λ
ANCHORS = 512
_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # λ as a multiple of the mean eigenvalue of SᵀS
_MU = 1e-3  # μ as a multiple of the mean square length of the offsets
_ROWS = 8192  # rows that are brought to float64 at once


@dataclass(frozen=True)
class Fit:
    """How well a map fits the tokens that were held out. cosine: mean cosine between mapped and true embeddings, both
    centred. explained: 1 − ‖S W − T‖² / ‖T‖². tokens: how many. None for a map that is not one matrix."""

    cosine: float
    explained: float
    tokens: int


class Translator(ABC):
    """A map of displacements. fit: see `Fit`."""

    name: str
    fit: Fit | None = None

    @abstractmethod
    def translate(self, displacement: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """The displacements [r, d_s] in the target's space, [r, d_t] float64. source [r, d_s], target [r, d_t]: the
        embeddings that they start from, in either space."""


@dataclass
class Linear(Translator):
    """δ W for a matrix W [d_s, d_t] float64."""

    name: str
    matrix: Tensor
    fit: Fit | None = None

    def translate(self, displacement: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """See `Translator`."""
        return displacement.double() @ self.matrix


class Relative(Translator):
    """Coordinates over the nearest anchors; see the module."""

    name = "relative"

    def __init__(self, source: Tensor, target: Tensor, anchors: int = ANCHORS) -> None:
        """source [n, d_s], target [n, d_t]: the shared tokens' embeddings."""
        self._source, self._target, self._anchors = source, target, min(anchors, len(source))
        self._unit = torch.nn.functional.normalize(source.float(), dim=1)

    def translate(self, displacement: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """See `Translator`."""
        found = [self._one(*rows) for rows in zip(displacement.double(), source, target, strict=True)]
        return torch.stack(found)

    def _one(self, delta: Tensor, own: Tensor, other: Tensor) -> Tensor:
        cosine = self._unit @ torch.nn.functional.normalize(own.float(), dim=0)
        nearest = cosine.topk(self._anchors).indices
        a = self._source[nearest].double() - own.double()
        b = self._target[nearest].double() - other.double()
        kernel = a @ a.T
        mu = _MU * float(kernel.diagonal().mean()) or 1.0
        return torch.linalg.solve(kernel + mu * torch.eye(len(a), dtype=a.dtype), a @ delta) @ b


def fit(names: Sequence[str], source: Tensor, target: Tensor, seed: int = 0) -> list[Translator]:
    """The translators `names`, some of NAMES, for shared tokens with embeddings [n, d_s] and [n, d_t] (float32).

    Raises ConfigError for an unknown name, and where fewer than LEAST tokens are shared.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ConfigError(f"there is no translator {unknown[0]!r}; choose among {', '.join(NAMES)}.")
    if len(source) < LEAST:
        raise ConfigError(
            f"the two vocabularies share {len(source)} tokens, but a translator needs at least {LEAST}; choose a "
            "target with a vocabulary of the same script."
        )
    order = list(range(len(source)))
    random.Random(f"{seed}/held out").shuffle(order)
    cut = max(1, len(order) // HELD_OUT)
    held, kept = torch.tensor(sorted(order[:cut])), torch.tensor(sorted(order[cut:]))
    moments = _moments(source, target, kept)
    found: list[Translator] = []
    for name in names:
        if name == "relative":
            found.append(Relative(source, target))
        else:
            make = _ridge if name == "ridge" else _orthogonal
            found.append(make(moments, source[held].double(), target[held].double()))
    return found


@dataclass(frozen=True)
class _Moments:
    """Means, SᵀS and SᵀT of the centred embeddings, float64."""

    mean_s: Tensor
    mean_t: Tensor
    ss: Tensor
    st: Tensor


def _moments(source: Tensor, target: Tensor, rows: Tensor) -> _Moments:
    mean_s, mean_t = source[rows].double().mean(0), target[rows].double().mean(0)
    ss = torch.zeros(len(mean_s), len(mean_s), dtype=torch.float64)
    st = torch.zeros(len(mean_s), len(mean_t), dtype=torch.float64)
    for some in rows.split(_ROWS):
        s, t = source[some].double() - mean_s, target[some].double() - mean_t
        ss += s.T @ s
        st += s.T @ t
    return _Moments(mean_s, mean_t, ss, st)


def _ridge(m: _Moments, source: Tensor, target: Tensor) -> Linear:
    values, vectors = torch.linalg.eigh(m.ss)
    projected = vectors.T @ m.st
    scale = float(values.mean().clamp_min(torch.finfo(torch.float64).tiny))
    candidates = [vectors @ (projected / (values.clamp_min(0) + r * scale)[:, None]) for r in _GRID]
    fits = [_measured(w, m, source, target) for w in candidates]
    best = max(range(len(fits)), key=lambda i: fits[i].explained)
    return Linear("ridge", candidates[best], fits[best])


def _orthogonal(m: _Moments, source: Tensor, target: Tensor) -> Linear:
    u, sigma, vh = torch.linalg.svd(m.st, full_matrices=False)
    length = m.ss.trace().clamp_min(torch.finfo(torch.float64).tiny)
    w = u @ vh * (sigma.sum() / length)
    return Linear("orthogonal", w, _measured(w, m, source, target))


def _measured(w: Tensor, m: _Moments, source: Tensor, target: Tensor) -> Fit:
    mapped, true = (source - m.mean_s) @ w, target - m.mean_t
    cosine = torch.nn.functional.cosine_similarity(mapped, true, dim=1)
    whole = true.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return Fit(float(cosine.mean()), float(1 - (mapped - true).square().sum() / whole), len(source))
