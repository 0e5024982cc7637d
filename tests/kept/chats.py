"""A conversation, and what a folder's tokenizer and template make of it."""

from pathlib import Path

from palm_rlhf.data.conversation import encode, encode_prompt, end_of_turn
from palm_rlhf.data.templates import PRESETS, JinjaTemplate, load_template
from palm_rlhf.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie geht es dir? <|im_end|>"},
    {"role": "assistant", "content": "Gut, süß. 👍"},
]


def makers() -> dict:
    """The tokenizer and the template of each folder, by its name."""
    words = HuggingFaceTokenizer.train(["Be brief.", "Wie geht es dir?"], num_tokens=280)
    own = PRESETS["default"]
    return {"bytes": (ByteTokenizer(), own), "words": (words, JinjaTemplate(own.to_jinja(), {}, own.special_tokens))}


def tokens_of(folder: Path) -> dict:
    """The tokens of the conversation with their weights, of the prompt for its reply, and the token that ends one."""
    tokenizer, template = load_tokenizer(folder), load_template(folder)
    whole = encode(MESSAGES, tokenizer, template)
    return {
        "tokens": whole.tokens.tolist(),
        "weights": whole.weights.tolist(),
        "prompt": encode_prompt(MESSAGES[:2], tokenizer, template).tolist(),
        "end": end_of_turn(tokenizer, template),
    }
