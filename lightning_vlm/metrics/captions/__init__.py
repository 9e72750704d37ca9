"""COCO captions: the suite of pycocoevalcap with checks and intervals, and CIDEr-D as a reward."""

from lightning_vlm.metrics.captions.cider import DocumentFrequencies, cider_d, topk_cider
from lightning_vlm.metrics.captions.java import ptb_tokenize, require_java
from lightning_vlm.metrics.captions.suite import CaptionScores, score_captions
from lightning_vlm.metrics.captions.text import clean_caption, python_tokenize
