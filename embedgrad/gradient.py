"""Loss of a batch and its gradient with respect to the prompt's embeddings; nothing else is differentiated."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from embedgrad.errors import DataError
from embedgrad.example import Example, check_examples
from embedgrad.machine import available_memory, send
from embedgrad.memory import StepSize, activation_bytes, choose_policy
from embedgrad.model.model import Model
from embedgrad.model.step import Step, build_step
from embedgrad.prompt import SoftPrompt
from embedgrad.rendering import Rendered, render
from embedgrad.tree import TokenTree, build_tree

SCORE_TOKENS = 4096  # tokens that a forward-only pass packs together


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

    `whole_logits` has no counterpart in the kernels, which hold one tile of them in registers: reference backend only.
    """

    trunk_copies: bool = True
    kept_tokens: bool = True
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
    model), ContextError (a sequence longer than the context), ConfigError (unknown policy, budget too small).
    """
    _check_batch(batch)
    prompt.check_model(model)
    sequences = [render(model, prompt, example, where=f"example {i}") for i, example in enumerate(batch)]
    tree = build_tree(
        sequences, [example.weight for example in batch], share=_omit.trunk_copies, keep=_omit.kept_tokens
    )
    step = _step(model, tree, _omit)
    size = _size(tree, step)
    budget = available_memory(model.device) // 2 if memory_budget is None else memory_budget
    policy, nbytes = choose_policy(model.config, size, model.dtype, policy, budget, model.ops)
    model.arena.begin(nbytes)
    nll, predicted, grad = _launch(model, prompt, tree, step, size, policy, whole=not _omit.whole_logits)
    nll, grad = nll.cpu(), grad.cpu()  # only now is the device waited for
    loss = float((nll.double() * tree.target_weights).sum())
    if not details:
        return loss, grad
    return loss, grad, _details(tree, nll, predicted.cpu(), len(batch))


def _launch(
    model: Model, prompt: SoftPrompt, tree: TokenTree, step: Step, size: StepSize, policy: str, *, whole: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward: per target its loss and the arg-max, and the gradient, all on the device.

    Nothing in here waits for the device.
    """
    hidden = model.decoder.forward(send(prompt.embeddings, model.device), step, policy)
    nll, predicted, dh = _cross_entropy(model, hidden, tree, size, differentiate=True, whole=whole)
    assert dh is not None
    grad = torch.empty(prompt.embeddings.shape, dtype=model.decoder.sum_dtype, device=model.device)
    return nll, predicted, model.decoder.backward(dh, step, grad)


def score(model: Model, prompt: SoftPrompt, batch: Sequence[Example]) -> Details:
    """`Details` of a batch of any size, forward only.

    Raises what `loss_and_grad` raises.
    """
    _check_batch(batch)
    prompt.check_model(model)
    sequences = [render(model, prompt, example, where=f"example {i}") for i, example in enumerate(batch)]
    parts = [_score(model, prompt, part) for part in _by_tokens(sequences)]
    return Details(
        torch.cat([part.example_loss for part in parts]),
        [nll for part in parts for nll in part.token_nll],
        torch.cat([part.exact for part in parts]),
    )


def _score(model: Model, prompt: SoftPrompt, sequences: Sequence[Rendered]) -> Details:
    tree = build_tree(sequences)
    step = _step(model, tree, _Omit())
    size = _size(tree, step)
    model.arena.begin(activation_bytes(model.config, size, model.dtype, None, model.ops))
    hidden = model.decoder.forward(send(prompt.embeddings, model.device), step, None)
    nll, predicted, _ = _cross_entropy(model, hidden, tree, size, differentiate=False)
    return _details(tree, nll.cpu(), predicted.cpu(), len(sequences))


def _check_batch(batch: Sequence[Example]) -> None:
    check_examples(batch, "the batch")
    if not batch:
        raise DataError("the batch holds no examples; give at least one.")
    if not any(example.weight > 0 for example in batch):
        raise DataError("all examples of the batch have weight 0; at least one must count.")


def _by_tokens(sequences: Sequence[Rendered]) -> Iterator[list[Rendered]]:
    part: list[Rendered] = []
    tokens = 0
    for sequence in sequences:
        if part and tokens + len(sequence.ids) > SCORE_TOKENS:
            yield part
            part, tokens = [], 0
        part.append(sequence)
        tokens += len(sequence.ids)
    yield part


def _step(model: Model, tree: TokenTree, omit: _Omit) -> Step:
    kept = model.prefix_cache.units(model, tree.units)
    rows = tree.predicting if omit.last_layer and omit.other_logits else None
    return build_step(model.config, tree, kept, model.dtype, model.device, rows=rows, prompt_only=omit.first_layer)


def _size(tree: TokenTree, step: Step) -> StepSize:
    rows = None if step.rows is None else len(step.rows)
    shown = None if step.prompt_positions is None else len(step.prompt_positions)
    return StepSize(tree.num_tokens, tree.num_kept, rows, shown, len(tree.target_ids))


def _cross_entropy(
    model: Model, hidden: Tensor, tree: TokenTree, size: StepSize, *, differentiate: bool, whole: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per target: negative log-likelihood and arg-max; and the loss's gradient at `hidden`."""
    arena, device = model.arena, model.device
    slot = send(tree.target_slot if size.rows is not None else tree.predicting[tree.target_slot], device)
    at_targets, dh = hidden, None
    gathered = size.targets != len(hidden)
    if gathered:
        take = arena.keep if differentiate else arena.scratch
        at_targets = torch.index_select(hidden, 0, slot, out=take(size.targets, hidden.shape[1], dtype=hidden.dtype))
    if differentiate:
        dh = arena.keep(*at_targets.shape, dtype=hidden.dtype)
    with arena.frame():
        vocabulary = model.config.vocab_size
        nbytes = 0 if whole else model.ops.linear_cross_entropy_bytes(size.targets, vocabulary, hidden.dtype)
        nll, predicted = model.ops.linear_cross_entropy(
            at_targets,
            model.weights.head,
            send(tree.target_ids, device),
            send(tree.target_weights.to(model.decoder.sum_dtype), device),
            dh=dh,
            workspace=arena.scratch(nbytes, dtype=torch.uint8) if nbytes else None,
            **({"logit_bytes": sys.maxsize} if whole else {}),
        )
    if dh is not None and gathered:
        at_hidden = arena.keep(*hidden.shape, dtype=hidden.dtype)
        with arena.frame():  # the prompt's index-add has a fixed order, which index_add_ has not on every device
            sums = arena.scratch(*hidden.shape, dtype=model.decoder.sum_dtype)
            dh = at_hidden.copy_(model.ops.embed_backward(dh, slot, grad=sums))
    return nll, predicted, dh


def _details(tree: TokenTree, nll: Tensor, predicted: Tensor, examples: int) -> Details:
    correct = predicted == tree.target_ids
    members = [(tree.target_example == b).nonzero().squeeze(1) for b in range(examples)]
    return Details(
        torch.stack([nll[m].mean() for m in members]),
        [nll[m] for m in members],
        torch.stack([correct[m].all() for m in members]),
    )
