"""DeepSeek-V3.2 at full size, pre-trained at 4K as the V3 report says.

    python train.py --config=configs/deepseek_v32_671b.py --workdir=/mnt/run1 --config.data.sets=/mnt/web=3,/mnt/code=1

The same command on every host. Hardware: 512 TPU v5p (8x8x8); other stages and other devices: docs/scale.md.
"""

import dataclasses

from dsjax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    presets,
)


def get_config() -> RunConfig:
    """The report's batch of 15,360 sequences, without the ramp that leads to it: 14.8T tokens."""
    batch_size, sequence_length = 15_360, 4096
    tokens_per_step = batch_size * sequence_length

    def step_at(tokens: float) -> int:
        return round(tokens / tokens_per_step)

    return RunConfig(
        # No YaRN at this length. Source: V3 report §4.3, which adds it for longer ones.
        model=dataclasses.replace(presets.deepseek_v32_671b(), max_position_embeddings=sequence_length),
        optimizer=OptimizerConfig(
            lr=2.2e-4,
            warmup_steps=2000,
            cosine_start_step=step_at(10e12),
            cosine_end_step=step_at(14.3e12),
            lr_floor=2.2e-5,
            last_start_step=step_at(14.633e12),
            lr_last=7.3e-6,
            moment_dtype="bfloat16",
        ),
        data=DataConfig(fim_rate=0.1),
        train=TrainConfig(
            steps=step_at(14.8e12),
            batch_size=batch_size,
            sequence_length=sequence_length,
            accumulation_steps=30,
            mtp_switch_step=step_at(10e12),
            bias_freeze_step=step_at(14.3e12),
        ),
        eval=EvalConfig(every_steps=500, batches=1, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=250, keep=3),
        mesh=MeshConfig(expert=64),
    )
