"""Measuring models: the nano suite, its two judges (drawings and motion), plain metrics, and reports."""
