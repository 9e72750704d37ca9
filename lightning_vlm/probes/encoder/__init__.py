"""Probes of vision encoders: linear, segmentation, gradients, alignment with language, and how far weights moved."""

from .alignment import AlignmentResult, alignment, load_language, mutual_knn
from .data import (
    Picture,
    ProbeData,
    image_folder,
    segment_folder,
    world_classes,
    world_questions,
    world_segments,
)
from .features import VisionEncoder
from .gradients import GradientMaps, compare_energy, gradient_maps
from .linear import LinearResult, linear_probe
from .load import load_encoder
from .segmentation import SegmentationResult, segmentation_probe
from .updates import Update, part_updates
