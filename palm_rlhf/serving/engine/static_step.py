"""The decoding step of a batch on a GPU: one CUDA graph for each number of rows and columns, both rounded up."""

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from palm_rlhf.model.captured import StepGraphs, addresses, why_not_captured
from palm_rlhf.model.decoding_step import RotaryLookup, static_logits
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.static_cache import StaticCache, round_columns, round_rows
from palm_rlhf.serving.engine.capacity import COLUMN_STEP, columns_of
from palm_rlhf.serving.engine.row_adapters import RowAdapters
from palm_rlhf.serving.engine.slot_cache import SlotCache
from palm_rlhf.serving.engine.transfer import upload

logger = logging.getLogger(__name__)
MANY_ROWS = 64  # above it, numbers of rows are rounded up to a multiple of COARSE_ROWS, so that there are few graphs
COARSE_ROWS = 32
MAX_GRAPHS, WARM_GRAPHS = 128, 32  # how many are kept, and how many of them are made before the first request


def rows_computed(num_rows: int) -> int:
    """Return the rows of the step that computes `num_rows`."""
    return round_rows(num_rows) if num_rows <= MANY_ROWS else -(-num_rows // COARSE_ROWS) * COARSE_ROWS


class StaticStep:
    """The logits after one more token of each of the first rows of a SlotCache, by steps of few shapes.

    A step computes more rows than it was asked for, and nobody looks at the logits of those. Where such a row belongs
    to a prompt that is being read, or to a later one, its keys and values stay whole: it writes to the column of the
    row's own next token, which the row's next forward overwrites before anything reads it.

    The graphs hold the addresses of the cache and of the weights, so that a step has to be made anew where the cache
    is resized; see `SlotCache.static_step`.
    """

    def __init__(self, palm: PaLM, slots: SlotCache, adapters: RowAdapters | None = None):
        self.palm, self.slots, self.adapters = palm, slots, adapters or RowAdapters(palm)
        rows, columns, device = slots.num_rows, slots.num_columns, slots.device
        self.inputs = torch.zeros(rows, 2, dtype=torch.int64, device=device)  # last token and length of each row
        self.logits = torch.zeros(rows, palm.num_tokens, dtype=palm.dtype, device=device)
        self.tokens, lengths = self.inputs.unbind(-1)
        first = torch.zeros(rows, dtype=torch.int64, device=device)
        self.cache = StaticCache.around(slots.keys, slots.values, lengths, first, torch.arange(columns, device=device))
        self.lookup = RotaryLookup(palm, columns)
        self.scopes = torch.zeros(rows, dtype=torch.int64, device=device)  # the number of each row's adapter
        self.adapted = False  # whether a row has one
        self.graphs, self.addresses = StepGraphs(device, MAX_GRAPHS), addresses(palm)

    def adapt(self, scopes: Sequence[str | None]) -> None:
        """Set the LoRA scope of each of the first rows, for the steps from now on; None is the base alone."""
        self.adapted = any(scope is not None for scope in scopes)
        if self.adapted:
            self.scopes[: len(scopes)] = self.adapters.indices(scopes)

    def __call__(self, tokens: Sequence[int] | Tensor, lengths: Sequence[int]) -> Tensor:
        """Read one token into each of the first rows, and return the logits after it, `b v`, until the next call.

        Args:
            tokens: The last token of each row of the step, `b`; those that a step before has left on the device may be
                negative, for rows that have failed.
            lengths: The tokens read so far of every row in use: of those of the step, then of those being read.
        """
        rows = min(rows_computed(len(tokens)), self.slots.num_rows)
        # a row that is computed beside the others needs its next column too, which may lie further right
        columns = min(round_columns(max(lengths[:rows]) + 1), self.slots.num_columns)
        inputs = np.zeros((rows, 2), dtype=np.int64)
        inputs[: len(lengths), 1] = lengths[:rows]
        if not isinstance(tokens, Tensor):
            inputs[: len(tokens), 0] = tokens
        self.inputs[:rows] = upload(inputs, self.inputs.device)
        if isinstance(tokens, Tensor):
            self.tokens[: len(tokens)] = tokens.clamp(min=0)
        self._run(rows, columns)
        return self.logits[: len(tokens)]

    def _run(self, rows: int, columns: int) -> None:
        """Compute a step of so many rows and columns from `inputs`, and from `scopes` if a row is adapted."""

        def step() -> None:
            blocks = None
            if self.adapted:
                sides = self.adapters.side_by_side
                sides.mask.factors, blocks = sides.factors.index_select(0, self.scopes[:rows]), sides.blocks
            view = self.cache.view(rows, columns)
            self.logits[:rows] = static_logits(self.palm, self.tokens[:rows], view, self.lookup, blocks)

        self.graphs.run((rows, columns, self.adapted, self.addresses), step)

    def warm_up(self) -> None:
        """Compile and capture the steps of every number of rows, those of few columns first, on an empty cache."""
        began = time.monotonic()
        shapes = [
            (min(rows, self.slots.num_rows), min(columns, self.slots.num_columns))
            for columns in sorted({round_columns(column) for column in range(1, self.slots.num_columns + 1)})
            for rows in sorted({rows_computed(row) for row in range(1, self.slots.num_rows + 1)}, reverse=True)
        ]
        warm = list(dict.fromkeys(shapes))[:WARM_GRAPHS]
        for rows, columns in warm:
            for _ in range(2):  # kernels compile the first time, and the second time is captured
                self.inputs.zero_()
                self._run(rows, columns)
        if self.inputs.device.type == "cuda":
            torch.cuda.synchronize(self.inputs.device)
        logger.info("captured %d decoding steps in %.1f seconds", len(warm), time.monotonic() - began)


class StaticSteps:
    """The `StaticStep` of a SlotCache, made anew where the cache was resized; none where steps cannot be captured."""

    def __init__(self, palm: PaLM, slots: SlotCache, adapters: RowAdapters):
        self.palm, self.slots, self.adapters = palm, slots, adapters
        self.enabled = why_not_captured(palm) is None

    def logits(
        self, tokens: Sequence[int] | Tensor, lengths: Sequence[int], scopes: Sequence[str | None]
    ) -> Tensor | None:
        """Return the logits of a step, `b v`, or None where it cannot be captured; from then on none is."""
        if not self.enabled:
            return None
        try:
            step = self.slots.static_step = self.slots.static_step or StaticStep(self.palm, self.slots, self.adapters)
            step.adapt(scopes)
            return step(tokens, lengths)
        except Exception:
            self._give_up()
            return None

    def warm_up(self, columns: int) -> None:
        """Take the memory of all rows, for sequences of up to so many tokens, and capture the usual steps."""
        rows = self.slots.max_rows
        columns = min(columns_of(columns), self.slots.max_tokens // rows // COLUMN_STEP * COLUMN_STEP)
        try:
            if self.enabled and columns and self.slots.reserve(rows, columns, []):
                self.slots.static_step = StaticStep(self.palm, self.slots, self.adapters)
                self.slots.static_step.warm_up()
        except Exception:
            self._give_up()

    def _give_up(self) -> None:
        logger.exception("a decoding step cannot be captured as a CUDA graph: replies are slower from now on")
        self.enabled, self.slots.static_step = False, None
