"""Training configurations: strict keys with the nearest right one, overrides, limits, every shipped file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from vilau.training.config import STAGE_ORDER, TrainConfig, load_config

BASE = """
name: test
output: runs/test
model: {vision_config: {depth: 2}}
text_encoder: {hidden_size: 8}
stages:
  align: {steps: 5, batch_size: 4}
  sft: {steps: 7, batch_size: 2, mixture: {text: 1.0}, optimizer: {lr: 0.5}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small valid configuration file."""
    file = tmp_path / "base.yaml"
    file.write_text(BASE)
    return file


def edited(path: Path, old: str, new: str) -> Path:
    """The file with one replacement."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def test_defaults_and_values(path: Path) -> None:
    """What is given is taken, the rest has the documented defaults, stages keep their names."""
    config = load_config(path)
    assert config.stages["align"].steps == 5 and config.stages["sft"].optimizer.lr == 0.5
    assert config.stages["align"].optimizer.lr == 1e-3 and config.data.objects == 48
    assert set(config.stages) <= set(STAGE_ORDER)


@pytest.mark.parametrize(
    ("old", "new", "key", "near"),
    [
        ("name: test", "nam: x\nname: test", "nam", "name"),
        ("steps: 5", "stps: 1, steps: 5", "stages.align.stps", "steps"),
        ("{lr: 0.5}", "{lrr: 0.5}", "stages.sft.optimizer.lrr", "lr"),
        ("name: test", "name: test\ndata: {object: 3}", "data.object", "objects"),
        ("steps: 7", "visual_wieght: 1, steps: 7", "stages.sft.visual_wieght", "visual_weight"),
        ("name: test", "save_evry: 3\nname: test", "save_evry", "save_every"),
    ],
)
def test_a_wrong_key_names_the_nearest(path: Path, old: str, new: str, key: str, near: str) -> None:
    """A misspelt key is never ignored: the error has its full place and the right key."""
    with pytest.raises(ValueError) as error:
        load_config(edited(path, old, new))
    assert f"'{key}'" in str(error.value) and f"did you mean '{near}'" in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("steps: 5", "steps: 0", "stages.align.steps"),
        ("steps: 5", "steps: many", "stages.align.steps"),
        ("batch_size: 4", "batch_size: -1", "stages.align.batch_size"),
        ("{lr: 0.5}", "{lr: 0}", "stages.sft.optimizer.lr"),
        ("{lr: 0.5}", "{lr: .nan}", "stages.sft.optimizer.lr"),
        ("{lr: 0.5}", "{final_lr: 1.5}", "stages.sft.optimizer.final_lr"),
        ("{lr: 0.5}", "{name: sgd}", "stages.sft.optimizer.name"),
        ("steps: 7", "steps: 7, text_dropout: 1.1", "stages.sft.text_dropout"),
        ("steps: 7", "steps: 7, contrastive: cosine", "stages.sft.contrastive"),
        ("  align:", "  algin:", "align"),
        ("output: runs/test", "seed: 1", "output is missing"),
        (
            "steps: 7",
            "steps: 7, tokens: 900",
            "stages.sft: how long it is must be said by one of steps, epochs, tokens",
        ),
        ("steps: 7", "steps: 7, tokens: 900", "not by steps 7 and tokens 900: take the others away (null)"),
        ("steps: 7, ", "", "stages.sft: how long it is must be said by one of steps, epochs, tokens, not by none"),
        ("steps: 7", "tokens: 0", "stages.sft.tokens"),
        ("steps: 7", "epochs: .inf", "stages.sft.epochs"),
        ("steps: 7", "epochs: 2", "stages.sft.epochs 2: the nano world has no end where it is not a source"),
        (
            "steps: 5",
            "tokens: 900",
            "stages.align: tokens 900 are counted in pretrain and sft only: give steps or epochs",
        ),
    ],
)
def test_wrong_values_name_their_place(path: Path, old: str, new: str, words: str) -> None:
    """A value of the wrong type or out of range is refused with its place, in one line."""
    with pytest.raises(ValueError) as error:
        load_config(edited(path, old, new))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_all_mistakes_are_named_at_once(path: Path) -> None:
    """Two mistakes are one error: nobody wants to find them one by one."""
    with pytest.raises(ValueError) as error:
        load_config(edited(edited(path, "steps: 5", "steps: 0"), "{lr: 0.5}", "{lrr: 1}"))
    assert "stages.align.steps" in str(error.value) and "stages.sft.optimizer.lrr" in str(error.value)


def test_overrides(path: Path) -> None:
    """Dotted overrides replace and add, with YAML values; the last one wins; groups that are absent come about."""
    overrides = ["stages.sft.steps=9", "stages.sft.steps=11", "seed=4", "data.styles=[a, b]", "data.workers=0"]
    config = load_config(path, [*overrides, "model.vision_config.depth=3", "stages.align.optimizer.lr=1e-2"])
    assert config.stages["sft"].steps == 11 and config.seed == 4 and config.data.styles == ["a", "b"]
    assert config.model["vision_config"]["depth"] == 3 and config.stages["align"].optimizer.lr == 0.01


def test_the_last_length_counts(path: Path, tmp_path: Path) -> None:
    """An override or a changing file that says how long a stage is takes the place of another way to say it."""
    assert load_config(path, ["stages.sft.tokens=900"]).stages["sft"].length == "900 tokens"
    config = load_config(path, ["stages.sft.tokens=900", "stages.sft.steps=40"])
    assert (config.stages["sft"].steps, config.stages["sft"].tokens) == (40, None)
    changed = tmp_path / "changed.yaml"
    changed.write_text("base: base.yaml\nstages: {sft: {tokens: 900}, align: {steps: 6}}\n")
    config = load_config(changed)
    assert (config.stages["sft"].steps, config.stages["sft"].tokens, config.stages["align"].steps) == (None, 900, 6)
    changed.write_text("base: base.yaml\nstages: {sft: {tokens: 900, steps: null}}\n")
    assert load_config(changed).stages["sft"].length == "900 tokens"
    with pytest.raises(ValueError, match="not by none"):
        load_config(path, ["stages.sft.steps=null"])


@pytest.mark.parametrize("override", ["seed", "=3", "stages.sft.steps.x=1", "stages.sft.stepz=1", "seed=[", "a..b=1"])
def test_wrong_overrides_are_refused(path: Path, override: str) -> None:
    """Not key=value, into a value, an unknown key, broken YAML."""
    with pytest.raises(ValueError):
        load_config(path, [override])


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "a: [", "just words", "\x00"])
def test_files_that_hold_no_configuration(tmp_path: Path, content: str) -> None:
    """Empty, a list, broken YAML, plain text, binary: one clear error with the file's name."""
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"bad\.yaml") as error:
        load_config(file)
    assert "\n" not in str(error.value)


def test_unreadable_files(tmp_path: Path) -> None:
    """A missing file, a folder and bytes that are no text are errors with a reason, not tracebacks."""
    with pytest.raises(ValueError, match="cannot read the configuration"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="cannot read the configuration"):
        load_config(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"bytes\.yaml is not valid YAML"):
        load_config(tmp_path / "bytes.yaml")


def test_every_file_under_configs_is_valid(root: Path) -> None:
    """Every configuration that ships parses, has stages, and survives being written and read again."""
    files = sorted((root / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        config = load_config(file)
        assert config.stages, file
        assert TrainConfig.model_validate(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


def test_a_file_changes_its_base(tmp_path: Path) -> None:
    """Groups are merged key by key, lists and values replaced, `null` takes a key away; overrides come last."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "base.yaml").write_text(BASE.replace("{text: 1.0}", "{text: 1.0, question: 2.0}"))
    (tmp_path / "mid.yaml").write_text("base: a/base.yaml\nname: mid\nstages: {align: null}\n")
    file = tmp_path / "top.yaml"
    file.write_text("base: mid.yaml\noutput: runs/top\nstages: {sft: {steps: 9, mixture: {text: null}, freeze: [x]}}\n")
    config = load_config(file, ["stages.sft.batch_size=3"])
    assert (config.name, config.output, set(config.stages)) == ("mid", "runs/top", {"sft"})
    sft = config.stages["sft"]
    assert (sft.steps, sft.batch_size, sft.freeze, sft.optimizer.lr) == (9, 3, ["x"], 0.5)
    assert dict(sft.mixture) == {"question": 2.0} and config.model == {"vision_config": {"depth": 2}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: none.yaml", "cannot read the configuration .*none.yaml"),
        ("base: top.yaml", "is its own base"),
        ("base: [a, b]", "base must be the path of one file"),
        ("base: base.yaml\nsed: 3", "unknown key 'sed'; did you mean 'seed'"),
        ("base: base.yaml\nstages: {pretrain: null}", "null takes .stages.pretrain. away"),
    ],
)
def test_a_wrong_base_is_named(path: Path, text: str, words: str) -> None:
    """A base that is not there, a circle, keys that are none: one clear error each."""
    top = path.with_name("top.yaml")
    top.write_text(text)
    with pytest.raises(ValueError, match=words):
        load_config(top)
