"""How much memory and time does a run on a GPU take at least, by counting?

The run is that of `examples/math500-qwen2.5-math-1.5b.yaml`: steps, batch and validations are the configuration's, the
model's shapes are known, and the lengths are means over MATH's training problems and solutions. A step's memory is
`embedgrad.memory.device_bytes` per policy. Its time is its necessary operations (`bench/floor.py`) at the data-sheet
rate; a written token's is reading the weights and the keys and values once at the data-sheet bandwidth. Nothing here is
measured: real kernels reach a part of these rates, and the part is not known before a GPU has run them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import embedgrad
from bench.floor import products, visible_pairs
from bench.machines import MACHINES
from bench.markdown import table
from bench.memory import MODELS
from bench.rows import Row, row
from embedgrad.memory import POLICIES, StepSize, device_bytes, weight_bytes
from embedgrad.model.config import ModelConfig
from embedgrad.rendering import Rendered
from embedgrad.settings import load_run_config
from embedgrad.tree import TokenTree, build_tree

CHECKS = ("tests/engine/test_memory.py",)
CONFIG = Path(__file__).parent.parent / "examples" / "math500-qwen2.5-math-1.5b.yaml"
MODEL = "Qwen2.5-Math-1.5B"
HEADER, PROMPT, QUERY, TARGET = 4, 20, 60, 145  # tokens; query and target: means over MATH's training set
TAIL = 10  # tokens of the chat template between the prompt and the answer
SLOTS = 32  # answers that are written together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this bench."""
    parser.add_argument("--config", type=Path, default=CONFIG, help="whose steps, batch and data count")
    parser.add_argument("--answer", type=int, default=400, help="mean tokens of an answer (default 400)")


def main(args: argparse.Namespace) -> list[Row]:
    """Count; the rows."""
    config = ModelConfig.from_hf(MODELS[MODEL], MODEL)
    run = load_run_config(args.config).optimize
    split = yaml.safe_load(args.config.read_text())["data"]["split"]
    steps, examples = run.total_steps(split["train"]), run.batch_size
    validations = 1 + -(-steps // run.validation_interval(split["train"]))
    answers = validations * (split["validation"] + run.monitors.train_examples) + 2 * split["test"]
    tree = _tree(examples)
    work = _operations(config, tree)
    version = f"embedgrad {embedgrad.__version__}"
    size = StepSize(tree.num_tokens, HEADER, len(tree.predicting), PROMPT, len(tree.target_ids))
    rows = []
    for policy in POLICIES:
        found = device_bytes(config, size, torch.bfloat16, policy, "compute", "sm_90")
        rows.append(row(
            "predict", policy, version, [found.total], counted=True, unit="bytes",
            case={"part": "memory", "model": MODEL, "tokens": tree.num_tokens}, **vars(found),
        ))  # fmt: skip
    each = HEADER + PROMPT + TAIL + QUERY + args.answer // 2  # keys that a token in the middle of an answer sees
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * torch.bfloat16.itemsize
    moved = weight_bytes(config, torch.bfloat16) + SLOTS * each * cache
    for machine in MACHINES:
        step = work / machine.matrix_rate(torch.bfloat16)
        token = moved / machine.bandwidth  # of SLOTS answers at once
        writing = answers / SLOTS * args.answer * token
        rows.append(row(
            "predict", machine.name, version, [steps * step + writing], counted=True,
            case={"part": "time", "model": MODEL, "steps": steps, "batch": examples, "answers": answers,
                  "answer_tokens": args.answer},
            step_seconds=step, training_seconds=steps * step, token_seconds=token, writing_seconds=writing,
            operations=work,
        ))  # fmt: skip
    return rows


def _tree(examples: int) -> TokenTree:
    """A batch: header and prompt shared, then queries and targets of which no two begin alike."""
    sequences = []
    for n in range(examples):
        own = [1000 + n] * (QUERY + TAIL + TARGET)
        ids, rows = [1] * HEADER + [2] * PROMPT + own, [-1] * HEADER + list(range(PROMPT)) + [-1] * len(own)
        targets = [False] * (len(ids) - TARGET) + [True] * TARGET
        sequences.append(Rendered(ids, rows, targets, HEADER))
    return build_tree(sequences)


def _operations(config: ModelConfig, tree: TokenTree) -> int:
    linear = sum(2 * a * b * c * times for (_, (a, b, c)), times in products(config, tree).items())
    return linear + 12 * visible_pairs(config, tree) * config.num_heads * config.head_dim


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """`predict`: least time per machine, and memory per policy."""
    times = [one for one in rows if one.case["part"] == "time"]
    memory = [one for one in rows if one.case["part"] == "memory"]
    heads = ("at least", "a step", "all steps", "a token of 32 answers", "all answers", "the run")
    cells = [
        (
            one.contender, f"{1e3 * one.more['step_seconds']:.0f} ms", f"{one.more['training_seconds']:.0f} s",
            f"{1e3 * one.more['token_seconds']:.2f} ms", f"{one.more['writing_seconds']:.0f} s", f"{one.median:.0f} s",
        )
        for one in times
    ]  # fmt: skip
    case = times[0].case
    told = ", ".join(f"{one.median / 2**30:.2f} GiB with `{one.contender}`" for one in memory)
    return {"predict": table(heads, cells) + (
        f"\n\n{case['steps']} steps of {case['batch']} examples ({memory[0].case['tokens']} packed tokens), "
        f"{case['answers']} answers of {case['answer_tokens']} tokens. A step's peak in bfloat16: {told}."
    )}  # fmt: skip


def pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """None: the table says it."""
    return {}
