"""A file is replaced whole, or not at all, and has the permissions of any new file."""

import os
import stat

import pytest

from palm_rlhf.model.files import replacing, write_text
from tests.factories import palm_of


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


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_weights_may_be_read_by_whom_the_umask_lets_read(tmp_path):
    palm = palm_of(0)
    palm.add_finetune_params("default", 2)
    before = os.umask(0o027)
    try:
        palm.save_pretrained(tmp_path / "whole")
        palm.save_pretrained(tmp_path / "shards", max_shard_size="6KB")
        palm.save_adapter(tmp_path / "adapter")
    finally:
        os.umask(before)
    modes = {file: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("*/*") if file.is_file()}
    assert len(modes) >= 7 and set(modes.values()) == {0o640}, modes
