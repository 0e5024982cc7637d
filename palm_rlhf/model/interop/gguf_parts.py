"""Models in several GGUF files, as llama-gguf-split names them: MODEL-00001-of-00003.gguf, and so on."""

from pathlib import Path

from palm_rlhf.model.interop.gguf_header import DAMAGED, GGUFHeader

COUNT, NUMBER, NUM_TENSORS = "split.count", "split.no", "split.tensors.count"


def read_whole_header(path: Path) -> GGUFHeader:
    """Return the header of a model, with the tensors of all its files, of which `path` is the only or the first one.

    Raises FileNotFoundError where a file is missing, and ValueError for another file than the first, or one of another
    model.
    """
    header = GGUFHeader(path)
    count = header.metadata.get(COUNT, 0)
    if count in (0, 1):
        return header
    number = header.metadata.get(NUMBER)
    first = f"-00001-of-{count:05d}{path.suffix}" if isinstance(count, int) else None
    if first is None or number != 0 or not path.name.endswith(first):
        raise ValueError(
            f"{path} is a part of a model, with {COUNT} {count!r:.40} and {NUMBER} {number!r:.40}, expected the first "
            f"part, named as llama-gguf-split names it, *{first or '-00001-of-00003.gguf'}: name that"
        )
    for index in range(1, count):
        name = f"{path.name.removesuffix(first)}-{index + 1:05d}-of-{count:05d}{path.suffix}"
        if not path.with_name(name).is_file():
            raise FileNotFoundError(f"{path.parent} has no {name}; expected all {count} parts of a model: download it")
        part = GGUFHeader(path.with_name(name))
        found = (part.metadata.get(NUMBER), part.metadata.get(COUNT))
        if found != (index, count):
            raise ValueError(
                f"{part.path} has {NUMBER} and {COUNT} {found!r:.80}, expected {(index, count)}: {DAMAGED}"
            )
        if twice := sorted(header.tensors.keys() & part.tensors.keys()):
            raise ValueError(f"{part.path} has {twice[0]!r}, as a part before it, expected it once: {DAMAGED}")
        header.tensors |= part.tensors
        header.files.append(part.path)
    expected = header.metadata.get(NUM_TENSORS, len(header.tensors))
    if expected != len(header.tensors):
        raise ValueError(
            f"{path} and the parts after it have {len(header.tensors)} tensors, expected {expected!r:.40}: {DAMAGED}"
        )
    return header
