"""Jinja templates: the names and filters that transformers puts there mean the same here."""

import re
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palm_rlhf.data import jinja_sandbox
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


NAMESPACE = "{% set n = namespace(x='0123456789') %}"
# Each ends only after days, or takes more memory than there is.
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a filtered loop": "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "a macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(64) }}",
    "a recursive loop": "{% for i in [1,1] recursive %}{{ loop([1,1]) }}{% endfor %}",
    "a product": "{{ 'a' * 10**11 }}",
    "a product of lists": "{{ 10**11 * [1] }}",
    "a power": "{{ 9**(9**9) }}",
    "joined texts": NAMESPACE + "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "added texts": NAMESPACE + "{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_that_would_not_end_is_refused(case, monkeypatch):
    monkeypatch.setattr(jinja_sandbox, "MAX_STEPS", 10**5)  # for a quick test
    template = JinjaTemplate(ENDLESS[case])
    with pytest.raises(ValueError, match=r"refuses the conversation: (SecurityError: it takes|RecursionError)"):
        template.render([])


def test_each_rendering_has_its_own_bound(monkeypatch):
    monkeypatch.setattr(jinja_sandbox, "MAX_STEPS", 10**5)
    template = JinjaTemplate("{% for i in range(90000) %}{% endfor %}a{{ 2 * 'b' ~ 2 ** 3 + '1' }}")
    assert {template.render([]) for _ in range(3)} == {"abb81"}


@pytest.mark.parametrize(
    "source", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if x %}" * 99, "{% for i in x %}" * 40]
)
def test_a_template_that_python_cannot_compile_is_refused(source):
    ends = "{% endif %}" * 99 if "if" in source else "{% endfor %}" * 40
    with pytest.raises(ValueError, match="is not valid Jinja"):
        JinjaTemplate(source + (ends if "%}" in source else ""))


def test_loops_have_all_that_jinja_gives_them():
    source = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.revindex }}{{ loop.last }}"
        "{{ (loop.previtem or m).role ~ (loop.nextitem or m).role }} {% else %}none{% endfor %}"
        "{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% endfor %}{% for q in nothing %}q{% else %}-{% endfor %}"
        "{% for w in [1, 2, 3] if w > 1 %}{{ w }}{{ loop.first }}{% break %}{% endfor %}"
    )
    turns = [{"role": role, "content": "x"} for role in ("system", "user")]
    text = "1/22Falsesystemuser 2/21Truesystemuser x1-2True"
    assert JinjaTemplate(source).render(turns) == text
    assert JinjaTemplate(source).render([]).startswith("none")
