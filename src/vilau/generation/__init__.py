"""Sampling of visual codes: filters, guidance, the visual loop. No files, no tokenizer."""
