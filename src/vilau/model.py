"""VilaUForConditionalGeneration: what users load, save and generate with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    GenerationMixin,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from vilau.checkpoints.auto import register_released
from vilau.checkpoints.int8 import Int8Config, check_quantization, quantize_model
from vilau.checkpoints.loading import load_pretrained
from vilau.configuration import DepthTransformerConfig, PositionKind, VilaUConfig, VisionTowerConfig
from vilau.generation.compiled import visual_step
from vilau.generation.interleaved import InterleavedOptions, InterleavedOutput, generate_interleaved
from vilau.generation.position import Prompts
from vilau.generation.sampling import SamplingOptions, row_seeds
from vilau.generation.visual import Progress, VisualRequest, run_codes
from vilau.modeling.int8 import is_int8
from vilau.modeling.vila_u import VilaULosses, VilaUModel
from vilau.modeling.vision_tower import VisionTower

GENERATION_MODES = ("text", "image", "video", "interleaved")


@dataclass(frozen=True)
class VisualOutput:
    """Generated pictures or videos.

    Pictures: `codes` (N, P, D), `pixel_values` (N, 3, S, S) in [-1, 1]. Videos: `codes` (N, F, P, D), `pixel_values`
    (N, F, 3, S, S). `N` is the number of prompts times the number of pictures per prompt, prompt by prompt.
    """

    codes: torch.Tensor
    pixel_values: torch.Tensor


class VilaUForConditionalGeneration(VilaUModel, GenerationMixin):
    """The unified model with generation of text, pictures and videos.

    The default sampling of visual codes stands in `generation_config` and is saved with the model:
    `visual_guidance_scale`, `visual_temperature`, `visual_top_k`, `visual_top_p`. The names are their own because the
    library takes a plain `guidance_scale` for guidance of text.
    """

    def __init__(self, config: VilaUConfig) -> None:
        super().__init__(config)
        self.generation_config._from_model_config = False  # else loading drops the visual settings that were saved

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Load from a folder of our layout or of the released one, or from a hub id of either.

        Takes what the library's `from_pretrained` takes: `dtype`, `device_map`, `attn_implementation`, `revision`,
        `token`, `cache_dir`, `local_files_only`, `subfolder`, `quantization_config` and so on; and `quantize="int8"`,
        which quantises layer by layer while it reads (`docs/int8.md`).

        Raises:
            ValueError: the folder is of neither layout, a file is missing or damaged, or tensors and configuration
                do not fit; nothing is half-loaded.
        """
        quantize = kwargs.pop("quantize", None)
        if quantize is not None:
            check_quantization(quantize)
            kwargs["quantization_config"] = Int8Config()
        return load_pretrained(cls, super().from_pretrained, pretrained_model_name_or_path, args, kwargs)

    def quantize(self, name: str = "int8") -> VilaUForConditionalGeneration:
        """Turn the language model's body and the depth transformer into `int8` in place; return the model.

        For evaluation only: a quantised model is neither trained nor cast, but saved and loaded like any other.

        Raises:
            ValueError: an unknown name, a model that is quantised already or has LoRA adapters.
        """
        quantize_model(self, name)
        return self

    def train(self, mode: bool = True) -> Any:
        """Refuse to train a quantised model, before any part of it changes."""
        if mode and is_int8(self):
            raise ValueError("a quantised model cannot be trained: train the float model and quantise the result")
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Refuse to cast a quantised model: its scales are float32, and what is not int8 keeps its dtype."""
        if is_int8(self) and fn(torch.empty(0, dtype=torch.float32, device="cpu")).dtype != torch.float32:
            raise ValueError("a quantised model cannot be cast: load it with the dtype wanted and quantize='int8'")
        return super()._apply(fn, recurse)

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        kinds: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return text logits ``(B, L, vocabulary)`` of a mixed sequence; for training see `losses`.

        Args:
            input_ids, kinds: ``(B, L)``; `kinds` may be absent for text alone.
            codes or pixel_values: the pictures in order of appearance.
            inputs_embeds: ``(B, L, H)`` in place of all of these.
            position_ids: restarting per packed sample, without `attention_mask`; samples then do not see each other.
            use_cache: absent, a cache is extended if one was given and none is made otherwise.
            logits_to_keep: compute logits for the last so many positions only; 0 means all.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids, kinds, codes, pixel_values)
        if use_cache is None:  # the library's default would make a cache, with which packed samples leak
            use_cache = past_key_values is not None
        output = self.language_model.base_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        hidden = output.last_hidden_state[:, -logits_to_keep:] if logits_to_keep else output.last_hidden_state
        return CausalLMOutputWithPast(
            logits=self.get_output_embeddings()(hidden), past_key_values=output.past_key_values
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        kinds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        codes: torch.Tensor | None = None,
        generation_mode: str = "text",
        **kwargs: Any,
    ) -> torch.Tensor | VisualOutput | list[InterleavedOutput]:
        """Continue left-padded prompts with text, a picture, a video, or an answer that mixes them.

        Args:
            input_ids, kinds, attention_mask, pixel_values: as the processor returns them.
            generation_mode: `text`, `image`, `video` or `interleaved`.
            kwargs: for text, everything that the library's own `generate` knows; for pictures and videos the
                arguments of `generate_visual` and `visual_request`; for mixed answers those of `generate_mixed`.

        Returns:
            New token ids ``(B, T)`` for text, a `VisualOutput` for pictures and videos, an `InterleavedOutput` for each
            prompt whose answer may mix them.
        """
        if generation_mode not in GENERATION_MODES:
            raise ValueError(f"generation_mode is {generation_mode!r}; it must be one of {', '.join(GENERATION_MODES)}")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids) if kinds is None else (kinds != PositionKind.PAD).long()
        embeds = self.embed(input_ids, kinds, codes, pixel_values)
        if generation_mode == "text":
            kwargs.pop("unconditional_ids", None)
            return GenerationMixin.generate(self, inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)  # type: ignore
        if generation_mode == "interleaved":
            return self.generate_mixed(embeds, attention_mask, **kwargs)
        return self.generate_visual(embeds, attention_mask, generation_mode == "video", **kwargs)

    def generate_mixed(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        unconditional_ids: torch.Tensor | None = None,
        max_new_tokens: int = 256,
        max_pictures: int = 4,
        text_temperature: float = 0.0,
        text_top_k: int = 0,
        text_top_p: float = 1.0,
        seed: int = 0,
        num_frames: int | None = None,
        **visual: Any,
    ) -> list[InterleavedOutput]:
        """Return answers of text, pictures and films for prompts ``inputs_embeds`` (B, L, H) whose answer is open.

        Args:
            unconditional_ids: ``(1, U)`` as for pictures; of films the last token is exchanged.
            max_new_tokens, max_pictures, seed: see `InterleavedOptions`.
            text_temperature, text_top_k, text_top_p: of text; the likeliest token by default.
            num_frames: frames of a film; absent, the configuration's.
            visual: the further arguments of `generate_visual`, for every picture and film.

        Raises:
            ValueError: a value out of its range, guidance without `unconditional_ids`, or a prompt that fills the
                context.
        """
        text = SamplingOptions(1.0, text_temperature, text_top_k, text_top_p)
        options = InterleavedOptions(max_new_tokens, max_pictures, text, seed)
        scale = visual.get("guidance_scale")
        if unconditional_ids is None and max_pictures and (scale or self.visual_defaults().guidance_scale) != 1:
            raise ValueError("guidance needs unconditional_ids (the processor adds them); or set guidance_scale=1")

        def draw(prompt: torch.Tensor, video: bool, seed: int) -> VisualOutput:
            empty = unconditional_ids
            if video and empty is not None:
                empty = torch.cat([empty[:, :-1], torch.full_like(empty[:, -1:], self.config.video_start_id)], 1)
            mask = attention_mask.new_ones(prompt.shape[:2])
            frames = num_frames if video else None
            return self.generate_visual(prompt, mask, video, frames, unconditional_ids=empty, seed=seed, **visual)

        positions = self.config.vision_config.num_positions * (num_frames or self.config.num_frames)
        return generate_interleaved(self, inputs_embeds, attention_mask, draw, positions, options)

    def visual_defaults(self) -> SamplingOptions:
        """Return this model's default sampling of visual codes."""
        stored = self.generation_config
        base = SamplingOptions()
        names = {
            "guidance_scale": "visual_guidance_scale",
            "temperature": "visual_temperature",
            "top_k": "visual_top_k",
            "top_p": "visual_top_p",
        }
        values = {ours: getattr(stored, theirs, None) for ours, theirs in names.items()}
        return SamplingOptions(**{n: getattr(base, n) if v is None else v for n, v in values.items()})

    @torch.no_grad()
    def generate_visual(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        video: bool,
        num_frames: int | None = None,
        progress: Progress | None = None,
        kernel: str | None = None,
        compile: bool = False,
        **sampling: Any,
    ) -> VisualOutput:
        """Return pictures or videos for prompts ``inputs_embeds`` (B, L, H) that end with a visual start token.

        Args:
            num_frames: frames of a video; absent, the configuration's.
            progress: called with (positions done, total); returning ``False`` cancels.
            kernel: how weights lie in memory on a CPU, `plain`, `mkldnn` or `mkl`; absent, the fastest in a trial where
                that is worth a copy of at most 2 GiB (see `vilau.generation.prepared`).
            compile: run each position as one compiled function (CPU) or captured graph (CUDA); compiling takes about a
                minute, once for each number of pictures.
            sampling: the further arguments of `visual_request`.
        """
        request = self.visual_request(inputs_embeds, attention_mask, video, num_frames, **sampling)
        step = visual_step(self, len(request.prompts.rows), kernel, compile)
        codes = run_codes(step, request, progress)
        rows, frames = len(codes), request.positions // request.per_picture
        codes = codes.unflatten(1, (frames, -1))  # (N, F, P, D)
        pixels = self.vision_tower.decode(codes.flatten(0, 1)).unflatten(0, (rows, frames))
        return VisualOutput(codes, pixels) if video else VisualOutput(codes[:, 0], pixels[:, 0])

    @torch.no_grad()
    def visual_request(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        video: bool,
        num_frames: int | None = None,
        unconditional_ids: torch.Tensor | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | Sequence[int] = 0,
        num_images_per_prompt: int = 1,
        guidance_schedule: str = "constant",
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> VisualRequest:
        """Return what the visual loop is to do for prompts ``inputs_embeds`` (B, L, H): see `generate_visual`.

        Args:
            unconditional_ids: ``(1, U)`` ids of the prompt without its text; needed unless `guidance_scale` is 1.
            guidance_scale: of all prompts, or a list with that of each.
            temperature, top_k, top_p, guidance_schedule, guidance_interval: see `SamplingOptions`; absent, the model's
                defaults.
            seed: any integer; the same seed gives the same codes. A list has one for each prompt, which is then drawn
                as it would be alone.
            num_images_per_prompt: pictures (or videos) for each prompt; they share its reading.

        Raises:
            ValueError: a value is out of its range, prompt and pictures exceed the model's context, or the model reads
                continuous tokens and cannot draw.
        """
        self.check_draws()
        count, copies = len(inputs_embeds), num_images_per_prompt
        if copies < 1:
            raise ValueError(f"num_images_per_prompt is {copies}; it must be at least 1")
        if num_frames is not None and num_frames < 1:
            raise ValueError(f"num_frames is {num_frames}; it must be at least 1")
        per_picture = self.config.vision_config.num_positions
        positions = per_picture * ((num_frames or self.config.num_frames) if video else 1)
        limit = self.config.context_length
        if limit is not None and inputs_embeds.shape[1] + positions > limit:
            raise ValueError(
                f"the prompt's {inputs_embeds.shape[1]} positions and the {positions} to generate exceed the context "
                f"of {limit}; shorten the prompt or ask for fewer frames"
            )
        scales = _one_for_each("guidance_scale", guidance_scale, count)
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        changes |= {"guidance_schedule": guidance_schedule, "guidance_interval": tuple(guidance_interval)}
        base = replace(self.visual_defaults(), **changes)
        options = [base if scale is None else replace(base, guidance_scale=scale) for scale in scales]
        prompts = self._prompts(inputs_embeds, attention_mask, unconditional_ids, options, copies)
        if isinstance(seed, int):
            seeds = row_seeds(seed, count * copies, inputs_embeds.device)
        else:
            own = _one_for_each("seed", seed, count)
            seeds = torch.cat([row_seeds(int(s), copies, inputs_embeds.device) for s in own])
        return VisualRequest(prompts, positions, per_picture, [o for o in options for _ in range(copies)], seeds)

    def _prompts(
        self,
        embeds: torch.Tensor,
        mask: torch.Tensor,
        unconditional_ids: torch.Tensor | None,
        options: Sequence[SamplingOptions],
        copies: int,
    ) -> Prompts:
        """Return each prompt once, and the unconditional one once for all pictures that are guided."""
        conditional = [number for number in range(len(embeds)) for _ in range(copies)]
        guided = [option.guidance_scale != 1 for option in options for _ in range(copies)]
        if any(guided):
            if unconditional_ids is None:
                raise ValueError("guidance needs unconditional_ids (the processor adds them); or set guidance_scale=1")
            embeds, mask = self._add_unconditional(embeds, mask, unconditional_ids, 1)
        last = len(embeds) - 1
        return Prompts(embeds, mask, conditional, [last if g else None for g in guided])

    def _add_unconditional(
        self, embeds: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor, rows: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stack unconditional rows, as many as given ones if not told, under these, all left-padded to one length."""
        empty = self.embed(ids[:1]).expand(len(embeds) if rows is None else rows, -1, -1)
        empty_mask = mask.new_ones(empty.shape[:2])
        length = max(embeds.shape[1], empty.shape[1])
        padded = [_pad_left(e, length) for e in (embeds, empty)]
        masks = [_pad_left(m, length) for m in (mask, empty_mask)]
        return torch.cat(padded), torch.cat(masks)


def _one_for_each(name: str, value: Any, count: int) -> list[Any]:
    """Return ``count`` values from one for all or a list with one for each."""
    if value is None or isinstance(value, int | float):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} values for {count} prompts; give one, or one for each")
    return values


def _pad_left(rows: torch.Tensor, length: int) -> torch.Tensor:
    missing = length - rows.shape[1]
    if not missing:
        return rows
    return torch.cat([rows.new_zeros((len(rows), missing, *rows.shape[2:])), rows], 1)


def register() -> None:
    """Make the Auto classes of `transformers` know this model; harmless when called again."""
    from vilau.processing.processor import VilaUProcessor

    for config in (VilaUConfig, VisionTowerConfig, DepthTransformerConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(VisionTowerConfig, VisionTower, exist_ok=True)
    AutoModel.register(VilaUConfig, VilaUForConditionalGeneration, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(VilaUConfig, VilaUForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(VilaUConfig, VilaUProcessor, exist_ok=True)
    register_released(VilaUForConditionalGeneration, VilaUProcessor)


__all__ = ["VilaUForConditionalGeneration", "VilaULosses", "VisualOutput", "register"]
