"""The generation loops, and the choice between them."""

from __future__ import annotations

import warnings

from embedgrad.backends import BackendWarning, cuda_core
from embedgrad.engine.model import Model
from embedgrad.generation.loops.device import DeviceLoop
from embedgrad.generation.loops.native import NativeLoop
from embedgrad.generation.loops.plain import PlainLoop
from embedgrad.generation.slots import Slots

Loop = NativeLoop | DeviceLoop | PlainLoop


def loop_for(model: Model, slots: Slots, *, each_token: bool, callbacks: bool = False) -> Loop:
    """The fastest generation loop for `model`.

    each_token: the caller must see every token. callbacks: code of the user runs between steps and may use the model.

    It is the loop in csrc/ for the native backend, the loop on the device for a GPU, and otherwise the plain loop.
    Where csrc/cuda is not built or does not run on the GPU, it is the plain loop and a BackendWarning is given.
    """
    if model.native_decoder is not None:
        return NativeLoop(model.native_decoder, slots, callbacks=callbacks)
    if model.device.type == "cuda":
        try:
            return DeviceLoop(model, slots, cuda_core.library_for(model.device), each_token=each_token)
        except ImportError as error:
            warnings.warn(f"{error}; tokens are chosen on the CPU, more slowly.", BackendWarning, stacklevel=2)
    return PlainLoop(model, slots)
