"""Single tokens as clients see them."""

from beartype import beartype

from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer


@beartype
def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, list[int] | None]:
    """Return a token as a string, and as bytes; None for bytes that the tokenizer does not tell.

    A part of a character is written as its bytes, `bytes:\xe2`, or as its name in the tokenizer.
    """
    text = tokenizer.decode([token], with_special_tokens=True)
    if isinstance(tokenizer, ByteTokenizer):
        octets = list(tokenizer.decode_bytes([token], with_special_tokens=True))
        return text if "\ufffd" not in text else "bytes:" + "".join(f"\\x{octet:02x}" for octet in octets), octets
    if "\ufffd" in text and isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.backend.id_to_token(token) or text, None
    return text, list(text.encode("utf-8", "surrogatepass"))
