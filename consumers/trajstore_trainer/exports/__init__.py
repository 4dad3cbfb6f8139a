"""Trajectories and batches in the forms of other trainers, and as files."""

from trajstore_trainer.exports.files import read_batch, read_trajectories, write_batch, write_trajectories
from trajstore_trainer.exports.routed import MissingRow
from trajstore_trainer.exports.slime import to_slime
from trajstore_trainer.exports.verl import to_verl

__all__ = [
    "MissingRow",
    "read_batch",
    "read_trajectories",
    "to_slime",
    "to_verl",
    "write_batch",
    "write_trajectories",
]
