"""The folder of an adapter of PEFT in place of a model: where its base lies."""

from collections.abc import Sequence
from pathlib import Path

from palm_rlhf.model.interop.peft_settings import read_settings
from palm_rlhf.model.local_model import PACKAGED_MODELS, local_model
from palm_rlhf.model.weights_folder import ADAPTER_CONFIG, HUB_FILES, INDEX, WEIGHTS, WRITTEN, read_json


def is_adapter(path: Path) -> bool:
    """Return whether a folder has an adapter of PEFT, and no weights of a model."""
    places = (path, path / WRITTEN)
    has_weights = any((place / name).is_file() for place in places for name in (WEIGHTS, INDEX))
    return not has_weights and any((place / ADAPTER_CONFIG).is_file() for place in places)


def base_of(folder: Path, *, files: Sequence[str] = tuple(HUB_FILES)) -> Path:
    """Return the folder or the GGUF file of the model that an adapter belongs over.

    Its `base_model_name_or_path` may be everything that `local_model` knows. A relative path counts from the working
    directory, as in PEFT, or else from the adapter's folder. Raises FileNotFoundError for a missing base, and
    ValueError for an adapter that names none or another adapter, or whose settings a LoRA scope cannot compute.

    Args:
        folder: that of the adapter.
        files: patterns of the files to download where the base is on the hub.
    """
    file = next(place / ADAPTER_CONFIG for place in (folder / WRITTEN, folder) if (place / ADAPTER_CONFIG).is_file())
    values = read_json(file)
    name = read_settings(values, file).base
    if name is None:
        raise ValueError(
            f"{file} has no base_model_name_or_path, expected the name of the model that the adapter was trained on: "
            "write it there, or open that model and call palm.load_adapter(folder)"
        )
    beside = folder / name
    source = str(beside) if beside.exists() and not Path(name).exists() else name
    on_hub = not Path(source).exists() and source not in PACKAGED_MODELS
    revision = values.get("revision") if on_hub else None
    try:
        base = local_model(source, revision if isinstance(revision, str) and revision else None, files=files)
    except (FileNotFoundError, ValueError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(
            f"{folder} is an adapter of {name!r}, and that base was not found: {error}. Correct its "
            f"base_model_name_or_path in {file}, or open the base and call palm.load_adapter(folder)"
        ) from error
    if is_adapter(base):
        raise ValueError(
            f"{folder} is an adapter of {name!r}, which is an adapter itself; expected a model: open that one, save it "
            "merged by palm.save_pretrained(path), and write the path as base_model_name_or_path"
        )
    return base


def weights_of(path: Path) -> Path:
    """Return where the weights of a model lie: the base of an adapter, and else the path itself."""
    return base_of(path) if is_adapter(path) else path
