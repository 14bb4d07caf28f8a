"""A whole DeepSeek-V3.2, a few million parameters small, learning Python from the standard library.

    python train.py --config=configs/tiny.py --workdir=/tmp/run1

Hardware: two CPU cores. Time: about three minutes. Result: 1.8 bits per byte on held-out text, 4.0 untrained.
"""

from dsjax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    presets,
)


def get_config() -> RunConfig:
    """The run that the README starts with."""
    steps = 250
    return RunConfig(
        model=presets.v32_tiny(),
        optimizer=OptimizerConfig(
            lr=4e-3, lr_floor=2e-4, warmup_steps=20, cosine_start_step=60, cosine_end_step=steps
        ),
        data=DataConfig(fim_rate=0.0),  # of 256 tokens there is no middle worth moving
        train=TrainConfig(steps=steps, batch_size=8, sequence_length=256),
        eval=EvalConfig(every_steps=50, batches=4, sample_prompt="def __init__(self"),
        checkpoint=CheckpointConfig(every_steps=50),
    )
