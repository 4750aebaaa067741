"""Compiling side by side as on a GPU that is not here; and what `compilers.KNOWN` says of our kernels is so.

A process of its own compiles, because Triton decides when it is imported whether it interprets. Its driver is a
stand-in that names a target; everything up to the machine code is real.
"""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

ARCH = sys.argv[1]


class Driver:
    get_current_target = lambda self: GPUTarget("cuda", int(ARCH[3:]), 32)
    get_current_device = get_current_stream = lambda self, *_: 0


found = {}


def load(kernel):
    kernel.n_spills = 0
    found[kernel.hash] = {"name": kernel.name, "ttir": kernel.asm["ttir"], "code": len(kernel.asm["cubin"])}


driver.set_active(Driver())
CompiledKernel._init_handles = load
from embedgrad.backends.launch_check import check, compiled, table
from embedgrad.kernels import launch

CPU = torch.device("cpu")
with launch.pretending(ARCH):
    kernels = ("tree_attention_forward", "tree_attention_backward_dq", "tree_attention_backward_dkv",
               "decode_attention", "quantized_linear", "quantized_linear_backward")
    subjects = [s for s in table.subjects(ARCH, scale=table.TINY) if s.kernel in kernels and s.row and "128" in s.name
                or "rows" in s.name]
    cases = [case for s in subjects for case in s.cases if case.dtype == torch.bfloat16]
    calls = [(check.Checked(case, CPU), case.options(CPU)) for case in cases]
    outcomes = compiled.compile_all(calls, CPU)
    assert outcomes == [compiled.Compiled()] * len(calls), outcomes
    assert {c.kernel for c in cases} == set(kernels)
    late = compiled.compile_all([(calls[0][0], {**calls[0][1], "num_stages": 5})], CPU, until=0.0)
    assert late == [None], late
print(json.dumps(list(found.values())))
"""
DOT = re.compile(r"(%\S+) = tt\.dot (%[^,\s]+), (%[^,\s]+), (%[^,\s]+)")


@pytest.fixture(scope="module", params=["sm_90", "sm_100"])
def kernels(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-c", PROGRAM, request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return list(json.loads(done.stdout))


def dots(kernel: dict[str, Any]) -> list[tuple[str, ...]]:
    """(result, first operand, second operand, accumulator) of each product."""
    return DOT.findall(kernel["ttir"])


@pytest.mark.slow
def test_kernels_compile_side_by_side(kernels: list[dict[str, Any]]) -> None:
    assert all(kernel["code"] > 1000 for kernel in kernels)
    with_products = {kernel["name"] for kernel in kernels if dots(kernel)}
    assert {name.removesuffix("_kernel") for name in with_products} == {
        "tree_attention_forward", "tree_attention_dq", "tree_attention_dkv", "decode_prefix", "decode_own",
        "quantized_linear", "quantized_linear_backward",
    }  # fmt: skip


def chained(kernel: dict[str, Any]) -> list[tuple[str, ...]]:
    """Products that add to the result of another one of the same step."""
    results = {result for result, *_ in dots(kernel)}
    return [one for one in dots(kernel) if one[3] in results]


def transposed(kernel: dict[str, Any]) -> list[tuple[str, ...]]:
    """Products whose first operand is the transpose of something that was computed."""
    made = dict(re.findall(r"^\s*(%[\w#]+)(?::\d+)? = (\S+)", kernel["ttir"], re.MULTILINE))
    of = dict(re.findall(r"^\s*(%\w+) = tt\.trans (%\w+)", kernel["ttir"], re.MULTILINE))
    return [one for one in dots(kernel) if one[1] in of and made.get(of[one[1]]) != "tt.load"]


@pytest.mark.slow
def test_no_product_is_chained_to_the_accumulator_of_another(kernels: list[dict[str, Any]]) -> None:
    """triton #10821: two products of one step that add to one accumulator are wrong on Blackwell."""
    assert [(kernel["name"], one) for kernel in kernels for one in chained(kernel)] == []


@pytest.mark.slow
def test_no_product_takes_the_transpose_of_what_was_computed(kernels: list[dict[str, Any]]) -> None:
    """flash-linear-attention chunk_o.py: such products are wrong on Hopper with Triton 3.4 to 3.7.0."""
    assert [(kernel["name"], one) for kernel in kernels for one in transposed(kernel)] == []


def test_both_patterns_would_be_found() -> None:
    planted = """
    %a = tt.load %p : tensor<16x16x!tt.ptr<bf16>>
    %b = arith.truncf %x : tensor<16x16xf32> to tensor<16x16xbf16>
    %c = tt.trans %b {order = array<i32: 1, 0>} : tensor<16x16xbf16> -> tensor<16x16xbf16>
    %d = tt.trans %a {order = array<i32: 1, 0>} : tensor<16x16xbf16> -> tensor<16x16xbf16>
    %e = tt.dot %d, %b, %acc : tensor<16x16xbf16> * tensor<16x16xbf16> -> tensor<16x16xf32>
    %f = tt.dot %c, %b, %e : tensor<16x16xbf16> * tensor<16x16xbf16> -> tensor<16x16xf32>
    """
    assert chained({"ttir": planted}) == transposed({"ttir": planted}) == [("%f", "%c", "%b", "%e")]
