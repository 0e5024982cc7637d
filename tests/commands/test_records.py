"""Models and records on their way to a trainer: what is held out, what fits, and the tokens that they become."""

import json

import pytest
import torch

from palm_rlhf.commands.start_models import ChatModel, open_chat_model
from palm_rlhf.commands.training_data import (
    fit_to_context,
    rankings_of,
    read_prompts,
    read_records_for,
    split_held_out,
    unpaired_preferences_of,
)
from palm_rlhf.data.conversation import encode_prompt, encode_response
from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.palm import PaLM

SMALL = {"dim": 16, "depth": 1, "heads": 1, "dim_head": 8}


@pytest.fixture
def model() -> ChatModel:
    return ChatModel(PaLM(num_tokens=261, **SMALL), ByteTokenizer(), PRESETS["default"])


def question(text: str) -> dict:
    return {"role": "user", "content": text}


def test_a_model_of_bytes_without_a_tokenizer_gets_one(tmp_path):
    palm = PaLM(num_tokens=256, **SMALL)
    palm.save_pretrained(tmp_path)
    grown, tokenizer, template = open_chat_model(tmp_path, "vicuna")
    assert template == PRESETS["vicuna"]
    assert set(template.special_tokens) <= set(tokenizer.special_tokens)
    assert grown.num_tokens == tokenizer.num_tokens
    assert torch.equal(grown.token_emb.weight[:256], palm.token_emb.weight)
    PaLM(num_tokens=300, **SMALL).save_pretrained(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        open_chat_model(tmp_path / "other")


def test_nothing_that_is_held_out_is_learnt_from():
    """Records of one prompt stay together, whatever their replies are."""
    records = [{"prompt": [question(f"{number % 300}?")], "responses": [str(number), "x"]} for number in range(600)]
    train, valid = split_held_out(records, 0.1, 0)
    assert len(train) + len(valid) == 600
    assert 0.05 < len(valid) / 600 < 0.15
    prompts = [{record["prompt"][0]["content"] for record in side} for side in (train, valid)]
    assert prompts[0].isdisjoint(prompts[1])
    assert split_held_out(records, 0.0, 0) == (records, [])
    with pytest.raises(ValueError, match="--held-out"):
        split_held_out(records[:2], 0.001, 0)


def test_pieces_fit_their_rows_with_the_marks_of_the_template(model):
    exchange = [question("?" * 20), {"role": "assistant", "content": "!" * 20}]
    # an exchange is 40 bytes and 4 marks
    for seq_len, lengths in ((44, [2, 2, 2]), (87, [2, 2, 2]), (88, [4, 2]), (132, [6])):
        pieces = fit_to_context([{"messages": exchange * 3}], seq_len, model)
        assert [len(piece["messages"]) for piece in pieces] == lengths
    with pytest.raises(ValueError, match="got seq_len 43"):
        fit_to_context([{"messages": exchange}], 43, model)


def test_rankings_become_tokens_as_the_template_writes_them(model, capsys):
    record = {"prompt": [question("Why?")], "responses": ["Because", "So", "Beca"]}
    (ranking,) = rankings_of([record], model, 100)
    assert ranking.prompt.tolist() == encode_prompt([question("Why?")], *model[1:]).tolist()
    for said, text in zip(ranking.responses, record["responses"], strict=True):
        assert said.tolist() == encode_response([question("Why?")], text, *model[1:]).tolist()
    assert capsys.readouterr().err == ""
    (cut,) = rankings_of([record], model, 5)  # four bytes of "Because" are those of "Beca"
    assert [said.tolist()[:2] for said in cut.responses] == [list(b"Be"), list(b"So")]
    assert "left out 2 pairs of replies that are equal within max_seq_len=5" in capsys.readouterr().err


def test_labelled_replies_become_tokens_as_the_template_writes_them(model):
    records = [{"prompt": [question("Why?")], "completion": text, "label": text == "So"} for text in ("So", "No")]
    for item, record in zip(unpaired_preferences_of(records, model), records, strict=True):
        assert item.prompt.tolist() == encode_prompt([question("Why?")], *model[1:]).tolist()
        said = encode_response([question("Why?")], record["completion"], *model[1:]).tolist()
        assert (item.response.tolist(), item.desirable) == (said, record["label"])


def test_prompts_come_from_lines_of_text_or_from_records(model, tmp_path):
    expected = [encode_prompt([question(text)], *model[1:]).tolist() for text in ("One?", "Two?")]
    (tmp_path / "prompts.txt").write_text("One?\n\n  Two? \nOne?\n")
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"messages": [question(text), {"role": "assistant", "content": "."}]}) + "\n"
                for text in ("One?", "Two?"))
    )  # fmt: skip
    for name in ("prompts.txt", "prompts.jsonl"):
        assert [prompt.tolist() for prompt in read_prompts(tmp_path / name, model)] == expected
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"blank\.txt: got no prompt"):
        read_prompts(tmp_path / "blank.txt", model)


def test_what_is_left_out_of_a_file_is_said(tmp_path, capsys):
    lines = [
        {"prompt": "One?", "chosen": "Yes", "rejected": "No"},
        {"prompt": "Two?", "chosen": "Same", "rejected": "Same"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [record["chosen"] for record in read_records_for(tmp_path / "pairs.jsonl", "preferences")] == ["Yes"]
    assert "left out 1 no two different replies" in capsys.readouterr().err
    (tmp_path / "pairs.jsonl").write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(ValueError, match="got no rankings"):
        read_records_for(tmp_path / "pairs.jsonl", "rankings")
