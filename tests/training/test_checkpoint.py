"""Checkpoints are whole or not there, and no damage to one goes unseen (promises R2, R3, R4)."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vilau.training.checkpoint import (
    find_fault,
    list_checkpoints,
    load_checkpoint,
    newest_intact,
    save_checkpoint,
    seal,
    state_digest,
)

PAGE = 4096


def make_state(seed: int = 0) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    """A tiny module and an optimizer that has done one step."""
    torch.manual_seed(seed)
    module = nn.Linear(24, 24)
    optimizer = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return module, [optimizer]


def save(folder: Path, step: int, keep: int = 2) -> Path:
    """Save a state that is another for each step."""
    return save_checkpoint(folder, step, *make_state(step), {"stage": "tiny"}, keep)


def flip(file: Path, other: Path, chance: random.Random) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


def truncate(file: Path, other: Path, chance: random.Random) -> None:
    """Lose the end."""
    file.write_bytes(file.read_bytes()[: chance.randrange(file.stat().st_size)])


def zero_page(file: Path, other: Path, chance: random.Random) -> None:
    """Lose a page that is not all zeros already."""
    content = bytearray(file.read_bytes())
    starts = [at for at in range(0, len(content), PAGE) if any(content[at : at + PAGE])]
    start = chance.choice(starts)
    content[start : start + PAGE] = bytes(len(content[start : start + PAGE]))
    file.write_bytes(content)


def miss(file: Path, other: Path, chance: random.Random) -> None:
    """Lose the file."""
    file.unlink()


def swap(file: Path, other: Path, chance: random.Random) -> None:
    """Take the file of the same name, or the whole content, from the other checkpoint."""
    names = [file.name] if chance.random() < 0.7 else [path.name for path in file.parent.iterdir()]
    for name in names:
        shutil.copy(other.parent / name, file.parent / name)


def surplus(file: Path, other: Path, chance: random.Random) -> None:
    """A file too many."""
    shutil.copy(file, file.with_name(f"{file.name}.{chance.randrange(99)}"))


def check_mutations(folder: Path, count: int, caplog: pytest.LogCaptureFixture) -> None:
    """Damage the newest of two checkpoints in `count` ways; each must be seen, and the older one be taken."""
    older, newer = save(folder, 1), save(folder, 2)
    kept = {path: path.read_bytes() for path in newer.iterdir()}
    files, chance = sorted(kept), random.Random(3)
    for number in range(count):
        harm = (flip, truncate, zero_page, miss, swap, surplus)[number % 6]
        file = files[number // 6 % len(files)]
        caplog.clear()
        harm(file, older / file.name, chance)
        assert newest_intact(folder) == older, f"mutation {number}: {harm.__name__} of {file.name} was not seen"
        assert "step-0000002 is damaged" in caplog.text
        assert "using step-0000001" in caplog.text
        for path in set(newer.iterdir()) - set(kept):
            path.unlink()
        for path, content in kept.items():
            path.write_bytes(content)
        assert number % 20 or newest_intact(folder) == newer


def test_200_mutations_are_all_detected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """R3: bit flips, truncation, zeroed pages, missing, swapped and surplus files are seen before use."""
    check_mutations(tmp_path, 200, caplog)


@pytest.mark.torture
def test_1000_mutations_are_all_detected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """R3, five times as often."""
    check_mutations(tmp_path, 1000, caplog)


def test_without_an_intact_one_training_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Both damaged: none is used, both are named."""
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert newest_intact(tmp_path) is None
    assert "step-0000001 is damaged" in caplog.text
    assert "step-0000002 is damaged" in caplog.text


def test_a_save_killed_at_any_file_operation_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    """R2: whatever the moment of death, each visible checkpoint is complete and at most the one in work is missing.

    Three saves with two kept, so that writing, renaming and the removal of the oldest are all interrupted.
    """
    moments, folder = 0, tmp_path
    for moments in range(1, 300):
        folder = tmp_path / str(moments)
        save(folder, 1)
        save(folder, 2)
        if _die_at(moments, partial(save, folder, 3)) == 0:
            break
        visible = list_checkpoints(folder)
        assert [find_fault(path) for path in visible] == [None] * len(visible)
        assert newest_intact(folder) in (folder / "step-0000002", folder / "step-0000003")
        save(folder, 3)  # the next process clears up
        assert sorted(path.name for path in folder.iterdir()) == ["step-0000002", "step-0000003"]
    assert 20 < moments < 299, "the save has some tens of file operations and then ends by itself"
    assert sorted(path.name for path in folder.iterdir()) == ["step-0000002", "step-0000003"]


def _die_at(moment: int, work: Callable[[], object]) -> int:
    """Do the work in a forked process that kills itself at its n-th file operation; return 0 if it came through."""
    child = os.fork()
    if not child:
        left = moment

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event == "open" or event.startswith(("os.", "shutil.")):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            work()
        except BaseException:
            os._exit(9)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    """Weights and optimizer states come back bit for bit."""
    module, optimizers = make_state(1)
    path = save_checkpoint(tmp_path, 7, module, optimizers, {"seed": 3}, 2)
    other, others = make_state(2)
    assert state_digest(other, others) != state_digest(module, optimizers)
    assert load_checkpoint(path, other, others) == {"step": 7, "seed": 3}
    assert state_digest(other, others) == state_digest(module, optimizers)


def test_the_newest_are_kept_and_later_ones_removed(tmp_path: Path) -> None:
    """Saving step 3 after falling back from a damaged step 9 must not count step 9 as one of the kept."""
    for step in (1, 2, 9, 3):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-0000002", "step-0000003"]


class Payload:
    """What a crafted pickle would like to run."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_crafted_pickle_is_refused(tmp_path: Path, as_zip: bool) -> None:
    """R4: an optimizer file that holds code is refused by one clear line and runs nothing, manifest or not."""
    path, trap = save(tmp_path, 1), tmp_path / "pwned"
    if as_zip:
        torch.save([Payload(trap)], path / "optimizers.pt")
    else:
        (path / "optimizers.pt").write_bytes(pickle.dumps([Payload(trap)]))
    seal(path)
    assert find_fault(path) is None
    with pytest.raises(ValueError, match="is refused") as caught:
        load_checkpoint(path, *make_state())
    assert "\n" not in str(caught.value)
    assert not trap.exists()


def test_results_may_have_files_beside(tmp_path: Path) -> None:
    """A note beside a finished stage's files is no damage; an altered file is."""
    path = save(tmp_path, 1)
    (path / "notes.txt").write_text("mine")
    assert find_fault(path, surplus=True) is None
    assert "notes.txt" in str(find_fault(path))
    (path / "state.json").write_text(json.dumps({"step": 2}))
    assert find_fault(path, surplus=True) is not None
