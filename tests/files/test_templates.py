"""Chat templates: what transformers makes of a conversation, within bounds whatever the template does."""

from __future__ import annotations

import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from waterfill.base.errors import WaterfillError
from waterfill.files.settings import templates
from waterfill.files.settings.templates import conversation_text

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TALKS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What's <b> & 'x' \"y\"?\n ok 日本 "}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhello"},
        {"role": "user", "content": "more\tplease"},
    ],
]

# In the styles of the families that are used most.
STYLES = {
    "headers": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|h|>' + message['role']"
        " + '<|/h|>\n\n' + message['content'] | trim + '<|eot|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
    ),
    "instructions": (
        "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}"
        "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}{{- bos_token }}"
        "{%- for m in rest %}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{- raise_exception('roles must alternate') }}{%- endif %}{%- if m.role == 'user' %}"
        "{%- if loop.last and system is defined %}{{- '[INST] ' ~ system ~ '\n\n' ~ m.content ~ '[/INST]' }}"
        "{%- else %}{{- '[INST] %s[/INST]' % m.content }}{%- endif %}"
        "{%- else %}{{- ' ' + m.content|trim + eos_token }}{%- endif %}{%- endfor %}"
    ),
    "thoughts": (
        "{%- set ns = namespace(last=messages|length - 1, multi=true) %}{%- for message in messages[::-1] %}"
        "{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.multi and message.role == 'user' and not("
        "message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}{%- set ns.multi = false %}"
        "{%- set ns.last = index %}{%- endif %}{%- endfor %}{%- for message in messages %}"
        "{%- if message.role == 'assistant' %}{%- set content = message.content %}{%- if '</think>' in content %}"
        "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
        "{%- if loop.index0 > ns.last %}{{- thought }}{%- endif %}{{- '<|s|>' + content + '<|e|>\\n' }}"
        "{%- else %}{{- '<|s|>' + message.role + '\\n' + message.content + '<|e|>\\n' }}{%- endif %}{%- endfor %}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>' }}{%- endif %}"
    ),
    "macros": (
        "{% macro show(message, upper=false) -%}{{ message.role|upper if upper else message.role }}: "
        "{{ caller() if caller }}{{ message.content|default('none', true)|replace('\\n', ' ') }}\n{%- endmacro %}"
        "{% for m in messages %}{% call show(m, upper=loop.first) %}{{ loop.index }}/{{ loop.length }} {% endcall %}"
        "{% else %}nobody{% endfor %}{% set end %}{{ messages|map(attribute='role')|join(', ') }}{% endset %}{{ end }}"
    ),
    "recursion": (
        "{% for item in [['a', []], ['b', [['c', []]]]] recursive %}{{ item[0] }}{{ loop(item[1]) }}{% endfor %}"
        "{% for m in messages if m.role != 'system' %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{{ loop.cycle('x', 'y') }}{{ m.content }}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}"
        "{{ messages[-1].content }}"
    ),
}
# Pieces of the language, each in a template that shows what was said.
PIECES = [
    "{{ messages|tojson }}{{ messages|tojson(indent=2) }}{{ {'é': [1, none, true]}|tojson(ensure_ascii=true) }}",
    "{{ messages|tojson(separators=(',', ':'), sort_keys=true) }}",
    "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list }}",
    "{{ messages|rejectattr('role', 'in', ['system', 'x'])|list|length }}{{ messages|map('upper')|first }}",
    "{{ messages[0].items()|list }}{{ messages[0]|dictsort }}{{ messages[0]|items|list }}{{ messages[0].get('x', 7) }}",
    "{{ [3, 1, 2]|sort|join('-') }}{{ [3, 1, 2]|sum }}{{ [1, 1]|unique|list }}{{ [1, 2, 3]|batch(2, 0)|list }}",
    "{{ [1, 2, 3]|slice(2)|list }}{{ [1, 2]|reverse|list }}{{ 'ab'|reverse }}{{ [1, 2]|max }}{{ 'a b'|wordcount }}",
    "{{ 'a\\nb'|indent(2, true) }}{{ 'a'|center(9) }}{{ '<'|e }}{{ 'ab cd'|title }}{{ 'abc'|truncate(2, true, '') }}",
    "{{ '%s %03d'|format('a', 7) }}{{ '%(a)s' % {'a': 1} }}{{ '{:>5}{a!r}'.format('x', a='y') }}{{ '%5.2f' % 1.5 }}",
    "{{ 'a-b'.split('-', 1) }}{{ ','.join(['a', 'b']) }}{{ 'x'.zfill(3) ~ 'y'.ljust(3) ~ 'z'.rjust(3, '.') }}",
    "{{ 1 + 2 * 3 ** 2 // 4 % 5 - 1 / 2 }}{{ 'a' * 3 ~ [0] * 2 }}{{ -1|abs }}{{ 2.56|round(1, 'floor') }}",
    "{{ 'a' in 'abc' and 2 not in [1] or 1 < 2 <= 3 }}{{ none is none }}{{ x is undefined }}{{ 4 is divisibleby 2 }}",
    "{{ (1, 'a', [2]) }}{{ {'a': 1}.items()|list }}{{ dict(a=1) }}{{ dict.fromkeys('ab', 1) }}{{ range(3)|list }}",
    "{% set a, b = (1, 2) %}{{ a }}{{ b }}{% set n = namespace(v=[]) %}{% set n.v = n.v + [1] %}{{ n.v }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner() %}{{ j() }}{{ j() }}",
    "{% filter upper %}shout{% endfilter %}{% raw %}{{ x }}{% endraw %}{% if true %}y{% endif %}{# no #}",
    "{{ 'x'|attr('upper') }}{{ messages|first|attr('role') }}{{ '7'|int + 1 }}{{ '7.5'|float }}{{ 'z'|int(3) }}",
    "{{ messages|groupby('role') }}{{ messages|last }}{{ ['a', 'b']|map('upper')|join }}{{ 10|string + 'a' }}",
    "{% block body %}{{ messages|length }}{% endblock %}{{ self.body() }}{{ loop is defined }}{{ 1 if false }}",
    "{{ 'ab'[1] ~ 'abc'[1:] ~ 'abc'[::-1] ~ [1, 2, 3][-2:] }}{{ 'Ab'.swapcase().casefold().isalpha() }}",
]


def expected(template: str, talk: Any) -> str:
    rendered, _ = render_jinja_template([talk], chat_template=template, add_generation_prompt=True, **SPECIAL)
    text: str = rendered[0]
    return text


@pytest.mark.parametrize("talk", TALKS, ids=["one", "four"])
@pytest.mark.parametrize("template", [*STYLES.values(), *(f"{piece}{{{{ messages }}}}" for piece in PIECES)])
def test_texts_are_those_of_transformers(template: str, talk: list[dict[str, str]]) -> None:
    try:
        wanted = expected(template, talk)
    except Exception as error:  # a template may refuse a conversation
        with pytest.raises(WaterfillError, match=str(error)):
            conversation_text(template, talk, SPECIAL)
    else:
        assert conversation_text(template, talk, SPECIAL) == wanted


PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% else %}<image>{% endif %}{% endfor %}\n{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content"
    " %}[{{ part.text }}]{% endfor %}{% endif %}\n{% endfor %}"
)


def in_parts(talk: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [{**said, "content": [{"type": "text", "text": said["content"]}]} for said in talk]


@pytest.mark.parametrize("talk", TALKS, ids=["one", "four"])
def test_content_is_given_in_the_form_that_a_template_shows(talk: list[dict[str, str]]) -> None:
    assert conversation_text(PARTS, talk, SPECIAL) == expected(PARTS, in_parts(talk)) != expected(PARTS, talk)
    assert conversation_text(EITHER, talk, SPECIAL) == expected(EITHER, talk)
    strict = "{% for m in messages %}{{ m.content[0].text + '' }}{% endfor %}"  # an error for text
    assert conversation_text(strict, talk, SPECIAL) == expected(strict, in_parts(talk))
    shouting = "{% for m in messages %}{{ m.content|upper|replace('\\n', ' ') }}{% endfor %}"
    assert conversation_text(shouting, talk, SPECIAL) == expected(shouting, talk)
    assert conversation_text(PARTS, in_parts(talk), SPECIAL) == expected(PARTS, in_parts(talk))  # the caller's own
    with pytest.raises(WaterfillError, match="leaves out what the user says"):
        conversation_text("{{ messages|length }} messages", talk, SPECIAL)


def repeated(body: str) -> str:
    """A template that does something very often."""
    return "{% set ns = namespace(s='ab', l=[1, 'a']) %}{% for i in range(99999) %}" + body + "{% endfor %}"


HOSTILE = [
    *("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",),
    *("{% for a in range(99999) if a is none %}{% endfor %}" * 9,),
    *("{% for a in range(99999) %}{% for b in range(99999) if 0 %}{% endfor %}{% endfor %}",),
    *("{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",),
    *("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "{% block a %}{{ self.a() }}{% endblock %}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",),
    *("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",),
    *("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% else %}xy{% endif %}{% endmacro %}{{ f(60) }}",),
    *(repeated("{% set ns.s = ns.s ~ ns.s %}"), repeated("{% set ns.s = ns.s + ns.s %}")),
    *(repeated("{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"), repeated("{% set ns.s = ns.s * 2 %}")),
    *(repeated("{% set ns.l = ns.l + ns.l %}"), repeated("{% set ns.l = [ns.l, ns.l] %}")),
    *(repeated("{% set ns.l = (ns.l, ns.l) %}"), repeated("{% set ns.l = {'a': ns.l, 'b': ns.l} %}")),
    *(repeated("{% set ns.l = dict(a=ns.l, b=ns.l) %}"), repeated("{% set ns.l = [ns.l]|batch(2, ns.l)|list %}")),
    *(repeated("{% set ns.n = (ns.n or 3) ** 2 %}"), repeated("{% set ns.s = ns.s.replace('a', ns.s) %}")),
    *(repeated("{{ range(99999)|sum }}"), repeated("{{ range(99999)|map('string')|list|length }}")),
    *(repeated("{{ dict.fromkeys(range(99999))|length }}"), repeated("{{ 'x' in range(99999)|list }}")),
    *(repeated("{{ ('a ' * 9999).split()|length }}"), repeated("{{ ('a' * 99999).upper() is eq 'b' }}")),
    *(repeated("x" * 9999), "{% filter upper %}" + repeated("x" * 9999) + "{% endfilter %}"),
    *("{{ 'A' * 10**10 }}", "{{ 10**10 * 'A' }}", "{{ [0] * 10**10 }}"),
    *("{{ 9 ** 9 ** 9 ** 9 ** 9 }}", "{{ 10 ** 9999 }}"),
    *("{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10**9, 1) }}", "{{ '%.999999999f' % 1 }}"),
    *("{{ '%9999999d'|format(1) }}",),
    *("{{ '{:1000000000}'.format(1) }}", "{{ '{:{}}'.format(1, 10**9) }}"),
    *("{{ '{a:9999999}'.format_map({'a': 1}) }}",),
    *("{{ ('{:1000000000}'|attr('format'))(1) }}", "{{ ('{:1000000000}'['format'])(1) }}"),
    *("{{ 'a'|center(10**10) }}", "{{ 'a'.center(10**10) }}", "{{ 'a'.ljust(10**10) }}", "{{ 'a'.zfill(10**10) }}"),
    *("{{ 'a\n'|indent(10**10) }}", "{{ [1]|batch(10**10, 0)|list }}", "{{ [1]|slice(10**10)|list }}"),
    *("{{ 1.5|round(10**10, 'floor') }}", "{{ [1]|tojson(indent=10**10) }}", "{{ [[1]] | sum(start=[]) }}"),
    *("{{ ('a' * 9999)|replace('a', 'b' * 99999) }}", "{{ ('a' * 9999).replace('', 'b' * 99999) }}"),
    *("{{ range(99999)|join('b' * 99999) }}", "{{ ('b' * 99999).join(('a' * 9999)|list) }}"),
    *("{{ (1).to_bytes(10**10, 'big') }}", "{{ 'a'.encode() }}", "{{ '\t'.expandtabs(10**10) }}", "{{ lipsum() }}"),
    *("{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{{ [][0].x }}", "{{ messages.x.y }}", "{{ '%d' % 'a' }}", "{{ x() }}"),
    *("{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'x' %}", "{{ range(10**10) }}", "{{ 1 }"),
    *("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ " + "1+" * 3000 + "1 }}", "{{ " + "9" * 9999 + " }}"),
    *("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "a" * 300_000),
    *("{{ " + "~".join(["('a' * 99999)"] * 99) + " }}", "{% autoescape true %}{{ '<' }}{% endautoescape %}"),
    *("{{ strftime_now('%Y' * 10**7) }}", "{{ raise_exception('a' * 99999) }}", "{{ strftime_now(1) }}"),
]  # fmt: skip


@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_whatever_a_template_does_ends_soon_and_in_words(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "WORK", 200_000)
    start_s = time.process_time()
    with pytest.raises(
        WaterfillError, match=r"^the model's chat template (refuses the conversation|fails|is no Jinja) \("
    ) as raised:
        conversation_text(template + "{{ messages }}", TALKS[0], SPECIAL)
    assert time.process_time() - start_s < 5
    assert len(str(raised.value)) < 600


def test_long_conversations_may_take_as_much_more() -> None:
    talk = [{"role": role, "content": "word " * 100} for _ in range(150) for role in ("user", "assistant")][:-1]
    for style in STYLES.values():
        assert conversation_text(style, talk, SPECIAL) == expected(style, talk)
