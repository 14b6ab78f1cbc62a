"""What int8 costs the shipped model: codes and words against float32 with the same, true past (docs/int8.md).

    python benchmarks/int8_quality.py [SAMPLES]
"""

from __future__ import annotations

import sys

import torch

import vilau
from vilau.data.collate import collate
from vilau.data.nano.dataset import NanoDataset
from vilau.data.nano.world import HELDOUT, World
from vilau.modeling.sequence import find_targets
from vilau.processing.images import normalise


@torch.no_grad()
def main(items: int = 96) -> None:
    """Print the share of equal likeliest codes and tokens, and nats per code and per token of both."""
    exact, small = vilau.load(device="cpu"), vilau.load(device="cpu", quantize="int8")
    world, size = World.load(objects=48), exact.model.config.vision_config.image_size
    for kind in ("text_image", "image_text"):
        data = NanoDataset(world, {kind: 1.0}, HELDOUT, 900_000, size, exact.model.config.num_frames, 0.0, items)
        encoded = [exact.processor.encode_sample(data[i]) for i in range(items)]
        longest = max(128, *(len(one) for one in encoded))
        batch = collate(encoded, longest, exact.processor.tokenizer.pad_token_id)
        codes = exact.model.vision_tower.encode(torch.from_numpy(normalise(batch.frames.numpy())))
        targets = find_targets(batch.input_ids, batch.kinds, batch.text_targets, batch.visual_targets)
        best, nats = [], []
        for model in (exact.model, small.model):
            embeds = model.embed(batch.input_ids, batch.kinds, codes)
            hidden = model.hidden_states(embeds, position_ids=batch.position_ids).flatten(0, 1)
            if kind == "text_image":
                true = codes.flatten(0, 1)[targets.visual_rows]
                partial = model.vision_tower.quantizer.partial_z_q(true)
                logits = model.depth_transformer(hidden[targets.visual_from], partial)
            else:
                true = targets.text_ids
                logits = model.get_output_embeddings()(hidden[targets.text_from])
            best.append(logits.argmax(-1))
            nats.append(-logits.log_softmax(-1).gather(-1, true.unsqueeze(-1)).mean().item())
        agree = (best[0] == best[1]).float().mean(0).tolist()
        print(f"{kind}: {len(true)} positions, agreement {agree}, nats float32 {nats[0]:.5f} int8 {nats[1]:.5f}")


if __name__ == "__main__":
    main(*(int(value) for value in sys.argv[1:]))
