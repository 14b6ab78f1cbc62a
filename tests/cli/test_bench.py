"""`vilau bench generate`: its JSON, its table, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PROMISED = {
    "preset",
    "batch",
    "cpu_ms_per_position",
    "wall_ms_per_position",
    "floor_ms_per_position",
    "floor_ratio",
    "peak_memory_mb",
    "read_gb_per_s",
    "gflop_per_s",
}
SMALL = ("--matrix-mb", 16, "--positions", 4, "--prompt-length", 5, "--threads", 1)


def test_json_has_a_row_for_every_batch(cli, tiny_model_dir: Path) -> None:
    """The promised fields, finite and positive; the parts make up the whole; a ratio is floor by time."""
    result = cli("bench", "generate", tiny_model_dir, "--batch", "1,3", "--json", *SMALL)
    assert result.code == 0, result.err
    rows = json.loads(result.out)
    assert [(row["batch"], row["rows"]) for row in rows] == [(1, 2), (3, 6)]
    for row in rows:
        assert row.keys() >= PROMISED and all(row[name] for name in PROMISED)
        assert row["floor_ratio"] == pytest.approx(row["floor_ms_per_position"] / row["cpu_ms_per_position"])
        assert row["depth_ms"] > 0 and row["lm_ms"] > 0 and row["sampling_ms"] > 0
        assert row["prefill_ms"] > 0 and row["decode_ms"] > 0 and row["encode_ms"] > 0
        assert row["threads"] == 1 and row["dtype"] == "float32"
    assert rows[1]["mb_read_per_position"] > rows[0]["mb_read_per_position"]  # caches of more rows


def test_table_without_guidance(cli, tiny_model_dir: Path) -> None:
    """Without guidance there is one row a picture; the table names the processor and has a line for each batch."""
    result = cli(
        "bench", "generate", tiny_model_dir, "--batch", "2", "--guidance-scale", 1, "--no-pixels", "--kernel", "mkldnn",
        *SMALL,
    )  # fmt: skip
    assert result.code == 0, result.err
    lines = result.out.strip().splitlines()
    assert "1 threads, float32" in lines[0]
    assert len(lines) == 5 and lines[4].startswith("| 2 |") and lines[4].endswith("| mkldnn |")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--batch", "1,x"), 2, ("'1,x'", "1,4,16")),
        (("--batch", "0"), 2, ("'0'", "from 1")),
        (("--dtype", "int3"), 2, ("'int3'", "bfloat16")),
        (("--positions", "0"), 2, ("0",)),
        (("--threads", "0"), 2, ("0",)),
        (("--kernel", "fast", "--matrix-mb", "1"), 1, ("'fast'", "mkldnn")),
        (("--positions", "100000", "--matrix-mb", "1"), 1, ("context",)),
    ],
)
def test_wrong_values(cli, tiny_model_dir: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    """One line that names the value and what is allowed."""
    result = cli("bench", "generate", tiny_model_dir, "--no-pixels", *arguments)
    assert (result.code, result.out) == (code, "")
    assert all(word in result.error for word in words), result.error


def test_a_preset_that_does_not_fit_is_refused(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has both sizes and a way out, before any memory is taken."""
    from vilau.evaluation import generation_speed

    monkeypatch.setattr(generation_speed, "available_memory", lambda device: 8 * 10**9)
    result = cli("bench", "generate", "7b-256", "--device", "cpu")
    assert result.code == 1
    assert "7b-256 needs 29 GB" in result.error and "8 GB are free" in result.error and "midsize" in result.error


def test_presets_are_what_they_say() -> None:
    """The sizes of QUALITY's mid-size model and of the paper's 7B ones, counted."""
    import torch

    from vilau.configuration import VilaUConfig
    from vilau.evaluation.generation_speed import PRESETS, work_per_position
    from vilau.model import VilaUForConditionalGeneration

    work = {}
    for name in PRESETS:
        with torch.device("meta"):
            model = VilaUForConditionalGeneration(VilaUConfig(**PRESETS[name]))
        work[name] = work_per_position(model, 2, 0).bytes_read
    assert work["midsize"] == pytest.approx(1.22e9, rel=0.02)  # 85 M of the LM and 4 times 55 M
    assert work["midsize-d16"] == pytest.approx(3.87e9, rel=0.02)
    assert work["7b-256"] == pytest.approx(4 * 6.48e9 + 4 * 4 * 92e6, rel=0.02)
    assert work["7b-384"] > 5 * work["midsize-d16"]
