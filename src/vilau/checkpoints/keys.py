"""Names of tensors: the released layout's beside ours, as tables.

The released layout has three parts, each a folder with its own weights: `llm`, `vision_tower`, `mm_projector`. A name
here is ``part:key``. A row holds for every key that begins with it; ``{i}``, ``{j}`` are numbers that stay, ``{r}`` one
that is counted from the other end (the released decoder numbers its stages from fine to coarse, ours from coarse to
fine). `ENCODER` and `DECODER` together are an RQ-VAE of the original project, which has one file and no parts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_MIDDLE = (  # of RQ-VAE's encoder and of its decoder
    ("mid.block_1.", "mid.0."),
    ("mid.attn_1.q.", "mid.1.query."),
    ("mid.attn_1.k.", "mid.1.key."),
    ("mid.attn_1.v.", "mid.1.value."),
    ("mid.attn_1.proj_out.", "mid.1.out."),
    ("mid.attn_1.norm.", "mid.1.norm."),
    ("mid.block_2.", "mid.2."),
)
DECODER = (  # RQ-VAE's pixel decoder, which is the released tower's
    ("post_quant_conv.", "pixel_decoder.post_quant_conv."),
    ("decoder.conv_in.", "pixel_decoder.conv_in."),
    *((f"decoder.{theirs}", f"pixel_decoder.{ours}") for theirs, ours in _MIDDLE),
    ("decoder.up.{r}.block.{i}.nin_shortcut.", "pixel_decoder.stages.{r}.blocks.{i}.shortcut."),
    ("decoder.up.{r}.block.{i}.", "pixel_decoder.stages.{r}.blocks.{i}."),
    ("decoder.up.{r}.attn.{i}.q.", "pixel_decoder.stages.{r}.attention.{i}.query."),
    ("decoder.up.{r}.attn.{i}.k.", "pixel_decoder.stages.{r}.attention.{i}.key."),
    ("decoder.up.{r}.attn.{i}.v.", "pixel_decoder.stages.{r}.attention.{i}.value."),
    ("decoder.up.{r}.attn.{i}.proj_out.", "pixel_decoder.stages.{r}.attention.{i}.out."),
    ("decoder.up.{r}.attn.{i}.norm.", "pixel_decoder.stages.{r}.attention.{i}.norm."),
    ("decoder.up.{r}.upsample.conv.", "pixel_decoder.stages.{r}.upsample."),
    ("decoder.norm_out.", "pixel_decoder.norm_out."),
    ("decoder.conv_out.", "pixel_decoder.conv_out."),
)
ENCODER = (  # RQ-VAE's encoder; it numbers its stages as we do, from fine to coarse
    ("quant_conv.", "pixel_encoder.quant_conv."),
    ("encoder.conv_in.", "pixel_encoder.conv_in."),
    *((f"encoder.{theirs}", f"pixel_encoder.{ours}") for theirs, ours in _MIDDLE),
    ("encoder.down.{j}.block.{i}.nin_shortcut.", "pixel_encoder.stages.{j}.blocks.{i}.shortcut."),
    ("encoder.down.{j}.block.{i}.", "pixel_encoder.stages.{j}.blocks.{i}."),
    ("encoder.down.{j}.attn.{i}.q.", "pixel_encoder.stages.{j}.attention.{i}.query."),
    ("encoder.down.{j}.attn.{i}.k.", "pixel_encoder.stages.{j}.attention.{i}.key."),
    ("encoder.down.{j}.attn.{i}.v.", "pixel_encoder.stages.{j}.attention.{i}.value."),
    ("encoder.down.{j}.attn.{i}.proj_out.", "pixel_encoder.stages.{j}.attention.{i}.out."),
    ("encoder.down.{j}.attn.{i}.norm.", "pixel_encoder.stages.{j}.attention.{i}.norm."),
    ("encoder.down.{j}.downsample.conv.", "pixel_encoder.stages.{j}.downsample."),
    ("encoder.norm_out.", "pixel_encoder.norm_out."),
    ("encoder.conv_out.", "pixel_encoder.conv_out."),
)
TABLE = (  # released, ours
    ("llm:", "language_model."),
    ("mm_projector:layers.0.", "projector.fc1."),
    ("mm_projector:layers.2.", "projector.fc2."),
    # SigLIP
    ("vision_tower:rqvaesiglip.siglip_model.vision_model.", "vision_tower.image_encoder."),
    ("vision_tower:rqvaesiglip.siglip_model.text_model.", "vision_tower.text_encoder."),
    ("vision_tower:rqvaesiglip.logit_scale", "vision_tower.logit_scale"),
    ("vision_tower:rqvaesiglip.logit_bias", "vision_tower.logit_bias"),
    *((f"vision_tower:rqvaesiglip.{theirs}", f"vision_tower.{ours}") for theirs, ours in DECODER),
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
RQVAE_BOOKS = {  # the same of an RQ-VAE by itself
    ours.removeprefix("vision_tower."): theirs.removeprefix("vision_tower:rqvaesiglip.")
    for ours, theirs in BOOKS.items()
}
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
    pattern = re.sub(r"\\{([ijr])\\}", r"(?P<\1>\\d+)", re.escape(template))
    return re.compile(pattern + r"(?P<rest>.*)")


def _rows(table: Iterable[tuple[str, str]]) -> tuple[_Row, ...]:
    return tuple(_Row(_compile(released), _compile(ours), released, ours) for released, ours in table)


_ROWS = _rows(TABLE)
_RQVAE_ROWS = _rows((*ENCODER, *DECODER))


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
    return _theirs(_ROWS, ours, stages)


def to_rqvae(ours: str, stages: int) -> str | None:
    """Return the key that an RQ-VAE of the original project has for a tensor of our `VisionTower`, or ``None``."""
    return _theirs(_RQVAE_ROWS, ours, stages)


def _theirs(rows: Iterable[_Row], ours: str, stages: int) -> str | None:
    for row in rows:
        match = row.ours.fullmatch(ours)
        if match:
            return _fill(row.to_released, match, stages)
    return None


def _fill(template: str, match: re.Match[str], stages: int) -> str:
    groups = match.groupdict()
    if groups.get("r") is not None:
        groups["r"] = str(stages - 1 - int(groups["r"]))
    return template.format(**groups) + groups["rest"]
