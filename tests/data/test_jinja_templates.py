"""Jinja templates: the names and filters that transformers puts there mean the same here."""

import re
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data.templates import JinjaTemplate

MESSAGES = [{"role": "user", "content": "<b>é & 'you'</b>"}, {"role": "assistant", "content": "a\nb"}]
SOURCES = {
    "sorted": "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=True) }}",
    "separators": "{{ messages | tojson(separators=(',', ':')) }}",
    "ascii": "{{ messages | tojson(ensure_ascii=True) }}",
    "indent": "{{ messages | tojson(indent=2) }}",
    "by position": "{{ messages | tojson(true, 4) }}",
    "html": "{{ messages | tojson }}",
    "no tools": "{% if tools is none %}none{% else %}{{ tools | length }}{% endif %}",
    "defined tools": "{{ tools is defined }} {{ documents is defined }}",
    "no documents": "{% if documents is not none %}DOCUMENTS {% endif %}{{ messages[0].content }}",
    "absent": "{{ builtin_tools is defined }} {{ date_string is defined }} {{ xml_tools is defined }}",
    "year": "{{ strftime_now('%Y') }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
}


def by_transformers(source: str, **options) -> str:
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    rendered, _ = utilities.render_jinja_template([MESSAGES], chat_template=source, **options)
    return rendered[0]


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_a_template_renders_as_in_transformers(name, add_generation_prompt):
    source = SOURCES[name] + "{% if add_generation_prompt %}>{% endif %}"
    ours = JinjaTemplate(source).render(MESSAGES, add_generation_prompt=add_generation_prompt)
    assert ours == by_transformers(source, add_generation_prompt=add_generation_prompt)


@given(form=st.lists(st.sampled_from(["%d", "%b", "%Y", "%A", "-", " ", "é"]), max_size=6).map("".join))
@settings(max_examples=20)
def test_the_date_is_that_of_today(form):
    before = datetime.now().strftime(form)
    text = JinjaTemplate("{{ strftime_now(form) }}", {"form": form}).render(MESSAGES)
    assert text in (before, datetime.now().strftime(form))


def test_a_date_in_a_known_form():
    assert re.fullmatch(r"\d{2} \w{3} \d{4}", JinjaTemplate("{{ strftime_now('%d %b %Y') }}").render(MESSAGES))
