"""The released layout -> our configuration and tensors.

The folder holds ``config.json`` and three parts with weights of their own: ``llm``, ``vision_tower``, ``mm_projector``.
Everything is checked from the headers first: each of our tensors has its source with the right shape, each released
tensor is used, an equal copy of a used one, or a constant. Then tensors are read one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vilau.checkpoints import keys
from vilau.checkpoints.released_config import PARTS, read_config
from vilau.checkpoints.shards import TensorFact, WeightFiles, listed, open_weights
from vilau.configuration import VilaUConfig
from vilau.modeling.vila_u import VilaUModel


class ReleasedCheckpoint:
    """A released folder, checked whole; `read` gives our tensors.

    Args:
        folder: the released folder.

    Raises:
        ValueError: a file is missing or broken, a field unknown, a tensor missing, left over or of another shape.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts = {part: open_weights(folder / part) for part in PARTS}
        tower = self.parts["vision_tower"].tensors
        with_text = any(name.startswith("rqvaesiglip.siglip_model.text_model.") for name in tower)
        self.config: VilaUConfig = read_config(folder, with_text)
        self.vision: Any = self.config.vision_config
        self.shapes = expected_shapes(self.config)
        self.plan = plan(self.config, self.shapes, self.released, folder)
        self._check_copies()

    @property
    def released(self) -> dict[str, TensorFact]:
        """``part:key`` -> fact of every released tensor."""
        return {f"{part}:{name}": fact for part, files in self.parts.items() for name, fact in files.tensors.items()}

    def read_released(self, name: str) -> torch.Tensor:
        """Return a released tensor by its ``part:key``."""
        part, key = name.split(":", 1)
        return self.parts[part].read(key)

    def read(self, name: str) -> torch.Tensor:
        """Return one of our tensors."""
        sources = self.plan.sources[name]
        if name == keys.INITIALISED:
            return torch.ones(1, dtype=torch.long)
        if name in keys.BOOKS:
            size = self.vision.codebook_size
            return torch.stack([self.read_released(source)[:size].float() for source in sources])
        tensor = self.read_released(sources[0])
        return tensor[0] if name == keys.POSITIONS else tensor

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `read` gives."""
        if name == keys.INITIALISED:
            return torch.long
        return torch.float32 if name in keys.BOOKS else self.released[self.plan.sources[name][0]].dtype

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all our tensors; those of safetensors files are mapped, not copied, until they are used."""
        return {name: self.read(name) for name in self.shapes}

    def _check_copies(self) -> None:
        for copy, kept in self.plan.copies.items():
            if not torch.equal(self.read_released(copy), self.read_released(kept)):
                raise ValueError(
                    f"{self.released[copy].file}: {copy.split(':')[1]} differs from {kept.split(':')[1]}, but the "
                    "configuration says that they are the same tensor (shared_codebook, logit scale)"
                )


@dataclass(frozen=True)
class Plan:
    """`sources`: our name -> released ``part:key``s; `copies`: released copies -> what they must equal."""

    sources: Mapping[str, tuple[str, ...]]
    copies: Mapping[str, str]


def expected_shapes(config: VilaUConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor of our layout; builds nothing but shapes."""
    with torch.device("meta"):
        model = VilaUModel(config)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def books(config: VilaUConfig) -> Iterator[int]:
    """The depths whose codebooks are stored: the first of a shared one, all otherwise."""
    vision: Any = config.vision_config
    yield from range(1 if vision.shared_codebook else vision.depth)


def plan(
    config: VilaUConfig,
    shapes: Mapping[str, tuple[int, ...]],
    released: Mapping[str, TensorFact],
    folder: Path,
) -> Plan:
    """Match names and shapes of both layouts; ``ValueError`` lists what does not match."""
    vision: Any = config.vision_config
    stages = len(vision.decoder_multipliers)
    sources: dict[str, tuple[str, ...]] = {}
    unknown: list[str] = []
    for name in shapes:
        if name == keys.INITIALISED:
            sources[name] = ()
        elif name in keys.BOOKS:
            sources[name] = tuple(keys.BOOKS[name].format(d=d) for d in books(config))
        else:
            source = keys.to_released(name, stages)
            if source is None:
                unknown.append(name)
            else:
                sources[name] = (source,)
    if unknown:
        raise ValueError(f"the released layout has no place for {listed(unknown)}")
    wanted = {source: name for name, several in sources.items() for source in several}
    missing = sorted(set(wanted) - set(released))
    copies = _copies(config, released)
    unused = sorted(
        name for name in released if name not in wanted and name not in copies and not keys.is_computed(name)
    )
    wrong = []
    for source, name in wanted.items():
        if source in released:
            shape = released_shape(name, shapes[name])
            if released[source].shape != shape:
                wrong.append(f"{source} is {list(released[source].shape)}, expected {list(shape)}")
    if missing or unused or wrong:
        _refuse(folder, missing, unused, wrong)
    return Plan(sources, copies)


def released_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the released tensor(s) behind one of ours: the padding row, the axis of positions."""
    if name == keys.POSITIONS:
        return (1, *shape)
    if name in keys.BOOKS:
        _, size, *rest = shape
        return (size + 1 if name.endswith(".codebook") else size, *rest)
    return shape


def _copies(config: VilaUConfig, released: Mapping[str, TensorFact]) -> dict[str, str]:
    copies = {copy: kept for copy, kept in keys.ALIASES if copy in released and kept in released}
    vision: Any = config.vision_config
    if vision.shared_codebook:
        for template in keys.BOOKS.values():
            for depth in range(1, vision.depth):
                if template.format(d=depth) in released and template.format(d=0) in released:
                    copies[template.format(d=depth)] = template.format(d=0)
    return copies


def _refuse(folder: Path, missing: list[str], unused: list[str], wrong: list[str]) -> None:
    lines = [f"{folder}: the weights do not fit the configuration, so nothing was loaded."]
    if missing:
        lines.append(f"{len(missing)} missing: {listed(missing)}.")
    if unused:
        lines.append(f"{len(unused)} of no use: {listed(unused)}.")
    if wrong:
        lines.append(f"{len(wrong)} of another shape: {listed(wrong)}.")
    lines.append("Fetch the folder again, or correct its config.json files.")
    raise ValueError(" ".join(lines))


__all__ = ["ReleasedCheckpoint", "WeightFiles", "expected_shapes", "plan", "released_shape"]
