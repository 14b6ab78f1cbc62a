"""Configurations of the unified model: sizes only, no weights, no tensors.

`VilaUConfig` is a composite Hugging Face configuration: a vision tower (image encoder, residual quantizer, pixel
decoder, and the text encoder used in stage 1), a projector, any causal language model, and a depth transformer. The
same classes describe the nano model and the 7B one.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, SiglipTextConfig, SiglipVisionConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec


class PositionKind(IntEnum):
    """What stands at one position of the unified sequence."""

    TEXT = 0
    VISUAL = 1
    PAD = 2


ENCODER_TYPES = ("siglip", "conv")
STEMS = ("patch", "conv")
QUANTIZERS = ("rq", "mcq", "none")
CODEBOOK_LEARNING = ("ema", "gradient")
CODEBOOK_INITS = ("kmeans", "data", "random")


@strict
class VisionTowerConfig(PreTrainedConfig):
    r"""Sizes of the vision tower (paper, section 3.1).

    Args:
        image_encoder_config: the SigLIP vision transformer; its `image_size` and `patch_size` fix the grid.
        text_encoder_config: the SigLIP text transformer of stage 1, or `None` for a tower without one.
        encoder_type: `siglip` (the paper's), or `conv`: RQ-VAE's convolutional encoder with the decoder's sizes, for
            the baselines of Tables 1 and 8 and Appendix C; the contrastive embedding then passes one transformer layer
            of `image_encoder_config`'s sizes and the pooling head.
        stem: `patch` (one strided convolution, as released) or `conv` (strided 3x3 convolutions, for small models).
        zero_init_residual: start every residual branch of the image encoder at zero.
        code_dim: width `C` of the codes; `None` means the encoder's width and no linear maps (as released).
        quantizer: `rq`, residual quantization, eq. (2)-(4), depth 1 being plain vector quantization; `mcq`, one
            codebook of width `C / D` for each of `D` chunks of channels; `none`, continuous tokens, for understanding
            only.
        depth: codes per position, `D`.
        codebook_size: `K`, number of vectors per codebook.
        shared_codebook: with `rq`, one codebook for all depths (paper) or one per depth.
        codebook_learning: `ema`, moving averages, or `gradient`, a frozen basis times a learned matrix (SimVQ).
        codebook_init: the first training batch sets the codes by `kmeans` or by random features of it (`data`), or
            they start `random`.
        ema_decay, restart_unused_codes: of codebook learning `ema`.
        code_noise: probability that, in training, a code is replaced in what the pixel decoder sees.
        code_noise_neighbours: draw the replacement among so many nearest codes; 0 means among all.
        commitment_weight: weight of the commitment loss (RQ-VAE).
        latent_size: side of the decoder's latent map; `None` means the encoder's grid. When it differs, the quantised
            map is resized bilinearly (27 -> 24 in the released 384 px model).
        decoder_channels, decoder_multipliers, decoder_blocks, decoder_attention, decoder_latent_channels,
        decoder_groups, decoder_dropout: the VQGAN-style convolutional decoder; every multiplier after the first is one
            doubling of the resolution, `decoder_attention` lists resolutions with an attention block.
    """

    model_type = "vilau_vision_tower"
    base_config_key = "vision_config"
    sub_configs_defaults = {
        "image_encoder_config": SubConfigSpec(config_class=SiglipVisionConfig),
        "text_encoder_config": SubConfigSpec(config_class=SiglipTextConfig, optional=True),
    }

    image_encoder_config: Any = None  # a configuration, or its fields as a dict
    text_encoder_config: Any = None  # a configuration, or its fields as a dict
    encoder_type: str = "siglip"
    stem: str = "patch"
    zero_init_residual: bool = False
    code_dim: int | None = None
    quantizer: str = "rq"
    depth: int = 4
    codebook_size: int = 16384
    shared_codebook: bool = True
    codebook_learning: str = "ema"
    codebook_init: str = "kmeans"
    ema_decay: float = 0.99
    restart_unused_codes: bool = True
    code_noise: float = 0.0
    code_noise_neighbours: int = 0
    commitment_weight: float = 0.25
    latent_size: int | None = None
    decoder_channels: int = 128
    decoder_multipliers: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    decoder_blocks: int = 2
    decoder_attention: list[int] | tuple[int, ...] = (16,)
    decoder_latent_channels: int = 256
    decoder_groups: int = 32
    decoder_dropout: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.image_encoder_config, dict):
            self.image_encoder_config = SiglipVisionConfig(**self.image_encoder_config)
        elif self.image_encoder_config is None:
            self.image_encoder_config = SiglipVisionConfig()
        if isinstance(self.text_encoder_config, dict):
            self.text_encoder_config = SiglipTextConfig(**self.text_encoder_config)
        _one_of("encoder_type", self.encoder_type, ENCODER_TYPES)
        _one_of("stem", self.stem, STEMS)
        self._check_quantizer()
        if self.grid < 1:
            raise ValueError(f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")
        if self.stem == "conv" and self.image_size % self.patch_size:
            raise ValueError(
                f"stem 'conv' needs an image_size that is a multiple of patch_size, got {self.image_size} and "
                f"{self.patch_size}"
            )
        if self.encoder_type == "conv":
            self._check_conv_encoder()
        side = self.latent_side * 2 ** (len(self.decoder_multipliers) - 1)
        if side != self.image_size:
            raise ValueError(
                f"the pixel decoder would draw {side} px pictures ({self.latent_side} latents doubled "
                f"{len(self.decoder_multipliers) - 1} times) but image_size is {self.image_size}; "
                "set latent_size or the number of decoder_multipliers to match"
            )
        super().__post_init__(**kwargs)

    def _check_quantizer(self) -> None:
        _one_of("quantizer", self.quantizer, QUANTIZERS)
        _one_of("codebook_learning", self.codebook_learning, CODEBOOK_LEARNING)
        _one_of("codebook_init", self.codebook_init, CODEBOOK_INITS)
        for name in ("depth", "codebook_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("ema_decay", "code_noise"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not 0 <= self.code_noise_neighbours < self.codebook_size:
            raise ValueError(
                f"code_noise_neighbours is {self.code_noise_neighbours}; it must be at least 0 and below "
                f"codebook_size, {self.codebook_size}"
            )
        if self.quantizer == "mcq" and self.code_width % self.depth:
            raise ValueError(
                f"quantizer 'mcq' cuts the {self.code_width} channels of a code into {self.depth} equal chunks, which "
                f"leaves a rest of {self.code_width % self.depth}; set code_dim to a multiple of depth, or depth to a "
                "divisor of it"
            )

    def _check_conv_encoder(self) -> None:
        shrink = 2 ** (len(self.decoder_multipliers) - 1)
        if self.patch_size != shrink:
            raise ValueError(
                f"encoder_type 'conv' halves the picture {len(self.decoder_multipliers) - 1} times, so one position "
                f"covers {shrink} px, but patch_size is {self.patch_size}; set patch_size to {shrink}"
            )
        if self.code_dim is None:
            raise ValueError("encoder_type 'conv' has no width of its own to take for the codes; set code_dim")

    @property
    def image_size(self) -> int:
        """Side of the square input, pixels."""
        return int(self.image_encoder_config.image_size)

    @property
    def patch_size(self) -> int:
        """Side of one patch, pixels."""
        return int(self.image_encoder_config.patch_size)

    @property
    def grid(self) -> int:
        """Positions per side; a rest of the picture that fills no patch is left out (384 px in patches of 14: 27)."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Positions of one image, `P`."""
        return self.grid**2

    @property
    def latent_side(self) -> int:
        """Side of the pixel decoder's latent map."""
        return self.latent_size or self.grid

    @property
    def hidden_size(self) -> int:
        """Width of the image encoder."""
        return int(self.image_encoder_config.hidden_size)

    @property
    def discrete(self) -> bool:
        """Whether pictures become codes; continuous tokens can be read, but neither drawn nor predicted."""
        return self.quantizer != "none"

    @property
    def code_width(self) -> int:
        """Width `C` of one code vector."""
        return self.code_dim or self.hidden_size


@strict
class DepthTransformerConfig(PreTrainedConfig):
    r"""Sizes of the depth transformer, eq. (6): width, layers, heads, MLP ratio, dropout of the residual branches."""

    model_type = "vilau_depth_transformer"
    base_config_key = "depth_config"

    hidden_size: int = 1024
    num_hidden_layers: int = 6
    num_attention_heads: int = 16
    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-5
    dropout: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"depth transformer: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        super().__post_init__(**kwargs)


@strict
class VilaUConfig(PreTrainedConfig):
    r"""The unified model: vision tower + projector + language model + depth transformer.

    Args:
        vision_config, depth_config: see `VisionTowerConfig`, `DepthTransformerConfig`.
        text_config: configuration of any causal language model of the Hugging Face hub's kind.
        num_frames: frames of a generated or read video unless said otherwise.
        image_start_id, image_end_id, video_start_id, video_end_id: the four visual tokens; the last four rows of the
            vocabulary unless given.
    """

    model_type = "vilau"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=VisionTowerConfig),
        "depth_config": SubConfigSpec(config_class=DepthTransformerConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: Any = None  # a configuration, or its fields as a dict
    depth_config: Any = None  # a configuration, or its fields as a dict
    text_config: Any = None  # a configuration, or its fields as a dict
    num_frames: int = 8
    image_start_id: int | None = None
    image_end_id: int | None = None
    video_start_id: int | None = None
    video_end_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = VisionTowerConfig(**(self.vision_config or {}))
        if not isinstance(self.depth_config, PreTrainedConfig):
            self.depth_config = DepthTransformerConfig(**(self.depth_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            fields = dict(self.text_config or {})
            self.text_config = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
        for offset, name in enumerate(("image_start_id", "image_end_id", "video_start_id", "video_end_id")):
            if getattr(self, name) is None:
                setattr(self, name, self.text_config.vocab_size - 4 + offset)
        if self.num_frames < 1:
            raise ValueError(f"num_frames is {self.num_frames}; it must be at least 1")
        kwargs.setdefault("tie_word_embeddings", False)
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width `H` of the language model."""
        return int(self.text_config.hidden_size)

    @property
    def context_length(self) -> int | None:
        """Positions that the language model reads at once, linear or dynamic RoPE scaling included; None: no limit."""
        limit = getattr(self.text_config, "max_position_embeddings", None)
        if not limit:
            return None
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        scaled = rope.get("rope_type") in ("linear", "dynamic")
        return int(limit * rope.get("factor", 1.0)) if scaled else int(limit)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
