"""The released layout's configuration files -> `VilaUConfig`.

Every field of the vision tower, depth transformer and projector is either used here, must have the one value that the
network stands for, or is named below as the library's own or as a leftover of training. Anything else is an error: an
unknown field may change what the network computes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from vilau.checkpoints.shards import read_json
from vilau.configuration import DepthTransformerConfig, VilaUConfig, VisionTowerConfig
from vilau.errors import first_line

MODEL_TYPE = "vila_u_llama"
DTYPES = ("float32", "bfloat16", "float16")
PARTS = ("llm", "vision_tower", "mm_projector")


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


LIBRARY = words(  # what the library of the time writes into every configuration
    """_name_or_path add_cross_attention architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    dtype early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length
    min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
    tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p use_bfloat16 use_cache"""
)
LEFTOVERS = words(  # of the reference's training and data code; they do not change the network
    """chunk_sampler drop_path_rate fps image_aspect_ratio image_processor interpolate_mode is_multimodal lora_enable
    max_tiles min_tiles mm_hidden_size mm_projector mm_projector_lr mm_projector_type mm_use_im_patch_token
    mm_use_im_start_end mm_use_vi_start_end mm_vision_select_feature mm_vision_select_layer model_dtype model_max_length
    model_name_or_path num_time_tokens num_video_frames resume resume_path s2 s2_max_split_size
    s2_resize_output_to_scale_idx s2_scales soft_ce_std time_token_format time_token_ids tokenizer_model_max_length
    tokenizer_padding_side tune_language_model tune_mm_projector tune_vision_tower use_im_start_end use_vi_start_end
    version vision_resolution vision_tower vision_tower_lr"""
)
LLM_LEFTOVERS = ("model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side", "_name_or_path")

TOWER_FIELDS = ("hidden_size", "rqvaesiglip", "rqtransformer")
RQVAE_FIELDS = (
    "code_shape",
    "ddconfig",
    "decay",
    "decoder_latent_shape",
    "embed_dim",
    "latent_loss_weight",
    "latent_shape",
    "n_embed",
    "pretrained_model",
    "restart_unused_codes",
    "shared_codebook",
)
DECODER_FIELDS = ("attn_resolutions", "ch", "ch_mult", "dropout", "num_res_blocks", "resolution", "z_channels")
DECODER_FIXED = {
    "double_z": (False, True),  # of the encoder that a tower with SigLIP does not have
    "in_channels": (3,),
    "out_ch": (3,),
    "resamp_with_conv": (True,),
    "give_pre_end": (False,),
    "attn_type": ("vanilla",),
}
DEPTH_FIELDS = ("block_size", "embed_dim", "head", "input_embed_dim_1", "input_embed_dim_2", "vocab_size")
BLOCK_FIXED = {"attn_bias": (True,), "mlp_bias": (True,), "attn_pdrop": (0, 0.0), "gelu": ("v1",)}

_SIGLIP_WIDTHS = {  # the two encoders of released checkpoints, so that nothing has to be fetched
    "google/siglip-large-patch16-256": {"hidden": 1024, "inner": 4096, "layers": 24, "size": 256, "patch": 16},
    "google/siglip-so400m-patch14-384": {"hidden": 1152, "inner": 4304, "layers": 27, "size": 384, "patch": 14},
}


@contextmanager
def naming(where: str | Path) -> Iterator[None]:
    """Turn what a wrong value in a configuration file raises into a ValueError that names the file."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ValueError) and str(where).split(" (")[0] in reason:
            raise
        raise ValueError(
            f"{where} holds a value that cannot be used ({reason[:300]}); correct it or fetch it"
        ) from error


def read_config(folder: Path, with_text_encoder: bool = True) -> VilaUConfig:
    """Return our configuration of a released folder.

    Args:
        folder: with ``config.json`` and the three parts.
        with_text_encoder: whether the weights hold SigLIP's text tower.

    Raises:
        ValueError: a file is missing, a field unknown, or two fields disagree; the message names file and field.
    """
    top_file = folder / "config.json"
    top = read_json(top_file) if top_file.is_file() else {}
    check_known(top, top_file, ("hidden_size", *(f"{part}_cfg" for part in PARTS)), LEFTOVERS)
    if top.get("model_type", MODEL_TYPE) != MODEL_TYPE:
        raise ValueError(f"{top_file}: model_type is {top['model_type']!r}, expected {MODEL_TYPE!r}")
    for part in PARTS[1:]:  # copies inside config.json: never read if the part has its own, but never silently odd
        if isinstance(top.get(f"{part}_cfg"), Mapping):
            check = _check_tower if part == "vision_tower" else _check_projector
            check(top[f"{part}_cfg"], f"{top_file} ({part}_cfg)")
    tower, tower_file = _part(folder, top, "vision_tower")
    projector, projector_file = _part(folder, top, "mm_projector")
    _check_projector(projector, projector_file)
    llm, llm_file = _part(folder, top, "llm")
    with naming(llm_file):
        text = _text_config(llm, llm_file)
    with naming(tower_file):
        _check_tower(tower, tower_file)
        vision = _vision_config(tower, tower_file, folder / "vision_tower", with_text_encoder)
        depth = _depth_config(tower["rqtransformer"], f"{tower_file} (rqtransformer)", vision, text.hidden_size)
    with naming(top_file):
        frames = int(top.get("num_video_frames") or 8)
        config = VilaUConfig(vision_config=vision, depth_config=depth, text_config=text, num_frames=frames)
        config.dtype = _stored_dtype(top, llm)
    config.architectures = ["VilaUForConditionalGeneration"]
    return config


def _part(folder: Path, top: Mapping[str, Any], part: str) -> tuple[dict[str, Any], str]:
    """The configuration of a part: its own file, or the copy in ``config.json``; and where it stands."""
    file = folder / part / "config.json"
    if file.is_file():
        return read_json(file), str(file)
    copy = top.get(f"{part}_cfg")
    if isinstance(copy, Mapping):
        return dict(copy), f"{folder / 'config.json'} ({part}_cfg)"
    raise ValueError(f"{file} is missing and config.json holds no {part}_cfg; fetch the folder again")


def _check_tower(tower: Mapping[str, Any], where: str) -> None:
    check_known(tower, where, TOWER_FIELDS)
    for name in ("rqvaesiglip", "rqtransformer"):
        if not isinstance(tower.get(name), Mapping):
            raise ValueError(f"{where}: {name} is missing; it describes a part of the vision tower")
    rqvae, depth = tower["rqvaesiglip"], tower["rqtransformer"]
    check_known(rqvae, f"{where}: rqvaesiglip", RQVAE_FIELDS)
    needed(rqvae, f"{where}: rqvaesiglip", ("code_shape", "ddconfig", "embed_dim", "n_embed"))
    decoder = rqvae["ddconfig"]
    check_known(decoder, f"{where}: rqvaesiglip.ddconfig", (*DECODER_FIELDS, *DECODER_FIXED), library=())
    fixed(decoder, f"{where}: rqvaesiglip.ddconfig", DECODER_FIXED)
    needed(decoder, f"{where}: rqvaesiglip.ddconfig", ("ch", "ch_mult", "num_res_blocks", "resolution", "z_channels"))
    check_widths(decoder, f"{where}: rqvaesiglip.ddconfig")
    check_known(depth, f"{where}: rqtransformer", DEPTH_FIELDS)
    needed(depth, f"{where}: rqtransformer", DEPTH_FIELDS)
    head = depth["head"]
    check_known(head, f"{where}: rqtransformer.head", ("n_layer", "block"), library=())
    needed(head, f"{where}: rqtransformer.head", ("n_layer", "block"))
    block = head["block"]
    check_known(
        block, f"{where}: rqtransformer.head.block", ("embed_dim", "n_head", "resid_pdrop", *BLOCK_FIXED), library=()
    )
    needed(block, f"{where}: rqtransformer.head.block", ("n_head",))
    fixed(block, f"{where}: rqtransformer.head.block", BLOCK_FIXED)


def check_widths(decoder: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless the network's group norms, which have 32 groups, divide every width."""
    widths = [int(decoder["ch"]) * int(m) for m in decoder["ch_mult"]]
    if not widths or any(width <= 0 or width % 32 for width in widths):
        raise ValueError(
            f"{where}: ch times ch_mult gives the widths {', '.join(map(str, widths))}; all must be multiples of 32"
        )


def _check_projector(projector: Mapping[str, Any], where: str) -> None:
    check_known(projector, where, ("mm_projector_type",))
    kind = projector.get("mm_projector_type")
    if kind != "mlp2x_gelu":
        raise ValueError(f"{where}: mm_projector_type is {kind!r}; only 'mlp2x_gelu' is known")


def _text_config(llm: Mapping[str, Any], where: str) -> PreTrainedConfig:
    fields = {name: value for name, value in llm.items() if name not in LLM_LEFTOVERS}
    try:
        text = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
    except (ValueError, TypeError, KeyError) as error:
        reason = first_line(error).split(". Should contain")[0]  # a list of all models that there are
        raise ValueError(f"{where} is no configuration of a language model: {reason}") from error
    kind = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in (known := {"default", *ROPE_INIT_FUNCTIONS}):
        raise ValueError(f"{where}: rope_scaling has the type {kind!r}; known are {', '.join(sorted(known))}")
    return text


def _vision_config(tower: Mapping[str, Any], where: str, folder: Path, with_text_encoder: bool) -> VisionTowerConfig:
    rqvae = tower["rqvaesiglip"]
    decoder = rqvae["ddconfig"]
    image, text = siglip_configs(rqvae.get("pretrained_model"), folder, where)
    grid = int(image["image_size"]) // int(image["patch_size"])
    height, width, depth = rqvae["code_shape"]
    if (height, width) != (grid, grid):
        raise ValueError(
            f"{where}: code_shape says {height}x{width} positions, but {image['image_size']} px in patches of "
            f"{image['patch_size']} are {grid}x{grid}"
        )
    if rqvae["embed_dim"] != image["hidden_size"]:
        raise ValueError(
            f"{where}: embed_dim is {rqvae['embed_dim']}, but the image encoder is {image['hidden_size']} wide"
        )
    latent = rqvae.get("decoder_latent_shape")
    doublings = len(decoder["ch_mult"]) - 1
    if latent is not None:
        if len(set(latent)) != 1:
            raise ValueError(f"{where}: decoder_latent_shape is {latent}; only squares are known")
        side = int(latent[0])
    elif grid << doublings == int(image["image_size"]):
        side = grid
    else:  # only one latent map gives pictures of the right size
        side = int(image["image_size"]) >> doublings
    nominal = int(decoder["resolution"]) >> doublings  # where attention stands follows the nominal resolution
    attention = [
        side << level
        for level in range(doublings + 1)
        if nominal << level in tuple(decoder.get("attn_resolutions", ()))
    ]
    try:
        return VisionTowerConfig(
            image_encoder_config=image,
            text_encoder_config=text if with_text_encoder else None,
            depth=int(depth),
            codebook_size=one_number(rqvae["n_embed"], f"{where}: n_embed"),
            shared_codebook=bool(rqvae.get("shared_codebook", False)),
            ema_decay=float(one_number(rqvae.get("decay", 0.99), f"{where}: decay")),
            restart_unused_codes=bool(rqvae.get("restart_unused_codes", True)),
            commitment_weight=float(rqvae.get("latent_loss_weight", 0.25)),
            latent_size=side if side != grid else None,
            decoder_channels=int(decoder["ch"]),
            decoder_multipliers=[int(m) for m in decoder["ch_mult"]],
            decoder_blocks=int(decoder["num_res_blocks"]),
            decoder_attention=attention,
            decoder_latent_channels=int(decoder["z_channels"]),
            decoder_dropout=float(decoder.get("dropout") or 0.0),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _depth_config(
    depth: Mapping[str, Any], where: str, vision: VisionTowerConfig, hidden_size: int
) -> DepthTransformerConfig:
    expected = {
        "block_size": [vision.grid, vision.grid, vision.depth],
        "vocab_size": vision.codebook_size,
        "input_embed_dim_1": vision.code_width,
        "input_embed_dim_2": hidden_size,
    }
    for name, value in expected.items():
        found = depth[name]
        found = one_number(found, f"{where}: {name}") if name == "vocab_size" else found
        if (list(found) if isinstance(found, list | tuple) else found) != value:
            raise ValueError(f"{where}: {name} is {found}, but the tower and the language model need {value}")
    block = depth["head"]["block"]
    if block.get("embed_dim", depth["embed_dim"]) != depth["embed_dim"]:
        raise ValueError(
            f"{where}: head.block.embed_dim is {block['embed_dim']}, but embed_dim is {depth['embed_dim']}"
        )
    return DepthTransformerConfig(
        hidden_size=int(depth["embed_dim"]),
        num_hidden_layers=int(depth["head"]["n_layer"]),
        num_attention_heads=int(block["n_head"]),
        dropout=float(block.get("resid_pdrop", 0.1)),
    )


def siglip_configs(name: str | None, folder: Path, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of SigLIP's vision and text configuration.

    They stand in ``vision_tower/NAME/config.json``, are known here by name, or come from the hub (or its cache).

    Raises:
        ValueError: none of these.
    """
    if not name:
        raise ValueError(f"{where}: pretrained_model is missing; it names the SigLIP configuration")
    local = folder / name / "config.json"
    if not local.is_file() and Path(name).is_absolute():
        local = Path(name) / "config.json"
    if local.is_file():
        stored = read_json(local)
        if not isinstance(stored.get("vision_config"), Mapping):
            raise ValueError(f"{local} is no SigLIP configuration: it has no vision_config")
        vision, text = dict(stored["vision_config"]), dict(stored.get("text_config") or {})
    elif name in _SIGLIP_WIDTHS:
        size = _SIGLIP_WIDTHS[name]
        common = {
            "hidden_size": size["hidden"],
            "intermediate_size": size["inner"],
            "num_hidden_layers": size["layers"],
            "num_attention_heads": 16,
        }
        vision = common | {"image_size": size["size"], "patch_size": size["patch"]}
        text = common | {"vocab_size": 32000, "max_position_embeddings": 64}
    else:
        vision, text = _from_hub(name, local, where)
    return _siglip_fields(vision, "siglip_vision_model"), _siglip_fields(text, "siglip_text_model")


def _siglip_fields(fields: Mapping[str, Any], kind: str) -> dict[str, Any]:
    from transformers import SiglipTextConfig, SiglipVisionConfig

    fields = {name: value for name, value in fields.items() if name not in ("model_type", "transformers_version")}
    if kind == "siglip_vision_model":
        return dict(SiglipVisionConfig(**fields).to_dict())
    tokens = {"bos_token_id": None, "eos_token_id": None}  # the library's defaults lie outside SigLIP's vocabulary
    return dict(SiglipTextConfig(**(tokens | fields)).to_dict())


def _from_hub(name: str, local: Path, where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        stored = AutoConfig.from_pretrained(name)
        return stored.vision_config.to_dict(), stored.text_config.to_dict()
    except Exception as error:
        raise ValueError(
            f"{where}: pretrained_model is {name!r}, whose configuration is neither in {local} nor known nor to be "
            f"fetched; put its config.json there"
        ) from error


def _stored_dtype(top: Mapping[str, Any], llm: Mapping[str, Any]) -> str:
    for value in (top.get("model_dtype"), top.get("torch_dtype"), llm.get("torch_dtype"), llm.get("dtype")):
        if value:
            name = str(value).removeprefix("torch.")
            if name not in DTYPES:
                raise ValueError(f"the dtype of the weights is {name!r}; it must be one of {', '.join(DTYPES)}")
            return name
    return "float32"


def one_number(value: Any, where: str) -> Any:
    """Return a number, or the one value of a list that has one entry per depth."""
    if isinstance(value, list | tuple):
        if len(set(value)) != 1:
            raise ValueError(f"{where} is {list(value)}; codebooks of different sizes are not supported")
        return value[0]
    return value


def check_known(
    fields: Any,
    where: str | Path,
    known: Iterable[str],
    leftovers: Iterable[str] = (),
    library: Iterable[str] = LIBRARY,
) -> None:
    """Raise ValueError, with the nearest known name, for a field that is in none of the lists."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where} is no table of fields")
    names = set(known) | set(leftovers) | set(library)
    unknown = sorted(set(fields) - names)
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(set(known) | set(leftovers)), n=1)
        hint = f"; the nearest known one is {near[0]!r}" if near else ""
        raise ValueError(
            f"{where}: unknown field{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}{hint}. It may "
            "change what the network computes, so nothing was loaded; remove it if it is a leftover of training"
        )


def needed(fields: Mapping[str, Any], where: str, names: Iterable[str]) -> None:
    """Raise ValueError for a field that is absent."""
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing; fetch the file again")


def fixed(fields: Mapping[str, Any], where: str, values: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ValueError for a field with another value than those that the network stands for."""
    for name, allowed in values.items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(f"{where}: {name} is {fields[name]!r}; only {allowed[0]!r} is supported")
