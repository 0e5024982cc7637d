"""The small dialogue model of the examples: the English dialogues of chatterbot-corpus, and training, offline."""

import itertools
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from palm_rlhf.data.tokenizer import ByteTokenizer
from palm_rlhf.model.config import PaLMConfig
from palm_rlhf.model.palm import PaLM
from palm_rlhf.policy.sequences import join
from palm_rlhf.training.epoch_sampler import EpochSampler
from palm_rlhf.training.language_model import LanguageModelTrainer
from palm_rlhf.training.language_model_config import LMConfig
from palm_rlhf.training.run.log import Result
from palm_rlhf.training.run.muon import muon
from palm_rlhf.training.run.optimizer import forward_precision, warmup_cosine

try:
    import chatterbot_corpus
    import yaml
except ImportError as error:
    sys.exit(f"{Path(sys.argv[0]).name}: {error}; the dialogues come with: pip install palm-rlhf[examples]")

TOKENIZER = ByteTokenizer()  # the model has the 256 bytes alone, without the special tokens
END_OF_TURN = ord("\n")
LONGEST_TURN = 80  # bytes of a prompt or an answer; a few answers are programs of a thousand


@dataclass(frozen=True)
class FineTuning:
    """Settings of the fine-tuning."""

    num_steps: int = 400
    """Optimiser steps."""

    batch_size: int = 32
    """Pairs of a prompt and an answer in one step."""

    learning_rate: float = 5e-3
    """Peak learning rate, of Muon."""


MODEL = PaLMConfig(num_tokens=256, dim=192, depth=4, heads=4, ff_mult=2, dropout=0.1)
PRETRAINING = LMConfig(seq_len=128, num_steps=500, optimizer="muon", learning_rate=1e-2, warmup_steps=30)
FINE_TUNING = FineTuning()


def turn(text: str) -> Tensor:
    """Return the bytes of a prompt or an answer, with the token that ends it."""
    return torch.tensor([*TOKENIZER.encode(text), END_OF_TURN])


def read_conversations() -> list[tuple[str, ...]]:
    """Read the English dialogues, each once, with each turn on one line."""
    paths = sorted((Path(chatterbot_corpus.__file__).parent / "data/english").glob("*.yml"))
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in paths]
    conversations = [turns for file in files for turns in file["conversations"]]
    return list(dict.fromkeys(tuple(" ".join(text.split()) for text in turns) for turns in conversations))


def pretrain(palm: PaLM, conversations: list[tuple[str, ...]], config: LMConfig, folder: Path, resume: bool) -> Result:
    """Train on next-token prediction, on the dialogues as one text with blank lines between them."""
    text = "\n\n".join("\n".join(turns) for turns in conversations)
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    return LanguageModelTrainer(palm, train_data=data, config=config, output_dir=folder, resume=resume).train()


def fine_tune(palm: PaLM, pairs: list[tuple[Tensor, Tensor]], config: FineTuning, seed: int) -> None:
    """Train on next-token prediction of the answers only, each after its prompt; both are tokens `n`."""
    sampler = EpochSampler(len(pairs), seed)
    optimizer = muon(palm, config.learning_rate, (0.9, 0.95), 1e-8, 0.1)
    autocast = forward_precision("auto", palm.device)
    palm.train()
    for step in tqdm(range(config.num_steps), mininterval=30, unit="step", file=sys.stderr):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * warmup_cosine(step, step / config.num_steps, 20, 0.0)
        prompts, answers = zip(*(pairs[index] for index in sampler.draw(config.batch_size)), strict=True)
        rows = join(list(prompts), list(answers))
        with autocast():
            loss = palm(rows.tokens, return_loss=True, loss_mask=rows.response_mask, key_mask=rows.key_mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(palm.parameters(), 1.0)
        optimizer.step()


class Dialogues(NamedTuple):
    """Conversations and their pairs of a prompt and an answer for training, the prompts of these, and others."""

    conversations: list[tuple[str, ...]]
    pairs: list[tuple[str, str]]
    prompts: list[str]
    held_out: list[str]


def hold_out(conversations: list[tuple[str, ...]], held_out: int, seed: int) -> Dialogues:
    """Hold out some prompts: no conversation for training has one of them."""
    pairs = dict.fromkeys(itertools.chain.from_iterable(map(itertools.pairwise, conversations)))
    pairs = [pair for pair in pairs if all(1 <= len(text.encode()) <= LONGEST_TURN for text in pair)]
    prompts = sorted({prompt for prompt, _ in pairs})
    random.Random(seed).shuffle(prompts)
    unseen, prompts = prompts[:held_out], prompts[held_out:]
    conversations = [turns for turns in conversations if set(unseen).isdisjoint(turns)]
    return Dialogues(conversations, [pair for pair in pairs if pair[0] not in unseen], prompts, unseen)
