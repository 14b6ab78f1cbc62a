"""A trained RQ-VAE of the original project (Lee et al. 2022, kakaobrain) -> the tower with the convolutional encoder.

Its folder holds ``config.yaml`` and a PyTorch file with the entry ``state_dict`` and, of some runs, ``state_dict_ema``.
An RQ-VAE knows no text: what the contrastive loss needs - one transformer layer with its norm and pooling head, the
linear map from the codes' width, scale and bias, a text encoder - is not in the file and starts at random.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from vilau.checkpoints import keys
from vilau.checkpoints.card import tower_card
from vilau.checkpoints.released_config import (
    DECODER_FIELDS,
    DECODER_FIXED,
    check_known,
    check_widths,
    fixed,
    naming,
    needed,
    one_number,
    words,
)
from vilau.checkpoints.shards import is_table, listed, unpickle
from vilau.checkpoints.target import check_target, partial_folder, put_in_place
from vilau.configuration import VisionTowerConfig
from vilau.modeling.vision_tower import VisionTower

ENDINGS = (".pt", ".ckpt", ".pth")
ENTRIES = ("state_dict", "state_dict_ema")
FIELDS = words(
    """bottleneck_type code_shape decay embed_dim latent_loss_weight latent_shape n_embed restart_unused_codes
    shared_codebook"""
)
LEFTOVERS = ("loss_type", "masked_dropout", "use_padding_idx")  # of training; they do not change the network
_REMEDY = "keep only its state_dict: torch.save({'state_dict': ...}, NEW) where you trust the file"


@dataclass(frozen=True)
class LoadedTower:
    """`tower`, and `random`: the names of its tensors that the file does not have."""

    tower: VisionTower
    random: tuple[str, ...]


def is_rqvae(path: Path) -> bool:
    """Return whether a path is the folder or the weight file of an RQ-VAE."""
    if path.is_file():
        return path.suffix in ENDINGS
    return (path / "config.yaml").is_file() and not (path / "config.json").is_file()


def load_rqvae(
    path: str | Path,
    ema: bool = False,
    image_encoder_config: Mapping[str, Any] | None = None,
    text_encoder_config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> LoadedTower:
    """Return the vision tower of a trained RQ-VAE, with ``encoder_type: conv``, in float32 and evaluation mode.

    Args:
        path: the folder with ``config.yaml``, or the weight file beside it.
        ema: take the averaged weights, the entry ``state_dict_ema``.
        image_encoder_config: sizes of the transformer layer and pooling head that make image embeddings, such as
            `hidden_size`; the codes' width if absent. It starts at random.
        text_encoder_config: SigLIP's text encoder for stage 1, at random; none if absent.
        seed: of what starts at random.

    Raises:
        ValueError: no such files, a field is unknown, or tensors and configuration do not fit; every tensor of the
            file must be used and every one of the encoder, quantizer and decoder must be there.
    """
    return RqvaeCheckpoint(Path(path), ema, image_encoder_config, text_encoder_config).load(seed)


class RqvaeCheckpoint:
    """The files of an RQ-VAE, checked whole: `config`, and `shapes` of all tensors of the tower; `load` builds it.

    Args: as of `load_rqvae`.
    """

    def __init__(
        self,
        path: Path,
        ema: bool = False,
        image_encoder_config: Mapping[str, Any] | None = None,
        text_encoder_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.file = _weight_file(path)
        self.config = read_rqvae_config(self.file.parent / "config.yaml", image_encoder_config, text_encoder_config)
        self.stored = _read_entry(self.file, ema)
        with torch.device("meta"):
            state = VisionTower(self.config).state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.sources, self.random = self._plan()

    def load(self, seed: int = 0) -> LoadedTower:
        """Return the tower; what the file does not have is drawn with `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tower = VisionTower(self.config)
        state = {name: self._read(name) for name in self.sources}
        state[keys.INITIALISED.removeprefix("vision_tower.")] = torch.ones(1, dtype=torch.long)
        tower.load_state_dict(state, strict=False)
        return LoadedTower(tower.eval(), self.random)

    def _read(self, name: str) -> torch.Tensor:
        tensors = [self.stored[source].float() for source in self.sources[name]]
        if name in keys.RQVAE_BOOKS:
            return torch.stack([tensor[: self.config.codebook_size] for tensor in tensors])
        return tensors[0]

    def _plan(self) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
        """Our name -> keys of the file, and our names that it has no place for."""
        stages = len(self.config.decoder_multipliers)
        depths = range(1 if self.config.shared_codebook else self.config.depth)
        sources: dict[str, tuple[str, ...]] = {}
        random = []
        for name in self.shapes:
            key = keys.to_rqvae(name, stages)
            if name in keys.RQVAE_BOOKS:
                sources[name] = tuple(keys.RQVAE_BOOKS[name].format(d=d) for d in depths)
            elif key is not None:
                sources[name] = (key,)
            elif f"vision_tower.{name}" != keys.INITIALISED:
                random.append(name)
        self._check(sources)
        return sources, tuple(random)

    def _check(self, sources: Mapping[str, tuple[str, ...]]) -> None:
        wanted = {key: name for name, several in sources.items() for key in several}
        copies = self._copies()
        wrong = []
        for key, name in wanted.items():
            shape = self.shapes[name]
            if name in keys.RQVAE_BOOKS:  # one row of the table is padding
                shape = (shape[1] + name.endswith(".codebook"), *shape[2:])
            if key in self.stored and tuple(self.stored[key].shape) != shape:
                wrong.append(f"{key} is {list(self.stored[key].shape)}, expected {list(shape)}")
        faults = {
            "missing": sorted(set(wanted) - set(self.stored)),
            "of no use": sorted(set(self.stored) - set(wanted) - set(copies)),
            "of another shape": wrong,
        }
        lines = [f"{len(names)} {what}: {listed(names)}." for what, names in faults.items() if names]
        if lines:
            raise ValueError(
                f"{self.file}: the weights do not fit config.yaml, so nothing was loaded. {' '.join(lines)} Take the "
                "config.yaml of this very model"
            )
        for copy, kept in copies.items():
            if not torch.equal(self.stored[copy], self.stored[kept]):
                raise ValueError(f"{self.file}: {copy} differs from {kept}, but config.yaml says shared_codebook")

    def _copies(self) -> dict[str, str]:
        """Repetitions of a shared codebook, which ``torch.save`` stores once per depth."""
        if not self.config.shared_codebook:
            return {}
        pairs = {t.format(d=d): t.format(d=0) for t in keys.RQVAE_BOOKS.values() for d in range(1, self.config.depth)}
        return {copy: kept for copy, kept in pairs.items() if copy in self.stored and kept in self.stored}


def _weight_file(path: Path) -> Path:
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in ENDINGS)
        chosen = [file for file in found if file.name == "model.pt"] or found
        if len(chosen) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise ValueError(f"{path} should hold one weight file ({', '.join(ENDINGS)}), found {names}; name the file")
        path = chosen[0]
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if not (path.parent / "config.yaml").is_file():
        raise ValueError(f"{path.parent / 'config.yaml'} is missing; it says what network {path.name} belongs to")
    return path


def _read_entry(file: Path, ema: bool) -> dict[str, torch.Tensor]:
    """The tensors of one entry, without the prefix that wrappers of the model leave."""
    loaded = unpickle(file, _REMEDY)
    entry = ENTRIES[ema]
    if isinstance(loaded, Mapping) and any(is_table(loaded.get(name)) for name in ENTRIES):
        if entry not in loaded:
            raise ValueError(f"{file} holds no {entry}; it holds {', '.join(map(str, loaded))}")
        loaded = loaded[entry]
    if not is_table(loaded) or not loaded:
        raise ValueError(f"{file} holds no table of tensors named state_dict; {_REMEDY}")
    ending = "encoder.conv_in.weight"
    prefix = next((name.removesuffix(ending) for name in loaded if name.endswith(ending)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in loaded.items()}


def read_rqvae_config(
    file: Path,
    image_encoder_config: Mapping[str, Any] | None = None,
    text_encoder_config: Mapping[str, Any] | None = None,
) -> VisionTowerConfig:
    """Return our configuration of an RQ-VAE's ``config.yaml``; ``ValueError`` names what is wrong in it."""
    with naming(file):
        return _config(file, image_encoder_config, text_encoder_config)


def _config(
    file: Path, image_encoder_config: Mapping[str, Any] | None, text_encoder_config: Mapping[str, Any] | None
) -> VisionTowerConfig:
    arch = _architecture(file)
    fields, decoder = arch["hparams"], arch["ddconfig"]
    side, depth, doublings = _map_sides(fields, decoder, file)
    width = int(fields["embed_dim"])
    heads = max(1, width // 64)
    image = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads if width % heads == 0 else 1,
        **(image_encoder_config or {}),
        "num_hidden_layers": 1,
        "image_size": side << doublings,
        "patch_size": 1 << doublings,
    }
    return VisionTowerConfig(
        encoder_type="conv",
        image_encoder_config=image,
        text_encoder_config=dict(text_encoder_config) if text_encoder_config is not None else None,
        code_dim=width,
        depth=depth,
        codebook_size=int(one_number(fields["n_embed"], f"{file}: n_embed")),
        shared_codebook=bool(fields["shared_codebook"]),
        ema_decay=float(one_number(fields.get("decay", 0.99), f"{file}: decay")),
        restart_unused_codes=bool(fields.get("restart_unused_codes", False)),
        commitment_weight=float(fields.get("latent_loss_weight", 0.25)),
        decoder_channels=int(decoder["ch"]),
        decoder_multipliers=[int(m) for m in decoder["ch_mult"]],
        decoder_blocks=int(decoder["num_res_blocks"]),
        decoder_attention=[int(side) for side in decoder.get("attn_resolutions") or ()],
        decoder_latent_channels=int(decoder["z_channels"]),
        decoder_dropout=float(decoder.get("dropout") or 0.0),
    )


def _architecture(file: Path) -> dict[str, Any]:
    """The section ``arch``, its fields checked."""
    try:
        stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {file}: {' '.join(str(error).split())[:200]}") from error
    arch = stored.get("arch") if isinstance(stored, Mapping) else None
    if not isinstance(arch, Mapping) or not isinstance(arch.get("hparams"), Mapping):
        raise ValueError(f"{file} does not describe an RQ-VAE: it has no arch.hparams")
    if arch.get("type", "rq-vae") != "rq-vae":
        raise ValueError(f"{file}: arch.type is {arch['type']!r}; only 'rq-vae' can be a vision tower")
    fields = dict(arch["hparams"])
    decoder = arch.get("ddconfig", fields.pop("ddconfig", None))
    where = f"{file}: arch.hparams"
    check_known(fields, where, FIELDS, LEFTOVERS, library=())
    needed(fields, where, ("embed_dim", "n_embed", "code_shape", "shared_codebook"))
    fixed(fields, where, {"bottleneck_type": ("rq",), "use_padding_idx": (False,), "masked_dropout": (0, 0.0)})
    where = f"{file}: arch.ddconfig"
    check_known(decoder, where, (*DECODER_FIELDS, *DECODER_FIXED), library=())
    needed(decoder, where, ("ch", "ch_mult", "num_res_blocks", "resolution", "z_channels"))
    fixed(decoder, where, {**DECODER_FIXED, "double_z": (False,)})
    check_widths(decoder, where)
    return {"hparams": fields, "ddconfig": decoder}


def _map_sides(fields: Mapping[str, Any], decoder: Mapping[str, Any], file: Path) -> tuple[int, int, int]:
    """Side of the map, depth, number of halvings; the shapes must say the same."""
    shape = list(fields["code_shape"])
    doublings = len(decoder["ch_mult"]) - 1
    side = int(decoder["resolution"]) >> doublings
    latent = list(fields.get("latent_shape") or [side, side, fields["embed_dim"]])
    if len(shape) != 3 or shape[:2] != [side, side]:
        raise ValueError(
            f"{file}: code_shape is {shape}, but {decoder['resolution']} px halved {doublings} times are {side}x{side} "
            "positions; codes that cover several positions are not supported"
        )
    if latent != [side, side, fields["embed_dim"]]:
        raise ValueError(f"{file}: latent_shape is {latent}, expected {[side, side, fields['embed_dim']]}")
    return side, int(shape[2]), doublings


def convert_rqvae(source: Path, target: Path, ema: bool = False, force: bool = False) -> LoadedTower:
    """Write the tower of an RQ-VAE as a folder of `VisionTower.from_pretrained`; it appears whole or not at all.

    Raises:
        ValueError: as of `load_rqvae`, or the target exists.
    """
    check_target(source if source.is_dir() else source.parent, target, force)
    loaded = load_rqvae(source, ema)
    beside = partial_folder(target)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    loaded.tower.save_pretrained(beside)
    (beside / "README.md").write_text(tower_card(loaded.tower.config, loaded.random), encoding="utf-8")
    put_in_place(target)
    return loaded
