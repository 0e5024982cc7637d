"""Triton's view of the emulated GPU: kernels are launched on it as on any other, and compiled as for sm_80."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from .device import MAX_SHARED_BYTES, Device

CAPABILITY, WARP_SIZE, MAX_THREADS = 80, 32, 1024
DEVICE = -1  # Triton keeps compiled kernels by the number of their device, and this is no real one


class EmulatedDriver(DriverBase):
    """What Triton asks a driver for; the binary that it loads is PTX."""

    def __init__(self, device: Device):
        super().__init__()
        self.device = device
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=self._properties)
        self.get_current_device = lambda: DEVICE
        self.get_current_stream = lambda device: 0

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, WARP_SIZE)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        raise NotImplementedError("an emulator's time says nothing")

    @staticmethod
    def _properties(device):
        return {"max_shared_mem": MAX_SHARED_BYTES}

    @staticmethod
    def _load(name, binary, shared_bytes, device):
        no_module, registers, spills = None, 0, 0
        return no_module, (binary.decode(), shared_bytes), registers, spills, MAX_THREADS

    def launcher_cls(self, source, metadata):
        """A function with the arguments of Triton's own launchers."""
        kinds = list(source.signature.values())

        def launch(x, y, z, stream, function, packed, launch_metadata, on_enter, on_exit, *arguments):
            ptx, shared_bytes = function
            arguments = [a for a, kind in zip(arguments, kinds, strict=True) if kind != "constexpr"]
            self.device.launch(ptx, (x, y, z), shared_bytes, arguments)

        return launch


def stop_at_ptx(backend=None, stages=None, *rest):
    """A hook into Triton's compiler: its last stage, that of the assembler, hands on the PTX."""
    if stages is None:
        return "stop at PTX", "stop_at_ptx"
    stages["cubin"] = lambda ptx, metadata: ptx.encode()


@contextmanager
def emulated(edit=None):
    """Within, Triton launches on an emulated sm_80 GPU, whose memory is that of the CPU's tensors."""
    runtime, driver = triton.knobs.runtime, triton.runtime.driver
    previous = driver._active
    with Device(edit) as device, runtime.scope():
        runtime.add_stages_inspection_hook = stop_at_ptx
        driver.set_active(EmulatedDriver(device))
        try:
            yield device
        finally:
            driver._active = previous
