"""The sandbox of chat templates: it renders what transformers renders, and refuses what never ends or fills memory."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from embedgrad.prompt.budget import SECONDS, Budget
from embedgrad.prompt.sandbox import ChatTemplate
from embedgrad.util.errors import TemplateError
from tests.prompt.fake_model import CHAT_TEMPLATES

LONGEST = 5.0  # seconds of one core, to compile and render once
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEXT = st.text(st.sampled_from(list("ab {}<>\n\t'\"é漢😀|%#-")), max_size=12)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(CHAT_TEMPLATES)),
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), TEXT), min_size=1, max_size=5),
    st.booleans(),
)
def test_renders_what_transformers_renders(family: str, turns: list[tuple[str, str]], generate: bool) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    source = CHAT_TEMPLATES[family]
    try:
        expected = render_jinja_template([messages], chat_template=source, add_generation_prompt=generate, **SPECIAL)[
            0
        ][0]
    except Exception:  # whatever the template refuses there, it refuses here
        with pytest.raises(TemplateError):
            ChatTemplate(source).render(messages, SPECIAL, add_generation_prompt=generate)
    else:
        assert ChatTemplate(source).render(messages, SPECIAL, add_generation_prompt=generate) == expected


FEATURES = r"""{%- macro show(m, sep='|') -%}{{ m.role }}{{ sep }}{{ m['content'] | trim }}{%- endmacro -%}
{%- set ns = namespace(n=0, text='') -%}
{%- for m in messages if m.role != 'tool' -%}
    {%- if loop.index > 4 %}{% break %}{% endif -%}
    {%- set ns.n = ns.n + 1 -%}{%- set ns.text = ns.text ~ loop.index ~ m.role | upper -%}
    {{- show(m, sep=': ') }}{{ ',' if not loop.last }}{{ loop.length }}{{ loop.revindex }}
    {{- loop.previtem.role if not loop.first }}
{%- endfor -%}
{%- for key, value in messages[0].items() -%}{{ key }}={{ value | tojson }};{%- endfor -%}
{{ messages | map(attribute='role') | join('+') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ messages | tojson(indent=2) }} {{ ns.text }} {{ ns.n * 2 + 1 }} {{ '%s-%d' | format('a', 3) }} {{ 'ab' * 3 }}
{{ ('x' ~ 1) is string }} {{ tools is none }} {{ undefined_name is defined }} {{ messages[::-1][0].role }}
{{ 'a,b'.split(',') }} {{ 'abc'.replace('b', 'xx') }} {{ '-'.join(['a', 'b']) }}
{{ 'abc' | replace('b', 'y') | indent(2) }}
{{ messages[0].content[:3] }} {{ {'a': [1, {'b': none}]} | tojson }} {{ range(3) | list }} {{ 'f{}'.format(1) }}
{{ messages | map(attribute='content') | map('length') | sum }} {{ [3, 1] | sort }} {{ dict(a=1) | items | list }}
"""


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "tool"]), TEXT), min_size=1, max_size=6))
def test_the_budget_changes_nothing_that_templates_use(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = render_jinja_template([messages], chat_template=FEATURES)[0][0]
    assert ChatTemplate(FEATURES).render(messages, {}, add_generation_prompt=False) == expected


def growing(step: str, start: str = "'aa'", after: str = "") -> str:
    """A template that makes a value from itself sixty times."""
    loop = "{% for a in range(60) %}{% set n.x = " + step + " %}{% endfor %}"
    return "{% set n = namespace(x=" + start + ") %}" + loop + after


HOSTILE = {
    "python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "mutation": "{{ messages.append(1) }}",
    "range": "{% for a in range(10**9) %}{% endfor %}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "output": "{% for a in range(99999) %}" + "x" * 10000 + "{% endfor %}",
    "output in a block": "{% set y %}{% for a in range(99999) %}" + "x" * 10000 + "{% endfor %}{% endset %}",
    "output in a macro": "{% macro f() %}"
    + "x" * 10000
    + "{% endmacro %}{% for a in range(9999) %}{% set y = y ~ f() %}"
    "{% endfor %}",
    "doubling": growing("n.x ~ n.x"),
    "doubling with +": growing("n.x + n.x"),
    "doubling lists": growing("n.x + n.x", start="[1]"),
    "doubling blocks": "{% set n = namespace(x='aa') %}{% for a in range(60) %}"
    "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "many parts": "{% set x = 'a' * 1000000 %}{{ " + " ~ ".join(["x"] * 5000) + " }}",
    "slices": "{% set x = 'a' * 1000000 %}{% for a in range(90000) %}{% set y = x[1:] %}{% endfor %}",
    "searches": "{% set x = 'a' * 1000000 %}{% for a in range(90000) %}{% set y = x.find('b') %}{% endfor %}",
    "comparisons": "{% set x = 'a' * 1000000 %}{% for a in range(90000) %}{% set y = 'b' in x %}{% endfor %}",
    "sorting": "{% set x = range(90000) | list %}{% for a in range(90000) %}{% set y = x | sort %}{% endfor %}",
    "shared lists": growing("[n.x, n.x]", "[1]", "{{ n.x }}"),
    "shared lists as JSON": growing("[n.x, n.x]", "[1]", "{{ n.x | tojson }}"),
    "shared lists as text": growing("[n.x, n.x]", "[1]", "{{ n.x ~ '' }}"),
    "shared lists formatted": growing("[n.x, n.x]", "[1]", "{{ '%s' % n.x }}"),
    "shared lists formatted by a method": growing("[n.x, n.x]", "[1]", "{{ '{}'.format(n.x) }}"),
    "shared lists formatted by a filter": growing("[n.x, n.x]", "[1]", "{{ '%s' | format(n.x) }}"),
    "shared lists upper": growing("[n.x, n.x]", "[1]", "{{ n.x | upper }}"),
    "shared lists trimmed": growing("[n.x, n.x]", "[1]", "{{ n.x | trim }}"),
    "shared lists raised": growing("[n.x, n.x]", "[1]", "{{ raise_exception(n.x) }}"),
    "shared lists compared": growing("[n.x, n.x]", "[1]", "{{ [n.x, n.x, 1] | sort }}"),
    "doubling by format": growing("'%s%s' % (n.x, n.x)"),
    "doubling by a format method": growing("'{0}{0}'.format(n.x)"),
    "replace": growing("n.x.replace('a', 'aa')"),
    "replace filter": growing("n.x | replace('a', 'aa')"),
    "join": growing("n.x.join(['a', n.x, n.x])"),
    "join filter": growing("[n.x, n.x] | join"),
    "times": "{{ 'a' * 10**10 }}",
    "times folded": "{{ 'aaaaaaaaaa' * 1000000000 }}",
    "power": "{{ 9**(9**9) }}",
    "repeated squares": growing("n.x * n.x", "9", "{{ n.x }}"),
    "width": "{{ '%1000000000d' % 1 }}",
    "width star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(width=10**9) }}",
    "expandtabs": "{{ ('\t' * 1000).expandtabs(10**8) }}",
    "expandtabs by name": "{{ ('\t' * 1000).expandtabs(tabsize=10**8) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "center": "{{ 'a' | center(10**9) }}",
    "indent": "{{ ('a\n' * 10) | indent(10**9) }}",
    "indented JSON": "{{ [1] | tojson(indent=10**9) }}",
    "separated JSON": "{{ range(99999) | list | tojson(separators=('x' * 99999, ':')) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "sum of lists": "{{ range(99999) | map('list') | sum(start=[]) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "endless cycler": "{% for a in range(99999) %}{% for b in 'x' * 99999 %}{% endfor %}{% endfor %}",
    "nesting": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep blocks": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "lipsum": "{{ lipsum(10**9) }}",
    "type": "{{ messages + 1 }}",
    "missing": "{{ messages[7].content }}",
    "zero": "{{ 1 // 0 }}",
    "raised": "{{ raise_exception('no\nsystem') }}",
    "size": "x" * (1 << 20),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_templates_are_refused_in_one_sentence_and_soon(name: str) -> None:
    start = time.process_time()
    with pytest.raises(TemplateError) as raised:
        ChatTemplate(HOSTILE[name]).render([{"role": "user", "content": "x"}], {}, add_generation_prompt=True)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300
    assert time.process_time() - start < LONGEST


def again(value: str, *before: str) -> str:
    """A template that computes `value` as often as Jinja's longest range has numbers."""
    return "".join(before) + "{% for a in range(99999) %}{% set y = " + value + " %}{% endfor %}"


def deep(value: str) -> str:
    """A template that follows a path of many steps from each of many texts."""
    return "{% set p = '0.' * 100000 ~ '0' %}{{ (['a'] * 5000) | " + value + " }}"


TEXT_1M = "{% set x = 'a' * 1000000 %}"
NUMBERS = "{% set x = range(60000) | list %}"
TUPLE = "{% set t = (" + "1," * 8000 + ") %}{% set d = {t: 1} %}"
VALUES = "{% set d = {" + ",".join(f"{i}: 1" for i in range(4000)) + "} %}"
LATE = "{% set p = 'ab' ~ 'a' * 250000 %}"
SLOW = {
    "max of a range": again("range(99999) | max"),
    "min of a range": again("range(99999) | min"),
    "in a range": again("0.5 in range(99999)"),
    "not in a range": again("0.5 not in range(99999)"),
    "select": again("range(99999) | select('eq', -1) | first"),
    "reject": again("range(99999) | reject('ge', 0) | first"),
    "select in a range": "{{ range(9999) | map('float') | select('in', range(99999)) | list | length }}",
    "a test of a range": again("0.5 is in(range(99999))"),
    "tests of lists": again("x is eq(x)", NUMBERS),
    "comparisons of lists": again("x < x", NUMBERS),
    "count in a range": again("range(99999).count(0.5)"),
    "count in a list": again("x.count(0.5)", NUMBERS),
    "values": again("d.values() | max", VALUES),
    "in values": again("5 in d.values()", VALUES),
    "trim": TEXT_1M + "{% set c = 'b' * 900000 ~ 'a' %}{{ x | trim(c) }}",
    "strip": TEXT_1M + "{% set c = 'b' * 900000 ~ 'a' %}{{ x.strip(c) }}",
    "lstrip": TEXT_1M + "{% set c = 'é' * 900000 ~ 'a' %}{{ x.lstrip(c) }}",
    "rfind": "{% set x = 'a' * 500000 %}" + LATE + "{{ x.rfind(p) }}",
    "rsplit": "{% set x = 'a' * 500000 %}" + LATE + "{{ x.rsplit(p) | length }}",
    "find": again("x.find(p)", TEXT_1M, LATE),
    "replace": again("x.replace(p, '')", TEXT_1M, LATE),
    "tags": "{% set x = '<!---->' * 140000 %}{{ (x | safe).striptags() }}",
    "tables": again("x.maketrans(x, x)", TEXT_1M),
    "hashes": again("d[t]", TUPLE),
    "paths": deep("map(attribute=p) | list"),
    "paths sorted": deep("sort(attribute=p)"),
    "paths summed": deep("sum(attribute=p)"),
    "paths grouped": deep("groupby(p)"),
    "paths selected": deep("selectattr(p) | list"),
    "paths formatted": again("p.format('a')", "{% set p = '{0' ~ '[0]' * 300000 ~ '}' %}"),
    "hexadecimal": "{{ 0x" + "f" * 90000 + " // 0x" + "f" * 30000 + " }}",
    "read hexadecimal": "{% set n = ('f' * 1000000) | int(base=16) %}{{ n // 3 }}",
    "dates": "{{ strftime_now('%c' * 100000) }}",
    "wide dates": "{{ strftime_now('%9999999999c') | length }}",
    "recursive loop": "{% for a in [range(99999) | list] recursive %}"
    + "x" * 100000
    + "{% if a is iterable %}{{ loop(a) }}{% endif %}{% endfor %}",
    "recursive block": "{% block b %}" + "x" * 100000 + "{{ self.b() }}{{ self.b() }}{% endblock %}",
    "chained macros": "".join(
        f"{{% macro m{i}() %}}{{% for a in range(9999) %}}{{{{ m{i + 1}() }}}}{{% endfor %}}{{% endmacro %}}"
        for i in range(9)
    )
    + "{% macro m9() %}x{% endmacro %}{{ m0() }}",
    "long bodies": NUMBERS + "{% for a in x %}" + "{% set b = a %}" * 5000 + "{% endfor %}",
    "JSON": again("x | tojson(indent=2)", NUMBERS),
    "title": again("x | title", "{% set x = 'a ' * 500000 %}"),
    "arguments": again("cycler(*range(99999))"),
    "changes": NUMBERS + "{% for a in range(99999) %}{% if loop.changed(x) %}{% endif %}{% endfor %}",
    "many names": "{{ [" + "a," * 60000 + "] }}",
    "many parts": "{{ " + "a~" * 30000 + "a }}",
    "many texts": "{{x}}" * 26000,
    "a list in a filter block": "{% filter list %}x{% endfilter %}",
}


@pytest.mark.parametrize("name", sorted(SLOW))
def test_no_template_computes_for_longer_than_promised(name: str) -> None:
    """Compiled and rendered, or refused by name: 5 seconds of one core are the most."""
    start = time.process_time()
    with contextlib.suppress(TemplateError):
        ChatTemplate(SLOW[name]).render([{"role": "user", "content": "x"}], {}, add_generation_prompt=True)
    assert time.process_time() - start < LONGEST


def test_the_clock_ends_what_the_units_misjudge(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}")
    monkeypatch.setattr(Budget, "measure", lambda *_: 0)
    monkeypatch.setattr(template._usage, "begin", lambda length: _endless(template._usage))
    start = time.process_time()
    with pytest.raises(TemplateError, match="runs for too long"):
        template.render([], {}, add_generation_prompt=True)
    assert 0.5 * SECONDS < time.process_time() - start < LONGEST


def _endless(usage: Budget) -> None:
    Budget.begin(usage, 0)
    usage.units = 10**18


def test_time_that_others_take_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that waits, as on a busy machine, has computed for no longer."""
    template = ChatTemplate("{{ strftime_now('x') }}{% for a in range(9) %}{{ a }}{% endfor %}")
    monkeypatch.setattr("embedgrad.prompt.sandbox._date", lambda *_: time.sleep(SECONDS + 0.2) or "x")
    assert template.render([], {}, add_generation_prompt=True) == "x012345678"


@pytest.mark.parametrize(
    "inside", ["raise_exception.__globals__", "messages.__class__", "strftime_now.__code__", "'%s'.format.__self__"]
)
def test_python_stays_out_of_sight(inside: str) -> None:
    try:
        shown = ChatTemplate("{{ " + inside + " }}").render([], {}, add_generation_prompt=True)
    except TemplateError:
        return
    assert shown == ""


def test_each_rendering_has_its_own_budget() -> None:
    template = ChatTemplate("{% for a in range(90000) %}{% endfor %}{{ messages[0].content }}")
    for _ in range(20):
        assert template.render([{"role": "user", "content": "x"}], {}, add_generation_prompt=True) == "x"
