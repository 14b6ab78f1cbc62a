"""The unified vision tower: pixels -> text-aligned codes -> pixels (paper, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel, SiglipTextModel, SiglipVisionConfig, SiglipVisionModel

from vilau.configuration import VisionTowerConfig
from vilau.modeling.pixel_decoder import PixelDecoder
from vilau.modeling.pixel_encoder import PixelEncoder
from vilau.modeling.quantizer import build_quantizer

_LARGE_MAP = 256  # places of a latent map from which on weights laid out anew are worth their copying


@dataclass(frozen=True)
class TowerOutput:
    """What stage 1 needs of one pass over pictures.

    `z_e` (I, P, C) features; `z_q` (I, P, C) what the pixel decoder is to draw from, with straight-through gradient
    and, in training, code noise (equal to `z_e` when not quantized); `codes` (I, P, D) or `None`; `commitment` and
    `codebook_loss`, scalars (see `Quantized`); `image_embeds` (I, E), normalised, of the codes without noise.
    """

    z_e: torch.Tensor
    z_q: torch.Tensor
    codes: torch.Tensor | None
    commitment: torch.Tensor
    codebook_loss: torch.Tensor
    image_embeds: torch.Tensor


class ConvStem(nn.Module):
    """Strided 3x3 convolutions in place of one large patch convolution: ``(I, 3, S, S)`` -> ``(I, W, h, w)``."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        steps = patch_size.bit_length() - 1
        if patch_size != 1 << steps or not steps:
            raise ValueError(f"stem 'conv' needs a patch_size that is a power of two above 1, got {patch_size}")
        widths = [3, *(max(16, width >> (steps - 1 - i)) for i in range(steps))]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.mix = nn.Conv2d(widths[-1], width, 1)

    @property
    def weight(self) -> torch.Tensor:
        """The first weight: tells the encoder's dtype to the embedding layer."""
        first = self.convs[0]
        assert isinstance(first, nn.Conv2d)
        return first.weight

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = pixel_values
        for conv in self.convs:
            x = F.gelu(conv(x))
        return self.mix(x)


def _conv_encoder(config: VisionTowerConfig) -> PixelEncoder:
    return PixelEncoder(
        config.code_width,
        config.image_size,
        config.decoder_latent_channels,
        config.decoder_channels,
        tuple(config.decoder_multipliers),
        config.decoder_blocks,
        tuple(config.decoder_attention),
        config.decoder_groups,
    )


def _one_layer(config: SiglipVisionConfig) -> SiglipVisionConfig:
    return SiglipVisionConfig(**{**config.to_dict(), "num_hidden_layers": 1})


class VisionTower(PreTrainedModel):
    """Image encoder, quantizer and pixel decoder, with the text encoder of stage 1 where configured."""

    config_class = VisionTowerConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["quantizer"]

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__(config)
        self.pixel_encoder = None
        if config.encoder_type == "conv":
            self.pixel_encoder = _conv_encoder(config)
            self.image_encoder = SiglipVisionModel(_one_layer(config.image_encoder_config))
            self.image_encoder.register_module("embeddings", nn.Identity())
        else:
            self.image_encoder = SiglipVisionModel(config.image_encoder_config)
        if config.stem == "conv" and self.pixel_encoder is None:
            stem = ConvStem(config.hidden_size, config.patch_size)
            self.image_encoder.embeddings.register_module("patch_embedding", stem)
        self.text_encoder = None
        if config.text_encoder_config is not None:
            self.text_encoder = SiglipTextModel(config.text_encoder_config)
        linear = config.code_dim is not None
        own_width = linear and self.pixel_encoder is None  # the convolutional encoder ends in the codes' width
        self.to_code = nn.Linear(config.hidden_size, config.code_width) if own_width else nn.Identity()
        self.from_code = nn.Linear(config.code_width, config.hidden_size) if linear else nn.Identity()
        self.quantizer = build_quantizer(config)
        self.pixel_decoder = PixelDecoder(
            config.code_width,
            config.latent_side,
            config.decoder_latent_channels,
            config.decoder_channels,
            tuple(config.decoder_multipliers),
            config.decoder_blocks,
            tuple(config.decoder_attention),
            config.decoder_groups,
            config.decoder_dropout,
        )
        self.logit_scale = nn.Parameter(torch.full((1,), 2.3026))  # SigLIP starts at scale 10 and bias -10
        self.logit_bias = nn.Parameter(torch.full((1,), -10.0))
        self.post_init()
        if config.zero_init_residual:
            self._zero_residual_branches()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing beyond each module's own initialisation: SigLIP's parts and torch's layers set themselves."""

    @torch.no_grad()
    def _zero_residual_branches(self) -> None:
        for name, parameter in self.image_encoder.encoder.layers.named_parameters():
            if ".out_proj." in name or ".fc2." in name:
                nn.init.zeros_(parameter)

    def encoder_parts(self) -> list[nn.Module]:
        """Return the modules that make ``z_e``: what stays as it is when the image encoder is frozen."""
        if self.pixel_encoder is not None:
            return [self.pixel_encoder]
        return [self.image_encoder.embeddings, *self.image_encoder.encoder.layers[:-1], self.to_code]

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return ``z_e`` (I, P, C): states after the last-but-one encoder layer, without the final norm.

        Args:
            pixel_values: ``(I, 3, S, S)`` in [-1, 1].

        Raises:
            ValueError: the pictures have another size than the configuration's.
        """
        size = self.config.image_size
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}, the vision tower needs (images, 3, {size}, "
                f"{size}); resize the pictures with the processor"
            )
        if self.pixel_encoder is not None:
            return self.pixel_encoder(pixel_values).flatten(2).transpose(1, 2)  # (I, P, C)
        hidden = self.image_encoder.embeddings(pixel_values)
        for layer in self.image_encoder.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        return self.to_code(hidden)

    def image_embeds(self, z_q: torch.Tensor) -> torch.Tensor:
        """Return normalised image embeddings ``(I, E)`` of (quantised) features ``(I, P, C)``.

        They pass the last encoder layer, the final norm and the attention pooling head, as in section 3.1.
        """
        hidden = self.image_encoder.encoder.layers[-1](self.from_code(z_q), None)
        return F.normalize(self.image_encoder.head(self.image_encoder.post_layernorm(hidden)), dim=-1)

    def text_embeds(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return normalised text embeddings ``(B, E)`` of padded token ids ``(B, T)``.

        Raises:
            ValueError: the tower was built or saved without its text encoder.
        """
        if self.text_encoder is None:
            raise ValueError("this vision tower has no text encoder (text_encoder_config is null)")
        return F.normalize(self.text_encoder(input_ids).pooler_output, dim=-1)

    def forward(self, pixel_values: torch.Tensor, quantize: bool = True) -> TowerOutput:
        """Encode pictures ``(I, 3, S, S)``; in training mode the codebook learns from them."""
        z_e = self.features(pixel_values)
        if not quantize:
            zero = z_e.new_zeros(())
            return TowerOutput(z_e, z_e, None, zero, zero, self.image_embeds(z_e))
        quantized = self.quantizer(z_e)
        return TowerOutput(
            z_e,
            quantized.noisy_z_q,
            quantized.codes,
            quantized.commitment,
            quantized.codebook_loss,
            self.image_embeds(quantized.z_q),
        )

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return ``codes`` (I, P, D) of pictures ``(I, 3, S, S)``.

        Raises:
            ValueError: the tower's tokens are continuous (quantizer `none`).
        """
        return self.quantizer.encode(self.features(pixel_values))

    @torch.no_grad()
    def partial_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return ``(I, P, D, C)``: what the first 1, 2 ... D codes keep of pictures ``(I, 3, S, S)``.

        Continuous tokens are one sum, themselves: ``(I, P, 1, C)``.
        """
        return self.quantizer.partial_features(self.features(pixel_values))

    def decode_features(self, z_q: torch.Tensor) -> torch.Tensor:
        """Return pixels ``(I, 3, S, S)``, not clamped, of quantised features ``z_q`` (I, P, C)."""
        return self._drawn(z_q, {})

    def _drawn(self, z_q: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """As `decode_features`, with these weights in place of the decoder's own of the same names."""
        latent = z_q.to(self.pixel_decoder.conv_in.weight.dtype).transpose(1, 2).unflatten(2, (-1, self.config.grid))
        return functional_call(self.pixel_decoder, weights, (latent,)) if weights else self.pixel_decoder(latent)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, chunk: int = 16) -> torch.Tensor:
        """Return pixels ``(I, 3, S, S)`` in [-1, 1] of ``codes`` (I, P, D), `chunk` pictures at a time.

        Codes of the upper rows of the grid alone, ``(I, n, D)`` with n whole rows, give a preview of the upper pixels.
        """
        weights = self._channels_last_weights() if codes.shape[1] == self.config.num_positions else {}
        parts = [self._drawn(self.quantizer.z_q(part), weights) for part in codes.split(chunk)]
        return torch.cat(parts).clamp(-1, 1)

    def _channels_last_weights(self) -> dict[str, torch.Tensor]:
        """Return the convolutions' weights laid out for large maps on a CPU, where the copy pays; nothing elsewhere.

        It depends on the tower alone, never on how many pictures are drawn: a frame looks the same alone and in a film.
        """
        weight = self.pixel_decoder.conv_in.weight
        if self.training or weight.device.type != "cpu" or self.pixel_decoder.latent_side**2 < _LARGE_MAP:
            return {}
        named = self.pixel_decoder.named_parameters()
        return {name: p.to(memory_format=torch.channels_last) for name, p in named if p.dim() == 4}
