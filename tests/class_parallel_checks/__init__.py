"""Every check of a head whose classes lie on several ranks: each module joins its own to ``common.CHECKS``."""

from class_parallel_checks import inference, losses, messages, samples, states, training

__all__ = ["inference", "losses", "messages", "samples", "states", "training"]
