"""Typed configuration: dataclasses, their choices, and the rules between them. Standard library only."""

from msa_train.config.model import AttentionConfig, ModelConfig
from msa_train.config.options import (
    Activation,
    AttentionKind,
    Device,
    Engine,
    KvExchange,
    LrSchedule,
    OptimizerKind,
    Precision,
    Progress,
    QkNorm,
    Recompute,
)
from msa_train.config.rules import check_rules, resolve_engine
from msa_train.config.run import (
    CheckpointConfig,
    DataConfig,
    LauncherConfig,
    LoggingConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "Activation",
    "AttentionConfig",
    "AttentionKind",
    "CheckpointConfig",
    "DataConfig",
    "Device",
    "Engine",
    "KvExchange",
    "LauncherConfig",
    "LoggingConfig",
    "LrSchedule",
    "ModelConfig",
    "OptimConfig",
    "OptimizerKind",
    "ParallelConfig",
    "Precision",
    "Progress",
    "QkNorm",
    "Recompute",
    "RunConfig",
    "TrainConfig",
    "check_rules",
    "resolve_engine",
]
