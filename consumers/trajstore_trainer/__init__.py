"""A trainer's side of the store: finished trajectories in, torch tensors out."""

from trajstore_trainer.batch import PaddedBatch, padded_batch
from trajstore_trainer.reader import ReadyTrajectories, TrajectoryReader

__all__ = ["PaddedBatch", "ReadyTrajectories", "TrajectoryReader", "padded_batch"]
