"""One process, DDP, FSDP2, micro-batches, recomputed blocks: the same training (R8), saved and resumed (R1 to R3)."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from training.test_language_model import CONFIGS, save_pretrained
from vilau.modeling.codebook import Codebooks
from vilau.modeling.vila_u import VilaUModel
from vilau.modeling.vision_tower import VisionTower
from vilau.training import parallel, spread
from vilau.training.checkpoint import newest_intact
from vilau.training.config import ScaleConfig, load_config
from vilau.training.engine import Engine, EngineOptions
from vilau.training.run import build_stage
from vilau.training.vision_tower import to_pixel_values

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "debug.yaml"
FIGURES = {"pretrain": ("text", "visual", "grad_norm"), "vision_tower": ("contrast", "pixel", "grad_norm")}
STEPS = 4
SMALL = (  # what takes the time and has no part in how a step is spread
    "model.vision_config.decoder_channels=8",
    "model.vision_config.decoder_groups=4",
    "model.vision_config.decoder_latent_channels=16",
    "model.vision_config.codebook_size=64",
)
pytestmark = pytest.mark.timeout(900)  # real processes, on a machine that may be busy


def probe(stage: Any) -> torch.Tensor:
    """The language model's states for fixed tokens."""
    with torch.no_grad():
        return stage.model.eval()(torch.arange(5, 17).unsqueeze(0))


def train(
    folder: Path, stage_name: str = "pretrain", steps: int = STEPS, overrides: Sequence[str] = (), **scale: Any
) -> None:
    """Train a stage of the debug configuration into `folder`, from its newest checkpoint there."""
    sizes = [f"stages.{stage_name}.steps={steps}", f"stages.{stage_name}.batch_size=8", f"output={folder}"]
    torch.manual_seed(1)
    stage = build_stage(load_config(CONFIG, [*SMALL, *sizes, *overrides]), stage_name, None)

    def hook(stage: Any, step: int, where: Path) -> None:
        where.mkdir(parents=True, exist_ok=True)
        torch.save(probe(stage), where / f"{step}.pt")

    samples = hook if stage_name == "pretrain" else None
    options = EngineOptions(folder, 1, 1, 2, 2, 2, sample_hook=samples, show_progress=False, loggers=())
    options.scale = ScaleConfig(**scale)
    Engine(stage, options).run()


def figures(folder: Path, stage_name: str = "pretrain") -> list[list[float]]:
    """The figures of every step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in FIGURES[stage_name]] for line in lines]


def digest(folder: Path) -> str:
    """The digest of the end."""
    return json.loads((folder / "final" / "training.json").read_text())["digest"]


def by_two(folder: Path, work: Callable[[], None], survive: bool = True) -> None:
    """Do the work in two processes that are joined by gloo; both must come through it, or neither."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(1)  # the parent's other threads did not come along: waiting for them never ends
                dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
                work()
                parallel.stop()
            except BaseException:
                (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
                os._exit(1)
            os._exit(0)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    errors = "\n".join(path.read_text() for path in folder.glob("error-*.txt"))
    assert (codes == [0, 0]) if survive else all(codes), errors


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the same stage trained by one process and by two in several ways."""
    root = tmp_path_factory.mktemp("spread")
    train(root / "one")
    train(root / "two_parts", accumulate=2)
    train(root / "four_parts", accumulate=4, gradient_checkpointing=True)

    def work() -> None:
        train(root / "ddp")
        train(root / "ddp_two_parts", accumulate=2)
        train(root / "fsdp", sharding="fsdp")
        train(root / "fsdp_two_parts", sharding="fsdp", accumulate=2, gradient_checkpointing=True)

    by_two(root, work)
    return root


@pytest.mark.parametrize("way", ["two_parts", "four_parts", "ddp", "ddp_two_parts", "fsdp", "fsdp_two_parts"])
def test_losses_do_not_depend_on_how_a_step_is_spread(runs: Path, way: str) -> None:
    """Micro-batches, processes, shards and recomputation change rounding only: tokens are weighted exactly."""
    for found, expected in zip(figures(runs / way), figures(runs / "one"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_sharded_training_publishes_the_model_it_trained(runs: Path) -> None:
    """`final` of a sharded run is an ordinary folder; what the sample hook saw on one process is that model too."""
    whole, sharded = (VilaUModel.from_pretrained(runs / way / "final") for way in ("one", "fsdp"))
    for (name, one), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert torch.allclose(one, other, atol=2e-4), name
    model = type("Stage", (), {"model": sharded})
    assert torch.allclose(torch.load(runs / "fsdp" / "samples" / f"{STEPS}.pt"), probe(model), atol=1e-6)


def test_a_sharded_checkpoint_is_resumed_exactly_and_by_any_number_of_processes(runs: Path, tmp_path: Path) -> None:
    """R1, R8: from the shards of step 2, two processes end in the same digest, one in the same losses.

    A checkpoint of one process is also where sharded training can go on from.
    """

    def middle_of(way: str, name: str) -> Path:
        checkpoints = tmp_path / name / "checkpoints"
        shutil.copytree(runs / way / "checkpoints" / "step-0000002", checkpoints / "step-0000002")
        return tmp_path / name

    again, alone, back = middle_of("fsdp", "again"), middle_of("fsdp", "alone"), middle_of("one", "back")

    def work() -> None:
        train(again, sharding="fsdp")
        train(back, sharding="fsdp")

    by_two(tmp_path, work)
    train(alone)
    assert digest(again) == digest(runs / "fsdp")
    assert figures(again) == figures(runs / "fsdp")[2:]
    for folder in (alone, back):
        for found, expected in zip(figures(folder), figures(runs / "one")[2:], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


def test_a_process_killed_inside_a_sharded_save_loses_one_interval(runs: Path, tmp_path: Path) -> None:
    """R1, R2: what the other had written is never visible; going on ends in the digest of the uninterrupted run."""
    run = tmp_path / "run"

    def work() -> None:
        if parallel.rank() == 1:
            sys.addaudithook(die_at_shard)
        train(run, sharding="fsdp")

    def die_at_shard(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and f".step-{STEPS:07d}.partial/shards/" in str(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    by_two(tmp_path, work, survive=False)
    assert newest_intact(run / "checkpoints") == run / "checkpoints" / "step-0000002"
    by_two(tmp_path, lambda: train(run, sharding="fsdp"))
    assert digest(run) == digest(runs / "fsdp")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-0000002", "step-0000004"]


def test_damaged_shards_are_seen(runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """R3, R4: each shard is a safetensors file in the manifest; a flipped bit in one makes the one before be used."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(runs / "fsdp" / "checkpoints", folder)
    newest = folder / f"step-{STEPS:07d}"
    shards = sorted((newest / "shards").iterdir())
    assert len(shards) == 2 and {file.suffix for file in newest.rglob("*") if file.is_file()} == {
        ".safetensors",
        ".json",
    }
    content = bytearray(shards[1].read_bytes())
    content[len(content) // 2] ^= 4
    shards[1].write_bytes(content)
    assert newest_intact(folder) == folder / "step-0000002"
    assert f"shards/{shards[1].name} does not have the SHA-256" in caplog.text


def test_the_tower_is_trained_alike_by_two_processes_sharded_or_not(tmp_path: Path) -> None:
    """Contrast over both processes' pictures, codebook, frozen text encoder: two steps within 1e-5."""
    train(tmp_path / "one", "vision_tower", 2)

    def work() -> None:
        train(tmp_path / "ddp", "vision_tower", 2)
        train(tmp_path / "fsdp", "vision_tower", 2, sharding="fsdp")

    by_two(tmp_path, work)
    expected = figures(tmp_path / "one", "vision_tower")
    for way in ("ddp", "fsdp"):
        for found, wanted in zip(figures(tmp_path / way, "vision_tower"), expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5), way


def test_bfloat16_is_refused_where_it_is_slow_and_trains_where_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On most CPUs bf16 would train many times slower without a word; allowed, losses differ by its precision only."""
    monkeypatch.setattr(spread, "_SLOW", 0.0)
    with pytest.raises(ValueError, match="scale.precision is bf16, but on this CPU .* set scale.precision to float32"):
        train(tmp_path / "no", steps=2, precision="bf16")
    train(tmp_path / "bf16", steps=2, precision="bf16", allow_slow=True)
    train(tmp_path / "float32", steps=2)
    found, expected = figures(tmp_path / "bf16"), figures(tmp_path / "float32")
    assert found != expected
    assert found[0][:2] == pytest.approx(expected[0][:2], rel=0.02)
    train(tmp_path / "tower", "vision_tower", steps=2, precision="bf16", allow_slow=True)
    tower = VisionTower.from_pretrained(tmp_path / "tower" / "final")
    assert tower.quantizer.codebook.dtype == tower.pixel_decoder.conv_out.weight.dtype == torch.float32


def test_code_vectors_learned_by_gradients_stay_float32_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 in bf16 casts what it gathers, but for the map of the codebook: rounded code vectors are other codes."""
    multiply = Codebooks.mapped_books

    def recorded(self: Codebooks) -> torch.Tensor:
        with (tmp_path / f"seen-{parallel.rank()}.txt").open("a") as seen:
            print(self.map.dtype, file=seen)
        return multiply(self)

    monkeypatch.setattr(Codebooks, "mapped_books", recorded)
    frozen = "stages.vision_tower.freeze=['^image_encoder.encoder', '^pixel_decoder']"  # each sharded weight takes time
    learning = ["model.vision_config.codebook_learning=gradient", frozen]

    def work() -> None:
        train(tmp_path / "bf16", "vision_tower", 1, learning, sharding="fsdp", precision="bf16", allow_slow=True)

    by_two(tmp_path, work)
    for rank in range(2):
        assert set((tmp_path / f"seen-{rank}.txt").read_text().split()) == {"torch.float32"}
    tower = VisionTower.from_pretrained(tmp_path / "bf16" / "final")
    assert tower.quantizer.map.dtype == torch.float32 and bool(tower.quantizer.map.any())


def test_adapters_are_trained_and_saved_alike_by_one_process_and_in_shards(tmp_path: Path) -> None:
    """LoRA with a module that learns whole, under FSDP2: the losses of one process, its adapters, its merged model."""
    lora = ["stages.pretrain.lora={rank: 2, dropout: 0.0, also: [projector]}"]
    train(tmp_path / "one", overrides=lora, steps=2)
    by_two(tmp_path, lambda: train(tmp_path / "fsdp", overrides=lora, steps=2, sharding="fsdp"))
    for found, expected in zip(figures(tmp_path / "fsdp"), figures(tmp_path / "one"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, sharded = (load_file(tmp_path / way / "final" / name) for way in ("one", "fsdp"))
        assert one.keys() == sharded.keys()
        for key, tensor in one.items():
            assert float((tensor - sharded[key]).float().norm()) <= 1e-3 * float(tensor.float().norm()), key
    assert all(bool(tensor.any()) for tensor in one.values()), "the second factors began as zeros and have learned"


def test_a_share_of_the_positions_is_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    """R8 with `visual_share`: which positions are left out of the loss hangs on seed, step and sample, not on ranks."""
    share = ["stages.pretrain.visual_share=0.5"]
    train(tmp_path / "one", overrides=share, steps=2)
    train(tmp_path / "all", steps=2)
    by_two(tmp_path, lambda: train(tmp_path / "two", overrides=share, steps=2, accumulate=2))
    expected = figures(tmp_path / "one")
    assert expected[0][1] != figures(tmp_path / "all")[0][1]
    for found, wanted in zip(figures(tmp_path / "two"), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_language_model_with_new_rows_is_trained_alike_in_shards(family: str, tmp_path: Path) -> None:
    """`init_language_model` with a grown vocabulary, tied or not, under FSDP2: losses and weights of one process."""
    small = copy.deepcopy(CONFIGS[family])
    small.vocab_size = 400  # as many as its tokenizer knows, so that new tokens need new rows
    save_pretrained(tmp_path / "lm", small)
    start = ["stages.pretrain.row_length=512", f"stages.pretrain.init_language_model={tmp_path / 'lm'}"]
    start.append("model.text_config={max_position_embeddings: 512}")
    train(tmp_path / "one", overrides=start, steps=2)
    by_two(tmp_path, lambda: train(tmp_path / "fsdp", overrides=start, steps=2, sharding="fsdp"))
    for found, expected in zip(figures(tmp_path / "fsdp"), figures(tmp_path / "one"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    one, sharded = (VilaUModel.from_pretrained(tmp_path / way / "final") for way in ("one", "fsdp"))
    assert len(one.get_input_embeddings().weight) == one.config.text_config.vocab_size > 400
    for (name, weight), other in zip(one.named_parameters(), sharded.parameters(), strict=True):
        assert torch.allclose(weight, other, atol=2e-4), name
    began = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").get_input_embeddings().weight
    learned = one.get_input_embeddings().weight[:400]
    assert torch.allclose(learned, began, atol=0.01) and not torch.equal(learned, began)


def test_codes_do_not_depend_on_the_precision_of_training(tmp_path: Path) -> None:
    """Codes made on the fly under bf16 are those that `vilau data codes` stores in float32."""
    overrides = [f"output={tmp_path}", "stages.pretrain.batch_size=2"]
    stage: Any = build_stage(load_config(CONFIG, overrides), "pretrain", None)
    stage.train_mode()
    batch = stage.make_batch(0, 0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = stage._pictures(batch)
    assert torch.equal(found, stage.model.vision_tower.encode(to_pixel_values(batch.frames)))


def test_switches_that_cannot_be_are_errors(tmp_path: Path) -> None:
    """Offloading without shards, and a batch that micro-batches do not divide, are said before the first step."""
    with pytest.raises(ValueError, match="cpu_offload needs scale.sharding 'fsdp' and at least 2 processes"):
        train(tmp_path, cpu_offload=True)
    with pytest.raises(ValueError, match=r"batch_size 8 does not divide by 1 processes times 3 micro-batches"):
        train(tmp_path, accumulate=3)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_compiled_blocks_train_alike(runs: Path, tmp_path: Path) -> None:
    """`compile` changes rounding only."""
    train(tmp_path / "compiled", compile=True)
    for found, expected in zip(figures(tmp_path / "compiled"), figures(runs / "one"), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
