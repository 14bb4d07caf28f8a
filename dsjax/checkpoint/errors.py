"""The one exception for checkpoints that come from elsewhere or go there."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written: one sentence with the file, the tensor and the way out."""
