"""Export of a model: a GGUF file for llama.cpp, or a folder for the libraries of Hugging Face."""

import json
import sys
from fnmatch import fnmatch
from pathlib import Path

import torch
from beartype import beartype

from palm_rlhf.data.command_files import refuse_existing
from palm_rlhf.data.templates import ChatTemplate, JinjaTemplate, load_template
from palm_rlhf.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from palm_rlhf.data.tokenizer_byte_level import byte_level
from palm_rlhf.data.tokenizer_gguf_writer import gguf_metadata
from palm_rlhf.model.interop.gguf_header import is_gguf
from palm_rlhf.model.interop.gguf_writer import write_gguf
from palm_rlhf.model.interop.peft_base import weights_of
from palm_rlhf.model.local_model import local_model
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.token_ids import require_room
from palm_rlhf.model.weights_folder import CONFIG, INDEX, TOKENIZER_FILES, WEIGHTS, WRITTEN, read_json
from palm_rlhf.model.weights_writer import ANY_SHARD, WRITING

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}  # of a folder
TYPES = {dtype: name for name, dtype in DTYPES.items()}
EXPORTED = (CONFIG, WEIGHTS, INDEX, ANY_SHARD, *TOKENIZER_FILES, WRITTEN, WRITING)  # names in a folder, and patterns


@beartype
def export_gguf(source: str, output: Path, type: str, *, overwrite: bool) -> None:
    """Write a model with its tokenizer and chat template to a GGUF file, and print its architecture and size."""
    if not is_gguf(output):
        raise ValueError(
            f"got --output {output}, expected a file that ends in .gguf, by which models are opened: name one"
        )
    refuse_existing(overwrite, str(output))
    place = local_model(source)
    palm = PaLM.from_pretrained(place)
    metadata = gguf_metadata(load_tokenizer(place), template_of(place, source), palm.num_tokens)
    name = Path(source).resolve().name.removesuffix(".gguf")
    architecture = write_gguf(palm, output, type=type, name=name, tokenizer=metadata)
    print(json.dumps({"architecture": architecture, "type": type, "bytes": output.stat().st_size}))


@beartype
def export_hf(source: str, output: Path, type: str | None, *, max_shard_size: str, overwrite: bool) -> None:
    """Write a model with its tokenizer and chat template to a folder, and print its architecture and size.

    Raises FileExistsError for a folder with other files, and ValueError for the folder of the model itself.
    """
    if type is not None and type not in DTYPES:
        raise ValueError(f"got --type {type} with --format hf, expected one of {[*DTYPES]}: {type} is of --format gguf")
    place = local_model(source)
    check_folder(output, place, overwrite=overwrite)
    palm = PaLM.from_pretrained(place, dtype=None if type is None else DTYPES[type])
    tokenizer, template = tokenizer_of(place, palm, source), template_of(place, source)
    palm.save_pretrained(output, format="hf", max_shard_size=max_shard_size)
    for name in TOKENIZER_FILES:  # of an earlier export
        (output / name).unlink(missing_ok=True)
    for part in (tokenizer, template):
        if part is not None:
            part.save_pretrained(output)
    weights = [*output.glob("*.safetensors")]
    numbers = {
        "architecture": read_json(output / CONFIG)["model_type"],
        "type": TYPES.get(palm.dtype, str(palm.dtype)),
        "bytes": sum(file.stat().st_size for file in weights),
        "files": len(weights),
    }
    print(json.dumps(numbers))


def check_folder(output: Path, place: Path, *, overwrite: bool) -> None:
    """Raise an error for a folder that an export must not write to: only an earlier export may be overwritten."""
    if output.resolve() in (place.resolve(), weights_of(place).resolve()):
        raise ValueError(f"got --output {output}, the model itself, expected another folder")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file, expected a new folder for --format hf: choose another name")
    names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    if others := [name for name in names if not any(fnmatch(name, pattern) for pattern in EXPORTED)]:
        raise FileExistsError(
            f"{output} has {others[:3]}, which no export writes; expected a new folder, an empty one, or that of an "
            "earlier export: choose another name"
        )
    if names and not overwrite:
        raise FileExistsError(f"{output} exists already: choose another name, or write over it with --overwrite")


def tokenizer_of(place: Path, palm: PaLM, source: str) -> Tokenizer | None:
    """Return the tokenizer of a model in a form that transformers opens, or None where there is none."""
    try:
        tokenizer = load_tokenizer(place)
    except FileNotFoundError:
        print(f"{source} has no tokenizer, and so the folder has none", file=sys.stderr)
        return None
    require_room(tokenizer.num_tokens, palm.num_tokens, place)
    return byte_level(tokenizer) if isinstance(tokenizer, ByteTokenizer) else tokenizer


def template_of(place: Path, source: str) -> ChatTemplate | JinjaTemplate | None:
    """Return the chat template of a model, or None where there is none, which is said."""
    try:
        return load_template(place)
    except FileNotFoundError:
        print(f"{source} has no chat template, and so the export has none", file=sys.stderr)
        return None
