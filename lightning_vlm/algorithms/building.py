"""From a backbone to the policy that a run trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_vlm.models.adapters import load_adapter_file
from lightning_vlm.models.families import family_of
from lightning_vlm.models.load import check_vocabulary, load_model
from lightning_vlm.models.parts import PartPolicy, apply_parts
from lightning_vlm.models.policy import Policy
from lightning_vlm.models.spec import Backbone
from lightning_vlm.models.vision_cache import VisionCache

if TYPE_CHECKING:
    from lightning_vlm.algorithms.base import Algorithm


def build_policy(module: Algorithm, backbone: Backbone) -> Policy:
    """The backbone loaded, frozen and adapted by the run's settings, whole, on the CPU, before anything is learned.

    Args:
        module: the run's. backbone: its own, or one like it (a reference, a copy in another dtype).

    Raises:
        ValueError: settings that do not fit the model.
    """
    if backbone.quantize is not None and not module.parts.get("language", PartPolicy()).freeze:
        raise ValueError(
            f"backbone.quantize {backbone.quantize} needs a frozen language model: set model.adapter_only to true, "
            "or leave backbone.quantize out"
        )
    model = load_model(backbone)
    check_vocabulary(model, module.processor)
    family = family_of(model)
    apply_parts(model, family, module.parts)
    if backbone.adapter is not None:
        load_adapter_file(model, backbone.adapter, module.parts)
    policy = Policy(model, family)
    if module.vision_cache:
        named = isinstance(module.vision_cache, str) and backbone == module.backbone
        mixed = getattr(module.trainer.strategy, "mixed_precision", "none")
        policy.vision_cache = VisionCache(
            policy,
            module.processor,
            folder=module.vision_cache if named else None,
            precision=f"{module.trainer.precision} {mixed}",
        )
    return policy
