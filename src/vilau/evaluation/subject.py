"""The model under test behind four verbs: answer, draw, film, rebuild; batched, and the same at every repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vilau.data.sample import Sample, Turn
from vilau.files import file_digest
from vilau.pipeline import Pipeline
from vilau.processing.images import normalise
from vilau.training.checkpoint import state_digest

Messages = list[dict[str, Any]]
_SEED_STEP = 1_000_003  # between batches, so that no two pictures are drawn with the same noise


@dataclass(frozen=True)
class Sampling:
    """How pictures and films are drawn; None stands for the model's own setting."""

    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True)
class Subject:
    """A model, its processor, and how it is asked.

    Args:
        pipeline: the loaded model.
        sampling: see `Sampling`.
        text_batch, picture_batch, film_batch: how many at a time; drawings depend on them, so the protocol names them.
    """

    pipeline: Pipeline
    sampling: Sampling = Sampling()
    text_batch: int = 256
    picture_batch: int = 64
    film_batch: int = 48

    @property
    def model(self) -> Any:
        """The network."""
        return self.pipeline.model

    @property
    def image_size(self) -> int:
        """Side of its pictures in pixels."""
        return int(self.model.config.vision_config.image_size)

    @property
    def num_frames(self) -> int:
        """Frames of its films."""
        return int(self.model.config.num_frames)

    @property
    def has_codes(self) -> bool:
        """Whether its tower quantises; a model of continuous tokens can be asked, but cannot draw."""
        return bool(self.model.vision_tower.quantizer.discrete)

    def settings(self) -> dict[str, Any]:
        """Return the sampling in force: what was asked for, the model's own where nothing was."""
        own = asdict(self.model.visual_defaults())
        return own | {name: value for name, value in asdict(self.sampling).items() if value is not None}

    def answer(
        self,
        conversations: Sequence[Messages],
        max_new_tokens: int = 24,
        codes: Sequence[torch.Tensor] | None = None,
    ) -> list[str]:
        """Return the likeliest continuation of each conversation.

        Args:
            codes: for each conversation ``(I, P, D)`` of its pictures, where they are known already.
        """
        order = sorted(range(len(conversations)), key=lambda i: _length(conversations[i]))
        answers = [""] * len(conversations)
        tokenizer = self.pipeline.processor.tokenizer
        for start in range(0, len(order), self.text_batch):
            rows = order[start : start + self.text_batch]
            inputs = self._inputs([conversations[i] for i in rows], "text")
            if codes is not None:
                inputs.pop("pixel_values", None)
                inputs["codes"] = torch.cat([codes[i] for i in rows])
            ids = self.model.generate(
                **inputs,
                generation_mode="text",
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            for i, words in zip(rows, self.pipeline.processor.batch_decode(ids), strict=True):
                answers[i] = words.strip()
        return answers

    def draw(self, prompts: Sequence[str], seed: int) -> torch.Tensor:
        """Return one picture per prompt, ``(N, 3, S, S)`` in [-1, 1] on the CPU."""
        return self._visual(prompts, seed, "image", self.picture_batch)

    def film(self, prompts: Sequence[str], seed: int) -> torch.Tensor:
        """Return one film per prompt, ``(N, F, 3, S, S)`` in [-1, 1] on the CPU."""
        return self._visual(prompts, seed, "video", self.film_batch)

    def encode(self, frames: np.ndarray, chunk: int = 128) -> torch.Tensor:
        """Return ``codes`` (I, P, D) of frames ``(I, S, S, 3)`` uint8."""
        tower, device = self.model.vision_tower, self.model.device
        parts = [
            tower.encode(torch.from_numpy(normalise(frames[start : start + chunk])).to(device, self.model.dtype))
            for start in range(0, len(frames), chunk)
        ]
        return torch.cat(parts)

    def rebuild(self, frames: np.ndarray, codes: torch.Tensor | None = None) -> torch.Tensor:
        """Return frames ``(I, S, S, 3)`` uint8 after encoding and decoding, ``(I, 3, S, S)`` in [-1, 1] on the CPU."""
        found = self.encode(frames) if codes is None else codes
        return self.model.vision_tower.decode(found).float().cpu()

    def _visual(self, prompts: Sequence[str], seed: int, mode: str, batch: int) -> torch.Tensor:
        chosen = {name: value for name, value in asdict(self.sampling).items() if value is not None}
        parts = []
        for start in range(0, len(prompts), batch):
            conversations = [[{"role": "user", "content": words}] for words in prompts[start : start + batch]]
            inputs = self._inputs(conversations, mode)
            number = (seed * 7919 + start * _SEED_STEP) % (1 << 62)
            output = self.model.generate(**inputs, generation_mode=mode, seed=number, **chosen)
            parts.append(output.pixel_values.float().cpu())
        return torch.cat(parts)

    def _inputs(self, conversations: Sequence[Messages], mode: Any) -> dict[str, Any]:
        features = self.pipeline.processor.apply_chat_template(list(conversations), generation_mode=mode)
        inputs = dict(features.to(self.model.device))
        if mode != "text" and "unconditional_ids" not in inputs:
            empty = self.pipeline.processor.unconditional(mode)
            inputs["unconditional_ids"] = empty["input_ids"].to(self.model.device)
        return inputs


def to_messages(turns: Sequence[Turn]) -> Messages:
    """Return turns as the processor's messages."""
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part.text}
                if part.kind == "text"
                else {"type": part.kind, part.kind: part.frames[0] if part.kind == "image" else list(part.frames)}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]


def question_and_answer(sample: Sample) -> tuple[Messages, str]:
    """Split a sample into the conversation up to its last answer, and that answer."""
    last = sample.turns[-1]
    if last.role != "assistant" or any(part.kind != "text" for part in last.parts):
        raise ValueError(f"sample {sample.id} does not end with an answer in words")
    return to_messages(sample.turns[:-1]), "".join(part.text for part in last.parts)


def weights_digest(path: str | Path, model: torch.nn.Module) -> str:
    """Return the SHA-256 of ``model.safetensors``, or of all tensors when the model is not one such file."""
    file = Path(path) / "model.safetensors"
    return file_digest(file) if file.is_file() else state_digest(model, ())


def _length(messages: Messages) -> tuple[int, int]:
    """How long a conversation is, roughly: media, then letters."""
    media = letters = 0
    for message in messages:
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                letters += len(part["text"])
            else:
                media += len(part["video"]) if part["type"] == "video" else 1
    return media, letters
