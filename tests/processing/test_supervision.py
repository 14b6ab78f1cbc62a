"""Which positions are supervised, token by token, for every form of the method's table and both templates.

``*`` marks a text target, ``V`` a visual position, ``V*`` a visual target. Texts of one letter or of a merge are one
token each; in the released template blanks are tokens of their own (``▁``) or begin one.
"""

from __future__ import annotations

import numpy as np
import pytest

from vilau.configuration import PositionKind
from vilau.data.sample import FORMS, Part, Sample, Turn, form_of, image, text, video
from vilau.data.sources.source import BadSample
from vilau.processing.encode import EncodedSample, Supervise, encode_prompt, encode_sample, unconditional_turns
from vilau.processing.templates import OURS, PRESETS, VICUNA_V1, ChatTemplate

from .conftest import build_tokenizer

P = 2
TOKENIZERS = {
    "vilau": build_tokenizer(),
    "vicuna_v1": build_tokenizer(("<im_start>", "<im_end>", "<vi_start>", "<vi_end>")),
}
A, B = (np.full((8, 8, 3), value, np.uint8) for value in (1, 2))


def user(*parts: Part) -> Turn:
    return Turn("user", parts)


def answer(*parts: Part) -> Turn:
    return Turn("assistant", parts)


FORM_TURNS: dict[str, tuple[Turn, ...]] = {
    "image_text": (user(image(A)), answer(text("red"))),
    "text_image": (user(text("red")), answer(image(A))),
    "text_video": (user(text("red")), answer(video((A, B)))),
    "interleaved": (Turn("document", (text("re"), image(A), text("im"), image(B), text("red"))),),
    "question": (user(image(A), text("im")), answer(text("red"))),
    "video_text": (user(video((A, B)), text("im")), answer(text("red"))),
    "text": (user(text("im")), answer(text("red"))),
    "image_edit": (user(image(A), text("im")), answer(image(B))),
    "image_video": (user(image(A), text("im")), answer(video((A, B)))),
    "mixed": (user(text("im")), answer(text("re"), image(A), text("red"), image(B))),
}
SEVERAL = {
    "multi_turn": (user(image(A), text("im")), answer(text("red")), user(text("re")), answer(text("im"))),
    "multi_image": (user(image(A), image(B), text("im")), answer(text("red"))),
    "multi_edit": (user(image(A), text("im")), answer(image(B)), user(text("re")), answer(image(A))),
}

# Ours: what stands after <s>.
OURS_LATTER = {
    "image_text": "<|user|> <image_start> V V <image_end> <|assistant|> red* </s>*",
    "text_image": "<|user|> red <|assistant|> <image_start>* V* V* <image_end>* </s>*",
    "text_video": "<|user|> red <|assistant|> <video_start>* V* V* V* V* <video_end>* </s>*",
    "interleaved": "re* <image_start>* V V <image_end>* im* <image_start>* V V <image_end>* red* </s>*",
    "question": "<|user|> <image_start> V V <image_end> im <|assistant|> red* </s>*",
    "video_text": "<|user|> <video_start> V V V V <video_end> im <|assistant|> red* </s>*",
    "text": "<|user|> im <|assistant|> red* </s>*",
    "image_edit": "<|user|> <image_start> V V <image_end> im <|assistant|> <image_start>* V* V* <image_end>* </s>*",
    "image_video": "<|user|> <image_start> V V <image_end> im <|assistant|> "
    "<video_start>* V* V* V* V* <video_end>* </s>*",
    "mixed": "<|user|> im <|assistant|> re* <image_start>* V* V* <image_end>* red* "
    "<image_start>* V* V* <image_end>* </s>*",
    "multi_turn": "<|user|> <image_start> V V <image_end> im <|assistant|> red* </s>* "
    "<|user|> re <|assistant|> im* </s>*",
    "multi_image": "<|user|> <image_start> V V <image_end> <image_start> V V <image_end> im <|assistant|> red* </s>*",
    "multi_edit": "<|user|> <image_start> V V <image_end> im <|assistant|> <image_start>* V* V* <image_end>* </s>* "
    "<|user|> re <|assistant|> <image_start>* V* V* <image_end>* </s>*",
}
# The same with loss on both sides: whatever was said or shown, but neither <|user|> nor <|assistant|>.
OURS_BOTH = {
    "image_text": "<|user|> <image_start>* V* V* <image_end>* <|assistant|> red* </s>*",
    "text_image": "<|user|> red* <|assistant|> <image_start>* V* V* <image_end>* </s>*",
    "text_video": "<|user|> red* <|assistant|> <video_start>* V* V* V* V* <video_end>* </s>*",
    "interleaved": "re* <image_start>* V* V* <image_end>* im* <image_start>* V* V* <image_end>* red* </s>*",
    "question": "<|user|> <image_start>* V* V* <image_end>* im* <|assistant|> red* </s>*",
    "video_text": "<|user|> <video_start>* V* V* V* V* <video_end>* im* <|assistant|> red* </s>*",
    "text": "<|user|> im* <|assistant|> red* </s>*",
    "image_edit": "<|user|> <image_start>* V* V* <image_end>* im* <|assistant|> "
    "<image_start>* V* V* <image_end>* </s>*",
    "image_video": "<|user|> <image_start>* V* V* <image_end>* im* <|assistant|> "
    "<video_start>* V* V* V* V* <video_end>* </s>*",
    "mixed": "<|user|> im* <|assistant|> re* <image_start>* V* V* <image_end>* red* "
    "<image_start>* V* V* <image_end>* </s>*",
}
# The released template after <s> and the system text, "USER:" and "ASSISTANT:" shown as U and S. Blanks at the ends of
# what a user shows are dropped, so that one picture stands right behind "USER: " and a caption behind "<im_end>".
VICUNA = {
    "image_text": "U ▁ <im_start> V V <im_end> ▁ S ▁* red* </s>*",
    "text_image": "U ▁ red ▁ S ▁* <im_start>* V* V* <im_end>* </s>*",
    "text_video": "U ▁ red ▁ S ▁* <vi_start>* V* V* V* V* <vi_end>* </s>*",
    "interleaved": "▁* re* ▁* <im_start>* V V <im_end>* N* im* ▁* <im_start>* V V <im_end>* N* red* </s>*",
    "question": "U ▁ <im_start> V V <im_end> N im ▁ S ▁* red* </s>*",
    "video_text": "U ▁ V V ▁ N V V ▁ N im ▁ S ▁* red* </s>*",
    "text": "U ▁ im ▁ S ▁* red* </s>*",
    "image_edit": "U ▁ <im_start> V V <im_end> N im ▁ S ▁* <im_start>* V* V* <im_end>* </s>*",
    "image_video": "U ▁ <im_start> V V <im_end> N im ▁ S ▁* <vi_start>* V* V* V* V* <vi_end>* </s>*",
    "mixed": "U ▁ im ▁ S ▁* re* <im_start>* V* V* <im_end>* red* <im_start>* V* V* <im_end>* </s>*",
    "multi_turn": "U ▁ <im_start> V V <im_end> N im ▁ S ▁* red* </s>* U ▁ re ▁ S ▁* im* </s>*",
    "multi_image": "U ▁ <im_start> V V <im_end> N ▁ <im_start> V V <im_end> N im ▁ S ▁* red* </s>*",
    "multi_edit": "U ▁ <im_start> V V <im_end> N im ▁ S ▁* <im_start>* V* V* <im_end>* </s>* "
    "U ▁ re ▁ S ▁* <im_start>* V* V* <im_end>* </s>*",
}
VICUNA_BOTH = {
    "image_text": "U ▁ <im_start>* V* V* <im_end>* ▁ S ▁* red* </s>*",
    "text_image": "U ▁ red* ▁ S ▁* <im_start>* V* V* <im_end>* </s>*",
    "interleaved": "▁* re* ▁* <im_start>* V* V* <im_end>* N* im* ▁* <im_start>* V* V* <im_end>* N* red* </s>*",
    "video_text": "U ▁ V* V* ▁ N* V* V* ▁ N* im* ▁ S ▁* red* </s>*",
    "multi_turn": "U ▁ <im_start>* V* V* <im_end>* N* im* ▁ S ▁* red* </s>* U ▁ re* ▁ S ▁* im* </s>*",
    "multi_image": "U ▁ <im_start>* V* V* <im_end>* N* ▁* <im_start>* V* V* <im_end>* N* im* ▁ S ▁* red* </s>*",
}


def encode(
    turns: tuple[Turn, ...], template: ChatTemplate, supervise: Supervise = "latter", **options: object
) -> EncodedSample:
    sample = Sample("s", form_of(turns), turns)
    return encode_sample(sample, TOKENIZERS[template.name], template, P, supervise=supervise, **options)  # type: ignore


def shown(encoded: EncodedSample, template: ChatTemplate) -> list[str]:
    """Tokens after the first with their marks; kinds and masks are checked to agree on the way."""
    tokens = TOKENIZERS[template.name].convert_ids_to_tokens(encoded.input_ids.tolist())
    visual = encoded.kinds == PositionKind.VISUAL
    assert not (encoded.text_targets & visual).any() and not (encoded.visual_targets & ~visual).any()
    assert len(encoded.frames) * P == visual.sum()
    marked = encoded.text_targets | encoded.visual_targets
    assert tokens[0] == template.begin and not marked[0]
    rows = zip(tokens, visual, marked, strict=True)
    return [("V" if seen else token) + "*" * bool(mark) for token, seen, mark in rows][1:]


def test_every_form_is_here_and_is_told_from_its_turns() -> None:
    """A form without an expectation below would go untested; and sources let the turns say which form they have."""
    assert tuple(FORM_TURNS) == FORMS
    assert {name: form_of(turns) for name, turns in FORM_TURNS.items()} == {name: name for name in FORMS}
    assert [form_of(turns) for turns in SEVERAL.values()] == ["question", "question", "image_edit"]


@pytest.mark.parametrize("name", OURS_LATTER)
def test_our_template(name: str) -> None:
    """The latter modality alone is supervised, with its start and end tokens and </s> (METHOD, section 2)."""
    assert shown(encode((FORM_TURNS | SEVERAL)[name], OURS), OURS) == OURS_LATTER[name].split()


@pytest.mark.parametrize("name", OURS_BOTH)
def test_our_template_with_loss_on_both(name: str) -> None:
    """`both` supervises all that anyone says or shows, and none of the template's own words; tokens are the same."""
    latter, both = (encode(FORM_TURNS[name], OURS, supervise) for supervise in ("latter", "both"))
    assert shown(both, OURS) == OURS_BOTH[name].split()
    assert latter.input_ids.tolist() == both.input_ids.tolist()


def released(turns: tuple[Turn, ...], supervise: Supervise = "latter") -> list[str]:
    """Tokens of the released template in the notation above; the system's text is checked to be no target."""
    tokens = shown(encode(turns, VICUNA_V1, supervise), VICUNA_V1)
    if turns[0].role != "document":
        system = TOKENIZERS["vicuna_v1"].tokenize(" " + VICUNA_V1.default_system + " ")
        assert tokens[: len(system)] == system
        tokens = tokens[len(system) :]
    line = " ".join(token.replace("<0x0A>", "N") for token in tokens)
    return line.replace("U S E R :", "U").replace("A S S I S T A N T :", "S").split()


@pytest.mark.parametrize("name", VICUNA)
def test_released_template(name: str) -> None:
    """The released template supervises the same, with the blank before the answer as one more target."""
    assert released((FORM_TURNS | SEVERAL)[name]) == VICUNA[name].split()


@pytest.mark.parametrize("name", VICUNA_BOTH)
def test_released_template_with_loss_on_both(name: str) -> None:
    """Where system text, "USER:" and the question are one piece for the tokenizer, only the question is supervised."""
    assert released((FORM_TURNS | SEVERAL)[name], "both") == VICUNA_BOTH[name].split()


@pytest.mark.parametrize("template", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize(("form", "mode"), [("image_edit", "image"), ("image_video", "video"), ("text_image", "image")])
def test_dropped_prompts_are_the_unconditional_prompt(form: str, mode: str, template: ChatTemplate) -> None:
    """Guidance subtracts the prompt of an empty user turn, so edits lose their picture along with their text."""
    dropped = encode(FORM_TURNS[form], template, drop_text=True)
    prompt = encode_prompt(unconditional_turns(), TOKENIZERS[template.name], template, P, mode)  # type: ignore[arg-type]
    assert dropped.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
    assert dropped.visual_targets.sum() == len(dropped.frames) * P > 0


@pytest.mark.parametrize(
    ("form", "mode"), [("image_edit", "image"), ("image_video", "video"), ("mixed", "interleaved")]
)
def test_prompts_beyond_the_paper_are_prefixes_of_what_was_trained(form: str, mode: str) -> None:
    """At inference the model meets the tokens that it learnt from, and nothing of a prompt is a target."""
    prompt = encode_prompt(FORM_TURNS[form][:1], TOKENIZERS["vilau"], OURS, P, mode)  # type: ignore[arg-type]
    whole = encode(FORM_TURNS[form], OURS)
    assert whole.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
    assert whole.kinds[: len(prompt)].tolist() == prompt.kinds.tolist()
    assert not (prompt.text_targets | prompt.visual_targets).any()


def test_mixed_answers_keep_their_prompt() -> None:
    """An answer that begins with text cannot be guided as a whole, so nothing is dropped there."""
    kept = encode(FORM_TURNS["mixed"], OURS, drop_text=True)
    assert kept.input_ids.tolist() == encode(FORM_TURNS["mixed"], OURS).input_ids.tolist()


@pytest.mark.parametrize("template", PRESETS.values(), ids=PRESETS)
def test_long_conversations_lose_whole_exchanges(template: ChatTemplate) -> None:
    """A conversation over the limit is the same as if its last exchanges had never been, whatever the limit."""
    exchanges = [(user(image(A), text("re" * (n + 1))), answer(text("im" * 3))) for n in range(5)]
    turns = sum(exchanges, ())
    versions = [encode(turns[: 2 * count], template) for count in range(1, 6)]
    for limit in range(len(versions[0]), len(versions[-1]) + 1):
        got = encode(turns, template, max_length=limit)
        expected = [version for version in versions if len(version) <= limit][-1]
        assert got.input_ids.tolist() == expected.input_ids.tolist()
        assert got.text_targets.tolist() == expected.text_targets.tolist()
        assert len(got.frames) * P == (got.kinds == PositionKind.VISUAL).sum()
        assert got.left_out == 2 * (5 - (versions.index(expected) + 1))
    with pytest.raises(BadSample, match=f"more than {len(versions[0]) - 1}") as error:
        encode(turns, template, max_length=len(versions[0]) - 1)
    assert error.value.kind == "too_long"


def test_long_documents_lose_whole_parts_and_their_end() -> None:
    """No picture is cut, a document of pictures alone is not made, and that it ends early is not taught."""
    parts = (image(A), text("re"), image(B), text("im"), image(A), text("red"))
    whole = (Turn("document", parts),)
    versions = {count: encode((Turn("document", parts[:count]),), OURS) for count in range(2, 7)}
    for limit in range(len(versions[2]), len(versions[6])):
        got = encode(whole, OURS, max_length=limit)
        count = max(count for count, version in versions.items() if len(version) <= limit)
        assert got.input_ids.tolist() == versions[count].input_ids.tolist()
        assert got.left_out == 6 - count
        assert got.text_targets[:-1].tolist() == versions[count].text_targets[:-1].tolist()
        assert not got.text_targets[-1] and versions[count].text_targets[-1]
    with pytest.raises(BadSample, match="row_length"):
        encode(whole, OURS, max_length=len(versions[2]) - 1)


def test_samples_that_fit_are_untouched() -> None:
    """The limit itself is allowed."""
    plain = encode(FORM_TURNS["question"], OURS)
    same = encode(FORM_TURNS["question"], OURS, max_length=len(plain))
    assert same.left_out == 0 and same.input_ids.tolist() == plain.input_ids.tolist()
