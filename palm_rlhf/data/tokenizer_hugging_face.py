"""Tokenizers of the library `tokenizers`, made safe: text never becomes a special token, and text can be cut."""

import json
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from itertools import pairwise, takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import tokenizers
from beartype import beartype
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from palm_rlhf.data.tokenizer_base import (
    CONFIG_FILE,
    DEFAULT_SPECIAL_TOKENS,
    EOS,
    NUM_BYTES,
    Tokenizer,
    checked_names,
)
from palm_rlhf.model.files import write_text
from palm_rlhf.model.weights_folder import read_json

LONG_TEXT = 2**14  # characters: some milliseconds of work
# Texts to put before another text, to find the tokens that it has in the middle of a text.
ANCHORS = ("\n", ".", "x", "7", "\u4e00")
PROBES = ("a", "e", "1")  # words that show whether a tokenizer puts a space before the first
TOKENIZER_FILE, GENERATION_FILE = "tokenizer.json", "generation_config.json"


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`, as in the `tokenizer.json` of most models.

    Its special tokens are those of the backend and `special_tokens`; the token for unknown text does not count as one,
    though it may be the padding token, as that of Vicuna is.

    Args:
        backend: The tokenizer, which is copied.
        special_tokens: Special tokens to add.
        eos_token: The name of the token that ends a text.
        pad_token: The name of the padding token; by default `eos_token`.
        config: Further fields of tokenizer_config.json.
        generation: Further fields of generation_config.json, with which transformers and vLLM generate.
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
        generation: dict[str, Any] | None = None,
    ):
        self.backend = tokenizers.Tokenizer.from_str(backend.to_str())  # a copy
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # their names are text like any other
        self.config, self.generation = config or {}, generation or {}
        self._unknown = unknown_token(self.backend)
        super().__init__(special_tokens, eos_token, pad_token)
        # After other text, or after a special token, text is encoded behind an anchor if it would gain a space.
        self._anchors_after_text = self._gains_blank()
        self._anchors_after_special = self._anchors_after_text and not self._gains_blank_after_special()

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
        """Learn a byte-level BPE (Sennrich et al. 2016, Radford et al. 2019) of at most `num_tokens` from texts.

        All bytes are among its tokens, so that any text decodes unchanged.
        """
        names = checked_names(special_tokens)
        if num_tokens < NUM_BYTES + len(names):
            raise ValueError(
                f"got num_tokens={num_tokens}, expected at least {NUM_BYTES + len(names)}, for {NUM_BYTES} bytes and "
                f"{len(names)} special tokens: raise it"
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
        return self._num_tokens

    @property
    def token_ids(self) -> frozenset[int]:
        return self._token_ids

    @property
    def eos_tokens(self) -> frozenset[int]:
        """The ids that end a text: `eos_token`, and those in `generation` (Llama 3.1 has three)."""
        found = self.generation.get("eos_token_id")
        ids = {index for index in (found if isinstance(found, list) else [found]) if type(index) is int}
        return frozenset({self.eos_token} | (ids & self._token_ids))

    @property
    def pad_token(self) -> int:
        return cast(int, self._role_id(self._pad))

    @cached_property
    def text_start(self) -> list[int]:
        """The special tokens that stand before the text of a prompt: those of tokenizer.json, as in transformers 5."""
        encoding = self.backend.encode("a", add_special_tokens=True)
        return [token for token, _ in takewhile(itemgetter(1), zip(encoding.ids, encoding.special_tokens_mask))]

    @beartype
    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, none of them of a special token; ValueError for a lone surrogate."""
        return self._encode(text, anchored=False)

    @beartype
    def encode_continuation(self, text: str, *, after_special: bool = False) -> list[int]:
        """Return the ids of a text that continues another one, or that follows a special token; see `Tokenizer`.

        After a special token a space is added if the backend adds one there, as transformers does.
        """
        anchored = self._anchors_after_special if after_special else self._anchors_after_text
        return self._encode(text, anchored=anchored)

    def _encode(self, text: str, *, anchored: bool) -> list[int]:
        if not text:
            return []
        encoding, num_skipped, shift = self._after_text(text) if anchored else (self._encoding(text), 0, 0)
        ids = encoding.ids[num_skipped:]
        if self._special_ids.isdisjoint(ids):
            return ids
        # Some vocabularies contain the name of a special token as a word: it is cut in two wherever it stands.
        offsets = ((start - shift, end - shift) for start, end in encoding.offsets[num_skipped:])
        spans = [span for index, span in zip(ids, offsets) if index in self._special_ids]
        for start, end in spans:
            if end - start < 2:
                raise ValueError(
                    f"got the special token {text[start:end]!r} of one character, expected a longer one, which text "
                    "cannot forge: take another tokenizer"
                )
        first, *rest = [text[start:end] for start, end in pairwise([0, *(start + 1 for start, _ in spans), len(text)])]
        parts = [self._encode(first, anchored=anchored), *map(self.encode_continuation, rest)]
        return [index for part in parts for index in part]

    def _after_text(self, text: str) -> tuple[tokenizers.Encoding, int, int]:
        """Return the encoding of a text behind an anchor, and the anchor's number of tokens and characters."""
        for anchor in ANCHORS:
            encoding = self._encoding(anchor + text)
            first = next((at for at, (_, end) in enumerate(encoding.offsets) if end > len(anchor)), None)
            if first is not None and encoding.offsets[first][0] >= len(anchor):
                return encoding, first, len(anchor)
        raise ValueError(
            f"got {text[:20]!r} after other text, expected text that the tokenizer does not join to all of {ANCHORS}: "
            "let the template put a special token before it"
        )

    def _encoding(self, text: str) -> tokenizers.Encoding:
        try:
            if len(text) < LONG_TEXT:
                return self.backend.encode(text, add_special_tokens=False)
            # a batch is encoded without Python's lock, so that a server answers other requests meanwhile
            return self.backend.encode_batch([text], add_special_tokens=False)[0]
        except TypeError as error:
            raise ValueError(
                f"got half of a surrogate pair in {text!r:.80}, expected characters: mend the text by "
                "text.encode('utf-8', 'replace').decode()"
            ) from error

    def _gains_blank(self) -> bool:
        """Return whether a word at the start of a text has other tokens than the same word after other text."""
        for word in PROBES:
            with suppress(ValueError):  # the tokenizer joins words that it does not know
                return self._encode(word, anchored=False) != self._encode(word, anchored=True)
        return False

    def _gains_blank_after_special(self) -> bool:
        """Return whether the backend treats text after each special token as the start of a text."""
        self.backend.encode_special_tokens = False
        after = [self.backend.encode(self._eos + word, add_special_tokens=False).ids[1:] for word in PROBES]
        self.backend.encode_special_tokens = True
        return after == [self._encode(word, anchored=False) for word in PROBES]

    @beartype
    def decode(self, ids: Iterable[int], *, with_special_tokens: bool = False) -> str:
        """Return the text of ids, with U+FFFD for invalid bytes; ids without a token add none."""
        return self.backend.decode(self._known_ids(ids), skip_special_tokens=not with_special_tokens)

    @beartype
    def add_special_tokens(self, names: Iterable[str]) -> None:
        """Add special tokens that are missing; a model needs room for them: see `add_special_tokens`.

        Raises ValueError where the backend would give a new token an id among those of other tokens.
        """
        new = [name for name in checked_names(names) if name not in self.special_tokens]
        self._check_room_for(new)
        self.backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in new])
        added = sorted(self.backend.get_added_tokens_decoder().items())
        self.special_tokens = {
            token.content: index for index, token in added if token.special and token.content != self._unknown
        }
        self._special_ids = frozenset(self.special_tokens.values())
        strips = [{index for index, token in added if getattr(token, side)} for side in ("lstrip", "rstrip")]
        self._stripping = self._special_ids & strips[0], self._special_ids & strips[1]
        self._token_ids = frozenset(self.backend.get_vocab(with_added_tokens=True).values())
        self._num_tokens = 1 + max(self._token_ids)

    @property
    def stripping(self) -> tuple[frozenset[int], frozenset[int]]:
        """The special tokens that remove the white space before them, and those that remove it after them (Phi 4)."""
        return self._stripping

    def _role_id(self, name: str) -> int | None:
        """Return the id of a special token, or of the token for unknown text if it pads; see `Tokenizer`."""
        if self._eos != name == self._unknown == self._pad:
            return self.backend.token_to_id(name)
        return super()._role_id(name)

    def _check_room_for(self, names: list[str]) -> None:
        """Raise ValueError if tokens of these names would not come after all others, as the backend counts ids."""
        ids = self.backend.get_vocab(with_added_tokens=True)
        words = [name for name in names if name not in ids]
        if not words or len(set(ids.values())) > (last := max(ids.values(), default=-1)):
            return  # without gaps between the ids, a new one is the next
        trial = tokenizers.Tokenizer.from_str(self.backend.to_str())
        trial.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in words])
        if early := [name for name in words if (trial.token_to_id(name) or 0) <= last]:
            raise ValueError(
                f"got a tokenizer with gaps between its ids, in which {early[0]!r} would take the id "
                f"{trial.token_to_id(early[0])} of another token, expected ids without gaps: take a template whose "
                "special tokens it has, or fill the gaps in its tokenizer.json"
            )

    def _files(self) -> dict[str, str]:
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._eos, "pad_token": self._pad}
        config = {**self.config, **own}
        return {TOKENIZER_FILE: self.backend.to_str(pretty=True), CONFIG_FILE: json.dumps(config, indent=2) + "\n"}

    @beartype
    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tokenizer, and for transformers and vLLM, the tokens that end a reply, to a folder.

        Several such tokens in `generation` stay, if the EOS is one of them.
        """
        super().save_pretrained(directory)
        path = Path(directory) / GENERATION_FILE
        generation = {**self.generation, **(read_json(path) if path.exists() else {})}
        ends = self.generation.get("eos_token_id")
        if not isinstance(ends, list) or self.eos_token not in ends:
            ends = self.eos_token
        generation |= {"eos_token_id": ends, "pad_token_id": self.pad_token}
        write_text(path, json.dumps(generation, indent=2) + "\n")


def unmarked(backend: tokenizers.Tokenizer, names: Iterable[str | None]) -> list[str]:
    """Return those of the names of special tokens that a backend has as ordinary tokens; transformers marks them."""
    ids = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    found = {name: backend.token_to_id(name) for name in names if name and name != unknown_token(backend)}
    return [name for name, index in found.items() if index is not None and index not in ids]


def unknown_token(backend: tokenizers.Tokenizer) -> str | None:
    """Return the token for text that a backend's model does not know, if it has one."""
    if not isinstance(backend.model, models.Unigram):
        return backend.model.unk_token
    model = json.loads(backend.to_str())["model"]
    return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]
