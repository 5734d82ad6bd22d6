"""llmpack: from a checkpoint to the best bundle a device can run, with the proof inside."""

__version__ = "0.1.0"

__all__ = ["__version__"]
