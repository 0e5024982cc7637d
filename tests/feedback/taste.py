"""A tiny chat model, and a person with a known taste who compares its answers."""

import random
from pathlib import Path

import tokenizers
import torch
from sqlalchemy import select

from palm_rlhf.data.templates import PRESETS
from palm_rlhf.data.tokenizer import HuggingFaceTokenizer
from palm_rlhf.feedback.store.answer_tables import Answer, ComparisonVote, ShownComparison
from palm_rlhf.feedback.store.database import Store
from palm_rlhf.feedback.store.people_tables import Participant
from palm_rlhf.feedback.store.table_base import utc_now
from palm_rlhf.model.palm import PaLM

UNKNOWN = "#"
LETTERS = f"abcdefgh0123456789 ?{UNKNOWN}"
PROMPTS = [[{"role": "user", "content": f"add {number}?"}] for number in range(40)]
TINY = {
    "num_prompts": 24, "num_answers": 3, "num_evaluations": 6, "max_new_tokens": 8, "max_seq_len": 32,
    "reward_epochs": 6, "reward_batch_size": 8, "reward_learning_rate": 1e-2, "pooling": "mean",
    "num_steps": 6, "rollouts_per_step": 16, "minibatch_size": 8, "epochs": 2, "learning_rate": 3e-3, "save_every": 50,
    "held_out": 0.25, "plot": False,
}  # fmt: skip


def letter_tokenizer() -> HuggingFaceTokenizer:
    """A token for each letter, so that texts decode and encode to the same tokens."""
    names = PRESETS["default"].special_tokens
    vocabulary = {letter: index for index, letter in enumerate(LETTERS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(""), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return HuggingFaceTokenizer(backend, ["<|end|>", *names], eos_token="<|end|>")


def save_chat_model(folder: Path, seed: int = 0) -> Path:
    """A model with random weights, its tokenizer and its template."""
    torch.manual_seed(seed)
    tokenizer = letter_tokenizer()
    palm = PaLM(num_tokens=tokenizer.num_tokens, dim=32, depth=1, heads=2, dim_head=16, ff_mult=2)
    for part in (palm, tokenizer, PRESETS["default"]):
        part.save_pretrained(folder)
    return folder


def liking(text: str) -> float:
    """How much the person likes an answer: the number of its letters from a to d."""
    return sum(letter in "abcd" for letter in text)


def vote(store: Store, count: int, seed: int = 0, chosen_by: str = "random") -> int:
    """Compare random pairs of the newest pool, by taste; return the number of votes, fewer where pairs run out."""
    with store.writing() as session:
        newest = session.scalars(select(Answer).order_by(Answer.created_at.desc())).first()
        pool = session.scalars(select(Answer).where(Answer.purpose == "training", Answer.round_id == newest.round_id))
        by_prompt = {}
        for answer in sorted(pool, key=lambda answer: (answer.prompt_key, answer.text)):
            by_prompt.setdefault(answer.prompt_key, []).append(answer)
        generator = random.Random(seed)
        pairs = [(a, b) for row in by_prompt.values() for i, a in enumerate(row) for b in row[i + 1 :]]
        generator.shuffle(pairs)
        person = Participant(name=f"person {seed}", role="contributor")
        session.add(person)
        session.flush()
        for left, right in pairs[:count]:
            shown = ShownComparison(
                prompt_key=left.prompt_key, left_id=left.id, right_id=right.id, person_id=person.id,
                chosen_by=chosen_by, purpose="training", round_id=left.round_id, created_at=utc_now(),
            )  # fmt: skip
            session.add(shown)
            session.flush()
            verdict = "left" if liking(left.text) > liking(right.text) else "right"
            session.add(ComparisonVote(comparison_id=shown.id, person_id=person.id, verdict=verdict))
    return len(pairs[:count])
