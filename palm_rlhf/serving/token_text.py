"""Text from tokens as they come: whole characters, up to a stop string."""

from collections.abc import Sequence

from palm_rlhf.data.stream_decoder import StreamDecoder
from palm_rlhf.data.tokenizer import Tokenizer


def spelled(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[str, list[int]]:
    """The text of tokens, special ones by their names, and where the text of each begins in it, in characters."""
    names = {token: name for name, token in tokenizer.special_tokens.items()}
    decoder, parts, offsets, size = StreamDecoder(tokenizer), [], [], 0
    for token in tokens:
        offsets.append(size)
        parts.append(decoder.finish() + names[token] if token in names else decoder.push(token))
        size += len(parts[-1])
    return "".join((*parts, decoder.finish())), offsets


class TextStream:
    """The text of tokens as they come, up to the `stop` string that is whole first, which is left out.

    What may yet become a stop string is held back, and so is a character that lacks bytes: a reply that ends inside of
    one ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.stopped = False
        self.num_chars = 0  # of all that was decoded, held back or not
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self._decoder = StreamDecoder(tokenizer)

    def push(self, token: int) -> str:
        """What one more token adds."""
        text = self._decoder.push(token)
        return self._until_stop(text) if text else ""

    def finish(self) -> str:
        """What was held back, without a character that is not whole; nothing after a stop string."""
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
