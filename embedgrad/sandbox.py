"""Chat templates are programs that arrive with a model or a prompt file: they run in Jinja's sandbox, on a budget.

The environment offers what `transformers` offers to a chat template (block trimming, loop controls, `tojson`,
`raise_exception`, `strftime_now`, the `generation` tag), so that both render the same text. Jinja's sandbox keeps a
template away from Python; it does not keep it from looping for ever or from building a string that fills the memory.
The budget does: loops, calls and text cost units, and operations that make large values from small ones are
measured before they run.
"""

from __future__ import annotations

import datetime
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from embedgrad.errors import TemplateError

MAX_SOURCE = 1 << 19  # characters of a template; the longest published ones have about 20,000
MAX_VALUE = 1 << 22  # characters (or items) of one value inside a template, and of a rendered conversation
MAX_UNITS = 1 << 24  # units of one rendering: a loop's turn costs 20, a call 20, a character of text 1
_STEP = 20
# Not here: filters that pad, wrap or slice to a size given by the template, and those that write HTML.
_FILTERS = re.findall(
    r"\w+",
    "abs attr batch capitalize count d default dictsort e escape first float format groupby indent int items join last "
    "length list lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum "
    "title tojson trim unique upper",
)
_WIDE_FORMAT = re.compile(r"\d{5,}|\*")


class _Refused(Exception):
    """A template asked for more than its budget, or for something that is not allowed."""


class _Usage(threading.local):
    units = 0

    def spend(self, units: int) -> None:
        self.units += units
        if self.units > MAX_UNITS:
            raise _Refused("it runs for too long or writes too much text")


def _size(value: Any) -> int:
    """Characters and items in `value`, nested ones included, as often as they would be written out."""
    if isinstance(value, str):
        return len(value)
    total, stack = 0, [value]
    while stack:
        item = stack.pop()
        total += len(item) if isinstance(item, str) else 1
        if total > MAX_VALUE:
            break
        if isinstance(item, Mapping):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
    return total


def _checked(value: Any) -> Any:
    if _size(value) > MAX_VALUE:
        raise _Refused(f"it builds a value of more than {MAX_VALUE:,} characters")
    return value


def _check_growth(size: int) -> None:
    if size > MAX_VALUE:
        raise _Refused(f"it builds a value of more than {MAX_VALUE:,} characters")


def _checked_format(pattern: Any) -> None:
    if _WIDE_FORMAT.search(str(pattern)):
        raise _Refused("it formats to a width of five digits or more")


class _Guard(NodeTransformer):
    """Sends what a loop runs over, and what `~` joins, through the budget's filters."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self.environment = environment

    def _through(self, name: str, node: nodes.Node, *args: int) -> nodes.Filter:
        constants = [nodes.Const(value, lineno=node.lineno, environment=self.environment) for value in args]
        return nodes.Filter(
            cast(nodes.Expr, node), name, constants, [], None, None, lineno=node.lineno, environment=self.environment
        )

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.iter = self._through("_steps", node.iter, _STEP + text)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        node.nodes = [self._through("_sized", child) for child in node.nodes]
        return self._through("_sized", node)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training tools; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self.usage = _Usage()
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            optimized=False,
            finalize=self._finalize,
        )
        built_in = self.filters
        self.filters = {name: built_in[name] for name in _FILTERS}
        for name in ("string", "list", "sum", "batch", "sort", "unique", "reverse", "join"):
            self.filters[name] = _sized_input(built_in[name])
        self.filters.update(
            tojson=_tojson,
            replace=self._replace,
            indent=_indent,
            format=_format,
            join=self._join,
            batch=self._batch,
            _steps=self._steps,
            _sized=_checked,
        )
        now = datetime.datetime.now()  # one moment per template: a run over midnight keeps one prompt
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
        self.globals.update(raise_exception=_raise_exception, strftime_now=lambda form: now.strftime(form))

    def _finalize(self, value: Any) -> Any:
        self.usage.spend(len(value) if isinstance(value, str) else _size(_checked(value)))
        return value

    def _steps(self, value: Any, cost: int) -> Any:
        if isinstance(value, (list, tuple, str, dict)):
            self.usage.spend(cost * len(value))
            return value
        return self._counted(value, cost)

    def _counted(self, values: Iterable[Any], cost: int) -> Iterator[Any]:
        for value in values:
            self.usage.spend(cost)
            yield value

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        text, old, new = str(_checked(text)), str(old), str(new)
        _check_growth(len(text) + (text.count(old)) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = map(jinja2.filters.make_attrgetter(self, attribute), values)
        items = _checked(list(values))
        _check_growth(_size(items) + len(items) * len(str(d)))
        return str(d).join(map(str, items))

    def _batch(self, value: Any, linecount: int, fill_with: Any = None) -> Iterator[Any]:
        _check_growth(linecount)
        return jinja2.filters.do_batch(value, linecount, fill_with)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.usage.spend(_STEP + (len(context.get("_source", "")) if isinstance(obj, Macro) else 0))
        method = getattr(obj, "__wrapped__", obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            self._check_method(owner, name, args)
        return _checked_result(super().call(context, obj, *args, **kwargs))

    def _check_method(self, owner: str, name: str, args: Sequence[Any]) -> None:
        if name in ("ljust", "rjust", "center", "zfill", "expandtabs"):
            _check_growth(max((arg for arg in args if isinstance(arg, int)), default=0) * max(1, owner.count("\t")))
        elif name in ("format", "format_map"):
            _checked_format(owner)
        elif name == "replace" and len(args) > 1:
            _check_growth(len(owner) + owner.count(str(args[0])) * len(str(args[1])))
        elif name == "join" and args:
            items = args[0] if isinstance(args[0], (list, tuple, str)) else []
            _check_growth(_size(items) + len(items) * len(owner))
        elif name == "translate":
            raise _Refused("it calls translate")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "+":
            if not numbers:
                _check_growth(_size(left) + _size(right))
        elif operator == "%":
            if isinstance(left, str):
                _checked_format(left)
        elif numbers:
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length()
                if bits > 4096:
                    raise _Refused("it computes with integers of more than 4,096 bits")
        else:
            many, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(many, int):
                _check_growth(max(many, 0) * _size(value))
        return super().call_binop(context, operator, left, right)


def _sized_input(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` (a Jinja filter) behind a check of its first argument; keeps Jinja's marks on the function."""
    passes = hasattr(function, "jinja_pass_arg")

    def checked(*args: Any, **kwargs: Any) -> Any:
        _checked(args[1] if passes else args[0])
        return function(*args, **kwargs)

    if passes:
        checked.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return checked


def _checked_result(value: Any) -> Any:
    return _checked(value) if isinstance(value, (str, list, tuple)) else value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not (isinstance(indent, int) and indent <= 64):
        raise _Refused("it asks tojson for an indent that is not a number up to 64")
    return json.dumps(
        _checked(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = str(text)
    size = width if isinstance(width, int) else len(width)
    _check_growth(len(text) + size * (text.count("\n") + 1))
    return jinja2.filters.do_indent(text, width, first, blank)


def _format(pattern: str, *args: Any, **kwargs: Any) -> str:
    _checked_format(pattern)
    return jinja2.filters.do_format(pattern, *args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _sentence(error: BaseException) -> str:
    """The first line of an exception's text, short enough for a sentence."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip().rstrip(".") if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


class ChatTemplate:
    """A compiled chat template (Jinja source); raises TemplateError when it does not compile."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source):,} characters; {MAX_SOURCE:,} are allowed.")
        self._environment = _Environment()
        try:
            tree = _Guard(self._environment).visit(self._environment.parse(source))
            self._template = self._environment.from_string(tree, globals={"_source": source})
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"line {error.lineno} of the chat template is not Jinja: {_sentence(error)}."
            ) from error
        except Exception as error:  # Python's own limits on nesting and size, met while compiling
            raise TemplateError(f"the chat template cannot be compiled: {_sentence(error)}.") from error

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        special: Mapping[str, str],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text.

        special: `bos_token`, `eos_token`, … as the template's variables; variables: further ones (`enable_thinking`).
        Raises TemplateError for whatever goes wrong inside the template.
        """
        usage = self._environment.usage
        usage.units = 0
        values: dict[str, Any] = {**special, "tools": None, "documents": None, **(variables or {})}
        values.update(messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt)
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(values):
                size += len(piece)
                _check_growth(size)
                pieces.append(piece)
        except _Refused as error:
            raise TemplateError(f"the chat template is refused: {error}.") from error
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template does not accept this conversation: {_sentence(error)}.") from error
        except Exception as error:  # a template can make any of Python's operations fail
            raise TemplateError(
                f"the chat template cannot be rendered: {type(error).__name__}: {_sentence(error)}."
            ) from error
        return "".join(pieces)


@lru_cache(maxsize=64)
def compile_chat_template(source: str) -> ChatTemplate:
    """ChatTemplate(source), compiled once."""
    return ChatTemplate(source)
