"""The base class of tokenizers, and the tokenizer of bytes."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from pathlib import Path

from beartype import beartype

from palm_rlhf.model.files import write_text

NUM_BYTES = 256
EOS, PAD = "<|endoftext|>", "<|pad|>"
DEFAULT_SPECIAL_TOKENS = (EOS, PAD, "<|system|>", "<|user|>", "<|assistant|>")
CONFIG_FILE = "tokenizer_config.json"


class Tokenizer(ABC):
    """Text to token ids and back. Special tokens are added by their ids; text never becomes a special token.

    `special_tokens` holds the id of each by its name; `eos_token` and `pad_token` are ids among them.
    """

    special_tokens: dict[str, int]

    @beartype
    def __init__(self, special_tokens: Iterable[str], eos_token: str, pad_token: str | None):
        self.special_tokens = {}
        self._eos, self._pad = eos_token, eos_token if pad_token is None else pad_token
        self.add_special_tokens(special_tokens)
        for role, name in (("eos_token", self._eos), ("pad_token", self._pad)):
            if self._role_id(name) is None:
                raise ValueError(
                    f"got {role}={name!r}, expected one of the special tokens "
                    f"{list(self.special_tokens)}: add it to them"
                )

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """One more than the largest id."""

    @property
    @abstractmethod
    def token_ids(self) -> Collection[int]:
        """The ids that stand for a token; there can be gaps between them."""

    @property
    def vocab_size(self) -> int:
        """`num_tokens` under the name that `load_corpus` and other libraries use."""
        return self.num_tokens

    @property
    def eos_token(self) -> int:
        return self.special_tokens[self._eos]

    @property
    def eos_tokens(self) -> frozenset[int]:
        """The ids that end a text: `eos_token`, and any others with which the model was trained to end."""
        return frozenset({self.eos_token})

    @property
    def text_start(self) -> list[int]:
        """The special tokens that stand before the text of a prompt, such as a BOS; `encode` leaves them out."""
        return []

    @property
    def stripping(self) -> tuple[frozenset[int], frozenset[int]]:
        """The special tokens that remove the white space before them, and those that remove it after them."""
        return frozenset(), frozenset()

    @property
    def pad_token(self) -> int:
        return self.special_tokens[self._pad]

    @property
    def fingerprint(self) -> str:
        """A digest of everything that the ids of a text depend on."""
        return hashlib.sha256("\n".join(self._files().values()).encode()).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, none of them of a special token."""

    def encode_continuation(self, text: str, *, after_special: bool = False) -> list[int]:
        """Return the ids of a text that continues another one, or that follows a special token directly.

        Some tokenizers, such as that of Llama, put a space before the first word of a text. A text that is cut keeps
        its words without added spaces if `encode` reads its first part and this method the others.
        """
        return self.encode(text)

    @abstractmethod
    def decode(self, ids: Iterable[int], *, with_special_tokens: bool = False) -> str:
        """Return the text of ids, with U+FFFD for invalid bytes; ids without a token, which pad a vocabulary, add none.

        Raises ValueError for a negative id.
        """

    @abstractmethod
    def add_special_tokens(self, names: Iterable[str]) -> None:
        """Add special tokens that are missing; a model needs room for them: see `add_special_tokens`."""

    @abstractmethod
    def _files(self) -> dict[str, str]:
        """Return the texts to save, by the names of their files."""

    @beartype
    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tokenizer to a folder, such as that of its model; `load_tokenizer` opens it again."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in self._files().items():
            write_text(directory / name, text)

    def _role_id(self, name: str) -> int | None:
        """Return the id of the token that has a role, such as padding; None if it cannot have one."""
        return self.special_tokens.get(name)

    def _known_ids(self, ids: Iterable[int]) -> list[int]:
        """Return the ids below `num_tokens`; ValueError for a negative one."""
        ids = [int(index) for index in ids]
        if ids and min(ids) < 0:
            raise ValueError(f"got the token id {min(ids)}, expected 0 or more: leave padding out")
        return [index for index in ids if index < self.num_tokens]


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 as the ids 0 to 255, and special tokens after them. Any bytes decode unchanged."""

    @beartype
    def __init__(
        self,
        special_tokens: Iterable[str] = DEFAULT_SPECIAL_TOKENS,
        *,
        eos_token: str = EOS,
        pad_token: str | None = None,
    ):
        super().__init__(special_tokens, eos_token, pad_token)

    @property
    def num_tokens(self) -> int:
        return NUM_BYTES + len(self.special_tokens)

    @property
    def token_ids(self) -> range:
        return range(self.num_tokens)

    @beartype
    def encode(self, text: str | bytes) -> list[int]:
        """Return the bytes of a text; those of a lone surrogate too, which `decode` returns as U+FFFD."""
        return list(text.encode("utf-8", errors="surrogatepass") if isinstance(text, str) else text)

    def decode(self, ids: Iterable[int], *, with_special_tokens: bool = False) -> str:
        """Return the text of ids, with U+FFFD for invalid bytes."""
        return self.decode_bytes(ids, with_special_tokens=with_special_tokens).decode("utf-8", errors="replace")

    @beartype
    def decode_bytes(self, ids: Iterable[int], *, with_special_tokens: bool = False) -> bytes:
        """Return the bytes of ids: exactly those that were encoded."""
        known = self._known_ids(ids)
        names = [name.encode() if with_special_tokens else b"" for name in self.special_tokens]
        return b"".join(bytes([index]) if index < NUM_BYTES else names[index - NUM_BYTES] for index in known)

    @beartype
    def add_special_tokens(self, names: Iterable[str]) -> None:
        """Add special tokens that are missing; a model needs room for them: see `add_special_tokens`."""
        for name in checked_names(names):
            self.special_tokens.setdefault(name, self.num_tokens)

    def _files(self) -> dict[str, str]:
        config = {
            "tokenizer_class": "ByteTokenizer",
            "special_tokens": list(self.special_tokens),
            "eos_token": self._eos,
            "pad_token": self._pad,
        }
        return {CONFIG_FILE: json.dumps(config, indent=2) + "\n"}


def checked_names(names: Iterable[str]) -> list[str]:
    """Return the names of special tokens, each once; ValueError for an empty one."""
    names = list(dict.fromkeys(names))
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"got the special tokens {names}, expected names such as '<|user|>': mend the list")
    return names
