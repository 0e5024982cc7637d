"""PaLM (Chowdhery et al. 2022): the decoder-only language model."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palm_rlhf.model import checkpoint as storage
from palm_rlhf.model import generate as generation
from palm_rlhf.model.block import LayerNorm, ParallelBlock, position_tables
from palm_rlhf.model.cache import Cache, KVCache
from palm_rlhf.model.config import PRESET_COMMON, PRESETS, PaLMConfig
from palm_rlhf.model.lora import BlockLoRA
from palm_rlhf.model.native_decode import native_step, step_tables
from palm_rlhf.ops.cross_entropy import linear_cross_entropy
from palm_rlhf.ops.logprobs import next_token_pairs, target_mask


class PaLM(nn.Module):
    """The language model of arXiv:2204.02311, section 2.

    Args:
        num_tokens: size of the vocabulary.
        dim: width of the residual stream.
        depth: number of parallel blocks.
        heads: query heads.
        dim_head: width of a head.
        kv_heads: heads of keys and values; 1 is multi-query attention, more is grouped-query attention.
        ff_mult: hidden units of the feed-forward, in multiples of `dim`.
        ff_inner_dim: hidden units of the feed-forward, instead of `ff_mult`.
        causal: False gives a bidirectional encoder.
        rotary_theta: base of the rotary wavelengths.
        xpos: rotary with the length-extrapolating scales of xPos.
        logit_scale: factor of the logits; None is the paper's `dim**-0.5`.
        z_loss: weight of the auxiliary `log(Z)^2`, which counts in `train()` only.
        norm_eps: epsilon of every layer norm.
        qk_norm: layer-normalise the queries and keys of each head, before the rotary.
        dropout: on the embeddings and on each block's output.
        max_seq_len: the context a server offers, in tokens; rotary itself has no limit.
        flash_attn: False takes the eager float32 attention.
        gradient_checkpointing: keep only the blocks' inputs in training, and compute the rest again.
    """

    @beartype
    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        heads: int = 8,
        dim_head: int = 64,
        kv_heads: int = 1,
        ff_mult: float | int = 4,
        ff_inner_dim: int | None = None,
        causal: bool = True,
        rotary_theta: float | int = 10000.0,
        xpos: bool = False,
        logit_scale: float | int | None = None,
        z_loss: float | int = 1e-4,
        norm_eps: float = 1e-5,
        qk_norm: bool = False,
        dropout: float | int = 0.0,
        max_seq_len: int = 2048,
        flash_attn: bool = True,
        gradient_checkpointing: bool = False,
    ):
        values = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = config = PaLMConfig(**values)
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(ParallelBlock(config) for _ in range(depth))
        self.norm = LayerNorm(dim, eps=norm_eps)
        self.finetune_modules = nn.ModuleDict()
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Kernels N(0, 1/fan_in), embeddings N(0, 1), scales 1 (Chowdhery et al. 2022, section 5)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_()

    @classmethod
    @beartype
    def from_config(cls, config: PaLMConfig) -> "PaLM":
        """A freshly initialised model of the given numbers."""
        return cls(**dataclasses.asdict(config))

    @classmethod
    @beartype
    def preset(cls, name: str, **overrides) -> "PaLM":
        """One of the paper's sizes, "8B", "62B" or "540B" (table 1); under `torch.device("meta")` it is free."""
        if name not in PRESETS:
            raise ValueError(f"preset {name!r}; expected one of {sorted(PRESETS)}")
        return cls(**{**PRESET_COMMON, **PRESETS[name], **overrides})

    @property
    def num_tokens(self) -> int:
        return self.config.num_tokens

    @property
    def device(self) -> torch.device:
        return self.token_emb.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.token_emb.weight.dtype

    def forward(
        self,
        tokens: Tensor,
        return_loss: bool = False,
        *,
        loss_mask: Tensor | None = None,
        loss_denominator: Tensor | int | float | None = None,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        extra_embed: Tensor | None = None,
        return_only_embedding: bool = False,
        return_logits_with_embedding: bool = False,
        finetune_scope: str | None = None,
        disable_lora: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or a loss, or the final embeddings.

        Args:
            tokens: `b n`, int64 or int32, from 0 to below `num_tokens`.
            return_loss: predict each token from those before it, and return the mean cross-entropy in nats.
            loss_mask: `b n`, True for the tokens that count as targets; the first of a row or document never does.
            loss_denominator: divides the summed loss instead of the number of targets.
            key_mask: `b n`, True for real tokens; what comes out at the others has no meaning.
            positions: `b n` or `1 n`; by default they count the real tokens, anew in every document.
            document_ids: `b n`, equal for the tokens of one document, which see only each other.
            cache: read before these tokens, and extended by them; dropout is off.
            extra_embed: added to the token embeddings, broadcastable to `b n e`.
            return_only_embedding: the final embeddings, `b n e`.
            return_logits_with_embedding: both, `b n v` and `b n e`.
            finetune_scope: the LoRA scope to apply, unless `disable_lora`.

        Returns:
            `b n v` float logits, a scalar loss, or embeddings as asked.

        Raises:
            ValueError: tokens of another shape or type, or on a CPU, out of the vocabulary.
        """
        check_tokens(tokens)
        given = tokens
        try:
            if return_loss:
                if tokens.shape[1] < 2:
                    raise ValueError(f"got {tokens.shape[1]} tokens a row; a loss needs at least 2, one to say")
                targets_mask = target_mask(loss_mask=loss_mask, key_mask=key_mask, document_ids=document_ids)
                tokens, targets = next_token_pairs(tokens)
                key_mask, positions, document_ids = (
                    t if t is None else t[:, :-1] for t in (key_mask, positions, document_ids)
                )
                if extra_embed is not None and extra_embed.ndim > 1 and extra_embed.shape[-2] > 1:
                    extra_embed = extra_embed[..., :-1, :]
            scope = None if disable_lora else finetune_scope
            embeds = self._embed(tokens, key_mask, positions, document_ids, cache, extra_embed, scope)
            if return_only_embedding:
                return embeds
            if return_loss:
                return linear_cross_entropy(
                    embeds,
                    self.token_emb.weight,
                    targets,
                    targets_mask,
                    scale=self.config.output_scale,
                    z_loss=self.config.z_loss if self.training else 0.0,
                    denominator=loss_denominator,
                )
            logits = self.to_logits(embeds)
            return (logits, embeds) if return_logits_with_embedding else logits
        except (IndexError, RuntimeError):
            if given.device.type == "cpu":  # elsewhere, where it would cost a synchronisation, ids are not looked at
                generation.check_token_ids(given, self.num_tokens)
            raise

    def to_logits(self, embeds: Tensor, *, wide: bool = False) -> Tensor:
        """The tied output layer: `... e -> ... v`; `wide` scales in float32, where bfloat16 would round once more."""
        logits = F.linear(embeds, self.token_emb.weight)
        if wide:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits * self.config.output_scale

    def _embed(self, tokens, key_mask, positions, document_ids, cache, extra_embed, scope) -> Tensor:
        """Tokens to final embeddings, `b n -> b n e`."""
        num_new = tokens.shape[1]
        if cache is not None:
            if key_mask is not None or document_ids is not None:
                raise ValueError("got a cache and a mask; expected the cache alone, whose left_padding marks the pads")
            key_mask = cache.key_mask(num_new)
            positions = cache.positions(num_new, tokens.device) if positions is None else positions
        elif positions is None:
            positions = default_positions(tokens, key_mask, document_ids)
        if self.config.causal and cache is None:
            key_mask = without_right_padding(key_mask)
        adapters = None if scope is None else self._scope(scope)
        step = None if cache is None else native_step(self, tokens, cache, adapters)
        make_tables = position_tables if step is None else step_tables
        tables = make_tables(self.config, positions, torch.promote_types(self.dtype, torch.float32))

        x = self.token_emb(tokens)
        if extra_embed is not None:
            x = x + extra_embed
        if cache is None:
            x = self.dropout(x)
        if step is None:
            x = self._through_blocks(x, tables, key_mask, document_ids, cache, adapters)
        else:
            x = step(x, tables)
        if cache is not None:
            cache.advance(num_new)
        return self.norm(x)

    def _through_blocks(self, x, tables, key_mask, document_ids, cache, adapters) -> Tensor:
        recompute = self.config.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for i, (layer, lora) in enumerate(zip(self.layers, adapters or [None] * len(self.layers), strict=True)):
            args = (x, tables, key_mask, document_ids, cache, i, lora)
            x = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
        return x

    @beartype
    def make_cache(self, batch: int, capacity: int, *, left_padding: Tensor | None = None) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` tokens; left_padding: `b`, pads before each row."""
        if not self.config.causal:
            raise ValueError("a bidirectional PaLM has no cache: each token sees those after it; expected causal=True")
        kind = self.device.type
        return KVCache(
            depth=self.config.depth,
            batch=batch,
            kv_heads=self.config.kv_heads,
            capacity=capacity,
            dim_head=self.config.dim_head,
            left_padding=left_padding,
            device=self.device,
            dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype,
        )

    @beartype
    def generate(
        self, seq_len: int | None = None, prompt: Tensor | list[Tensor] | None = None, **options
    ) -> Tensor | list[Tensor] | tuple:
        """Sample continuations; see `palm_rlhf.model.generate.generate` for every option."""
        return generation.generate(self, seq_len, prompt, **options)

    @beartype
    def stream(self, prompt: Tensor | list[Tensor] | None = None, **options) -> Iterator[Tensor]:
        """Yield the next tokens of all rows, one tensor `b` a step; see `palm_rlhf.model.generate.stream`."""
        return generation.stream(self, prompt, **options)

    def _scope(self, scope: str) -> nn.ModuleList:
        if scope not in self.finetune_modules:
            raise ValueError(f"finetune scope {scope!r}; expected one of {sorted(self.finetune_modules)}; add it first")
        return self.finetune_modules[scope]

    @beartype
    def add_finetune_params(
        self, scope: str = "default", r: int = 8, *, alpha: float | int | None = None, train_base: bool = False
    ) -> nn.ModuleList:
        """Add a LoRA scope of rank r that changes nothing yet, and freeze the base unless `train_base`.

        `alpha` scales what it adds by alpha / r; None is r. Returns one module of adapters a block.
        """
        if scope in self.finetune_modules:
            raise ValueError(f"finetune scope {scope!r} is there already; remove or merge it, or choose another name")
        if not scope or "." in scope or hasattr(self.finetune_modules, scope):
            raise ValueError(f"finetune scope {scope!r} cannot name a module; expected a name without dots: 'default'")
        if r < 1:
            raise ValueError(f"the rank r is {r}; expected at least 1")
        c = self.config
        adapters = nn.ModuleList(
            BlockLoRA(c.dim, c.heads * c.dim_head, c.kv_heads * c.dim_head, r, r if alpha is None else alpha)
            for _ in range(c.depth)
        )
        self.finetune_modules[scope] = adapters.to(self.device, self.dtype)
        for parameter in self.palm_parameters():
            parameter.requires_grad_(train_base)
        return adapters

    @beartype
    def remove_finetune_params(self, scope: str = "default") -> nn.ModuleList:
        """Take a LoRA scope away and return it; with the last one gone the base is trainable again."""
        adapters = self._scope(scope)
        del self.finetune_modules[scope]
        if not self.finetune_modules:
            for parameter in self.palm_parameters():
                parameter.requires_grad_(True)
        return adapters

    @beartype
    def merge_finetune_params(self, scope: str = "default") -> None:
        """Add a LoRA scope into the base weights, and take it away."""
        for layer, adapters in zip(self.layers, self.remove_finetune_params(scope), strict=True):
            adapters.merge_into(layer.in_proj.weight, layer.attn_out.weight)

    def palm_parameters(self) -> list[nn.Parameter]:
        """The parameters of the base."""
        adapters = set(self.finetune_modules.parameters())
        return [parameter for parameter in self.parameters() if parameter not in adapters]

    @beartype
    def finetune_parameters(self, scope: str = "default") -> list[nn.Parameter]:
        """The parameters of one LoRA scope."""
        return list(self._scope(scope).parameters())

    @beartype
    def save_pretrained(
        self, directory: str | os.PathLike, *, format: str = "palm", max_shard_size: int | str = "5GB"
    ) -> None:
        """Write the model and its LoRA scopes as config.json and safetensors, atomically.

        `format="cohere"` is what Hugging Face transformers opens, without the numbers of training, such as the z-loss;
        xPos, bidirectional models and unmerged scopes are refused. Weights above `max_shard_size`, in bytes or like
        "5GB", go to several files. Raises OSError on a full disk; what was in the folder is intact then.
        """
        storage.save_pretrained(self, Path(directory), format=format, max_shard_size=max_shard_size)

    @classmethod
    @beartype
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
    ) -> "PaLM":
        """Open a `save_pretrained` folder, a Hugging Face `cohere` folder, or the hub id of one.

        `dtype` None is that of the file; `revision` is a branch, tag or commit on the hub. Raises FileNotFoundError for
        what is not there, and ValueError for a file that is damaged or holds what a PaLM cannot compute.
        """
        return storage.from_pretrained(cls, source, dtype=dtype, device=device, revision=revision)

    @classmethod
    @beartype
    def from_palm_rlhf_pytorch(cls, source: str | os.PathLike | dict, *, causal: bool = True) -> "PaLM":
        """Read a `.pt` of the PyPI package palm-rlhf-pytorch 0.8.0, or a state dict of its PaLM.

        Causal models have xPos there, with a scale base of 512. Its loss leaves token 0 out by default; ours does not.
        """
        return storage.from_palm_rlhf_pytorch(cls, source, causal=causal)

    @beartype
    def load(self, path: str | os.PathLike) -> "PaLM":
        """Load a folder, a `.pt` state dict of ours, or palm-rlhf-pytorch's, in place; dtype and device stay.

        LoRA scopes that the model lacks are added. A pickle is never executed. Raises FileNotFoundError, or ValueError
        for a file that is damaged or of another model, which leaves this one as it was.
        """
        storage.load_into(self, Path(path))
        return self


def check_tokens(tokens: Tensor) -> None:
    """ValueError for what is no batch of token ids, by shape and type alone: a compiled forward pays nothing."""
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32) or tokens.shape[1] == 0:
        raise ValueError(
            f"tokens is {tokens.dtype} of the shape {tuple(tokens.shape)}; expected ids, torch.int64 or torch.int32, "
            "of the shape `b n` with at least one in a row: of a single text, tokens.unsqueeze(0)"
        )


def default_positions(tokens: Tensor, key_mask: Tensor | None, document_ids: Tensor | None) -> Tensor:
    """Positions that count the real tokens of a row, anew in every document: `b n -> b n`, or `1 n` without masks."""
    if key_mask is None and document_ids is None:
        return torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    real = torch.ones_like(tokens) if key_mask is None else key_mask.to(tokens.dtype)
    count = real.cumsum(dim=-1)
    if document_ids is not None:
        starts = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
        count = count - torch.where(starts, count - real, 0).cummax(dim=-1).values
    return (count - 1).clamp(min=0)


def without_right_padding(key_mask: Tensor | None) -> Tensor | None:
    """None if a causal model needs no mask, because all pads come after all tokens that could see them.

    Looking costs a synchronisation on an accelerator, and cannot be compiled: there the mask stays.
    """
    if key_mask is None or torch.compiler.is_compiling() or key_mask.device.type != "cpu":
        return key_mask
    return None if bool((key_mask[:, :-1] >= key_mask[:, 1:]).all()) else key_mask
