"""An RQ-VAE in the layout of the original project: random weights under its names, and its network as plain functions.

Written from the description of that network alone and without any module of ours, so that names, order of stages,
padding and attention are all checked by numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional as F

Weights = dict[str, torch.Tensor]

HPARAMS: dict[str, Any] = {
    "bottleneck_type": "rq",
    "embed_dim": 24,
    "n_embed": 40,
    "latent_shape": [8, 8, 24],
    "code_shape": [8, 8, 3],
    "shared_codebook": True,
    "decay": 0.99,
    "restart_unused_codes": True,
    "loss_type": "mse",
    "latent_loss_weight": 0.25,
}
DDCONFIG: dict[str, Any] = {
    "double_z": False,
    "z_channels": 16,
    "resolution": 32,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "dropout": 0.0,
}


def write_rqvae(folder: Path, prefix: str = "", name: str = "model.pt", **changes: Any) -> Weights:
    """Write ``config.yaml`` and a weight file; return the weights. `changes` are fields of `HPARAMS`."""
    hparams = HPARAMS | changes
    weights = random_weights(hparams, DDCONFIG)
    averaged = {key: tensor * 0.5 for key, tensor in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    arch = {"type": "rq-vae", "code_hier": 1, "hparams": hparams, "ddconfig": DDCONFIG, "checkpointing": True}
    (folder / "config.yaml").write_text(yaml.safe_dump({"dataset": {"type": "imagenet"}, "arch": arch, "seed": 0}))
    stored = {f"{prefix}{key}": tensor for key, tensor in weights.items()}
    ema = {f"{prefix}{key}": tensor for key, tensor in averaged.items()}
    torch.save({"epoch": 10, "state_dict": stored, "state_dict_ema": ema}, folder / name)
    return weights


def random_weights(hparams: dict[str, Any], dd: dict[str, Any]) -> Weights:
    """Return weights of every name of that layout; the copies of a shared codebook are the same tensors."""
    generator = torch.Generator().manual_seed(1)
    weights: Weights = {}

    def conv(name: str, inputs: int, outputs: int, size: int) -> None:
        weights[f"{name}.weight"] = torch.randn(outputs, inputs, size, size, generator=generator) / (size * inputs**0.5)
        weights[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        weights[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def block(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def middle(name: str, width: int) -> None:
        block(f"{name}.mid.block_1", width, width)
        attention(f"{name}.mid.attn_1", width)
        block(f"{name}.mid.block_2", width, width)

    widths = [dd["ch"] * m for m in dd["ch_mult"]]
    levels = len(widths)
    conv("encoder.conv_in", 3, dd["ch"], 3)
    width = dd["ch"]
    for i in range(levels):
        for j in range(dd["num_res_blocks"]):
            block(f"encoder.down.{i}.block.{j}", width, widths[i])
            width = widths[i]
            if dd["resolution"] >> i in dd["attn_resolutions"]:
                attention(f"encoder.down.{i}.attn.{j}", width)
        if i < levels - 1:
            conv(f"encoder.down.{i}.downsample.conv", width, width, 3)
    middle("encoder", width)
    norm("encoder.norm_out", width)
    conv("encoder.conv_out", width, dd["z_channels"], 3)
    conv("decoder.conv_in", dd["z_channels"], width, 3)
    middle("decoder", width)
    for i in reversed(range(levels)):
        for j in range(dd["num_res_blocks"] + 1):
            block(f"decoder.up.{i}.block.{j}", width, widths[i])
            width = widths[i]
            if dd["resolution"] >> i in dd["attn_resolutions"]:
                attention(f"decoder.up.{i}.attn.{j}", width)
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width, 3)
    norm("decoder.norm_out", width)
    conv("decoder.conv_out", width, 3, 3)
    size, dim, depth = hparams["n_embed"], hparams["embed_dim"], hparams["code_shape"][2]
    for d in range(depth):
        names = [f"quantizer.codebooks.{d}.{end}" for end in ("weight", "cluster_size_ema", "embed_ema")]
        if d and hparams["shared_codebook"]:
            weights |= {name: weights[name.replace(f".{d}.", ".0.")] for name in names}
            continue
        table = torch.randn(size + 1, dim, generator=generator) * 0.7**d
        count = torch.rand(size, generator=generator) + 0.5
        weights |= dict(zip(names, (table, count, table[:size] * count[:, None]), strict=True))
    conv("quant_conv", dd["z_channels"], dim, 1)
    conv("post_quant_conv", dim, dd["z_channels"], 1)
    return weights


def encode(weights: Weights, pixels: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features ``(I, P, C)`` and codes ``(I, P, D)`` of pictures ``(I, 3, S, S)``."""
    x = _conv(weights, "encoder.conv_in", pixels, 1)
    level = 0
    while f"encoder.down.{level}.block.0.conv1.weight" in weights:
        x = _stage(weights, f"encoder.down.{level}", x)
        name = f"encoder.down.{level}.downsample.conv"
        if f"{name}.weight" in weights:
            right = torch.cat([x, x.new_zeros(*x.shape[:3], 1)], 3)
            x = torch.cat([right, right.new_zeros(*right.shape[:2], 1, right.shape[3])], 2)
            x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)
        level += 1
    x = _conv(
        weights, "encoder.conv_out", F.silu(_norm(weights, "encoder.norm_out", _middle(weights, "encoder", x))), 1
    )
    x = _conv(weights, "quant_conv", x, 0)
    features = x.permute(0, 2, 3, 1).flatten(1, 2)
    residual = features.clone()
    codes = []
    for d in range(depth):
        table = weights[f"quantizer.codebooks.{d}.weight"][:-1]
        codes.append((residual[:, :, None] - table).square().sum(-1).argmin(-1))
        residual = residual - table[codes[-1]]
    return features, torch.stack(codes, -1)


def decode(weights: Weights, codes: torch.Tensor) -> torch.Tensor:
    """Return pixels ``(I, 3, S, S)`` of codes ``(I, P, D)``."""
    z = sum(weights[f"quantizer.codebooks.{d}.weight"][codes[..., d]] for d in range(codes.shape[-1]))
    side = round(codes.shape[1] ** 0.5)
    x = _conv(weights, "post_quant_conv", z.unflatten(1, (side, side)).permute(0, 3, 1, 2), 0)
    x = _middle(weights, "decoder", _conv(weights, "decoder.conv_in", x, 1))
    levels = sum(f"decoder.up.{i}.block.0.conv1.weight" in weights for i in range(9))
    for level in reversed(range(levels)):
        x = _stage(weights, f"decoder.up.{level}", x)
        if level:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = _conv(weights, f"decoder.up.{level}.upsample.conv", x, 1)
    return _conv(weights, "decoder.conv_out", F.silu(_norm(weights, "decoder.norm_out", x)), 1)


def _conv(weights: Weights, name: str, x: torch.Tensor, padding: int) -> torch.Tensor:
    return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=padding)


def _norm(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def _block(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    h = _conv(weights, f"{name}.conv1", F.silu(_norm(weights, f"{name}.norm1", x)), 1)
    h = _conv(weights, f"{name}.conv2", F.silu(_norm(weights, f"{name}.norm2", h)), 1)
    return h + (_conv(weights, f"{name}.nin_shortcut", x, 0) if f"{name}.nin_shortcut.weight" in weights else x)


def _attention(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    normed = _norm(weights, f"{name}.norm", x)
    q, k, v = (_conv(weights, f"{name}.{part}", normed, 0).flatten(2) for part in "qkv")  # (I, C, places)
    weight = (torch.einsum("ncq,nck->nqk", q, k) / q.shape[1] ** 0.5).softmax(-1)
    mixed = torch.einsum("nqk,nck->ncq", weight, v).reshape(x.shape)
    return x + _conv(weights, f"{name}.proj_out", mixed, 0)


def _stage(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    i = 0
    while f"{name}.block.{i}.conv1.weight" in weights:
        x = _block(weights, f"{name}.block.{i}", x)
        if f"{name}.attn.{i}.q.weight" in weights:
            x = _attention(weights, f"{name}.attn.{i}", x)
        i += 1
    return x


def _middle(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    x = _attention(weights, f"{name}.mid.attn_1", _block(weights, f"{name}.mid.block_1", x))
    return _block(weights, f"{name}.mid.block_2", x)
