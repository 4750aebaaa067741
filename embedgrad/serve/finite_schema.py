"""JSON schemas that allow finitely many values: an answer that must match one is one of finitely many texts."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

from embedgrad.util.errors import DataError

MAX_TEXTS = 1024  # a larger trie is a schema that means something else
_MAX_DEPTH = 16
_ANNOTATIONS = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "$defs", "definitions"}


def texts_of(schema: Any) -> list[str]:
    """The JSON texts of the values that `schema` allows, in its order.

    Understood are `enum`, `const`, `anyOf`, `oneOf`, `$ref` inside the schema, the types "boolean" and "null", and
    objects whose properties are such schemas; an object has all its properties. Raises DataError for any other schema,
    and for one of more than MAX_TEXTS values.
    """
    values = _values(schema, schema, 0)
    return list(dict.fromkeys(json.dumps(value, ensure_ascii=False) for value in values))


def _values(schema: Any, root: Any, depth: int) -> list[Any]:
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        raise DataError("the JSON schema must be an object, and at most 16 levels deep.")
    keys = set(schema) - _ANNOTATIONS
    if "$ref" in keys:
        return _values(_referred(schema["$ref"], root), root, depth + 1)
    if "const" in keys:
        return [schema["const"]]
    if "enum" in keys:
        return _bounded(schema["enum"])
    for name in ("anyOf", "oneOf"):
        if name in keys and isinstance(schema[name], list):
            return _bounded([value for each in schema[name] for value in _values(each, root, depth + 1)])
    if schema.get("type") == "boolean":
        return [True, False]
    if schema.get("type") == "null":
        return [None]
    if schema.get("type") == "object" and isinstance(schema.get("properties"), Mapping) and schema["properties"]:
        return _objects(schema["properties"], root, depth)
    raise DataError(
        "the JSON schema allows more than a list of values; here only enum, const, anyOf, boolean, null, and objects "
        "of such properties can be enforced."
    )


def _objects(properties: Mapping[str, Any], root: Any, depth: int) -> list[Any]:
    columns = [_values(each, root, depth + 1) for each in properties.values()]
    count = 1
    for column in columns:
        count *= len(column)
        _check_count(count)
    return [dict(zip(properties, row, strict=True)) for row in itertools.product(*columns)]


def _bounded(values: Any) -> list[Any]:
    if not isinstance(values, list) or not values:
        raise DataError("a list of allowed values in the JSON schema is empty or no list.")
    _check_count(len(values))
    return values


def _check_count(count: int) -> None:
    if count > MAX_TEXTS:
        raise DataError(f"the JSON schema allows more than {MAX_TEXTS} values.")


def _referred(path: Any, root: Any) -> Any:
    found = root
    for name in path.removeprefix("#/").split("/") if isinstance(path, str) and path.startswith("#/") else [None]:
        if not isinstance(found, Mapping) or name not in found:
            raise DataError(f"the JSON schema refers to {path!r}, which is not in it.")
        found = found[name]
    return found
