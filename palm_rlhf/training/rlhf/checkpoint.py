"""The checkpoints of reinforcement learning: policy, critic, reference, and the state of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beartype import beartype
from safetensors.torch import load_file
from torch import Tensor

from palm_rlhf.model.checkpoint import require_same_mathematics, shapes_of
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.quantised.quantised_model import quantised_parts, require_frozen
from palm_rlhf.model.weights_folder import check_shapes
from palm_rlhf.model.weights_writer import write_tensors
from palm_rlhf.policy.actor_critic import ActorCritic, Reference
from palm_rlhf.training.rlhf.config import PPOConfig
from palm_rlhf.training.rlhf.variants import VARIANTS
from palm_rlhf.training.run.sharding import full_state, load_full, plain_palm

if TYPE_CHECKING:
    from palm_rlhf.training.rlhf.trainer import RLHFTrainer

CRITIC_FILE = "critic.safetensors"


def save_checkpoint(trainer: "RLHFTrainer") -> None:
    """Write the checkpoint of a trainer's present step; all processes take part."""
    evaluator = trainer.evaluator
    state = {
        "sampler": trainer.sampler.state_dict(),
        "kl_coef": trainer.kl_coef,
        "score_moments": trainer.score_moments.state_dict(),
        "evaluation": None if evaluator is None else evaluator.state_dict(),
    }
    tensors = full_state(trainer.actor_critic)
    with trainer.run.new_checkpoint(state, None if evaluator is None else evaluator.best) as folder:
        if folder is not None:
            write_policy(folder, trainer.actor_critic, trainer.reference, tensors)


def resume_from_checkpoint(trainer: "RLHFTrainer") -> None:
    """Go on from the newest checkpoint, where the run is to be resumed and has one."""
    with trainer.run.newest_checkpoint() as saved:
        if saved is None:
            return
        folder, state = saved
        trainer.sampler.load_state_dict(state["sampler"])
        read_policy(folder, trainer.actor_critic, trainer.reference)
        if _continues_kl_coef(trainer.config, state["config"]):
            trainer.kl_coef = state["kl_coef"]
        trainer.score_moments.load_state_dict(state["score_moments"])
        if trainer.evaluator and state.get("evaluation"):
            trainer.evaluator.load_state_dict(state["evaluation"])


def _continues_kl_coef(config: PPOConfig, saved: Mapping[str, Any]) -> bool:
    """Return whether a run goes on with a checkpoint's KL coefficient: its start and its steering are the same."""
    start = VARIANTS[saved["grpo_variant"]].kl_coef if saved["kl_coef"] is None else saved["kl_coef"]
    return config.initial_kl_coef == start and (config.kl_target is None) == (saved["kl_target"] is None)


@beartype
def write_policy(
    folder: Path, actor_critic: ActorCritic, reference: Reference | None, state: dict[str, Tensor]
) -> None:
    """Write the models into a checkpoint. With LoRA the policy's base is the reference, and stored once.

    `state` is the state dict of the actor-critic with all its shards.
    """
    policy, critic = _parts(actor_critic, state)
    plain_palm(actor_critic.palm, policy).save_pretrained(folder / "policy")
    if reference is not None and not reference.is_base:
        reference.palm.save_pretrained(folder / "reference")
    if critic:
        write_tensors({name: tensor.cpu().contiguous() for name, tensor in critic.items()}, folder / CRITIC_FILE)


@beartype
def read_policy(folder: Path, actor_critic: ActorCritic, reference: Reference | None) -> None:
    """Read the models that `write_policy` wrote, in place. Raises ValueError for models of another run."""
    if reference is not None and (folder / "reference").is_dir() == reference.is_base:
        base = "the base below the adapters" if actor_critic.actor_scope else "none, as with a kl_coef of 0"
        kinds = base, "a model of its own"
        here, there = kinds if reference.is_base else kinds[::-1]
        raise ValueError(
            f"this run's reference is {here}, that of {folder} is {there}: resume with the reference that it had"
        )
    policy, critic = _parts(actor_critic, actor_critic.state_dict())
    saved_policy = PaLM.from_pretrained(folder / "policy")
    require_same_mathematics(actor_critic.palm.config, saved_policy.config, folder / "policy")
    pairs = (
        (policy, saved_policy.state_dict(), folder / "policy"),
        (critic, load_file(folder / CRITIC_FILE) if critic else {}, folder / CRITIC_FILE),
    )
    for targets, saved, where in pairs:
        check_shapes(shapes_of(saved), shapes_of(targets), where)
    require_frozen(quantised_parts(actor_critic.palm), saved_policy.state_dict())
    for targets, saved, _ in pairs:
        for name, target in targets.items():
            load_full(target.detach(), saved[name])
    if reference is not None and not reference.is_base:
        reference.palm.load(folder / "reference")


def _parts(actor_critic: ActorCritic, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the policy's tensors, by their names in the PaLM, and all others; of a shared base, the policy's alone."""
    in_policy, parts = set(actor_critic.palm.modules()), dict(actor_critic.named_modules(remove_duplicate=False))
    theirs = {name for name in state if parts[name.rpartition(".")[0]] in in_policy}
    policy = {name.removeprefix("palm."): tensor for name, tensor in state.items() if name.startswith("palm.")}
    return policy, {name: tensor for name, tensor in state.items() if name not in theirs}
