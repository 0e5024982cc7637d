"""Text files as editors on any system save them: with or without a byte order mark, with any line ends."""

import codecs
import json

import pytest
import torch

from palm_rlhf.data.templates import load_template
from palm_rlhf.data.text import load_corpus
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.evaluation.judging.answers import read_questions
from palm_rlhf.evaluation.length_control import read_regularizer
from palm_rlhf.evaluation.measures.text_prediction import read_documents
from palm_rlhf.model.files import read_text
from palm_rlhf.model.weights_folder import read_json
from palm_rlhf.serving.http.api_keys import read_keys
from palm_rlhf.training.rlhf.prompts import read_prompts

GAMED = "index,preference,std_delta_len,instruction_difficulty\n0,1,0.5,0.25\n"
TEXT = "Hello thére, " * 20
# For each reader: the file's name, its text, and what the reader makes of it.
READERS = {
    "prompts": ("prompts.txt", "Hi\nyou\n", lambda path: texts_of(read_prompts(256, **prompts_in(path)).token_ids)),
    "keys": ("keys.txt", "secret\nother\n", lambda path: read_keys(path)),
    "regularizer": ("df_gamed.csv", GAMED, lambda path: read_regularizer(path).difficulties),
    "text to measure": ("held_out.txt", TEXT, lambda path: read_documents(path)),
    "text to train on": ("a.txt", TEXT, lambda path: corpus_of(path)),
    "texts to train on": ("a.jsonl", json.dumps({"text": TEXT}), lambda path: corpus_of(path)),
    "questions": ("q.jsonl", '{"question_id": 1, "text": "Why?"}', lambda path: read_questions(path)),
    "template": ("chat_template.jinja", "{{ messages[0].content }}", lambda path: load_template(path.parent)),
    "JSON": ("config.json", '{"a": 1}', lambda path: read_json(path)),
}


def prompts_in(path):
    return {"prompts_path": path, "tokenizer": ByteTokenizer()}


def texts_of(rows):
    return [bytes(row.tolist()).decode() for row in rows]


def corpus_of(path):
    corpus = load_corpus(str(path), cache_dir=path.parent / "cache")
    return torch.cat([torch.from_numpy(part[0].copy()) for part in (corpus.train, corpus.valid)]).tolist()


@pytest.mark.parametrize("reader", READERS)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, reader):
    name, text, read = READERS[reader]
    found = []
    for start in (b"", codecs.BOM_UTF8):
        folder = tmp_path / f"{len(start)}"
        folder.mkdir()
        (folder / name).write_bytes(start + text.encode())
        found.append(read(folder / name))
    assert found[0] == found[1]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("codec", ["utf-16", "utf-32"])
def test_utf_16_is_refused_with_the_way_out(tmp_path, reader, codec):
    name, text, read = READERS[reader]
    (tmp_path / name).write_bytes(text.encode(codec))
    with pytest.raises(ValueError, match=rf"{name}.*no.? UTF-8.*UTF-16.*convert it to UTF-8, as by iconv"):
        read(tmp_path / name)


def test_the_text_is_as_it_was_written(tmp_path):
    for content in ("", "a", "ab\r\nc\r", "\ufeffé"):
        (tmp_path / "a").write_bytes(content.encode())
        assert read_text(tmp_path / "a") == content.removeprefix("\ufeff")
    (tmp_path / "a").write_bytes("{}".encode("utf-16-le"))  # without its byte order mark
    with pytest.raises(ValueError, match="looks like UTF-16"):
        read_text(tmp_path / "a")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_have_the_line_ends_of_any_system(tmp_path, end):
    (tmp_path / "p").write_bytes(end.join(["a", "", "b\u2028c", ""]).encode())
    assert texts_of(read_prompts(256, **prompts_in(tmp_path / "p")).token_ids) == ["a", "b\u2028c"]
