"""Data as people have it: one file per format, each turned into :class:`~vilau.data.sample.Sample`."""
