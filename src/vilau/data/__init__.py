"""Data: every source is turned into :class:`~vilau.data.sample.Sample`; nothing here knows a model."""
