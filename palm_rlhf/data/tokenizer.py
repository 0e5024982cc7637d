"""Tokenizers whose special tokens no text can forge: bytes, and those of Hugging Face `tokenizers`."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers
from beartype import beartype
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from palm_rlhf.model.interop.folder import read_json
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.vocabulary import resize_token_embeddings
from palm_rlhf.training.state import write_text

NUM_BYTES = 256
LONG_TEXT = 2**14  # characters: some milliseconds of work
EOS, PAD = "<|endoftext|>", "<|pad|>"
DEFAULT_SPECIAL_TOKENS = (EOS, PAD, "<|system|>", "<|user|>", "<|assistant|>")
# Texts to put before another, to learn the tokens that it has in the middle of a text.
ANCHORS = ("\n", ".", "x", "7", "\u4e00")
PROBES = ("a", "e", "1")  # words that show whether a tokenizer puts a blank before the first
TOKENIZER_FILE, CONFIG_FILE, GENERATION_FILE = "tokenizer.json", "tokenizer_config.json", "generation_config.json"


class Tokenizer(ABC):
    """Text to token ids and back. Special tokens are put in by their ids; text never becomes one, whatever it says.

    `special_tokens` has the id of each by its name; `eos_token` and `pad_token` are ids among them.
    """

    special_tokens: dict[str, int]

    @beartype
    def __init__(self, special_tokens: Iterable[str], eos_token: str, pad_token: str | None):
        self.special_tokens = {}
        self._eos, self._pad = eos_token, eos_token if pad_token is None else pad_token
        self.add_special_tokens(special_tokens)
        for role, name in (("eos_token", self._eos), ("pad_token", self._pad)):
            if name not in self.special_tokens:
                raise ValueError(f"{role} is {name!r}, expected one of the special tokens {list(self.special_tokens)}")

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """One more than the largest id."""

    @property
    @abstractmethod
    def token_ids(self) -> Collection[int]:
        """The ids that stand for a token; between them there can be gaps."""

    @property
    def vocab_size(self) -> int:
        """`num_tokens`, by the name that `load_corpus` asks for."""
        return self.num_tokens

    @property
    def eos_token(self) -> int:
        return self.special_tokens[self._eos]

    @property
    def pad_token(self) -> int:
        return self.special_tokens[self._pad]

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides what a text becomes."""
        return hashlib.sha256("\n".join(self._files().values()).encode()).hexdigest()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text, none of them of a special token."""

    def encode_continuation(self, text: str, *, after_special: bool = False) -> list[int]:
        """The ids of a text that goes on after another, or directly after a special token.

        Some tokenizers put a blank before the first word of what they encode, as Llama's does. A text that is cut is
        whole again, without blanks that nobody wrote, where `encode` reads its first part and this method the rest.
        """
        return self.encode(text)

    @abstractmethod
    def decode(self, ids: Iterable[int], *, with_special_tokens: bool = False) -> str:
        """The text of ids; U+FFFD stands for bytes that are no text. ValueError for ids that no token has."""

    @abstractmethod
    def add_special_tokens(self, names: Iterable[str]) -> None:
        """Adds those that are not there yet; a model needs room for them: see `add_special_tokens`."""

    @abstractmethod
    def _files(self) -> dict[str, str]:
        """What is saved, by the names of the files."""

    @beartype
    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the tokenizer to a folder, such as that of its model; `load_tokenizer` opens it again."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in self._files().items():
            write_text(directory / name, text)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.num_tokens:
            bad = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(
                f"token id {bad} has no token, expected 0 to {self.num_tokens - 1}: is the model of another tokenizer?"
            )


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 as the ids 0 to 255, and special tokens after them. Any text and any bytes come back whole."""

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
        """The bytes of a text; those of a lone surrogate too, which `decode` gives back as U+FFFD."""
        return list(text.encode("utf-8", errors="surrogatepass") if isinstance(text, str) else text)

    def decode(self, ids: Iterable[int], *, with_special_tokens: bool = False) -> str:
        """The text of ids; U+FFFD stands for bytes that are no text."""
        return self.decode_bytes(ids, with_special_tokens=with_special_tokens).decode("utf-8", errors="replace")

    @beartype
    def decode_bytes(self, ids: Iterable[int], *, with_special_tokens: bool = False) -> bytes:
        """The bytes of ids: exactly those that were encoded."""
        ids = [int(index) for index in ids]
        self._check_ids(ids)
        names = [name.encode() if with_special_tokens else b"" for name in self.special_tokens]
        return b"".join(bytes([index]) if index < NUM_BYTES else names[index - NUM_BYTES] for index in ids)

    @beartype
    def add_special_tokens(self, names: Iterable[str]) -> None:
        """Adds those that are not there yet; a model needs room for them: see `add_special_tokens`."""
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


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`, as in the `tokenizer.json` of nearly every model there is.

    Its special tokens are those of the backend and `special_tokens`; the one for unknown text is not counted among
    them. `config` is what else goes to tokenizer_config.json.
    """

    @beartype
    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Iterable[str] = (),
        *,
        eos_token: str,
        pad_token: str | None = None,
        config: dict[str, Any] | None = None,
    ):
        self.backend = tokenizers.Tokenizer.from_str(backend.to_str())  # what the caller has stays as it is
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # their names are text like any other
        self.config = config or {}
        self._unknown = unknown_token(self.backend)
        super().__init__(special_tokens, eos_token, pad_token)
        self._anchored = {"text": self._gains_blank(), "special": False}
        self._anchored["special"] = self._anchored["text"] and not self._gains_blank_after_special()

    @classmethod
    @beartype
    def train(
        cls,
        texts: Iterable[str],
        num_tokens: int,
        special_tokens: Iterable[str] = DEFAULT_SPECIAL_TOKENS,
        *,
        eos_token: str = EOS,
        pad_token: str | None = None,
    ) -> "HuggingFaceTokenizer":
        """Learns a byte-level BPE (Sennrich et al. 2016, Radford et al. 2019) of at most `num_tokens` from texts.

        All bytes are among its tokens, so that any text comes back whole.
        """
        names = checked_names(special_tokens)
        if num_tokens < NUM_BYTES + len(names):
            raise ValueError(
                f"num_tokens is {num_tokens}, expected at least {NUM_BYTES + len(names)}: {NUM_BYTES} bytes and "
                f"{len(names)} special tokens"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=num_tokens - len(names),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, names, eos_token=eos_token, pad_token=pad_token)

    @property
    def num_tokens(self) -> int:
        return 1 + max(self.token_ids)

    @property
    def token_ids(self) -> frozenset[int]:
        return self._token_ids

    @beartype
    def encode(self, text: str) -> list[int]:
        """The ids of a text, none of them of a special token; ValueError for a lone surrogate, which is no text."""
        return self._encode(text, anchored=False)

    @beartype
    def encode_continuation(self, text: str, *, after_special: bool = False) -> list[int]:
        """The ids of a text that goes on after another, or directly after a special token; see `Tokenizer`.

        After a special token the blank comes where the backend puts it there too, as transformers has it.
        """
        return self._encode(text, anchored=self._anchored["special" if after_special else "text"])

    def _encode(self, text: str, *, anchored: bool) -> list[int]:
        ids, offsets = self._tokens(text, anchored)
        if self._special_ids.isdisjoint(ids):
            return ids
        # Some models know the name of a special token as a word of their own: it is cut in two wherever it stands.
        spans = [span for index, span in zip(ids, offsets) if index in self._special_ids]
        for start, end in spans:
            if end - start < 2:
                raise ValueError(f"the tokenizer knows {text[start:end]!r} as a special token, which text can forge")
        first, *rest = [text[start:end] for start, end in pairwise([0, *(start + 1 for start, _ in spans), len(text)])]
        parts = [self._encode(first, anchored=anchored), *map(self.encode_continuation, rest)]
        return [index for part in parts for index in part]

    def _tokens(self, text: str, anchored: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and the characters of the text that each stands for; anchored, as they are after other text."""
        if not text:
            return [], []
        for anchor in ANCHORS if anchored else ("",):
            try:
                encoding = self._encoding(anchor + text)
            except TypeError as error:
                raise ValueError(
                    f"the text holds half of a surrogate pair, which is no character: {text!r:.80}; "
                    "mend it by text.encode('utf-8', 'replace').decode()"
                ) from error
            found = [(index, span) for index, span in zip(encoding.ids, encoding.offsets) if span[1] > len(anchor)]
            if all(start >= len(anchor) for _, (start, _) in found):
                break
        else:
            raise ValueError(
                f"the tokenizer joins {text[:20]!r} to every one of {ANCHORS} before it, so that a text cannot be cut "
                "there: let the template put a special token before it"
            )
        shift = len(anchor)
        return [index for index, _ in found], [(start - shift, end - shift) for _, (start, end) in found]

    def _encoding(self, text: str) -> tokenizers.Encoding:
        if len(text) < LONG_TEXT:
            return self.backend.encode(text, add_special_tokens=False)
        # a batch is computed without Python's lock, so that a server answers others meanwhile
        return self.backend.encode_batch([text], add_special_tokens=False)[0]

    def _gains_blank(self) -> bool:
        """Whether a word that begins a text has other tokens than the same word after other text."""
        for word in PROBES:
            with suppress(ValueError):  # a word that the tokenizer does not know is joined to all other such words
                return self._tokens(word, False)[0] != self._tokens(word, True)[0]
        return False

    def _gains_blank_after_special(self) -> bool:
        """Whether the backend begins a text anew after each special token, and not only once."""
        self.backend.encode_special_tokens = False
        after = [self.backend.encode(self._eos + word, add_special_tokens=False).ids[1:] for word in PROBES]
        self.backend.encode_special_tokens = True
        return after == [self._tokens(word, False)[0] for word in PROBES]

    @beartype
    def decode(self, ids: Iterable[int], *, with_special_tokens: bool = False) -> str:
        """The text of ids; U+FFFD stands for bytes that are no text. ValueError for ids that no token has."""
        ids = [int(index) for index in ids]
        self._check_ids(ids)
        return self.backend.decode(ids, skip_special_tokens=not with_special_tokens)

    @beartype
    def add_special_tokens(self, names: Iterable[str]) -> None:
        """Adds those that are not there yet; a model needs room for them: see `add_special_tokens`."""
        new = [name for name in checked_names(names) if name not in self.special_tokens]
        self.backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in new])
        added = sorted(self.backend.get_added_tokens_decoder().items())
        self.special_tokens = {
            token.content: index for index, token in added if token.special and token.content != self._unknown
        }
        self._special_ids = frozenset(self.special_tokens.values())
        self._token_ids = frozenset(self.backend.get_vocab(with_added_tokens=True).values())

    def _files(self) -> dict[str, str]:
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._eos, "pad_token": self._pad}
        config = {**self.config, **own}
        return {TOKENIZER_FILE: self.backend.to_str(pretty=True), CONFIG_FILE: json.dumps(config, indent=2) + "\n"}

    @beartype
    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the tokenizer to a folder, and where transformers and vLLM look for it, which token ends a reply."""
        super().save_pretrained(directory)
        path = Path(directory) / GENERATION_FILE
        generation = read_json(path) if path.exists() else {}
        generation |= {"eos_token_id": self.eos_token, "pad_token_id": self.pad_token}
        write_text(path, json.dumps(generation, indent=2) + "\n")


def unknown_token(backend: tokenizers.Tokenizer) -> str | None:
    """The token that stands for what a backend's model does not know, if it has one."""
    if not isinstance(backend.model, models.Unigram):
        return backend.model.unk_token
    model = json.loads(backend.to_str())["model"]
    return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]


def checked_names(names: Iterable[str]) -> list[str]:
    """The names of special tokens, each once; ValueError for one that is empty."""
    names = list(dict.fromkeys(names))
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"the special tokens are {names}, expected names such as '<|user|>'")
    return names


@beartype
def load_tokenizer(directory: str | Path, *, eos_token: str | None = None, pad_token: str | None = None) -> Tokenizer:
    """Opens what `save_pretrained` wrote, or a Hugging Face folder with a `tokenizer.json` (or that file itself).

    `eos_token` and `pad_token` are names, for folders that do not say them; the pad is the EOS where there is none.
    """
    folder = Path(directory)
    file = folder if folder.is_file() else folder / TOKENIZER_FILE
    config_file = file.with_name(CONFIG_FILE)
    config = read_json(config_file) if config_file.is_file() else {}
    eos_token, pad_token = (
        name if name is not None else token_name(config.get(key))
        for key, name in (("eos_token", eos_token), ("pad_token", pad_token))
    )
    is_bytes = config.get("tokenizer_class") == "ByteTokenizer"
    if not is_bytes and not file.is_file():
        raise FileNotFoundError(
            f"{directory} has no {TOKENIZER_FILE}, and no {CONFIG_FILE} of a ByteTokenizer; expected a folder that "
            "save_pretrained wrote, or one of Hugging Face, whose save_pretrained makes a tokenizer.json of other forms"
        )
    if eos_token is None:
        raise ValueError(f"{config_file} names no eos_token: pass its name, as in eos_token='</s>'")
    if is_bytes:
        return ByteTokenizer(config.get("special_tokens", ()), eos_token=eos_token, pad_token=pad_token)
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{file} is no tokenizer ({error}): copy, download or save it again") from error
    return HuggingFaceTokenizer(backend, eos_token=eos_token, pad_token=pad_token, config=config)


def token_name(value: Any) -> str | None:
    """A token of a tokenizer_config.json, where it stands as a string or as an object with the string in it."""
    return value.get("content") if isinstance(value, dict) else value


@beartype
def add_special_tokens(palm: PaLM, tokenizer: Tokenizer, names: Iterable[str]) -> None:
    """Gives a trained model and its tokenizer more special tokens, in place, whose embeddings are the mean of the old.

    Before a trainer is made; see `resize_token_embeddings`. What the model gives texts without them hardly changes.
    """
    known = tokenizer.num_tokens
    if known > palm.num_tokens:
        raise ValueError(f"the tokenizer has {known} tokens, expected at most {palm.num_tokens}, those of the model")
    tokenizer.add_special_tokens(names)
    if tokenizer.num_tokens > known:
        resize_token_embeddings(palm, max(palm.num_tokens, tokenizer.num_tokens), num_known=known)
