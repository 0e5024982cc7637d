"""The config of a model that is to be planned for: of a folder, a GGUF file, a hub id, or a size of the paper."""

from pathlib import Path
from typing import Any

from beartype import beartype

from palm_rlhf.model.checkpoint import READERS
from palm_rlhf.model.config import PRESET_COMMON, PRESETS, PaLMConfig
from palm_rlhf.model.interop.gguf_file import GGUFFile
from palm_rlhf.model.interop.gguf_header import is_gguf
from palm_rlhf.model.interop.peft_base import base_of, is_adapter
from palm_rlhf.model.local_model import local_model
from palm_rlhf.model.weights_folder import ADAPTER_CONFIG, CONFIG, read_json
from palm_rlhf.policy.reward_model_folder import MODEL_TYPE as REWARD_MODEL


@beartype
def config_of_model(source: str | Path) -> PaLMConfig:
    """Return the config of a model without reading its weights, which may be missing.

    Raises FileNotFoundError where there is no config, and ValueError for a model that a PaLM cannot compute.

    Args:
        source: a config.json, a folder with one, the folder of a run, a .gguf file, an adapter of PEFT, a known name, a
            hub id, or one of the sizes of the paper, such as "8B".
    """
    if source in PRESETS and not Path(source).exists():
        return PaLMConfig.from_dict({**PRESET_COMMON, **PRESETS[str(source)]})
    path = Path(source)
    if path.name == CONFIG and path.is_file():
        return config_from(read_json(path), path)
    found = local_model(source, files=(CONFIG, ADAPTER_CONFIG))
    if is_adapter(found):  # its base has the sizes
        found = base_of(found, files=(CONFIG,))
    if is_gguf(found):
        return config_from(GGUFFile(found).config, found)
    if not (found / CONFIG).is_file():
        raise FileNotFoundError(
            f"{found} has no {CONFIG}; expected one: a plan needs no weights, but the sizes of a model"
        )
    return config_from(read_json(found / CONFIG), found / CONFIG)


def config_from(values: dict[str, Any], where: Path) -> PaLMConfig:
    """Return the config that the values of a config.json describe, of a PaLM, a reward model, or a kin of LLaMA."""
    model_type = values.get("model_type")
    if isinstance(model_type, str) and model_type in READERS:
        return PaLMConfig.from_dict(READERS[model_type][0](values, where))
    if model_type == REWARD_MODEL and isinstance(values.get("palm"), dict):
        return config_from({**values["palm"], "model_type": "palm"}, where)
    if model_type != "palm":
        raise ValueError(f'{where} has the model_type {model_type!r}; expected "palm", or one of {sorted(READERS)}')
    try:
        return PaLMConfig.from_dict({k: v for k, v in values.items() if k not in ("model_type", "finetune_scopes")})
    except TypeError as error:
        raise ValueError(f"{where} does not describe a PaLM: {error}; expected all of its sizes") from error
