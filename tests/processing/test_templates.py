"""Templates are data: they survive a file, reject unknown keys and lay out tokens as written."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vilau.data.sample import Part, Turn
from vilau.processing.templates import OURS, VICUNA_V1, ChatTemplate

FRAME = np.zeros((4, 4, 3), np.uint8)


def layout(template: ChatTemplate, *turns: Turn, mode: str | None = None) -> list[str]:
    return [segment.text or f"<{len(segment.frames)} frames>" for segment in template.render(turns, mode)]


def test_round_trip_through_json() -> None:
    """A checkpoint's template is what its file says."""
    assert ChatTemplate.from_dict(json.loads(json.dumps(OURS.to_dict()))) == OURS
    assert ChatTemplate.from_dict("vilau") == OURS


def test_unknown_names_and_keys_are_errors() -> None:
    """A misspelt key must not silently fall back to a default."""
    with pytest.raises(ValueError, match="user_prefx"):
        ChatTemplate.from_dict({"user_prefx": "x"})
    with pytest.raises(ValueError, match="unknown chat template 'llama'"):
        ChatTemplate.from_dict("llama")
    with pytest.raises(ValueError, match="must be strings"):
        ChatTemplate.from_dict({"begin": 3})


def test_plain_text_of_the_template_joins_the_users_text() -> None:
    """Templates without role tokens tokenise their words together with the user's, as such checkpoints were trained."""
    vicuna_like = ChatTemplate(
        user_prefix="USER: ",
        user_suffix=" ",
        assistant_prefix="ASSISTANT:",
        frame_suffix="\n",
        video_prefix="",
        video_suffix="",
    )
    turn = Turn("user", (Part("video", frames=(FRAME, FRAME)), Part("text", text="who?")))
    assert layout(vicuna_like, turn, mode="image") == [
        "<s>", "USER: ", "<1 frames>", "\n", "<1 frames>", "\nwho? ASSISTANT:", "<image_start>"
    ]  # fmt: skip


def test_default_system_text_appears_once() -> None:
    """A checkpoint with a system text uses it unless the conversation brings one."""
    template = ChatTemplate(default_system="be kind")
    user = Turn("user", (Part("text", text="hi"),))
    assert layout(template, user)[:3] == ["<s>", "<|system|>", "be kind"]
    own = Turn("system", (Part("text", text="be brief"),))
    assert layout(template, own, user).count("be kind") == 0


def test_turn_order_is_checked() -> None:
    """Sequences that no training sample has are refused with a reason."""
    user, system = Turn("user", ()), Turn("system", ())
    document = Turn("document", (Part("text", text="x"),))
    with pytest.raises(ValueError, match="only the first message"):
        OURS.render((user, system))
    with pytest.raises(ValueError, match="stands alone"):
        OURS.render((document, user))
    with pytest.raises(ValueError, match="opens no answer"):
        OURS.render((document,), "text")
    with pytest.raises(ValueError, match="unknown generation_mode 'sound'"):
        OURS.render((user,), "sound")  # type: ignore[arg-type]


def test_released_prompts_are_vicunas() -> None:
    """Released checkpoints were trained on exactly these strings: an empty message, blanks and line ends included."""
    user = Turn("user", (Part("image", frames=(FRAME,)), Part("text", text=" who? ")))
    answer = Turn("assistant", (Part("text", text="me"),))
    system = VICUNA_V1.default_system
    assert layout(VICUNA_V1, user, answer, user, mode="text") == [
        "<s>", f"{system} USER: ", "<1 frames>", "\n who? ASSISTANT:", " me", "</s>",
        "USER: ", "<1 frames>", "\n who? ASSISTANT:"
    ]  # fmt: skip
    assert layout(VICUNA_V1, Turn("user", ()), mode="image") == ["<s>", f"{system} USER:ASSISTANT: ", "<im_start>"]
    assert layout(VICUNA_V1, Turn("system", ()), Turn("user", ()), mode="text") == ["<s>", " USER:ASSISTANT:"]


def test_released_training_samples_wrap_pictures() -> None:
    """Pictures stand between start and end tokens in training only; what an answer draws does in both."""
    question = Turn("user", (Part("text", text="colour?\n"), Part("image", frames=(FRAME,))))
    drawing = Turn("assistant", (Part("image", frames=(FRAME,)),))
    trained = VICUNA_V1.for_training().render((question, drawing))
    assert [segment.text or "picture" for segment in trained[2:]] == [
        "<im_start>", "picture", "<im_end>", " ASSISTANT:", " ", "<im_start>", "picture", "<im_end>", "</s>"
    ]  # fmt: skip
    assert [segment.target for segment in trained[-5:]] == [True] * 5  # the blank before <im_start> too
    assert OURS.for_training() == OURS


def test_flags_and_optional_strings_survive_a_file() -> None:
    """The released preset survives a file; wrong types are refused."""
    assert ChatTemplate.from_dict(json.loads(json.dumps(VICUNA_V1.to_dict()))) == VICUNA_V1
    assert ChatTemplate.from_dict("vicuna_v1") is VICUNA_V1
    with pytest.raises(ValueError, match="true or false"):
        ChatTemplate.from_dict({"strip_content": "yes"})
    with pytest.raises(ValueError, match="must be strings"):
        ChatTemplate.from_dict({"begin": None})
