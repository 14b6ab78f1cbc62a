"""Endless samples of the nano world: sample ``i`` is a pure function of the seed, the split and ``i``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vilau.data.nano import scenes as drawn
from vilau.data.nano.dialogues import talk
from vilau.data.nano.draw import Draw
from vilau.data.nano.easy import EasyVqa
from vilau.data.nano.edits import animation, edit, mixed, render_animation
from vilau.data.nano.questions import Question, ask, ask_film, ask_pair, ask_several
from vilau.data.nano.scenes import MOTIONS, RELATIONS, Film, Scene, render, render_film
from vilau.data.nano.stories import examples, story
from vilau.data.nano.texts import as_typed, caption, description, film_caption, film_prompt, prompt
from vilau.data.nano.world import HELDOUT, SPLITS, World, check_split, is_heldout
from vilau.data.sample import Form, Part, Sample, Turn, image, text, video

FORM_OF: dict[str, Form] = {
    "image_text": "image_text",
    "text_image": "text_image",
    "text_video": "text_video",
    "interleaved": "interleaved",
    "in_context": "interleaved",
    "question": "question",
    "multi_turn": "question",
    "multi_image": "question",
    "easy_vqa": "question",
    "video_text": "video_text",
    "text": "text",
}
BEYOND_FORM_OF: dict[str, Form] = {"edit": "image_edit", "animate": "image_video", "mixed": "mixed"}  # not in the paper
ALL_FORM_OF: dict[str, Form] = FORM_OF | BEYOND_FORM_OF
DRAWN_SCENES = {"single": 0.76, "small": 0.08, "count": 0.08, "relation": 0.08}
ASKED_SCENES = {"single": 0.52, "small": 0.12, "count": 0.18, "relation": 0.18}


def pick_scene(
    world: World, draw: Draw, split: str, kinds: Mapping[str, float], *, jitter: float = 0.0, style: str | None = None
) -> Scene:
    """A scene of the split, of one of the kinds as likely as their weights say."""
    kind = draw.weighted(kinds)
    style = style or draw.among(world.styles)
    if kind == "relation":
        pairs = world.pairs(split)
        if pairs:
            names = draw.some(draw.among(pairs), 2)
            allowed = [c for c in world.colours if split == HELDOUT or not any(is_heldout(name, c) for name in names)]
            return drawn.relation(names[0], draw.among(RELATIONS), names[1], draw.among(allowed), style)
        kind = "single"
    name, background = draw.among(world.combinations(split))
    if kind == "count":
        return drawn.count(name, 2 + draw.below(3), background, style)
    if kind == "small":
        return drawn.small(name, background, style, shift=draw.shift(jitter))
    return drawn.single(name, background, style, shift=draw.shift(jitter))


def pick_film(world: World, draw: Draw, split: str, *, jitter: float = 0.0) -> Film:
    """A film of the split."""
    name, background = draw.among(world.combinations(split))
    return Film(background, name, draw.among(MOTIONS), draw.among(world.styles), draw.shift(jitter))


def _facts(scene: Scene, world: World) -> dict[str, Any]:
    return {
        "scene": scene.kind,
        "object": scene.object,
        "objects": [item.object for item in scene.items],
        "background": scene.background,
        "relation": scene.relation,
        "caption": caption(scene, world),
    }


def _user(*parts: Part) -> Turn:
    return Turn("user", parts)


def _assistant(*parts: Part) -> Turn:
    return Turn("assistant", parts)


class NanoDataset:
    """Samples of the nano world in given shares.

    Args:
        world: objects, styles, colours.
        mixture: share of each key of ``ALL_FORM_OF``; need not sum to one. ``easy_vqa`` needs the package ``easy-vqa``.
        split: ``train`` or ``heldout`` (only combinations, pairs and questions that training never shows).
        seed: names the stream; another seed, other samples.
        image_size: side of every picture and frame in pixels.
        num_frames: frames of a film.
        jitter: single and small objects and films are moved by up to so many thirty-seconds of the side.
        size: length of the dataset.
        drawn_scenes, asked_scenes: shares of scene kinds (single, small, count, relation) in pictures with captions,
            and under questions.

    Raises:
        ValueError: a key, a share, a size or the split is none, or a package is missing.
    """

    def __init__(
        self,
        world: World,
        mixture: Mapping[str, float],
        split: str = "train",
        seed: int = 0,
        image_size: int = 32,
        num_frames: int = 4,
        jitter: float = 0.0,
        size: int = 1_000_000,
        *,
        drawn_scenes: Mapping[str, float] | None = None,
        asked_scenes: Mapping[str, float] | None = None,
    ) -> None:
        unknown = [key for key in mixture if key not in ALL_FORM_OF]
        if unknown:
            raise ValueError(f"mixture has the unknown key {unknown[0]!r}: use {', '.join(ALL_FORM_OF)}")
        if not mixture or min(mixture.values()) < 0 or sum(mixture.values()) <= 0:
            raise ValueError(f"mixture {dict(mixture)} needs shares of 0 or more, at least one of them above 0")
        for name, number in (("image_size", image_size), ("num_frames", num_frames), ("size", size)):
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        self.world, self.split, self.seed, self.size = world, check_split(split), seed, size
        self.mixture = {key: float(share) for key, share in mixture.items() if share > 0}
        self.image_size, self.num_frames, self.jitter = image_size, num_frames, jitter
        self.drawn_scenes = dict(drawn_scenes or DRAWN_SCENES)
        self.asked_scenes = dict(asked_scenes or ASKED_SCENES)
        self.easy = EasyVqa("test" if split == HELDOUT else "train", image_size) if "easy_vqa" in self.mixture else None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} is out of range: the dataset has {self.size}")
        draw = Draw(self.seed, SPLITS.index(self.split), index)
        key = draw.weighted(self.mixture)
        turns, facts = getattr(self, f"_{key}")(draw)
        return Sample(f"nano-{self.split}-{self.seed}-{index}", ALL_FORM_OF[key], turns, {"key": key, **facts})

    def _scene(self, draw: Draw, kinds: Mapping[str, float]) -> Scene:
        return pick_scene(self.world, draw, self.split, kinds, jitter=self.jitter)

    def _picture(self, scene: Scene) -> Part:
        return image(render(scene, self.world, self.image_size))

    def _video(self, film: Film) -> Part:
        return video(render_film(film, self.world, self.image_size, self.num_frames))

    def _image_text(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        scene = self._scene(draw, self.drawn_scenes)
        said = description(scene, self.world, draw)
        return (_user(self._picture(scene)), _assistant(text(said))), _facts(scene, self.world)

    def _text_image(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        scene = self._scene(draw, self.drawn_scenes)
        asked = prompt(scene, self.world, draw)
        return (_user(text(asked)), _assistant(self._picture(scene))), {**_facts(scene, self.world), "prompt": asked}

    def _text_video(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        film = pick_film(self.world, draw, self.split, jitter=self.jitter)
        asked = film_prompt(film, draw)
        return (_user(text(asked)), _assistant(self._video(film))), {**_film_facts(film), "prompt": asked}

    def _document(self, pieces: list[str | Scene]) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        parts = tuple(text(piece) if isinstance(piece, str) else self._picture(piece) for piece in pieces)
        shown = [[piece.object, piece.background] for piece in pieces if isinstance(piece, Scene)]
        return (Turn("document", parts),), {"scenes": shown}

    def _interleaved(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        return self._document(story(self.world, draw, self.split, draw.among(self.world.styles)))

    def _in_context(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        return self._document(examples(self.world, draw, self.split, draw.among(self.world.styles)))

    def _question(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        scene = self._scene(draw, self.asked_scenes)
        asked = ask(scene, self.world, draw)
        turns = (_user(self._picture(scene), text(as_typed(asked.question, draw))), _assistant(text(asked.answer)))
        return turns, {**_facts(scene, self.world), **_asked(asked)}

    def _multi_turn(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        scene = self._scene(draw, self.asked_scenes)
        asked = ask_several(scene, self.world, draw, 2 + draw.below(2))
        turns = [_user(self._picture(scene), text(asked[0].question)), _assistant(text(asked[0].answer))]
        for one in asked[1:]:
            turns += [_user(text(one.question)), _assistant(text(one.answer))]
        return tuple(turns), {**_facts(scene, self.world), **_asked(asked[-1])}

    def _multi_image(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        first = self._scene(draw, {"single": 1.0})
        choices = self.world.combinations(self.split)
        same = draw.below(4)  # 0: same object, 1: same background, else any other picture
        if same < 2:
            wanted = (first.object, first.background)[same]
            choices = tuple(pair for pair in choices if pair[same] == wanted)
        name, background = draw.among(choices)
        second = drawn.single(name, background, first.items[0].style, shift=draw.shift(self.jitter))
        asked = ask_pair(first, second, self.world, draw)
        turns = (
            _user(self._picture(first), self._picture(second), text(asked.question)),
            _assistant(text(asked.answer)),
        )
        return turns, {"scenes": [[first.object, first.background], [name, background]], **_asked(asked)}

    def _video_text(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        film = pick_film(self.world, draw, self.split, jitter=self.jitter)
        asked = ask_film(film, self.world, draw)
        turns = (_user(self._video(film), text(as_typed(asked.question, draw))), _assistant(text(asked.answer)))
        return turns, {**_film_facts(film), **_asked(asked)}

    def _text(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        turns: list[Turn] = []
        for _ in range(2 if draw.chance(0.2) else 1):
            kind, asked, answer = talk(self.world, draw, self.split)
            turns += [_user(text(as_typed(asked, draw))), _assistant(text(answer))]
        return tuple(turns), {"question_kind": kind, "question": asked, "answer": answer}

    def _edit(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        style, shift = draw.among(self.world.styles), draw.shift(self.jitter)
        change = edit(self.world, draw, self.split, style, shift)
        turns = (_user(self._picture(change.before), text(change.instruction)), _assistant(self._picture(change.after)))
        facts = {"edit": change.kind, "instruction": change.instruction, "before": caption(change.before, self.world)}
        return turns, {**_facts(change.after, self.world), **facts}

    def _animate(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        style, shift = draw.among(self.world.styles), draw.shift(self.jitter)
        film, instruction = animation(self.world, draw, self.split, style, shift)
        frames = render_animation(film, self.world, self.image_size, self.num_frames)
        turns = (_user(image(frames[0]), text(instruction)), _assistant(video(frames)))
        return turns, {**_film_facts(film), "instruction": instruction}

    def _mixed(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        asked = mixed(self.world, draw, self.split, draw.among(self.world.styles))
        shown = () if asked.shown is None else (self._picture(asked.shown),)
        answer = [text(piece) if isinstance(piece, str) else self._picture(piece) for piece in asked.answer]
        facts = {
            "request": asked.request,
            "request_kind": asked.kind,
            "scenes": [[piece.object, piece.background] for piece in asked.answer if isinstance(piece, Scene)],
            "answer": [piece if isinstance(piece, str) else caption(piece, self.world) for piece in asked.answer],
        }
        return (_user(*shown, text(asked.request)), _assistant(*answer)), facts

    def _easy_vqa(self, draw: Draw) -> tuple[tuple[Turn, ...], dict[str, Any]]:
        assert self.easy is not None
        question, answer, number = self.easy.questions[draw.below(len(self.easy.questions))]
        turns = (_user(image(self.easy.picture(number)), text(question)), _assistant(text(answer)))
        kind = "easy_vqa_yes_no" if answer in ("yes", "no") else "easy_vqa_open"
        return turns, {"question_kind": kind, "question": question, "answer": answer, "picture": number}


def _asked(question: Question) -> dict[str, Any]:
    return {"question_kind": question.kind, "question": question.question, "answer": question.answer, **question.facts}


def _film_facts(film: Film) -> dict[str, Any]:
    return {"object": film.object, "background": film.background, "motion": film.motion, "caption": film_caption(film)}


class ImageTextDataset:
    """Pictures with captions for the stages of the vision tower: more positions and sizes than a language model needs.

    Args:
        world, split, seed, image_size, size: as for :class:`NanoDataset`.
        easy_vqa: share of easy-VQA pictures (in the held-out split its test pictures); above 0 needs that package.
        films: share of single frames out of films.

    ``dataset[i]`` is ``(pixels (S, S, 3) uint8, caption)``.
    """

    def __init__(
        self,
        world: World,
        split: str = "train",
        seed: int = 0,
        image_size: int = 32,
        size: int = 1_000_000,
        *,
        easy_vqa: float = 0.1,
        films: float = 0.12,
        jitter: float = 2.0,
    ) -> None:
        if not 0 <= easy_vqa + films <= 1 or min(easy_vqa, films) < 0:
            raise ValueError(f"easy_vqa={easy_vqa} and films={films} are shares: each at least 0, together at most 1")
        self.world, self.split, self.seed, self.image_size, self.size = (
            world,
            check_split(split),
            seed,
            image_size,
            size,
        )
        self.shares = {"easy": easy_vqa, "film": films, "scene": 1.0 - easy_vqa - films}
        self.jitter = jitter
        self.easy = EasyVqa("test" if split == HELDOUT else "train", image_size) if easy_vqa > 0 else None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        if not 0 <= index < self.size:
            raise IndexError(f"picture {index} is out of range: the dataset has {self.size}")
        draw = Draw(self.seed, 2 + SPLITS.index(self.split), index)
        kind = draw.weighted(self.shares)
        if kind == "easy":
            assert self.easy is not None
            number = self.easy.pictures[draw.below(len(self.easy.pictures))]
            return self.easy.picture(number), self.easy.caption(number)
        if kind == "film":
            film = pick_film(self.world, draw, self.split, jitter=self.jitter)
            scene = drawn.film_scene(film, float(draw.generator.random()))
            return render(scene, self.world, self.image_size), caption(scene, self.world)
        scene = pick_scene(self.world, draw, self.split, DRAWN_SCENES, jitter=self.jitter if draw.chance(0.6) else 0.0)
        if scene.kind == "single" and draw.chance(0.5):
            item, (background, style) = scene.items[0], (scene.background, scene.items[0].style)
            scene = drawn.single(
                item.object, background, style, shift=(item.cx - 0.5, item.cy - 0.5), size=(20 + draw.below(9)) / 32
            )
        return render(scene, self.world, self.image_size), caption(scene, self.world)
