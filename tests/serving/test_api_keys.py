"""The file of API keys: names, plain lines, and changes while the server runs."""

import logging
import os

import pytest

from palm_rlhf.serving.http.api_keys import ApiKeys, keys_of_environment, read_keys


def test_lines_have_names_or_are_keys_alone(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# who may ask\nalice: sk-1\n\nplain-key\n  bob@example.org:   sk:2  \na:b\n")
    assert read_keys(file) == [
        ("alice", "sk-1"),
        ("line 4", "plain-key"),
        ("bob@example.org", "sk:2"),
        ("line 6", "a:b"),
    ]
    assert keys_of_environment("one, two,,") == [("environment 1", "one"), ("environment 2", "two")]


@pytest.mark.parametrize("text, expected", [("\n# only this\n", "has no API key"), ("al\x1bice: key", "names a key")])
def test_a_file_without_keys_or_with_a_name_that_would_break_the_log_is_refused(tmp_path, text, expected):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match=expected):
        read_keys(tmp_path / "keys")


@pytest.fixture
def write(tmp_path):
    """Replaces the file of keys as an editor does."""

    def replace(text: str):
        new = tmp_path / "new"
        new.write_text(text)
        os.replace(new, tmp_path / "keys")
        return tmp_path / "keys"

    return replace


def test_a_changed_file_is_read_again(write, caplog):
    caplog.set_level(logging.INFO)
    keys = ApiKeys([("fixed", "zero")], write("alice: one\nbob: two\n"))
    assert [keys.owner(key).name for key in (b"zero", b"one", b"two")] == ["fixed", "alice", "bob"]
    write("bob: two\ncarol: three\n")
    assert keys.owner(b"one") is None
    assert [keys.owner(key).name for key in (b"zero", b"two", b"three")] == ["fixed", "bob", "carol"]
    assert "has changed: 3 keys" in caplog.text
    assert not any(key in caplog.text for key in ("one", "two", "three"))


@pytest.mark.parametrize("text", ["", "# nobody\n", "bad\x07name: key\n", None])
def test_a_file_that_is_broken_now_changes_nothing(write, caplog, text):
    file = write("alice: one\n")
    keys = ApiKeys(file=file)
    if text is None:
        file.unlink()
    else:
        write(text)
    for _ in range(3):
        assert keys.owner(b"one").name == "alice" and keys.owner(b"") is None and keys.owner(b"key") is None
    assert keys.secured
    assert caplog.text.count("the former keys stay valid") == 1
    write("bob: two\n")
    assert keys.owner(b"one") is None and keys.owner(b"two").name == "bob"


def test_the_id_of_an_owner_tells_nothing_of_the_key():
    one, other = (ApiKeys([("alice", "secret")]).owner(b"secret") for _ in range(2))
    assert one.name == other.name and one.id != other.id  # each server hashes with a salt of its own
    keys = ApiKeys([("alice", "secret"), ("bob", "other")])
    assert keys.owner(b"secret").id == keys.owner(b"secret").id != keys.owner(b"other").id
