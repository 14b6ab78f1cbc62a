"""The joined network: visual positions and text in one sequence, two losses (paper, section 3.2, eq. (5)-(7))."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from vilau.configuration import PositionKind, VilaUConfig
from vilau.modeling.depth_transformer import DepthTransformer
from vilau.modeling.quantizer import NO_CODES
from vilau.modeling.sequence import check_sequence, find_targets, splice
from vilau.modeling.vision_tower import VisionTower

_LARGE_LOGITS = 1 << 26  # entries; 256 MB in float32, and as much again for their gradient


@dataclass(frozen=True)
class VilaULosses:
    """Negative log-likelihoods of the supervised positions of a batch, before any reduction.

    `text` (T,) nats per token; `visual` (V, D) nats per code; `text_at` (T,) and `visual_at` (V,) say which flat
    positions of the batch they belong to.
    """

    text: torch.Tensor
    visual: torch.Tensor
    text_at: torch.Tensor
    visual_at: torch.Tensor

    def total(self) -> torch.Tensor:
        """Return ``L_text + L_visual``: each the mean over what it covers, zero where there is nothing."""
        parts = [part.mean() for part in (self.text, self.visual) if part.numel()]
        if not parts:
            raise ValueError("the batch supervises no position: set text_targets or visual_targets")
        return torch.stack(parts).sum()


def head_losses(
    head: nn.Module, hidden_states: torch.Tensor, classes: torch.Tensor, fused: bool | None
) -> torch.Tensor:
    """Return negative log-likelihoods ``(N,)`` float32 of `classes` (N,) under a linear head over states ``(N, H)``.

    fused: never hold the logits whole; slower, and for a plain linear layer only: others are computed as usual.
    """
    assert isinstance(head.weight, torch.Tensor)
    if fused is None:
        fused = len(classes) * len(head.weight) > _LARGE_LOGITS
    if not fused or type(head) is not nn.Linear or not len(classes):
        return F.cross_entropy(head(hidden_states).float(), classes, reduction="none")
    kind = hidden_states.dtype
    return F.linear_cross_entropy(
        hidden_states,
        head.weight.to(kind),
        classes,
        linear_bias=None if head.bias is None else head.bias.to(kind),
        reduction="none",
        options=nn.LinearCrossEntropyOptions(),
    ).float()


def packed_lengths(config: Any, position_ids: torch.Tensor) -> dict[str, Any]:
    """Return what flash attention must be told of packed rows ``(B, L)``: where each sequence begins and the longest.

    The library finds restarting `position_ids` by itself, but for flash attention in a single row only: in several
    rows, samples would see each other. Nothing is returned for other kinds of attention.
    """
    if "flash" not in config._attn_implementation:
        return {}
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(position_ids)
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": int(longest),
        "max_length_k": int(longest),
    }


@dataclass(frozen=True)
class VilaUScores:
    """Log-likelihoods in nats, per position of a batch; zero where nothing was asked.

    `text` (B, L) and `text_mask` (B, L) bool; `visual` (B, L, D), one value per code, and `visual_mask` (B, L) bool.
    """

    text: torch.Tensor
    visual: torch.Tensor
    text_mask: torch.Tensor
    visual_mask: torch.Tensor

    def total(self) -> torch.Tensor:
        """Return the log-likelihood ``(B,)`` of everything that was asked of each row."""
        return self.text.sum(1) + self.visual.sum((1, 2))


class Projector(nn.Module):
    """Two-layer MLP with GELU (`mlp2x_gelu`): ``z_q`` (..., C) -> language model width (..., H)."""

    def __init__(self, code_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(code_dim, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, z_q: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(z_q.to(self.fc1.weight.dtype))))


class VilaUModel(PreTrainedModel):
    """Vision tower, projector, language model and depth transformer; forward, losses; nothing about sampling.

    With a tower of continuous tokens (quantizer `none`) there is no depth transformer, pictures come as `pixel_values`
    alone, and text alone is predicted.

    Args:
        config: sizes of all parts.
        language_model: put in place as it is, neither copied nor initialised; its configuration is then
            `config.text_config`. A new one if absent.
    """

    language_model: Any  # of whatever class the configuration names

    config_class = VilaUConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["quantizer"]

    def __init__(self, config: VilaUConfig, language_model: PreTrainedModel | None = None) -> None:
        if language_model is not None:
            config.text_config = language_model.config
        super().__init__(config)
        self._build(config, torch.device("meta") if language_model is not None else nullcontext())
        self.post_init()
        if language_model is not None:  # after `post_init`, which would start it anew
            self.language_model = language_model

    def _build(self, config: VilaUConfig, place: AbstractContextManager[Any]) -> None:
        self.vision_tower = VisionTower(config.vision_config)
        self.projector = Projector(config.vision_config.code_width, config.hidden_size)
        with place:
            self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.depth_transformer = None
        if config.vision_config.discrete:
            self.depth_transformer = DepthTransformer(
                config.depth_config,
                config.hidden_size,
                config.vision_config.code_width,
                config.vision_config.depth,
                config.vision_config.codebook_size,
            )

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing beyond each part's own initialisation."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def visual_embeds(self, codes: torch.Tensor) -> torch.Tensor:
        """Return ``projector(z_q)`` (..., H) of ``codes`` (..., D)."""
        return self.projector(self.vision_tower.quantizer.z_q(codes))

    def visual_features(
        self, codes: torch.Tensor | None, pixel_values: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the codes ``(I, P, D)`` of pictures, if the tower has any, and their ``z_q`` (I, P, C).

        Raises:
            ValueError: codes were given to a model of continuous tokens.
        """
        tower = self.vision_tower
        if codes is None and pixel_values is not None:
            if not tower.quantizer.discrete:
                return None, tower.features(pixel_values)
            codes = tower.encode(pixel_values)
        return codes, None if codes is None else tower.quantizer.z_q(codes)

    def check_draws(self) -> None:
        """Raise ValueError if the model has no codes to draw with or to be trained on."""
        if self.depth_transformer is None:
            raise ValueError(NO_CODES)

    def embed(
        self,
        input_ids: torch.Tensor,
        kinds: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return ``inputs_embeds`` (B, L, H) of a mixed sequence.

        Args:
            input_ids: ``(B, L)``; ids at visual positions are ignored.
            kinds: ``(B, L)`` of `PositionKind`; text throughout if absent.
            codes: ``(I, P, D)`` in order of appearance, or
            pixel_values: ``(I, 3, S, S)``, encoded here.

        Raises:
            ValueError: the pictures do not match the visual positions, or codes were given to a model of continuous
                tokens.
        """
        return self._embed(input_ids, kinds, self.visual_features(codes, pixel_values)[1])

    def _embed(self, input_ids: torch.Tensor, kinds: torch.Tensor | None, z_q: torch.Tensor | None) -> torch.Tensor:
        text = self.get_input_embeddings()(input_ids)
        if kinds is None:
            if z_q is not None:
                raise ValueError("pictures were given without kinds, so their positions are unknown")
            return text
        check_sequence(input_ids, kinds, 0 if z_q is None else z_q.shape[0] * z_q.shape[1])
        if z_q is None:
            return text
        return splice(text, kinds, self.projector(z_q).flatten(0, -2))

    def hidden_states(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the language model's last hidden states ``(B, L, H)``, without its text head.

        Packed rows: `position_ids` restart at every sample and `attention_mask` is absent; the library then keeps
        samples apart. No cache is made, because with one they would leak into each other.
        """
        lengths: dict[str, Any] = {}
        if position_ids is not None and attention_mask is None:
            lengths = packed_lengths(self.language_model.config, position_ids)
        return self.language_model.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            **lengths,
        ).last_hidden_state

    def losses(
        self,
        input_ids: torch.Tensor,
        kinds: torch.Tensor,
        text_targets: torch.Tensor,
        visual_targets: torch.Tensor,
        codes: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        fused: bool | None = None,
    ) -> VilaULosses:
        """Return the unreduced losses of eq. (5) and (7) for a batch.

        Args:
            input_ids, kinds: ``(B, L)``.
            text_targets, visual_targets: bool ``(B, L)``, the positions to be predicted.
            codes or pixel_values: the pictures and frames in order of appearance.
            attention_mask: ``(B, L)`` for padded rows; absent for packed rows.
            position_ids: ``(B, L)``, restarting per packed sample.
            fused: compute logits in pieces that are never in memory together; absent, where they are large.

        Raises:
            ValueError: pictures and visual positions do not match, or visual positions of a model of continuous tokens
                are to be predicted.
        """
        if self.depth_transformer is None and bool(visual_targets.any()):
            raise ValueError(NO_CODES)
        codes, z_q = self.visual_features(codes, pixel_values)
        hidden = self.hidden_states(self._embed(input_ids, kinds, z_q), attention_mask, position_ids).flatten(0, 1)
        targets = find_targets(input_ids, kinds, text_targets, visual_targets)
        text = head_losses(self.get_output_embeddings(), hidden[targets.text_from], targets.text_ids, fused)
        if self.depth_transformer is None or codes is None or not len(targets.visual_at):
            visual = hidden.new_zeros((0, self.config.vision_config.depth), dtype=torch.float32)
        else:
            chosen = codes.flatten(0, 1)[targets.visual_rows]  # (V, D)
            partial = self.vision_tower.quantizer.partial_z_q(chosen).to(hidden.dtype)
            states = self.depth_transformer.hidden(hidden[targets.visual_from], partial)  # (V, D, W)
            visual = head_losses(self.depth_transformer.head, states.flatten(0, 1), chosen.flatten(), fused)
            visual = visual.unflatten(0, chosen.shape)
        return VilaULosses(text, visual, targets.text_at, targets.visual_at)

    @torch.no_grad()
    def score(
        self,
        input_ids: torch.Tensor,
        kinds: torch.Tensor,
        text_targets: torch.Tensor | None = None,
        visual_targets: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> VilaUScores:
        """Return how likely a text is given pictures, or the codes of pictures given a text.

        Args:
            input_ids, kinds: ``(B, L)``; padding has the kind `PositionKind.PAD`, on either side.
            text_targets, visual_targets: bool ``(B, L)``, the positions asked for; with neither, every text position
                that has one before it.
            codes or pixel_values: the pictures and frames in order of appearance; codes are what is scored.
            attention_mask: ``(B, L)``; made from `kinds` if absent.
        """
        if attention_mask is None:
            attention_mask = (kinds != PositionKind.PAD).long()
        none = torch.zeros_like(kinds, dtype=torch.bool)
        if text_targets is None and visual_targets is None:
            before = torch.cat([none[:, :1], kinds[:, :-1] != PositionKind.PAD], 1)
            text_targets = (kinds == PositionKind.TEXT) & before
        text_targets = none if text_targets is None else text_targets.bool()
        visual_targets = none if visual_targets is None else visual_targets.bool()
        losses = self.losses(
            input_ids, kinds, text_targets, visual_targets, codes, pixel_values, attention_mask=attention_mask
        )
        depth = self.config.vision_config.depth
        text = losses.text.new_zeros(kinds.numel()).index_copy(0, losses.text_at, -losses.text)
        visual = losses.visual.new_zeros((kinds.numel(), depth)).index_copy(0, losses.visual_at, -losses.visual)
        return VilaUScores(text.view(kinds.shape), visual.view(*kinds.shape, depth), text_targets, visual_targets)

    def forward(
        self,
        input_ids: torch.Tensor,
        kinds: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return ``hidden_states`` (B, L, H) of a mixed sequence; see `embed` and `losses` for the arguments."""
        embeds = self.embed(input_ids, kinds, codes, pixel_values)
        return self.hidden_states(embeds, attention_mask, position_ids)
