"""Steps that leave out conversations which repeat others, word by word or nearly."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from zlib import crc32

import numpy as np
from beartype import beartype

from palm_rlhf.data.extra_packages import missing_extra
from palm_rlhf.data.files.json_record import Record

# A character of a script without spaces between words counts as a word.
WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uac00-\ud7af\uf900-\ufaff]|\w+")
SHINGLE = 3  # words
NUM_HASHES = 128


@beartype
def conversation_digest(conversation: Record) -> bytes:
    """Return a hash of the roles, contents and calls of a conversation that is the same in every run."""
    state = hashlib.blake2b(digest_size=16)
    for message in conversation["messages"]:
        content = message["content"].encode()
        state.update(f"{message['role']} {len(content)} ".encode() + content)
        if calls := message.get("tool_calls"):
            state.update(json.dumps(calls, sort_keys=True).encode())
    return state.digest()


@beartype
def drop_duplicates(conversations: Iterable[Record], *, rejected: Counter[str] | None = None) -> Iterator[Record]:
    """Yield each conversation unless an earlier one has the same messages."""
    rejected = Counter() if rejected is None else rejected
    seen: set[bytes] = set()
    for conversation in conversations:
        key = conversation_digest(conversation)
        if key in seen:
            rejected["duplicate"] += 1
        else:
            seen.add(key)
            yield conversation


@beartype
def drop_near_duplicates(
    conversations: Iterable[Record], threshold: float = 0.8, *, rejected: Counter[str] | None = None
) -> Iterator[Record]:
    """Yield the conversations that do not share `threshold` of their shingles with an earlier one.

    The Jaccard similarity of the sets of three words in a row is estimated by MinHash (Broder 1997), and candidates are
    found by locality-sensitive hashing. Each conversation that is kept takes about 4 kB of memory.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"got threshold={threshold}, expected a similarity above 0 and at most 1: 0.8 is usual")
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise missing_extra("Finding near-duplicates", error) from error
    rejected = Counter() if rejected is None else rejected
    index = MinHashLSH(threshold, NUM_HASHES)
    signatures: list[np.ndarray] = []
    empty = MinHash(NUM_HASHES, hashfunc=crc32)
    for conversation in conversations:
        minhash = empty.copy()
        minhash.update_batch(_shingles(conversation))
        # The index also finds less similar conversations, so the signatures are compared.
        candidates = index.query(minhash)
        if any(np.mean(signatures[key] == minhash.hashvalues) >= threshold for key in candidates):
            rejected["near-duplicate"] += 1
        else:
            index.insert(len(signatures), minhash, check_duplication=False)
            signatures.append(minhash.hashvalues)
            yield conversation


def _shingles(conversation: Record) -> list[bytes]:
    words = WORD.findall("\n".join(message["content"] for message in conversation["messages"]).lower())
    return list({" ".join(words[i : i + SHINGLE]).encode() for i in range(max(1, len(words) - SHINGLE + 1))})
