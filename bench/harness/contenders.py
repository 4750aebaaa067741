"""Who takes an optimisation step: embedgrad in several settings, PEFT, and transformers by itself.

All compute the same loss on one model, of the same ids and targets, and its gradient at the prompt's embeddings.
Embedgrad and the others are imported where they are needed, since a process holds one of them only.
"""

from __future__ import annotations

import random
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness.rows import Row

TARGETS = 2  # answer tokens per example
OURS = {
    "embedgrad": ("all", "compute"),
    "embedgrad-layer": ("layer", "compute"),
    "embedgrad-stored": ("layer", "stored"),
    "embedgrad-all-stored": ("all", "stored"),
}
"""Memory policy and weights of each of ours."""
OTHERS = ("peft", "transformers", "transformers-compiled")
TITLES = {
    "peft": "PEFT prompt tuning", "transformers": "transformers, autograd",
    "transformers-compiled": "the same, `torch.compile`", "embedgrad": "embedgrad, policy `all`",
    "embedgrad-layer": "embedgrad, policy `layer`", "embedgrad-stored": "embedgrad, `layer`, weights as stored",
    "embedgrad-all-stored": "embedgrad, `all`, weights as stored",
}  # fmt: skip

Step = Callable[[], tuple[float, float]]  # → loss, norm of the gradient
Build = Callable[["Case"], Step]


@dataclass(frozen=True)
class Case:
    """Tokens of the prompt, tokens of each query, and number of queries."""

    prompt: int
    query: int
    batch: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """From "prompt/query/batch"."""
        return cls(*(int(n) for n in text.split("/")))

    @classmethod
    def of(cls, row: Row) -> Case:
        """The case of a row."""
        return cls(*(int(row.case[name]) for name in ("prompt", "query", "batch")))

    @staticmethod
    def told(text: str) -> str:
        """`text`, where `parse` understands it; for argparse, which ends with a sentence where it does not."""
        if not re.fullmatch(r"[1-9]\d*/[1-9]\d*/[1-9]\d*", text):
            raise ArgumentTypeError(f"{text!r} is no prompt/query/batch in tokens and examples, such as 64/64/8.")
        return text

    def __str__(self) -> str:
        return f"{self.prompt}/{self.query}/{self.batch}"

    @property
    def tokens(self) -> int:
        """Tokens of all sequences; the prompt counts once for each."""
        return self.batch * (self.prompt + self.query + TARGETS)

    @property
    def ideal(self) -> float:
        """The speed-up that sharing the prompt allows: B(P + R) / (P + BR)."""
        rest = self.query + TARGETS
        return self.tokens / (self.prompt + self.batch * rest)


def contender(name: str, path: Path, backend: str, where: torch.device) -> tuple[Build, str]:
    """What makes the step of a case, on a model that is loaded and has been used once; and the contender's version."""
    if name in OURS:
        policy, weights = OURS[name]
        model = load(path, where, backend=backend, weights=weights)
        return lambda case: our_step(model, case, policy), our_version(model)
    return others(name, load(path, where, weights="compute"), where)


def task(model: Any, case: Case) -> tuple[Any, list[Any]]:
    """A prompt and examples of random tokens."""
    import embedgrad

    ids, queries, targets = _tokens(model.config.vocab_size, case)
    soft = embedgrad.SoftPrompt.from_ids(model, ids, template=embedgrad.Template.plain())
    return soft, [embedgrad.Example(q, t) for q, t in zip(queries, targets, strict=True)]


def tree_of(model: Any, case: Case) -> Any:
    """The token tree of `task`."""
    from embedgrad.engine.tree import build_tree
    from embedgrad.prompt.rendering import render

    soft, examples = task(model, case)
    return build_tree([render(model, soft, example) for example in examples])


def _tokens(vocabulary: int, case: Case) -> tuple[list[int], list[list[int]], list[list[int]]]:
    draw = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(100, vocabulary) for _ in range(n)]

    queries = [tokens(case.query) for _ in range(case.batch)]
    return tokens(case.prompt), queries, [tokens(TARGETS) for _ in range(case.batch)]


def load(path: Path, where: torch.device, **options: Any) -> Any:
    """The model at `path`, loaded and used once."""
    import embedgrad

    model = embedgrad.load_model(path, device=where, **options)
    short, _ = task(model, Case(4, 4, 1))
    embedgrad.score(model, short, [embedgrad.Example([100, 101, 102], [103])])
    return model


def our_version(model: Any) -> str:
    """The version of embedgrad, and its backend."""
    import embedgrad

    return f"embedgrad {embedgrad.__version__}, backend {model.backend}"


def our_step(model: Any, case: Case, policy: str, **options: Any) -> Step:
    """A step of ours; `options` go to `loss_and_grad`."""
    import embedgrad

    soft, examples = task(model, case)
    model.release_memory()

    def step() -> tuple[float, float]:
        loss, grad = embedgrad.loss_and_grad(model, soft, examples, policy=policy, **options)
        return loss, float(grad.norm())

    return step


def others(name: str, ours: Any, where: torch.device, twin: Any = None) -> tuple[Build, str]:
    """One of OTHERS on the weights of `ours`. twin: a transformers model of these weights, where there is one."""
    import transformers

    from embedgrad.compare.twin import transformers_twin

    vocabulary = ours.config.vocab_size
    model: Any = transformers_twin(ours, attention="sdpa") if twin is None else twin
    with torch.no_grad():
        model(input_ids=torch.tensor([list(range(100, 108))], device=where))
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if name == "peft":
        import peft

        return lambda case: _peft(model, vocabulary, case, where), f"peft {peft.__version__}, {version}"
    call = model
    if name == "transformers-compiled":
        call = torch.compile(model)
        version = f"torch.compile, {version}"
    return lambda case: autograd_step(call, model, vocabulary, case, where), version


def _peft(model: Any, vocabulary: int, case: Case, where: torch.device) -> Step:
    import peft

    prompt, queries, targets = _tokens(vocabulary, case)
    tuned: Any = peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=case.prompt)
    )
    weight: Any = tuned.get_parameter("prompt_encoder.default.embedding.weight")
    weight.data = model.get_input_embeddings().weight[prompt].float()
    inputs = torch.tensor([q + t for q, t in zip(queries, targets, strict=True)], device=where)
    labels = torch.tensor([[-100] * case.query + t for t in targets], device=where)

    def step() -> tuple[float, float]:
        tuned.zero_grad(set_to_none=True)
        loss = tuned(input_ids=inputs, labels=labels, attention_mask=torch.ones_like(inputs)).loss
        loss.backward()
        return float(loss.detach()), float(weight.grad.norm())

    return step


def autograd_step(call: Any, model: Any, vocabulary: int, case: Case, where: torch.device) -> Step:
    """What one would write by hand: the prompt's rows in front of the queries' rows, and only the targets' logits."""
    prompt, queries, targets = _tokens(vocabulary, case)
    rows = model.get_input_embeddings().weight
    leaf = rows[prompt].clone().requires_grad_()
    ids = torch.tensor([q + t for q, t in zip(queries, targets, strict=True)], device=where)
    wanted = torch.tensor(targets, device=where).flatten()
    embedded = rows[ids]

    def step() -> tuple[float, float]:
        leaf.grad = None
        inputs = torch.cat([leaf.expand(case.batch, -1, -1), embedded], dim=1)
        logits = call(inputs_embeds=inputs, logits_to_keep=TARGETS + 1, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted)
        loss.backward()
        assert leaf.grad is not None
        return float(loss.detach()), float(leaf.grad.norm())

    return step
