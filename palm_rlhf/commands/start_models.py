"""The models that training commands start from, with tokenizer and chat template."""

import contextlib
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from beartype import beartype
from tyro.conf import arg

from palm_rlhf.data.conversation import Template, end_of_turn
from palm_rlhf.data.templates import PRESETS, load_template
from palm_rlhf.data.tokenizer import NUM_BYTES, ByteTokenizer, Tokenizer, add_special_tokens, load_tokenizer
from palm_rlhf.evaluation.measures.model_folders import is_reward_model
from palm_rlhf.model.local_model import local_model
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.quantised.quantised_model import is_quantised
from palm_rlhf.model.quantised.quantised_weights import Quantisation
from palm_rlhf.model.token_ids import require_room, resize_token_embeddings
from palm_rlhf.policy.reward_model import RewardModel

TemplateName = Literal["auto", "default", "oasst", "vicuna", "openchat"]
ModelName = Annotated[str, arg(metavar="MODEL")]


class ChatModel(NamedTuple):
    """A PaLM with its tokenizer and chat template."""

    palm: PaLM
    tokenizer: Tokenizer
    template: Template

    @property
    def end_of_turn(self) -> int:
        """The token that ends a reply."""
        return end_of_turn(self.tokenizer, self.template)


@beartype
def open_chat_model(source: str | Path, template: str = "auto") -> ChatModel:
    """Open a PaLM for conversations; embeddings for the special tokens of its chat template are added if missing.

    Args:
        source: Its folder or .gguf file, the folder of a run, a hub id, or smollm2. A model of 256 tokens without a
            tokenizer reads bytes.
        template: One of PRESETS, or "auto": the folder's own template, or the default preset.
    """
    folder = local_model(source)
    if is_reward_model(folder):
        raise ValueError(
            f"got the reward model {source}, expected a language model: name the model that it was trained from"
        )
    palm = PaLM.from_pretrained(folder)
    tokenizer = open_tokenizer(folder, palm)
    form = open_template(folder, template)
    add_special_tokens(palm, tokenizer, form.special_tokens)
    return ChatModel(palm, tokenizer, form)


@beartype
def quantize_base(palm: PaLM, kind: Quantisation | None, rank: int, option: str) -> None:
    """Put the base below adapters into fewer bits, unless `kind` is None.

    Raises ValueError without adapters: `rank` is the value of `option`.
    """
    if kind is None:
        return
    if not rank:
        raise ValueError(f"got --quantize {kind} without {option}, expected adapters: frozen weights do not train")
    palm.quantize_(kind)


@beartype
def merge_adapters(palm: PaLM, scope: str) -> None:
    """Merge adapters into plain weights: a base in fewer bits becomes the plain weights that its numbers stand for."""
    if is_quantised(palm):
        palm.dequantize_()
    palm.merge_finetune_params(scope)


@beartype
def open_tokenizer(folder: Path, palm: PaLM) -> Tokenizer:
    """Open the tokenizer in a model's folder, or bytes, for whose special tokens the model gains embeddings."""
    try:
        tokenizer = load_tokenizer(folder)
    except FileNotFoundError:
        if palm.num_tokens != NUM_BYTES:
            raise
        tokenizer = ByteTokenizer()
        resize_token_embeddings(palm, tokenizer.num_tokens)
    require_room(tokenizer.num_tokens, palm.num_tokens, folder)
    return tokenizer


@beartype
def open_template(folder: Path, name: str) -> Template:
    """Open one of PRESETS by its name, or for "auto" the folder's template, or the default preset."""
    if name == "auto":
        with contextlib.suppress(FileNotFoundError):
            return load_template(folder)
    return PRESETS["default" if name == "auto" else name]


@beartype
def open_reward_model(source: str | Path, policy: ChatModel, name: str, *, share_base: bool = False) -> RewardModel:
    """Open a reward model for a policy called `name`, with `share_base` over the weights of the policy.

    Raises ValueError if it reads other tokens, or cannot share the weights.
    """
    folder = local_model(source)
    reward_model = RewardModel.from_pretrained(folder, base=policy.palm if share_base else None)
    got, expected = reward_model.palm.num_tokens, policy.palm.num_tokens
    with contextlib.suppress(FileNotFoundError):  # without a tokenizer only the vocabulary sizes are compared
        if load_tokenizer(folder).fingerprint != policy.tokenizer.fingerprint:
            raise ValueError(
                f"got different tokenizers of the reward model {source} and the model {name}, expected one: train the "
                f"reward model from this model, palm-rlhf reward RANKINGS --model {name}"
            )
    if got != expected:
        raise ValueError(
            f"got the reward model {source} with {got} tokens, expected {expected} as in the model {name} with its "
            "chat template: fine-tune the model first (palm-rlhf sft), and train the reward model from the result "
            "(palm-rlhf reward)"
        )
    return reward_model
