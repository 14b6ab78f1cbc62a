"""The model under test, and what several checks share: pictures, codes, encoded samples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vilau.configuration import PositionKind
from vilau.data.sample import Sample
from vilau.evaluation.parity.chats import parse_sample
from vilau.evaluation.parity.golden import GoldenFolder
from vilau.model import VilaUForConditionalGeneration
from vilau.processing.encode import EncodedSample
from vilau.processing.images import normalise, to_array
from vilau.processing.processor import VilaUProcessor

# a squared distance is a difference of sums of hundreds of squares: float32 knows it to a few 1e-7 of those sums
TIE = 1e-6
DEFAULT_PICTURES = {"image_text": ("a", "resize"), "text_image_2": ("a", "generation mode")}


class Subject:
    """A checkpoint loaded in float32, with the inputs of its golden folder.

    Args:
        golden: the folder.
        device: where to compute.
        loop_limit: follow the visual loop over so many positions at most, and feed the reference's codes after them;
            absent, over all.
    """

    def __init__(self, golden: GoldenFolder, device: str = "cpu", loop_limit: int | None = None) -> None:
        self.golden = golden
        self.loop_limit = loop_limit
        self._top_cropped: set[str] = set()
        self.ties = 0  # positions of pictures a and b whose codes only rounding decides
        self.device = torch.device(device)
        self.model = VilaUForConditionalGeneration.from_pretrained(golden.checkpoint, dtype=torch.float32)
        self.model.eval().to(self.device)
        self.processor = VilaUProcessor.from_pretrained(golden.checkpoint)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def size(self) -> int:
        """Side of the pictures, pixels."""
        return self.config.vision_config.image_size

    @property
    def positions(self) -> int:
        """Positions of one picture, `P`."""
        return self.config.vision_config.num_positions

    @property
    def grid(self) -> int:
        """Positions per side."""
        return self.config.vision_config.grid

    def pixel_values(self, frames: Sequence[np.ndarray]) -> torch.Tensor:
        """Frames ``(S, S, 3)`` uint8 -> ``(F, 3, S, S)``."""
        return torch.from_numpy(normalise(np.stack(list(frames)))).to(self.device)

    @cached_property
    def pixels(self) -> torch.Tensor:
        """Pictures a and b as they are shown to the model: ``(2, 3, S, S)``."""
        return self.pixel_values([to_array(self.golden.picture(letter), self.size) for letter in "ab"])

    @cached_property
    def film_paths(self) -> list[Path]:
        """The frames of the film that the model sees, by our rule ``round(linspace(0, n - 1, frames))``."""
        every = self.golden.film
        chosen = np.rint(np.linspace(0, len(every) - 1, self.config.num_frames)).astype(int)
        return [every[index] for index in chosen]

    @cached_property
    def features(self) -> torch.Tensor:
        """``z_e`` (2, P, C) of pictures a and b."""
        with torch.no_grad():
            return self.model.vision_tower.features(self.pixels)

    @cached_property
    def codes(self) -> torch.Tensor:
        """``codes`` (2, P, D) of pictures a and b; the reference's where only rounding tells them apart."""
        ours = self.model.vision_tower.encode(self.pixels)
        if "c.codes" not in self.golden.names or "c.codes" in self.golden.crops:
            return ours
        theirs = self.golden.expected("c.codes").flatten(1, 2).to(self.device)
        if theirs.shape != ours.shape or torch.equal(theirs, ours):
            return ours
        if not self.only_ties(self.features, theirs):
            return ours
        self.ties = int((theirs != ours).any(-1).sum())
        return theirs

    @torch.no_grad()
    def only_ties(self, features: torch.Tensor, codes: torch.Tensor) -> bool:
        """Whether ``codes`` (..., D) are nearest ones of ``features`` (..., C), but for the rounding of float32.

        Each depth starts from the given codes before it, so that one tie does not count again at every later depth.
        """
        quantizer = self.model.vision_tower.quantizer
        partial = quantizer.partial_z_q(codes).double()
        residual = features.double()
        for depth in range(codes.shape[-1]):
            chosen = quantizer.embed(codes)[..., depth, :].double()
            flat = residual.flatten(0, -2)
            best = quantizer.book(depth)[quantizer.search(flat.float(), depth)].double().view_as(chosen)
            gap = (residual - chosen).square().sum(-1) - (residual - best).square().sum(-1)
            if bool((gap > TIE * (residual.square().sum(-1) + chosen.square().sum(-1))).any()):
                return False
            residual = features.double() - partial[..., depth, :]
        return True

    @cached_property
    def z_q(self) -> torch.Tensor:
        """Quantised features ``(2, P, C)``."""
        return self.model.vision_tower.quantizer.z_q(self.codes)

    @cached_property
    def film_codes(self) -> torch.Tensor:
        """``codes`` (F, P, D) of the film's frames."""
        return self.model.vision_tower.encode(
            self.pixel_values([to_array(path, self.size) for path in self.film_paths])
        )

    # ---- training samples

    def sample_frames(self, name: str, count: int) -> list[np.ndarray]:
        """Frames of a training sample; drawn pictures by the reference's crop."""
        if count > 1:
            return [self._drawn_frame(name, path) for path in self.film_paths[:count]]
        said = re.findall(r"(\w+)=image_(\w) \(([\w ]+)\)", self.golden.meta.get("h.mixed.images_order", ""))
        pictures = {sample: (letter, rule) for sample, letter, rule in said}
        drawn = name.startswith("text_image")
        fallback = ("b", "generation mode" if drawn else "resize")
        letter, rule = pictures.get(name, DEFAULT_PICTURES.get(name, fallback))
        path = self.golden.picture(letter)
        return [self._drawn_frame(name, path) if rule == "generation mode" else to_array(path, self.size)]

    def _drawn_frame(self, name: str, path: Path) -> np.ndarray:
        frame = reference_crop(path, self.size)
        if not np.array_equal(frame, to_array(path, self.size, "crop")):
            self._top_cropped.add(name)
        return frame

    def cropped_by_reference(self, names: Sequence[str]) -> bool:
        """Whether a picture of these samples shows another part than our centre crop would."""
        for name in names:
            self.encoded(name)
        return bool(self._top_cropped & set(names))

    @cache  # noqa: B019  (a subject lives as long as its report)
    def sample(self, name: str) -> Sample:
        """The training sample ``name`` that ``meta.json`` describes."""
        key = f"h.sample.{name}.decoded"
        if key not in self.golden.meta:
            raise ValueError(f"{self.golden.folder / 'meta.json'} has no {key}, which this check needs")
        decoded, template = self.golden.meta[key], self.processor.template
        return parse_sample(name, decoded, template, lambda count: self.sample_frames(name, count))

    @cache  # noqa: B019
    def encoded(self, name: str) -> EncodedSample:
        """The training sample, encoded as for training."""
        return self.processor.encode_sample(self.sample(name))

    def expand(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's right-padded ids ``(B, T)``, one -200 per picture -> our ``input_ids``, ``kinds`` (B, L)."""
        rows, kinds = [], []
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            counts = torch.where(ids[mask] < 0, self.positions, 1)
            row = ids[mask].repeat_interleave(counts)
            rows.append(row.clamp_min(0))
            kinds.append(torch.where(row < 0, int(PositionKind.VISUAL), int(PositionKind.TEXT)))
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True, padding_value=0)
        return ids.to(self.device), pad(kinds, batch_first=True, padding_value=int(PositionKind.PAD)).to(self.device)


def reference_crop(path: Path, size: int) -> np.ndarray:
    """Reference rule: portrait pictures are cropped at the top, landscape ones at the centre (ours: centre)."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    width, height = image.size
    side = min(width, height)
    left = round((width - side) / 2) if width > height else 0
    square = image.crop((left, 0, left + side, side))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)).copy()


def reference_pad(path: Path, size: int) -> np.ndarray:
    """Reference rule: padded to a square with the mean colour, the picture in the middle (ours: squashed)."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC)).copy()
