"""What a step imports: torch's compiler alone would take over 100 MB of a process that is to be small."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, tempfile
from pathlib import Path
from embedgrad import Example, SoftPrompt, Template, load_model, loss_and_grad
from tests.model.tiny import write_folder
folder = Path(tempfile.mkdtemp())
write_folder(folder, "llama")
before = set(sys.modules)
model = load_model(folder)
prompt = SoftPrompt.from_ids(model, [9, 30], template=Template.plain())
loss_and_grad(model, prompt, [Example([10, 11], [20]), Example([12], [30, 31])])
print(sorted(name for name in set(sys.modules) - before if name.startswith(("torch._dynamo", "torch._inductor"))))
"""


def test_a_step_does_not_import_torchs_compiler() -> None:
    program = PROGRAM.replace("before = set(sys.modules)", "before = set(sys.modules) - {'torch._dynamo'}")
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    if "torch._dynamo" in done.stdout:  # unless what wrote the model's folder has brought it along
        raise AssertionError(done.stdout)
