"""Models in folders, opened for evaluation with the tokenizer and the chat template beside them."""

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from beartype import beartype

from palm_rlhf.data.conversation import Template
from palm_rlhf.data.templates import JINJA_FILE, PRESETS, TEMPLATE_FILE, load_template
from palm_rlhf.data.tokenizer import CONFIG_FILE, NUM_BYTES, TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.weights_folder import CONFIG, local_folder, read_json
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.reward_model_folder import MODEL_TYPE

log = logging.getLogger(__name__)


class OpenedModel(NamedTuple):
    """A PaLM or a RewardModel, and what makes tokens of conversations for it."""

    model: PaLM | RewardModel
    tokenizer: Tokenizer
    template: Template


def default_device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@beartype
def name_of(model: str | Path) -> str:
    """What to call the model in a folder, or of a hub id."""
    return Path(model).resolve().name


@beartype
def is_reward_model(folder: Path) -> bool:
    """Whether a folder is of `RewardModel.save_pretrained`."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") == MODEL_TYPE


@beartype
def open_tokenizer(folder: Path, num_tokens: int) -> Tokenizer:
    """The folder's tokenizer, or bytes where it has none and the model room for them; ValueError where not."""
    if (folder / TOKENIZER_FILE).is_file() or (folder / CONFIG_FILE).is_file():
        return load_tokenizer(folder)
    if num_tokens < NUM_BYTES:
        raise ValueError(
            f"{folder} has no {TOKENIZER_FILE}, and its {num_tokens} tokens are too few for bytes: save the tokenizer "
            "that the model was trained with to the folder, tokenizer.save_pretrained(folder)"
        )
    return ByteTokenizer()


@beartype
def open_palm(model: str | Path) -> tuple[PaLM, Tokenizer]:
    """A PaLM in evaluation mode with its tokenizer; `model` is its folder, that of a run, or a hub id."""
    folder = local_folder(model)
    palm = PaLM.from_pretrained(folder, device=default_device()).eval()
    return palm, open_tokenizer(folder, palm.num_tokens)


@beartype
def open_chat_model(model: str | Path, template: str | None = None) -> OpenedModel:
    """A PaLM or RewardModel that reads conversations; `template` names a preset where the folder has none.

    `model` is its folder, that of a run, or a hub id. ValueError where it has no room for the special tokens of the
    template.
    """
    folder = local_folder(model)
    opened: PaLM | RewardModel
    if is_reward_model(folder):
        opened = RewardModel.from_pretrained(folder, device=default_device()).eval()
        num_tokens, tokenizer = opened.palm.num_tokens, open_tokenizer(folder, opened.palm.num_tokens)
    else:
        opened, tokenizer = open_palm(folder)
        num_tokens = opened.num_tokens
    chosen: Template
    if template is not None:
        chosen = PRESETS[template]
    elif (folder / TEMPLATE_FILE).is_file() or (folder / JINJA_FILE).is_file() or (folder / CONFIG_FILE).is_file():
        chosen = load_template(folder)
    else:
        chosen = PRESETS["default"]
        log.warning("%s has no chat template: the default one is taken", folder)
    if tokenizer.num_tokens > num_tokens:
        raise ValueError(
            f"the model in {folder} has {num_tokens} tokens, and its tokenizer {tokenizer.num_tokens} with the special "
            "ones of chat templates: fine-tune it on conversations first, with both saved beside it"
        )
    return OpenedModel(opened, tokenizer, chosen)


@beartype
def version_of(folder: Path, template: str | None = None) -> str:
    """A digest that changes with the files of a folder, by their sizes and times, and with the template's name."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
    return hashlib.sha256(repr((str(folder.resolve()), files, template)).encode()).hexdigest()
