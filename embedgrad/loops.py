"""Which generation loop serves a model."""

from __future__ import annotations

import warnings

from embedgrad.backends import BackendWarning, cuda_core
from embedgrad.device_loop import DeviceLoop
from embedgrad.model.model import Model
from embedgrad.native_loop import NativeLoop
from embedgrad.plain_loop import PlainLoop
from embedgrad.slots import Slots

Loop = NativeLoop | DeviceLoop | PlainLoop


def loop_for(model: Model, slots: Slots, *, each_token: bool) -> Loop:
    """The fastest loop that can write the answers of `slots`; `each_token`: the caller looks at every token.

    In csrc/ for the native backend, on the device for a GPU (with a BackendWarning and the plain loop where csrc/cuda
    is not built or does not run there), else plain.
    """
    if model.native_decoder is not None:
        return NativeLoop(model.native_decoder, slots)
    if model.device.type == "cuda":
        try:
            return DeviceLoop(model, slots, cuda_core.library_for(model.device), each_token=each_token)
        except ImportError as error:
            warnings.warn(f"{error}; tokens are chosen on the CPU, more slowly.", BackendWarning, stacklevel=2)
    return PlainLoop(model, slots)
