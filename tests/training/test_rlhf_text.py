"""Prompts in every form, and texts where there is a tokenizer: what the reward is asked, and what the samples show."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from palm_rlhf import PaLM, PPOConfig, RLHFTrainer
from palm_rlhf.training.rlhf.prompts import read_prompts
from palm_rlhf.training.run.log import read_metrics

EOS = 11


class Letters:
    """A token is a letter; two of them end a line for Python, and none in JSON."""

    alphabet = "abcdef\u2028\x85é !."

    def encode(self, text: str) -> list[int]:
        return [self.alphabet.index(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.alphabet[token] for token in tokens)


class Encodings(Letters):
    """The same, with the ids inside an object, as the library tokenizers gives them."""

    def encode(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(ids=super().encode(text))


def as_lists(prompts: list[torch.Tensor]) -> list[list[int]]:
    assert all(prompt.dtype == torch.long for prompt in prompts)
    return [prompt.tolist() for prompt in prompts]


def test_prompts_are_the_same_in_every_form(tmp_path):
    texts, rows = ["ab", " c\u2028d\x85e ", "f"], [[0, 1], [9, 2, 6, 3, 7, 4, 9], [5]]
    path = tmp_path / "prompts.txt"
    path.write_bytes("\r\n\n".join(texts).encode() + b"\n  \n")
    padded = torch.tensor([row + [0] * (7 - len(row)) for row in rows])
    for tokenizer in (Letters(), Encodings()):
        assert as_lists(read_prompts(12, prompts=texts, tokenizer=tokenizer).token_ids) == rows
        assert as_lists(read_prompts(12, prompts_path=path, tokenizer=tokenizer).token_ids) == rows
    assert as_lists(read_prompts(12, [torch.tensor(row) for row in rows]).token_ids) == rows
    assert as_lists(read_prompts(12, padded, torch.tensor([2, 7, 1])).token_ids) == rows
    assert as_lists(read_prompts(12, padded).token_ids) == padded.tolist()


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "got no prompts, expected exactly one of"),
        ({"prompts": ["a"], "prompt_token_ids": torch.tensor([[1]])}, "expected exactly one of"),
        ({"prompts": ["a"], "tokenizer": None}, "without a tokenizer: pass one, or prompt_token_ids"),
        ({"prompts": []}, "prompts holds no prompt"),
        ({"prompts": ["a", ""]}, r"prompt 1 has the shape \(0,\), expected at least one token"),
        ({"prompt_token_ids": torch.tensor([1, 2])}, "prompt_token_ids has 1 axes; expected `b n`"),
        ({"prompt_token_ids": [torch.tensor([[1]])]}, r"prompt 0 has the shape \(1, 1\)"),
        ({"prompt_token_ids": [torch.tensor([12])]}, "token id 12 is outside the vocabulary"),
        ({"prompt_token_ids": torch.zeros(2, 3).long(), "prompt_lengths": torch.tensor([1])}, r"\[1\], expected 2"),
        ({"prompt_token_ids": torch.zeros(1, 3).long(), "prompt_lengths": torch.tensor([4])}, r"up to \[3\]"),
        ({"prompt_token_ids": [torch.tensor([1])], "prompt_lengths": torch.tensor([1])}, "without padded"),
        ({"prompts_path": "latin.txt"}, r"latin.txt is not UTF-8 .*: convert it"),
    ],
    ids=str,
)
def test_prompts_that_are_none_are_refused(tmp_path, given, message):
    (tmp_path / "latin.txt").write_bytes("é\n".encode("latin-1"))
    given = {"tokenizer": Letters(), **given}
    if "prompts_path" in given:
        given["prompts_path"] = tmp_path / given["prompts_path"]
    with pytest.raises(ValueError, match=message):
        read_prompts(12, **given)


def make_trainer(folder, heard: list, resume: bool = False) -> RLHFTrainer:
    def reward(prompts: list[str], completions: list[str]) -> list[int]:
        heard.append((prompts, completions))
        return [len(completion) for completion in completions]

    torch.manual_seed(0)
    return RLHFTrainer(
        palm=PaLM(num_tokens=12, dim=16, depth=1, heads=1, dim_head=16),
        reward_model=reward,
        prompts=["ab", "c!", "é"],
        tokenizer=Letters(),
        config=PPOConfig(num_steps=4, rollouts_per_step=8, minibatch_size=8, epochs=1, max_new_tokens=9,
                         sample_every=1, save_every=1, samples_kept=8, plot=False),
        output_dir=folder,
        resume=resume,
    )  # fmt: skip


def shown(folder) -> list[tuple]:
    return [tuple(line[key] for key in ("step", "prompt", "completion", "score")) for line in lines_of(folder)]


def lines_of(folder) -> list[dict]:
    return read_metrics(folder / "samples.jsonl")


def test_the_reward_gets_texts_and_the_samples_show_them(tmp_path):
    """Without the EOS, be it of the config or given to `train`; a response that did not end keeps its last letter."""
    heard = []
    metrics = make_trainer(tmp_path, heard).train(num_episodes=2, max_timesteps=8, update_timesteps=8, eos_token=EOS)
    assert len(heard) == 2 and 0 < metrics["eos_rate"] <= 1
    assert all(set(prompts) == {"ab", "c!", "é"} for prompts, _ in heard)
    assert not any("." in completion for _, completions in heard for completion in completions)
    expected = [
        (step, prompt, completion, len(completion))
        for step, (prompts, completions) in enumerate(heard, start=1)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    assert shown(tmp_path) == expected


def test_samples_survive_a_cut_inside_a_character_and_other_ends_of_lines(tmp_path):
    list(itertools.islice(make_trainer(tmp_path, []).steps(), 2))
    samples = tmp_path / "samples.jsonl"
    before = lines_of(tmp_path)
    assert len(before) == 16 and {"\u2028", "\x85"} <= set("".join(line["completion"] for line in before))
    samples.write_bytes(samples.read_bytes() + '{"step": 3, "score": 1.0, "prompt": "é'.encode()[:-1])
    resumed = make_trainer(tmp_path, [], resume=True)
    assert lines_of(tmp_path) == before
    list(resumed.steps())
    assert lines_of(tmp_path)[:16] == before and [line["step"] for line in lines_of(tmp_path)[16:]] == [3] * 8 + [4] * 8
