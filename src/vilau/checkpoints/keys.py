"""Names of tensors: the released layout's beside ours, as tables.

The released layout has three parts, each a folder with its own weights: `llm`, `vision_tower`, `mm_projector`. A name
here is ``part:key``. A row holds for every key that begins with it; ``{i}`` is a number that stays, ``{r}`` one that
is counted from the other end (the released decoder numbers its stages from fine to coarse, ours from coarse to fine).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TABLE = (  # released, ours
    ("llm:", "language_model."),
    ("mm_projector:layers.0.", "projector.fc1."),
    ("mm_projector:layers.2.", "projector.fc2."),
    # SigLIP
    ("vision_tower:rqvaesiglip.siglip_model.vision_model.", "vision_tower.image_encoder."),
    ("vision_tower:rqvaesiglip.siglip_model.text_model.", "vision_tower.text_encoder."),
    ("vision_tower:rqvaesiglip.logit_scale", "vision_tower.logit_scale"),
    ("vision_tower:rqvaesiglip.logit_bias", "vision_tower.logit_bias"),
    # pixel decoder
    ("vision_tower:rqvaesiglip.post_quant_conv.", "vision_tower.pixel_decoder.post_quant_conv."),
    ("vision_tower:rqvaesiglip.decoder.conv_in.", "vision_tower.pixel_decoder.conv_in."),
    ("vision_tower:rqvaesiglip.decoder.mid.block_1.nin_shortcut.", "vision_tower.pixel_decoder.mid.0.shortcut."),
    ("vision_tower:rqvaesiglip.decoder.mid.block_1.", "vision_tower.pixel_decoder.mid.0."),
    ("vision_tower:rqvaesiglip.decoder.mid.attn_1.q.", "vision_tower.pixel_decoder.mid.1.query."),
    ("vision_tower:rqvaesiglip.decoder.mid.attn_1.k.", "vision_tower.pixel_decoder.mid.1.key."),
    ("vision_tower:rqvaesiglip.decoder.mid.attn_1.v.", "vision_tower.pixel_decoder.mid.1.value."),
    ("vision_tower:rqvaesiglip.decoder.mid.attn_1.proj_out.", "vision_tower.pixel_decoder.mid.1.out."),
    ("vision_tower:rqvaesiglip.decoder.mid.attn_1.norm.", "vision_tower.pixel_decoder.mid.1.norm."),
    ("vision_tower:rqvaesiglip.decoder.mid.block_2.", "vision_tower.pixel_decoder.mid.2."),
    (
        "vision_tower:rqvaesiglip.decoder.up.{r}.block.{i}.nin_shortcut.",
        "vision_tower.pixel_decoder.stages.{r}.blocks.{i}.shortcut.",
    ),
    (
        "vision_tower:rqvaesiglip.decoder.up.{r}.block.{i}.",
        "vision_tower.pixel_decoder.stages.{r}.blocks.{i}.",
    ),
    (
        "vision_tower:rqvaesiglip.decoder.up.{r}.attn.{i}.q.",
        "vision_tower.pixel_decoder.stages.{r}.attention.{i}.query.",
    ),
    (
        "vision_tower:rqvaesiglip.decoder.up.{r}.attn.{i}.k.",
        "vision_tower.pixel_decoder.stages.{r}.attention.{i}.key.",
    ),
    (
        "vision_tower:rqvaesiglip.decoder.up.{r}.attn.{i}.v.",
        "vision_tower.pixel_decoder.stages.{r}.attention.{i}.value.",
    ),
    (
        "vision_tower:rqvaesiglip.decoder.up.{r}.attn.{i}.proj_out.",
        "vision_tower.pixel_decoder.stages.{r}.attention.{i}.out.",
    ),
    (
        "vision_tower:rqvaesiglip.decoder.up.{r}.attn.{i}.norm.",
        "vision_tower.pixel_decoder.stages.{r}.attention.{i}.norm.",
    ),
    (
        "vision_tower:rqvaesiglip.decoder.up.{r}.upsample.conv.",
        "vision_tower.pixel_decoder.stages.{r}.upsample.",
    ),
    ("vision_tower:rqvaesiglip.decoder.norm_out.", "vision_tower.pixel_decoder.norm_out."),
    ("vision_tower:rqvaesiglip.decoder.conv_out.", "vision_tower.pixel_decoder.conv_out."),
    # depth transformer
    ("vision_tower:rqtransformer.in_mlp_1.", "depth_transformer.project_codes."),
    ("vision_tower:rqtransformer.in_mlp_2.", "depth_transformer.project_hidden."),
    ("vision_tower:rqtransformer.pos_emb_d", "depth_transformer.position_embedding"),
    ("vision_tower:rqtransformer.head_transformer.blocks.{i}.ln1.", "depth_transformer.blocks.{i}.norm1."),
    ("vision_tower:rqtransformer.head_transformer.blocks.{i}.ln2.", "depth_transformer.blocks.{i}.norm2."),
    ("vision_tower:rqtransformer.head_transformer.blocks.{i}.attn.query.", "depth_transformer.blocks.{i}.query."),
    ("vision_tower:rqtransformer.head_transformer.blocks.{i}.attn.key.", "depth_transformer.blocks.{i}.key."),
    ("vision_tower:rqtransformer.head_transformer.blocks.{i}.attn.value.", "depth_transformer.blocks.{i}.value."),
    ("vision_tower:rqtransformer.head_transformer.blocks.{i}.attn.proj.", "depth_transformer.blocks.{i}.out."),
    ("vision_tower:rqtransformer.head_transformer.blocks.{i}.mlp.0.", "depth_transformer.blocks.{i}.fc1."),
    ("vision_tower:rqtransformer.head_transformer.blocks.{i}.mlp.2.", "depth_transformer.blocks.{i}.fc2."),
    ("vision_tower:rqtransformer.classifier_mlp.layer_norm.", "depth_transformer.norm."),
    ("vision_tower:rqtransformer.classifier_mlp.linear.", "depth_transformer.head."),
)

BOOKS = {  # our buffer: the released key of the codebook of one depth
    "vision_tower.quantizer.codebook": "vision_tower:rqvaesiglip.quantizer.codebooks.{d}.weight",
    "vision_tower.quantizer.ema_count": "vision_tower:rqvaesiglip.quantizer.codebooks.{d}.cluster_size_ema",
    "vision_tower.quantizer.ema_sum": "vision_tower:rqvaesiglip.quantizer.codebooks.{d}.embed_ema",
}
INITIALISED = "vision_tower.quantizer.initialised"  # of ours alone
POSITIONS = "depth_transformer.position_embedding"  # released with a leading axis of 1

ALIASES = (  # the released file may repeat a tensor under another name; the copy must be equal
    (
        "vision_tower:rqvaesiglip.siglip_model.logit_scale",
        "vision_tower:rqvaesiglip.logit_scale",
    ),
    ("vision_tower:rqvaesiglip.siglip_model.logit_bias", "vision_tower:rqvaesiglip.logit_bias"),
)
COMPUTED = (  # buffers that older library versions stored and newer ones compute
    r"llm:model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"vision_tower:rqvaesiglip\.siglip_model\.(vision|text)_model\.embeddings\.position_ids",
    r"vision_tower:rqtransformer\.head_transformer\.blocks\.\d+\.attn\.mask",
)


@dataclass(frozen=True)
class _Row:
    released: re.Pattern[str]
    ours: re.Pattern[str]
    to_released: str
    to_ours: str


def _compile(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{r\}", r"(?P<r>\d+)")
    return re.compile(pattern + r"(?P<rest>.*)")


_ROWS = tuple(_Row(_compile(released), _compile(ours), released, ours) for released, ours in TABLE)


def is_computed(released: str) -> bool:
    """Return whether a released tensor is only a constant that every library computes by itself."""
    return any(re.fullmatch(pattern, released) for pattern in COMPUTED)


def to_ours(released: str, stages: int) -> str | None:
    """Return our name of a released ``part:key``, or ``None``; `stages` is the number of decoder resolutions."""
    for row in _ROWS:
        match = row.released.fullmatch(released)
        if match:
            return _fill(row.to_ours, match, stages)
    return None


def to_released(ours: str, stages: int) -> str | None:
    """Return the released ``part:key`` of our name, or ``None``."""
    for row in _ROWS:
        match = row.ours.fullmatch(ours)
        if match:
            return _fill(row.to_released, match, stages)
    return None


def _fill(template: str, match: re.Match[str], stages: int) -> str:
    groups = match.groupdict()
    if groups.get("r") is not None:
        groups["r"] = str(stages - 1 - int(groups["r"]))
    return template.format(**groups) + groups["rest"]
