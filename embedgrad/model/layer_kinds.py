"""What differs from layer to layer, by the rules of transformers' configurations: windows, layers without rotation.

A window rule takes the fields, the defaults of the family and the number of layers, and returns the window of each
layer in tokens, None where a layer sees all keys. Every rule raises ModelError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from embedgrad.model.fields import Fields
from embedgrad.util.errors import ModelError
from embedgrad.util.shown import short

Windows = tuple[int | None, ...]
WindowRule = Callable[[Fields, Mapping[str, Any], int], Windows]

FULL, SLIDING = "full_attention", "sliding_attention"
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28


def no_windows(fields: Fields, defaults: Mapping[str, Any], layers: int) -> Windows:
    """No layer has a window."""
    return (None,) * layers


def every_layer(fields: Fields, defaults: Mapping[str, Any], layers: int) -> Windows:
    """`sliding_window` in every layer."""
    return (_size(fields, defaults),) * layers


def by_type(every: int, otherwise: str = FULL) -> WindowRule:
    """`layer_types` says which layers have the window.

    Without it every layer has one but each `every`-th (or the field `sliding_window_pattern`), which is of the type
    `otherwise`.
    """

    def rule(fields: Fields, defaults: Mapping[str, Any], layers: int) -> Windows:
        window = _size(fields, defaults)
        fields.take("_sliding_window_pattern")  # transformers writes it and does not read it
        pattern = fields.integer("sliding_window_pattern", every, none=every)
        types = fields.take("layer_types")
        if types is None:
            types = [SLIDING if (layer + 1) % pattern else otherwise for layer in range(layers)]
        return _chosen(fields, _checked(fields, types, layers), window)

    return rule


def from_layer(fields: Fields, defaults: Mapping[str, Any], layers: int) -> Windows:
    """The window in layers from `max_window_layers` on, or by `layer_types`; only with `use_sliding_window`."""
    sliding = fields.boolean("use_sliding_window", False)
    size = _size(fields, defaults)
    window = size if sliding else None
    first = fields.take("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
    types = fields.take("layer_types")
    if types is None:
        if window is None:
            return (None,) * layers
        if not isinstance(first, int) or isinstance(first, bool):
            raise ModelError(f'{fields.where}: "max_window_layers" is {short(first)}; it should be a whole number.')
        return tuple(window if layer >= first else None for layer in range(layers))
    types = _checked(fields, types, layers)
    if window is None and SLIDING in types:
        raise ModelError(
            f'{fields.where}: "layer_types" has sliding_attention, but "use_sliding_window" and "sliding_window" give '
            f"no window."
        )
    return _chosen(fields, types, window)


def where_unrotated(fields: Fields, defaults: Mapping[str, Any], layers: int) -> Windows:
    """With `use_sliding_window` the window in layers without rotation, or by `layer_types` (SmolLM3)."""
    window = _size(fields, defaults) if fields.boolean("use_sliding_window", False) else None
    types = fields.take("layer_types")
    fields.take("max_window_layers")  # copied from Qwen's configurations, never read
    if types is None:
        unrotated = unrotated_layers(fields, 4, layers)
        types = [SLIDING if layer in unrotated else FULL for layer in range(layers)]
    return _chosen(fields, _checked(fields, types, layers), window)


def window_fields(rule: WindowRule, defaults: Mapping[str, Any], windows: Windows) -> dict[str, Any]:
    """The fields from which `rule`, and transformers, read these windows."""
    window = next((size for size in windows if size is not None), None)
    if rule is every_layer:
        return {"sliding_window": window}
    switched = rule in (from_layer, where_unrotated)
    if rule is no_windows or (switched and window is None):
        return {}
    # A class that always has windows wants a size even where no layer uses it.
    size = defaults.get("sliding_window", _DEFAULT_WINDOW) if window is None else window
    types = [FULL if own is None else SLIDING for own in windows]
    switch = {"use_sliding_window": True} if switched else {}
    return {"sliding_window": size, "layer_types": types, **switch}


def unrotated_layers(fields: Fields, every: int, layers: int) -> tuple[int, ...]:
    """The layers without rotation: zeros of `no_rope_layers`, else each `no_rope_layer_interval`-th (or `every`-th).

    Raises ModelError.
    """
    interval, listed = fields.integer("no_rope_layer_interval", every), fields.take("no_rope_layers")
    if listed is None:
        return tuple(layer for layer in range(layers) if (layer + 1) % interval == 0)
    if not isinstance(listed, list) or len(listed) < layers or any(entry not in (0, 1) for entry in listed):
        raise ModelError(
            f'{fields.where}: "no_rope_layers" is {short(listed)}; it should hold 1 (rotated) or 0 for each of the '
            f"{layers} layers."
        )
    return tuple(layer for layer in range(layers) if listed[layer] == 0)


def _size(fields: Fields, defaults: Mapping[str, Any]) -> int | None:
    default = defaults.get("sliding_window", _DEFAULT_WINDOW)
    return None if fields.take("sliding_window", default) is None else fields.integer("sliding_window", default)


def _checked(fields: Fields, types: Any, layers: int) -> list[str]:
    if not isinstance(types, list) or len(types) != layers or any(kind not in (FULL, SLIDING) for kind in types):
        raise ModelError(
            f'{fields.where}: "layer_types" is {short(types)}; it should name one of {FULL} and {SLIDING} for '
            f"each of the {layers} layers."
        )
    return types


def _chosen(fields: Fields, types: list[str], window: int | None) -> Windows:
    return tuple(window if kind == SLIDING else None for kind in types)
