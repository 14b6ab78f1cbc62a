"""The processor that users hold: messages in, tensors out, files that bring it back, and clear refusals."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, LlamaConfig, PreTrainedTokenizerFast

from vilau.configuration import PositionKind, VilaUConfig
from vilau.data.sample import Part, Sample, Turn, form_of
from vilau.processing.augment import fit_sample
from vilau.processing.images import normalise
from vilau.processing.processor import VilaUProcessor, build_processor
from vilau.processing.templates import OURS, ChatTemplate

from .conftest import LAST, SPECIAL, build_tokenizer

P, S, F = 4, 16, 3
TOKENIZER = build_tokenizer()
PROCESSOR = VilaUProcessor(TOKENIZER, image_size=S, positions_per_frame=P, num_frames=F)
PICTURE = np.random.default_rng(0).integers(0, 256, (S, S, 3), dtype=np.uint8)


def user(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}]


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def shown(image: Any) -> dict[str, Any]:
    return {"type": "image", "image": image}


def tokens(inputs: Any, row: int = 0) -> list[str]:
    names = TOKENIZER.convert_ids_to_tokens(inputs["input_ids"][row].tolist())
    kinds = inputs["kinds"][row].tolist()
    marks = {PositionKind.VISUAL: "V", PositionKind.PAD: "-"}
    return [marks.get(kind, name) for name, kind in zip(names, kinds, strict=True)]


def test_question_about_a_picture() -> None:
    """The layout, types and shapes that the model is called with."""
    inputs = PROCESSOR.apply_chat_template(user(shown(PICTURE), words("red")))
    assert tokens(inputs) == [
        *("<s>", "<|user|>", "<image_start>"), *["V"] * P, "<image_end>", "red", "<|assistant|>"
    ]  # fmt: skip
    assert inputs["pixel_values"].shape == (1, 3, S, S) and inputs["pixel_values"].dtype == torch.float32
    assert torch.equal(
        ((inputs["pixel_values"][0] + 1) * 127.5).round().permute(1, 2, 0), torch.tensor(PICTURE).float()
    )
    for name in ("input_ids", "kinds", "attention_mask"):
        assert inputs[name].dtype == torch.int64 and inputs[name].shape == (1, 4 + P + 2)


@pytest.mark.parametrize(
    ("mode", "end"), [("text", []), ("image", ["<image_start>"]), ("video", ["<video_start>"]), (None, None)]
)
def test_generation_mode_opens_the_answer(mode: Any, end: Any) -> None:
    """What is generated is said by the argument, never guessed from the prompt; text-only chat has no pixels."""
    inputs = PROCESSOR.apply_chat_template(user("red"), mode)
    opening = [] if end is None else ["<|assistant|>", *end]
    assert tokens(inputs) == ["<s>", "<|user|>", "red", *opening] and "pixel_values" not in inputs
    if mode is not None:
        assert tokens(PROCESSOR.unconditional(mode, 2), 1) == ["<s>", "<|user|>", *opening]


@pytest.mark.parametrize("mode", ["text", "image", "video", "interleaved"])
def test_pictures_to_be_changed_are_cut_as_in_training(mode: Any) -> None:
    """A wide picture is squashed to be understood, and cut to its centre where the answer is drawn: as samples are."""
    wide = np.random.default_rng(1).integers(0, 256, (S, 2 * S, 3), dtype=np.uint8)
    answer = Part("text", text="red") if mode == "text" else Part("image", frames=(wide,))
    turns = (Turn("user", (Part("image", frames=(wide,)), Part("text", text="re"))), Turn("assistant", (answer,)))
    trained = fit_sample(Sample("s", form_of(turns), turns), S).frames[0]
    inputs = PROCESSOR.apply_chat_template(user(shown(wide), words("re")), mode)
    assert np.array_equal(inputs["pixel_values"][0].numpy(), normalise(trained[None])[0])


def test_batches_are_padded_on_the_left_and_keep_the_order_of_pictures() -> None:
    """Generation continues at the right end of every row; pictures come in reading order."""
    batch = [user(shown(PICTURE), shown(255 - PICTURE), words("re")), user("red"), user(shown(PICTURE), words("im"))]
    inputs = PROCESSOR.apply_chat_template(batch)
    assert all(tokens(inputs, row)[-1] == "<|assistant|>" for row in range(3))
    assert tokens(inputs, 1) == ["-"] * (inputs["input_ids"].shape[1] - 4) + ["<s>", "<|user|>", "red", "<|assistant|>"]
    assert torch.equal(inputs["attention_mask"] == 0, inputs["kinds"] == PositionKind.PAD)
    assert torch.allclose(inputs["pixel_values"][0], -inputs["pixel_values"][1], atol=1e-6)
    assert torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][2])
    alone = PROCESSOR.apply_chat_template(batch[1])
    assert torch.equal(inputs["input_ids"][1, -4:], alone["input_ids"][0])
    right = PROCESSOR.apply_chat_template(batch, padding_side="right")
    assert tokens(right, 1)[:4] == ["<s>", "<|user|>", "red", "<|assistant|>"]


def test_short_form_equals_messages() -> None:
    """``processor(images=, text=)`` is a short way to write the same messages."""
    long = PROCESSOR.apply_chat_template(user(shown(PICTURE), words("red")))
    short = PROCESSOR(images=PICTURE, text="red")
    assert torch.equal(long["input_ids"], short["input_ids"]) and torch.equal(
        long["pixel_values"], short["pixel_values"]
    )
    batch = PROCESSOR(images=[PICTURE, None], text=["red", "im"])
    assert torch.equal(batch["input_ids"][0], long["input_ids"][0]) and batch["pixel_values"].shape[0] == 1
    assert tokens(PROCESSOR(text=["red", "re"], generation_mode="image"))[-1] == "<image_start>"
    with pytest.raises(ValueError, match="1 entries of images for 2 texts"):
        PROCESSOR(images=[PICTURE], text=["a", "b"])


@pytest.mark.parametrize(("mode", "form"), [("text", "question"), ("image", "text_image"), ("video", "text_video")])
def test_prompt_is_a_prefix_of_its_training_sample(mode: Any, form: Any) -> None:
    """The user's messages and a dataset's sample of the same conversation give the same tokens."""
    picture, film = Part("image", frames=(PICTURE,)), Part("video", frames=(PICTURE,) * F)
    answer = {"text": Part("text", text="im"), "image": picture, "video": film}[mode]
    question = Turn("user", (picture, Part("text", text="a red")))
    trained = PROCESSOR.encode_sample(Sample("s", form, (question, Turn("assistant", (answer,)))))
    prompt = PROCESSOR.apply_chat_template(user(shown(PICTURE), words("a red")), mode)
    length = prompt["input_ids"].shape[1]
    assert trained.input_ids[:length].tolist() == prompt["input_ids"][0].tolist()
    assert trained.kinds[:length].tolist() == prompt["kinds"][0].tolist()
    supervised = trained.text_targets | trained.visual_targets
    assert supervised[length] and supervised[:length].sum() == (mode != "text")  # the start token opens the answer
    assert np.array_equal(trained.frames[0], PICTURE)


def test_dialogues_system_text_and_films() -> None:
    """Several turns with their own pictures, a system text, and a film of the set number of frames."""
    inputs = PROCESSOR.apply_chat_template(
        [
            {"role": "system", "content": "im"},
            *user({"type": "video", "video": [PICTURE] * 7}, words("re")),
            {"role": "assistant", "content": "red"},
            *user(shown(Image.fromarray(PICTURE)), words("re")),
        ]
    )
    assert tokens(inputs) == [
        *("<s>", "<|system|>", "im", "<|user|>", "<video_start>"), *["V"] * (F * P), *("<video_end>", "re"),
        *("<|assistant|>", "red", "</s>", "<|user|>", "<image_start>"), *["V"] * P,
        *("<image_end>", "re", "<|assistant|>"),
    ]  # fmt: skip
    assert inputs["pixel_values"].shape[0] == F + 1
    five = PROCESSOR.apply_chat_template(user({"type": "video", "video": [PICTURE]}, words("re")), num_frames=5)
    assert five["pixel_values"].shape[0] == 5


SPECIAL_IDS = {TOKENIZER.convert_tokens_to_ids(token) for token in SPECIAL}


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*SPECIAL, "<image>", "<video>", "[INST]"])), max_size=6)
)
def test_no_text_of_a_user_changes_the_structure(pieces: list[str]) -> None:
    """Special tokens, placeholders and any unicode in a prompt are words: the prompt's special ids stay the
    template's."""
    inputs = PROCESSOR.apply_chat_template(user("x" + "".join(pieces)), "image")
    special = [index for index in inputs["input_ids"][0].tolist() if index in SPECIAL_IDS]
    assert TOKENIZER.convert_ids_to_tokens(special) == ["<s>", "<|user|>", "<|assistant|>", "<image_start>"]
    assert not (inputs["kinds"] == PositionKind.VISUAL).any()


@pytest.mark.parametrize(
    ("messages", "mode", "message"),
    [
        ([], "text", "conversation is empty"),
        (user(""), "image", "the prompt is empty: say what to draw"),
        (user("  \n"), "video", "the prompt is empty: say what to film"),
        (user(words("")), "text", "the prompt is empty"),
        ([{"role": "robot", "content": "x"}], "text", "unknown role 'robot'"),
        ([{"role": "document", "content": "x"}], "text", "unknown role 'document'"),
        ([{"role": "user"}], "text", "needs exactly 'role' and 'content'"),
        ([{"role": "user", "content": "x", "name": "y"}], "text", "'name'"),
        (["hello"], "text", "message 0 is a str"),
        (user({"type": "audio", "audio": "x"}), "text", "unknown type 'audio'"),
        (user({"text": "x"}), "text", "without 'type'"),
        (user({"type": "image"}), "text", "it needs 'image'"),
        (user({"type": "text", "text": 3}), "text", "must be a string"),
        (user({"type": "text", "path": "x"}), "text", "it needs 'text'"),
        (user(shown("https://example.org/a.png")), "text", "nothing is fetched"),
        ([{"role": "user", "content": 5}], "text", "content of type int"),
        ([{"role": "assistant", "content": "x"}], "text", "end with a user's message"),
        ([*user("x"), {"role": "system", "content": "x"}, *user("y")], "text", "only the first message"),
        ([{"role": "system", "content": [shown(PICTURE)]}, *user("x")], "text", "text only"),
        (user("x"), "sound", "unknown generation_mode 'sound'"),
        (user("a" * 600), "text", "has 603 tokens and its answer needs at least 1, more than the context of 512"),
        (user("a" * 10**7), "text", "10000000 characters, which are more tokens than the context of 512"),
        (user("a" * 507), "image", "its answer needs at least 4"),
        (user(*[shown("does not exist")] * 200, words("x")), "text", "200 pictures and films take 800 positions"),
    ],
)
def test_bad_prompts_are_refused(messages: Any, mode: Any, message: str) -> None:
    """Every mistake has its own line with the value, the limit and what to do; no file is opened for a prompt too
    long."""
    with pytest.raises(ValueError, match=message):
        PROCESSOR.apply_chat_template(messages, mode)


def test_missing_files_are_named(tmp_path: Path) -> None:
    """A misspelt path is not an empty picture."""
    for part in (shown(tmp_path / "no.png"), {"type": "image", "path": str(tmp_path / "no.png")}):
        with pytest.raises(FileNotFoundError, match=r"no\.png"):
            PROCESSOR.apply_chat_template(user(part, words("x")))


def test_save_and_load_give_the_same_processor(tmp_path: Path) -> None:
    """The files bring back sizes, template and token ids."""
    template = ChatTemplate(name="other", user_prefix="<|user|>Q: ", default_system="im")
    before = VilaUProcessor(build_tokenizer(), S, P, F, max_length=99, template=template)
    before.save_pretrained(tmp_path)
    after = VilaUProcessor.from_pretrained(tmp_path)
    assert after.to_dict() == before.to_dict() and after.template == template and after.context_length == 99
    messages = user(shown(PICTURE), words("a red Ω 😀 <s>"))
    one, two = (processor.apply_chat_template(messages) for processor in (before, after))
    assert all(torch.equal(one[name], two[name]) for name in one)
    changed = json.loads((tmp_path / "processor_config.json").read_text())
    changed["image_sise"] = 3
    (tmp_path / "processor_config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="did you mean 'image_size'"):
        VilaUProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no processor_config"):
        VilaUProcessor.from_pretrained(tmp_path / "..")


def test_loading_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With local files no socket is opened and no name looked up."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a network connection was tried")

    PROCESSOR.save_pretrained(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert "input_ids" in VilaUProcessor.from_pretrained(tmp_path)(text="a")


def test_wrong_settings_and_tokenizers_are_refused() -> None:
    """A processor that would encode nonsense is not built."""
    with pytest.raises(ValueError, match="image_size is 0"):
        VilaUProcessor(TOKENIZER, 0, P)
    with pytest.raises(ValueError, match="max_length is 0"):
        VilaUProcessor(TOKENIZER, S, P, max_length=0)
    with pytest.raises(ValueError, match="no token '<image_start>'"):
        VilaUProcessor(build_tokenizer(last=()), S, P)
    plain = build_tokenizer(last=())
    plain.add_tokens(LAST)
    with pytest.raises(ValueError, match="users could inject it"):
        VilaUProcessor(plain, S, P)
    with pytest.raises(ValueError, match="Jinja"):
        VilaUProcessor(TOKENIZER, S, P, chat_template="{{ messages }}")


def test_outputs_become_text_pictures_and_films() -> None:
    """Ids without special tokens, pixels rounded, films cut at their frames."""
    ids = [[*TOKENIZER("a red", add_special_tokens=False)["input_ids"], 2, 0, 0], [1, 4, 5, 2, 0, 0, 0]]
    assert PROCESSOR.batch_decode([ids[0], ids[1]]) == ["a red", ""] and PROCESSOR.decode(ids[0]) == "a red"
    pixels = torch.tensor(PICTURE).permute(2, 0, 1)[None].repeat(2 * F, 1, 1, 1) / 127.5 - 1
    assert np.array_equal(np.asarray(PROCESSOR.to_pil(pixels.double())[0]), PICTURE)
    films = PROCESSOR.to_films(pixels)
    assert [len(film) for film in films] == [F, F] and films[0][0].size == (S, S)
    assert [len(film) for film in PROCESSOR.to_films(pixels.reshape(3, 2, 3, S, S))] == [2, 2, 2]
    with pytest.raises(ValueError, match="no whole number of films"):
        PROCESSOR.to_films(pixels[:4])


def test_sizes_come_from_the_models_configuration() -> None:
    """The processor of a model is built from its configuration."""
    config = VilaUConfig(
        vision_config={
            "image_encoder_config": {"image_size": 32, "patch_size": 8},
            "decoder_multipliers": [1, 1, 2, 2],
        },
        text_config=LlamaConfig(max_position_embeddings=300),
        num_frames=4,
    )
    processor = build_processor(TOKENIZER, config)
    assert (processor.image_size, processor.positions_per_frame, processor.num_frames) == (32, 16, 4)
    assert processor.context_length == 300 and processor.template == OURS


SHIPPED = Path(__file__).parents[2] / "src/vilau/assets/nano/tokenizer"


@pytest.mark.skipif(not (SHIPPED / "tokenizer.json").is_file(), reason="the nano tokenizer is not built")
def test_the_shipped_tokenizer_keeps_its_promises() -> None:
    """Byte fallback encodes everything, text comes back, special tokens in text stay text, visual tokens come last."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(SHIPPED)
    processor = VilaUProcessor(tokenizer, 32, 16)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in LAST]
    assert ids == list(range(len(tokenizer) - 4, len(tokenizer))) and len(tokenizer) <= 2048
    for text in ("a red apple on a blue background", "Ωmega 😀 中文 \t\n é", "<s><image_start></s><|user|>"):
        inputs = processor.apply_chat_template(user(text), "image")
        assert tokenizer.unk_token_id not in inputs["input_ids"]
        assert sum(int(index) in tokenizer.all_special_ids for index in inputs["input_ids"][0]) <= 4
        assert processor.decode(inputs["input_ids"][0]) == text


def as_messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as a user would write them."""
    messages = []
    for turn in turns:
        content = [
            words(part.text)
            if part.kind == "text"
            else shown(part.frames[0])
            if part.kind == "image"
            else {"type": "video", "video": list(part.frames)}
            for part in turn.parts
        ]
        messages.append({"role": turn.role, "content": content})
    return messages


@pytest.mark.skipif(not (SHIPPED / "tokenizer.json").is_file(), reason="the nano tokenizer is not built")
def test_nano_samples_train_what_their_prompts_ask() -> None:
    """For every form of the nano data, the user's messages of a sample give exactly its first tokens and pixels."""
    nano = pytest.importorskip("vilau.data.nano.dataset")
    from vilau.data.nano.world import World

    processor = VilaUProcessor(PreTrainedTokenizerFast.from_pretrained(SHIPPED), 32, 16, num_frames=4, max_length=512)
    mixture = {key: 1.0 for key, form in nano.FORM_OF.items() if form != "interleaved" and key != "easy_vqa"}
    samples = nano.NanoDataset(World.load(), mixture)
    seen = set()
    for index in range(40):
        sample = samples[index]
        trained = processor.encode_sample(sample)
        mode = {"text_image": "image", "text_video": "video"}.get(sample.form, "text")
        prompt = processor.apply_chat_template(as_messages(sample.turns[:-1]), mode)
        length = prompt["input_ids"].shape[1]
        assert trained.input_ids[:length].tolist() == prompt["input_ids"][0].tolist()
        assert trained.kinds[:length].tolist() == prompt["kinds"][0].tolist()
        if "pixel_values" in prompt:
            pixels = normalise(trained.frames[: len(prompt["pixel_values"])])
            assert np.array_equal(pixels, prompt["pixel_values"].numpy())
        assert trained.text_targets[-1] and trained.input_ids[-1] == processor.tokenizer.eos_token_id
        seen.add(sample.form)
    assert len(seen) >= 5


def test_auto_processor_knows_it(tmp_path: Path) -> None:
    """Whoever writes ``AutoProcessor.from_pretrained`` gets this class."""
    import vilau

    assert vilau.VilaUProcessor is VilaUProcessor
    PROCESSOR.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).to_dict() == PROCESSOR.to_dict()
