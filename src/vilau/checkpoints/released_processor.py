"""The processor of a released folder: its own tokenizer, sizes from its configuration, the released prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from vilau.checkpoints.released_config import read_config
from vilau.checkpoints.shards import read_json
from vilau.configuration import VilaUConfig
from vilau.processing.processor import VilaUProcessor, build_processor

TEMPLATE = "vicuna_v1"
VISUAL_TOKENS = ("<im_start>", "<im_end>", "<vi_start>", "<vi_end>")


def load_released_processor(folder: Path) -> VilaUProcessor:
    """Return the processor of a released folder.

    A ``processor_config.json`` beside ``config.json`` may name another chat template than the released one.

    Raises:
        ValueError: no tokenizer, or one without the four visual tokens at the end of the vocabulary.
    """
    config = read_config(folder)
    settings = folder / "processor_config.json"
    template: Any = read_json(settings).get("template", TEMPLATE) if settings.is_file() else TEMPLATE
    tokenizer = load_tokenizer(folder / "llm")
    if template == TEMPLATE:
        check_visual_tokens(tokenizer, config, folder / "llm")
    return build_processor(tokenizer, config, template)


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder; ``ValueError`` if there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise ValueError(f"{folder} holds no tokenizer: expected tokenizer.model or tokenizer.json; fetch it again")
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ValueError(
            f"cannot read the tokenizer in {folder}: it is no SentencePiece model or tokenizer.json "
            f"({lines[0] if lines else type(error).__name__}); fetch it again"
        ) from error


def check_visual_tokens(tokenizer: Any, config: VilaUConfig, folder: Path) -> None:
    """Raise ValueError unless the four visual tokens are the ids that the configuration says."""
    expected = (config.image_start_id, config.image_end_id, config.video_start_id, config.video_end_id)
    vocabulary = tokenizer.get_vocab()
    found = {token: vocabulary.get(token) for token in VISUAL_TOKENS}
    if tuple(found.values()) != expected:
        raise ValueError(
            f"the tokenizer in {folder} does not fit: {', '.join(VISUAL_TOKENS)} must be the ids "
            f"{', '.join(map(str, expected))} (the last four rows of the vocabulary), but they are "
            f"{', '.join('absent' if i is None else str(i) for i in found.values())}; use the checkpoint's own "
            "tokenizer"
        )
