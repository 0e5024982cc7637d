"""How well a model predicts text: bits per byte, which do not depend on the tokenizer, and perplexity per token."""

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from beartype import beartype

from palm_rlhf.data.files.records import read_records
from palm_rlhf.data.tokenizer import ByteTokenizer, Tokenizer
from palm_rlhf.model.files import read_text
from palm_rlhf.model.palm import PaLM
from palm_rlhf.training.bits_per_byte import total_nats
from palm_rlhf.training.token_windows import token_arrays

RECORDS = (".jsonl", ".jsonl.gz", ".json", ".ndjson", ".csv", ".csv.gz", ".tsv", ".parquet")
ALL = "all"


class Document(NamedTuple):
    """A text, and its language if the file names one."""

    text: str
    language: str | None = None


@dataclass(frozen=True)
class Prediction:
    """The cost of texts under a model."""

    nats: float
    num_tokens: int
    num_bytes: int
    """Bytes of the texts in UTF-8."""
    num_documents: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """Perplexity per token; comparable only between models with the same tokenizer."""
        return math.exp(min(self.nats / self.num_tokens, 700.0))  # a float overflows above e^709

    def numbers(self) -> dict[str, Any]:
        """Return all figures of a report."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "tokens_per_byte": self.num_tokens / self.num_bytes,
            "tokens": self.num_tokens,
            "bytes": self.num_bytes,
            "documents": self.num_documents,
        }


@beartype
def read_documents(
    path: str | os.PathLike[str], *, text_key: str = "text", language_key: str = "lang"
) -> list[Document]:
    """Read the non-empty texts of a file: one for each record of JSON, CSV or parquet, else the whole UTF-8 file.

    Raises ValueError for a record without text, or a file without texts.
    """
    documents = []
    if os.fspath(path).endswith(RECORDS):
        for line, record in read_records(path):
            if not isinstance(record.get(text_key), str):
                raise ValueError(
                    f"{path}, line {line}: got the keys {sorted(record)[:8]}, expected a text under {text_key!r}"
                )
            language = record.get(language_key)
            documents.append(Document(record[text_key], None if language is None else str(language)))
    else:
        documents.append(Document(read_text(Path(path))))
    documents = [document for document in documents if document.text]
    if not documents:
        raise ValueError(f"{path}: got no text, expected at least one character")
    return documents


@beartype
def measure_text(
    palm: PaLM,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    seq_len: int = 1024,
    context: int | None = None,
    batch_size: int = 4,
) -> dict[str, Prediction]:
    """Measure the cost of all texts (under "all"), and of each language if there are several.

    Each token is predicted once, from at least `context` preceding tokens, or from all of them near the start of a
    text. The first token of a text costs as much as a uniform guess. A decoder could recover the texts from a code of
    this length, so bits per byte compare models with any tokenizers.

    Args:
        palm: The model.
        tokenizer: Its tokenizer.
        documents: The texts.
        seq_len: Length of a window, in tokens.
        context: Least number of tokens before a predicted token; half of `seq_len` by default.
        batch_size: Windows in one forward.
    """
    context = seq_len // 2 if context is None else context
    if not 1 <= context <= seq_len or batch_size < 1:
        raise ValueError(
            f"got seq_len={seq_len}, context={context} and batch_size={batch_size}, expected a context from 1 to "
            "seq_len, and a batch of at least 1"
        )
    groups: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        groups[document.language or "unknown"].append(document)
    parts = {}
    for language, group in sorted(groups.items()):
        ids = [_ids(tokenizer, document.text) for document in group]
        arrays = token_arrays(ids, palm.num_tokens, "the text", min_length=1)
        nats = total_nats(palm, arrays, seq_len=seq_len, context=context, batch_size=batch_size, autocast=nullcontext)
        num_bytes = sum(len(document.text.encode()) for document in group)
        parts[language] = Prediction(nats, sum(map(len, arrays)), num_bytes, len(group))
    return {ALL: _sum(parts.values())} | (parts if len(parts) > 1 else {})


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    if isinstance(tokenizer, ByteTokenizer):  # a list would take eight times the memory
        return np.frombuffer(text.encode(), dtype=np.uint8)
    return np.array(tokenizer.encode(text), dtype=np.int64)


def _sum(parts: Iterable[Prediction]) -> Prediction:
    rows = ((part.nats, part.num_tokens, part.num_bytes, part.num_documents) for part in parts)
    return Prediction(*map(sum, zip(*rows)))
