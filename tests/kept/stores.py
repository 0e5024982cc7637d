"""A store of text and one of its tokens, in the current folder, by names that do not depend on where that is."""

from pathlib import Path

from palm_rlhf.data.corpora.token_store import StoredText, TokenSplits, text_of_documents, tokens_of

DOCUMENTS = [
    ("one.jsonl", [b"a short text"]), ("one.jsonl", [b"and a second"]), ("two.txt", ["ein kürzerer".encode()])
]  # fmt: skip
EOS = 256


class Bytes:
    """A token for each byte, and one for the end of a document."""

    vocab_size, fingerprint = 257, "bytes and an end"

    def encode(self, text: str) -> list[int]:
        """The bytes."""
        return list(text.encode())


Bytes.__module__ = "kept"  # which is part of what tells tokenizers apart


def write() -> tuple[StoredText, TokenSplits]:
    """Opens the stores, which are written where they are missing."""
    text = text_of_documents(Path("text"), "kept", 40, DOCUMENTS)
    return text, tokens_of(text, [0, 16, text.size], Bytes(), Path("tokens"), eos_token=EOS)
