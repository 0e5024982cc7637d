"""The models in a checkpoint of reinforcement learning: policy, critic and reference."""

from pathlib import Path

from beartype import beartype
from safetensors.torch import load_file, save_file
from torch import Tensor

from palm_rlhf.model.checkpoint import require_same_mathematics, shapes_of
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.weights_folder import check_shapes
from palm_rlhf.policy.actor_critic import ActorCritic, Reference
from palm_rlhf.training.run.sharding import load_full, plain_palm

CRITIC_FILE = "critic.safetensors"


@beartype
def write_policy(
    folder: Path, actor_critic: ActorCritic, reference: Reference | None, state: dict[str, Tensor]
) -> None:
    """Write the models into a checkpoint. With LoRA the policy's base is the reference, and stored once.

    `state` is the state dict of the actor-critic with all its shards.
    """
    policy, critic = _parts(state)
    plain_palm(actor_critic.palm, policy).save_pretrained(folder / "policy")
    if reference is not None and not reference.is_base:
        reference.palm.save_pretrained(folder / "reference")
    if critic:
        save_file({name: tensor.cpu().contiguous() for name, tensor in critic.items()}, folder / CRITIC_FILE)


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
    policy, critic = _parts(actor_critic.state_dict())
    saved_policy = PaLM.from_pretrained(folder / "policy")
    require_same_mathematics(actor_critic.palm.config, saved_policy.config, folder / "policy")
    pairs = (
        (policy, saved_policy.state_dict(), folder / "policy"),
        (critic, load_file(folder / CRITIC_FILE) if critic else {}, folder / CRITIC_FILE),
    )
    for targets, saved, where in pairs:
        check_shapes(shapes_of(saved), shapes_of(targets), where)
    for targets, saved, _ in pairs:
        for name, target in targets.items():
            load_full(target.detach(), saved[name])
    if reference is not None and not reference.is_base:
        reference.palm.load(folder / "reference")


def _parts(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the policy's tensors, by their names in the PaLM, and all other tensors."""
    policy = {name.removeprefix("palm."): tensor for name, tensor in state.items() if name.startswith("palm.")}
    return policy, {name: tensor for name, tensor in state.items() if not name.startswith("palm.")}
