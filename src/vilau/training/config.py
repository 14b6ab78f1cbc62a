"""The training configuration: strict YAML, where a wrong key is an error that names the nearest right one."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import TypedDict, is_typeddict

from vilau.data.sources.nano import NanoConfig
from vilau.data.sources.registry import FORMATS, find_format, format_names
from vilau.data.sources.source import SourceConfig
from vilau.errors import first_line
from vilau.processing.augment import AugmentConfig
from vilau.processing.images import MAX_PIXELS

StageName = Literal["align", "vision_tower", "pretrain", "sft"]
if TYPE_CHECKING:
    AnySource = SourceConfig
else:
    AnySource = Annotated[Union[FORMATS], Field(discriminator="format")]  # noqa: UP007 - of a tuple

LENGTHS = ("steps", "epochs", "tokens")
STAGE_ORDER: tuple[StageName, ...] = ("align", "vision_tower", "pretrain", "sft")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OptimizerConfig(_Strict):
    """AdamW for everything, or Muon for the hidden matrices beside AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    muon_lr: float = Field(0.02, gt=0, description="peak learning rate of Muon, for hidden matrices")
    lr_scales: dict[str, float] = Field(default_factory=dict, description="regular expression -> factor on lr")
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(50, ge=0)
    final_lr: float = Field(0.05, ge=0, le=1, description="share of the peak at the end of the cosine")
    clip_norm: float = Field(1.0, gt=0)


class ScaleConfig(_Strict):
    """How steps are spread over processes, micro-batches and hardware; `docs/scale.md` says what each switch costs."""

    sharding: Literal["ddp", "fsdp"] = Field("ddp", description="several processes: whole copies (DDP) or FSDP2")
    cpu_offload: bool = Field(False, description="with fsdp: shards rest in the CPU's memory")
    bucket_mb: float = Field(25.0, gt=0, description="with ddp: gradients that travel together")
    accumulate: int = Field(1, ge=1, description="micro-batches per step and process")
    precision: Literal["float32", "bf16"] = "float32"
    allow_slow: bool = Field(False, description="bf16 also where it is slower than float32")
    gradient_checkpointing: bool = Field(False, description="compute blocks again in the backward pass")
    compile: bool = Field(False, description="torch.compile, block by block")
    attention: Literal["sdpa", "flash_attention_2", "flex_attention", "eager"] | None = Field(
        None, description="of the language model in pretrain and sft; as the library chooses, mostly sdpa, if absent"
    )


class StageConfig(_Strict):
    """What every stage has: how long, how large, how fast, and from which weights."""

    steps: int | None = Field(None, ge=1, description="how long; or in its place `epochs` or `tokens`")
    epochs: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="how long: so many times as many samples as its sources hold"
    )
    tokens: int | None = Field(None, ge=1, description="how long, in pretrain and sft: positions without padding")
    batch_size: int = Field(..., ge=1, description="samples per step over all processes")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    mixture: dict[str, float] = Field(
        default_factory=dict,
        description="nano data form -> weight; with `data.sources`: name -> weight, all by their own weights if empty",
    )
    freeze: list[str] = Field(default_factory=list, description="regular expressions of parameters kept as they are")
    init_from: str | None = Field(
        None, description="folder of a finished stage or model, or `shipped`; the stage before this one if absent"
    )
    scale: ScaleConfig | None = Field(None, description="in place of the run's `scale`")

    @model_validator(mode="after")
    def _has_one_length(self) -> StageConfig:
        given = [f"{name} {value}" for name in LENGTHS if (value := getattr(self, name)) is not None]
        if len(given) != 1:
            which = f"{' and '.join(given)}: take the others away (null)" if given else "none of them"
            raise ValueError(f"how long it is must be said by one of {', '.join(LENGTHS)}, not by {which}")
        return self

    @property
    def length(self) -> str:
        """How long the stage is, as it was given: ``2,000,000 tokens``."""
        name = next(name for name in reversed(LENGTHS) if getattr(self, name) is not None)
        value = getattr(self, name)
        number = f"{value:g}" if isinstance(value, float) else f"{value:,}"
        return f"{number} {name if value != 1 else name.removesuffix('s')}"

    @property
    def num_steps(self) -> int:
        """The number of steps, where it is given or was worked out (`training/length.py`)."""
        assert self.steps is not None, f"how many steps {self.length} are is not worked out yet"
        return self.steps


class DiscriminatorConfig(_Strict):
    """Sizes of the PatchGAN discriminator; RQ-VAE has 2 layers, VQGAN 3."""

    channels: int = Field(64, ge=1)
    layers: int = Field(2, ge=1, description="convolutions with stride 2")
    groups: int = Field(32, ge=1, description="groups of every GroupNorm")


class DiscriminatorOptimizerConfig(OptimizerConfig):
    """The same fields with RQ-VAE's values as defaults: a constant, low rate and little momentum."""

    lr: float = Field(4e-5, gt=0, description="peak learning rate of AdamW")
    betas: tuple[float, float] = (0.5, 0.9)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    final_lr: float = Field(1.0, ge=0, le=1, description="share of the peak at the end of the cosine")


class TowerStageConfig(StageConfig):
    """Stages `align` and `vision_tower`: the losses of eq. (1), what learns, and from which weights."""

    init_parts: list[str] = Field(
        default_factory=list, description="regular expressions of what init_from gives; everything if empty"
    )
    init_siglip: str | None = Field(None, description="SigLIP or SigLIP 2 checkpoint: a folder or a hub id")
    siglip_parts: list[str] = Field(
        default_factory=lambda: ["^image_encoder", "^text_encoder", "^logit_"],
        description="regular expressions of what init_siglip gives",
    )
    train_text_encoder: bool = False
    train_image_encoder: bool = True
    weight_ema: float = Field(0.0, ge=0, lt=1, description="decay of averaged weights, which are exported; 0: none")

    contrastive: Literal["sigmoid", "softmax"] = "sigmoid"
    contrastive_weight: float = Field(1.0, ge=0, description="0: reconstruction only, no captions needed")
    reconstruction_weight: float = Field(1.0, ge=0, description="of pixels, perceptual, adversarial and commitment")
    reconstruction_share: float = Field(1.0, gt=0, le=1, description="share of the samples that are reconstructed")
    pixel_loss: Literal["l1", "l2"] = "l2"
    pixel_weight: float = Field(1.0, ge=0)
    perceptual: Literal["lpips", "siglip", "none"] = "none"
    perceptual_weight: float = Field(1.0, ge=0)
    perceptual_layers: list[int] = Field(
        default_factory=list, description="encoder layers of `siglip`, 1 being the first; four evenly spaced if empty"
    )
    lpips_weights: list[str] = Field(
        default_factory=list, description="local weight files of `lpips`; the packages lpips and torchvision if empty"
    )
    adversarial_weight: float = Field(0.0, ge=0, description="times the adaptive weight; 0: no discriminator")
    adversarial_start: int = Field(0, ge=0, description="0-based step at which discriminator and its loss begin")
    adversarial_limit: float = Field(1e4, gt=0, description="largest adaptive weight")
    discriminator: DiscriminatorConfig = Field(default_factory=DiscriminatorConfig)
    discriminator_optimizer: DiscriminatorOptimizerConfig = Field(default_factory=DiscriminatorOptimizerConfig)

    @model_validator(mode="after")
    def _counts_no_tokens(self) -> TowerStageConfig:
        if self.tokens is not None:
            raise ValueError(f"tokens {self.tokens} are counted in pretrain and sft only: give steps or epochs here")
        return self

    @model_validator(mode="after")
    def _has_no_packed_rows(self) -> TowerStageConfig:
        if self.scale is not None and self.scale.attention is not None:
            raise ValueError(
                f"scale.attention {self.scale.attention} is of the language model, in pretrain and sft: leave it out"
            )
        return self


class LoraConfig(_Strict):
    """Low-rank adapters in place of training every weight (Hu et al. 2021)."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1, description="the adapter's output counts alpha / rank times")
    dropout: float = Field(0.0, ge=0, lt=1)
    layers: str = Field(
        r"(language_model|depth_transformer)\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
        r"|query|key|value|out|fc1|fc2)",
        description="regular expression that matches the whole name of each linear layer to adapt",
    )
    also: list[str] = Field(default_factory=list, description="modules trained whole beside them, such as projector")


class LanguageStageConfig(StageConfig):
    """Stages `pretrain` and `sft`: the mixture of data forms and the two losses of section 3.2."""

    jitter: float = Field(0.0, ge=0, description="random shift of objects, up to so many 1/32 of the side")
    row_length: int = Field(128, ge=16, description="positions per packed row")
    text_dropout: float = Field(0.1, ge=0, le=1, description="share of prompts emptied for guidance")
    supervise: Literal["latter", "both"] = Field("latter", description="loss on the latter modality, or on both")
    text_weight: float = Field(1.0, ge=0)
    visual_weight: float = Field(1.0, ge=0)
    visual_share: float = Field(
        1.0, gt=0, le=1, description="share of visual positions whose codes are in the loss, drawn anew each step"
    )
    fused_loss: bool | None = Field(None, description="logits in pieces, never whole in memory; where large if absent")
    init_language_model: str | None = Field(
        None, description="folder or hub id of a causal language model to start from, beside a tower in init_from"
    )
    codes: str | None = Field(None, description="folder made by `vilau data codes`: no pixel is read")
    lora: LoraConfig | None = Field(None, description="train adapters only; the whole model if absent")


class Stages(TypedDict, total=False):
    """The stages of a run by name; those that are absent are not trained."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    align: TowerStageConfig
    vision_tower: TowerStageConfig
    pretrain: LanguageStageConfig
    sft: LanguageStageConfig


class DataConfig(_Strict):
    """What is read: sources of one's own, or else the nano world; and how."""

    sources: list[AnySource] = Field(
        default_factory=list, description="data as it lies; `docs/data.md` has the formats"
    )
    validation: list[AnySource] = Field(
        default_factory=list, description="pairs that towers are measured on, none of them in `sources`"
    )
    tokenizer: str | None = Field(None, description="folder or hub id of a tokenizer; the nano world's if absent")
    template: str = Field("vilau", description="chat template where no model brings one: vilau, vicuna_v1")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="of the tower's pictures from sources")
    max_skipped_share: float = Field(0.05, ge=0, le=1, description="the run stops above this share of bad samples")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="larger pictures are bad samples of kind too_large")
    cache: str | None = Field(None, description="folder for indices of data files; beside them if absent")
    workers: int = Field(1, ge=0, description="loader processes per training process")

    world: str | None = Field(None, description="folder made by `vilau data nano`; the shipped sprites if absent")
    objects: int = Field(48, ge=4, le=48)
    styles: list[str] = Field(default_factory=lambda: ["noto"])

    @model_validator(mode="after")
    def _is_the_world_of_its_sources(self) -> DataConfig:
        """Sources of format nano have this world, objects and styles where they name none of their own."""
        for source in (*self.sources, *self.validation):
            if isinstance(source, NanoConfig):
                world = {"path": self.world or "", "objects": self.objects, "styles": list(self.styles)}
                for name in world.keys() - source.model_fields_set:
                    setattr(source, name, world[name])
        return self


class SamplesConfig(_Strict):
    """What a language stage shows of itself at intervals; sensible prompts and pictures of the data if all is empty."""

    prompts: list[str] = Field(default_factory=list, description="pictures to draw")
    films: list[str] = Field(default_factory=list, description="films to make")
    pictures: list[str] = Field(default_factory=list, description="files of pictures to describe")
    questions: list[str] = Field(default_factory=list, description="asked about each of the pictures")


class TrainConfig(_Strict):
    """One run: a model, its data and the stages to train, in order."""

    name: str
    output: str = Field(..., description="folder of the run: checkpoints, logs, finished stages")
    seed: int = 0
    threads: int | None = Field(None, ge=1, description="CPU threads per process")
    model: dict[str, Any] = Field(
        default_factory=dict, description="fields of VilaUConfig; not needed where all stages start from a whole model"
    )
    text_encoder: dict[str, Any] = Field(
        default_factory=dict, description="fields of the SigLIP text encoder of stages 1; no such encoder if empty"
    )
    data: DataConfig = Field(default_factory=DataConfig)
    stages: Stages
    scale: ScaleConfig = Field(default_factory=ScaleConfig)
    skip_spikes: float = Field(
        0.0, ge=0, description="leave out updates whose gradient norm is above so many times the recent median; 0: none"
    )
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    log_every: int = Field(10, ge=1)
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    sample_every: int = Field(500, ge=1, description="steps between sample pictures")
    samples: SamplesConfig = Field(default_factory=SamplesConfig)
    validate_every: int = Field(500, ge=0, description="steps between validations of a tower; 0: none, not at the end")
    validation_samples: int = Field(512, ge=2, description="pictures of a validation, none of them shown in training")
    validation_extractor: str = Field("judge", description="features of the Fréchet distance: judge, or TorchScript")
    keep_checkpoints: int = Field(2, ge=2)

    @model_validator(mode="after")
    def _moves_objects_in_one_place(self) -> TrainConfig:
        for name, stage in self.stages.items():
            if self.data.sources and isinstance(stage, LanguageStageConfig) and stage.jitter:
                raise ValueError(
                    f"stages.{name}.jitter {stage.jitter:g} has no effect with data.sources: give it to a source of "
                    "format nano, and set this one to 0"
                )
        return self

    @model_validator(mode="after")
    def _knows_its_epochs(self) -> TrainConfig:
        for name, stage in self.stages.items():
            if not self.data.sources and isinstance(stage, StageConfig) and stage.epochs is not None:
                raise ValueError(
                    f"stages.{name}.epochs {stage.epochs:g}: the nano world has no end where it is not a source; give "
                    "steps, or name it under data.sources ({format: nano, samples: 100000})"
                )
        return self


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Read a YAML configuration and apply dotted overrides such as ``stages.sft.steps=100``.

    A file with the key ``base`` names another one, relative to itself, that it changes: groups are merged key by key,
    lists and values replaced, and ``null`` takes a key of the base away. Of `steps`, `epochs` and `tokens` of a stage
    the one that is said last counts: in the file rather than in its base, and in the last override.

    Raises:
        ValueError: unreadable file, wrong key (the nearest right one is named) or a value out of range.
    """
    raw = _read(Path(path), ())
    for override in overrides:
        _apply_override(raw, override)
    try:
        return TrainConfig.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{path}: " + "; ".join(_explain(item) for item in error.errors())) from error


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Return the mapping of a file, merged into that of its base; `above` are the files that led here."""
    if path.resolve() in above:
        raise ValueError(f"{path} is its own base, directly or through others; remove the key 'base' from one of them")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {first_line(error)}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values")
    if "base" not in raw:
        return raw
    base = raw.pop("base")
    if not isinstance(base, str):
        raise ValueError(f"{path}: base must be the path of one file, got {base!r}")
    return _merged(_read(path.parent / base, (*above, path.resolve())), raw, path)


def _merged(base: dict[str, Any], changes: dict[str, Any], path: Path, where: str = "") -> dict[str, Any]:
    result = {**base}
    if where.startswith("stages.") and where.count(".") == 2 and any(changes.get(name) is not None for name in LENGTHS):
        result = {key: value for key, value in base.items() if key not in LENGTHS}
    for key, value in changes.items():
        name = f"{where}{key}"
        if value is None:
            if key not in base:
                raise ValueError(f"{path}: null takes {name!r} away, but its base has no such key")
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(base.get(key), dict):
            result[key] = _merged(base[key], value, path, f"{name}.")
        else:
            result[key] = value
    return result


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} must look like key=value, for example stages.sft.steps=100")
    node: Any = raw
    parts = key.split(".")
    for part in parts[:-1]:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]  # as in data.sources.0.path
        else:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict | list):
            raise ValueError(f"override {override!r}: {part!r} is a value, not a group of keys")
    if not isinstance(node, dict):
        raise ValueError(f"override {override!r}: name the entry of the list by its number, and then its key")
    try:
        node[parts[-1]] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML") from error
    if parts[0] == "stages" and len(parts) == 3 and parts[2] in LENGTHS and node[parts[2]] is not None:
        for name in set(LENGTHS) - {parts[2]}:
            node.pop(name, None)


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "union_tag_not_found":
        return f"{where}.format is missing: one of {', '.join(format_names())}"
    if item["type"] == "union_tag_invalid":
        near = difflib.get_close_matches(str(item["ctx"]["tag"]), format_names(), 1, 0.0)
        return f"{where}.format: there is no format {item['ctx']['tag']!r}; did you mean {near[0]!r}?"
    if item["type"] == "value_error" and isinstance(item["input"], dict | BaseModel):  # of a group of keys
        return ": ".join(filter(None, (where, str(item["ctx"]["error"]))))
    if item["type"] != "extra_forbidden":
        return (
            f"{where}: {item['msg'].lower()} (got {item['input']!r})"
            if item["type"] != "missing"
            else (f"{where} is missing")
        )
    near = difflib.get_close_matches(str(item["loc"][-1]), _known_keys(item["loc"][:-1]), 1, 0.0)
    return f"unknown key {where!r}; did you mean {near[0]!r}?"


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    """Return the keys that may stand in the group of the configuration at `path`."""
    group: Any = TrainConfig
    if path[:2] in (("data", "sources"), ("data", "validation")) and len(path) > 3:  # then its number and its format
        group, path = find_format(str(path[3])), path[4:]
    for part in path:
        for kind in (_fields(group).get(str(part), group), *get_args(_fields(group).get(str(part), group))):
            if _fields(kind):
                group = kind
                break
    return list(_fields(group))


def _fields(kind: Any) -> dict[str, Any]:
    """Return name and type of the fields of a group of keys; nothing for a plain value."""
    if is_typeddict(kind):
        return get_type_hints(kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    return {}
