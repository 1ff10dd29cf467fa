"""Networks and what belongs to them. Nothing here knows a schedule or a solver."""

from fastdiff.nn.ema import EMA
from fastdiff.nn.outputs import prediction_of
from fastdiff.nn.pretrained import embedded_models, load_config
from fastdiff.nn.tabulated import EmbeddingTable, RowTimes, embedding_table
from fastdiff.nn.unet import UNet

__all__ = [
    "EMA",
    "EmbeddingTable",
    "RowTimes",
    "UNet",
    "embedded_models",
    "embedding_table",
    "load_config",
    "prediction_of",
]
