"""PaLM (Chowdhery et al. 2022): the decoder-only language model."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from beartype import beartype
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from palm_rlhf.model import adapter_folder, lora, pretrained, shared_base
from palm_rlhf.model import generate as generation
from palm_rlhf.model.block import draw_weights, new_block, position_tables
from palm_rlhf.model.cache import Cache, KVCache
from palm_rlhf.model.config import Block, Norm, PaLMConfig
from palm_rlhf.model.inputs import check_token_ids, check_tokens, default_positions, without_right_padding
from palm_rlhf.model.lora import BlockLoRA, adapters_of
from palm_rlhf.model.native_decode import native_step, step_tables
from palm_rlhf.model.norms import LayerNorm, RMSNorm, residual_norm
from palm_rlhf.model.quantised import quantised_model
from palm_rlhf.ops.cross_entropy import linear_cross_entropy
from palm_rlhf.ops.logprobs import next_token_pairs, target_mask
from palm_rlhf.ops.rotary_scaling import RotaryScaling


class PaLM(nn.Module):
    """The language model of arXiv:2204.02311, section 2; `PaLMConfig` explains its keywords."""

    config: PaLMConfig
    token_emb: nn.Embedding
    layers: nn.ModuleList  # of Block
    norm: LayerNorm | RMSNorm
    lm_head: nn.Linear  # unless config.tie_embeddings
    finetune_modules: nn.ModuleDict  # a ModuleList of BlockLoRA for each LoRA scope

    # Methods that are functions of other files, with the model as their first argument.
    generate = generation.generate
    stream = generation.stream
    add_finetune_params = lora.add_finetune_params
    remove_finetune_params = lora.remove_finetune_params
    merge_finetune_params = lora.merge_finetune_params
    finetune_parameters = lora.finetune_parameters
    load_adapter = adapter_folder.load_adapter
    save_adapter = adapter_folder.save_adapter
    palm_parameters = lora.palm_parameters
    quantize_ = quantised_model.quantize_
    dequantize_ = quantised_model.dequantize_
    save_pretrained = pretrained.save_pretrained
    from_pretrained = classmethod(pretrained.from_pretrained)
    preset = classmethod(pretrained.preset)
    from_palm_rlhf_pytorch = classmethod(pretrained.from_palm_rlhf_pytorch)
    load = pretrained.load
    _apply = shared_base.apply
    _load_from_state_dict = shared_base.load_from_state_dict

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
        block: Block = "parallel",
        norm: Norm = "layer",
        qkv_bias: bool = False,
        tie_embeddings: bool = True,
        rotary_scaling: RotaryScaling | dict | None = None,
    ):
        fields = {field.name for field in dataclasses.fields(PaLMConfig)}
        self.config = config = PaLMConfig(**{name: value for name, value in locals().items() if name in fields})
        super().__init__()
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(new_block(config) for _ in range(depth))
        self.norm = residual_norm(config)
        if not tie_embeddings:
            self.lm_head = nn.Linear(dim, num_tokens, bias=False)
        self.finetune_modules = nn.ModuleDict()
        draw_weights(self)

    @classmethod
    @beartype
    def from_config(cls, config: PaLMConfig) -> "PaLM":
        """Return a freshly initialised model with the given config."""
        return cls(**dataclasses.asdict(config))

    @property
    def num_tokens(self) -> int:
        return self.config.num_tokens

    @property
    def device(self) -> torch.device:
        return self.token_emb.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.token_emb.weight.dtype

    @property
    def output_weight(self) -> Tensor:
        """The matrix of the output layer, `v e`: the token embeddings, unless it has weights of its own."""
        return self.token_emb.weight if self.config.tie_embeddings else self.lm_head.weight

    @property
    def cache_dtype(self) -> torch.dtype:
        """The type of keys and values: that of the weights, or of autocast where it is on."""
        kind = self.device.type
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return torch.get_autocast_dtype(kind) if casts else self.dtype

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
        finetune_scope: str | Sequence[BlockLoRA] | None = None,
        disable_lora: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, a loss, or the final embeddings.

        Args:
            tokens: `b n`, int64 or int32, from 0 to below `num_tokens`.
            return_loss: predict each token from those before it, and return the mean cross-entropy in nats.
            loss_mask: `b n`, True for the tokens that count as targets; the first of a row or document never does.
            loss_denominator: divides the summed loss instead of the number of targets.
            key_mask: `b n`, True for real tokens; the output at padding has no meaning.
            positions: `b n` or `1 n`; by default they count the real tokens, anew in every document.
            document_ids: `b n`, equal for the tokens of one document; they attend to each other only.
            cache: keys and values of earlier tokens, which these tokens extend; dropout is off.
            extra_embed: added to the token embeddings, broadcastable to `b n e`.
            return_only_embedding: return the final embeddings, `b n e`.
            return_logits_with_embedding: return both, `b n v` and `b n e`.
            finetune_scope: the LoRA scope to apply, or adapters for each block, unless `disable_lora`.

        Returns:
            `b n v` float logits, a scalar loss, or embeddings.

        Raises ValueError for tokens of another shape or type, or on a CPU, outside the vocabulary.
        """
        check_tokens(tokens)
        given = tokens
        try:
            if return_loss:
                if tokens.shape[1] < 2:
                    raise ValueError(
                        f"got {tokens.shape[1]} tokens a row, expected at least 2 for a loss, one to predict"
                    )
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
                    self.output_weight,
                    targets,
                    targets_mask,
                    scale=self.config.output_scale,
                    z_loss=self.config.z_loss if self.training else 0.0,
                    denominator=loss_denominator,
                )
            logits = self.to_logits(embeds)
            return (logits, embeds) if return_logits_with_embedding else logits
        except (IndexError, RuntimeError):
            if given.device.type == "cpu":  # on an accelerator, looking at the ids costs a synchronisation
                check_token_ids(given, self.num_tokens)
            raise

    def to_logits(self, embeds: Tensor, *, wide: bool = False) -> Tensor:
        """Apply the output layer: `... e -> ... v`; `wide` scales in float32, so that bfloat16 is rounded once."""
        logits = F.linear(embeds, self.output_weight)
        if wide:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits * self.config.output_scale

    def _embed(
        self,
        tokens: Tensor,
        key_mask: Tensor | None,
        positions: Tensor | None,
        document_ids: Tensor | None,
        cache: Cache | None,
        extra_embed: Tensor | None,
        scope: str | Sequence[BlockLoRA] | None,
    ) -> Tensor:
        """Return the final embeddings of tokens: `b n -> b n e`."""
        num_new = tokens.shape[1]
        if cache is not None:
            if key_mask is not None or document_ids is not None:
                raise ValueError("got a cache and a mask, expected the cache alone: give its left_padding instead")
            key_mask = cache.key_mask(num_new)
            positions = cache.positions(num_new, tokens.device) if positions is None else positions
        elif positions is None:
            positions = default_positions(tokens, key_mask, document_ids)
        if self.config.causal and cache is None:
            key_mask = without_right_padding(key_mask)
        adapters = None if scope is None else adapters_of(self, scope)
        step = None if cache is None else native_step(self, tokens, cache, adapters)
        make_tables = position_tables if step is None else step_tables
        tables = make_tables(self.config, positions, torch.promote_types(self.dtype, torch.float32))

        x = self.token_emb(tokens)
        if extra_embed is not None:
            x = x + extra_embed
        if cache is None:
            x = self.dropout(x)
        if step is None:
            x = self.through_blocks(x, tables, key_mask, document_ids, cache, adapters)
        else:
            x = step(x, tables)
        if cache is not None:
            cache.advance(num_new)
        return self.norm(x)

    def through_blocks(
        self,
        x: Tensor,
        tables: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        document_ids: Tensor | None,
        cache: Cache | None,
        adapters: Sequence[BlockLoRA] | None,
    ) -> Tensor:
        """Take embeddings through all blocks: `b n e -> b n e`; the tables are those of `position_tables`."""
        recompute = self.config.gradient_checkpointing and self.training and torch.is_grad_enabled()
        of_blocks: Sequence[BlockLoRA | None] = adapters or [None] * len(self.layers)
        for i, (layer, block_adapters) in enumerate(zip(self.layers, of_blocks, strict=True)):
            args = (x, tables, key_mask, document_ids, cache, i, block_adapters)
            x = checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)
        return x

    @beartype
    def make_cache(self, batch: int, capacity: int, *, left_padding: Tensor | None = None) -> KVCache:
        """Return an empty cache for `batch` rows of up to `capacity` tokens.

        `left_padding`, `b`, is the number of padding tokens before each row; they count towards the capacity.
        """
        if not self.config.causal:
            raise ValueError("a bidirectional PaLM has no cache, as tokens attend to later ones; expected causal=True")
        return KVCache(
            depth=self.config.depth,
            batch=batch,
            kv_heads=self.config.kv_heads,
            capacity=capacity,
            dim_head=self.config.dim_head,
            left_padding=left_padding,
            device=self.device,
            dtype=self.cache_dtype,
        )
