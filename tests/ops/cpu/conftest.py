"""Mutants of the kernels in C."""

import pytest

from palm_rlhf.ops.cpu import native_attention, native_elementwise, native_library
from tests.planting_in_c import plant


@pytest.fixture
def mutate(compile_native, monkeypatch):
    """`mutate("file.c", old, new)` runs the kernels in C from a source in which `plant` made code another."""

    def run(file: str, old: str, new: str) -> None:
        sources = {path.name: path.read_text("utf-8") for path in native_library.SOURCES.iterdir()}
        sources.update(plant({file: sources[file]}, old, new))
        room = file.split(".")[0].split("_")[0]  # the other kernels would only take time
        sources = {name: text for name, text in sources.items() if name.startswith(room) or name.endswith(".h")}
        mutant = compile_native(sources, optimize=False)
        module = {"attention": native_attention, "elementwise": native_elementwise}[room]
        monkeypatch.setattr(module, "library", lambda: mutant)
        native_attention._why_not_here.cache_clear()

    yield run
    native_attention._why_not_here.cache_clear()
