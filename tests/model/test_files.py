"""A file is replaced whole, or not at all."""

import os

import pytest

from palm_rlhf.model.files import replacing, write_text


def test_a_text_replaces_the_one_before_in_one_piece(tmp_path):
    path = tmp_path / "a.json"
    for text in ("old\n", "né\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode("utf-8")
    assert os.listdir(tmp_path) == ["a.json"]


def test_until_the_end_of_the_block_the_old_file_stands(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.parent == tmp_path
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error):
        with replacing(path) as partial:
            partial.write_text("half of the n")
            raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
