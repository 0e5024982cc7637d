"""How the kinds of byte-level tokenizers in GGUF files cut a text into words, by their tokenizer.ggml.pre.

The expressions are those in the tokenizer.json of the models after which llama.cpp names the kinds.
"""

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+")


@dataclass(frozen=True)
class Words:
    """How a kind of byte-level tokenizer cuts a text into words.

    Args:
        expressions: they cut the text one after the other; without any, the expression of GPT-2 cuts it.
        digits: each digit is a word.
        composed: letters and accents are read as one character, NFC.
        whole: a word that is a token is not cut, whatever the merges.
        after_bos: without tokenizer.ggml.add_bos_token, a text starts with the BOS.
    """

    expressions: tuple[str, ...] = ()
    digits: bool = False
    composed: bool = False
    whole: bool = False
    after_bos: bool = False


# The writer takes the first that fits.
WORDS = {
    **dict.fromkeys(("gpt-2", "olmo", "phi-2", "jais"), Words()),
    "smollm": Words(digits=True),
    "command-r": Words(digits=True, composed=True),
    **dict.fromkeys(("starcoder", "refact", "codeshell"), Words(digits=True)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Words((LLAMA3,), whole=True, after_bos=True)),
    **dict.fromkeys(("smaug-bpe", "dbrx"), Words((LLAMA3,))),
    "qwen2": Words((QWEN2,), composed=True),
    "deepseek-r1-qwen": Words((QWEN2,)),
    "tekken": Words((TEKKEN,), whole=True, after_bos=True),
    "deepseek-coder": Words(DEEPSEEK_CODER, digits=True),
}
# Files from before May 2024 name no kind. Models of these architectures had one kind then, and so have most today.
OF_ARCHITECTURE = {"qwen2": "qwen2", "command-r": "command-r"}


def splitting(kind: str) -> tuple[normalizers.Normalizer | None, pre_tokenizers.PreTokenizer, bool]:
    """Return how a kind of byte-level tokenizer normalises texts, cuts words, and if a word that is a token stays."""
    words = WORDS[kind]
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in words.expressions
    ]
    if words.digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words.expressions))
    return normalizers.NFC() if words.composed else None, pre_tokenizers.Sequence(steps), words.whole
