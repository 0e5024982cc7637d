"""What prompts and models are known by in the database: digests of their contents."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from beartype import beartype
from sqlalchemy.orm import Session
from torch import nn

from palm_rlhf.feedback.store.answer_tables import KnownModel


@beartype
def prompt_key_of(prompt: Sequence[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of a prompt's roles and contents, in hexadecimal: equal prompts have one key."""
    turns = [[message["role"], message["content"]] for message in prompt]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


@beartype
def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights, in hexadecimal: the `id` of a `KnownModel`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


@beartype
def remember_model(session: Session, model_id: str, name: str, folder: Path | None = None) -> KnownModel:
    """Return the row of a model, a new one if the database does not know it yet.

    Args:
        session: A session of `Store.writing`.
        model_id: The `weights_digest` of the model.
        name: The name that people read.
        folder: Where the model is.
    """
    known = session.get(KnownModel, model_id)
    if known is None:
        known = KnownModel(id=model_id, name=name, folder=None if folder is None else str(folder))
        session.add(known)
        session.flush()
    return known
