"""The nano world: a few dozen emoji on coloured backgrounds, small enough for a laptop, real enough to learn from.

``world`` names the objects, ``scenes`` draws them, ``texts``, ``questions``, ``dialogues`` and ``stories`` say what is
seen, ``dataset`` makes samples of a seed, ``tokenizer`` and ``build`` write what ships and what is trained on.
"""

from vilau.data.nano.dataset import ImageTextDataset, NanoDataset
from vilau.data.nano.scenes import Film, Item, Scene, render, render_film
from vilau.data.nano.world import World

__all__ = ["Film", "ImageTextDataset", "Item", "NanoDataset", "Scene", "World", "render", "render_film"]
