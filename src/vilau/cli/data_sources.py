"""What `vilau data inspect` and `check` share: sources of a configuration or a path, and how training reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from vilau.data.mixture import Entry
    from vilau.data.sample import Sample
    from vilau.data.sources.source import SourceConfig
    from vilau.processing.encode import EncodedSample, Supervise
    from vilau.processing.processor import VilaUProcessor
    from vilau.training.config import LanguageStageConfig, TrainConfig

FORMAT_HELP = "The data's format, where its content does not tell; `docs/data.md` has the names."
SET_HELP = "A field of the format or, with a configuration, a key of it; may be given several times."


@dataclass(frozen=True)
class Reader:
    """Sources to look at, and the processor that makes model inputs of their samples.

    `problems` are sources that could not be opened at all. `row_length` is the longest row of any stage, None without a
    configuration. `text_length` is how many tokens the text encoder of the tower's stages reads, None without them;
    with `pairs_only`, the configuration has no other stages. Without `needs_captions`, pictures alone will do.
    """

    entries: list[Entry]
    problems: list[str]
    processor: VilaUProcessor
    row_length: int | None
    text_length: int | None
    pairs_only: bool
    supervise: Supervise = "latter"
    needs_captions: bool = True

    def encode(self, sample: Sample) -> EncodedSample:
        """Encode a sample as training does; ``BadSample`` where training would skip it."""
        from vilau.data.sources.source import BadSample
        from vilau.processing.augment import fit_sample
        from vilau.processing.encode import encode_sample

        processor = self.processor
        fitted = fit_sample(sample, processor.image_size)
        try:
            return encode_sample(
                fitted,
                processor.tokenizer,
                processor.template,
                processor.positions_per_frame,
                supervise=self.supervise,
                max_length=self.row_length,
            )
        except BadSample:
            raise
        except ValueError as error:
            raise BadSample("bad_record", str(error)) from error

    def __call__(self, sample: Sample) -> None:
        """Do with a sample what the stages do before they compute."""
        from vilau.data.feed import pair_of

        if self.pairs_only:
            pair_of(sample, self.needs_captions)
        else:
            self.encode(sample)

    def describe(self, sample: Sample) -> list[str]:
        """Lines that say what the model sees of a sample and what it learns from it."""
        from vilau.data.feed import PAIRED_FORMS, pair_of
        from vilau.processing.encode import encode_text
        from vilau.processing.explain import describe, written

        lines = []
        tokenizer = self.processor.tokenizer
        if not self.pairs_only:
            lines += describe(self.encode(sample), tokenizer, self.processor.positions_per_frame)
        if self.text_length is not None and sample.form in PAIRED_FORMS:
            tokens = encode_text(tokenizer, pair_of(sample, self.needs_captions)[1])
            kept = " | ".join(written(tokenizer, token) for token in tokens[: self.text_length])
            lines.append(f"{sample.id}: the tower's text encoder reads {min(len(tokens), self.text_length)} of")
            lines[-1] += f" {len(tokens)} tokens (its limit is {self.text_length}): {kept}"
        return lines


def open_reader(path: Path, format_name: str | None, settings: Sequence[str], model: str | None) -> Reader:
    """Open the sources of a YAML configuration, or of one file or folder of data.

    Raises:
        ValueError, FileNotFoundError: nothing is there, its format is unknown, or a setting is wrong.
    """
    if path.suffix in (".yaml", ".yml"):
        return _of_configuration(path, settings)
    return _of_path(path, format_name, settings, model)


def _of_configuration(path: Path, overrides: Sequence[str]) -> Reader:
    from vilau.training.config import STAGE_ORDER, LanguageStageConfig, load_config

    config = load_config(path, list(overrides))
    if not config.data.sources:
        raise ValueError(
            f"{path} reads the nano world, which is made while training: there are no files to look at; with "
            "`--set data.sources=[{format: nano}]` it is a source like others"
        )
    stages = [config.stages[name] for name in STAGE_ORDER if name in config.stages]
    speaking = [stage for stage in stages if isinstance(stage, LanguageStageConfig)]
    processor = _processor_of(config, speaking[0] if speaking else None)
    frames, limit, cache = processor.num_frames, config.data.max_pixels, config.data.cache
    contrast = any(isinstance(stage, LanguageStageConfig) or stage.contrastive_weight > 0 for stage in stages)
    entries, problems = _open(config.data.sources, processor.image_size, frames, limit, cache, contrast)
    text_length = None
    if len(speaking) < len(stages) and contrast:
        text_length = int(config.text_encoder.get("max_position_embeddings", 64))  # SigLIP's own default
    row_length = max((stage.row_length for stage in speaking), default=None)
    supervise = speaking[0].supervise if speaking else "latter"
    return Reader(entries, problems, processor, row_length, text_length, not speaking, supervise, contrast)


def _processor_of(config: TrainConfig, stage: LanguageStageConfig | None) -> VilaUProcessor:
    """The processor that the first language stage trains with: of the model it starts from, or as configured."""
    from vilau.processing.processor import VilaUProcessor, build_processor
    from vilau.processing.templates import ChatTemplate
    from vilau.training import language_model
    from vilau.training.data import load_tokenizer
    from vilau.training.language_init import starting_folder
    from vilau.training.model_config import build_config

    template = ChatTemplate.from_dict(config.data.template)
    if stage is not None and stage.init_from:
        folder = starting_folder(stage.init_from)
        if (folder / "processor_config.json").is_file():
            return VilaUProcessor.from_pretrained(folder)
    if stage is not None and stage.init_language_model:
        path = config.data.tokenizer or stage.init_language_model
        tokenizer = language_model.load_tokenizer(path, template)
    else:
        tokenizer = load_tokenizer(config)
    return build_processor(tokenizer, build_config(config, tokenizer), template)


def _of_path(path: Path, format_name: str | None, settings: Sequence[str], model: str | None) -> Reader:
    from pydantic import ValidationError

    from vilau.data.sources.registry import detect_format, find_format
    from vilau.processing.images import MAX_PIXELS
    from vilau.processing.processor import VilaUProcessor
    from vilau.shipped import find_model

    name = format_name or str(detect_format(path).format)
    kind = find_format(name)
    fields: dict[str, Any] = {"format": name, "path": str(path)}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or key not in kind.model_fields:
            raise ValueError(f"--set {setting!r}: format {name} has the fields {', '.join(kind.model_fields)}")
        fields[key] = yaml.safe_load(value)
    try:
        source = kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"--set {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    processor = VilaUProcessor.from_pretrained(find_model(model))
    entries, problems = _open([source], processor.image_size, processor.num_frames, MAX_PIXELS, None)
    return Reader(entries, problems, processor, None, None, False)


def _open(
    sources: Sequence[SourceConfig],
    size: int,
    num_frames: int,
    max_pixels: int,
    cache: str | None,
    needs_captions: bool = True,
) -> tuple[list[Entry], list[str]]:
    from vilau.data.mixture import Entry
    from vilau.data.sources.source import ReadOptions

    options = ReadOptions(
        num_frames,
        max_pixels,
        cache=Path(cache) if cache else None,
        needs_captions=needs_captions,
        image_size=size,
    )
    entries, problems = [], []
    for source in sources:
        try:
            entries.append(Entry(source.open(options), forms=source.ways_round))
        except ValueError as error:
            problems.append(str(error))
    return entries, problems
