"""What becomes of conversations: a full context, cut replies, history beyond the tab, files, and deletion."""

import json

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

HISTORY = "localStorage.getItem('palm-rlhf.history')"


def keep_in_browser(page) -> None:
    page.click("#settings-button")
    page.click("[name=keep]")
    page.find("#settings [value=done]").click()


def titles(page) -> list[str]:
    return page.texts(".open")


def test_a_full_context_leaves_out_the_oldest_exchanges_and_says_so(serve, open_page):
    with serve(context=40) as (url, _):
        page = open_page(url)
        page.ask("Hello")
        assert page.texts(".left-out-line") == []
        while not page.texts(".left-out-line"):
            assert page.ask("Hello") == "Hi there, how are you?"
            assert len(page.said()) < 30
        count = len(page.said())
        (line,) = page.texts(".left-out-line")
        num_left_out = len(page.texts(".message.left-out"))
        assert line == f"The context is full: the first {num_left_out} messages are no longer sent to the model."
        sent = page.asked()[-1]["messages"]
        assert len(sent) == count - 1 - num_left_out and sent[0]["role"] == "user"
        assert page.ask("Hello again") == "Hi once more."
        page.browser.refresh()  # what is left out stays so
        assert len(page.said()) == count + 2
        assert len(page.texts(".message.left-out")) >= num_left_out
        page.click(".message:last-child .copy-message")  # the line between the messages moves nothing
        assert page.said()[-1][1] == "Hi once more."


def test_one_message_that_is_too_long_is_told(serve, open_page):
    with serve(context=6) as (url, _):
        page = open_page(url)
        page.send("Hello\n" + "Hello" * 20)
        page.wait()
        page.send("x" * 4000)
        page.wait()
        assert "context" in page.find(".failure").text


def test_a_cut_reply_goes_on(page):
    page.click("#settings-button")
    page.find("[name=maxTokens]").send_keys("2", Keys.ENTER)
    assert page.ask("Hello") == "Hi there,"
    page.click("#settings-button")
    page.find("[name=maxTokens]").send_keys(Keys.BACKSPACE, Keys.ENTER)
    page.click(".last .continue")
    page.wait()
    assert [text for _, text in page.said()] == ["Hello", "Hi there, how are you?"]
    asked = page.asked()[-1]
    assert asked["messages"] == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi **there**, "},
    ]
    assert asked["continue_final_message"] is True and asked["add_generation_prompt"] is False
    assert not page.find(".last .continue").is_displayed()


def test_a_stopped_reply_goes_on_too(page):
    page.send("loop")
    page.until("document.querySelector('.assistant .text')?.textContent.length > 50")
    page.click("#stop")
    page.wait()
    length = len(page.said()[-1][1])
    page.click(".last .continue")
    page.until(f"document.querySelector('.assistant .text').textContent.length > {length + 50}")
    page.click("#stop")
    page.wait()
    assert len(page.said()) == 2


def test_top_p_stop_texts_and_seed_reach_the_server(page):
    page.click("#settings-button")
    page.find("[name=topP]").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    page.find("[name=stop]").send_keys("are", Keys.ENTER, "you", Keys.ENTER)
    page.find("[name=seed]").send_keys("7")
    page.find("#settings [value=done]").click()
    assert page.ask("Hello") == "Hi there, how"
    (asked,) = page.asked()
    assert (asked["top_p"], asked["stop"], asked["seed"]) == (0.9, ["are", "you"], 7)
    page.browser.refresh()
    page.click("#settings-button")
    values = [page.find(f"[name={name}]").get_attribute("value") for name in ("topP", "stop", "seed")]
    assert values == ["0.9", "are\nyou\n", "7"]


def test_conversations_outlive_the_tab_where_the_person_wants_it(page, open_page, scripted_server):
    url = scripted_server[0]
    page.ask("Hello")
    assert page.js(f"return {HISTORY}") is None
    keep_in_browser(page)
    assert page.texts("#kept") == ["Conversations are kept in this browser."]
    page.click("#new")
    page.ask("Hello again")

    other = open_page(url)
    assert titles(other) == ["Hello again", "Hello"]
    assert other.texts("#kept") == ["Conversations are kept in this browser."]
    other.click("#new")
    other.ask("code")
    page.browser.switch_to.window(page.browser.window_handles[-2])
    page.ask("Hello")  # a tab adds to what another has kept, and takes nothing away
    kept = json.loads(page.js(f"return {HISTORY}"))
    openings = [conversation["messages"][0]["content"] for conversation in kept["conversations"]]
    assert sorted(openings) == ["Hello", "Hello again", "code"]
    assert max(len(conversation["messages"]) for conversation in kept["conversations"]) == 4

    keep_in_browser(page)
    assert page.js(f"return {HISTORY}") is None
    assert sorted(titles(page)) == ["Hello", "Hello again", "code"]
    assert titles(open_page(url)) == ["New chat"]


def test_the_key_is_never_kept_beyond_the_tab(page):
    page.js("sessionStorage.setItem('palm-rlhf.key', 'sk-secret')")
    keep_in_browser(page)
    page.ask("Hello")
    assert "sk-secret" not in page.js("return JSON.stringify(localStorage)")


def test_a_deleted_conversation_can_be_put_back(page):
    page.ask("Hello")
    page.click("#new")
    page.ask("Hello again")
    page.js("document.querySelector('#conversations li:last-child .remove').click()")
    assert titles(page) == ["Hello again"]
    assert page.find("#deleted").is_displayed()
    page.click("#undo")
    assert titles(page) == ["Hello again", "Hello"]
    assert [text for _, text in page.said()] == ["Hello", "Hi there, how are you?"]
    assert not page.find("#deleted").is_displayed()
    page.js("document.querySelector('#conversations li:first-child .remove').click()")
    page.ask("Hello")  # going on is an answer, too
    assert not page.find("#deleted").is_displayed()


def test_conversations_go_into_a_file_and_come_back(page, tmp_path):
    page.ask("Hello")
    page.click("#new")
    page.ask("<b>unheard of</b>")
    page.js(
        "window.blobs = []; const real = URL.createObjectURL;"
        "URL.createObjectURL = (blob) => { blob.text().then((text) => blobs.push(text)); return real(blob); };"
    )
    page.click("#export")
    (text,) = page.until("blobs.length && blobs")
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines == [
        {
            "messages": [
                {"role": "user", "content": "<b>unheard of</b>"},
                {"role": "assistant", "content": "I know nothing of that."},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi **there**, how are you?"},
            ]
        },
    ]

    system = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello again"}]}
    (tmp_path / "in.jsonl").write_text(
        "\ufeff" + json.dumps(system) + "\r\n\r\n" + json.dumps(lines[1]) + "\n", "utf-8"
    )
    page.find("#file").send_keys(str(tmp_path / "in.jsonl"))
    page.until("document.querySelectorAll('.open').length === 4")
    assert titles(page) == ["Be brief.", "Hello", "<b>unheard of</b>", "Hello"]
    assert page.said() == [["System prompt", "Be brief."], ["You", "Hello again"]]
    page.ask("Hello")
    assert page.asked()[-1]["messages"][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The file holds no conversation."),
        ('{"messages": [{"role": "user", "content": "a"}]}\nnot JSON', "Line 2 is no conversation"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "Line 1 is no conversation"),
        ('{"messages": [{"role": "user", "content": null}]}', "Line 1 is no conversation"),
        ('["a"]', "Line 1 is no conversation"),
    ],
)
def test_a_file_that_holds_no_conversations_is_refused_whole(page, tmp_path, text, message):
    page.ask("Hello")
    (tmp_path / "in.jsonl").write_text(text)
    page.find("#file").send_keys(str(tmp_path / "in.jsonl"))
    page.until("!document.querySelector('#status').classList.contains('hidden')")
    assert f"in.jsonl: {message}" in page.find("#status").text
    assert titles(page) == ["Hello"]
    assert len(page.browser.find_elements(By.CSS_SELECTOR, ".message")) == 2
