"""Published scores come out of published outputs, verdict for verdict: `lightning-vlm score` on real data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.score_kit import answers, score
from tests.sources_kit import write

pytestmark = pytest.mark.real_data


def _r1v(real_data: Path, tmp_path: Path) -> tuple[str, list[bool]]:
    released = json.loads((real_data / "geoqa_r1v/geoqa_test_qwen2vl_7b_grpo_2epochs_legacy.json").read_text())[
        "results"
    ]
    rows = answers(*[(r["model_output"], r["ground_truth"]) for r in released])
    return write(tmp_path / "r1v.jsonl", rows), [r["is_correct"] for r in released]


def test_r1v_verdicts_come_out_for_every_item(real_data, tmp_path):
    file, released = _r1v(real_data, tmp_path)
    scores, lines = score("geometry3k", file, out=tmp_path / "out")
    assert [r["score"] == 1 for r in lines] == released
    assert scores["accuracy"] == pytest.approx(0.38726790450928384, abs=1e-12) and scores["n"] == 754


@pytest.mark.parametrize("system", ["Qwen-VL-Max", "InternLM-XComposer2-VL-CoT"])
def test_mathvision_verdicts_come_out(real_data, tmp_path, system):
    """Item for item, and the released counts by level and subject."""
    folder = real_data / "mathvision"
    file = folder / "outputs" / f"{system}.jsonl"
    scores, lines = score("mathvision", file, "--questions", folder / "test.jsonl", out=tmp_path / "out")
    released = [json.loads(line)["correct"] for line in file.read_text().splitlines()]
    assert [r["score"] == 1 for r in lines] == released
    counts = json.loads((folder / "outputs" / f"{system}_result.json").read_text())
    right, n = counts["-all"].partition("=")[0].split("/")
    assert (scores["n"], round(scores["accuracy"] * scores["n"])) == (int(n), int(right))
    breakdown = json.loads((tmp_path / "out" / "breakdown.json").read_text())
    for level, row in breakdown["level"].items():
        right, n = map(int, counts[f"-level{level}"].partition("=")[0].split("/"))
        assert (row["n"], round(row["accuracy"] * n)) == (n, right)


MATHVISTA_SYSTEMS = {
    "bard/output_bard": "official-2023",
    "gpt4/output_gpt4": "official",
    "gpt4/output_gpt4_2shot_code": "official-2023",
    "gpt4/output_gpt4_2shot_solution": "official-2023",
    "llava/output_llava_llama_2_13b": "official-2023",
    "random/output_frequent_guess": "official-2023",
    "random/output_random_guess": "official-2023",
}


@pytest.mark.parametrize(("system", "rule"), MATHVISTA_SYSTEMS.items())
def test_mathvista_verdicts_and_scores_come_out(real_data, tmp_path, system, rule):
    """Item for item; overall and in every one of the released groups."""
    file = real_data / "mathvista" / "results" / f"{system}.json"
    scores, lines = score("mathvista", file, "--rule", rule, out=tmp_path / "out")
    released = json.loads(file.read_text())
    verdicts = {r["id"]: r["score"] == 1 for r in lines}
    assert verdicts == {pid: row["true_false"] for pid, row in released.items()}
    assert all(r["prediction"] == released[r["id"]]["prediction"] for r in lines)
    table = json.loads(Path(str(file).replace("output_", "scores_")).read_text())
    assert scores["n"] == 1000 and round(1000 * scores["accuracy"]) == table["average"]["correct"]
    breakdown = json.loads((tmp_path / "out" / "breakdown.json").read_text())
    for key, groups in table.items():
        if key == "average":
            continue
        ours = {value: (round(row["accuracy"] * row["n"]), row["n"]) for value, row in breakdown[key].items()}
        assert ours == {value: (row["correct"], row["total"]) for value, row in groups.items()}


def test_coco_scores_come_out(real_data, tmp_path):
    scores, lines = score("coco", real_data / "coco" / "magic_result.json", out=tmp_path / "out")
    rounded = {name: round(value, 3) for name, value in scores.items() if isinstance(value, float)}
    expected = {"Bleu_1": 0.568, "Bleu_2": 0.358, "Bleu_3": 0.214, "Bleu_4": 0.129}
    expected |= {"METEOR": 0.174, "ROUGE_L": 0.399, "CIDEr": 0.493}
    assert expected.items() <= rounded.items()
    assert (scores["rule"], scores["n"], len(lines)) == ("coco/ptb", 4982, 4982)
    assert sum(r["score"] for r in lines) / 4982 == pytest.approx(scores["CIDEr"])
    assert all(low < scores[name] < high for name, (low, high) in scores["intervals"].items() if name in expected)
