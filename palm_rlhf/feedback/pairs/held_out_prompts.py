"""The prompts whose votes are never trained on, and so measure models."""

from beartype import beartype

from palm_rlhf.data.curation.held_out import is_held_out as is_digest_held_out
from palm_rlhf.feedback.settings import CollectionSettings


@beartype
def is_held_out(prompt_key: str, settings: CollectionSettings) -> bool:
    """Return whether a prompt, by its `prompt_key_of`, is one of the share `settings.held_out` of all prompts.

    It stays so when the share grows.
    """
    return is_digest_held_out(bytes.fromhex(prompt_key), settings.held_out)
