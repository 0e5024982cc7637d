"""Adapters as the result of a training command: a folder of PEFT in place of a whole model."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from beartype import beartype

from palm_rlhf.commands.run_folder import Saved
from palm_rlhf.commands.start_models import ChatModel, merge_adapters
from palm_rlhf.data.tokenizer import load_tokenizer
from palm_rlhf.model.interop.peft_base import is_adapter
from palm_rlhf.model.local_model import MODEL, local_model
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.weights_folder import ADAPTER_CONFIG, CONFIG


class TrainedAdapter(NamedTuple):
    """A LoRA scope of a model, and the name of the base that others find the model by."""

    palm: PaLM
    scope: str
    base: str

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the scope as a folder of PEFT."""
        self.palm.save_adapter(directory, self.scope, base=self.base)


@beartype
def base_for_adapters(model: str, opened: ChatModel, rank: int, trains_embeddings: bool = False) -> str:
    """Return the name of the base for adapters over a model: an absolute path, or the name as it was given.

    Raises ValueError where the adapters over that base would not be the model that was trained.

    Args:
        model: The model that was opened, as the user names it.
        opened: The model as it is trained.
        rank: The rank of the adapters; 0 for none.
        trains_embeddings: Whether the embeddings are trained, too.
    """
    if not rank:
        raise ValueError("got --no-merge without adapters, expected some, by --lora-r (of rlhf, --actor-lora-r)")
    if trains_embeddings:
        raise ValueError("got --no-merge with --lora-embeddings, expected one of them: adapters hold no embeddings")
    place = local_model(model)
    if is_adapter(place):
        raise ValueError(
            f"got --no-merge over {model}, an adapter itself, expected a whole model: write one by palm-rlhf export "
            f"{model} --format hf --output FOLDER, and train over FOLDER"
        )
    try:
        known = load_tokenizer(place).special_tokens
    except FileNotFoundError:
        known = {}
    if new := [name for name in opened.tokenizer.special_tokens if name not in known]:
        raise ValueError(
            f"got --no-merge and the chat template's tokens {new}, which {model} lacks: their embeddings are no part "
            "of the adapters. Expected a template whose tokens the model has (--template), or merged weights"
        )
    return str(place.resolve()) if Path(model).exists() else model


@beartype
def parts_to_save(model: ChatModel, scope: str, rank: int, base: str | None) -> Sequence[Saved]:
    """Return a trained model, its tokenizer and its template, to be saved.

    The model is its adapters alone where they have a base, and else the whole one, into which adapters are merged.
    """
    if base is not None:
        return TrainedAdapter(model.palm, scope, base), model.tokenizer, model.template
    if rank:
        merge_adapters(model.palm, scope)
    return model


@beartype
def refuse_other_kind(output_dir: Path, merge: bool) -> None:
    """Raise FileExistsError where the folder of a run has a whole model to be replaced by adapters, or adapters."""
    folder = output_dir / MODEL
    if (folder / (ADAPTER_CONFIG if merge else CONFIG)).is_file():
        got, expected = ("--merge", "adapters") if merge else ("--no-merge", "a whole model")
        raise FileExistsError(
            f"got {got}, and {folder} has {expected} of an earlier end of this run: move that folder away, or finish "
            "the run as before"
        )
