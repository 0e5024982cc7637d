"""The catalogues have each text of the sources, with the same fields in it, and no other text."""

import re

import pytest
from babel.messages.catalog import Catalog
from fastapi.testclient import TestClient

from palm_rlhf.feedback.refusals import FeedbackError
from palm_rlhf.feedback.web.catalogues import Catalogues
from palm_rlhf.feedback.web.message_extraction import (
    LOCALES,
    read_catalogue,
    source_messages,
    update,
    write_catalogue,
)

FIELD = re.compile(r"%%|%\(\w+\)s|\{\w+\}")
FIX = "run python -m palm_rlhf.feedback.web.message_extraction, then translate what it prints"


def forms(text):
    return (text,) if isinstance(text, str) else tuple(text)


def faults(catalogue, source):
    """What a catalogue lacks, has too much, or has with other fields; a form of a plural may leave the number out."""
    found = [f"missing: {message.id}" for message in source if message.id and not _translated(catalogue, message)]
    found += [f"obsolete: {message.id}" for message in catalogue if message.id and message.id not in source]
    found += [f"fuzzy: {message.id}" for message in catalogue if message.id and message.fuzzy]
    for message in catalogue:
        expected = sorted(FIELD.findall(forms(message.id)[-1]))
        for text in filter(None, forms(message.string)) if message.id else ():
            fields = sorted(FIELD.findall(text))
            if fields != expected and not (message.pluralizable and fields == [] and expected == ["%(num)s"]):
                found.append(f"fields {fields} in place of {expected}: {message.id}")
        if message.pluralizable and "%(num)s" not in forms(message.string)[-1]:
            found.append(f"a plural without a number: {message.id}")
    return found


def _translated(catalogue, message):
    found = catalogue.get(message.id)
    return found is not None and all(forms(found.string))


@pytest.fixture(scope="module")
def source():
    return source_messages()


@pytest.mark.parametrize("path", sorted(LOCALES.glob("*.po")), ids=lambda path: path.stem)
def test_a_catalogue_has_each_text_with_its_fields_and_no_other(path, source):
    assert faults(read_catalogue(path), source) == [], FIX


def test_texts_come_from_templates_marks_and_refusals(source):
    assert all(text in source for text in ("Next task", "Leaderboard", "the text is blank: write something"))
    assert source.get("got {length} characters, expected at most {most}") is not None
    assert source.get("Your reply is now looked at by one person.").pluralizable


def test_what_is_wrong_with_a_catalogue_is_found():
    source, catalogue = Catalog(), Catalog(locale="zh")
    for text in ("one", "two", "%(name)s left", "{most} at most", ("%(num)s dog", "%(num)s dogs")):
        source.add(text)
    catalogue.add("one", "一")
    catalogue.add("three", "三")
    catalogue.add("%(name)s left", "%(who)s 走了")
    catalogue.add("{most} at most", "最多")
    catalogue.add(("%(num)s dog", "%(num)s dogs"), ("狗",))
    assert [fault.partition(":")[0] for fault in faults(catalogue, source)] == [
        "missing",
        "obsolete",
        "fields ['%(who)s'] in place of ['%(name)s']",
        "fields [] in place of ['{most}']",
        "a plural without a number",
    ]


def test_an_update_keeps_translations_adds_new_texts_and_drops_old_ones(tmp_path):
    path, source = tmp_path / "zh.po", Catalog()
    catalogue = Catalog(locale="zh")
    catalogue.add("kept", "留下")
    catalogue.add("dropped", "去掉")
    write_catalogue(path, catalogue)
    source.add("kept")
    source.add("new")
    assert update(path, source) == ["new"]
    after = read_catalogue(path)
    assert {message.id: message.string for message in after if message.id} == {"kept": "留下", "new": ""}
    before = path.read_bytes()
    update(path, source)
    assert path.read_bytes() == before


def test_pages_are_in_the_language_that_was_chosen_and_mirrored_where_it_is_written_from_the_right(join):
    ada = join("Ada", language=None)
    assert ada.open("/").page.html["lang"] == "en"
    assert ada.open("/?lang=zh").heading == "您想做什么？"
    assert (ada.open("/").page.html["lang"], ada.page.html["dir"]) == ("zh", "ltr")
    ada.open("/?lang=ar")
    assert (ada.page.html["lang"], ada.page.html["dir"]) == ("ar", "rtl")
    assert ada.open("/?lang=xx").page.html["lang"] == "ar"
    assert ada.page.find("a", hreflang="en").get_text() == "English"


def test_the_browser_says_which_language_a_new_visitor_gets(join):
    client: TestClient = join("Ada", language=None).client
    client.headers["Accept-Language"] = "fr-FR,fr;q=0.9,zh-CN;q=0.8,en;q=0.5"
    assert '<html lang="zh"' in client.get("/").text


def test_refusals_are_translated_with_their_values(join, site):
    ada = join("Ada", language="zh").open("/").press("write_prompt").press("提交", text=" ")
    assert ada.page.find(class_="refusal").get_text() == "内容为空，请写点什么"
    ada.press("提交", text="x" * 8001)
    assert ada.page.find(class_="refusal").get_text() == "共有 8001 个字符，最多允许 8000 个"


def test_a_text_with_braces_and_without_values_stays_as_it_is(site):
    assert str(FeedbackError("got {x}")) == "got {x}"
    assert str(FeedbackError("at most {most}", most=3)) == "at most 3"


def test_a_language_that_babel_does_not_know_is_named_by_its_code():
    assert Catalogues.name_of("en") == "English"
    assert Catalogues.name_of("en", "zh") == "英语"
    assert Catalogues.name_of("x-y") == "x-y"
