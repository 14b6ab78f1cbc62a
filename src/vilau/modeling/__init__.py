"""The network: tower, quantizer, projector, language model, depth transformer. No files, no tokenizer, no sampling."""
