"""What is told of a sample is what the model gets: every position once, learnt ones marked."""

from __future__ import annotations

import numpy as np

from vilau.data.sample import Sample, Turn, image, text, video
from vilau.processing.encode import encode_sample
from vilau.processing.explain import describe, explain
from vilau.processing.processor import VilaUProcessor


def test_spans_are_all_positions_in_order(shipped_model_dir) -> None:
    """A film's frames and words: spans join without gaps, and learnt ones are exactly the targets."""
    processor = VilaUProcessor.from_pretrained(shipped_model_dir)
    frame = np.zeros((processor.image_size, processor.image_size, 3), np.uint8)
    turns = (
        Turn("user", (image(frame), text("what is this?"))),
        Turn("assistant", (text("a cat"), video((frame, frame)))),
    )
    positions = processor.positions_per_frame
    encoded = encode_sample(Sample("s", "mixed", turns), processor.tokenizer, processor.template, positions)
    spans = explain(encoded, processor.tokenizer, positions)
    assert [position for span in spans for position in range(span.first, span.last + 1)] == list(range(len(encoded)))
    learnt = encoded.text_targets | encoded.visual_targets
    for span in spans:
        assert learnt[span.first : span.last + 1].all() if span.learnt else not learnt[span.first : span.last + 1].any()
        assert span.token_id is None or span.token_id == encoded.input_ids[span.first]
    assert [span.shown for span in spans if span.token_id is None] == ["picture 1", "picture 2", "picture 3"]
    lines = describe(encoded, processor.tokenizer, positions)
    assert len(lines) == len(spans) + 1
    said = [line.split()[-1] for line in lines if " * " in line]
    assert said[:2] == ["a", "cat"] and said[-1] == "</s>"
