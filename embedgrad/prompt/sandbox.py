"""Runs chat templates in Jinja's sandbox with a budget. They are programs that come with a model or a prompt file.

The environment offers the same features as `transformers` (block trimming, loop controls, `tojson`, `raise_exception`,
`strftime_now`, the `generation` tag), so that both render the same text. Jinja's sandbox hides Python from a template,
but a template could still loop for ever or fill the memory. The budget (`embedgrad.prompt.budget`) prevents this. No
value may be larger than `Budget.largest`; where a small operation can make a large value, the size is checked before
the value is made. Every operation costs units by what it walks over, and their number is limited; so is the time.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from embedgrad.prompt.budget import LOOK_UP, STEP, Budget, Refused, check_bits
from embedgrad.util.errors import TemplateError
from embedgrad.util.shown import first_line

# Published templates have up to some 20,000 characters and 6,000 nodes. Compiling one of these sizes takes two seconds.
MAX_SOURCE = 1 << 17  # characters
MAX_NODES = 1 << 15  # of the syntax tree
LONGEST_DATE = 200  # characters of a date's format
# Filters that pad, wrap, slice or round to a size that the template gives are left out, and so is `random`.
_FILTERS = re.findall(
    r"\w+",
    "abs attr capitalize count d default dictsort e escape first float groupby int items last length list lower "
    "map max min reject rejectattr reverse safe select selectattr sort string title trim unique upper",
)
_PADDING = ("center", "expandtabs", "ljust", "rjust", "zfill")
_REFUSED_METHODS = ("encode", "maketrans", "striptags", "to_bytes", "translate")
_STRIPPING = ("strip", "lstrip", "rstrip")  # search their argument for every character of the text
_FROM_THE_END = ("rfind", "rindex", "rpartition", "rsplit")  # compare their argument at every place of the text
_WIDE = re.compile(r"\d{5,}|\*|\{[^{}]*:[^{}]*\{")  # a width of 5 digits or more in a format, or one from an argument


class _Guard(NodeTransformer):
    """Wraps loops, literals, concatenations, slices and comparisons of a template in the filters of the budget."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment

    def _through(self, name: str, node: nodes.Node, *args: int) -> nodes.Filter:
        """The expression `node | name(*args)`."""
        place: dict[str, Any] = {"lineno": node.lineno, "environment": self._environment}
        constants: list[nodes.Expr] = [nodes.Const(value, **place) for value in args]
        return nodes.Filter(cast(nodes.Expr, node), name, constants, [], None, None, **place)

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        parts = sum(1 for _ in node.find_all(nodes.Node))  # a few of them take as long as a unit
        node.iter = self._through("_steps", node.iter, STEP + text + parts // 4)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        node.nodes = [self._through("_measured", child) for child in node.nodes]
        return self._through("_measured", node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = self._through("_walked", node.expr)
        for operand in node.ops:
            operand.expr = self._through("_walked", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_measured", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Filter:
        self.generic_visit(node)
        return self._through("_measured", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return self._through("_measured", node) if node.ctx == "load" else node


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training tools. Only its content counts."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of one template, in which every call, operator and filter is paid for."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self, length: int) -> None:
        """length: characters of the template; a macro may write them all, so its call costs as many units."""
        self.usage = Budget()
        self._length = length
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _Generation],
            optimized=False,  # constants would be folded while compiling, outside of the budget
            finalize=self._finalize,
        )
        own: dict[str, Callable[..., Any]] = {
            "format": self._format,
            "indent": self._indent,
            "join": self._join,
            "replace": self._replace,
        }
        own |= {"sum": self._sum, "tojson": self._tojson, "trim": self._trim}
        self.filters = {name: self._paid(function) for name, function in own.items()}
        self.filters |= {name: self._paid(jinja2.filters.FILTERS[name]) for name in _FILTERS}
        self.filters |= {"_steps": self._steps, "_measured": self._measured, "_walked": self.usage.walked}
        tests: Mapping[str, Any] = jinja2.tests.TESTS
        self.tests = {name: self._paid(function) for name, function in tests.items()}
        now = datetime.datetime.now()  # fixed per template, so that a run past midnight keeps its header
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": lambda form: _date(now, form)}

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.usage.spend(LOOK_UP)
        if isinstance(argument, tuple):
            self.usage.measure(argument)  # a tuple's hash is computed at every look-up
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.usage.spend(LOOK_UP)
        return super().getattr(obj, attribute)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.usage.spend(STEP + (self._length if isinstance(obj, (Macro, BlockReference)) else 0))
        if isinstance(obj, LoopContext) and args:  # a recursive loop, whose body may write the whole template each time
            args = (self._steps(args[0], STEP + self._length), *args[1:])
        args = tuple(map(self._argument, args))
        sizes = [self.usage.measure(value) for value in (*args, *kwargs.values())]
        method = getattr(obj, "__wrapped__", obj)  # Jinja's sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, (str, int, float, list, tuple, dict, range)):
            if name in _REFUSED_METHODS:
                raise Refused(f"it calls the method {name}")
            self.usage.measure(owner)
        if isinstance(owner, str):
            self._check_method(owner, name, [*args, *kwargs.values()], sizes)
        return self._measured(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        usage = self.usage
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            usage.measure([left, right])
            if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
                check_bits(left.bit_length() * (abs(right) if operator == "**" else 1) + right.bit_length())
        elif operator == "+":
            usage.check(usage.measure(left) + usage.measure(right))
        elif operator == "%":
            self._check_format(left, "%", usage.measure(right))
        elif operator == "*":
            count, value = (left, right) if isinstance(left, int) else (right, left)
            usage.check((max(count, 0) if isinstance(count, int) else 0) * (usage.measure(value) + 1))
        return self._measured(super().call_binop(context, operator, left, right))

    def _paid(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter or test `function` with its arguments and its result measured; jinja_pass_arg is kept."""
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0

        def paid(*args: Any, **kwargs: Any) -> Any:
            self.usage.spend(STEP)
            given = map(self.usage.walked, args[skip:])
            named = {name: self.usage.walked(value) for name, value in kwargs.items()}
            return self._measured(function(*args[:skip], *given, **named))

        if skip:
            paid.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return paid

    def _measured(self, value: Any) -> Any:
        if isinstance(value, (str, int, list, tuple, dict, set, frozenset)):
            self.usage.measure(value)
        return value

    def _argument(self, value: Any) -> Any:
        """`value` for a call, which measures it; an iterator, which has no size, pays while it is walked over."""
        return self.usage.walked(value) if isinstance(value, Iterator) else value

    def _finalize(self, value: Any) -> Any:
        self.usage.spend(4 * self.usage.measure(value))
        return value

    def _steps(self, value: Any, cost: int) -> Any:
        """`value` for a loop whose iterations cost `cost` units each."""
        if isinstance(value, (list, tuple, str, dict)):
            self.usage.spend(cost * len(value))
            return value
        return self.usage.counted(value, cost)

    def _check_method(self, owner: str, name: str, args: Sequence[Any], sizes: Sequence[int]) -> None:
        """Raises Refused where the method `name` of the text `owner` would make too large a value."""
        if name in _PADDING:
            width = max((arg for arg in args if isinstance(arg, int)), default=8)
            self.usage.check(len(owner) + width * (owner.count("\t") if name == "expandtabs" else 1))
        elif name in ("format", "format_map"):
            self._check_format(owner, "{", max(sizes, default=0))
        elif name == "replace" and len(args) > 1:
            self.usage.check(len(owner) + owner.count(str(args[0])) * sizes[1])
        elif name in (*_STRIPPING, *_FROM_THE_END) and args and isinstance(args[0], str):
            self.usage.pairs(len(owner), len(args[0]))
        elif name == "join" and args:
            if not isinstance(args[0], (list, tuple, str)):
                raise Refused("it joins something that is not a list")
            self.usage.check(sizes[0] + len(args[0]) * len(owner))

    def _check_format(self, pattern: Any, sign: str, largest: int) -> None:
        text = str(pattern)
        if _WIDE.search(text):
            raise Refused("it formats to a width of five digits or more, or to one that it computes")
        self.usage.check(len(text) + text.count(sign) * (largest + 10_000 if re.search(r"\d{3}", text) else largest))

    def _format(self, pattern: str, *args: Any, **kwargs: Any) -> str:
        self._check_format(pattern, "%", max(map(self.usage.measure, (*args, *kwargs.values())), default=0))
        return jinja2.filters.do_format(pattern, *args, **kwargs)

    def _indent(self, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        text = str(text)
        self.usage.check(len(text) + (width if isinstance(width, int) else len(width)) * (text.count("\n") + 1))
        return jinja2.filters.do_indent(text, width, first, blank)

    def _join(self, values: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            values = map(jinja2.filters.make_attrgetter(self, attribute), values)
        items = list(self.usage.counted(values, STEP))
        self.usage.check(self.usage.measure(items) + len(items) * len(str(d)))
        return str(d).join(map(str, items))

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        text, old, new = str(text), str(old), str(new)
        self.usage.check(len(text) + text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _sum(self, values: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
        if attribute is not None:
            values = map(jinja2.filters.make_attrgetter(self, attribute), values)
        items = [start, *self.usage.counted(values, STEP)]
        if not all(isinstance(item, (int, float)) for item in items):
            raise Refused("it sums what are not numbers")
        return sum(items)

    def _trim(self, text: Any, chars: str | None = None) -> str:
        self.usage.pairs(len(str(text)), len(chars or ""))
        return jinja2.filters.do_trim(text, chars)

    @staticmethod
    def _tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        if indent is not None and not (isinstance(indent, int) and indent <= 16):
            raise Refused("it asks tojson for an indent that is not a number up to 16")
        if separators is not None and sum(map(len, separators)) > 16:
            raise Refused("it asks tojson for separators of more than 16 characters")
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


def _date(now: datetime.datetime, form: Any) -> str:
    if not isinstance(form, str) or len(form) > LONGEST_DATE:
        raise Refused(f"it asks for a date by a format that is not text of at most {LONGEST_DATE} characters")
    return now.strftime(form)


class ChatTemplate:
    """A compiled chat template (Jinja source). Raises TemplateError where it does not compile."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source):,} characters; {MAX_SOURCE:,} are allowed.")
        environment = _Environment(len(source))
        self._usage = environment.usage
        try:
            tree = environment.parse(source)
            nodes_found = sum(1 for _ in tree.find_all(nodes.Node))
            if nodes_found > MAX_NODES:
                raise TemplateError(
                    f"the chat template has {nodes_found:,} parts, such as names and tags; {MAX_NODES:,} are allowed."
                )
            self._template = environment.from_string(_Guard(environment).visit(tree))
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"line {error.lineno} of the chat template is not Jinja: {first_line(error)}."
            ) from error
        except TemplateError:
            raise
        except Exception as error:  # Python's limits on nesting and size
            raise TemplateError(f"the chat template cannot be compiled: {first_line(error)}.") from error

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        special: Mapping[str, str],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as text.

        special: the template's variables `bos_token`, `eos_token`, … variables: further ones, such as
        `enable_thinking`. Raises TemplateError for every error inside the template.
        """
        values: dict[str, Any] = {**special, "tools": None, "documents": None, **(variables or {})}
        values.update(messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt)
        self._usage.begin(sum(len(text) for message in messages for text in message.values()))
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(values):
                size += len(piece)
                self._usage.check(size)
                pieces.append(piece)
            return "".join(pieces)
        except Refused as error:
            raise TemplateError(f"the chat template is refused: {error}.") from error
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template does not accept this conversation: {first_line(error)}.") from error
        except Exception as error:  # a template can make any Python operation fail
            raise TemplateError(
                f"the chat template cannot be rendered: {type(error).__name__}: {first_line(error)}."
            ) from error


@lru_cache(maxsize=64)
def compile_chat_template(source: str) -> ChatTemplate:
    """ChatTemplate(source); each source is compiled once."""
    return ChatTemplate(source)


def today() -> str:
    """The date by this machine's clock, as 2026-01-30."""
    return datetime.datetime.now().date().isoformat()


def clock(date: str) -> Callable[[str], str]:
    """A template's function strftime_now on this date, at midnight."""
    moment = datetime.datetime.strptime(date, "%Y-%m-%d")
    return lambda form: moment.strftime(form)
