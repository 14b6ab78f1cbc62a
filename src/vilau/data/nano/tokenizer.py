"""The tokenizer of the nano world: byte-fallback BPE; each word of that world is one token, any other text exact."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vilau.data.nano.dataset import FORM_OF, ImageTextDataset, NanoDataset
from vilau.data.nano.scenes import MOTIONS, Film, single
from vilau.data.nano.texts import caption, film_caption, other_film_wordings, other_wordings
from vilau.data.nano.world import ASSETS, TRAIN, World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FIRST_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>")
LAST_TOKENS = ("<image_start>", "<image_end>", "<video_start>", "<video_end>")
MAX_VOCABULARY = 2048
# A word with the blank before it, a single digit, a single mark, or a single blank of any kind.
_PIECES = r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s"
_BLANK = " "


def nano_texts(world: World, samples: int = 40_000, *, easy_vqa: bool = True) -> Iterator[str]:
    """All that is said in training: the texts of the first ``samples`` samples of seed 0, and each caption once."""
    for name, background in [(name, colour) for name in world.names for colour in world.colours]:
        scene = single(name, background)
        yield caption(scene, world)
        yield from other_wordings(scene, world)
        for motion in MOTIONS:
            film = Film(background, name, motion)
            yield film_caption(film)
            yield from other_film_wordings(film)
    mixture = {key: 1.0 for key in FORM_OF if easy_vqa or key != "easy_vqa"}
    mixture["text"] = 6.0
    dataset = NanoDataset(world, mixture, TRAIN, image_size=4, num_frames=1, size=samples)
    for index in range(samples):
        for turn in dataset[index].turns:
            for part in turn.parts:
                if part.kind == "text":
                    yield part.text
    if easy_vqa:
        pictures = ImageTextDataset(world, TRAIN, image_size=4, easy_vqa=1.0, films=0.0, size=samples // 20)
        for index in range(len(pictures)):
            yield pictures[index][1]


def _learn(words: list[str], room: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Letters and merges, in order, that turn each of ``words`` into one token; at most ``room`` entries in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Split(pattern="\n", behavior="removed")
    trainer = trainers.BpeTrainer(vocab_size=room, min_frequency=1, show_progress=False)
    learner.train_from_iterator(["\n".join(words)], trainer=trainer)
    model: dict[str, Any] = json.loads(learner.to_str())["model"]
    merges = [(str(one), str(other)) for one, other in model["merges"]]
    merged = {one + other for one, other in merges}
    return sorted(token for token in model["vocab"] if token not in merged), merges


def train_tokenizer(texts: Iterable[str], vocab_size: int = MAX_VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary covers ``texts``; the same texts give the same tokenizer, whatever their order.

    The ids are: ``<pad>``, ``<s>``, ``</s>``, ``<unk>``, ``<|user|>``, ``<|assistant|>``, ``<|system|>``, 256 bytes,
    letters and words, and last ``<image_start>``, ``<image_end>``, ``<video_start>``, ``<video_end>``. A blank is put
    before each text and taken off again when decoding, so that a word has one token wherever it stands. Decoding what
    was encoded gives the text back, whatever the text: letters outside the vocabulary become their bytes.

    Args:
        texts: what is to be covered; each word, with the blank before it, becomes one token as long as there is room.
        vocab_size: at most so many entries, 512 to 2,048.

    Raises:
        ValueError: ``vocab_size`` is out of range, or ``texts`` hold no word.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not 512 <= vocab_size <= MAX_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} is out of range: the nano vocabulary has 512 to {MAX_VOCABULARY} entries"
        )
    words = sorted({word for text in texts for word in re.findall(_PIECES, _BLANK + text) if word.strip()} | {_BLANK})
    if len(words) < 2:
        raise ValueError("the texts hold no word: give at least one")
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    letters, merges = _learn(words, vocab_size - len(FIRST_TOKENS) - len(octets) - len(LAST_TOKENS))
    tokens = list(dict.fromkeys([*FIRST_TOKENS, *octets, *letters, *(one + other for one, other in merges)]))
    tokens += LAST_TOKENS
    model = models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Prepend(_BLANK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(_BLANK, 1, 0)])
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*FIRST_TOKENS, *LAST_TOKENS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=[*FIRST_TOKENS[4:], *LAST_TOKENS],
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(out: Path = ASSETS / "tokenizer", *, world: World | None = None) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the nano texts and write it to the folder ``out``.

    The shipped one is made again by ``python -m vilau.data.nano.tokenizer``.
    """
    tokenizer = train_tokenizer(nano_texts(world or World.load()))
    tokenizer.save_pretrained(out)
    return tokenizer


def load_tokenizer(path: Path | str | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder; None is the one shipped with the package.

    Raises:
        ValueError: there is none.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(path) if path is not None else ASSETS / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"no tokenizer.json in {folder}: install the package with its assets, or name another folder")
    return PreTrainedTokenizerFast.from_pretrained(folder)


if __name__ == "__main__":
    print(len(save_tokenizer()))
