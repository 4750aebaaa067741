"""What a step imports: torch's compiler alone would take over 100 MB of a process that is to be small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.model.tiny import write_folder

PROGRAM = """
import sys
from embedgrad import Example, Sampling, SoftPrompt, Template, generate, load_model, loss_and_grad
model = load_model(sys.argv[1])
prompt = SoftPrompt.from_ids(model, [9, 30], template=Template.plain())
for policy in ("all", "mlp", "layer"):
    loss_and_grad(model, prompt, [Example([10, 11], [20]), Example([12], [30, 31])], policy=policy)
generate(model, prompt, [[10], [11]], Sampling(max_new_tokens=2))
print(sorted(name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor", "sympy")))[:3])
"""


def test_neither_step_nor_generation_imports_torchs_compiler(tmp_path: Path) -> None:
    write_folder(tmp_path, "llama")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "[]\n"
