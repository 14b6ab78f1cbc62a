"""Mixed sequences: splicing in row-major order, targets one position ahead, refusals."""

from __future__ import annotations

import pytest
import torch

from vilau.modeling.sequence import check_sequence, find_targets, splice

T, V, P = 0, 1, 2
KINDS = torch.tensor([[T, V, V, T, T], [V, V, T, P, P]])


def test_splice_puts_pictures_in_order_and_leaves_text() -> None:
    """The v-th visual position, counted row by row, gets the v-th embedding; text rows are untouched."""
    text, visual = torch.randn(2, 5, 3), torch.randn(4, 3)
    out = splice(text, KINDS, visual)
    expected = text.clone()
    expected[0, 1], expected[0, 2], expected[1, 0], expected[1, 1] = visual
    assert torch.equal(out, expected)


def test_splice_passes_gradients_to_both() -> None:
    """Training reaches the projector through visual positions and the embedding table through the others."""
    text, visual = torch.randn(2, 5, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    splice(text, KINDS, visual).sum().backward()
    assert torch.equal(visual.grad, torch.ones(4, 3))
    assert torch.equal(text.grad[..., 0], (KINDS != V).float())


def test_splice_takes_the_text_dtype() -> None:
    """A float32 projector beside a bfloat16 language model must not change the sequence's dtype."""
    assert splice(torch.zeros(2, 5, 3, dtype=torch.bfloat16), KINDS, torch.ones(4, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize("given", [0, 3, 5])
def test_wrong_number_of_pictures_is_refused(given: int) -> None:
    """Too few would repeat, too many would vanish silently: both are errors that name the two numbers."""
    with pytest.raises(ValueError, match=f"4 visual positions but the pictures given bring {given}"):
        check_sequence(torch.zeros(2, 5, dtype=torch.long), KINDS, given)
    check_sequence(torch.zeros(2, 5, dtype=torch.long), KINDS, 4)


def test_shapes_must_agree() -> None:
    """Ids and kinds describe the same positions."""
    with pytest.raises(ValueError, match=r"\(2, 4\) and kinds \(2, 5\)"):
        check_sequence(torch.zeros(2, 4, dtype=torch.long), KINDS, 4)


def mask(*places: tuple[int, int]) -> torch.Tensor:
    """A (2, 5) mask that is true at the given places."""
    out = torch.zeros(2, 5, dtype=torch.bool)
    for row, column in places:
        out[row, column] = True
    return out


def test_targets_are_predicted_from_the_position_before() -> None:
    """Flat indices of state and target, checked by hand: also the visual row that each target takes its codes from."""
    ids = torch.arange(10).reshape(2, 5)
    found = find_targets(ids, KINDS, mask((0, 3), (1, 2)), mask((0, 1), (0, 2), (1, 1)))
    assert found.text_from.tolist() == [2, 6] and found.text_at.tolist() == [3, 7]
    assert found.text_ids.tolist() == [3, 7]
    assert found.visual_from.tolist() == [0, 1, 5] and found.visual_at.tolist() == [1, 2, 6]
    assert found.visual_rows.tolist() == [0, 1, 3]  # the second row's first visual position is row 2, not a target


def test_no_targets_give_empty_indices() -> None:
    """A batch may supervise one kind only."""
    found = find_targets(torch.zeros(2, 5, dtype=torch.long), KINDS, mask(), mask())
    assert not len(found.text_at) and not len(found.visual_at) and not len(found.visual_rows)


@pytest.mark.parametrize(
    ("text", "visual", "words"),
    [
        ([(0, 1)], [], "text_targets cover positions that hold no text"),
        ([(1, 3)], [], "text_targets cover positions that hold no text"),
        ([], [(0, 3)], "visual_targets cover positions that hold no visual"),
        ([], [(1, 4)], "visual_targets cover positions that hold no visual"),
        ([(0, 0)], [], "first position"),
        ([], [(1, 0)], "first position"),
    ],
)
def test_impossible_targets_are_refused(text: list[tuple[int, int]], visual: list[tuple[int, int]], words: str) -> None:
    """Text labels never cover pictures or padding, visual labels never cover text, and nothing predicts the first."""
    with pytest.raises(ValueError, match=words):
        find_targets(torch.zeros(2, 5, dtype=torch.long), KINDS, mask(*text), mask(*visual))
