"""Which cells are compared, and what the paper says about each pair (arXiv 2409.04429)."""

from __future__ import annotations

from dataclasses import dataclass

GROUPS: dict[str, tuple[str, ...]] = {
    "What the losses do": ("align", "unified", "reconstruction", "rq-vae"),
    "The paper's recipe and those that fail": ("unified", *(f"recipe-{number}" for number in range(5))),
    "Quantizers": ("unified", "mcq", "none"),
    "Depth": ("depth-1", "depth-2", "unified", "depth-8"),
}
DESCRIPTIONS: dict[str, str] = {
    "align": "contrast alone, continuous features; what the others start from",
    "unified": "the paper's recipe: pretrained encoders, frozen text encoder, both losses; residual quantizer, depth 4",
    "reconstruction": "the same start, reconstruction loss only",
    "rq-vae": "convolutional encoder from scratch, no text",
    "recipe-0": "everything from scratch, both losses",
    "recipe-1": "only the text encoder is pretrained",
    "recipe-2": "encoder, codebook and decoder of `rq-vae`, the rest from scratch",
    "recipe-3": "frozen image encoder",
    "recipe-4": "trainable text encoder",
    "mcq": "multi-codebook quantizer: one codebook for each of 4 chunks of channels",
    "none": "continuous tokens: contrast alone, nothing drawn",
    "depth-1": "depth 1: plain vector quantization",
    "depth-2": "depth 2",
    "depth-8": "depth 8",
}


@dataclass(frozen=True)
class Claim:
    """`better` beats `worse` in `metric` by more than `margin`, says `source`."""

    text: str
    source: str
    metric: str
    better: str
    worse: str
    margin: float
    lower_is_better: bool = False


def _zero_shot(text: str, source: str, better: str, worse: str) -> Claim:
    return Claim(text, source, "zero_shot_objects", better, worse, 0.05)


def _psnr(text: str, source: str, better: str, worse: str) -> Claim:
    return Claim(text, source, "psnr", better, worse, 0.2)


CLAIMS: tuple[Claim, ...] = (
    _zero_shot("The contrastive loss keeps the codes aligned with text", "section 5.1", "unified", "reconstruction"),
    _psnr("It costs some reconstruction", "section 4.2", "reconstruction", "unified"),
    Claim("The plain RQ-VAE reconstructs slightly better", "Table 1", "rfid_judge", "rq-vae", "unified", 0.5, True),
    _zero_shot("From scratch with both losses alignment stays poor", "section 3.1", "unified", "recipe-0"),
    _zero_shot("A pretrained text encoder alone does not mend that", "Appendix C, 1", "unified", "recipe-1"),
    _zero_shot("Nor do RQ-VAE's pretrained encoder and decoder", "Appendix C, 2", "unified", "recipe-2"),
    _psnr("With a frozen image encoder reconstruction is poor", "Appendix C, 3", "unified", "recipe-3"),
    _zero_shot("A trainable text encoder slows alignment down", "Appendix C, 4", "unified", "recipe-4"),
    _psnr("Residual depth 4 reconstructs better than plain VQ", "Table 1", "unified", "depth-1"),
    _psnr("Depth 2 better than 1", "section 3.2", "depth-2", "depth-1"),
    _psnr("Depth 8 better than 4", "section 3.2", "depth-8", "unified"),
    _zero_shot("Continuous tokens align better than codes", "section 4.3", "none", "unified"),
)
