"""What the compiler has made, read from the machine code: registers, spills, shared memory, matrix instructions, loads.

NVIDIA: `cuobjdump` of Triton's wheel lists the cubin's resources and SASS. AMD: the assembler text and its metadata.
Counts are static: an instruction in a loop counts once.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

_SASS = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_AMD_WIDTH = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "sshort": 16, "short": 16}


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel.

    registers: 32-bit registers of a lane (AMD: vector and accumulation registers). spills: registers (NVIDIA:
    instructions) that go to memory for lack of registers. shared: bytes of a block. matrix: matrix instructions by
    name. loads: instructions that load from global memory, by width in bits. instructions: all of them.
    """

    registers: int
    spills: int
    shared: int
    matrix: Counter[str] = field(default_factory=Counter)
    loads: Counter[int] = field(default_factory=Counter)
    instructions: int = 0

    @property
    def vector_loads(self) -> float:
        """Bytes loaded by 128-bit (or bulk) instructions over all bytes loaded, by static count; 1 without loads."""
        total = sum(bits * n for bits, n in self.loads.items())
        return sum(bits * n for bits, n in self.loads.items() if bits >= 128) / total if total else 1.0


def inspect(compiled: Any, arch: str) -> MachineCode:
    """The machine code of a compiled kernel (the result of `triton.compile`)."""
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
    names = _SASS.findall(text)
    matrix: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    spills = 0
    for name in names:
        root, *parts = name.split(".")
        if root in ("HMMA", "HGMMA", "QGMMA", "IMMA", "UTCHMMA", "UTCQMMA", "DMMA"):
            matrix[root] += 1
        elif root in ("LDG", "LDGSTS", "LD"):
            loads[_width([p for p in parts if not p.startswith("LTC")])] += 1
        elif root in ("UTMALDG", "UBLKCP"):
            loads[1024] += 1
        elif root in ("LDL", "STL"):
            spills += 1
    return MachineCode(int(found[1]), spills, int(compiled.metadata.shared), matrix, loads, len(names))


def _amd(compiled: Any) -> MachineCode:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    names = re.findall(r"^\t[\t ]*([^\s.;]\S*)", text, re.MULTILINE)
    matrix = Counter(name.removeprefix("v_").removesuffix("_e64") for name in names if name.startswith("v_mfma"))
    loads: Counter[int] = Counter()
    for name in names:
        found = re.match(r"(?:global|buffer|flat)_load_(?:lds_)?(\w+)", name)
        if found:
            kind = re.sub(r"_?d16(_hi)?", "", found[1])
            loads[_AMD_WIDTH.get(kind, 8 if "byte" in kind else 32)] += 1
    shared = int(compiled.metadata.shared)
    return MachineCode(number("vgpr_count"), number("vgpr_spill_count"), shared, matrix, loads, len(names))
