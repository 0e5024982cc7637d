"""Text while its tokens are still coming."""

from beartype import beartype

from palm_rlhf.data.tokenizer import Tokenizer


class StreamDecoder:
    """Text as its tokens come, each character when it is whole: all that is pushed, and `finish`, add up to `decode`.

    (But for bytes that are no text, from tokenizers that fall back to bytes: there `decode` gives up whole runs.)
    """

    @beartype
    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.special_tokens.values())
        self._held: list[int] = []  # the tokens that were last given out, which may decide on spaces, and those after
        self._num_shown = 0
        self._shown = ""  # the text of the first `num_shown`

    @beartype
    def push(self, token: int) -> str:
        """What one more token adds; nothing for special tokens, and while a character may lack bytes."""
        if token in self._skipped:
            return ""
        self._held.append(token)
        return "" if self.tokenizer.decode(self._held).endswith("\ufffd") else self.finish()

    def finish(self) -> str:
        """What was held back."""
        new = self.tokenizer.decode(self._held)[len(self._shown) :]
        self._held = self._held[self._num_shown :]
        self._num_shown, self._shown = len(self._held), self.tokenizer.decode(self._held)
        return new
