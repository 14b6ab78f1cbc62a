"""How much work on pictures and prompts goes between two tokens of a text, so that text keeps its pace."""

from __future__ import annotations

from dataclasses import dataclass

from vilau.generation.position import Networks


@dataclass(frozen=True)
class Pace:
    """Costs of the pieces of work, in weights read; a step with n rows costs ``weights * (1 + n / free_rows)``.

    Args:
        limit: how many times longer than alone a token of text may take; infinite for no limit.
        language, head, depth: weights of a pass of the language model, of its text head, and of one depth step.
        free_rows: rows whose products cost as much as reading the weights once.
    """

    limit: float
    language: float
    head: float
    depth: float
    free_rows: float

    @classmethod
    def of(cls, networks: Networks, head: float, limit: float, free_rows: float) -> Pace:
        """Return the costs of a model's networks, whose text head has ``head`` weights.

        Raises:
            ValueError: the limit is below 1 or not a number.
        """
        if not limit >= 1:
            raise ValueError(f"text_pace is {limit}; it must be at least 1, the time that a token takes alone")
        language, depth = (
            0 if network is None else sum(parameter.numel() for parameter in network.parameters())
            for network in (networks.language, networks.depth_transformer)
        )
        return cls(limit, language, head, depth, free_rows)

    def room(self, texts: int) -> float:
        """Return the work that may be added to a step of so many texts; without texts there is no limit."""
        if not texts:
            return float("inf")
        return (self.limit - 1) * (self.language + self.head) * (1 + texts / self.free_rows)

    def positions(self, count: int) -> float:
        """Return what so many further positions add to a pass of the language model."""
        return self.language * count / self.free_rows

    def positions_in(self, room: float, most: int) -> int:
        """Return how many further positions fit into a room, at most ``most``."""
        return int(min(most, room * self.free_rows / self.language))

    def depth_step(self, rows: int) -> float:
        """Return the cost of one depth step of so many rows."""
        return self.depth * (1 + rows / self.free_rows)
