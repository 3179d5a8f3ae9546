"""Images for calibration and evaluation: folders, timm's data sets, synthetic ones, the demo's digits, tensors."""

from __future__ import annotations

from coraq.data.demo import demo_images, run_images
from coraq.data.images import open_evaluation, open_images
from coraq.data.imageset import Batch, Images, ImageSet, tensor_images
from coraq.data.preprocess import Preprocess
from coraq.data.synthetic import synthetic_images

__all__ = [
    "Batch",
    "ImageSet",
    "Images",
    "Preprocess",
    "demo_images",
    "open_evaluation",
    "open_images",
    "run_images",
    "synthetic_images",
    "tensor_images",
]
