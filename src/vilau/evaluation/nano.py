"""The nano suite: what a model can do on combinations of object and background that training never showed.

`run_suite` gives metrics, the ceilings beside them, how many items each had, and the protocol that produced them.
Everything is a function of the model and the seed, so a repeat gives the same figures.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vilau.data.nano.dataset import ImageTextDataset, NanoDataset
from vilau.data.nano.draw import Draw
from vilau.data.nano.easy import EasyVqa
from vilau.data.nano.scenes import MOTIONS, Film, Scene, render, render_film, single, small
from vilau.data.nano.texts import caption, film_caption
from vilau.data.nano.world import HELDOUT, TRAIN, World, check_split
from vilau.evaluation.judge import Judge
from vilau.evaluation.metrics import blind_baselines, mean, named, psnr, same_answer, share
from vilau.evaluation.motion import judge_motion
from vilau.evaluation.nearest import NearestRender
from vilau.evaluation.subject import Sampling, Subject, question_and_answer, weights_digest
from vilau.evaluation.text_gap import visual_cross_entropy
from vilau.modeling.int8 import is_int8
from vilau.pipeline import load
from vilau.shipped import find_model

Progress = Callable[[str], None]
SUITE_VERSION = 1
CAPTION_TOKENS, ANSWER_TOKENS = 24, 24
EASY_TOKENS = 4


@dataclass(frozen=True)
class Counts:
    """Items per metric without a limit. Descriptions have one item per held-out combination, easy-VQA all its test
    questions."""

    shifted: int = 240
    drawings: int = 384
    films: int = 192
    questions: int = 480
    pairs: int = 96
    film_questions: int = 192
    chat: int = 192
    pictures: int = 768
    text_gap: int = 384

    def limited(self, limit: int | None) -> Counts:
        """The same with none above the limit."""
        if limit is None:
            return self
        return Counts(**{name: min(value, limit) for name, value in asdict(self).items()})


@dataclass
class Suite:
    """One evaluation in progress: the subject, its world, and the figures so far."""

    subject: Subject
    world: World
    judge: Judge
    split: str
    seed: int
    limit: int | None
    counts: Counts
    say: Progress
    metrics: dict[str, float | None] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: float | None, items: int) -> None:
        """Keep a figure."""
        self.metrics[name], self.samples[name] = None if value is None else round(value, 4), items

    def add_share(self, name: str, right: Sequence[bool]) -> None:
        """Keep a share of right ones."""
        self.add(name, share(right), len(right))

    def ceiling(self, name: str, right: Sequence[bool]) -> None:
        """Keep the ceiling of a metric."""
        if (value := share(right)) is not None:
            self.ceilings[name] = round(value, 4)

    def draw(self, stream: int) -> Draw:
        """A stream of random choices that belongs to this seed, split and purpose."""
        return Draw(1709, self.seed, int(self.split == HELDOUT), stream)

    def combinations(self, stream: int) -> list[tuple[str, str]]:
        """All (object, background) of the split in random order; of the training split as many as are held out."""
        pairs = self.world.combinations(self.split)
        chosen = self.draw(stream).some(pairs, len(self.world.combinations(HELDOUT)))
        return chosen[: self.limit]

    def render(self, scene: Scene) -> np.ndarray:
        """Pixels of a scene at the model's size."""
        return render(scene, self.world, self.subject.image_size)

    def dataset(self, key: str, items: int) -> NanoDataset:
        """Samples of one kind, of the split, as training would see them but from another seed."""
        size, frames = self.subject.image_size, self.subject.num_frames
        return NanoDataset(self.world, {key: 1.0}, self.split, 900_000 + self.seed, size, frames, 0.0, items)


def describe(suite: Suite) -> None:
    """Descriptions of pictures with one object: big in the middle, small, and moved off the middle."""
    pairs = suite.combinations(1)
    draw = suite.draw(2)
    moved = [pairs[i % len(pairs)] for i in range(suite.counts.shifted)]
    sets = {
        "caption": [single(*pair) for pair in pairs],
        "caption_small": [small(*pair) for pair in pairs],
        "caption_shifted": [single(*pair, shift=_off_centre(draw)) for pair in moved],
    }
    for name, scenes in sets.items():
        suite.say(f"describing {len(scenes)} pictures ({name})")
        asked = [[{"role": "user", "content": [{"type": "image", "image": suite.render(s)}]}] for s in scenes]
        said = suite.subject.answer(asked, CAPTION_TOKENS)
        seen = [named(words, suite.world.names, suite.world.colours) for words in said]
        suite.add_share(f"{name}_object", [n.objects == {s.object} for n, s in zip(seen, scenes, strict=True)])
        suite.add_share(f"{name}_background", [n.backgrounds == {s.background} for n, s in zip(seen, scenes)])
        exact = [same_answer(words, caption(s, suite.world)) for words, s in zip(said, scenes, strict=True)]
        suite.add_share(f"{name}_exact", exact)


def draw_pictures(suite: Suite) -> None:
    """Drawings of "a X on a Y background", named by the judge, and by the nearest real render as a second opinion."""
    pairs = suite.combinations(1)
    items = [pairs[i % len(pairs)] for i in range(suite.counts.drawings)]
    prompts = [caption(single(*pair), suite.world) for pair in items]
    suite.say(f"drawing {len(items)} pictures")
    drawn = suite.subject.draw(prompts, suite.seed)
    real = np.stack([suite.render(single(*pair)) for pair in pairs])
    nearest = NearestRender(suite.world, suite.subject.image_size)
    judged, matched = suite.judge.name(drawn), nearest.name(drawn)
    rebuilt = suite.subject.rebuild(real)
    ceilings = {
        "": suite.judge.name(rebuilt),
        "_real": suite.judge.name(_to_values(real)),
    }
    for which, what in enumerate(("object", "background")):
        suite.add_share(f"draw_{what}", [a[which] == b[which] for a, b in zip(judged, items, strict=True)])
        for suffix, names in ceilings.items():
            suite.ceiling(f"draw_{what}{suffix}", [a[which] == b[which] for a, b in zip(names, pairs, strict=True)])
    suite.add_share("draw_object_nearest", [a[0] == b[0] for a, b in zip(matched, items, strict=True)])
    suite.ceiling("draw_object_nearest", [a[0] == b[0] for a, b in zip(nearest.name(rebuilt), pairs, strict=True)])
    suite.add_share("draw_judges_agree", [a[0] == b[0] for a, b in zip(judged, matched, strict=True)])


def draw_films(suite: Suite) -> None:
    """Films of one object that moves or changes its size: the motion, and what is seen in them."""
    pairs = suite.combinations(3)
    rounds = [(pairs[i % len(pairs)], MOTIONS[(i + i // len(pairs)) % 6]) for i in range(suite.counts.films)]
    films = [Film(colour, name, motion) for (name, colour), motion in rounds]
    suite.say(f"making {len(films)} films")
    made = suite.subject.film([film_caption(film) for film in films], suite.seed + 1)
    size, frames = suite.subject.image_size, suite.subject.num_frames
    real = np.stack([np.stack(render_film(film, suite.world, size, frames)) for film in films])
    rebuilt = suite.subject.rebuild(real.reshape(-1, *real.shape[2:])).unflatten(0, (len(films), frames))
    for pixels, keep in ((made, suite.add_share), (rebuilt, suite.ceiling)):
        names = suite.judge.name_films(pixels)
        keep("film_motion", [judge_motion(f).name == film.motion for f, film in zip(pixels.numpy(), films)])
        keep("film_object", [name[0] == film.object for name, film in zip(names, films, strict=True)])
        keep("film_background", [name[1] == film.background for name, film in zip(names, films, strict=True)])
    exact = [judge_motion(_to_values(f).numpy()).name == film.motion for f, film in zip(real, films, strict=True)]
    suite.ceiling("film_motion_real", exact)


def answer_questions(suite: Suite) -> None:
    """Questions on scenes (also by kind), on two pictures, on films, and talk without pictures."""
    sets = {
        "questions": ("question", suite.counts.questions),
        "multi_image": ("multi_image", suite.counts.pairs),
        "video_text": ("video_text", suite.counts.film_questions),
        "chat": ("text", suite.counts.chat),
    }
    for name, (key, items) in sets.items():
        suite.say(f"answering {items} questions ({name})")
        data = suite.dataset(key, items)
        samples = [data[i] for i in range(items)]
        asked, wanted = zip(*(question_and_answer(sample) for sample in samples), strict=True)
        said = suite.subject.answer(asked, ANSWER_TOKENS)
        right = [same_answer(a, b) for a, b in zip(said, wanted, strict=True)]
        suite.add_share(name, right)
        if name == "questions":
            kinds = [sample.meta["question_kind"] for sample in samples]
            for kind in sorted(set(kinds)):
                suite.add_share(f"question_{kind}", [ok for ok, k in zip(right, kinds, strict=True) if k == kind])


def answer_easy_vqa(suite: Suite) -> None:
    """Questions of easy-VQA: the test set, untouched by training (for the training split, as many of its questions)."""
    held = suite.split == HELDOUT
    easy = EasyVqa("test" if held else "train", suite.subject.image_size)
    questions = list(easy.questions)
    if suite.limit is not None or not held:
        number = suite.limit or len(EasyVqa("test", suite.subject.image_size).questions)
        questions = suite.draw(4).some(questions, number)
    suite.say(f"answering {len(questions)} questions of easy-VQA")
    numbers = sorted({number for _, _, number in questions})
    codes: dict[int, torch.Tensor] = {}
    if suite.subject.has_codes:  # a picture that several questions are about is read once
        found = suite.subject.encode(np.stack([easy.picture(number) for number in numbers]))
        codes = {number: found[row : row + 1] for row, number in enumerate(numbers)}
    asked = [
        [{"role": "user", "content": [{"type": "image", "image": easy.picture(n)}, {"type": "text", "text": q}]}]
        for q, _, n in questions
    ]
    said = suite.subject.answer(asked, EASY_TOKENS, [codes[n] for _, _, n in questions] if codes else None)
    right = [same_answer(words, answer) for words, (_, answer, _) in zip(said, questions, strict=True)]
    opened = [answer not in ("yes", "no") for _, answer, _ in questions]
    suite.add_share("easy_vqa", right)
    suite.add_share("easy_vqa_open", [ok for ok, is_open in zip(right, opened, strict=True) if is_open])
    train = [(q, a) for q, a, _ in EasyVqa("train", suite.subject.image_size).questions]
    test = [(q, a) for q, a, _ in questions]
    for name, only_open in (("easy_vqa", False), ("easy_vqa_open", True)):
        keep = [[pair for pair in pairs if not only_open or pair[1] not in ("yes", "no")] for pairs in (train, test)]
        blind = blind_baselines(*keep)
        for kind, value in asdict(blind).items():
            if value is not None:
                suite.baselines[f"{name}_{kind}"] = round(value, 4)


def rebuild_pictures(suite: Suite) -> None:
    """What the vision tower keeps of pictures (renders of the split, easy-VQA's test pictures), and the codes used."""
    size, items = suite.subject.image_size, suite.counts.pictures
    scenes = ImageTextDataset(suite.world, suite.split, 900_000 + suite.seed, size, items, easy_vqa=0.0, films=0.12)
    easy = EasyVqa("test" if suite.split == HELDOUT else "train", size)
    sets = {
        "scenes": [scenes[i][0] for i in range((items + 1) // 2)],
        "easy_vqa": [easy.picture(number) for number in suite.draw(5).some(easy.pictures, items // 2)],
    }
    suite.say(f"rebuilding {items} pictures")
    decibels: list[float] = []
    codes = []
    for name, pictures in sets.items():
        if not pictures:
            continue
        frames = np.stack(pictures)
        codes.append(suite.subject.encode(frames))
        values = psnr(suite.subject.rebuild(frames, codes[-1]), _to_values(frames)).tolist()
        decibels += values
        suite.add(f"reconstruction_psnr_{name}", mean(values), len(values))
    suite.add("reconstruction_psnr", mean(decibels), len(decibels))
    config = suite.subject.model.config.vision_config
    every = torch.cat(codes).flatten(0, -2)  # (pictures x P, D)
    books = [every.flatten()] if config.shared_codebook else list(every.unbind(-1))
    used = [len(torch.unique(book)) / config.codebook_size for book in books]
    suite.add("code_usage", mean(used), len(decibels))


def measure_text_gap(suite: Suite) -> None:
    """Nats per code that the right prompt is worth: visual cross-entropy with shuffled prompts minus with true ones."""
    items = suite.counts.text_gap
    suite.say(f"comparing {items} pictures under right and shuffled prompts")
    data = suite.dataset("text_image", items)
    right, shuffled = visual_cross_entropy(suite.subject, [data[i] for i in range(items)])
    suite.add("visual_cross_entropy", right, items)
    suite.add("text_gap", None if shuffled is None or right is None else shuffled - right, items)


PARTS: dict[str, Callable[[Suite], None]] = {
    "describe": describe,
    "draw": draw_pictures,
    "film": draw_films,
    "questions": answer_questions,
    "easy_vqa": answer_easy_vqa,
    "reconstruction": rebuild_pictures,
    "text_gap": measure_text_gap,
}
NEED_CODES = ("draw", "film", "reconstruction", "text_gap")


def run_suite(
    model_path: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
    *,
    sampling: Sampling | None = None,
    split: str = HELDOUT,
    only: Collection[str] = (),
    judge_path: str | Path | None = None,
    objects: int = 48,
    styles: Sequence[str] = ("noto",),
    quantize: str | None = None,
) -> dict[str, Any]:
    """Measure a model.

    Args:
        model_path: folder or hub id; the shipped model if absent.
        limit: at most so many items per metric.
        seed: of everything drawn at random.
        device: ``cpu``, ``cuda`` ...; the GPU if there is one.
        progress: called with lines for people.
        sampling: of pictures and films; the model's own settings if absent.
        split: ``heldout``, or ``train`` to tune settings on combinations that training shows.
        only: names of `PARTS`; all if empty.
        judge_path: folder of another judge than the shipped one.
        objects, styles: the world that the model was trained on.
        quantize: `int8`, or as stored if absent.

    Returns:
        ``metrics``, ``ceilings`` (by metric), ``samples`` (items by metric), ``protocol``, ``baselines`` (of easy-VQA,
        without looking at the picture), ``left_out`` (part -> reason): a model of continuous tokens can only be asked.

    Raises:
        ValueError: a wrong argument, a model or judge that cannot be loaded, or nothing of `only` can be measured.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or absent for all items")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or more")
    unknown = [name for name in only if name not in PARTS]
    if unknown:
        raise ValueError(f"unknown part {unknown[0]!r} of the nano suite: choose among {', '.join(PARTS)}")
    check_split(split)
    found = find_model(model_path)
    world = World.load(objects=objects, styles=styles)
    judge = Judge.load(judge_path)
    subject = Subject(load(found, device, quantize=quantize), sampling or Sampling())
    say = progress or (lambda line: None)
    suite = Suite(subject, world, judge, split, seed, limit, Counts().limited(limit), say)
    chosen = {name: part for name, part in PARTS.items() if not only or name in only}
    if not subject.has_codes:
        suite.left_out = {name: "the model reads continuous tokens: no codes" for name in chosen if name in NEED_CODES}
        if len(suite.left_out) == len(chosen):
            raise ValueError(f"{found} reads continuous tokens (quantizer 'none'): {', '.join(chosen)} need codes")
    for name, part in chosen.items():
        if name not in suite.left_out:
            part(suite)
    return {
        "metrics": suite.metrics,
        "ceilings": suite.ceilings,
        "samples": suite.samples,
        "protocol": protocol(suite, found),
        "baselines": suite.baselines,
        "left_out": suite.left_out,
    }


def protocol(suite: Suite, found: str | Path) -> dict[str, Any]:
    """Return what is needed to get the same figures again."""
    subject, world = suite.subject, suite.world
    model = subject.model
    return {
        "suite": "nano",
        "suite_version": SUITE_VERSION,
        "model_sha256": weights_digest(found, model),
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "seed": suite.seed,
        "limit": suite.limit,
        "split": suite.split,
        "sampling": subject.settings(),
        "quantize": "int8" if is_int8(model) else None,
        "text": {"decoding": "greedy", "max_new_tokens": {"caption": CAPTION_TOKENS, "answer": ANSWER_TOKENS}},
        "batch": {"text": subject.text_batch, "pictures": subject.picture_batch, "films": subject.film_batch},
        "world": {
            "objects": len(world.names),
            "backgrounds": len(world.colours),
            "styles": list(world.styles),
            "image_size": subject.image_size,
            "num_frames": subject.num_frames,
            "combinations": {TRAIN: len(world.combinations(TRAIN)), HELDOUT: len(world.combinations(HELDOUT))},
            "pairs": {TRAIN: len(world.pairs(TRAIN)), HELDOUT: len(world.pairs(HELDOUT))},
        },
        "judge": {
            "sha256": suite.judge.digest,
            "seed": suite.judge.record["seed"],
            "accuracies": suite.judge.record.get("accuracies", {}),
        },
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "numpy", "easy-vqa")},
        },
    }


def tune_sampling(
    model_path: str | Path | None,
    settings: Sequence[Sampling],
    limit: int | None = 192,
    seed: int = 1,
    device: str | None = None,
    progress: Progress | None = None,
    parts: Collection[str] = ("draw",),
) -> list[dict[str, Any]]:
    """Try settings on combinations that training shows, never on held-out ones; ``{"sampling", "metrics"}`` of each."""
    out = []
    for sampling in settings:
        result = run_suite(model_path, limit, seed, device, progress, sampling=sampling, split=TRAIN, only=parts)
        out.append({"sampling": result["protocol"]["sampling"], "metrics": result["metrics"]})
    return out


def _off_centre(draw: Draw) -> tuple[float, float]:
    """A shift of up to two thirty-seconds of the side each way that is not none."""
    while True:
        shift = draw.shift(2)
        if shift != (0.0, 0.0):
            return shift


def _to_values(frames: np.ndarray) -> torch.Tensor:
    """Frames ``(I, S, S, 3)`` uint8 as ``(I, 3, S, S)`` in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


__all__ = ["PARTS", "Counts", "Sampling", "run_suite", "tune_sampling"]
