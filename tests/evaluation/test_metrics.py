from __future__ import annotations

import pytest
import torch

from vilau.data.nano.world import BACKGROUNDS, OBJECTS
from vilau.evaluation.metrics import blind_baselines, mean, named, psnr, same_answer, share

NAMES = tuple(spec.name for spec in OBJECTS)
COLOURS = tuple(BACKGROUNDS)


def test_share_and_mean_of_nothing_are_none() -> None:
    """No items is no figure, not zero."""
    assert share([]) is None and mean([]) is None
    assert share([True, False, True, True]) == 0.75


def test_psnr_is_on_the_unit_scale() -> None:
    """A constant error of a tenth of the range is 20 dB, and equal pictures are 100 dB rather than infinite."""
    real = torch.zeros(2, 3, 4, 4)
    ours = real.clone()
    ours[0] += 0.2
    assert psnr(ours, real).tolist() == pytest.approx([20.0, 100.0])
    with pytest.raises(ValueError, match="compared"):
        psnr(real[:1], real)


@pytest.mark.parametrize(
    ("words", "objects", "colours"),
    [
        ("a dog on a blue background", {"dog"}, {"blue"}),
        ("A Red Apple on an orange background.", {"red apple"}, {"orange"}),
        ("grey background with a carrot", {"carrot"}, {"gray"}),
        ("a car and a cat on a red background", {"car", "cat"}, {"red"}),
        ("a palm tree", {"palm tree"}, set()),
        ("", set(), set()),
        ("cats, scarecrows and reddish things", set(), set()),
    ],
)
def test_named_finds_whole_names_only(words: str, objects: set[str], colours: set[str]) -> None:
    """`car` is not in `carrot`, and the red of a red apple is no background."""
    found = named(words, NAMES, COLOURS)
    assert (found.objects, found.backgrounds) == (objects, colours)


def test_same_answer_forgives_case_spaces_and_a_full_stop_only() -> None:
    """Exact match, but not pedantic."""
    assert same_answer(" It  moves left. ", "it moves left")
    assert not same_answer("it moves left now", "it moves left.")
    assert not same_answer("", "no")


def test_blind_baselines_learn_from_training_answers_alone() -> None:
    """The majority answer and the most frequent answer per question, unseen questions falling back to the majority."""
    train = [("q1", "yes"), ("q1", "yes"), ("q1", "no"), ("q2", "no"), ("q3", "no")]
    test = [("q1", "yes"), ("q2", "no"), ("new", "no"), ("q1", "no")]
    found = blind_baselines(train, test)
    assert found.majority == 0.75
    assert found.question_only == 0.75
    assert blind_baselines(train, []).majority is None
