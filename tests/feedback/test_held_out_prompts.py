"""Which prompts are held out."""

from palm_rlhf.feedback.pairs.held_out_prompts import is_held_out
from palm_rlhf.feedback.settings import CollectionSettings
from palm_rlhf.feedback.store.identities import prompt_key_of


def test_a_share_of_the_prompts_is_held_out_and_stays_so():
    keys = [prompt_key_of([{"role": "user", "content": f"What is {number}?"}]) for number in range(2000)]
    shares = (0.0, 0.2, 0.5)
    held_out = [{key for key in keys if is_held_out(key, CollectionSettings(held_out=share))} for share in shares]
    assert held_out[0] <= held_out[1] <= held_out[2]
    assert [round(len(found) / 2000, 1) for found in held_out] == [0.0, 0.2, 0.5]
