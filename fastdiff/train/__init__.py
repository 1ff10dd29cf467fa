"""Training the reverse chain: data, objective, trainer."""

from fastdiff.train.config import TrainConfig
from fastdiff.train.data import ImageData, load_data
from fastdiff.train.objective import Losses, Objective
from fastdiff.train.trainer import Trainer, TrainResult

__all__ = ["ImageData", "Losses", "Objective", "TrainConfig", "TrainResult", "Trainer", "load_data"]
