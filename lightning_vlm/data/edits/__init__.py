"""Minimal edits of English captions, which make false captions of true ones."""

from lightning_vlm.data.edits.minimal import KINDS, Edit, check_kinds, minimal_edit
