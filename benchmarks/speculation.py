"""Could guessing ahead speed pictures up? How often a model would accept the guesses of a draft that costs nothing.

    python benchmarks/speculation.py [MODEL] [--pictures N] [--json]

Speculative decoding checks guesses for several positions in one pass and keeps them up to the first that is refused. A
guess is one whole stack of D codes; one that is certain is accepted with the probability that the model gives it. Two
free guesses are measured, the stack of the position to the left and of the one above, and the best that any guess of
one stack could reach: the product of the largest probability at every depth along the model's own codes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

import torch

import vilau
from vilau.data.nano.world import World
from vilau.pipeline import Pipeline


@dataclass(frozen=True)
class Acceptance:
    """How often a guess is accepted: per code, given that those before it in the stack were, and the whole stack."""

    by_depth: list[float]
    stack: float


@torch.no_grad()
def measure(model: Pipeline, prompts: list[str]) -> dict[str, Acceptance]:
    """Draw each prompt once without guidance and look at what the model thought of each guess."""
    network, found = model.model, {"left": [], "above": [], "likeliest": []}
    quantizer = network.vision_tower.quantizer
    for prompt in prompts:
        inputs = model.processor.apply_chat_template([{"role": "user", "content": prompt}], generation_mode="image")
        codes = network.generate(**inputs, generation_mode="image", seed=1, guidance_scale=1.0).codes[0]  # (P, D)
        length, positions = inputs["input_ids"].shape[1], len(codes)
        visual = torch.ones((1, positions), dtype=torch.long)
        kinds = torch.cat([inputs["kinds"], visual], 1)
        ids = torch.cat([inputs["input_ids"], 0 * visual], 1)
        hidden = network.hidden_states(network.embed(ids, kinds, codes=codes[None]))[0, length - 1 : -1]
        side, place = int(positions**0.5), torch.arange(positions)
        for name, source, known in (
            ("left", place - 1, place % side != 0),
            ("above", place - side, place >= side),
        ):
            guess = codes[source[known]]
            logits = network.depth_transformer(hidden[known], quantizer.partial_z_q(guess))
            found[name].append(logits.softmax(-1).gather(-1, guess.unsqueeze(-1)).squeeze(-1))
        own = network.depth_transformer(hidden, quantizer.partial_z_q(codes)).softmax(-1)
        found["likeliest"].append(own.amax(-1))
    result = {}
    for name, parts in found.items():
        chances = torch.cat(parts)  # (N, D)
        result[name] = Acceptance(chances.mean(0).tolist(), float(chances.prod(1).mean()))
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="How often guesses of whole positions would be accepted.")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = World.load(None)
    pairs = [(thing.name, world.colours[n % len(world.colours)]) for n, thing in enumerate(world.objects)]
    prompts = [f"a {name} on a {colour} background" for name, colour in pairs][: options.pictures]
    found = measure(vilau.load(options.model), prompts)
    if options.json:
        print(json.dumps({name: asdict(one) for name, one in found.items()}, indent=1))
        return
    for name, one in found.items():
        print(f"{name:10} per code {' '.join(f'{p:.3f}' for p in one.by_depth)}   whole stack {one.stack:.4f}")


if __name__ == "__main__":
    main()
