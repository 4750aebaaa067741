"""What only a GPU can show: bfloat16, steps that never wait for the device, CUDA graphs, copies on a second stream."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from embedgrad.backends import cuda_core
from embedgrad.data.example import Example
from embedgrad.engine.gradient import launch_gradient, loss_and_grad, pass_over
from embedgrad.engine.model import Model, load_model
from embedgrad.engine.prefix_cache import keys_and_values
from embedgrad.engine.prompt_trainer import PromptTrainer
from embedgrad.engine.runner import GraphWarning
from embedgrad.engine.tree import build_tree, prepare
from embedgrad.generation import generate as generation
from embedgrad.generation.generate import generate
from embedgrad.generation.kv_cache import KeyValueCache
from embedgrad.generation.loops.device import DeviceLoop
from embedgrad.generation.loops.plain import PlainLoop
from embedgrad.generation.sampling import Sampling
from embedgrad.maths.optimizer import AdamW
from embedgrad.maths.trust_region import CosineCone
from embedgrad.model.streaming import StreamedLayers, _packed_size
from embedgrad.prompt.prompt import SoftPrompt
from embedgrad.prompt.rendering import render
from embedgrad.prompt.template import Template
from tests.model.tiny import write_folder
from tests.truth import relative_error, transformers_loss_and_grad

COMPILED = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
pytestmark = pytest.mark.skipif(not COMPILED, reason="needs a GPU, and TRITON_INTERPRET=0 so that kernels are compiled")
BATCH = [Example([10, 11, 12], [20, 21]), Example([10, 11, 12], [20, 23]), Example([13], [30])]
TEMPLATE = Template.text("{query} {prompt} =")


def on_gpu(folder: Path, family: str, *, sizes: dict[str, Any] | None = None, **options: Any) -> tuple[Model, Any]:
    twin = write_folder(folder, family, **(sizes or {}))
    twin.set_attn_implementation("eager")
    return load_model(folder, device="cuda", **options), twin


def moved(model: Model) -> SoftPrompt:
    prompt = SoftPrompt.from_ids(model, [9, 30, 200], template=TEMPLATE)
    noise = torch.randn(prompt.embeddings.shape, generator=torch.Generator().manual_seed(1))
    return prompt.replace(embeddings=prompt.embeddings + 0.1 * noise)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, whatever makes the host wait for the device raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_equals_transformers(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """The three-way rule: at most twice as far from float64 as transformers in the same type, plus its rounding."""
    model, twin = on_gpu(tmp_path, family, dtype=dtype)
    assert model.backend == "triton"
    p = moved(model)
    sequences = [render(model, p, e) for e in BATCH]
    truth, truth_grad = transformers_loss_and_grad(copy.deepcopy(twin).double(), p.embeddings.double(), sequences)
    plain, plain_grad = transformers_loss_and_grad(twin.to(dtype), p.embeddings.to(dtype), sequences)
    rounding = 4 * torch.finfo(dtype).eps
    for policy in ("all", "mlp", "layer"):
        loss, grad = loss_and_grad(model, p, BATCH, policy=policy)
        assert abs(loss - truth) <= 2 * abs(plain - truth) + rounding * truth
        assert relative_error(grad, truth_grad) <= 2 * relative_error(plain_grad, truth_grad) + rounding
        assert torch.equal(loss_and_grad(model, p, BATCH, policy=policy)[1], grad)


@pytest.mark.parametrize(("family", "weights"), [("llama", "compute"), ("mistral", "int8"), ("qwen3", "int4")])
def test_steps_as_graphs_have_the_bits_of_steps_launched_one_by_one(tmp_path: Path, family: str, weights: str) -> None:
    sizes = {"sliding_window": 5} if family == "mistral" else {}
    model, _ = on_gpu(tmp_path, family, weights=weights, sizes=sizes)
    p = moved(model)
    batches = [
        (prepare([render(model, p, Example([10, *range(11, 12 + n % 3)], [20 + i])) for i in range(2 + n % 2)]),
         [1.0] * (2 + n % 2))
        for n in range(6)
    ]  # fmt: skip
    states = []
    for capture in (None, _no_capture):
        e = p.embeddings.clone()
        trainer = PromptTrainer(
            model, (e, torch.zeros_like(e), torch.zeros_like(e)), p.anchor, batches, region=CosineCone(0.95),
            rule=AdamW(), clip_norm=1.0, policy="all", memory_budget=None, capture=capture,
        )  # fmt: skip
        losses = []
        with pytest.warns(GraphWarning) if capture is not None else nullcontext():
            for n in range(12):
                losses.append(trainer.read(trainer.launch(trainer.prepare(batches[n % 6]), n + 1, 1e-2)).loss)
        if capture is None:
            assert any(one.replay is not None for one in trainer._runner._classes.values())
        states.append((losses, *trainer.state()))
    (losses, *state), (other_losses, *other_state) = states
    assert losses == other_losses
    assert all(torch.equal(a, b) for a, b in zip(state, other_state, strict=True))


def _no_capture(launch: Any) -> Any:
    raise RuntimeError("no graph today")


def test_a_replayed_step_never_waits(tmp_path: Path) -> None:
    model, _ = on_gpu(tmp_path, "llama")
    p = moved(model)
    batch = prepare([render(model, p, example) for example in BATCH]), [1.0] * len(BATCH)
    e = p.embeddings.clone()
    trainer = PromptTrainer(
        model, (e, torch.zeros_like(e), torch.zeros_like(e)), p.anchor, [batch], region=CosineCone(0.95),
        rule=AdamW(), clip_norm=1.0, policy="all", memory_budget=None,
    )  # fmt: skip
    for n in range(3):
        trainer.read(trainer.launch(trainer.prepare(batch), n + 1, 1e-2))
    with no_waiting():
        launched = [trainer.launch(trainer.prepare(batch), n + 1, 1e-2) for n in (3,)]
    assert math.isfinite(trainer.read(launched[0]).loss)


@pytest.mark.parametrize(
    ("weights", "streamed"), [("compute", False), ("int8", False), ("int4", False), ("int8", True)]
)
def test_a_step_never_waits(tmp_path: Path, weights: str, streamed: bool) -> None:
    model, _ = on_gpu(tmp_path, "qwen3", weights=weights, sizes={"num_hidden_layers": 4})
    if streamed:
        model = load_model(tmp_path, device="cuda", weights=weights, max_device_memory=_room(model))
    p = moved(model)
    tree = build_tree([render(model, p, example) for example in BATCH])
    e = p.embeddings.to("cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        packed = pass_over(model, tree)
        policy, nbytes = model.plan_memory([packed.size], "mlp", 1 << 40)
        model.arena.begin(nbytes)
        nll, _, grad = launch_gradient(model, e, packed, policy)
        return nll, grad

    expected, expected_grad = step()  # compiles
    torch.cuda.synchronize()
    with no_waiting():
        nll, grad = step()
    assert torch.equal(nll, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_decode_step_fits_a_cuda_graph(tmp_path: Path, family: str) -> None:
    model, _ = on_gpu(tmp_path, family, sizes={"sliding_window": 5} if family == "mistral" else {})
    prefix = keys_and_values(model.decoder, [9, 30, 200, 7], (), ())
    length = torch.zeros(2, dtype=torch.int64)
    tokens = torch.tensor([[50, 51], [60, 61], [70, 71], [80, 81]], device="cuda")

    plain = KeyValueCache(model, prefix, length)
    expected = [plain.logits(plain.advance(ids)).clone() for ids in tokens]
    cache, ids = KeyValueCache(model, prefix, length), tokens[0].clone()
    start = cache.mark()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cache.logits(cache.advance(ids))  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    cache.rewind(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = cache.logits(cache.advance(ids))
    cache.rewind(start)
    for chosen, right in zip(tokens, expected, strict=True):
        ids.copy_(chosen)
        graph.replay()
        torch.testing.assert_close(logits, right, rtol=0.02, atol=0.02)


def _room(model: Model) -> int:
    """Device memory for everything outside the blocks, one block for good, and two buffers."""
    blocks = sum(x.nbytes for layer in model.weights.layers for x in layer.tensors())
    return sum(x.nbytes for x in model.weights.tensors()) - blocks + 3 * _packed_size(model.weights.layers[0])


@pytest.mark.parametrize("weights", ["compute", "int8", "int4"])
def test_streamed_blocks_give_the_same_bits(tmp_path: Path, weights: str) -> None:
    whole, _ = on_gpu(tmp_path, "qwen2", weights=weights, sizes={"num_hidden_layers": 6})
    streamed = load_model(tmp_path, device="cuda", weights=weights, max_device_memory=_room(whole))
    assert isinstance(streamed.weights.layers, StreamedLayers)
    p = moved(whole)
    expected = loss_and_grad(whole, p, BATCH)
    for _ in range(3):
        loss, grad = loss_and_grad(streamed, p, BATCH)
        assert loss == expected[0]
        assert torch.equal(grad, expected[1])
    asked, sampling = [[50, 51], [52]], Sampling(max_new_tokens=8)
    assert generate(streamed, p, asked, sampling) == generate(whole, p, asked, sampling)
    assert streamed.weights_hash() == whole.weights_hash()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=90),  # the cache grows
        Sampling(max_new_tokens=20, temperature=1.0, top_k=40, top_p=0.95, min_p=0.01, seed=3),
        Sampling(max_new_tokens=20, repetition_penalty=1.3, presence_penalty=0.1, logit_bias={50: -float("inf")}),
        Sampling(max_new_tokens=20, temperature=1.0, choices=("a movie", "a film", "no")),
        Sampling(max_new_tokens=20, stop=("e", "a")),
    ],
)
def test_the_device_loop_writes_what_the_plain_loop_writes(
    tmp_path: Path, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where a batch of another size rounds too little to change a token."""
    model, _ = on_gpu(tmp_path, "qwen3", dtype=torch.float32)
    library_or_skip(model)
    p, asked = moved(model), [[50 + i, *range(60, 60 + i % 5)] for i in range(7)]
    ours = generate(model, p, asked, sampling, batch_size=3)
    assert ours == generate(model, p, asked, sampling, batch_size=3)
    monkeypatch.setattr(generation, "loop_for", lambda model, slots, **_: PlainLoop(model, slots))
    theirs = generate(model, p, asked, sampling, batch_size=3)
    assert ours == theirs
    for one, other in zip(ours, theirs, strict=True):
        assert one.entropies == pytest.approx(other.entropies, abs=1e-4)
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-3)


def test_a_step_of_the_device_loop_is_a_graph_that_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = on_gpu(tmp_path, "llama")
    library_or_skip(model)
    step, replays = DeviceLoop._step, []

    def watched(self: DeviceLoop) -> None:
        if self._graph is None:
            step(self)  # compiles, or is captured
            return
        with no_waiting():
            step(self)
        replays.append(1)

    monkeypatch.setattr(DeviceLoop, "_step", watched)
    never = {token: -float("inf") for token in model.tokenizer.eos_ids}
    answer = generate(model, moved(model), [[50]], Sampling(max_new_tokens=30, logit_bias=never))[0]
    assert len(answer.ids) == 30
    assert len(replays) >= 25


def library_or_skip(model: Model) -> None:
    try:
        cuda_core.library_for(model.device)
    except ImportError as error:
        pytest.skip(str(error))
