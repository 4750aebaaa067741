"""`embedgrad doctor`: shows machine, versions, compilers, libraries and backends, and checks each backend's gradient.

With `--device cuda` it also checks every row of the launch table that this GPU uses (backends/launch_check).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from embedgrad import backends
from embedgrad.backends import cuda_core, native_core
from embedgrad.cli import compilers
from embedgrad.cli.self_check import TOLERANCE, check_gradient
from embedgrad.util import environment
from embedgrad.util.errors import BackendError, EmbedGradError
from embedgrad.util.host import available_memory


def run(as_json: bool, device: str | None = None) -> int:
    """Runs the command. Returns 0 if every check has passed, else 1.

    device: only this one is examined; for a GPU ("cuda", "cuda:1") its launch rows are checked as well.
    Raises BackendError where it is not there.
    """
    report = examine(None if device is None else _present(device))
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    right = [check.get("passed", True) for check in report["checks"]]
    return 0 if all([*right, *(row["trusted"] for row in report["launch_rows"])]) else 1


def _present(name: str) -> str:
    """The device's full name. Raises BackendError where there is no such device."""
    count = torch.cuda.device_count()
    known = ["cpu", *(f"cuda:{index}" for index in range(count))]
    full = "cuda:0" if name == "cuda" else name
    if full not in known:
        choice = f"choose one of {', '.join(known)}" if count else "torch finds no GPU"
        raise BackendError(f"there is no device {name!r}: {choice}, or leave --device out.")
    return full


def examine(device: str | None = None) -> dict[str, Any]:
    """The report as JSON-able values: machine, versions, compilers, libraries, backends, checks, launch rows.

    device: the one to examine, with its launch rows where it is a GPU; None: all, without launch rows.
    """
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    wanted = devices if device is None else [device]
    return {
        "machine": {**environment.machine(), "available_memory": available_memory()},
        "versions": environment.versions(),
        "compilers": _compilers([one for one in wanted if one != "cpu"]),
        "libraries": [
            _library("csrc", native_core.library),
            _library("csrc/cuda", cuda_core.library),
            *(
                _library("csrc/cuda", partial(cuda_core.library_for, torch.device(device)), device)
                for device in devices[1:]
            ),
        ],
        "backends": [_backend(name, device) for name in backends.NAMES for device in wanted],
        "checks": [check for name in backends.NAMES for device in wanted for check in _checks(name, device)],
        "launch_rows": launch_rows(torch.device(device)) if device not in (None, "cpu") else [],
    }


def _compilers(gpus: list[str]) -> dict[str, Any]:
    """Versions of Triton and its assemblers; for each GPU which assembler serves it, warnings and remarks."""
    found = compilers.versions()
    if not found:
        return {"found": found, "devices": []}
    from embedgrad.kernels import launch
    from embedgrad.kernels.launch_table import ROWS

    told = []
    for gpu in gpus:
        arch = launch.architecture(torch.device(gpu))
        told.append({
            "device": gpu, "architecture": arch, "assembler": compilers.assembler(arch, found),
            "warnings": compilers.warnings(arch, found), "remarks": compilers.remarks(arch, found, ROWS),
        })  # fmt: skip
    return {"found": found, "devices": told}


def launch_rows(device: torch.device, **how: Any) -> list[dict[str, Any]]:
    """What the check of each launch row of this device has found. how: options of `launch_check.table.subjects`.

    `trusted` is False for a row that is wrong; `checked` is False for one that was not checked.
    """
    try:
        from embedgrad.backends.launch_check import table
        from embedgrad.kernels import launch
    except ImportError as error:
        raise BackendError(f"the launch rows cannot be checked without Triton: {error}.") from None
    if device.type != "cpu" and launch.interpreted():
        raise BackendError("TRITON_INTERPRET is set, so no launch row can be checked on a GPU; unset it.")
    found = table.subjects(launch.architecture(device), **how)
    told = []
    for outcome in table.check(found, device, told=lambda text: print(text, file=sys.stderr, flush=True)):
        verdict = outcome.verdict
        told.append({
            "row": outcome.subject.name, "device": str(device),
            "cases": [case.text for case in outcome.subject.cases],
            "options": None if verdict is None else verdict.options, "why": outcome.why,
            "fault": None if verdict is None else verdict.fault, "trusted": outcome.trusted,
            "checked": verdict is not None,
        })  # fmt: skip
    return told


def _library(name: str, load: Callable[[], Any], device: str | None = None) -> dict[str, Any]:
    """Whether a compiled library can be loaded, or runs on `device`."""
    told = {"name": name} if device is None else {"name": name, "device": device}
    try:
        load()
    except ImportError as error:
        return {**told, "available": False, "why_not": str(error)}
    return {**told, "available": True}


def _backend(name: str, device: str) -> dict[str, Any]:
    try:
        backends.choose(name, torch.device(device))
    except (EmbedGradError, ImportError, OSError) as error:
        return {"name": name, "device": device, "available": False, "why_not": str(error)}
    return {"name": name, "device": device, "available": True}


def _checks(name: str, device: str) -> list[dict[str, Any]]:
    """The gradient checks of a backend; none for an unavailable backend. A failed check has an error and no numbers."""
    if not _backend(name, device)["available"]:
        return []
    checks = []
    for dtype in TOLERANCE:
        told = {"backend": name, "device": device, "dtype": str(dtype).removeprefix("torch.")}
        try:
            checks.append(vars(check_gradient(name, dtype, device)))
        except EmbedGradError as error:
            checks.append({**told, "skipped": str(error)})
        except Exception as error:
            checks.append({**told, "passed": False, "error": f"{type(error).__name__}: {error}"})
    return checks


def _print(report: dict[str, Any]) -> None:
    machine = report["machine"]
    print(f"machine    {machine['system']}, {machine['processor']} ({machine['vector_instructions']})")
    print(
        f"           {machine['cores']} cores, {machine['torch_threads']} torch threads, "
        f"{machine['available_memory'] / 2**30:.1f} GiB free"
    )
    for gpu in machine["gpus"] or [None]:
        told = "none" if gpu is None else f"{gpu['name']}, {gpu['memory'] / 2**30:.0f} GiB, sm {gpu['capability']}"
        print(f"gpu        {told}")
    print("versions   " + ", ".join(f"{name} {version or '-'}" for name, version in report["versions"].items()))
    _print_compilers(report["compilers"])
    for library in report["libraries"]:
        place = f" on {library['device']}" if "device" in library else ""
        told = "runs" if place else "built, and can be loaded"
        print(f"library    {library['name']}{place}: {told if library['available'] else library['why_not']}")
    for backend in report["backends"]:
        told = "available" if backend["available"] else f"not available: {backend['why_not']}"
        print(f"backend    {backend['name']} on {backend['device']}: {told}")
    for check in report["checks"]:
        about = f"gradient   {check['backend']} on {check['device']}, {check['dtype']}:"
        if "skipped" in check or "error" in check:
            print(f"{about} {'FAILED: ' + check['error'] if 'error' in check else 'skipped: ' + check['skipped']}")
        else:
            verdict = "right" if check["passed"] else "WRONG"
            print(f"{about} {verdict} (relative error {check['gradient_error']:.1e}, loss {check['loss_error']:.1e})")
    _print_rows(report["launch_rows"])


def _print_compilers(told: dict[str, Any]) -> None:
    found = told["found"]
    if not found:
        return
    present = [name for name in compilers.ASSEMBLERS if name in found]
    names = [f"{name} {found[name]['version'] or 'of unknown version'}" for name in present]
    print("compiler   " + ", ".join([f"triton {found['triton']}", *names]))
    for gpu in told["devices"]:
        if gpu["assembler"] is not None:
            print(f"           {gpu['device']} ({gpu['architecture']}) is served by {gpu['assembler']}")
        for sentence in gpu["warnings"]:
            print(f"WARNING    {sentence}")
        for sentence in gpu["remarks"]:
            print(f"remark     {sentence}")


def _print_rows(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    wrong, unchecked = [row for row in rows if not row["trusted"]], [row for row in rows if not row["checked"]]
    for row in wrong:
        options = ", ".join(f"{name} {value}" for name, value in row["options"].items())
        print(f"launch row DO NOT TRUST {row['row']} ({options}): {row['fault']}")
    for row in unchecked:
        print(f"launch row {row['row']}: {row['why']}")
    right = len(rows) - len(wrong) - len(unchecked)
    print(f"launch row {right} of {len(rows)} are right on {rows[0]['device']}, with their stages and with one")
