"""VisionTower: for people who want the tower alone, as a tokenizer of pictures or as an image-text encoder."""

from __future__ import annotations

from typing import Any

from vilau.checkpoints.tower import load_tower
from vilau.modeling import vision_tower


class VisionTower(vision_tower.VisionTower):
    """The vision tower, loaded from whatever folder holds one.

    ``encode`` turns pictures ``(I, 3, S, S)`` in [-1, 1] into ``codes`` (I, P, D), ``decode`` codes into pictures;
    ``forward`` also gives features and normalised embeddings.
    """

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a tower from its own folder, or out of a whole model's folder of our layout or of the released one.

        Hub ids work as folders do. Takes what the library's `from_pretrained` takes: `dtype`, `device_map`,
        `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder` and so on.

        Raises:
            ValueError: there is no tower, a file is missing or damaged, or tensors and configuration do not fit.
        """
        return load_tower(super().from_pretrained, pretrained_model_name_or_path, args, kwargs)
