"""The server's OpenAPI document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embedgrad.serve.bodies import ChatBody, CompletionBody
from embedgrad.util.environment import versions

_REFUSALS = {
    "400": "The request cannot be answered as it is.",
    "401": "The API key is missing or wrong.",
    "403": "The host name is not one of this server's.",
    "404": "There is no such model.",
    "408": "The body came too slowly.",
    "413": "The body is too long.",
    "415": "The body is no JSON.",
    "429": "Too many answers wait.",
    "500": "The engine failed.",
}
_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}


def document(models: Sequence[str], needs_key: bool) -> dict[str, Any]:
    """The document (OpenAPI 3.1). models: names that clients can give. needs_key: whether an API key is asked for."""
    schemas = _schemas(models)
    content: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "embedgrad serve", "version": versions()["embedgrad"] or "0"},
        "paths": {
            "/health": {"get": _operation("health", {"200": _json({"type": "object"}), "503": _json({})}, ())},
            "/metrics": {"get": _operation("metrics", {"200": {"description": "Counters.", "content": _PLAIN}})},
            "/v1/models": {"get": _operation("list_models", {"200": _json(_list_of("Model"))})},
            "/v1/models/{name}": {
                "get": {
                    **_operation("show_model", {"200": _json(_ref("Model"))}, ("401", "403", "404")),
                    "parameters": [{"name": "name", "in": "path", "required": True, "schema": _TEXT}],
                }
            },
            "/v1/chat/completions": {"post": _completions("chat", "ChatBody", "ChatCompletion")},
            "/v1/completions": {"post": _completions("complete", "CompletionBody", "Completion")},
        },
        "components": {"schemas": schemas},
    }
    if needs_key:
        content["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        content["security"] = [{"key": []}]
    return content


_PLAIN = {"text/plain": {"schema": _TEXT}}


def _schemas(models: Sequence[str]) -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    for kind in (ChatBody, CompletionBody):
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schema["properties"]["model"] = {"enum": list(models)}
        schemas[kind.__name__] = schema
    error = _object({"message": _TEXT, "type": _TEXT, "param": {}, "code": {}})
    choice = _object({"index": _COUNT, "finish_reason": {"enum": ["stop", "length"]}, "logprobs": {}})
    message = _object({"role": {"const": "assistant"}, "content": _TEXT})
    usage = _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
    head = {"id": _TEXT, "object": _TEXT, "created": _COUNT, "model": _TEXT, "usage": usage}
    for name, own in (("ChatCompletion", {"message": message}), ("Completion", {"text": _TEXT})):
        whole = _object({**choice["properties"], **own})
        schemas[name] = _object({**head, "choices": {"type": "array", "items": whole}})
    schemas["Model"] = _object({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT})
    schemas["Error"] = _object({"error": error})
    return schemas


def _completions(name: str, body: str, response: str) -> dict[str, Any]:
    answer = _json(_ref(response))
    answer["content"]["text/event-stream"] = {}  # events with chunks of the same fields
    operation = _operation(name, {"200": answer}, tuple(_REFUSALS))
    return {**operation, "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}}}


def _operation(name: str, responses: dict[str, Any], refusals: Sequence[str] = ("401", "403")) -> dict[str, Any]:
    refused = {status: {**_json(_ref("Error")), "description": _REFUSALS[status]} for status in refusals}
    return {"operationId": name, "responses": {**responses, **refused}}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": "An answer.", "content": {"application/json": {"schema": schema}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _list_of(name: str) -> dict[str, Any]:
    return _object({"object": {"const": "list"}, "data": {"type": "array", "items": _ref(name)}})


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
