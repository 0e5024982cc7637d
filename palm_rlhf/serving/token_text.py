"""Text from tokens as they are sampled: whole characters only, up to a stop string."""

from collections.abc import Sequence

from palm_rlhf.data.stream_decoder import StreamDecoder
from palm_rlhf.data.tokenizer import Tokenizer


def spelled(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[str, list[int]]:
    """Return the text of tokens, special tokens by their names, and the offset of each token in it, in characters."""
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    decoder, size = StreamDecoder(tokenizer), 0
    parts: list[str] = []
    offsets: list[int] = []
    for token in tokens:
        offsets.append(size)
        parts.append(decoder.finish() + names[token] if token in names else decoder.push(token))
        size += len(parts[-1])
    return "".join((*parts, decoder.finish())), offsets


class TextStream:
    """The text of tokens as they are sampled, up to the `stop` string that is complete first, which is left out.

    Text that may be the beginning of a stop string is held back, and so is a character whose bytes are incomplete. A
    reply that ends inside a character ends before it. `after` are the tokens of a text that goes on in the reply.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), after: Sequence[int] = ()):
        self.stopped = False
        self.num_chars = 0  # decoded so far, including text that is held back
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self._decoder = StreamDecoder(tokenizer, after)

    def push(self, token: int) -> str:
        """Add a token, and return the text that is certain now."""
        text = self._decoder.push(token)
        return self._until_stop(text) if text else ""

    def finish(self) -> str:
        """Return the text that was held back, without an incomplete character; nothing after a stop string."""
        if self.stopped:
            return ""
        text = self._until_stop(self._decoder.finish().rstrip("\ufffd"))
        held, self._held = self._held, ""
        return text + held

    def _until_stop(self, new: str) -> str:
        self.num_chars += len(new)
        if not self._stop:
            return new
        text, self._held = self._held + new, ""
        if found := [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]:
            self.stopped = True
            return text[: min(found)[1]]
        for size in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                self._held = text[-size:]
                return text[:-size]
        return text
