"""Steps of several prompts at once: their trees are packed side by side into one forest, with one pass for all.

A prompt's rows stand behind those of the prompts before it. So no token of one prompt's tree has the symbol of
another's, and only the prefix, which no prompt reaches, and queries that stand before their prompt are shared.
Products with the weights are one for all prompts; the gradients are separate, because no token sees another tree. Each
prompt has its own optimiser, rate and trust region.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedgrad.engine.gradient import launch_gradient
from embedgrad.engine.model import Model
from embedgrad.engine.packed_pass import PackedPass
from embedgrad.engine.prompt_trainer import Batch, StepResult
from embedgrad.engine.runner import PassRunner
from embedgrad.engine.tree import PreparedSequence, build_tree
from embedgrad.maths.optimizer import Rule
from embedgrad.maths.trust_region import TrustRegion


class Forest:
    """The prompts that take their steps together. A step is taken when the first that was launched is read."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._waiting: list[Seat] = []
        self._runner: _Runner | None = None

    def launch(self, seat: Seat) -> None:
        """Take this prompt's next step together with the others'."""
        self._waiting.append(seat)

    def step(self) -> None:
        """Take the steps that were launched."""
        seats, self._waiting = self._waiting, []
        if not seats:
            return
        if self._runner is None or self._runner.seats != seats:
            self._runner = _Runner(self.model, seats)
        self._runner.step()


class Seat:
    """One prompt of a forest: a trainer for its own session (`embedgrad.train.pipeline.Trainer`)."""

    ahead = 0

    def __init__(
        self, model: Model, state: tuple[Tensor, Tensor, Tensor], anchor: Tensor, batches: Iterable[Batch], *,
        forest: Forest, region: TrustRegion, rule: Rule, clip_norm: float | None, policy: str,
        memory_budget: int | None,
    ) -> None:  # fmt: skip
        """See `PromptTrainer`."""
        device = model.device
        self.state_now, self.anchor = torch.stack(state).to(device), anchor.to(device)
        self.alive = torch.ones((), dtype=torch.bool, device=device)
        self.region, self.rule, self.clip_norm = region, rule, clip_norm
        self.policy, self.memory_budget = policy, memory_budget
        self.factors = torch.empty(3)
        self.batch: Batch = ([], [])
        self.result: StepResult | None = None
        self._forest = forest

    def prepare(self, batch: Batch) -> Batch:
        """The batch itself: a forest is packed when all its batches are known."""
        return batch

    def launch(self, prepared: Batch, step: int, lr: float) -> Seat:
        """See `PromptTrainer`."""
        self.batch, self.factors, self.result = prepared, self.rule.factors(step, lr), None
        self._forest.launch(self)
        return self

    def read(self, launched: Seat) -> StepResult:
        """See `PromptTrainer`."""
        if self.result is None:
            self._forest.step()
        result = self.result
        assert isinstance(result, StepResult)
        return result

    def take_back(self) -> None:
        """Nothing is launched ahead."""

    def state(self, before_last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """e, m and v on the CPU, without a step that was launched and not taken."""
        e, m, v = self.state_now.to("cpu", copy=True)
        return e, m, v


@dataclass(frozen=True)
class _Place:
    rows: slice  # of the stacked prompts
    sequences: dict[int, tuple[PreparedSequence, PreparedSequence]]  # shifted ones, by the identity of the given


class _Runner:
    """The passes of a fixed set of prompts."""

    def __init__(self, model: Model, seats: Sequence[Seat]) -> None:
        self.seats = list(seats)
        self._model = model
        self._places: list[_Place] = []
        first = 0
        for seat in seats:
            last = first + len(seat.anchor)
            self._places.append(_Place(slice(first, last), {}))
            first = last
        width = seats[0].anchor.shape[1]
        self._stacked = torch.empty(first, width, dtype=seats[0].anchor.dtype, device=model.device)
        self._grad = torch.empty(first, width, dtype=model.decoder.sum_dtype, device=model.device)
        self._runner = PassRunner(model, self._launch, [], policy=seats[0].policy, memory_budget=seats[0].memory_budget)

    def step(self) -> None:
        """One step of every prompt; each gets its `result`."""
        sequences: list[PreparedSequence] = []
        weights: list[float] = []
        counts = []
        for seat, place in zip(self.seats, self._places, strict=True):
            own, own_weights = seat.batch
            total = sum(own_weights)
            sequences += [self._shifted(place, each) for each in own]
            weights += [weight / total for weight in own_weights]
            counts.append(len(own))
            self._stacked[place.rows] = seat.state_now[0]
        tree = build_tree(sequences, weights)
        nll, correct = self._runner.launch(self._runner.prepare(tree)).read().chunk(2)
        count = len(tree.target_ids)  # without those of the padding
        share = sum(weights)  # by which the tree has divided every weight
        terms = nll[:count].double() * tree.target_weights * share
        exact = torch.ones(len(sequences), dtype=torch.bool)
        exact[tree.target_example[correct[:count] == 0]] = False
        first = 0
        for seat, place, size in zip(self.seats, self._places, counts, strict=True):
            members = (tree.target_example >= first) & (tree.target_example < first + size)
            loss = float(terms[members].sum())
            seat.result = self._moved(seat, self._grad[place.rows] * share, loss, exact[first : first + size])
            first += size

    def _shifted(self, place: _Place, sequence: PreparedSequence) -> PreparedSequence:
        known = place.sequences.get(id(sequence))
        if known is None:
            known = place.sequences[id(sequence)] = (sequence, sequence.shifted(place.rows.start))
        return known[1]

    def _moved(self, seat: Seat, grad: Tensor, loss: float, exact: Tensor) -> StepResult:
        e, m, v = seat.state_now
        if loss != loss or loss in (float("inf"), float("-inf")):
            seat.alive.fill_(False)
        report = self._model.ops.prompt_step(
            e, seat.anchor, m, v, grad.to(e.dtype), factors=seat.factors.to(e.device), region=seat.region,
            rule=seat.rule, clip_norm=seat.clip_norm, alive=seat.alive, before=torch.empty_like(seat.state_now),
        )  # fmt: skip
        return StepResult(loss, exact, type(report)(*(value.cpu() for value in vars(report).values())))

    def _launch(self, p: PackedPass, policy: str | None) -> Tensor:
        nll, predicted, grad = launch_gradient(self._model, self._stacked, p, policy)
        self._grad.copy_(grad)
        return torch.cat([nll.double(), (predicted == p.targets.ids).double()])
