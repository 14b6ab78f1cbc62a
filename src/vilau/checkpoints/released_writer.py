"""The files of a released folder beside its weights: kept ones where they exist, made from our configuration if not."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vilau.checkpoints.released_config import MODEL_TYPE, PARTS
from vilau.checkpoints.shards import read_json, write_json
from vilau.configuration import VilaUConfig

_OURS_ONLY = ("extra.safetensors", "layout.json")
_TOKENIZER = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_SIGLIP = "siglip"  # the folder of the SigLIP configuration, as `pretrained_model` names it


def released_files(
    source: Path, kept: Path | None, config: VilaUConfig, folder: Path, cast: torch.dtype | None
) -> None:
    """Write configuration, tokenizer and settings of the released layout into `folder`.

    Args:
        source: our folder.
        kept: what a conversion from the released layout kept of it, or `None`.
        config: our configuration.
        folder: the new released folder, which holds its weights already.
        cast: the dtype of the weights if it was changed.
    """
    if kept is not None:
        for file in sorted(kept.rglob("*")):
            stale = cast is not None and ".index." in file.name  # it tells sizes
            if file.is_file() and file.name not in _OURS_ONLY and not stale:
                place = folder / file.relative_to(kept)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
    else:
        for name, value in configurations(config).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_json(folder / name, value)
        _tokenizer(source, folder)
    if cast is not None:
        _state_dtype(folder, str(cast))


def configurations(config: VilaUConfig) -> dict[str, dict[str, Any]]:
    """Return file name -> contents of the released configuration files of a network."""
    vision: Any = config.vision_config
    depth: Any = config.depth_config
    dtype = str(config.dtype or "float32").removeprefix("torch.")
    doublings = len(vision.decoder_multipliers) - 1
    tower = {
        "architectures": ["RQVAESIGLIPTransformer"],
        "hidden_size": vision.hidden_size,
        "model_type": "rqvaesigliptransformer_model",
        "rqtransformer": {
            "block_size": [vision.grid, vision.grid, vision.depth],
            "embed_dim": depth.hidden_size,
            "head": {
                "block": {"n_head": depth.num_attention_heads, "resid_pdrop": depth.dropout},
                "n_layer": depth.num_hidden_layers,
            },
            "input_embed_dim_1": vision.code_width,
            "input_embed_dim_2": config.hidden_size,
            "model_type": "rqtransformer_model",
            "vocab_size": vision.codebook_size,
        },
        "rqvaesiglip": {
            "code_shape": [vision.grid, vision.grid, vision.depth],
            "ddconfig": {
                "attn_resolutions": list(vision.decoder_attention),
                "ch": vision.decoder_channels,
                "ch_mult": list(vision.decoder_multipliers),
                "double_z": False,
                "dropout": vision.decoder_dropout,
                "in_channels": 3,
                "num_res_blocks": vision.decoder_blocks,
                "out_ch": 3,
                "resolution": vision.latent_side << doublings,
                "z_channels": vision.decoder_latent_channels,
            },
            "decay": vision.ema_decay,
            "decoder_latent_shape": [vision.latent_size] * 2 if vision.latent_size else None,
            "embed_dim": vision.code_width,
            "latent_loss_weight": vision.commitment_weight,
            "latent_shape": [vision.grid, vision.grid, vision.code_width],
            "model_type": "rqvaesiglip_model",
            "n_embed": vision.codebook_size,
            "pretrained_model": _SIGLIP,
            "restart_unused_codes": vision.restart_unused_codes,
            "shared_codebook": vision.shared_codebook,
        },
        "torch_dtype": dtype,
    }
    size = {"height": vision.image_size, "width": vision.image_size}
    text = vision.text_encoder_config
    projector = {
        "architectures": ["MultimodalProjector"],
        "mm_projector_type": "mlp2x_gelu",
        "model_type": "v2l_projector",
        "torch_dtype": dtype,
    }
    llm = language_config(config) | {"architectures": ["LlamaForCausalLM"], "torch_dtype": dtype}
    return {
        "config.json": {
            "architectures": ["VILAULlamaModel"],
            "hidden_size": config.hidden_size,
            "llm_cfg": llm,
            "mm_hidden_size": vision.code_width,
            "mm_projector_cfg": projector,
            "mm_use_im_start_end": True,
            "mm_use_vi_start_end": True,
            "model_dtype": f"torch.{dtype}",
            "model_type": MODEL_TYPE,
            "num_video_frames": config.num_frames,
            "vision_tower_cfg": tower,
        },
        "llm/config.json": llm,
        "mm_projector/config.json": projector,
        "vision_tower/config.json": tower,
        f"vision_tower/{_SIGLIP}/config.json": {
            "model_type": "siglip",
            "vision_config": _siglip_fields(vision.image_encoder_config.to_diff_dict()),
            "text_config": _siglip_fields(text.to_diff_dict()) if text is not None else {},
        },
        "vision_tower/preprocessor_config.json": {
            "crop_size": size,
            "do_center_crop": True,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5] * 3,
            "image_processor_type": "CLIPImageProcessor",
            "image_std": [0.5] * 3,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": size,
        },
    }


def language_config(config: VilaUConfig) -> dict[str, Any]:
    """Return the language model's fields with RoPE as the library of the released checkpoints spelled it."""
    text: Any = config.text_config
    fields = dict(text.to_dict())
    rope = dict(fields.pop("rope_parameters", None) or {})
    fields["rope_theta"] = rope.pop("rope_theta", 10000.0)
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    fields["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    for name in ("transformers_version", "dtype", "_name_or_path"):
        fields.pop(name, None)
    return fields


def _siglip_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    ignored = ("dtype", "transformers_version", "architectures", "_name_or_path")
    return {name: value for name, value in fields.items() if name not in ignored}


def _tokenizer(source: Path, folder: Path) -> None:
    names = (
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    )
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / "llm" / name)
    generation = source / "generation_config.json"
    if generation.is_file():
        stored = {key: value for key, value in read_json(generation).items() if not key.startswith("visual_")}
        write_json(folder / "llm" / "generation_config.json", stored)
    settings = source / "processor_config.json"
    if settings.is_file():
        template = read_json(settings).get("template")
        if not isinstance(template, dict) or template.get("name") != "vicuna_v1":
            write_json(folder / "processor_config.json", {"template": template})


def _state_dtype(folder: Path, dtype: str) -> None:
    """Say in the configuration files which dtype the weights have now."""
    short = dtype.removeprefix("torch.")
    for part in ("", *PARTS):
        file = folder / part / "config.json"
        if file.is_file():
            value = read_json(file)
            if "model_dtype" in value:
                value["model_dtype"] = f"torch.{short}"
            for fields in (value, *(value.get(f"{name}_cfg") for name in PARTS)):
                if isinstance(fields, dict) and fields.get("torch_dtype"):
                    fields["torch_dtype"] = short
            write_json(file, value)
