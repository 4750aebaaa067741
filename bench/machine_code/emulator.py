"""Runs Triton kernels as real MI300X (gfx942, CDNA3) machine code on a machine without a GPU, and counts instructions.

Triton compiles ahead of time for gfx942. A checkout of the tinygrad repository (MIT), named by the environment variable
TINYGRAD_REPO, holds an emulator of that instruction set under test/mockgpu. This module lays out the kernel arguments,
starts the work-groups, corrects the emulator's known errors, and counts what is executed. Nothing of that repository is
contained here. The emulator needs a C compiler named clang. It worked with triton 3.9 and tinygrad of August 2026.

    with emulator.emulated() as executions:
        tree_attention(q, k, v, ...)  # a launcher, with tensors on the CPU: every kernel it starts is emulated
    executions[0].counts  # executed instructions by name, summed over wavefronts

Wavefronts run one after another between barriers, so a missing barrier may stay unseen. The emulator does not cover
float atomics, 32x32 MFMA (hence matrix_instr_nonkdim=16; a real launch leaves the shape to the compiler), xf32 (fp32
products need input_precision="ieee"), buffer instructions (switched off), and timing.
"""

import ctypes
import functools
import os
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton

from bench.machine_code.capture import Launch, intercepted

ARCH, WAVE = "gfx942", 64
_ROW = WAVE * 4  # bytes of one vector register
_SPARE_REGISTER = 255
_VCC, _LITERAL = 106, 255  # operand codes
_EXEC, _COUNTER = 126, 256  # the emulator's scalar registers: which lanes are switched on, and the program counter
_LDS_GRANULE = 512

KINDS = ("matrix", "vector", "scalar", "global", "shared", "other")
_PREFIXES = (
    ("v_mfma", "matrix"),
    ("v_", "vector"),
    ("s_", "scalar"),
    ("global_", "global"),
    ("flat_", "global"),
    ("scratch_", "global"),
    ("ds_", "shared"),
)
# Types of kernel arguments: struct format; its size is its alignment.
_FORMATS = {
    "i1": "b", "i8": "b", "u8": "B", "i16": "h", "u16": "H", "i32": "i", "u32": "I", "i64": "q", "u64": "Q",
    "fp32": "f", "f32": "f", "fp64": "d", "f64": "d",
}  # fmt: skip


@dataclass(frozen=True)
class Execution:
    """One emulated kernel launch. counts: executed instructions by name, summed over wavefronts."""

    name: str
    grid: tuple[int, int, int]
    warps: int
    counts: Counter[str]

    def by_kind(self) -> dict[str, int]:
        """Executed instructions by kind (KINDS)."""
        found = dict.fromkeys(KINDS, 0)
        for name, n in self.counts.items():
            found[next((kind for start, kind in _PREFIXES if name.startswith(start)), "other")] += n
        return found

    def matrix_operations(self) -> int:
        """Operations (a multiply-add is two) that the executed matrix instructions did, useful or not."""
        total = 0
        for name, n in self.counts.items():
            shape = re.search(r"_(\d+)x(\d+)x(\d+)", name) if name.startswith("v_mfma") else None
            if shape:
                rows, columns, depth = (int(x) for x in shape.groups())
                total += 2 * rows * columns * depth * n
        return total


def unavailable() -> str | None:
    """Why nothing can be emulated here, or None."""
    repository = os.environ.get("TINYGRAD_REPO")
    if not repository:
        return "TINYGRAD_REPO is not set (a checkout of tinygrad, which holds the gfx942 emulator)"
    if not (Path(repository) / "test" / "mockgpu" / "amd" / "emu.py").is_file():
        return "TINYGRAD_REPO names no tinygrad checkout with test/mockgpu/amd/emu.py"
    return None


@dataclass(frozen=True)
class _Correction:
    """What the emulator would get wrong about one instruction.

    shuffled: the register that a lane shuffle both reads and writes. address: the register with addresses in shared
    memory. elsewhere: the address of another encoding of this four-byte instruction, to read its operands from.
    """

    shuffled: int | None = None
    address: int | None = None
    elsewhere: int = 0


class _Step:
    """A compiled instruction as the emulator's loop expects it; it corrects, runs and counts the instruction."""

    def __init__(self, name: str, run: Any, wanted: list[int], correction: _Correction) -> None:
        self.name, self.run, self.wanted = name, run, wanted
        self.shuffled, self.address, self.elsewhere = correction.shuffled, correction.address, correction.elsewhere
        self.fxn, self.arg, self.globals = self, self, [0, 1, 2, 3, 4, 5]

    def __call__(self, *buffers: Any) -> None:
        scalars, registers = buffers[0].value, buffers[1].value
        if self.shuffled is not None:
            ctypes.memmove(registers + _SPARE_REGISTER * _ROW, registers + self.shuffled * _ROW, _ROW)
        _executed[self.name] += 1
        inputs = [buffers[i] for i in self.wanted]
        if self.elsewhere:
            counter = ctypes.c_uint64.from_address(scalars + _COUNTER * 4)
            following, counter.value = counter.value + 4, self.elsewhere
            self.run(*inputs)
            counter.value = following
            return
        if self.address is None:
            self.run(*inputs)
            return
        active = np.unpackbits(_memory(scalars + _EXEC * 4, 8), bitorder="little").astype(bool)
        row = _memory(registers + self.address * _ROW, _ROW).view(np.uint32)
        idle = row[~active]
        row[~active] = 0
        self.run(*inputs)
        row[~active] = idle


def _long_encoding(kind: str, raw: bytes) -> bytes | None:
    """The VOP3 form of a VOP1, VOP2 or VOPC instruction that names a register from 128 on; else None.

    Encodings: AMD Instinct MI300 (CDNA3) ISA, chapter 12. Raises RuntimeError where there is no such
    form and the emulator gets it wrong (it gets SDWA right).
    """
    word = int.from_bytes(raw[:4], "little")
    source, second, target = word & 511, word >> 9 & 255, word >> 17 & 255
    if source < 256 + 128 and second < 128 and target < 128:
        return None
    if kind == "VOP1":
        operation, second, operands = 0x140 + second, 0, source
    elif kind == "VOP2":
        operation, operands = 0x100 + (word >> 25 & 63), source | (256 + second) << 9
    elif kind == "VOPC":
        operation, target, operands = target, _VCC, source | (256 + second) << 9
    else:
        operation = operands = -1
    if source == _LITERAL or (operation < 0 and "DPP16" in kind):
        raise RuntimeError(f"a 16-bit {kind} instruction with a register from 128 on is more than the emulator can do")
    if operation < 0:
        return None
    return (0x34 << 26 | operation << 16 | target).to_bytes(4, "little") + operands.to_bytes(4, "little")


def _memory(at: int, size: int) -> np.ndarray:
    """The bytes at an address."""
    return np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(at))


_executed: Counter[str] = Counter()


@functools.cache
def _emulator() -> Any:
    """tinygrad's emulator, corrected."""
    reason = unavailable()
    if reason:
        raise RuntimeError(reason)
    sys.path.insert(0, os.environ["TINYGRAD_REPO"])
    from test.mockgpu.amd import emu

    compile_at, lanes_of = emu._decode_at, emu._dpp16_ctrl
    encodings: list[Any] = []

    def decode_at(pc: int, arch: str) -> Any:
        raw = bytes((ctypes.c_char * 16).from_address(pc).raw)
        instruction = emu.decode_inst(raw, arch)
        name = str(instruction).split("(")[0]
        kind = type(instruction).__name__
        shuffled = address = None
        elsewhere = 0
        # A lane shuffle that writes the register it reads: the emulator goes lane by lane and would read its own
        # results. So the source is copied to a register that the kernel does not use.
        if "DPP16" in kind and hasattr(instruction, "vdst") and raw[4] == instruction.vdst.offset & 255:
            shuffled = raw[4]
            ctypes.c_ubyte.from_address(pc + 4).value = _SPARE_REGISTER
        # The emulator accesses shared memory for switched-off lanes as well, whose addresses may be anything.
        if name.startswith("ds_") and "permute" not in name and "swizzle" not in name:
            address = instruction.addr.offset & 255
        # In the short encodings of 16-bit operations the emulator takes a register from 128 on for the upper half of
        # another one, as on RDNA3; in the long encoding of the same operation it does not.
        if 16 in instruction.canonical_op_bits.values() and (long := _long_encoding(kind, raw)):
            encodings.append(ctypes.create_string_buffer(long, 16))
            elsewhere = ctypes.addressof(encodings[-1])
        (program, runtime), _ = compile_at(elsewhere or pc, arch)
        step = _Step(name, runtime.fxn, program.arg.globals, _Correction(shuffled, address, elsewhere))
        return (step, step), instruction

    def lane_shuffle(lane: Any, control: int, row_mask: Any, bank_mask: Any, wave_size: int) -> Any:
        """Adds row_bcast:15 and row_bcast:31, which the emulator gets wrong."""
        source, enabled, valid = lanes_of(lane, control, row_mask, bank_mask, wave_size)
        number = lane.cast(emu.dtypes.int)

        def constant(value: int) -> Any:
            return emu._c(value, emu.dtypes.int)

        if control == 0x142:
            return (number & constant(~15)) - constant(1), enabled, constant(16) <= number
        if control == 0x143:
            return number * constant(0) + constant(31), enabled, constant(32) <= number
        return source, enabled, valid

    emu._decode_at, emu._dpp16_ctrl = decode_at, lane_shuffle
    return emu


def _packed(launch: Launch) -> bytes:
    """The kernel argument segment: the arguments that are no constants, each aligned to its size."""
    packed = b""
    for name, kind in launch.signature.items():
        value = launch.arguments[name]
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            if value.device.type != "cpu":
                raise ValueError(
                    f"argument {name} of {launch.name} is on {value.device}; the emulator reads CPU memory"
                )
            form, value = "Q", value.data_ptr()
        else:
            form = _FORMATS[kind]
        size = struct.calcsize(form)
        packed += b"\0" * (-len(packed) % size) + struct.pack("<" + form, value)
    return packed + b"\0" * (-len(packed) % 8 + 64)  # Triton's own scratch pointers follow, unused


def _user_registers(properties: int, arguments: int) -> list[int]:
    """The scalar registers that the hardware fills before a wavefront starts, by the descriptor's enable bits."""
    values: list[int] = []
    pointer = [arguments & 0xFFFFFFFF, arguments >> 32]
    for bit, words in ((1, [0] * 4), (2, [0] * 2), (4, [0] * 2), (8, pointer), (16, [0] * 2), (32, [0] * 2)):
        if properties & bit:
            values += words
    return values


def execute(launch: Launch) -> Execution:
    """Compile one captured launch for gfx942 and run it over its grid on the tensors it was given, in place."""
    emu = _emulator()
    from tinygrad.runtime.autogen import amdgpu_kd
    from tinygrad.runtime.support.elf import elf_loader

    compiled = launch.compile()
    used = re.search(r"\.num_vgpr, (\d+)", compiled.asm["amdgcn"])
    if used is None or int(used[1]) > _SPARE_REGISTER:
        raise RuntimeError(f"{launch.name} leaves no vector register free, which lane shuffles need in the emulator")
    image, sections, _ = elf_loader(compiled.asm["hsaco"])
    read_only = next(s.header.sh_addr for s in sections if s.name == ".rodata")
    kind = amdgpu_kd.llvm_amdhsa_kernel_descriptor_t
    descriptor = kind.from_buffer_copy(bytes(image[read_only : read_only + ctypes.sizeof(kind)]))
    code = ctypes.create_string_buffer(bytes(image), len(image))
    entry = ctypes.addressof(code) + read_only + descriptor.kernel_code_entry_byte_offset
    packed = _packed(launch)
    arguments = ctypes.create_string_buffer(packed, len(packed))
    at = ctypes.addressof(arguments)
    granules = -(-compiled.metadata.shared // _LDS_GRANULE)
    resources = descriptor.compute_pgm_rsrc2 & ~(0x1FF << 15) | (granules & 0x1FF) << 15
    _executed.clear()
    warps = int(compiled.metadata.num_warps)
    emu.run_asm(
        entry, len(image), *launch.grid, warps * WAVE, 1, 1, at, rsrc2=resources,
        scratch_size=descriptor.private_segment_fixed_size, arch="cdna",
        user_data=_user_registers(descriptor.kernel_code_properties, at),
    )  # fmt: skip
    return Execution(launch.name, launch.grid, warps, Counter(_executed))


@contextmanager
def emulated() -> Iterator[list[Execution]]:
    """Inside, every Triton launch is compiled for gfx942 and emulated on CPU tensors; yields what was executed."""
    _emulator()
    executions: list[Execution] = []

    def handle(launch: Launch) -> None:
        if torch.Size(launch.grid).numel():
            executions.append(execute(launch))

    with triton.knobs.amd.scope():
        triton.knobs.amd.use_buffer_ops = False
        with intercepted(ARCH, handle, matrix_instr_nonkdim=16):
            yield executions
