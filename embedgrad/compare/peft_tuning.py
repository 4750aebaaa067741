"""PEFT's prompt tuning as a control. The package itself runs on a transformers model that shares our weights.

The virtual tokens come before the whole sequence and start from the embeddings of the prompt's text. AdamW trains them
on padded batches with PEFT's own loss, which is the mean over the batch's target tokens. Batches, number of steps,
learning-rate schedule, and the validations that choose the best state are those of the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from embedgrad.compare.twin import transformers_twin
from embedgrad.data.example import Example
from embedgrad.engine.model import Model
from embedgrad.engine.scorer import score
from embedgrad.maths.optimizer import learning_rate
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import Rendered, render
from embedgrad.train.session import batch_indices
from embedgrad.train.settings import OptimizeConfig
from embedgrad.util.errors import TrainingError

IGNORED = -100  # label of positions that are not targets


def tune(
    model: Model, prompt: SoftPrompt, train: Sequence[Example], validation: Sequence[Example], config: OptimizeConfig
) -> tuple[SoftPrompt, dict[str, Any]]:
    """(tuned prompt, fields of `Outcome`). `prompt` must come first in the sequence.

    Raises TrainingError where a loss is not finite.
    """
    import peft

    twin: Any = transformers_twin(model, attention="sdpa")
    count = len(prompt.token_ids)
    tuned: Any = peft.get_peft_model(
        twin, peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=count)
    )
    weight = tuned.get_parameter("prompt_encoder.default.embedding.weight")
    scale = model.config.input_scale  # PEFT's rows stand behind the embedding module, which scales them in Gemma
    weight.data = prompt.embeddings.to(weight.dtype) * scale
    optimiser = torch.optim.AdamW(
        [weight], lr=config.learning_rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    sequences = [render(model, prompt, example) for example in train]
    total, interval = config.total_steps(len(train)), config.validation_interval(len(train))
    seen = validated = 0
    best, best_step, before = prompt, 0, _measured(model, prompt, validation)
    after = before
    for step in range(total):
        batch = [sequences[i] for i in batch_indices(len(train), config.batch_size, step, config.seed)]
        for param_group in optimiser.param_groups:
            param_group["lr"] = learning_rate(config.schedule, config.learning_rate, step, total, config.warmup_steps)
        optimiser.zero_grad(set_to_none=True)
        loss = tuned(**_padded(batch, count)).loss
        if not torch.isfinite(loss):
            raise TrainingError(f"PEFT's loss is {float(loss)} in step {step + 1}.")
        loss.backward()
        optimiser.step()
        seen += sum(len(sequence.ids) for sequence in batch)
        if validation and ((step + 1) % interval == 0 or step + 1 == total):
            now = prompt.replace(embeddings=weight.detach().float() / scale)
            found = _measured(model, now, validation)
            validated += 1
            if _rank(found) > _rank(after):
                best, best_step, after = now, step + 1, found
    if not validation:
        best, best_step = prompt.replace(embeddings=weight.detach().float() / scale), total
    watched = (validated + bool(validation)) * sum(len(render(model, prompt, e).ids) for e in validation)
    return best, {
        "forward_tokens": seen + watched,
        "backward_tokens": seen,
        "similarity": float(best.similarity().min()),
        "best_step": best_step,
        "steps": total,
        "validation": {"before": before, "after": after} if validation else None,
    }


def _rank(measured: Mapping[str, float]) -> tuple[float, float]:
    return measured["accuracy"], -measured["loss"]


def _measured(model: Model, prompt: SoftPrompt, validation: Sequence[Example]) -> dict[str, float]:
    """Exact-match accuracy under teacher forcing, and loss, by our engine; empty without validation data."""
    if not validation:
        return {}
    details = score(model, prompt, validation)
    return {"accuracy": float(details.exact.double().mean()), "loss": float(details.example_loss.double().mean())}


def _padded(batch: Sequence[Rendered], count: int) -> dict[str, torch.Tensor]:
    """PEFT's inputs: the tokens after its `count` virtual tokens, padded on the right."""
    sequences = [(s.ids[count:], s.target_mask[count:]) for s in batch]
    for sequence in batch:
        assert sequence.prompt_rows[:count] == list(range(count))  # the prompt comes first
    longest = max(len(ids) for ids, _ in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for n, (tokens, targets) in enumerate(sequences):
        size = len(tokens)
        ids[n, :size] = torch.tensor(tokens)
        labels[n, :size] = torch.where(torch.tensor(targets), ids[n, :size], IGNORED)
        mask[n, :size] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
