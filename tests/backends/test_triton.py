"""The whole engine on the kernels, in Triton's interpreter, against the reference backend.

Tolerances, float32: a gradient may differ by 1e-5 of its norm (measured: 1e-6; the two sum in another order), a loss by
1e-6 of itself, a prompt after ten AdamW steps by 1e-5 of the way it has gone (measured: 1e-6).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from embedgrad import backends
from embedgrad.data.example import Example
from embedgrad.engine.gradient import loss_and_grad
from embedgrad.engine.model import Model, load_model
from embedgrad.generation.generate import generate
from embedgrad.generation.sampling import Sampling
from embedgrad.maths.optimizer import AdamW, prompt_step
from embedgrad.maths.trust_region import CosineCone, L2Ball, MeanCosine, NoRegion, Penalty
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.template import Template
from embedgrad.train.optimize import optimize
from embedgrad.train.settings import OptimizeConfig
from embedgrad.util.errors import BackendError
from tests.model.tiny import write_folder
from tests.truth import relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter (TRITON_INTERPRET=1)")
GRADIENT, LOSS, AFTER_TEN_STEPS = 1e-5, 1e-6, 1e-5
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
# The query stands before the prompt, so that there are prefix keys; two targets follow one query, so that a branch of
# the tree has branches and one position predicts two targets.
AFTER = Template.text("{query} {prompt} =")
BATCH = [Example([10, 11], [20, 21], 2.0), Example([10, 11], [20, 23]), Example([12], [30])]


def both(folder: Path, family: str, **sizes: Any) -> tuple[Model, Model]:
    write_folder(folder, family, **{**SIZES, **sizes})
    return load_model(folder, backend="reference"), load_model(folder, backend="triton")


def moved(model: Model, template: Template) -> SoftPrompt:
    prompt = SoftPrompt.from_ids(model, [9, 30], template=template)
    noise = torch.randn(prompt.embeddings.shape, generator=torch.Generator().manual_seed(1))
    return prompt.replace(embeddings=prompt.embeddings + 0.1 * noise)


@interpreter
@pytest.mark.parametrize(
    ("family", "template", "policy", "sizes"),
    [
        ("llama", AFTER, "all", {"tie_word_embeddings": True}),
        ("qwen2", Template.plain(), "layer", {"num_hidden_layers": 1}),
        ("qwen3", AFTER, "mlp", {}),
        ("mistral", Template.plain(), "all", {"sliding_window": 3}),
        ("olmo2", AFTER, "mlp", {}),
        ("smollm3", AFTER, "layer", {}),
        ("phi3", Template.plain(), "all", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("granite", AFTER, "all", {}),
        ("gemma2", AFTER, "mlp", {"sliding_window": 3}),
        ("gemma3_text", Template.plain(), "all", {"sliding_window": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) and value.islower() else "",
)
def test_loss_and_gradient_equal_the_reference(
    tmp_path: Path, family: str, template: Template, policy: str, sizes: dict[str, Any]
) -> None:
    reference, triton = both(tmp_path, family, **sizes)
    assert triton.backend == "triton"
    batch = BATCH if family != "qwen3" else BATCH[:2]
    loss, grad, told = loss_and_grad(reference, moved(reference, template), batch, policy=policy, details=True)
    found, found_grad, found_told = loss_and_grad(triton, moved(triton, template), batch, policy=policy, details=True)
    assert found == pytest.approx(loss, rel=LOSS)
    assert relative_error(found_grad, grad) <= GRADIENT
    assert torch.equal(found_told.exact, told.exact)
    assert triton.arena.overflow == 0


@interpreter
@pytest.mark.parametrize(("family", "sizes"), [("llama", {}), ("mistral", {"sliding_window": 3})])
def test_generation_equals_the_reference(tmp_path: Path, family: str, sizes: dict[str, Any]) -> None:
    reference, triton = both(tmp_path, family, num_hidden_layers=1, **sizes)
    asked = [[50, 51, 52], [53]]
    answers = [generate(m, moved(m, Template.plain()), asked, Sampling(max_new_tokens=4)) for m in (reference, triton)]
    assert answers[0] == answers[1]


@interpreter
def test_ten_steps_end_in_the_same_prompt(tmp_path: Path) -> None:
    ends = []
    for model in both(tmp_path, "llama", num_hidden_layers=1):
        prompt = SoftPrompt.from_ids(model, [9, 30], template=Template.plain())
        result = optimize(model, prompt, [Example([10], [20])], [], OptimizeConfig(steps=10, learning_rate=0.05))
        ends.append((result.prompt.embeddings, prompt.embeddings, result.prompt.similarity()))
    (reference, start, similarity), (triton, _, _) = ends
    assert float(similarity.min()) == pytest.approx(0.95, abs=1e-4)  # the region was reached
    assert float((reference - triton).norm() / (reference - start).norm()) <= AFTER_TEN_STEPS


@interpreter
@pytest.mark.parametrize("region", [CosineCone(), MeanCosine(), L2Ball(), Penalty(), NoRegion()], ids=lambda r: r.kind)
def test_prompt_step_equals_the_plain_one(region: Any) -> None:
    module = backends.choose("triton", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    results = []
    e0, g = torch.randn(2, 3, 20, generator=generator)
    for function in (prompt_step, module.prompt_step):
        e, m, v = e0 + 0.1, torch.full_like(e0, 0.01), torch.full_like(e0, 0.02)
        rule = AdamW(weight_decay=0.01)
        report = function(e, e0, m, v, g.clone(), factors=rule.factors(3, 0.3), region=region, rule=rule)
        results.append((e, m, v, report.similarity, report.norm_ratio, report.projected))
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


def test_what_cannot_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert backends.choose("auto", cpu, torch.float64).name == "reference"
    with pytest.raises(BackendError, match=r"^the triton backend computes in float32 or bfloat16; .* float64\.$"):
        backends.choose("triton", cpu, torch.float64)
    if INTERPRETED:
        with pytest.raises(BackendError, match=r"^Triton's interpreter gets bfloat16 products wrong; .*\.$"):
            backends.choose("triton", cpu, torch.bfloat16)
    told = _told_without_interpreter("import torch")
    assert told == (
        "the triton backend runs on GPUs, not on 'cpu', unless TRITON_INTERPRET=1 is set before Python starts."
    )
    told = _told_without_interpreter("import sys, torch; sys.modules['triton'] = None")
    assert told == "the triton backend needs the package triton; install it or use reference."


def _told_without_interpreter(first: str) -> str:
    code = f"""{first}
from embedgrad import backends
from embedgrad.util.errors import BackendError
try:
    backends.choose("triton", torch.device("cpu"))
except BackendError as error:
    print(error)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_an_old_torch_is_refused_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    for name in ("auto", "triton", "reference"):
        with pytest.raises(BackendError, match=r"needs torch 2\.8 or newer, and this is 2\.7\.1"):
            backends.choose(name, torch.device("cuda"))
