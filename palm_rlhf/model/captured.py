"""CUDA graphs of decoding steps: hundreds of launches from Python become one, which costs microseconds."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from palm_rlhf.model.lora import BlockLoRA
from palm_rlhf.model.quantised.quantised_model import is_quantised
from palm_rlhf.ops.devices import GPUS

if TYPE_CHECKING:
    from palm_rlhf.model.palm import PaLM

MAX_GRAPHS = 48  # kept for one set of tensors; the one unused for longest goes first
_one_capture = threading.Lock()  # PyTorch has one at a time in a process


class StepGraphs:
    """The CUDA graphs of the steps that read and write one set of static tensors; on other devices, steps just run.

    `run(key, step)` runs a step: a function without arguments and results, which reads and writes tensors at fixed
    addresses, reads no number back from the device, and computes with fixed shapes. The first time that a key comes,
    the step runs as it is, which compiles and loads its kernels. The second time it is captured, and from then on the
    graph is replayed. All graphs share one pool of memory, so they must be replayed on one stream at a time.

    Args:
        device: where the tensors lie.
        max_graphs: how many graphs are kept.
    """

    def __init__(self, device: torch.device, max_graphs: int = MAX_GRAPHS):
        self.device, self.captures, self.max_graphs = device, device.type in GPUS, max_graphs
        self.graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph] = OrderedDict()
        self.has_run: set[Hashable] = set()
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None
        self.stream = torch.cuda.Stream(device) if self.captures else None

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run a step, or replay its graph.

        Args:
            key: all that the step's code and addresses depend on: sizes, options, and `addresses` of the model.
            step: the step; a replayed graph does not call it.
        """
        graph = self.graphs.get(key)
        if graph is None and key in self.has_run:
            graph = self._capture(step)
            self.graphs[key] = graph
            if len(self.graphs) > self.max_graphs:
                self.graphs.popitem(last=False)
        if graph is not None:
            self.graphs.move_to_end(key)
            graph.replay()
            return
        with without_cached_casts(self.device.type), torch.no_grad():
            step()
        if self.captures:
            self.has_run.add(key)

    def clear(self) -> None:
        """Forget all graphs."""
        if self.graphs:
            torch.cuda.synchronize(self.device)
            self.pool = torch.cuda.graph_pool_handle()  # PyTorch refuses a pool that no graph holds any more
        self.graphs.clear()
        self.has_run.clear()

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Wait for all graphs, and return the graph of a step, which does not run meanwhile.

        After an error PyTorch's random numbers and allocator may still believe in the capture, so that no step from
        Python could take its place.
        """
        graph = torch.cuda.CUDAGraph()
        # the mode leaves the CUDA calls of other threads alone, such as those that pin the memory of a data loader
        capture = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            with _one_capture, torch.cuda.device(self.device), capture:
                with without_cached_casts(self.device.type), torch.no_grad():
                    step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"a decoding step cannot be captured as a CUDA graph: {error}; start the process with "
                "PALM_RLHF_CUDA_GRAPHS=0, which runs steps from Python"
            ) from error
        return graph


def without_cached_casts(device_type: str) -> AbstractContextManager:
    """Return a context in which autocast keeps no cast weights: their memory would go while a graph reads it."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)


def why_not_captured(palm: "PaLM") -> str | None:
    """Return why the steps of a model cannot be captured as CUDA graphs, or None if they can.

    A graph holds the addresses of weights and no Python. So the weights have to lie whole on one GPU, and no hook may
    wait for a module's output. `PALM_RLHF_CUDA_GRAPHS=0` switches graphs off.
    """
    if palm.device.type not in GPUS:
        return "the model is not on a GPU"
    if os.environ.get("PALM_RLHF_CUDA_GRAPHS") == "0":
        return "PALM_RLHF_CUDA_GRAPHS=0"
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return "the caller is compiled or captured itself"
    if is_quantised(palm):
        return "the weights are in fewer bits"
    for parameter in palm.parameters():
        if type(parameter) is not nn.Parameter or parameter.device != palm.device:
            return "weights are sharded, or lie on several devices"
    # torch has no public way to ask a module for its hooks, and passing them by would be silent
    if any(module._forward_hooks or module._forward_pre_hooks for module in palm.modules()):
        return "a module has a forward hook, which a graph does not call"
    return None


def addresses(palm: "PaLM", adapters: Sequence[BlockLoRA] | None = None) -> str:
    """Return what a graph of the model holds beside static tensors: addresses of weights, and numbers in its code.

    Weights that change in place keep it; other weights, another LoRA scope, or another precision do not. It is text,
    whose hash Python computes only once.
    """
    weights = [weight.data_ptr() for weight in palm.parameters()]
    parts = [part for block in adapters or () for part in block.parts]
    lora = [(part.A.data_ptr(), part.B.data_ptr(), part.scale) for part in parts]
    kind = palm.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    precise = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    return repr((palm.config, palm.dtype, weights, lora, autocast, precise))
