"""Statistics of a model's answers: length and variety, by language."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from beartype import beartype

from palm_rlhf.data.files.json_record import Record
from palm_rlhf.data.files.records import read_records
from palm_rlhf.evaluation.measures.text_prediction import ALL, Document
from palm_rlhf.evaluation.message_text import text_of, texts_of_choice

WORD = re.compile(r"\w+|[^\w\s]")
TEXT_KEYS = ("output", "completion", "text", "response")
QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


@beartype
def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Return the share of distinct n-grams among all n-grams of words (Li et al. 2016); None without n-grams.

    It falls as texts grow longer, so only sets of similar size compare.
    """
    if n < 1:
        raise ValueError(f"got n {n}, expected at least 1")
    total, different = 0, set()
    for text in texts:
        words = WORD.findall(text.lower())
        grams = list(zip(*(words[start:] for start in range(n))))
        total += len(grams)
        different.update(grams)
    return len(different) / total if total else None


@dataclass(frozen=True)
class TextStatistics:
    """Statistics of a set of texts; lengths are in characters and in words."""

    count: int
    empty: int
    characters: dict[str, float]
    words: dict[str, float]
    distinct: dict[str, float | None]
    """The share of distinct n-grams, for n from 1 to 4."""

    def numbers(self) -> dict[str, Any]:
        """Return all figures in one flat dict."""
        characters = {f"characters_{name}": value for name, value in self.characters.items()}
        words = {f"words_{name}": value for name, value in self.words.items()}
        return {"count": self.count, "empty": self.empty} | characters | words | self.distinct


@beartype
def text_statistics(texts: Sequence[str]) -> TextStatistics:
    """Compute lengths and variety. Raises ValueError without texts."""
    if not texts:
        raise ValueError("got no texts, expected at least one")
    return TextStatistics(
        count=len(texts),
        empty=sum(not text.strip() for text in texts),
        characters=_lengths([len(text) for text in texts]),
        words=_lengths([len(WORD.findall(text)) for text in texts]),
        distinct={f"distinct_{n}": distinct_n(texts, n) for n in range(1, 5)},
    )


@beartype
def statistics_by_language(documents: Sequence[Document]) -> dict[str, TextStatistics]:
    """Compute the statistics of all texts (under "all"), and of each language if there are several."""
    groups: dict[str, list[str]] = defaultdict(list)
    for document in documents:
        groups[document.language or "unknown"].append(document.text)
    parts = {language: text_statistics(texts) for language, texts in sorted(groups.items())}
    return {ALL: text_statistics([document.text for document in documents])} | (parts if len(parts) > 1 else {})


@beartype
def read_output_texts(path: str | os.PathLike[str]) -> list[Document]:
    """Read the answers in a file, with their "lang".

    An answer is the "output", "completion", "text" or "response" of a record, MT-bench's "choices", or the assistant's
    messages of a conversation ("messages"); messages with tool calls only have none. Parts of a content are joined.
    Raises ValueError, with the line, for a record without any of these.
    """
    documents = []
    for line, record in read_records(path):
        language = record.get("lang")
        language = None if language is None else str(language)
        try:
            texts = _answers_in(record)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from error
        documents += [Document(text, language) for text in texts]
    if not documents:
        raise ValueError(f"{path}: got no answers, expected at least one")
    return documents


def _answers_in(record: Record) -> list[str]:
    if isinstance(record.get("choices"), list):
        texts = [text for choice in record["choices"] for text in texts_of_choice(choice)]
    elif isinstance(record.get("messages"), list):
        messages = record["messages"]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("got messages that are no objects, expected role and content")
        replies = (text_of(message) for message in messages if message.get("role") == "assistant")
        texts = [text for text in replies if text is not None]
    else:
        fields = (text_of(record[key]) for key in TEXT_KEYS if record.get(key) is not None)
        texts = [text for text in fields if text is not None][:1]
    if not texts:
        raise ValueError(
            f"got no text under the keys {sorted(record)[:8]}, expected an answer as {', '.join(TEXT_KEYS)}, choices "
            "or assistant messages"
        )
    return texts


def _lengths(lengths: Sequence[int]) -> dict[str, float]:
    values = np.asarray(lengths, dtype=np.float64)
    quantiles = {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}
    return {"mean": float(values.mean()), "std": float(values.std()), **quantiles, "max": float(values.max())}
