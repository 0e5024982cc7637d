"""Adapters that a server offers beside its model: folders of PEFT, or LoRA scopes in folders of ours."""

import logging
from collections.abc import Sequence

from palm_rlhf.model.adapter_folder import base_of_adapter
from palm_rlhf.model.palm import PaLM

logger = logging.getLogger(__name__)


def load_adapters(palm: PaLM, given: Sequence[str], model_name: str) -> dict[str, str]:
    """Add adapters to a model as LoRA scopes, and return the scope of each name by which clients call one.

    Raises ValueError for names that cannot be told apart, and for an adapter that does not belong to the model.

    Args:
        palm: The model.
        given: Each a name and the folder or hub id of an adapter, as in pirate=adapters/pirate.
        model_name: The name of the model itself.
    """
    scopes: dict[str, str] = {}
    for number, entry in enumerate(given):
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"got --lora {entry!r}, expected a name and a folder: --lora pirate=adapters/pirate")
        if name == model_name or name in scopes:
            raise ValueError(f"got --lora {entry!r}, expected another name: {name!r} is the name of another model here")
        scopes[name] = f"served-{number}"  # a client may call it by a name that no module can have
        palm.load_adapter(folder, scopes[name], name=name)
        if base := base_of_adapter(folder):
            logger.info("the adapter %s was trained on %s, and is served over %s", name, base, model_name)
    return scopes
