"""Tiny policies, rows of tokens, and the distribution that is sampled from, in plain Python."""

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from palm_rlhf.model.palm import PaLM
from tests import factories


@pytest.fixture(scope="session")
def num_tokens() -> int:
    """The vocabulary of the tiny policies."""
    return 13


@pytest.fixture(scope="session")
def wandering_palm(num_tokens):
    """`wandering_palm(dropout=0.1)` has the same weights at every call, and rarely repeats itself."""

    def build(**options) -> PaLM:
        return factories.wandering_palm(**{"num_tokens": num_tokens, **options})

    return build


@pytest.fixture(scope="session")
def stir():
    """`stir(parameters)` moves them all, also those that start at zero."""

    def stir(parameters, scale: float = 0.3, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in parameters:
                parameter += scale * torch.randn(parameter.shape, generator=generator)

    return stir


@pytest.fixture(scope="session")
def draw_rows(num_tokens):
    """`draw_rows(3, 1)` are 1-d tensors of 3 tokens and of 1."""

    def draw(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(num_tokens, (length,), generator=generator) for length in lengths]

    return draw


@pytest.fixture(scope="session")
def distribution():
    """`distribution(logits, top_k=3)` are the probabilities of all tokens, one float each."""

    def distribution(logits, *, temperature=1.0, top_k=None, top_p=None, always=None) -> list[float]:
        logits = [logit / temperature for logit in logits]
        order = sorted(range(len(logits)), key=lambda token: -logits[token])
        kept = order[: len(order) if top_k is None else top_k]
        if top_p is not None:
            mass, nucleus = sum(math.exp(logits[token]) for token in kept), []
            for token in kept:
                if sum(math.exp(logits[other]) for other in nucleus) >= top_p * mass:
                    break
                nucleus.append(token)
            kept = nucleus
        kept = {*kept} if always is None else {*kept, always}
        total = sum(math.exp(logits[token]) for token in kept)
        return [math.exp(logit) / total if token in kept else 0.0 for token, logit in enumerate(logits)]

    return distribution


@pytest.fixture(scope="session")
def said_by_hand(distribution):
    """The log-probability of each token of a response and the entropies, from one forward a token without a cache."""

    @torch.no_grad()
    def said(palm, prompt, response, *, finetune_scope=None, **truncation) -> tuple[list[float], list[float]]:
        logprobs, entropies = [], []
        for step, token in enumerate(response.tolist()):
            prefix = torch.cat((prompt, response[:step])).unsqueeze(0)
            logits = palm(prefix, finetune_scope=finetune_scope)[0, -1].double().tolist()
            probs = distribution(logits, always=token, **truncation)
            logprobs.append(math.log(probs[token]))
            entropies.append(-sum(p * math.log(p) for p in probs if p > 0))
        return logprobs, entropies

    return said


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """One token for each byte, and of the Hugging Face library."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
