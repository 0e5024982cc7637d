"""A checkpoint with everything that a conversation with it needs: tokenizer, chat template, reward model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from beartype import beartype

from palm_rlhf.data.conversation import Template, encode_prompt, encode_response, end_of_turn, has_tools
from palm_rlhf.data.templates import PRESETS, JinjaTemplate, Messages, load_template
from palm_rlhf.data.tokenizer import NUM_BYTES, ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from palm_rlhf.model.interop.gguf_dtype import generation_dtype
from palm_rlhf.model.local_model import local_model
from palm_rlhf.model.palm import PaLM
from palm_rlhf.model.quantised.quantised_weights import Quantisation
from palm_rlhf.model.token_ids import require_room
from palm_rlhf.policy.reward_model import RewardModel
from palm_rlhf.policy.sequences import join
from palm_rlhf.serving.call_form import CallForm, call_form
from palm_rlhf.serving.deadline import check_deadline
from palm_rlhf.serving.served_adapters import load_adapters
from palm_rlhf.serving.structured import Grammars

logger = logging.getLogger(__name__)
OWN_TEMPLATES = ("default", "oasst")  # templates whose special tokens have names that nobody else uses
ROLE_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}


@dataclass(frozen=True)
class ServedModel:
    """A model, with the tokenizer and the template by which conversations become tokens.

    Without a `template` a conversation is written as a transcript, with roles as words (a model of bytes has no special
    tokens to write a template with). The model has to have seen such texts, and a user can forge the roles.
    `adapters` has the LoRA scope of each further name by which clients call the model.
    """

    name: str
    palm: PaLM
    tokenizer: Tokenizer
    template: Template | None = None
    reward_model: RewardModel | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which clients call the model: its own, and those of its adapters."""
        return (self.name, *self.adapters)

    @cached_property
    def eos_tokens(self) -> frozenset[int]:
        """The ids that end a text, as far as the model's vocabulary has them."""
        return frozenset(token for token in self.tokenizer.eos_tokens if token < self.palm.num_tokens)

    @cached_property
    def turn_ends(self) -> frozenset[int]:
        """The ids that end the assistant's turn."""
        if self.template is None:
            return self.eos_tokens
        return self.eos_tokens | {end_of_turn(self.tokenizer, self.template)}

    @cached_property
    def grammars(self) -> Grammars:
        """The compiler of grammars for replies; ValueError where the tokenizer does not allow it."""
        return Grammars(self.tokenizer, self.palm.num_tokens, self.turn_ends)

    @cached_property
    def longest_token(self) -> int:
        """The most characters that one token can stand for."""
        if isinstance(self.tokenizer, HuggingFaceTokenizer):
            return max(map(len, self.tokenizer.backend.get_vocab(with_added_tokens=True)))
        return 1

    @property
    def turn_end_strings(self) -> tuple[str, ...]:
        """The strings that end the assistant's turn, where roles are words."""
        return () if self.template is not None else (f"\n\n{ROLE_NAMES['user']}:\n",)

    @cached_property
    def call_form(self) -> CallForm | None:
        """The form in which the model writes calls of tools; None where its template knows none, or another form."""
        if not isinstance(self.template, JinjaTemplate) or not self.template.knows_tools:
            return None
        return call_form(self.template.source)

    @beartype
    def with_template_options(self, options: Mapping[str, bool]) -> "ServedModel":
        """Return the model with switches of its chat template set; ValueError for those that it does not read."""
        if not isinstance(self.template, JinjaTemplate):
            raise ValueError(f"got the options {sorted(options)} of a chat template, expected none: it has none")
        changed = replace(self, template=self.template.with_options(options))
        vars(changed)["longest_token"] = self.longest_token  # which takes a tenth of a second to find
        return changed

    @beartype
    def encode_chat(self, messages: Messages, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant is to speak.

        Raises ValueError for a conversation that the template or the tokenizer cannot write.
        """
        if has_tools(messages, tools) and self.call_form is None:
            raise ValueError("its chat template does not write tools, or writes calls in a form that is not known here")
        if self.template is not None:
            tokens = encode_prompt(messages, self.tokenizer, self.template, tools=tools, checkpoint=check_deadline)
            return tokens.tolist()
        turns = [f"{ROLE_NAMES[message['role']]}:\n{message['content']}\n\n" for message in messages]
        return self.tokenizer.encode("".join(turns) + f"{ROLE_NAMES['assistant']}:\n")

    @beartype
    def encode_continued(self, messages: Messages) -> list[int]:
        """Return the tokens of a conversation whose last message, the assistant's, goes on; see `encode_chat`."""
        *before, last = messages
        words = last["content"]
        tokens = self.encode_reply(before, words)
        if self.template is not None:  # without the end of the turn, and the white space that the template puts there
            tokens.pop()
            while tokens and words == words.rstrip() and not self.tokenizer.decode(tokens[-1:]).strip():
                tokens.pop()
        return self.encode_chat(before) + tokens

    @beartype
    def encode_reply(self, messages: Messages, reply: str) -> list[int]:
        """Return the tokens of the assistant's reply to a conversation, with the end of its turn."""
        if self.template is not None:
            return encode_response(messages, reply, self.tokenizer, self.template, checkpoint=check_deadline).tolist()
        return self.tokenizer.encode_continuation(reply)

    @beartype
    def encode_text(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the tokens of a text; an empty text becomes the token that ends the text before it."""
        start = self.tokenizer.text_start if add_special_tokens else []
        end = [token for token in self.eos_tokens if token == self.tokenizer.eos_token]
        return [*start, *self.tokenizer.encode(text)] or end

    @torch.inference_mode()
    def score(self, prompt: list[int], replies: Sequence[list[int]]) -> list[float]:
        """Return the reward model's scores of replies to a prompt, by one forward for all of them."""
        assert self.reward_model is not None  # the server refuses such a request where there is none
        device = self.reward_model.palm.device
        rows = [torch.tensor(reply, device=device) for reply in replies]
        prompts = [torch.tensor(prompt, device=device)] * len(rows)
        return self.reward_model.score(join(prompts, rows)).tolist()


@beartype
def load(
    checkpoint: str | Path,
    *,
    name: str | None = None,
    template: str = "auto",
    lora_scope: str | None = None,
    reward_model: str | Path | None = None,
    lora: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    quantize: Quantisation | None = None,
) -> ServedModel:
    """Open a checkpoint: a folder with a model, the folder of a run, a GGUF file, or an id on the Hugging Face hub.

    Raises ValueError for parts that do not belong together.

    Args:
        name: The name by which clients call the model; by default the name of its folder.
        template: One of PRESETS, "plain" for a transcript, or "auto" for the checkpoint's own.
        lora_scope: A LoRA scope that is merged into the weights.
        reward_model: A folder with a RewardModel, or its id on the hub; its tokenizer has to be the same.
        dtype: The numeric type of the weights; by default that of `generation_dtype`, or of the saved weights.
        quantize: The kind of numbers for the matrices of the blocks, see `PaLM.quantize_`; None keeps the weights.
        lora: Adapters beside the model, each as name=folder; see `load_adapters`.
    """
    folder = local_model(checkpoint)
    device = checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or generation_dtype(folder, device)
    palm = PaLM.from_pretrained(folder, dtype=dtype, device=device if quantize is None else "cpu")
    if lora_scope is not None:
        palm.merge_finetune_params(lora_scope)
    elif palm.finetune_modules:
        logger.warning("%s has the LoRA scopes %s, and none is used", folder, sorted(palm.finetune_modules))
    if quantize is not None:
        palm.quantize_(quantize, device=device)
    tokenizer = _tokenizer_of(folder, palm)
    name = name or Path(checkpoint).resolve().name
    judge = None if reward_model is None else _reward_model_of(local_model(reward_model), folder, palm, device)
    model = ServedModel(
        name=name,
        palm=palm,
        tokenizer=tokenizer,
        template=_template_of(folder, tokenizer, palm, template),
        reward_model=judge,
        adapters=load_adapters(palm, lora, name),
    )
    _ = model.turn_ends  # so that a template that does not fit fails now, and not at the first request
    return model


def checked_device(name: str | torch.device) -> torch.device:
    """Return a device of this machine; ValueError for one that torch does not know or see."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"got device={name!r}, expected one such as cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"got device={str(name)!r}, expected another, since torch sees {torch.cuda.device_count()} GPUs"
        )
    return device


def _tokenizer_of(folder: Path, palm: PaLM) -> Tokenizer:
    """Return the tokenizer beside a model, or bytes where there is none and the vocabulary has room for them."""
    try:
        tokenizer = load_tokenizer(folder)
    except FileNotFoundError:
        if palm.num_tokens < NUM_BYTES:
            raise ValueError(
                f"{folder} has no tokenizer, and {palm.num_tokens} tokens are too few for bytes, {NUM_BYTES}: save its "
                "tokenizer there, by tokenizer.save_pretrained"
            ) from None
        tokenizer = ByteTokenizer()
        if palm.num_tokens not in (NUM_BYTES, tokenizer.num_tokens):
            logger.warning("%s has no tokenizer: its first %d ids are taken for bytes", folder, NUM_BYTES)
        return tokenizer
    require_room(tokenizer.num_tokens, palm.num_tokens, folder)
    return tokenizer


def _template_of(folder: Path, tokenizer: Tokenizer, palm: PaLM, name: str) -> Template | None:
    """Return the template beside a model, or one of ours whose special tokens it has, or None."""
    if name == "plain":
        return None
    if name != "auto":
        if name not in PRESETS:
            raise ValueError(f"got template={name!r}, expected auto, plain or one of {sorted(PRESETS)}")
        return PRESETS[name]
    try:
        return load_template(folder)
    except FileNotFoundError:
        usable = {token for token, index in tokenizer.special_tokens.items() if index < palm.num_tokens}
        found = (PRESETS[own] for own in OWN_TEMPLATES if usable.issuperset(PRESETS[own].special_tokens))
        template = next(found, None)
        if template is None:
            logger.warning("%s has no chat template: conversations are written as transcripts", folder)
        return template


def _reward_model_of(folder: Path, model_folder: Path, palm: PaLM, device: str | torch.device) -> RewardModel:
    """Return a reward model, which has to have the vocabulary and the tokenizer of the model beside it."""
    reward_model = RewardModel.from_pretrained(folder, device=device).eval()
    if reward_model.palm.num_tokens != palm.num_tokens:
        raise ValueError(
            f"the reward model {folder} has {reward_model.palm.num_tokens} tokens, and the model {palm.num_tokens}; "
            "expected as many, since both need the same tokenizer"
        )
    try:
        same = load_tokenizer(folder).fingerprint == load_tokenizer(model_folder).fingerprint
    except FileNotFoundError:
        same = True  # one of the folders has no tokenizer to compare
    if not same:
        raise ValueError(
            f"the tokenizers of the reward model {folder} and the model {model_folder} differ; expected one"
        )
    return reward_model
