"""Chat templates of strangers: bounded in time and size, and otherwise rendered as transformers renders them."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest
from tiny import CHATML, make_tokenizer
from transformers.utils import chat_template_utils

from lora_practice.console.errors import UserError
from lora_practice.data import template_sandbox
from lora_practice.data.chat_template import render

CHAT = [{"role": "user", "content": "你好 👋 {{ 1 }}"}, {"role": "assistant", "content": "hi\n"}]
HOSTILE = [
    "{{ 'a' * 10 ** 9 }}",
    "{{ messages[0].content * 10 ** 8 }}",
    "{{ ['a'] * 10 ** 9 }}",
    "{{ 10 ** (10 ** 8) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'word' }}{% endfor %}{% endfor %}",
    "{% for a in range(99999) if a > 99999 %}{% endfor %}" * 400,
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}x{% endmacro %}{{ f(60) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:>999999999}'.format('a') }}",
    "{{ 'a' | center(999999999) }}",
    "{{ 'a'.ljust(999999999) }}",
    "{{ 'a' | indent(999999999) }}",
    "{{ range(99999) | list | tojson(indent=99999) }}",
]
WELL_MEANT = [
    CHATML,
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] | upper + ']' ~ m.content | trim }}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}S{% endif %}{{ loop.index0 }}{{ m | tojson }}{% endfor %}",
    "{% macro one(m) %}<{{ m.role }}>{{ m.content }}{% endmacro %}{% for m in messages %}{{ one(m) }}{% endfor %}",
    "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + m.content|length %}{% endfor %}{{ s.n }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ messages[::-1][0].content }}",
    "{% for m in messages if m.role is defined and m.role is string %}{{ m.role.split('e')|join }}{% endfor %}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ {'a': 1, 'b': [1, 2]} }}{{ (1, 2) }}{{ 7 // 2 ** 2 }}",
]


def with_template(template: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_template_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.5)
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(UserError) as refused:
        render(with_template(template), CHAT, "data.jsonl:1")
    seconds, peak = time.monotonic() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused.value.where == "data.jsonl:1" and "template" in refused.value.what
    assert seconds < 60 and peak < 500_000_000


@pytest.mark.parametrize("template", WELL_MEANT, ids=range(len(WELL_MEANT)))
def test_other_templates_render_as_they_always_did(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    bounded = render(with_template(template), CHAT, prompt=True)
    monkeypatch.setattr(chat_template_utils, "ImmutableSandboxedEnvironment", ImmutableSandboxedEnvironment)
    chat_template_utils._compile_jinja_template.cache_clear()
    plain = with_template(template).apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    chat_template_utils._compile_jinja_template.cache_clear()
    assert bounded == plain != ""
