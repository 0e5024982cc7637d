"""The models that training commands start from, with the tokenizer and the chat template beside them."""

import contextlib
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from beartype import beartype
from tyro.conf import arg

from palm_rlhf.data.conversation import Template
from palm_rlhf.data.templates import PRESETS, load_template
from palm_rlhf.data.tokenizer import NUM_BYTES, ByteTokenizer, Tokenizer, add_special_tokens, load_tokenizer
from palm_rlhf.evaluation.measures.model_folders import is_reward_model
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import resize_token_embeddings
from palm_rlhf.model.weights_folder import local_folder
from palm_rlhf.policy.reward_model import RewardModel

TemplateName = Literal["auto", "default", "oasst", "vicuna", "openchat"]
ModelName = Annotated[str, arg(metavar="MODEL")]


class ChatModel(NamedTuple):
    """A PaLM, and what makes tokens of conversations for it."""

    palm: PaLM
    tokenizer: Tokenizer
    template: Template


@beartype
def open_chat_model(source: str | Path, template: str = "auto") -> ChatModel:
    """A PaLM with room for the special tokens of its chat template, which it may gain here.

    `source` is its folder, that of a run, or a hub id. A model of 256 tokens without a tokenizer has bytes. `template`
    is one of PRESETS, or "auto": the folder's own, or the default one.
    """
    folder = local_folder(source)
    if is_reward_model(folder):
        raise ValueError(
            f"{source} is a reward model, expected a language model: give the one that it was trained from"
        )
    palm = PaLM.from_pretrained(folder)
    tokenizer = open_tokenizer(folder, palm)
    form = open_template(folder, template)
    add_special_tokens(palm, tokenizer, form.special_tokens)
    return ChatModel(palm, tokenizer, form)


@beartype
def open_tokenizer(folder: Path, palm: PaLM) -> Tokenizer:
    """The tokenizer in a model's folder, or that of bytes, for whose special tokens the model gains room."""
    try:
        return load_tokenizer(folder)
    except FileNotFoundError:
        if palm.num_tokens != NUM_BYTES:
            raise
    tokenizer = ByteTokenizer()
    resize_token_embeddings(palm, tokenizer.num_tokens)
    return tokenizer


@beartype
def open_template(folder: Path, name: str) -> Template:
    """One of PRESETS by its name, or for "auto" the one in the folder, and the default one where it has none."""
    if name == "auto":
        with contextlib.suppress(FileNotFoundError):
            return load_template(folder)
    return PRESETS["default" if name == "auto" else name]


@beartype
def open_reward_model(source: str | Path, policy: ChatModel, name: str) -> RewardModel:
    """A reward model that reads the tokens of a policy called `name`; ValueError where it reads others."""
    folder = local_folder(source)
    reward_model = RewardModel.from_pretrained(folder)
    got, expected = reward_model.palm.num_tokens, policy.palm.num_tokens
    with contextlib.suppress(FileNotFoundError):  # the numbers alone decide then
        if load_tokenizer(folder).fingerprint != policy.tokenizer.fingerprint:
            raise ValueError(
                f"the reward model {source} and the model {name} have different tokenizers, expected one: train the "
                f"reward model from a model of this tokenizer, palm-rlhf reward RANKINGS --model {name}"
            )
    if got != expected:
        raise ValueError(
            f"the reward model {source} has {got} tokens and the model {name} has {expected}, those of its chat "
            f"template included; expected as many: fine-tune the model first (palm-rlhf sft), and train the reward "
            "model from the result (palm-rlhf reward)"
        )
    return reward_model
