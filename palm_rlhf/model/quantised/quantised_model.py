"""A frozen base in fewer bits: the matrices of the blocks as int8 or 4-bit numbers, below trainable adapters."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from beartype import beartype
from torch import Tensor, nn

from palm_rlhf.model.quantised.quantised_weights import Packed, Quantisation, pack, product, unpack
from palm_rlhf.model.shared_base import is_shared

if TYPE_CHECKING:
    import palm_rlhf.model.palm


class QuantisedLinear(nn.Module):
    """A linear layer with a frozen weight in fewer bits: `... i -> ... o`.

    "int8" has a scale for each row (Dettmers et al. 2022, section 3.1); the inputs keep their type. "int4" is NF4, with
    a scale for each 64 numbers (Dettmers et al. 2023, section 3). Its state dict has the plain weight that the numbers
    stand for, on the CPU, under the name that `nn.Linear` gives it.
    """

    numbers: Tensor
    scales: Tensor
    like: Tensor  # empty, of the type in which the weight is written out; `to` changes it as it would a plain weight
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, kind: Quantisation, device: torch.device):
        super().__init__()
        self.kind, self.shape = kind, (linear.out_features, linear.in_features)
        packed = pack(linear.weight.detach().to(device), kind)
        self.register_buffer("numbers", packed.numbers, persistent=False)
        self.register_buffer("scales", packed.scales, persistent=False)
        self.register_buffer("like", torch.empty(0, dtype=linear.weight.dtype, device=device), persistent=False)
        self.register_parameter("bias", None if linear.bias is None else nn.Parameter(linear.bias.to(device), False))

    @property
    def weight(self) -> "QuantisedLinear":
        """The layer itself, which `palm_rlhf.ops.linear` takes in place of a tensor."""
        return self

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `x @ weight.T + bias`: `... i -> ... o`."""
        out = product(x, Packed(self.numbers, self.scales), self.shape)
        return out if bias is None else out + bias.to(out.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def dequantised(self) -> Tensor:
        """Return the plain weight that the numbers stand for: `o i`."""
        return unpack(Packed(self.numbers, self.scales), self.shape, self.like.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantisedLinear":
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:  # rounded scales would be other weights
            self.scales = scales.to(self.scales.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dequantised().cpu()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        name = f"{prefix}weight"
        rest = {key: value for key, value in state_dict.items() if key != name}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected, errors)
        if name not in state_dict:
            missing.append(name)
        elif problem := self.why_not_equal(name, state_dict[name]):
            errors.append(problem)

    def is_made_of(self, weight: Tensor) -> bool:
        """Return whether a plain weight becomes these numbers, or is already the one that they stand for."""
        if self.why_not_equal("", weight) is None:
            return True
        packed = pack(weight.to(self.like), self.kind)
        return torch.equal(packed.numbers, self.numbers) and torch.equal(packed.scales, self.scales)

    def why_not_equal(self, name: str, weight: Tensor) -> str | None:
        """Return why a saved weight is another than the one that is frozen here, or None where it is the same."""
        if torch.equal(weight.cpu(), self.dequantised().cpu().to(weight.dtype)):
            return None
        return (
            f"{name} differs from the frozen weight in {self.kind}; expected the weights that were quantised: quantise "
            "the saved model itself, or call palm.dequantize_() before loading"
        )


@beartype
def quantize_(
    palm: "palm_rlhf.model.palm.PaLM", kind: Quantisation, *, device: str | torch.device | None = None
) -> None:
    """Put the matrices of all blocks into fewer bits, in place, and freeze the base: only adapters train from then on.

    Embeddings, norms, biases and the output layer stay as they are. A matrix loses its plain weights before the next
    one is packed. Saving writes the plain weights that the numbers stand for.

    Args:
        kind: "int8", a byte a weight, or "int4", 4.5 bits a weight.
        device: where to pack the matrices and to put the model; None: where it is.

    Raises ValueError for a model that is quantised already, ImportError without the extra `quantize`.
    """
    if is_quantised(palm):
        raise ValueError(f"got weights in {quantisation_of(palm)}, expected plain ones; call palm.dequantize_() first")
    device = palm.device if device is None else torch.device(device)
    for layer in palm.layers:
        for name, module in list(layer.named_children()):
            if isinstance(module, nn.Linear):
                setattr(layer, name, QuantisedLinear(module, kind, device))
    palm.to(device)
    for parameter in palm.palm_parameters():
        parameter.requires_grad_(False)


@beartype
def dequantize_(palm: "palm_rlhf.model.palm.PaLM") -> None:
    """Put plain weights in the place of those in fewer bits, with the same numbers, in place.

    They train unless the model has adapters, or another model holds the base.
    """
    for layer in palm.layers:
        for name, module in list(layer.named_children()):
            if isinstance(module, QuantisedLinear):
                rows, columns = module.shape
                linear = nn.Linear(columns, rows, bias=module.bias is not None, device="meta")
                linear.weight = nn.Parameter(module.dequantised())
                linear.bias = module.bias  # type: ignore[assignment]  # None is what nn.Linear has without one
                setattr(layer, name, linear)
    for parameter in palm.palm_parameters():
        parameter.requires_grad_(not palm.finetune_modules and not is_shared(palm))


def quantisation_of(module: nn.Module) -> Quantisation | None:
    """Return the kind of numbers of a model's matrices, or None for plain weights."""
    return next((part.kind for part in module.modules() if isinstance(part, QuantisedLinear)), None)


def is_quantised(module: nn.Module) -> bool:
    """Return whether a model, or a part of it, has weights in fewer bits."""
    return quantisation_of(module) is not None


def refuse_quantised(module: nn.Module, doing: str, mend: str) -> None:
    """Raise ValueError if a model has weights in fewer bits: `doing` needs plain ones, and `mend` says how to go on."""
    if kind := quantisation_of(module):
        raise ValueError(f"got weights in {kind}, expected plain ones {doing}; {mend}")


def check_frozen(module: nn.Module, *, is_sharded: bool) -> None:
    """Raise ValueError if a base in fewer bits is to train, or to lie in shards (FSDP), before a run begins."""
    blocks = [part for part in module.modules() if any(isinstance(child, QuantisedLinear) for child in part.children())]
    if any(parameter.requires_grad for block in blocks for parameter in block.parameters()):
        refuse_quantised(module, "to train", "train adapters (a rank of LoRA) above the frozen base")
    if is_sharded:
        refuse_quantised(module, "in shards (FSDP)", "leave the quantisation out, or run without shards")


def quantised_parts(module: nn.Module) -> dict[str, QuantisedLinear]:
    """Return the layers in fewer bits, by the names that their weights have in the state dict."""
    parts = module.named_modules()
    return {f"{name}.weight": part for name, part in parts if isinstance(part, QuantisedLinear)}


def require_frozen(parts: Mapping[str, QuantisedLinear], saved: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a saved weight differs from the frozen one of its layer, which loading would keep."""
    for name, part in parts.items():
        if problem := part.why_not_equal(name, saved[name]):
            raise ValueError(problem)


def weights_bytes(module: nn.Module) -> int:
    """Return the bytes of all weights and buffers of a model, shared ones once."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum({(t.data_ptr(), t.nbytes) if not t.is_meta else (id(t), t.nbytes): t.nbytes for t in tensors}.values())
