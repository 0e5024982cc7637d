"""Models for evaluation, opened from their folders with tokenizer and chat template."""

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

import torch
from beartype import beartype

from palm_rlhf.data.conversation import Template
from palm_rlhf.data.templates import JINJA_FILE, PRESETS, TEMPLATE_FILE, load_template
from palm_rlhf.data.tokenizer import CONFIG_FILE, NUM_BYTES, TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from palm_rlhf.model.interop.peft_base import base_of, is_adapter, weights_of
from palm_rlhf.model.local_model import local_model
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import require_room
from palm_rlhf.model.weights_folder import CONFIG, read_json
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.reward_model_folder import MODEL_TYPE

log = logging.getLogger(__name__)


class OpenedModel(NamedTuple):
    """A PaLM or a RewardModel with its tokenizer and chat template."""

    model: PaLM | RewardModel
    tokenizer: Tokenizer
    template: Template


def default_device() -> str:
    """Return the GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@beartype
def name_of(model: str | Path) -> str:
    """Return the name of a model: the last part of its folder or hub id."""
    return Path(model).resolve().name


@beartype
def is_reward_model(folder: Path) -> bool:
    """Return whether a folder was written by `RewardModel.save_pretrained`."""
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("model_type") == MODEL_TYPE


@beartype
def open_tokenizer(folder: Path, num_tokens: int) -> Tokenizer:
    """Open the tokenizer of a folder or GGUF file, or bytes if there is none.

    Raises ValueError if the model has too few tokens.
    """
    if is_adapter(folder) and not any((folder / name).is_file() for name in (TOKENIZER_FILE, CONFIG_FILE)):
        folder = base_of(folder)
    if folder.is_file() or (folder / TOKENIZER_FILE).is_file() or (folder / CONFIG_FILE).is_file():
        tokenizer = load_tokenizer(folder)
        require_room(tokenizer.num_tokens, num_tokens, folder)
        return tokenizer
    if num_tokens < NUM_BYTES:
        raise ValueError(
            f"got {folder} without {TOKENIZER_FILE} and a model of {num_tokens} tokens, too few for bytes; expected a "
            "tokenizer: save the one of the training there, tokenizer.save_pretrained(folder)"
        )
    return ByteTokenizer()


@beartype
def open_palm(model: str | Path) -> tuple[PaLM, Tokenizer]:
    """Open a PaLM in evaluation mode with its tokenizer, from its folder, the folder of a run, or a hub id."""
    folder = local_model(model)
    palm = PaLM.from_pretrained(folder, device=default_device()).eval()
    return palm, open_tokenizer(folder, palm.num_tokens)


@beartype
def open_chat_model(model: str | Path, template: str | None = None) -> OpenedModel:
    """Open a PaLM or RewardModel that reads conversations.

    Raises ValueError if the model has no embeddings for the special tokens of the template.

    Args:
        model: Its folder or .gguf file, the folder of a run, a hub id, or smollm2.
        template: The name of a preset; by default the folder's template, or the default preset.
    """
    folder = local_model(model)
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
    elif has_template(folder) or (is_adapter(folder) and has_template(base_of(folder))):
        chosen = load_template(folder)
    else:
        chosen = PRESETS["default"]
        log.warning("%s has no chat template, the default one is used", folder)
    if tokenizer.num_tokens > num_tokens:
        raise ValueError(
            f"got a model of {num_tokens} tokens in {folder}, expected {tokenizer.num_tokens} as in its tokenizer with "
            "the special tokens of chat templates: fine-tune the model on conversations first (palm-rlhf sft)"
        )
    return OpenedModel(opened, tokenizer, chosen)


def has_template(folder: Path) -> bool:
    """Return whether a folder has a file that can contain a chat template; a GGUF file can."""
    return folder.is_file() or any((folder / name).is_file() for name in (TEMPLATE_FILE, JINJA_FILE, CONFIG_FILE))


@beartype
def version_of(folder: Path, template: str | None = None) -> str:
    """Return a digest of the sizes and times of a folder's files, or of a GGUF file, and of the template's name.

    The files of an adapter's base count too.
    """
    places = {folder, weights_of(folder)}
    paths = [path for place in places for path in ([place] if place.is_file() else place.iterdir())]
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    return hashlib.sha256(repr((str(folder.resolve()), files, template)).encode()).hexdigest()
