"""What is to be done with a model, and the settings that decide how much memory it takes."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from palm_rlhf.model.lora import ATTENTION, Targets
from palm_rlhf.model.quantised.quantised_weights import Quantisation
from palm_rlhf.training.run.optimizer import Precision

Task: TypeAlias = Literal["ppo", "sft", "reward", "dpo", "serve"]
Dtype: TypeAlias = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class PlanSettings:
    """One way to do a task.

    Args:
        lora_r: rank of the adapters of every trained role, or of each that is served; 0 trains the weights.
        lora_targets: the matrices that have adapters, see `add_finetune_params`.
        share_base: policy, reference, critic and reward model hold one base (ppo with adapters).
        gradient_checkpointing: keep the inputs of the blocks, and compute the rest again (not serve).
        dtype: the type of weights, gradients and the optimiser's state.
        precision: the arithmetic of the forward; None is what the task's command does on a GPU.
        quantize: the numbers of the blocks' matrices, below adapters or in serving.
        batch_size: rows in one forward with gradients; in serving, replies computed together. A pair is two rows.
        seq_len: tokens of a row: for ppo of prompt and response, for serving the context of a reply.
        new_tokens: how many of them are the response (ppo, dpo).
        rollout_batch_size: responses that ppo draws at once.
        prefix_memory: bytes that a server keeps of ended replies.
        num_adapters: adapters that a server offers beside its model, of rank `lora_r`.
    """

    lora_r: int = 0
    lora_targets: Targets = ATTENTION
    share_base: bool = False
    gradient_checkpointing: bool = False
    dtype: Dtype = "bfloat16"
    precision: Precision | None = None
    quantize: Quantisation | None = None
    batch_size: int = 8
    seq_len: int = 1024
    new_tokens: int = 256
    rollout_batch_size: int = 16
    prefix_memory: int = 2**28
    num_adapters: int = 0

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "rollout_batch_size": 1, "lora_r": 0, "seq_len": 2, "new_tokens": 1,
                 "num_adapters": 0, "prefix_memory": 0}  # fmt: skip
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"got {name}={getattr(self, name)}, expected at least {lowest}")

    def check(self, task: Task) -> None:
        """Raise ValueError for settings that do not go together in a task."""
        if task in ("ppo", "dpo") and self.new_tokens >= self.seq_len:
            raise ValueError(
                f"got new_tokens={self.new_tokens} and seq_len={self.seq_len}, expected fewer: a row has a prompt too"
            )
        if (self.num_adapters > 0) != (task == "serve" and self.lora_r > 0):
            raise ValueError(
                f"got num_adapters={self.num_adapters} and lora_r={self.lora_r} for {task}, expected both to serve "
                "adapters, and a lora_r alone to train them"
            )
        if task != "serve" and self.quantize is not None and not self.lora_r:
            raise ValueError(f"got quantize={self.quantize} without adapters, expected a lora_r of 1 or more to train")
        if self.lora_targets != ATTENTION and not self.lora_r:
            targets = " ".join(self.lora_targets)
            raise ValueError(f"got lora_targets={targets} without adapters, expected a lora_r of 1 or more")
        if self.share_base and (task != "ppo" or not self.lora_r):
            raise ValueError(
                "got share_base=True, expected the task ppo and a lora_r of 1 or more: one base, many adapters"
            )
        if self.gradient_checkpointing and task not in ("sft", "reward", "dpo", "ppo"):
            raise ValueError("got gradient_checkpointing=True in serving, which has no gradients; leave it out")
        if task == "serve" and self.precision is not None:
            raise ValueError(f"got precision={self.precision} in serving, which computes in the dtype; leave it out")

    def computes_in_bfloat16(self, task: Task) -> bool:
        """Return whether forwards run under bfloat16 autocast: by default in the tasks whose commands do so."""
        usual = "auto" if task in ("sft", "reward", "dpo") else "float32"
        return task != "serve" and (self.precision or usual) != "float32"

    def in_words(self, task: Task) -> str:
        """Return the settings in words, for the tables of a plan."""
        words = [f"{self.batch_size} x {self.seq_len}", self.dtype]
        words += ["forward in bf16"] * (self.dtype == "float32" and self.computes_in_bfloat16(task))
        if task != "serve":
            words.append(f"LoRA {self.lora_r}" if self.lora_r else "all weights")
        elif self.num_adapters:
            words.append(f"{self.num_adapters} x LoRA {self.lora_r}")
        words += [f"on {' '.join(self.lora_targets)}"] * (self.lora_targets != ATTENTION)
        words += ["shared base"] * self.share_base
        words += [str(self.quantize)] * (self.quantize is not None)
        words += ["checkpointing"] * self.gradient_checkpointing
        return ", ".join(words)
