"""Codes computed once: run the frozen vision tower over everything that a language stage will read (section 3.2)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vilau.checkpoints.digest import tower_digest
from vilau.configuration import VilaUConfig
from vilau.data.coded_source import CodedSource, SquareReader
from vilau.data.codes import (
    INFO,
    CodeStore,
    Encode,
    Read,
    StoreInfo,
    create_store,
    missing_shards,
    read_info,
    verify,
    write_shard,
)
from vilau.data.feed import SampleFeed
from vilau.data.mixture import Entry
from vilau.data.nano.dataset import NanoDataset
from vilau.data.sample import Sample
from vilau.data.sources.source import Source
from vilau.data.stamp import files_stamp
from vilau.modeling.vila_u import VilaUModel
from vilau.modeling.vision_tower import VisionTower
from vilau.shipped import MODEL_TYPE, model_type
from vilau.training.config import STAGE_ORDER, LanguageStageConfig, StageName, TrainConfig
from vilau.training.data import build_nano_samples, build_samples, open_sources, stage_seed
from vilau.training.language_init import starting_folder
from vilau.training.vision_tower import to_pixel_values


@dataclass(frozen=True)
class CodePlan:
    """One store to make: its `folder`, what it holds, and how its samples are read."""

    folder: Path
    info: StoreInfo
    read: Read


@dataclass(frozen=True)
class DataIdentity:
    """What decides about the samples of a store.

    data, files: digests of the settings and of the files; former: of the settings as stores have it that were made
    before `files` was kept.
    """

    data: str
    files: str
    former: str

    def of(self, source: Source) -> DataIdentity:
        """Return the same with the files of the opened source."""
        return replace(self, files=files_stamp(source))

    def as_made(self, folder: Path, info: StoreInfo) -> StoreInfo:
        """Return `info` as an earlier version would have written it, where the folder holds such a store of this."""
        present = read_info(folder) if (folder / INFO).is_file() else info
        if not present.files and present.data == self.former:
            return replace(info, data=self.former, files="")
        return info

    def check(self, store: CodeStore, of: str) -> None:
        """Refuse a store of other samples.

        Raises:
            ValueError: the settings or the files are others than when the codes were made.
        """
        info, remedy = store.info, "run `vilau data codes` into a new folder"
        if not info.files and info.data == self.former:
            return
        if info.data != self.data:
            raise ValueError(
                f"{store.folder} holds other samples than {of} now gives: it was made with other fields of the source "
                "(caption_field, media, filters, forms, seed ...), another image size, num_frames or max_pixels; take "
                f"these back, or {remedy}"
            )
        if info.files != self.files:
            raise ValueError(
                f"{store.folder} holds other samples than {of} now gives: names, sizes or bytes of its files changed "
                f"since; {remedy}"
            )


def encoder_of(tower: VisionTower) -> Encode:
    """Return the function that turns frames ``(F, S, S, 3)`` uint8 into codes ``(F, P, D)``."""

    def encode(frames: np.ndarray) -> np.ndarray:
        return tower.encode(to_pixel_values(torch.from_numpy(frames).to(tower.device))).cpu().numpy()

    return encode


def find_tower(config: TrainConfig, name: StageName) -> Path:
    """Return the folder with the vision tower of a language stage: its `init_from`, or the stage before it.

    Raises:
        ValueError: there is none yet.
    """
    settings = config.stages[name]
    if settings.init_from is not None:
        return starting_folder(settings.init_from)
    before = [stage for stage in STAGE_ORDER if stage in config.stages]
    place = before.index(name)
    folder = Path(config.output) / before[place - 1] / "final" if place else None
    if folder is None or not folder.is_dir():
        raise ValueError(
            f"stage {name} has no vision tower yet: train {folder or 'one'} first, or name one with --tower or "
            f"stages.{name}.init_from"
        )
    return folder


def frames_of(config: TrainConfig, folder: Path) -> int:
    """Return the frames per film of the model that a stage starts from."""
    if model_type(folder) == MODEL_TYPE:
        return int(VilaUConfig.from_pretrained(folder).num_frames)
    return int(config.model.get("num_frames", VilaUConfig().num_frames))


def plan_codes(config: TrainConfig, name: StageName, tower: VisionTower, num_frames: int, out: Path) -> list[CodePlan]:
    """Return the stores that stage `name` needs, one per source, or one for what it reads of the nano world.

    Raises:
        ValueError: the stage reads no samples, or a source cannot be opened.
    """
    settings = config.stages[name]
    if not isinstance(settings, LanguageStageConfig):
        raise ValueError(f"stage {name} trains the tower itself; codes are for pretrain and sft")
    vision = tower.config
    size, digest = int(vision.image_size), tower_digest(tower, decoder=False)

    def info(identity: DataIdentity, samples: int, variants: int) -> StoreInfo:
        shape = (int(vision.num_positions), int(vision.depth), int(vision.codebook_size))
        return StoreInfo(identity.data, digest, *shape, samples, variants, files=identity.files)

    if not config.data.sources:
        if settings.steps is None:
            raise ValueError(
                f"how many samples of the nano world {settings.length} are is known when stage {name} starts: say "
                f"stages.{name}.steps=N here, or name the nano world under data.sources, where it has a length"
            )
        dataset = build_nano_samples(config, name, size, num_frames)
        world = [config.data.world, config.data.objects, config.data.styles]
        facts = [world, dict(settings.mixture), settings.jitter, stage_seed(config, name)]
        data = _digest([size, num_frames, facts])
        identity = DataIdentity(data, files_stamp(SimpleNamespace(files=[dataset.world.archive])), data)
        held = identity.as_made(out / "nano", info(identity, len(dataset), 1))
        return [CodePlan(out / "nano", held, _squares_of(dataset.__getitem__))]
    described = _describe(config, size, num_frames)
    plans = []
    for entry in open_sources(config, size, num_frames, settings.mixture, f"stages.{name}.mixture"):
        source, both = entry.source, entry.forms is not None
        folder, identity = _folder(out, source.name), described[source.name].of(source)
        held = identity.as_made(folder, info(identity, len(source), 1 + both))
        plans.append(CodePlan(folder, held, SquareReader(source, size, both)))
    return plans


def build_stage_samples(
    config: TrainConfig, name: StageName, model: VilaUModel
) -> NanoDataset | SampleFeed | CodeStore:
    """Return what a language stage reads: samples with pixels or, where `codes` is set, with codes for them.

    Before the stage's steps are known, this is for measuring: the nano world comes with pixels, and without end.

    Raises:
        ValueError: a source or its codes cannot be read, or were made by another tower.
    """
    settings, tower = config.stages[name], model.vision_tower
    assert isinstance(settings, LanguageStageConfig)
    size, num_frames = int(tower.config.image_size), int(model.config.num_frames)
    folder = None if settings.codes is None else Path(settings.codes)
    if not config.data.sources:
        if folder is None or settings.steps is None:
            return build_nano_samples(config, name, size, num_frames)
        return coded_nano(plan_codes(config, name, tower, num_frames, folder)[0])
    if folder is None:
        return build_samples(config, name, size, num_frames)
    described = _describe(config, size, num_frames)
    return build_samples(
        config, name, size, num_frames, lambda entries: coded_entries(entries, folder, tower, described)
    )


def make_codes(
    plan: CodePlan, encode: Encode, part: int, parts: int, on_sample: Callable[[], object] = lambda: None
) -> int:
    """Write the missing ones of the shards of `part`; return how many were written.

    Shard ``s`` belongs to part ``s % parts``, so that processes share the work alike whenever each of them starts.
    """
    create_store(plan.folder, plan.info)
    mine = [shard for shard in missing_shards(plan.folder, plan.info) if shard % parts == part]
    for shard in mine:
        write_shard(plan.folder, plan.info, shard, plan.read, encode, on_sample)
    return len(mine)


def check_codes(plan: CodePlan, encode: Encode, share: float, part: int = 0, parts: int = 1) -> int:
    """Encode a share of the samples in the shards of `part` again, evenly spread; return how many frames agreed.

    Raises:
        ValueError: a sample is not what the store holds, or a shard of this part is not written.
    """
    info = plan.info
    mine = range(part, info.shards, parts)
    if not mine:
        return 0
    count = max(1, round(share * info.samples))
    spread = range(0, info.samples, max(1, info.samples // count))
    numbers = [number for number in spread if number // info.shard_size in mine] or [info.span(mine[0])[0]]
    return verify(CodeStore(plan.folder, needed=mine), plan.read, encode, numbers)


def coded_entries(
    entries: list[Entry], folder: Path, tower: VisionTower, described: Mapping[str, DataIdentity]
) -> list[Entry]:
    """Return the parts of a mixture with their codes from `folder` for pixels.

    described: name -> what decides about the samples of a source.

    Raises:
        ValueError: codes are missing, were made by another tower or of other data, or hold pictures in one way where
            two are needed.
    """
    digest = tower_digest(tower, decoder=False)
    coded = []
    for entry in entries:
        source = CodedSource(entry.source, _folder(folder, entry.source.name))
        _check_tower(source.store, digest)
        described[source.name].of(entry.source).check(source.store, f"source {source.name!r}")
        if entry.forms is not None and source.store.info.variants == 1:
            raise ValueError(
                f"{source.store.folder} was made without `forms` for source {source.name!r}, so its pictures are there "
                "in one way only; make the codes anew"
            )
        coded.append(Entry(source, entry.weight, entry.epochs, entry.forms))
    return coded


def coded_nano(plan: CodePlan) -> CodeStore:
    """Return the nano samples of a stage with codes for pixels; `plan` is what `plan_codes` gives for the stage.

    Raises:
        ValueError: codes are missing, too few, of other samples, or were made by another tower.
    """
    store = CodeStore(plan.folder)
    _check_tower(store, plan.info.tower)
    if store.info.data != plan.info.data or store.info.files != plan.info.files:
        raise ValueError(
            f"{plan.folder} holds other samples than this stage reads (another world, mixture, jitter, image size or "
            "seed); run `vilau data codes` into a new folder"
        )
    if len(store) < plan.info.samples:
        raise ValueError(
            f"{plan.folder} holds {len(store)} samples, the stage reads {plan.info.samples}; make the codes anew"
        )
    return store


def _describe(config: TrainConfig, size: int, num_frames: int) -> dict[str, DataIdentity]:
    """Source's name -> what decides about its samples, but for its files."""
    limit = config.data.max_pixels
    return {
        source.label: DataIdentity(
            _digest([size, num_frames, limit, source.facts()]), "", _digest([size, num_frames, source.content()])
        )
        for source in config.data.sources
    }


def _digest(facts: Any) -> str:
    """SHA-256 of what decides about the samples of a store."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _check_tower(store: CodeStore, digest: str) -> None:
    if store.info.tower != digest:
        raise ValueError(
            f"{store.folder} was made by another vision tower than this stage's; run `vilau data codes` into a new "
            "folder, or start from the model that made them"
        )


def _squares_of(get: Callable[[int], Sample]) -> Read:
    def read(number: int) -> tuple[Sample, tuple[np.ndarray, ...]]:
        sample = get(number)
        return sample, sample.frames

    return read


def _folder(out: Path, name: str) -> Path:
    return out / re.sub(r"[^\w.-]+", "_", name)
