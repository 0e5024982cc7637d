"""The digests by which the database knows prompts and models."""

import pytest

from palm_rlhf.feedback.store.answer_tables import KnownModel
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.identities import prompt_key_of, remember_model, weights_digest
from palm_rlhf.model.palm import PaLM


def user(text):
    return {"role": "user", "content": text}


def test_a_prompt_is_known_by_its_roles_and_contents():
    key = prompt_key_of([user("One?")])
    assert len(key) == 64 and key == prompt_key_of([{"content": "One?", "role": "user", "weight": 1}])
    others = [[user("Two?")], [{"role": "system", "content": "One?"}], [user("One?"), user("")], [user("One?\n")]]
    assert len({key, *map(prompt_key_of, others)}) == 5


def test_a_model_is_known_by_its_weights(tmp_path):
    palm = PaLM(num_tokens=16, dim=8, depth=1, heads=1, dim_head=8)
    digest = weights_digest(palm)
    palm.save_pretrained(tmp_path / "model")
    assert weights_digest(PaLM.from_pretrained(tmp_path / "model")) == digest
    assert weights_digest(palm.bfloat16()) != digest
    again = PaLM.from_pretrained(tmp_path / "model")
    again.token_emb.weight.data[0, 0] += 1e-6
    assert weights_digest(again) != digest


def test_a_model_is_remembered_once(tmp_path):
    with Store(tmp_path / "feedback.db") as store:
        for name in ("first", "second"):
            with store.writing() as session:
                assert remember_model(session, "a" * 64, name, tmp_path).name == "first"
        with store.reading() as session:
            assert session.query(KnownModel).count() == 1
            assert session.get(KnownModel, "a" * 64).folder == str(tmp_path)


@pytest.mark.parametrize("text", ["", "日本", "\ud800"])
def test_any_text_has_a_key(text):
    assert len(prompt_key_of([user(text)])) == 64
