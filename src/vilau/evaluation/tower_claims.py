"""Which cells are compared, and what the paper says about each pair (arXiv 2409.04429)."""

from __future__ import annotations

from dataclasses import dataclass

GROUPS: dict[str, tuple[str, ...]] = {
    "What the losses do": ("align", "reconstruction", "unified", "rqvae"),
    "Recipes that fail in the paper": ("unified", "recipe-0", "recipe-1", "recipe-2", "recipe-3", "recipe-4"),
    "Quantizers": ("rq", "unified", "mcq", "none", "simvq"),
    "Depth": ("depth-1", "depth-2", "unified", "depth-8"),
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


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "With the contrastive loss the codes carry meaning, without it they lose it",
        "section 5.1, Table 7",
        "zero_shot_objects",
        "unified",
        "reconstruction",
        0.05,
    ),
    Claim(
        "Reconstruction alone reconstructs better than both losses", "Table 8", "psnr", "reconstruction", "unified", 0.2
    ),
    Claim(
        "From scratch with both losses, zero-shot stays low",
        "section 3.1",
        "zero_shot_objects",
        "unified",
        "recipe-0",
        0.05,
    ),
    Claim(
        "A pretrained text encoder alone does not help", "Appendix C", "zero_shot_objects", "unified", "recipe-1", 0.05
    ),
    Claim(
        "Nor do a pretrained RQ-VAE's encoder and decoder",
        "Appendix C",
        "zero_shot_objects",
        "unified",
        "recipe-2",
        0.05,
    ),
    Claim("With a frozen image encoder reconstruction is poor", "Appendix C", "psnr", "unified", "recipe-3", 0.2),
    Claim(
        "Training the text encoder too lowers zero-shot", "Appendix C", "zero_shot_objects", "unified", "recipe-4", 0.05
    ),
    Claim("Deeper residual quantization reconstructs better: 4 than 1", "Table 1", "psnr", "unified", "depth-1", 0.2),
    Claim("The same: 8 than 4", "Table 1", "psnr", "depth-8", "unified", 0.2),
    Claim(
        "Continuous tokens understand better than codes",
        "Table 2 and after",
        "zero_shot_objects",
        "none",
        "unified",
        0.05,
    ),
)
