"""What the compiler produced, read off the machine code: registers, spills, shared memory, matrix instructions, loads.

NVIDIA: `cuobjdump` (in Triton's wheel) lists the cubin's resources and SASS. AMD: the assembler text and its metadata.
Counts are static: an instruction in a loop counts once.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

_SASS = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_AMD_WIDTH = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "sshort": 16, "short": 16}


@dataclass(frozen=True)
class MachineCode:
    """Of one compiled kernel.

    registers: 32-bit registers of a lane (AMD: vector and accumulation registers).
    spills: registers or instructions that go to memory for lack of registers (0 is the only good number).
    shared: bytes of a block. matrix: matrix instructions by name. loads, stores: global memory instructions by width
    in bits. instructions: all of them.
    """

    registers: int
    spills: int
    shared: int
    matrix: Counter[str] = field(default_factory=Counter)
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    instructions: int = 0

    @property
    def vector_loads(self) -> float:
        """Bytes loaded by 128-bit (or bulk) instructions over all bytes loaded, by static count; 1 without loads."""
        total = sum(bits * n for bits, n in self.loads.items())
        return sum(bits * n for bits, n in self.loads.items() if bits >= 128) / total if total else 1.0


def inspect(compiled: Any, arch: str) -> MachineCode:
    """Read a compiled kernel (`triton.compile`'s result)."""
    return _amd(compiled) if arch.startswith("gfx") else _nvidia(compiled)


def _sass(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _width(parts: list[str]) -> int:
    for part, bits in (("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("16", 16), ("U8", 8), ("S8", 8)):
        if part in parts:
            return bits
    return 32


def _nvidia(compiled: Any) -> MachineCode:
    text = _sass(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError("cuobjdump printed no resource usage")
    code = MachineCode(registers=int(found[1]), spills=0, shared=int(compiled.metadata.shared))
    spills = total = 0
    for name in _SASS.findall(text):
        total += 1
        root, *parts = name.split(".")
        if root in ("HMMA", "HGMMA", "QGMMA", "IMMA", "UTCHMMA", "UTCQMMA", "DMMA"):
            code.matrix[root] += 1
        elif root in ("LDG", "LDGSTS", "LD"):
            code.loads[_width([p for p in parts if not p.startswith("LTC")])] += 1
        elif root in ("UTMALDG", "UBLKCP"):
            code.loads[1024] += 1
        elif root in ("STG", "ST"):
            code.stores[_width(parts)] += 1
        elif root in ("LDL", "STL"):
            spills += 1
    return MachineCode(code.registers, spills, code.shared, code.matrix, code.loads, code.stores, total)


def _amd_lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        stripped = line.strip()
        if line.startswith("\t") and stripped and stripped[0] not in ".;":
            yield stripped.split()[0]


def _amd(compiled: Any) -> MachineCode:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    code = MachineCode(number("vgpr_count"), number("vgpr_spill_count"), int(compiled.metadata.shared))
    total = 0
    for name in _amd_lines(text):
        total += 1
        if name.startswith("v_mfma"):
            code.matrix[name.removeprefix("v_").removesuffix("_e64")] += 1
            continue
        found = re.match(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)", name)
        if found:
            kind = re.sub(r"_?d16(_hi)?", "", found[2])
            into = code.loads if found[1] == "load" else code.stores
            into[_AMD_WIDTH.get(kind, 8 if "byte" in kind else 32)] += 1
    return MachineCode(code.registers, code.spills, code.shared, code.matrix, code.loads, code.stores, total)
