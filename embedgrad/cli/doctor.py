"""`embedgrad doctor`: shows machine, versions, libraries and backends, and checks the gradient of each backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from embedgrad import backends
from embedgrad.backends import cuda_core, native_core
from embedgrad.cli.self_check import TOLERANCE, check_gradient
from embedgrad.util import environment
from embedgrad.util.errors import EmbedGradError
from embedgrad.util.host import available_memory


def run(as_json: bool) -> int:
    """Runs the command. Returns 0 if every check has passed, else 1."""
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if all(check.get("passed", True) for check in report["checks"]) else 1


def examine() -> dict[str, Any]:
    """The report as JSON-able values: machine, versions, libraries, backends, checks."""
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return {
        "machine": {**environment.machine(), "available_memory": available_memory()},
        "versions": environment.versions(),
        "libraries": [
            _library("csrc", native_core.library),
            _library("csrc/cuda", cuda_core.library),
            *(
                _library("csrc/cuda", partial(cuda_core.library_for, torch.device(device)), device)
                for device in devices[1:]
            ),
        ],
        "backends": [_backend(name, device) for name in backends.NAMES for device in devices],
        "checks": [check for name in backends.NAMES for device in devices for check in _checks(name, device)],
    }


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
