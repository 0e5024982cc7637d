"""The memory of decoding steps: every tensor that a captured step reads or writes beside the weights."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from palm_rlhf.model.captured import StepGraphs, addresses
from palm_rlhf.model.decoding_step import CastMatrices, RotaryLookup
from palm_rlhf.model.prompts import PaddedPrompts, seen_tokens
from palm_rlhf.model.static_cache import StaticCache, round_columns, round_rows
from palm_rlhf.ops.devices import GPUS
from palm_rlhf.ops.sampling import Sampling, race, sampling_logprobs

if TYPE_CHECKING:
    from palm_rlhf.model.palm import PaLM

MAX_KEPT = 2  # memories of one model
MAX_KEPT_SHARE = 0.1  # of the memory of a GPU: a larger one is freed after use, and its graphs captured anew
ROOMY_SHARE = 0.01  # of the memory of a GPU: within it there is room for longer sequences to come


class StepMemory:
    """Tensors at fixed addresses for rows of up to `capacity` tokens, and the graphs of the steps that use them.

    A row at column c of its cache has drawn the token in `tokens`, which the next step writes to column c.
    """

    tokens: Tensor  # `b` int64, the token that each row has drawn last
    running: Tensor  # `b` bool, whether a row's response goes on after this token
    last_column: Tensor  # `b` int64, the column of the last token that a row may draw
    clocks: Tensor  # `b v`, of the race that draws the next tokens
    drawn: Tensor  # `b capacity` int64, the tokens that a row has drawn, by column
    drawn_logprobs: Tensor  # `b capacity`
    seen: Tensor | None  # `b v` bool, the tokens of prompt and response, where a penalty has asked for them
    counts: Tensor | None  # `b v` int32, how often the response has each token, likewise
    allowed: Tensor  # `v` bool

    def __init__(self, palm: "PaLM", rows: int, capacity: int):
        c, device = palm.config, palm.device
        wide = torch.promote_types(palm.dtype, torch.float32)
        self.kind = self.kind_for(palm)
        self.cache = StaticCache(
            depth=c.depth,
            batch=rows,
            kv_heads=c.kv_heads,
            capacity=capacity,
            dim_head=c.dim_head,
            device=device,
            dtype=palm.cache_dtype,
        )
        self.tokens, self.last_column = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.running = torch.zeros(rows, dtype=torch.bool, device=device)
        self.clocks = torch.ones(rows, c.num_tokens, dtype=wide, device=device)
        self.drawn = torch.zeros(rows, capacity, dtype=torch.int64, device=device)
        self.drawn_logprobs = torch.zeros(rows, capacity, dtype=wide, device=device)
        self.seen = self.counts = None
        self.allowed = torch.ones(c.num_tokens, dtype=torch.bool, device=device)
        self.lookup = RotaryLookup(palm, capacity)
        self.matrices: CastMatrices | None = None
        self.matrices_of = ""  # the `addresses` of the model that they are of
        self.graphs = StepGraphs(device)
        on_gpu = device.type in GPUS
        self.host_running = torch.zeros(rows, dtype=torch.bool, device="cpu", pin_memory=on_gpu)
        self.fetched, self.finished = (torch.cuda.Event() if on_gpu else None for _ in range(2))

    @staticmethod
    def kind_for(palm: "PaLM") -> tuple:
        """Return all that the types and sizes of the tensors depend on beside rows and columns."""
        return palm.config, palm.dtype, palm.cache_dtype, palm.device

    def suits(self, palm: "PaLM", rows: int, capacity: int) -> bool:
        """Return whether the memory is that of the model's kind, and large enough."""
        return self.kind == self.kind_for(palm) and rows <= self.cache.batch and capacity <= self.cache.capacity

    @property
    def num_bytes(self) -> int:
        """The size of the tensors that grow with the rows, and of copied weights."""
        copies = [] if self.matrices is None else self.matrices.copies
        return sum(t.nbytes for t in (*self.cache.keys, *self.cache.values, self.clocks, self.drawn, *copies))

    def begin_use(self) -> None:
        """Let the current stream wait for the last use, which may have been on another stream."""
        if self.finished is not None:
            torch.cuda.current_stream(self.running.device).wait_event(self.finished)

    def end_use(self) -> None:
        """Note the end of a use on the current stream."""
        if self.finished is not None:
            self.finished.record(torch.cuda.current_stream(self.running.device))

    def cast_matrices(self, palm: "PaLM") -> CastMatrices | None:
        """Return the model's matrices as autocast casts them now; None where it casts none."""
        if not CastMatrices.are_needed(palm):
            return None
        if self.matrices is None or self.matrices_of != addresses(palm):
            self.graphs.clear()  # they read the copies
            self.matrices, self.matrices_of = CastMatrices(palm), addresses(palm)
        self.matrices.refresh()
        return self.matrices

    def start(self, prompts: PaddedPrompts, limits: Tensor, sampling: Sampling, allowed: Tensor | None) -> None:
        """Begin anew after prompts, whose keys and values are in the cache; `limits` has one entry for each row."""
        rows, width = len(limits), prompts.tokens.shape[1]
        self.running.fill_(False)
        self.running[:rows] = True
        self.last_column[:rows] = width - 1 + limits
        if allowed is not None:
            self.allowed.copy_(allowed)
        if sampling.repetition_penalty != 1.0:
            if self.seen is None:
                self.seen = torch.zeros(self.clocks.shape, dtype=torch.bool, device=self.clocks.device)
            seen = seen_tokens(prompts, self.clocks.shape[1])
            self.seen[:rows] = seen.repeat_interleave(rows // len(seen), dim=0)
        if sampling.presence_penalty or sampling.frequency_penalty:
            if self.counts is None:
                self.counts = torch.zeros(self.clocks.shape, dtype=torch.int32, device=self.clocks.device)
            self.counts.zero_()

    def draw(self, logits: Tensor, sampling: Sampling, eos_token: int | None, restricted: bool) -> None:
        """Draw the next token of the first rows from logits, `b v`; `restricted` leaves out tokens not in `allowed`.

        A row whose response has ended goes on, and nobody reads its tokens.
        """
        rows = slice(len(logits))
        seen, counts = (None if t is None else t[rows] for t in (self.seen, self.counts))
        allowed = self.allowed if restricted else None
        logprobs = sampling_logprobs(logits, sampling, seen=seen, counts=counts, allowed_tokens=allowed)
        tokens, running, column = self.tokens[rows], self.running[rows], self.cache.lengths[rows]
        tokens.copy_(race(logprobs, self.clocks[rows]))
        new, place = tokens.unsqueeze(-1), column.unsqueeze(-1)
        self.drawn[rows].scatter_(1, place, new)
        self.drawn_logprobs[rows].scatter_(1, place, logprobs.gather(-1, new))
        running &= column < self.last_column[rows]
        if eos_token is not None:
            running &= tokens != eos_token
        if seen is not None and sampling.repetition_penalty != 1.0:
            seen.scatter_(-1, new, True)
        if counts is not None and (sampling.presence_penalty or sampling.frequency_penalty):
            counts.scatter_add_(-1, new, torch.ones_like(counts[:, :1]))

    def select(self, rows: Tensor) -> None:
        """Move the given rows to the front, in the given order: `b'`, integer."""
        self.cache.select(rows)
        moved = (self.tokens, self.running, self.last_column, self.drawn, self.drawn_logprobs, self.seen, self.counts)
        for kept in moved:
            if kept is not None:
                kept[: len(rows)] = kept.index_select(0, rows)

    def fetch_running(self, rows: int) -> None:
        """Begin to copy to the host which of the first rows go on."""
        self.host_running[:rows].copy_(self.running[:rows], non_blocking=True)
        if self.fetched is not None:
            self.fetched.record(torch.cuda.current_stream(self.running.device))

    def fetched_running(self, rows: int) -> list[bool]:
        """Wait for the copy to the host, and return which of the first rows went on when it began."""
        if self.fetched is not None:
            self.fetched.synchronize()
        return self.host_running[:rows].tolist()


_kept: "WeakKeyDictionary[PaLM, list[StepMemory]]" = WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def borrowed(palm: "PaLM", rows: int, capacity: int) -> Iterator[StepMemory]:
    """Give memory for the steps of a model to one user at a time, kept with its graphs for the next one.

    The memory belongs to no module: it is in no state_dict, and a copy of the model begins without it.
    """
    rows, capacity = round_rows(rows), round_columns(capacity)
    with _lock:
        kept = _kept.setdefault(palm, [])
        memory = next((memory for memory in kept if memory.suits(palm, rows, capacity)), None)
        if memory is not None:
            kept.remove(memory)
        else:
            _forget(kept, MAX_KEPT - 1)  # before there is new memory
    memory = memory or StepMemory(palm, rows, _with_room(palm, rows, capacity))
    memory.begin_use()
    works = False
    try:
        yield memory
        works = True
    except GeneratorExit:  # the caller has left a stream
        works = True
        raise
    finally:
        if works:
            memory.end_use()
            with _lock:
                if _is_worth_keeping(memory):
                    kept.append(memory)
                    _forget(kept, MAX_KEPT)
                else:
                    _forget([memory], 0)


def _forget(kept: list[StepMemory], most: int) -> None:
    """Free all but the newest memories, once their last steps are over."""
    for memory in kept[: len(kept) - most]:
        if memory.finished is not None:
            memory.finished.synchronize()
    del kept[: len(kept) - most]


def _with_room(palm: "PaLM", rows: int, capacity: int) -> int:
    """Return the columns of a new memory: up to the model's context, where a GPU has plenty of memory for them.

    Else a chat that grows would need new memory, and new graphs, again and again.
    """
    c = palm.config
    longest = max(capacity, round_columns(c.max_seq_len))
    num_bytes = 2 * c.depth * c.kv_heads * c.dim_head * palm.cache_dtype.itemsize * rows * longest
    return longest if num_bytes <= ROOMY_SHARE * _memory_of(palm.device) else capacity


def _is_worth_keeping(memory: StepMemory) -> bool:
    device = memory.clocks.device
    return device.type not in GPUS or memory.num_bytes <= MAX_KEPT_SHARE * _memory_of(device)


def _memory_of(device: torch.device) -> int:
    """Return the memory of a GPU in bytes; 0 for another device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type in GPUS else 0
