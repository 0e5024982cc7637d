"""Mutants of the kernels in C."""

import pytest

from palm_rlhf.ops.cpu import native_attention, native_elementwise, native_library


@pytest.fixture
def mutate(compile_native, monkeypatch):
    """`mutate("file.c", old, new)` runs the kernels in C from a source in which one text is another."""

    def run(file: str, old: str, new: str) -> None:
        sources = {path.name: path.read_text("utf-8") for path in native_library.SOURCES.iterdir()}
        assert sources[file].count(old) == 1, f"{old!r} is {sources[file].count(old)} times in {file}"
        del sources["decode.c"]  # which takes the compiler longest
        mutant = compile_native({**sources, file: sources[file].replace(old, new)})
        for module in (native_attention, native_elementwise):
            monkeypatch.setattr(module, "library", lambda: mutant)
        native_attention._runs.cache_clear()

    yield run
    native_attention._runs.cache_clear()
