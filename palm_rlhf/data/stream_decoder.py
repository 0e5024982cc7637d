"""Text that is decoded while its tokens arrive."""

from collections.abc import Sequence

from beartype import beartype

from palm_rlhf.data.tokenizer import Tokenizer


class StreamDecoder:
    """A decoder of tokens that arrive one by one, which returns each character once it is whole.

    The texts of all calls of `push`, and of `finish`, together are the text of `decode`, except for invalid bytes in
    tokenizers with a fallback to bytes, where `decode` drops whole runs.

    `after` are the tokens of a text that goes on in these tokens: the first word then keeps the space before it, which
    tokenizers such as that of Llama leave out at the start of a text.
    """

    @beartype
    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self._skipped = frozenset(tokenizer.special_tokens.values())
        self._held: list[int] = []  # the last tokens with returned text, on which spaces may depend, and later tokens
        self._num_shown = 0
        self._shown = ""  # the text of the first `_num_shown` tokens
        last = [token for token in after[-1:] if token not in self._skipped]
        if not (text := tokenizer.decode(last)).endswith("\ufffd"):  # else a character is not whole yet
            self._held, self._num_shown, self._shown = last, len(last), text

    @beartype
    def push(self, token: int) -> str:
        """Return the text that a token adds: none for special tokens, or while a character may lack bytes."""
        if token in self._skipped:
            return ""
        self._held.append(token)
        text = self.tokenizer.decode(self._held)
        return "" if text.endswith("\ufffd") else self._show(text)

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._show(self.tokenizer.decode(self._held))

    def _show(self, text: str) -> str:
        """Return what the text of all held tokens adds to the text that was returned."""
        new = text[len(self._shown) :]
        self._held = self._held[self._num_shown :]
        self._num_shown, self._shown = len(self._held), self.tokenizer.decode(self._held)
        return new
