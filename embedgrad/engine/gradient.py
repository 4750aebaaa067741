"""Loss of a batch and its gradient with respect to the prompt's embeddings; nothing else is differentiated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from embedgrad.data.example import Example, check_examples
from embedgrad.engine.loss import target_loss
from embedgrad.engine.model import Model
from embedgrad.engine.packed_pass import PackedPass, build_pass
from embedgrad.engine.tree import TokenTree, build_tree
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered, render
from embedgrad.util.errors import DataError, PromptError, TrainingError
from embedgrad.util.host import send


@dataclass(frozen=True)
class Details:
    """What a pass says about each example.

    example_loss [B]: mean negative log-likelihood of the example's targets (nats). token_nll: one tensor per example,
    one value per target. exact [B] bool: every target is the arg-max given the ones before it, which is the same as
    saying that greedy generation would give exactly this target.
    """

    example_loss: Tensor
    token_nll: list[Tensor]
    exact: Tensor


@dataclass(frozen=True)
class _Omit:
    """What the engine leaves out; each can be switched off to show that it changes nothing but cost.

    Without `whole_logits` the loss holds all logits at once.
    """

    prefix_copies: bool = True
    prefix_steps: bool = True
    last_layer: bool = True
    first_layer: bool = True
    other_logits: bool = True
    whole_logits: bool = True


@overload
def loss_and_grad(
    model: Model, prompt: SoftPrompt, batch: Sequence[Example], *, policy: str = ..., memory_budget: int | None = ...,
    details: Literal[False] = ..., _omit: _Omit = ...,
) -> tuple[float, Tensor]: ...  # fmt: skip
@overload
def loss_and_grad(
    model: Model, prompt: SoftPrompt, batch: Sequence[Example], *, policy: str = ..., memory_budget: int | None = ...,
    details: Literal[True], _omit: _Omit = ...,
) -> tuple[float, Tensor, Details]: ...  # fmt: skip
def loss_and_grad(
    model: Model,
    prompt: SoftPrompt,
    batch: Sequence[Example],
    *,
    policy: str = "auto",
    memory_budget: int | None = None,
    details: bool = False,
    _omit: _Omit = _Omit(),
) -> tuple[float, Tensor] | tuple[float, Tensor, Details]:
    """Loss (nats) and gradient [k, d] of the prompt's embeddings; with `details=True` also `Details`.

    The loss is the mean over examples (weighted by `Example.weight`) of the mean negative log-likelihood of their
    targets. The gradient is float32 on the CPU, or float64 when the model computes in float64. Same inputs, same bits.

    policy: what is kept for the backward pass: "all", "mlp", "layer", or "auto", the fastest that stays within
    `memory_budget` bytes of activations (default: half of the memory that is free now).

    Raises DataError (no examples, an empty query or target, weights that are all 0), PromptError (a prompt of another
    model, or with NaN or infinity in it), ContextError (a sequence longer than the context), ConfigError (unknown
    policy, budget too small), TrainingError (a loss or gradient that is not finite).
    """
    sequences = rendered_batch(model, prompt, batch)
    tree = build_tree(
        sequences, [example.weight for example in batch], share=_omit.prefix_copies, keep=_omit.prefix_steps
    )
    with model.lock:
        p = pass_over(model, tree, _omit)
        chosen, nbytes = model.plan_memory([p.size], policy, memory_budget)
        model.arena.begin(nbytes)
        embeddings = send(prompt.embeddings, model.device)
        nll, predicted, grad = launch_gradient(model, embeddings, p, chosen, whole=not _omit.whole_logits)
        nll, grad = nll.cpu(), grad.cpu()  # only now is the device waited for
    check_finite(model, prompt, {"loss": nll, "gradient": grad})
    loss = loss_of(tree, nll)
    if not details:
        return loss, grad
    return loss, grad, details_of(tree, nll, predicted.cpu() == tree.target_ids, len(batch))


def launch_gradient(
    model: Model, embeddings: Tensor, p: PackedPass, policy: str | None, *, whole: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward with the prompt `embeddings` [k, d]: per target its nll and the arg-max, and the gradient
    [k, d], all on the device, which nothing in here waits for. The arena must have begun."""
    decoder = model.decoder
    hidden = decoder.forward(embeddings, p, policy)
    nll, predicted, dh = target_loss(decoder, model.weights.head, hidden, p.targets, differentiate=True, whole=whole)
    assert dh is not None
    grad = torch.empty(embeddings.shape, dtype=decoder.sum_dtype, device=model.device)
    return nll, predicted, decoder.backward(dh, p, grad)


def rendered_batch(model: Model, prompt: SoftPrompt, batch: Sequence[Example]) -> list[Rendered]:
    """Each example's sequence. Raises DataError where nothing of the batch counts, and what rendering raises."""
    check_examples(batch, "the batch")
    if not batch:
        raise DataError("the batch holds no examples; give at least one.")
    if not any(example.weight > 0 for example in batch):
        raise DataError("all examples of the batch have weight 0; at least one must count.")
    prompt.check_model(model)
    return [render(model, prompt, example, where=example.where or f"example {i}") for i, example in enumerate(batch)]


def check_finite(model: Model, prompt: SoftPrompt, results: Mapping[str, Tensor]) -> None:
    """Raises PromptError (the prompt's fault) or TrainingError where one of `results`, by its name, is not finite."""
    for name, result in results.items():
        if bool(result.isfinite().all()):
            continue
        rows = prompt.embeddings.isfinite().all(dim=1)
        if not bool(rows.all()):
            row = int((~rows).nonzero()[0])
            raise PromptError(f"row {row} of the prompt's embeddings holds NaN or infinity; give finite numbers.")
        kind = str(model.dtype).removeprefix("torch.")
        raise TrainingError(
            f"the {name} is not finite, although the prompt is: the model {model.name} overflows in {kind} for these "
            "examples, or its weights are damaged; compute in float32 or float64, or fetch the model again."
        )


def pass_over(model: Model, tree: TokenTree, omit: _Omit = _Omit()) -> PackedPass:
    """The packed pass over `tree`; computes what is new in its prefix."""
    prefix = model.prefix_cache.units(tree.units)
    rows = tree.predicting if omit.last_layer and omit.other_logits else None
    return build_pass(
        model.config, tree, prefix, model.ops, model.dtype, model.device, rows=rows, prompt_only=omit.first_layer
    )


def details_of(tree: TokenTree, nll: Tensor, correct: Tensor, examples: int) -> Details:
    """The examples' share of each target's nll [N] and of whether it is the arg-max [N] bool; both on the CPU."""
    members = [(tree.target_example == b).nonzero().squeeze(1) for b in range(examples)]
    return Details(
        torch.stack([nll[m].mean() for m in members]),
        [nll[m] for m in members],
        torch.stack([correct[m].all() for m in members]),
    )


def loss_of(tree: TokenTree, nll: Tensor) -> float:
    """The loss (nats) from each target's nll [N] on the CPU, summed in float64."""
    return float((nll.double() * tree.target_weights).sum())
