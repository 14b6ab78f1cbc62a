"""VilaUProcessor: messages with text, pictures and films -> model inputs; model outputs -> text and pictures.

It is a ``ProcessorMixin``, so ``from_pretrained``, ``save_pretrained``, ``push_to_hub`` and ``AutoProcessor`` behave as
everywhere. Its one sub-processor is the tokenizer. Pictures do not go through one of the library's image processors but
through
``images.py`` and ``videos.py``, because these check sizes and formats before decoding and serve training too; their few
settings (image size, positions and frames) stand in ``processor_config.json`` beside the chat template.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from ..configuration import PositionKind
from ..data.sample import Sample
from . import images as pictures
from .encode import (
    EncodedSample,
    encode_prompt,
    encode_sample,
    encode_text,
    placeholder_id,
    special_id,
    unconditional_turns,
)
from .messages import Message, check_messages, count_characters, count_frames, is_batch, to_turns, user_message
from .templates import GENERATION_MODES, OURS, ChatTemplate, GenerationMode

SETTINGS = ("image_size", "positions_per_frame", "num_frames", "max_length", "template")
_LIBRARY_KEYS = {
    "processor_class",
    "auto_map",
    "transformers_version",
    "tokenizer",
    "chat_template",
    "trust_remote_code",
}
_PIPELINE_KEYS = ("code_revision", "trust_remote_code", "dtype", "device_map")  # of models
_NO_LIMIT = 10**9  # tokenizers without a limit state an astronomic one


class VilaUProcessor(ProcessorMixin):
    """Text, pictures and films in, tensors out, and back.

    tokenizer: a tokenizer with the template's special tokens, all registered as special, and a pad token
    image_size: side S of the square that the vision tower sees, in pixels
    positions_per_frame: P, positions that one picture takes in the sequence
    num_frames: frames of a film
    max_length: positions that the language model has; absent, the tokenizer's ``model_max_length``
    template: the checkpoint's chat template, as ``ChatTemplate``, dictionary or name of a preset
    """

    tokenizer: Any

    def __init__(
        self,
        tokenizer: Any = None,
        image_size: int = 0,
        positions_per_frame: int = 0,
        num_frames: int = 4,
        max_length: int | None = None,
        template: ChatTemplate | dict[str, Any] | str = "vilau",
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        for name, value in (
            ("image_size", image_size),
            ("positions_per_frame", positions_per_frame),
            ("num_frames", num_frames),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"the processor's {name} is {value!r}: it must be a whole number of at least 1")
        if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
            raise ValueError(f"the processor's max_length is {max_length!r}: it must be at least 1, or absent")
        if chat_template is not None:
            raise ValueError("a Jinja chat_template is not supported: set template, which says where pictures stand")
        self.image_size = image_size
        self.positions_per_frame = positions_per_frame
        self.num_frames = num_frames
        self.max_length = max_length
        self.template = template if isinstance(template, ChatTemplate) else ChatTemplate.from_dict(template)
        placeholder_id(tokenizer)
        self._longest_token = max(map(len, tokenizer.get_vocab()))
        for token in self.template.special_tokens:
            if special_id(tokenizer, token) in encode_text(tokenizer, token):
                raise ValueError(
                    f"the tokenizer does not treat {token!r} as special, so users could inject it: "
                    "add it as a special token"
                )

    # ---- files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> VilaUProcessor:
        """Load from a folder of our layout or of the released one, or from a hub id of either.

        ``ValueError`` names the file that is missing or the setting that is unknown.
        """
        from ..checkpoints.layout import HUB_OPTIONS, PROCESSOR_FILES, find_layout, resolve

        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        subfolder = kwargs.pop("subfolder", None) or ""
        for name in _PIPELINE_KEYS:
            kwargs.pop(name, None)
        folder = resolve(pretrained_model_name_or_path, subfolder, PROCESSOR_FILES, **hub)
        if (folder / "config.json").is_file() and find_layout(folder) == "released":
            from ..checkpoints.released_processor import load_released_processor

            return load_released_processor(folder)
        if not (folder / "processor_config.json").is_file():
            raise ValueError(f"{folder} holds no processor_config.json: it is not a folder that save_pretrained wrote")
        return super().from_pretrained(str(folder), *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {
            **{name: getattr(self, name) for name in SETTINGS},
            "template": self.template.to_dict(),
            "processor_class": type(self).__name__,
        }

    @staticmethod
    def validate_init_kwargs(
        processor_config: dict[str, Any], valid_kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Unknown settings are errors, with the nearest known name (the library would drop them silently)."""
        unused, valid = ProcessorMixin.validate_init_kwargs(processor_config, valid_kwargs)
        for key in unused:
            if key not in _LIBRARY_KEYS and not key.startswith("_"):
                near = difflib.get_close_matches(key, SETTINGS, n=1)
                hint = f": did you mean {near[0]!r}?" if near else f": known are {', '.join(SETTINGS)}"
                raise ValueError(f"the processor has no setting {key!r}{hint}")
        return unused, valid

    @property
    def model_input_names(self) -> list[str]:
        """The names of what ``apply_chat_template`` gives."""
        return ["input_ids", "kinds", "attention_mask", "pixel_values", "unconditional_ids"]

    @property
    def context_length(self) -> int | None:
        """Positions that a prompt and its answer may take together; None without a limit."""
        if self.max_length is not None:
            return self.max_length
        limit = self.tokenizer.model_max_length
        return int(limit) if limit is not None and limit < _NO_LIMIT else None

    # ---- in

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        generation_mode: GenerationMode | None = "text",
        **kwargs: Any,
    ) -> BatchFeature:
        """One user's message -> model inputs; with a list of texts, one conversation each.

        images, videos: one or a list of them (a film made of pictures must stand in a list of films); with a list of
        texts, one such list (or None) per text. As in ``apply_chat_template`` otherwise.
        """
        if isinstance(text, list | tuple):
            rows = zip(text, _per_row(images, len(text), "images"), _per_row(videos, len(text), "videos"), strict=True)
            batch = [user_message(words, _listed(shown), _listed(films)) for words, shown, films in rows]
            return self.apply_chat_template(batch, generation_mode, **kwargs)
        return self.apply_chat_template(
            user_message(text or "", _listed(images), _listed(videos)), generation_mode, **kwargs
        )

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        generation_mode: GenerationMode | None = "text",
        *,
        add_generation_prompt: bool = True,
        num_frames: int | None = None,
        padding_side: Literal["left", "right"] = "left",
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        continue_final_message: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
    ) -> BatchFeature:
        """Messages -> model inputs, for one conversation or a batch of them.

        conversation: ``[{"role": "system" | "user" | "assistant", "content": str or parts}, ...]`` with parts
        ``{"type": "text", "text": str}``, ``{"type": "image", "image": path, bytes, PIL or array}`` and
        ``{"type": "video", "video": path, bytes or list of pictures}``.
        generation_mode: what the answer shall be; None (or ``add_generation_prompt=False``) opens no answer.

        Gives ``input_ids`` ``(B, L)`` int64, ``kinds`` ``(B, L)`` int64 of ``PositionKind``, ``attention_mask`` ``(B,
        L)`` int64, and, if there are pictures, ``pixel_values`` ``(I, 3, S, S)`` float32 in [-1, 1] in row-major order
        of appearance.
        ``ValueError``: unknown roles or types, an empty prompt, unreadable media, a prompt that with its answer exceeds
        the context.
        """
        if not (tokenize and return_dict and return_tensors in ("pt", None)):
            raise ValueError(
                "apply_chat_template gives a dictionary of torch tensors only: "
                "leave tokenize, return_dict and return_tensors out"
            )
        if continue_final_message:
            raise ValueError("an answer that was begun cannot be continued: end the conversation with a user message")
        if processor_kwargs:  # where the library's pipelines put what is meant for the processor
            given = {"num_frames": num_frames, "padding_side": padding_side} | dict(processor_kwargs)
            return self.apply_chat_template(
                conversation, generation_mode, add_generation_prompt=add_generation_prompt, **given
            )
        if generation_mode is not None and generation_mode not in GENERATION_MODES:
            raise ValueError(
                f"unknown generation_mode {generation_mode!r}: choose one of {', '.join(GENERATION_MODES)}"
            )
        mode = generation_mode if add_generation_prompt else None
        batch: Sequence[Any] = conversation if is_batch(conversation) else [conversation]
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}: choose 'left' or 'right'")
        inputs = self._tensors(
            [self._encode(messages, mode, num_frames or self.num_frames) for messages in batch], padding_side
        )
        if mode in ("image", "video"):
            inputs["unconditional_ids"] = self.unconditional(mode)["input_ids"]
        elif mode == "interleaved":  # a film's differ in their last token alone
            inputs["unconditional_ids"] = self.unconditional("image")["input_ids"]
        return inputs

    def unconditional(self, generation_mode: GenerationMode, batch: int = 1) -> BatchFeature:
        """The prompt without a condition, ``batch`` times: what classifier-free guidance subtracts (METHOD, section
        2)."""
        if batch < 1:
            raise ValueError(f"batch is {batch}: it must be at least 1")
        one = encode_prompt(
            unconditional_turns(), self.tokenizer, self.template, self.positions_per_frame, generation_mode
        )
        return self._tensors([one] * batch, "left")

    def encode_sample(self, sample: Sample, drop_text: bool = False) -> EncodedSample:
        """A training sample with this processor's tokenizer and template; see ``encode.encode_sample``."""
        return encode_sample(sample, self.tokenizer, self.template, self.positions_per_frame, drop_text)

    def _encode(self, messages: Sequence[Message], mode: GenerationMode | None, num_frames: int) -> EncodedSample:
        check_messages(messages, mode)
        limit = self.context_length
        media, frames = count_frames(messages, num_frames)
        if limit is not None and frames * self.positions_per_frame > limit:
            raise ValueError(
                f"{media} pictures and films take {frames * self.positions_per_frame} positions, "
                f"more than the context of {limit}: show fewer"
            )
        characters = count_characters(messages)
        if limit is not None and characters > limit * self._longest_token:
            raise ValueError(
                f"the prompt has {characters} characters, which are more tokens than the context of {limit}: "
                "shorten the text"
            )
        turns = to_turns(messages, self.image_size, num_frames, mode)
        encoded = encode_prompt(turns, self.tokenizer, self.template, self.positions_per_frame, mode)
        answer = {
            "text": 1,
            "interleaved": 1,
            "image": self.positions_per_frame,
            "video": num_frames * self.positions_per_frame,
            None: 0,
        }[mode]
        if limit is not None and len(encoded) + answer > limit:
            raise ValueError(
                f"the prompt has {len(encoded)} tokens and its answer needs at least {answer}, "
                f"more than the context of {limit}: shorten the text, show fewer pictures or drop earlier messages"
            )
        return encoded

    def _tensors(self, rows: Sequence[EncodedSample], side: str) -> BatchFeature:
        length = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), length), placeholder_id(self.tokenizer), dtype=torch.int64)
        kinds = torch.full((len(rows), length), int(PositionKind.PAD), dtype=torch.int64)
        for index, row in enumerate(rows):
            start = length - len(row) if side == "left" else 0
            input_ids[index, start : start + len(row)] = torch.from_numpy(row.input_ids)
            kinds[index, start : start + len(row)] = torch.from_numpy(row.kinds.astype(np.int64))
        data = {"input_ids": input_ids, "kinds": kinds, "attention_mask": (kinds != int(PositionKind.PAD)).long()}
        frames = [row.frames for row in rows if len(row.frames)]
        if frames:
            data["pixel_values"] = torch.from_numpy(pictures.normalise(np.concatenate(frames)))
        return BatchFeature(data)

    # ---- out

    def batch_decode(  # type: ignore[override]
        self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Ids ``(B, L)`` -> texts, special tokens left out."""
        return list(self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs))

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:  # type: ignore[override]
        """Ids ``(L,)`` -> text, special tokens left out."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs))

    def to_content(self, parts: Sequence[Any]) -> list[dict[str, Any]]:
        """Parts of an interleaved answer -> the content of a message: texts, pictures, and films as lists of pictures.

        What it gives can be an assistant's ``content`` in the conversation that goes on.
        """
        content: list[dict[str, Any]] = []
        for part in parts:
            if part.kind == "text":
                words = self.decode(part.token_ids).strip()
                content.extend([{"type": "text", "text": words}] if words else [])
            else:
                frames = self.to_pil(part.pixel_values)
                content.append({"type": part.kind, part.kind: frames[0] if part.kind == "image" else frames})
        return content

    def to_pil(self, pixel_values: torch.Tensor | np.ndarray) -> list[Image.Image]:
        """``pixel_values`` ``(I, 3, S, S)`` in [-1, 1], clamped and rounded -> pictures."""
        if isinstance(pixel_values, torch.Tensor):
            pixel_values = pixel_values.detach().to("cpu", torch.float32).numpy()
        return pictures.to_pil(pictures.to_pixels(pixel_values))

    def to_films(
        self, pixel_values: torch.Tensor | np.ndarray, num_frames: int | None = None
    ) -> list[list[Image.Image]]:
        """``pixel_values`` ``(B * frames, 3, S, S)``, or ``(B, frames, 3, S, S)`` -> the frames of each film."""
        if pixel_values.ndim == 5:
            num_frames = pixel_values.shape[1]
            pixel_values = pixel_values.reshape(-1, *pixel_values.shape[2:])
        frames = num_frames or self.num_frames
        if pixel_values.shape[0] % frames:
            raise ValueError(f"{pixel_values.shape[0]} pictures are no whole number of films of {frames} frames")
        flat = self.to_pil(pixel_values)
        return [flat[start : start + frames] for start in range(0, len(flat), frames)]


def _listed(media: Any) -> list[Any]:
    """None, one medium, or a list of media -> a list."""
    return [] if media is None else list(media) if isinstance(media, list | tuple) else [media]


def _per_row(media: Any, rows: int, name: str) -> Sequence[Any]:
    if media is None:
        return [None] * rows
    if not isinstance(media, list | tuple) or len(media) != rows:
        given = len(media) if isinstance(media, list | tuple) else 1
        raise ValueError(f"{given} entries of {name} for {rows} texts: give one entry (a list, or None) per text")
    return media


def build_processor(
    tokenizer: Any, config: Any, template: ChatTemplate | Mapping[str, Any] | str = OURS
) -> VilaUProcessor:
    """The processor that fits a model's ``VilaUConfig``: sizes from the configuration, nothing repeated by hand."""
    return VilaUProcessor(
        tokenizer,
        image_size=int(config.vision_config.image_size),
        positions_per_frame=int(config.vision_config.num_positions),
        num_frames=int(config.num_frames),
        max_length=config.context_length,
        template=template if isinstance(template, ChatTemplate | str) else dict(template),
    )
