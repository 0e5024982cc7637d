"""What generation refuses: each bad input by name, with what was got and what was expected."""

import math

import pytest
import torch

from palm_rlhf import PaLM

VOCABULARY = 23


def small_palm(**options) -> PaLM:
    return PaLM(num_tokens=VOCABULARY, dim=8, depth=1, heads=2, dim_head=4, **options)


GOOD = {"prompt": torch.tensor([1, 2, 3]), "max_new_tokens": 2}
BAD = [
    ({"prompt": torch.tensor([1, VOCABULARY])}, "token id 23 is outside the vocabulary; expected 0 to 22"),
    ({"prompt": [torch.tensor([1]), torch.tensor([2, 999])]}, "token id 999 is outside"),
    ({"prompt": torch.tensor([[1, -100]])}, "token id -100 is outside"),
    ({"prompt": torch.tensor([1.0, 2.0])}, "token ids are torch.float32; expected integers"),
    ({"prompt": torch.tensor([True, False])}, "token ids are torch.bool; expected integers"),
    ({"prompt": torch.empty(0, dtype=torch.long)}, "empty prompt; expected at least one token"),
    ({"prompt": torch.empty(0)}, "empty prompt; expected at least one token"),
    ({"prompt": torch.empty(2, 0, dtype=torch.long)}, "empty prompt"),
    ({"prompt": torch.empty(0, 2, dtype=torch.long)}, "empty prompt"),
    ({"prompt": []}, "empty prompt"),
    ({"prompt": [torch.tensor([1]), torch.empty(0, dtype=torch.long)]}, "empty prompt"),
    ({"prompt": torch.zeros(1, 1, 1, dtype=torch.long)}, "wrong number of axes; expected `n`, `b n`"),
    ({"prompt": torch.tensor(3)}, "wrong number of axes"),
    ({"prompt": [torch.zeros(1, 1, dtype=torch.long)]}, "wrong number of axes"),
    ({"seq_len": 9}, "got seq_len=9 and max_new_tokens=2; expected exactly one"),
    ({"max_new_tokens": None}, "got seq_len=None and max_new_tokens=None; expected exactly one"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
    ({"max_new_tokens": torch.tensor([0])}, r"max_new_tokens is tensor\(\[0\]\); expected at least 1"),
    ({"max_new_tokens": torch.tensor([1, 2])}, "expected at least 1, as one number or for each of the 1 prompts"),
    ({"max_new_tokens": None, "seq_len": 3}, "seq_len=3 counts the prompt, which has 3 tokens already"),
    ({"max_new_tokens": None, "seq_len": 0, "prompt": None}, "seq_len=0 counts the prompt"),
    ({"temperature": -0.1}, "got temperature=-0.1, expected 0 .greedy. or more"),
    ({"temperature": math.nan}, "got temperature=nan"),
    ({"temperature": math.inf}, "got temperature=inf, expected 0 .greedy. or more, and finite"),
    ({"top_k": 0}, "got top_k=0, expected at least 1"),
    ({"top_p": -0.01}, "got top_p=-0.01, expected 0 to 1"),
    ({"top_p": 1.01}, "got top_p=1.01"),
    ({"min_p": -0.1}, "got min_p=-0.1, expected 0 to 1"),
    ({"min_p": 1.1}, "got min_p=1.1"),
    ({"repetition_penalty": 0}, "got repetition_penalty=0, expected above 0"),
    ({"presence_penalty": math.nan}, "got presence_penalty=nan, expected a finite number"),
    ({"frequency_penalty": math.inf}, "got frequency_penalty=inf, expected a finite number"),
    ({"eos_token": VOCABULARY}, "got eos_token=23, expected 0 to 22"),
    ({"eos_token": -1}, "got eos_token=-1"),
    ({"num_samples": 0}, "got num_samples=0, expected at least 1"),
    ({"num_samples": -2}, "got num_samples=-2"),
    ({"finetune_scope": "nobody"}, "finetune scope 'nobody'"),
]


@pytest.mark.parametrize("options, message", BAD, ids=[str(message) for _, message in BAD])
def test_each_bad_input_is_refused_by_name(options, message):
    palm = small_palm()
    for function in (palm.generate, palm.stream):
        with pytest.raises(ValueError, match=message):
            list(function(**{**GOOD, **options}))


def test_a_bidirectional_model_refuses_to_generate():
    with pytest.raises(ValueError, match="bidirectional PaLM has no cache"):
        small_palm(causal=False).generate(**GOOD)
