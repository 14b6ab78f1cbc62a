"""Agreement with the published reference: every tensor of a golden folder, recomputed and compared.

This package is the only place that knows the reference's own rules. A golden folder holds a released checkpoint
(``ckpt``), ``outputs.safetensors`` with what the reference computed, ``inputs.safetensors``, ``prompts.json`` and
``meta.json``; pictures lie in ``../media``. ``crops.json``, if there, says which slices of a tensor were kept.

    golden.py    the folder: tensors, crops, media, prompts
    compare.py   kinds of agreement, their tolerances and why
    chats.py     its prompts and samples -> our turns and samples
    subject.py   the model under test and what several checks share
    inputs.py  tower.py  language.py  losses.py  drawing.py    the checks, by job
    report.py    runs them, makes the table
"""

from vilau.evaluation.parity.report import ParityReport, check_folder

__all__ = ["ParityReport", "check_folder"]
