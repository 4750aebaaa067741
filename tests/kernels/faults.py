"""Faults for the kernels' own tests to find: one change to one kernel's source each, and the test file that must fail.

`python -m tests.kernels.faults [TEXT…]` plants each (whose name has a TEXT) and prints which test failed. As a pytest
plugin (-p, with the fault's name in PLANTED_FAULT) this module loads the kernel from the changed source wherever a test
imports it. The attention kernels plant their own faults at every run; see FAULTS in their test files.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

KERNELS = Path(__file__).parents[2] / "kernels"
PACKAGE = "embedgrad.kernels"
VARIABLE = "PLANTED_FAULT"


class Fault(NamedTuple):
    """`old` in kernels/`module`.py becomes `new`, everywhere it stands; tests/kernels/test_`tests`.py must fail."""

    module: str
    old: str
    new: str
    tests: str = ""

    @property
    def test_file(self) -> str:
        return f"tests/kernels/test_{self.tests or self.module}.py"


FAULTS = {
    "rms_norm: no ε": Fault("rms_norm", " / d + eps)", " / d)"),
    "rms_norm: x̂ not rounded before the weight": Fault(
        "rms_norm", "(b_wide * r).to(b_w.dtype).to(tl.float32)", "b_wide * r"
    ),
    "rms_norm_backward: no mean term": Fault("rms_norm", "b_wdy - b_x * r * mean", "b_wdy"),
    "rms_norm_backward: overwrites instead of adding": Fault("rms_norm", "b_dx + r * (", "r * ("),
    "rope: backward turns forward": Fault(
        "rope",
        "b_1 * b_cos + b_2 * b_sin, b_2 * b_cos - b_1 * b_sin",
        "b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin",
    ),
    "rope: keys normed with the queries' weight": Fault(
        "rope", "b_q[None, :], b_k[None, :]", "b_q[None, :], b_q[None, :]"
    ),
    "rope: mean over half a head": Fault("rope", ", 1) / (2 * HALF) + eps", ", 1) / HALF + eps"),
    "rope: values of the cache normed": Fault("rope", "tl.store(p_v, b_v1, mask=m_v)", "tl.store(p_v, b_1, mask=m_v)"),
    "rope: first key head left out of the cache": Fault(
        "rope", "((o_h >= H) & (o_h < H + G))", "((o_h > H) & (o_h < H + G))"
    ),
    "rope: last token left out": Fault("rope", "grid = (rows * ", "grid = ((rows - 1) * "),
    "swiglu: silu not rounded before u": Fault(
        "swiglu", "(b_wide * tl.sigmoid(b_z)).to(b_gate.dtype).to(tl.float32)", "(b_wide * tl.sigmoid(b_z))"
    ),
    "swiglu_backward: dg without σ′": Fault("swiglu", "(b_sigma + b_silu_slope * (1.0 - b_sigma))", "b_sigma"),
    "swiglu_backward: du of u instead of g": Fault("swiglu", "b_da * b_silu, mask", "b_da * b_up, mask"),
    "embed: row 0 from the table": Fault("embed", "if row >= 0:", "if row > 0:"),
    "embed_backward: last position of a row left out": Fault(
        "embed", "tl.load(begin_ptr + i_r + 1))", "tl.load(begin_ptr + i_r + 1) - 1)"
    ),
    "prompt_step: no bias correction of v": Fault("prompt_step", "tl.sqrt_rn(b_v) / correction", "tl.sqrt_rn(b_v)"),
    "prompt_step: gradient not clipped": Fault("prompt_step", "limit / norm, _one()", "_one(), _one()"),
    "prompt_step: cone's wrong nearest point": Fault(
        "prompt_step", "kappa = a * cosine + b * sine", "kappa = a * cosine"
    ),
    "prompt_step: norm floor ignored": Fault(
        "prompt_step", "low = length < floor * (1 - _TOLERANCE)", "low = length < 0 * floor"
    ),
    "prompt_step: the norm of the last block of rows only": Fault("prompt_step", "total += tl.sum", "total = tl.sum"),
    "prompt_step: moments stay after a step that is taken back": Fault(
        "prompt_step",
        "tl.store(v_ptr + i_k * v_row + o_d, tl.load(p_before + 2 * plane, mask=m_d), mask=m_d)",
        "pass",
    ),
    "prompt_step: a penalty's share lost": Fault("prompt_step", "tl.store(p_g, b_g, mask=m_d)", "pass"),
    "prompt_step: SGD without its momentum": Fault("prompt_step", "a1 * b_m + (b_g + a2 * b_e)", "b_g + a2 * b_e"),
    "prompt_step: inside from tau on": Fault("prompt_step", "a >= inside_from * length", "a >= 0.99 * tau * length"),
    "prompt_step: mean cosine after one round": Fault(
        "prompt_step", "while turn & (level < before):", "if turn & (level < before):"
    ),
    "prompt_step: an absolute ball made relative": Fault(
        "prompt_step", "    if RELATIVE:\n        bound", "    if True:\n        bound"
    ),
    "softmax_loss: columns beyond V count": Fault("softmax_loss", "(o_v == target) | (o_v >= V)", "o_v == target"),
    "softmax_loss: the target counts twice": Fault("softmax_loss", "(o_v == target) | (o_v >= V)", "o_v >= V"),
    "softmax_loss: no slope of the softcap": Fault(
        "softmax_loss", "1.0 - (z / softcap) * (z / softcap)", "z * 0.0 + 1.0"
    ),
    "softmax_loss: ignored rows have a gradient": Fault(
        "softmax_loss",
        "tl.where(counts, tl.load(weight_ptr + i_n * weight_step), 0.0)",
        "tl.load(weight_ptr + i_n * weight_step)",
    ),
    "softmax_loss: sums not rescaled to a new maximum": Fault("softmax_loss", "b_s * _exp(b_m - b_base)", "b_s"),
    "softmax_loss: rows of other programs left out": Fault(
        "softmax_loss", "N, tl.num_programs(0))", "tl.minimum(N, tl.num_programs(0)), tl.num_programs(0))"
    ),
    "quantized_linear: zero point dropped": Fault("quantized_linear", "b_q.to(DTYPE) - ZERO", "b_q.to(DTYPE)"),
    "quantized_linear: offset dropped": Fault("quantized_linear", "tl.sum(b_x.to(tl.float32), 1)[None, :]", "0.0"),
    "quantized_linear: scale of the first group for all": Fault(
        "quantized_linear", "after = tl.minimum((first + BLOCK_K) // GROUP, half - 1)", "after = 0"
    ),
    "quantized_linear: low half of the bytes twice": Fault("quantized_linear", "b_q >> 4", "b_q & 15"),
    "quantized_linear: bias left out": Fault("quantized_linear", "    if BIAS:", "    if False:"),
    "quantized_linear: last split left out": Fault(
        "quantized_linear", "for i_s in range(0, splits):", "for i_s in range(0, tl.maximum(splits - 1, 1)):"
    ),
    "dequantize: zero point dropped": Fault("dequantize", ".to(tl.float32) - ZERO)", ".to(tl.float32))"),
    "dequantize: scale of the first group of a tile for all": Fault(
        "dequantize", "first // GROUP + tl.arange(0, IN_TILE)", "first // GROUP + 0 * tl.arange(0, IN_TILE)"
    ),
}


def sources(fault: Fault) -> str:
    """The kernel's source with the fault in it. Raises ValueError where the text it changes is gone."""
    text = (KERNELS / f"{fault.module}.py").read_text()
    if fault.old not in text:
        raise ValueError(f"kernels/{fault.module}.py no longer has {fault.old!r}")
    return text.replace(fault.old, fault.new)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module of the package in another file."""

    def __init__(self, module: str, path: Path) -> None:
        self.name, self.path = f"{PACKAGE}.{module}", path

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(fullname, self.path) if fullname == self.name else None


if VARIABLE in os.environ:
    from hypothesis import Phase, settings

    settings.register_profile("planted", phases=(Phase.explicit, Phase.generate), database=None, derandomize=True)
    os.environ["HYPOTHESIS_PROFILE"] = "planted"
    _folder = tempfile.TemporaryDirectory()  # Triton reads a kernel's text from its file again
    _fault = FAULTS[os.environ[VARIABLE]]
    _path = Path(_folder.name) / f"{_fault.module}.py"
    _path.write_text(sources(_fault))
    sys.meta_path.insert(0, _Finder(_fault.module, _path))


def failed_tests(name: str) -> list[str]:
    """Plant the fault and run its test file to the first failure: the tests that failed, none if it went unnoticed."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.kernels.faults", "-p", "no:cacheprovider", "-q", "-x"]
    found = subprocess.run(
        [*command, "--tb=no", FAULTS[name].test_file],
        env={**os.environ, VARIABLE: name, "OMP_NUM_THREADS": "1"},
        cwd=KERNELS.parent,
        capture_output=True,
        text=True,
    )
    if found.returncode < 0:  # an access far out of bounds ends the process
        return [f"{test} (crash)" for test in re.findall(r", line \d+ in (test_\w+)", found.stderr)[-1:]]
    if found.returncode not in (0, 1):
        raise RuntimeError(f"pytest did not run: {found.stdout}{found.stderr}")
    return re.findall(r"^FAILED \S+::(\S+)", found.stdout, re.MULTILINE)


if __name__ == "__main__":
    print("| fault | first test that failed |\n| --- | --- |")
    for planted in [name for name in FAULTS if not sys.argv[1:] or any(text in name for text in sys.argv[1:])]:
        print(f"| {planted} | {', '.join(failed_tests(planted)) or 'NONE'} |", flush=True)
