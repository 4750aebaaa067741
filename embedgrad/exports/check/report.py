"""What a check found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.util.errors import ExportError


@dataclass(frozen=True)
class CheckReport:
    """A comparison of the target's program with our engine.

    program: its name and version. conversations: how many were asked. difference: the largest difference of a
    next-token logit (or log-probability, `unit`), with the prompt as it was tuned. rounding: the part of it that comes
    from storing the prompt in the table's type, by our engine. noise: the same difference for plain text without a
    prompt, where it was measured. agreement: conversations in which both find the same token the likeliest.
    new_token_probability: the highest probability of any of the new tokens; None where it is not known.
    """

    program: str
    conversations: int
    difference: float
    rounding: float
    agreement: int
    unit: str = "logit"
    noise: float | None = None
    new_token_probability: float | None = None

    def sentence(self) -> str:
        """The result for people."""
        said = (
            f"{self.program}: ids equal in {self.conversations} of {self.conversations} conversations, largest "
            f"difference of a {self.unit} {self.difference:.2g}"
        )
        parts = [f"rounding of the prompt {self.rounding:.2g}"] if self.rounding else []
        parts += [] if self.noise is None else [f"plain text {self.noise:.2g}"]
        said += f" ({', '.join(parts)})" if parts else ""
        said += f", same likeliest token in {self.agreement} of {self.conversations}"
        if self.new_token_probability is not None:
            said += f", probability of a new token at most {self.new_token_probability:.1g}"
        return said + "."


def same_likeliest(found: Tensor, ours: Tensor, slack: float) -> bool:
    """Whether two rows of logits [V] have the same highest entry, but for a tie within `slack`."""
    return bool(ours[found.argmax()] >= ours.max() - slack)


def require_ids(program: str, name: str, query: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Raises ExportError where the target reads a conversation otherwise."""
    if list(found) != list(wanted):
        pairs = enumerate(zip([*found, -1], [*wanted, -1], strict=False))
        at = next((i for i, (one, other) in pairs if one != other), 0)
        raise ExportError(
            f"{program} reads a conversation with the prompt {name} as other ids than embedgrad: from place {at} on "
            f"{list(found)[at : at + 4]} instead of {list(wanted)[at : at + 4]} (query {query[:30]!r})."
        )


def require_close(program: str, difference: float, allowed: float, agreement: int, asked: int) -> None:
    """Raises ExportError where the target's logits are not ours."""
    if not difference <= allowed or agreement < asked:
        raise ExportError(
            f"{program} gives other logits than embedgrad: they differ by {difference:.3g} where {allowed:.3g} is "
            f"its own rounding, and {agreement} of {asked} likeliest tokens agree."
        )


def largest(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; infinite where one has a NaN."""
    difference = float((one - other).abs().max())
    return difference if difference == difference else float("inf")


def as_stored(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 rows as a table of type `dtype` gives them back."""
    return rows.to(dtype).float()
