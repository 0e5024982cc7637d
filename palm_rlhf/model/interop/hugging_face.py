"""The architectures of Hugging Face by their model_type: which function reads one, and how a PaLM is written as one."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from palm_rlhf.model.interop import cohere, llama

if TYPE_CHECKING:
    from palm_rlhf.model.palm import PaLM

# The function that returns the fields of a PaLMConfig from the values of a config.json and its path.
CONFIG_READERS: dict[str, Callable[[Mapping[str, Any], Path], dict[str, Any]]] = {
    cohere.MODEL_TYPE: cohere.from_cohere_config,
    **dict.fromkeys(llama.ARCHITECTURES, llama.from_llama_config),
}


def to_hugging_face(palm: "PaLM", model_type: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config.json and the tensors of a model as one of the architectures.

    Without a `model_type` it is the architecture that computes the same numbers. Raises ValueError for a model that the
    architecture cannot represent.
    """
    config, scopes, state = palm.config, list(palm.finetune_modules), palm.state_dict()
    if model_type is None:
        model_type = cohere.MODEL_TYPE if config.block == "parallel" else llama.model_type_of(config)
    if model_type == cohere.MODEL_TYPE:
        values = cohere.to_cohere_config(config, scopes=scopes, dtype=palm.dtype)
        return values, cohere.to_cohere_tensors(config, state)
    values = llama.to_llama_config(config, scopes=scopes, dtype=palm.dtype, model_type=model_type)
    return values, llama.to_llama_tensors(config, state)
