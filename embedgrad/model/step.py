"""What one packed pass looks at: the tree's index tensors, mask and rotations, on the model's device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from embedgrad.machine import send
from embedgrad.model.config import ModelConfig, inverse_frequencies
from embedgrad.tree import TokenTree, TreeMask


@dataclass(frozen=True)
class Step:
    """One packed pass.

    ids, prompt_rows [T] int64; cos, sin [T, D/2]; masks: one per distinct sliding window; last_mask: the last layer's,
    with the queries at `rows`; kept: keys and values of the kept units, each [L, 2, n, G, D]; rows [R] int64: the
    tokens at which the last layer's output is read (None: all); prompt_positions [P] int64, or None to differentiate
    the first layer at every token; prompt_keys [P] int64: the same tokens, counted from the first kept key on.
    """

    ids: Tensor
    prompt_rows: Tensor
    cos: Tensor
    sin: Tensor
    masks: dict[int | None, TreeMask]
    last_mask: TreeMask
    kept: tuple[Tensor, ...]
    rows: Tensor | None
    prompt_positions: Tensor | None
    prompt_keys: Tensor | None

    @property
    def num_kept(self) -> int:
        return sum(unit.shape[2] for unit in self.kept)


def rotations(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D/2] of position × inverse frequency; angles in float32, or float64 for a float64 model."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions.to(wide)[:, None] * _frequencies(config, wide, positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=32)
def _frequencies(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept on the device, so that a decode step sends nothing to it."""
    return inverse_frequencies(config, dtype).to(device)


def build_step(
    config: ModelConfig,
    tree: TokenTree,
    kept: tuple[Tensor, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    rows: Tensor | None,
    prompt_only: bool = True,
) -> Step:
    """The pass over `tree` behind `kept`; index arithmetic happens on the CPU, before anything is sent to `device`."""
    windows = set(config.windows)
    cos, sin = rotations(config, tree.positions, dtype)
    on_host = {window: tree.mask(window) for window in windows}
    masks = {window: mask.to(device) for window, mask in on_host.items()}
    last = config.windows[-1]
    return Step(
        ids=send(tree.ids, device),
        prompt_rows=send(tree.prompt_rows, device),
        cos=send(cos, device),
        sin=send(sin, device),
        masks=masks,
        last_mask=masks[last] if rows is None else on_host[last].select_queries(rows).to(device),
        kept=kept,
        rows=None if rows is None else send(rows, device),
        prompt_positions=send(tree.prompt_positions, device) if prompt_only else None,
        prompt_keys=send(tree.prompt_positions + tree.num_kept, device) if prompt_only else None,
    )
