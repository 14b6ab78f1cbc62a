"""Checkpoints for users: from what a run leaves to a folder that can be published."""
