"""What runs in Java: the Penn Treebank tokenizer and METEOR, from the jars that pycocoevalcap ships.

Each call is one process that is fed its whole input and read to the end: none stays behind, and none can fill a pipe
that nobody reads. pycocoevalcap's own classes write beside their code, where an installation may be read-only, and talk
to a METEOR process line by line.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_vlm.metrics.captions.text import PUNCTUATION, clean_caption

# Seconds after which Java counts as stuck. METEOR, the slower one, takes about 7 to start and .001 a caption.
_START, _PER_LINE = 300.0, 0.1


def require_java() -> None:
    """Raises ValueError where there is no `java`, saying how to get it or do without."""
    if shutil.which("java") is None:
        raise ValueError(
            "no `java` on PATH, which the PTB tokenizer, METEOR and SPICE need: install it (apt-get install "
            "default-jre-headless, conda install openjdk, brew install openjdk), or use tokenizer: python, the rule "
            "coco/python (BLEU, ROUGE-L, CIDEr; a name of its own, as its numbers can differ)"
        )


def package_file(*parts: str) -> Path:
    """A file of the installed pycocoevalcap, whether it is there or not."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("pycocoevalcap is not installed: pip install 'pycocoevalcap>=1.2'")
    return Path(spec.submodule_search_locations[0], *parts)


def ptb_tokenize(texts: Sequence[str]) -> list[str]:
    """Words of each text in lower case by Stanford's PTBTokenizer, punctuation dropped, as pycocoevalcap has them.

    The tokenizer looks at the next line to tell whether the stop of a closing abbreviation ends the sentence. Here a
    line that begins with a capital follows every text, so that no text depends on its neighbours.

    Args:
        texts: any strings; each is cleaned first.

    Returns:
        One line per text, words separated by single spaces; "" where no word is left.

    Raises:
        ValueError: there is no Java.
        RuntimeError: Java failed, or did not give back line for line.
    """
    if not texts:
        return []
    jar = package_file("tokenizer", "stanford-corenlp-3.4.1.jar")
    command = ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-encoding", "UTF-8", "-preserveLines", "-lowerCase"]
    lines = _run("the PTB tokenizer", command, [line for text in texts for line in (clean_caption(text), "A")])
    if len(lines) != 2 * len(texts) or any(line.strip() != "a" for line in lines[1::2]):
        raise RuntimeError(
            f"the PTB tokenizer gave {len(lines)} lines for {2 * len(texts)}: captions would be mixed up"
        )
    return [" ".join(w for w in line.split(" ") if w and w not in PUNCTUATION) for line in lines[::2]]


def meteor_sums(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """What METEOR 1.5 (Denkowski & Lavie 2014; English) counts for each caption against its best reference.

    Args:
        captions: N tokenised captions.
        references: tokenised references of each.

    Returns:
        [N, 6]: weighted matches and weighted length of the caption, the same of the reference, chunks, matched words.
        Sums of rows are what `meteor_score` makes a corpus' METEOR of.

    Raises:
        ValueError: there is no Java.
        RuntimeError: Java failed, or did not answer every line with 23 numbers.
    """
    jar = package_file("meteor", "meteor-1.5.jar")
    command = ["-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    # A field of one space, unlike one of none, is an empty caption to Java.
    lines = [" ||| ".join(["SCORE", *refs, caption or " "]) for caption, refs in zip(captions, references, strict=True)]
    rows = [line.split() for line in _run("METEOR", command, lines)]
    if len(rows) != len(lines) or any(len(row) != 23 for row in rows):
        raise RuntimeError(f"METEOR gave {len(rows)} lines for {len(lines)} captions, or other than 23 numbers in one")
    return _weighted(np.array(rows, dtype=np.float64))


def meteor_score(sums: np.ndarray) -> np.ndarray:
    """METEOR of rows, or of sums of rows, of `meteor_sums`: [..., 6] → [...]; 0 where nothing matches.

    α .85, β .2, γ .6 as METEOR 1.5 has them for English: F = PR / (αP + (1−α)R), times 1 − γ (chunks / matches)^β.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = sums[..., 0] / sums[..., 1], sums[..., 2] / sums[..., 3]
        mean = precision * recall / (0.85 * precision + 0.15 * recall)
        score = mean * (1 - 0.6 * (sums[..., 4] / sums[..., 5]) ** 0.2)
    return np.nan_to_num(np.maximum(score, 0.0))


def _weighted(counts: np.ndarray) -> np.ndarray:
    """Java's [N, 23] → [N, 6].

    Columns: length of caption and reference, function words of both; for exact, stem, synonym, and paraphrase matches
    the content words of both and the function words of both; chunks; matched words of both.
    """
    content, function = 0.75, 0.25  # δ and 1 − δ
    lengths, matches = counts[:, :4], counts[:, 4:20].reshape(-1, 4, 4)
    weighted = np.array([1.0, 0.6, 0.8, 0.6]) @ matches
    matched = matches.sum(axis=1)
    # A caption that is its reference has one chunk, which is no fragment.
    whole = (matched[:, :2] + matched[:, 2:] == lengths[:, :2]).all(axis=1) & (counts[:, 20] == 1)
    columns = []
    for side in (0, 1):
        columns.append(content * weighted[:, side] + function * weighted[:, side + 2])
        columns.append(content * (lengths[:, side] - lengths[:, side + 2]) + function * lengths[:, side + 2])
    return np.stack([*columns, np.where(whole, 0.0, counts[:, 20]), counts[:, 21:].mean(axis=1)], axis=1)


def _run(what: str, arguments: list[str], lines: Sequence[str]) -> list[str]:
    """Lines that Java prints when fed `lines`."""
    require_java()
    limit = _START + _PER_LINE * len(lines)
    command = ["java", "-Dfile.encoding=UTF-8", "-Duser.language=en", *arguments]
    try:
        done = subprocess.run(command, input="\n".join([*lines, ""]).encode(), capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{what} (Java) gave no answer within {limit:.0f} s and was stopped") from None
    if done.returncode:
        said = [line for line in done.stderr.decode(errors="replace").splitlines() if not line.startswith("Picked up")]
        raise RuntimeError(f"{what} (Java) ended with exit code {done.returncode}: {said[0] if said else 'no message'}")
    return done.stdout.decode(errors="replace").replace("\r\n", "\n").split("\n")[:-1]
