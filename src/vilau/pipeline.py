"""The short way in: load a model with its processor, then draw, film and ask.

    import vilau
    model = vilau.load()
    model.draw("a red apple on a blue background")[0].save("apple.png")

`Pipeline` adds nothing to `VilaUForConditionalGeneration` and `VilaUProcessor` but the joining of the two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from vilau.errors import first_line
from vilau.model import VilaUForConditionalGeneration
from vilau.processing.processor import VilaUProcessor
from vilau.processing.templates import GenerationMode
from vilau.processing.videos import media_kind
from vilau.shipped import find_model

DESCRIBE_FILM = (
    "describe the film."  # a picture alone is asked to be described; in training a film always has a question
)

Progress = Callable[[int, int], None]
Medium = str | os.PathLike[str] | Image.Image | Sequence[Image.Image]


class Pipeline:
    """A model and its processor.

    Sampling settings (``guidance_scale``, ``temperature``, ``top_k``, ``top_p``, ``seed``) that are not given are the
    model's own. ``progress`` is called with (positions done, positions in all).
    """

    def __init__(self, model: VilaUForConditionalGeneration, processor: VilaUProcessor) -> None:
        self.model = model
        self.processor = processor

    def draw(
        self, prompt: str | Sequence[str], n: int = 1, progress: Progress | None = None, **sampling: Any
    ) -> list[Image.Image]:
        """Draw ``n`` pictures of a prompt; of a list of prompts in one batch, in which ``seed`` may be a list too."""
        out = self._generate("image", prompt, n, progress, sampling)
        return self.processor.to_pil(out.pixel_values)

    def film(
        self,
        prompt: str | Sequence[str],
        n: int = 1,
        num_frames: int | None = None,
        progress: Progress | None = None,
        **sampling: Any,
    ) -> list[list[Image.Image]]:
        """Make ``n`` films of a prompt, or of each in a list; each is the list of its frames."""
        frames = num_frames or self.processor.num_frames
        sampling = {**sampling, "num_frames": frames}
        out = self._generate("video", prompt, n, progress, sampling)
        return self.processor.to_films(out.pixel_values, frames)

    def ask(
        self,
        media: Medium | Sequence[Medium] = (),
        question: str | None = None,
        num_frames: int | None = None,
        **generation: Any,
    ) -> str:
        """Answer a question about pictures and films; without a question describe them, without media just talk.

        media: a path or a picture, or a list of them; a film is a path or a list of pictures inside the list.
        """
        return self.chat(question_about(media, question), num_frames, **generation)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        num_frames: int | None = None,
        max_new_tokens: int = 128,
        **generation: Any,
    ) -> str:
        """Continue a conversation of ``{"role", "content"}`` messages with the assistant's text."""
        inputs = self.processor.apply_chat_template(messages, generation_mode="text", num_frames=num_frames)
        limit = self.processor.context_length
        if limit is not None:
            max_new_tokens = min(max_new_tokens, limit - inputs["input_ids"].shape[1])
        generation.setdefault("do_sample", False)
        ids = self.model.generate(
            **inputs.to(self.model.device), generation_mode="text", max_new_tokens=max_new_tokens, **generation
        )
        return self.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()

    def converse(
        self,
        messages: Sequence[dict[str, Any]],
        num_frames: int | None = None,
        max_new_tokens: int = 128,
        max_pictures: int = 4,
        **generation: Any,
    ) -> list[dict[str, Any]]:
        """Continue a conversation with an answer that may mix text, pictures and films.

        It comes as the content of the assistant's message: texts ``{"type": "text", "text": str}``, pictures ``{"type":
        "image", "image": PIL}`` and films ``{"type": "video", "video": list of PIL}`` in order. ``num_frames`` is of
        films that are read and made. ``generation``: the further arguments of the model's `generate_mixed`.
        """
        inputs = self.processor.apply_chat_template(messages, generation_mode="interleaved", num_frames=num_frames)
        answers: Any = self.model.generate(
            **inputs.to(self.model.device),
            generation_mode="interleaved",
            max_new_tokens=max_new_tokens,
            max_pictures=max_pictures,
            num_frames=num_frames,
            **generation,
        )
        return self.processor.to_content(answers[0].parts)

    def _generate(
        self,
        mode: GenerationMode,
        prompt: str | Sequence[str],
        n: int,
        progress: Progress | None,
        sampling: dict[str, Any],
    ) -> Any:
        if n < 1:
            raise ValueError(f"n is {n}: it must be at least 1")
        frames = {"num_frames": sampling["num_frames"]} if "num_frames" in sampling else {}
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        messages = [_user({"type": "text", "text": text}) for text in prompts]
        inputs = self.processor.apply_chat_template(messages, generation_mode=mode, **frames)
        if "unconditional_ids" not in inputs:
            inputs["unconditional_ids"] = self.processor.unconditional(mode)["input_ids"]
        return self.model.generate(
            **inputs.to(self.model.device),
            generation_mode=mode,
            num_images_per_prompt=n,
            progress=progress,
            **{name: value for name, value in sampling.items() if value is not None},
        )


def load(
    model: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: Any = None,
    quantize: str | None = None,
) -> Pipeline:
    """Load a model and its processor; the shipped model unless a folder or a hub id is given.

    device: `cpu`, `cuda`, `cuda:1`, `mps`; absent, the GPU if there is one. dtype: float32 on a CPU and as stored
    elsewhere, unless given. quantize: `int8` for the language model and the depth transformer (`docs/int8.md`).

    Raises:
        ValueError: no such model, a file of it is missing or broken, or there is no such device.
    """
    target = choose_device(device)
    name = str(find_model(model))
    try:
        network, loaded = VilaUForConditionalGeneration.from_pretrained(
            name,
            dtype=dtype or ("float32" if target.type == "cpu" else "auto"),
            quantize=quantize,
            output_loading_info=True,
        )
        processor = VilaUProcessor.from_pretrained(name)
    except Exception as error:
        raise ValueError(f"cannot load the model {name}: {first_line(error)}") from error
    missing = sorted(loaded.get("missing_keys", ())) + sorted(str(key) for key in loaded.get("mismatched_keys", ()))
    if missing:
        raise ValueError(
            f"cannot load the model {name}: {len(missing)} of its tensors are missing or have the wrong shape, "
            f"the first is {missing[0]}; fetch or train it again"
        )
    return Pipeline(network.eval().to(target), processor)


def choose_device(device: str | None) -> torch.device:
    """Return the device of this name; the GPU if there is one for ``None`` and ``auto``, under torchrun one's own."""
    if device in (None, "auto"):
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local = os.environ.get("LOCAL_RANK")
        return torch.device("cuda") if local is None else torch.device("cuda", int(local) % torch.cuda.device_count())
    try:
        target = torch.device(str(device))
        torch.empty(0, device=target)
    except Exception as error:
        known = str(device).partition(":")[0] in ("cpu", "cuda", "mps")
        reason = "there is none here" if known else "use cpu, cuda, cuda:1 ... or mps"
        raise ValueError(f"cannot use the device {device!r}: {reason}") from error
    return target


def question_about(media: Medium | Sequence[Medium] = (), question: str | None = None) -> list[dict[str, Any]]:
    """Return the messages of a question about pictures and films; without a question, a film's is to describe it."""
    items = [media] if isinstance(media, str | os.PathLike | Image.Image) else list(media)
    parts = [_medium(item) for item in items]
    if question is None and any(part["type"] == "video" for part in parts):
        question = DESCRIBE_FILM
    if question is not None:
        parts.append({"type": "text", "text": question})
    return _user(*parts)


def _user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def _medium(item: Any) -> dict[str, Any]:
    if isinstance(item, list | tuple):
        return {"type": "video", "video": list(item)}
    if isinstance(item, Image.Image):
        return {"type": "image", "image": item}
    kind = media_kind(item)
    return {"type": kind, kind: item}
