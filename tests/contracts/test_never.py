"""The rules that keep the rooms apart (docs: CONTRIBUTING.md, "The house"), read from every import statement."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from contracts.imports import SOURCE, all_imports, crossings, imports_of, strays

HTTP = ("http", "urllib", "requests", "httpx", "aiohttp", "socket", "fastapi", "starlette", "uvicorn")
FILES = ("io", "os", "pathlib", "shutil", "tempfile", "glob", "open")


def test_the_reader_of_imports_sees_all_kinds(tmp_path: Path) -> None:
    """The rules below are worth what this reader sees: late, relative and dynamic imports, but not those for types."""
    package = tmp_path / "vilau" / "room"
    package.mkdir(parents=True)
    file = package / "a.py"
    file.write_text(
        "import os\nfrom . import b\nfrom ..data import c\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import d\n"
        "def late():\n    from vilau.e import f\n    import importlib\n    importlib.import_module('g')\n"
    )
    targets = [item.target for item in imports_of(file, tmp_path)]
    wanted = ["os", "vilau.room.b", "vilau.data.c", "typing.TYPE_CHECKING", "vilau.e.f", "importlib", "g"]
    assert targets == wanted


def test_configuration_and_sample_stand_alone() -> None:
    """Rule 1: everything else builds on these two, so they build on nothing of ours."""
    assert strays(("vilau.configuration", "vilau.data.sample"), ()) == []


def test_modeling_imports_only_configuration_and_itself() -> None:
    """Rule 1: networks can be read, tested and reused without the rest of the package."""
    assert strays(("vilau.modeling",), ("vilau.modeling", "vilau.configuration")) == []


def test_only_model_joins_modeling_with_generation_and_checkpoints() -> None:
    """Rule 1: one place joins what a user loads."""
    assert crossings(("vilau.modeling",), ("vilau.generation", "vilau.checkpoints", "vilau.model")) == []
    assert strays(("vilau.generation",), ("vilau.generation", "vilau.configuration")) == []
    joiners = ("vilau.modeling", "vilau.generation", "vilau.checkpoints", "vilau.processing", "vilau.configuration")
    assert strays(("vilau.model",), joiners) == []


def test_depth_transformer_and_tower_do_not_know_each_other() -> None:
    """Rule 2: the depth transformer takes embeddings, the tower knows no language model; vila_u joins them."""
    ours = "vilau.modeling."
    assert crossings((ours + "depth_transformer",), (ours + "quantizer", ours + "vision_tower", ours + "vila_u")) == []
    apart = (ours + "depth_transformer", ours + "vila_u", "transformers.AutoModelForCausalLM")
    tower = tuple(ours + name for name in ("vision_tower", "quantizer", "pixel_decoder", "pixel_encoder"))
    assert crossings(tower, apart) == []


def test_modeling_knows_no_tokenizer_picture_optimizer_or_file() -> None:
    """Rule 3: a network is numbers in, numbers out."""
    outside = ("PIL", "av", "tokenizers", "torch.optim", "transformers.AutoTokenizer", "transformers.AutoProcessor")
    assert crossings(("vilau.modeling",), outside + HTTP + FILES) == []


def test_generation_knows_no_file_or_http() -> None:
    """Rule 3: sampling runs the same in a server, a notebook and a test."""
    assert crossings(("vilau.generation",), HTTP + FILES) == []


def test_data_never_imports_modeling_or_training() -> None:
    """Rule 4: data can be built and read where no model is."""
    assert crossings(("vilau.data",), ("vilau.modeling", "vilau.training", "vilau.model")) == []


def test_training_gets_generation_and_evaluation_as_callables() -> None:
    """Rule 4: the engine does not depend on how pictures are drawn or judged; the command line injects that."""
    outside = ("vilau.generation", "vilau.evaluation", "vilau.model", "vilau.cli", "vilau.pipeline")
    assert crossings(("vilau.training",), outside) == []


def test_serving_and_web_keep_their_distance() -> None:
    """Rule 5: serving reaches the model through generation and processing, the page through serving's client."""
    assert crossings(("vilau.serving",), ("vilau.modeling", "vilau.training", "vilau.data", "vilau.evaluation")) == []
    rooms = ("vilau.modeling", "vilau.generation", "vilau.processing", "vilau.model", "vilau.training", "vilau.data")
    assert crossings(("vilau.web",), rooms) == []


def test_only_the_command_line_wires_rooms_together() -> None:
    """No room depends on the command line."""
    rest = [i for i in all_imports() if not i.module.startswith(("vilau.cli", "vilau.__main__"))]
    assert [str(i) for i in rest if i.target.startswith("vilau.cli")] == []


@pytest.mark.parametrize(
    "code",
    [
        "import vilau; dir(vilau); vilau.__version__",
        "from vilau.cli.main import main; assert main(['--help']) == 0",
        "from vilau.cli.main import main; assert main(['generate', '--help']) == 0",
        "from vilau.cli.main import main; assert main(['generate', 'x', '-o', 'x.doc']) == 2",
    ],
    ids=["import", "help", "help-of-a-verb", "wrong-usage"],
)
def test_import_and_help_load_neither_torch_nor_transformers(code: str) -> None:
    """Rule 6: `vilau --help` and wrong usage answer at once."""
    heavy = "{'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)"
    check = f"import sys; {code}; heavy = {heavy}; assert not heavy, heavy"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_public_name_is_an_attribute_error() -> None:
    """Lazy names must not turn a typing error into something stranger."""
    import vilau

    with pytest.raises(AttributeError, match="VilaUProcessor"):
        _ = vilau.VilaUProcesor  # type: ignore[attr-defined]


def test_every_public_name_loads_and_registers_the_auto_classes() -> None:
    """What `dir(vilau)` promises exists, and transformers' Auto classes know the model after the first use."""
    import vilau

    for name in vilau.__all__:
        assert getattr(vilau, name) is not None
    from transformers import AutoConfig

    assert type(AutoConfig.for_model("vilau")).__name__ == "VilaUConfig"
