"""The loop stops cleanly, resumes exactly and says why it cannot go on."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from vilau.training.checkpoint import find_fault, list_checkpoints, state_digest
from vilau.training.engine import TrainingError
from vilau.training.stopping import MARKER, StopRequested, StopSignal, check_marker


def digest(folder: Path) -> str:
    """The digest that a finished stage recorded."""
    return json.loads((folder / "training.json").read_text())["digest"]


@pytest.fixture
def whole(engine: Callable[..., Any], tmp_path: Path) -> str:
    """The digest of an undisturbed run."""
    return digest(engine(folder=tmp_path / "whole").run())


def stop_at(chosen: int) -> Callable[[int], None]:
    """Send this process SIGTERM after a step."""
    return lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == chosen else None


def test_a_finished_stage_returns_at_once(engine: Callable[..., Any]) -> None:
    """Calling a finished run again trains nothing and leaves its result alone."""
    result = engine().run()
    before = (result / "training.json").stat().st_mtime_ns
    again = engine()
    assert again.run() == result
    assert again.stage.seen == []
    assert (result / "training.json").stat().st_mtime_ns == before


def test_sigterm_leaves_a_checkpoint_a_marker_and_an_exact_resume(
    engine: Callable[..., Any], whole: str, tmp_path: Path
) -> None:
    """R7: a stop between two saves loses nothing, and going on ends in the digest of the undisturbed run."""
    with pytest.raises(StopRequested, match="after step 5") as caught, StopSignal() as stop:
        engine(stop=stop, on_step=stop_at(5)).run()
    assert caught.value.exit_code == 143
    assert list_checkpoints(tmp_path / "tiny" / "checkpoints")[-1].name == "step-0000005"
    assert (tmp_path / "tiny" / MARKER).read_text() == "stopped on request after step 5\n"
    rest = engine()
    assert digest(rest.run()) == whole
    assert rest.stage.seen[0] == [20, 21, 22, 23]
    steps = [json.loads(line)["step"] for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_a_stop_with_the_last_step_finishes_the_stage_and_is_remembered(engine: Callable[..., Any], whole: str) -> None:
    """A signal in a stage's last step must not get lost before the next stage begins."""
    with StopSignal() as stop:
        last = engine(stop=stop, on_step=stop_at(8))
        assert digest(last.run()) == whole
    assert last.stopped


def test_handlers_are_put_back() -> None:
    """Outside training the process reacts to signals as it did before."""
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_restarted_worker_obeys_the_marker_and_a_new_command_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R7: torchrun's restart of a stopped worker leaves at once; a command given anew goes on."""
    (tmp_path / MARKER).write_text("stopped on request after step 5\n")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(StopRequested) as caught:
        check_marker([tmp_path], first=True)
    assert caught.value.exit_code == 143
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    check_marker([tmp_path], first=False)
    assert (tmp_path / MARKER).is_file()
    check_marker([tmp_path], first=True)
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(engine: Callable[..., Any], factor: float) -> None:
    """R6 on one process: the message names stage and step, and the weights are those of the step before."""
    bad = engine()
    bad.stage.poison[4] = lambda loss: loss * factor
    with pytest.raises(TrainingError, match="tiny: the loss of step 5 is not finite on process 0"):
        bad.run()
    assert all(p.isfinite().all() for p in bad.stage.module.parameters())
    assert bad.step == 4


def test_a_gradient_that_is_not_finite_stops_before_the_update(engine: Callable[..., Any]) -> None:
    """A finite loss with an infinite gradient must not reach weights or checkpoints."""
    bad = engine()
    bad.stage.poison[4] = lambda loss: (loss - loss.detach()).abs().sqrt()  # 0, with the slope of a root at 0
    with pytest.raises(TrainingError, match="the gradient of step 5 is not finite"):
        bad.run()
    assert all(p.isfinite().all() for p in bad.stage.module.parameters())
    assert all(find_fault(path) is None for path in list_checkpoints(bad.options.folder / "checkpoints"))


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let the system refuse to write files beyond a size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_costs_nothing_saved(
    engine: Callable[..., Any], tiny_stage: Any, tmp_path: Path
) -> None:
    """A checkpoint that cannot be written stops the run with the reason; earlier ones stay, no half one remains."""
    undisturbed = digest(engine(tiny_stage(width=64), folder=tmp_path / "other").run())
    with pytest.raises(StopRequested), StopSignal() as stop:
        engine(tiny_stage(width=64), stop=stop, on_step=stop_at(2)).run()
    with pytest.raises(TrainingError, match="cannot write the checkpoint") as caught, file_size_limit(10_000):
        engine(tiny_stage(width=64)).run()
    assert "\n" not in str(caught.value)
    folder = tmp_path / "tiny" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-0000002"]
    assert find_fault(folder / "step-0000002") is None
    assert digest(engine(tiny_stage(width=64)).run()) == undisturbed


def test_an_unwritable_folder_is_an_os_error(engine: Callable[..., Any], tmp_path: Path) -> None:
    """A path below a file cannot become a folder: the command line prints such errors as one line."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        engine(folder=tmp_path / "file" / "tiny").run()


def test_changed_settings_are_named_when_resuming(
    engine: Callable[..., Any], tiny_stage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Another batch size goes on from the same step with the new configuration's samples, and says so."""
    with pytest.raises(StopRequested), StopSignal() as stop:
        engine(stop=stop, on_step=stop_at(4)).run()
    changed = engine(tiny_stage(batch_size=2))
    with caplog.at_level(logging.WARNING):
        changed.run()
    assert changed.stage.seen[0] == [8, 9]
    assert "goes on with batch_size 2 instead of 4" in caplog.text


def test_a_checkpoint_of_another_model_is_refused(engine: Callable[..., Any], tiny_stage: Any) -> None:
    """Resuming with another architecture is one clear line, not a traceback from the library."""
    with pytest.raises(StopRequested), StopSignal() as stop:
        engine(stop=stop, on_step=stop_at(4)).run()
    with pytest.raises(TrainingError, match="does not fit this configuration") as caught:
        engine(tiny_stage(width=5)).run()
    assert "\n" not in str(caught.value)


def test_a_damaged_result_is_made_again(
    engine: Callable[..., Any], whole: str, caplog: pytest.LogCaptureFixture
) -> None:
    """R3 for results: a flipped bit in a finished stage is found before use, and the result is built anew."""
    result = engine().run()
    content = bytearray((result / "weights.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (result / "weights.pt").write_bytes(content)
    again = engine()
    with caplog.at_level(logging.WARNING):
        assert digest(again.run()) == whole
    assert "is damaged: weights.pt" in caplog.text
    assert again.stage.seen == [], "the last checkpoint has everything"
    assert find_fault(result) is None


def test_a_damaged_checkpoint_is_passed_over(
    engine: Callable[..., Any], whole: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """R3: resuming takes the checkpoint before the damaged one, names both, and still ends in the same digest."""
    with pytest.raises(StopRequested), StopSignal() as stop:
        engine(stop=stop, on_step=stop_at(6)).run()
    newest = list_checkpoints(tmp_path / "tiny" / "checkpoints")[-1]
    (newest / "module.safetensors").unlink()
    rest = engine()
    with caplog.at_level(logging.INFO):
        assert digest(rest.run()) == whole
    assert rest.stage.seen[0] == [16, 17, 18, 19]
    assert "using step-0000004 instead of damaged step-0000006" in caplog.text


def test_each_step_has_its_own_random_numbers(engine: Callable[..., Any]) -> None:
    """Nothing random outlives a step: drawing numbers between steps, as sample pictures do, changes nothing."""
    plain, drawing = engine(), engine(folder=engine().options.folder.with_name("b"))
    drawing.options.on_step = lambda step: torch.randn(step)
    plain.run()
    drawing.run()
    assert state_digest(plain.stage.module, plain.optimizers) == state_digest(drawing.stage.module, drawing.optimizers)


def test_a_spike_is_left_out_and_remembered(engine: Callable[..., Any], tiny_stage: Any, tmp_path: Path) -> None:
    """R6's option: an update of a gradient far above the recent ones is skipped and counted; a resume decides alike."""
    steps, bad = 20, 14

    def build(folder: str, **options: Any) -> Any:
        stage = tiny_stage(steps=steps)
        stage.poison[bad] = lambda loss: loss * 1e6
        return engine(stage, folder=tmp_path / folder, skip_spikes=50.0, **options)

    plain, before = build("plain"), {}
    plain.options.on_step = lambda step: before.update({step: [p.clone() for p in plain.stage.module.parameters()]})
    plain.run()
    assert all(torch.equal(a, b) for a, b in zip(before[bad], before[bad + 1], strict=True))
    assert not torch.equal(before[bad - 1][0], before[bad][0])
    lines = [json.loads(line) for line in (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["spikes_skipped"]] == [bad + 1]
    with pytest.raises(StopRequested), StopSignal() as stop:
        build("again", stop=stop, on_step=stop_at(12)).run()
    assert digest(build("again").run()) == digest(tmp_path / "plain" / "final")


def test_skipped_samples_are_counted_through_a_resume(engine: Callable[..., Any], tiny_stage: Any) -> None:
    """R5: the ledger of bad samples travels with the batches and the checkpoint; nothing is counted twice or lost."""

    def build(**options: Any) -> Any:
        stage = tiny_stage(steps=8)
        stage.take_skips = lambda: Counter({("pictures", "broken_image", "shard-1.tar"): 2})
        return engine(stage, **options)

    with pytest.raises(StopRequested), StopSignal() as stop:
        build(stop=stop, on_step=stop_at(5)).run()
    rest = build()
    rest.run()
    assert rest.skipped == Counter({("pictures", "broken_image", "shard-1.tar"): 16})


def test_too_many_bad_samples_stop_the_run(engine: Callable[..., Any], tiny_stage: Any) -> None:
    """R5: above the set share the run ends with what is wrong, by source and kind, once enough was read to tell."""
    stage = tiny_stage(steps=8, batch_size=40)
    stage.take_skips = lambda: Counter({("pictures", "broken_image", "shard-1.tar"): 10})
    with pytest.raises(TrainingError, match=r"20.0% of the samples read cannot be used, .* \(10.0%\)") as caught:
        engine(stage, max_skipped_share=0.1).run()
    assert "after step 3" in str(caught.value)
    assert "pictures: broken_image 30 (in shard-1.tar 30)" in str(caught.value)
