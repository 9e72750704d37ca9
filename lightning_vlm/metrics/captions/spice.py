"""SPICE (Anderson et al. 2016), where its models are: pycocoevalcap ships neither them nor a way to run on Java 16."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import numpy as np

from lightning_vlm.metrics.captions.java import package_file, require_java

_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_JAVA = 'Java below 16, or JAVA_TOOL_OPTIONS="--add-opens=java.base/java.lang=ALL-UNNAMED"'


def require_spice() -> None:
    """Raises ValueError where SPICE's models or Java are missing. Nothing is ever downloaded."""
    folder = package_file("spice", "lib")
    if missing := [name for name in _JARS if not (folder / name).is_file()]:
        raise ValueError(
            f"SPICE needs {' and '.join(missing)}, which pycocoevalcap does not ship: put them from Stanford CoreNLP "
            f"3.6.0 (stanford-corenlp-full-2015-12-09.zip) into {folder}; it also needs {_JAVA}"
        )
    require_java()


def spice_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """F of each tokenised caption's scene graph against that of its references.

    Returns:
        [N] float64; the corpus' SPICE is the mean.

    Raises:
        ValueError: models or Java are missing.
        RuntimeError: Java failed.
    """
    require_spice()  # the package's class downloads what is missing
    from pycocoevalcap.spice.spice import Spice

    ids = [f"{i:09d}" for i in range(len(captions))]  # the class sorts by id
    try:
        groups = {id: list(group) for id, group in zip(ids, references, strict=True)}
        _, scores = Spice().compute_score(groups, {id: [caption] for id, caption in zip(ids, captions, strict=True)})
    except subprocess.CalledProcessError as err:
        raise RuntimeError(f"SPICE (Java) ended with exit code {err.returncode}; it needs {_JAVA}") from None
    return np.array([score["All"]["f"] for score in scores])
