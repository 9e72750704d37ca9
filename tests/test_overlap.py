"""What of a benchmark is in the training data: hashes and texts, with known copies."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

from lightning_vlm.cli.overlap import opened_sources
from lightning_vlm.data import overlap
from lightning_vlm.data.overlap import (
    BITS,
    THRESHOLD,
    Fingerprints,
    find_overlap,
    fingerprint,
    hash_picture,
    normalised,
    questions,
    tells,
)
from lightning_vlm.data.schema import BadSample, Sample, image, message, text

LONG = "In the figure, AB = 30 and CD = 40. Find the measure of angle AOB."
WHITE = Image.new("RGB", (64, 48), "white")


def photo(seed: int, size=(96, 64)) -> Image.Image:
    """Noise with detail of every size, as photographs have; another seed is another picture."""
    rng, pixels = np.random.default_rng(seed), np.full((size[1], size[0], 3), 128.0)
    for cells in (2, 4, 8, 16, 32, 64):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += (np.asarray(noise.resize(size, Image.Resampling.BICUBIC)) - 128.0) / cells**0.5
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def drawing(seed: int, size=(300, 240)) -> Image.Image:
    """Five lines on white."""
    picture, rng = Image.new("RGB", size, "white"), np.random.default_rng(seed)
    for _ in range(5):
        ends = rng.uniform(0.05, 0.95, (2, 2)) * size
        ImageDraw.Draw(picture).line([tuple(end) for end in ends], fill="navy", width=2)
    return picture


def encoded(picture: Image.Image, form="PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **settings)
    return buffer.getvalue()


def scaled(picture, factor):
    return picture.resize((round(picture.width * factor), round(picture.height * factor)))


def cropped(picture, fraction):
    dx, dy = round(picture.width * fraction), round(picture.height * fraction)
    return picture.crop((dx, dy, picture.width - dx, picture.height - dy))


def sample(id: str, asked: str, *pictures, answer: str | None = None) -> Sample:
    turns = [message("user", *(image() for _ in pictures), text(asked))]
    return Sample(id, turns + ([message("assistant", text(answer))] if answer else []), list(pictures))


def compared(train: list[Sample], benchmark: list[Sample], **settings):
    return find_overlap(fingerprint([train]), fingerprint([benchmark]), **settings)


def found(result) -> list[tuple]:
    return [(r["benchmark"], r["train"], *r["kinds"]) for r in result.records()]


# Pictures


def test_same_pixels_have_the_same_digest():
    picture = photo(1)
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Author", "somebody")
    copies = [encoded(picture, "PNG", pnginfo=notes), encoded(picture, "BMP"), encoded(picture.convert("RGBA"), "PNG")]
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90° clockwise
    copies.append(encoded(picture.rotate(90, expand=True), "PNG", exif=turned))
    assert {hash_picture(copy).digest for copy in [picture, *copies]} == {hash_picture(picture).digest}


def test_another_pixel_or_shape_has_another_digest():
    picture = photo(1)
    other = picture.copy()
    other.putpixel((3, 3), (0, 0, 0) if picture.getpixel((3, 3)) != (0, 0, 0) else (1, 1, 1))
    reshaped = Image.frombytes("RGB", (64, 96), picture.tobytes())
    digests = {hash_picture(p).digest for p in (picture, other, reshaped, encoded(picture, "JPEG"))}
    assert len(digests) == 4


COPIES = {
    "half": lambda p: scaled(p, 0.5),
    "double": lambda p: scaled(p, 2),
    "three quarters": lambda p: scaled(p, 0.75),
    "jpeg": lambda p: encoded(p, "JPEG", quality=50),
    "half as jpeg": lambda p: encoded(scaled(p, 0.5), "JPEG", quality=50),
    "grey": lambda p: p.convert("L"),
    "cropped by 1 %": lambda p: cropped(p, 0.01),
    "cropped by 2 %": lambda p: cropped(p, 0.02),
    "border of 1 %": lambda p: ImageOps.expand(p, round(max(p.size) * 0.01), "white"),
    "border of 2 %": lambda p: ImageOps.expand(p, round(max(p.size) * 0.02), "white"),
}


@pytest.mark.parametrize("change", COPIES)
@pytest.mark.parametrize("picture", [photo(1, (480, 320)), drawing(1)], ids=["photo", "drawing"])
def test_changed_copies_are_near_and_other_pictures_far(picture, change):
    others = [photo(seed, (480, 320)) for seed in range(2, 6)] + [drawing(seed) for seed in range(2, 6)]
    result = compared(
        [sample("copy", "", COPIES[change](picture)), *(sample(str(n), "", p) for n, p in enumerate(others))],
        [sample("original", "", picture)],
    )
    assert found(result) == [("original", "copy", "image_perceptual")]
    assert 0 <= result.matches[0].distance <= THRESHOLD


def test_pictures_without_contrast_match_nothing():
    noisy = Image.fromarray(np.random.default_rng(0).integers(254, 256, (48, 64, 3), dtype=np.uint8))
    train = [sample(str(n), "", p) for n, p in enumerate((WHITE, Image.new("RGB", (9, 9)), noisy))]
    assert found(compared(train, [sample("blank", "", WHITE), sample("noisy", "", noisy)])) == []


def test_a_dot_on_white_is_contrast():
    dots = [WHITE.copy(), WHITE.copy()]
    for dot, place in zip(dots, ((10, 10, 16, 16), (40, 30, 46, 36)), strict=True):
        ImageDraw.Draw(dot).ellipse(place, fill="black")
    result = compared(
        [sample("a", "", dots[0])], [sample("same", "", dots[0].convert("L")), sample("other", "", dots[1])]
    )
    assert found(result) == [("same", "a", "image_exact")]


def test_distances_are_those_counted_bit_by_bit():
    rng = np.random.default_rng(0)
    left = rng.integers(0, 256, (9, 3, BITS // 8), dtype=np.uint8)
    right = np.concatenate([left[:5], rng.integers(0, 256, (2, 3, BITS // 8), dtype=np.uint8)])
    right[:5] ^= np.packbits(rng.random((5, 3, BITS)) < 0.12, axis=-1)

    def distance(a, b):
        inner = [(i, 0) for i in range(3)] + [(0, 1), (0, 2)]
        return min(int(np.unpackbits(a[i] ^ b[j]).sum()) for i, j in inner)

    wanted = {(i, j, d) for i, a in enumerate(left) for j, b in enumerate(right) if (d := distance(a, b)) <= THRESHOLD}
    assert 2 <= len(wanted) <= 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "_CHUNK", 4)
        assert set(overlap._near([*left, None], [None, *right], THRESHOLD)) == {(i, j + 1, d) for i, j, d in wanted}


@pytest.mark.parametrize("threshold", [-1, 128])
def test_a_threshold_that_means_nothing_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be 0 to 127 bits"):
        compared([], [], threshold=threshold)


# Texts


@pytest.mark.parametrize(
    "a, b, same",
    [
        ("Find $x$.", "find  X", True),
        (r"In $\odot X, A B=30,$ and $m \widehat{C Z}=40$.", r"In \odot X, AB = 30, and m \widehat C Z = 40", True),
        (r"$m\angle 9 = 75$", "m ∠9 = 75", True),
        (r"\left(\frac{3}{5}\right)", "(3/5)", True),
        (r"cm$^2$ and $\text{kg}$", "cm² and kg", True),
        ("<image>\nHow many?", "How many?<image1>", True),
        ("x = 30", "x = 3", False),
        ("x = 3.5", "x = 35", False),
        ("1 2", "12", False),
        (r"\sin B", r"\cos B", False),
        ("已知：角 A＝70°", "已知角A=70", True),
    ],
)
def test_what_normalising_keeps(a, b, same):
    assert (normalised(a) == normalised(b)) == same


def test_normalised_text_by_hand():
    assert normalised(r"Find $\overline{A B}$, if x=3.5 cm!") == "findabifx 3.5 cm"
    assert normalised("<image> ... ") == ""


@pytest.mark.parametrize(
    "asked, enough",
    [
        ("Find x.", False),
        ("What is 2 + 3?", False),
        ("If ST = 8, TR = 4 and PT = 6, find QR.", True),
        ("Find the area of the parallelogram. Round to the nearest tenth if necessary.", False),
        (LONG, True),
        ("In the figure, AB = 30 and CD = 30. Find the measure of angle AOB.", False),  # one number twice
        ("Misty the cat has five kittens: two of them are striped, one spotty, the rest of them are white. " * 2, True),
    ],
)
def test_which_questions_tell(asked, enough):
    assert tells(normalised(asked)) == enough


def test_choices_hints_and_instructions_are_no_part_of_a_question():
    bare = (normalised("Find AB if CD = 7."),)
    for asked in (
        "Find AB if CD = 7.",
        "Find AB if CD = 7.\n(A) 3\n(B) 4",
        "Find AB if CD = 7.\nA. 3\nB. 4\nAnswer with the letter.",
        "Find AB if CD = 7.\nChoices: A, B, C, D",
        "Find AB if CD = 7. Options: (a) 3 (b) 4",
        "Hint: Give the letter, e.g., A, B, at the end.\nQuestion: Find AB if CD = 7.\nChoices:\n(A) 3\n(B) 4",
    ):
        assert questions(sample("x", asked)) == bare, asked
    assert questions(Sample("x", [message("user", text("a prompt"))], info={"question": "Find AB if CD = 7."})) == bare


def test_every_turn_of_a_user_is_a_question():
    turns = [message("system", text("Be kind")), message("user", text("One?")), message("assistant", text("Yes"))]
    turns += [message("user", text("Two?")), message("assistant", text("No"))]
    assert questions(Sample("x", turns)) == ("one", "two")


def test_texts_match_within_a_turn_and_only_if_they_tell():
    more = LONG.replace("AOB", "AOB in degrees")
    train = [
        sample("around", f"Look closely. {LONG}\nAnswer the question using a single word."),
        sample("more", f"{LONG[:-1]} 5."),  # the number goes on
        sample("other", LONG.replace("30", "3")),
        sample("short", "Find x."),
    ]
    result = compared(train, [sample("long", LONG), sample("more", more), sample("short", "Find $x$")])
    assert found(result) == [("long", "around", "text"), ("long", "more", "text")]
    assert [result.benchmark.ids[i] for i in result.general] == ["short"]


def test_a_question_that_ends_in_a_number_is_not_in_one_with_a_longer_number():
    asked = "In the circle AB is 30 and the chord CD is 4"
    assert found(compared([sample("t", asked + "0")], [sample("b", asked)])) == []
    assert len(found(compared([sample("t", asked + ", so what?")], [sample("b", asked)]))) == 1


# Both


def test_kinds_and_counts_by_hand():
    a, b, c, d = (photo(seed) for seed in range(4))
    train = [
        sample("exact", "Describe it.", encoded(a)),
        sample("twice", "What else?", encoded(a, "BMP"), photo(9)),
        sample("jpeg", "Find x.", encoded(b, "JPEG", quality=50)),
        sample("text", LONG),
        sample("general", "What is there?"),
    ]
    benchmark = [
        sample("A", "What is there?", a),
        sample("B", "Find $x$.", b),
        sample("C", LONG, c),
        sample("D", "What is there?", d),
        sample("E", "Nothing of this.", photo(8)),
    ]
    result = compared(train, benchmark)
    assert found(result) == [
        ("A", "exact", "image_exact"),
        ("A", "twice", "image_exact"),
        ("B", "jpeg", "image_perceptual", "text"),
        ("C", "text", "text"),
    ]
    summary = result.summary()
    assert summary["kinds"] == {
        "image_exact": {"samples": 1, "share": 0.2, "pairs": 2},
        "image_perceptual": {"samples": 1, "share": 0.2, "pairs": 1},
        "text": {"samples": 2, "share": 0.4, "pairs": 2},
        "any": {"samples": 3, "share": 0.6, "pairs": 4},
    }
    assert summary["general_text_only"] == 1  # D; what A shares of text is counted by its picture
    assert (summary["train"]["samples"], summary["train"]["pictures"]) == (5, 3)
    assert result.leave_out() == ["A", "B", "C"]


def test_a_picture_that_many_samples_show_is_decoded_once(tmp_path, monkeypatch):
    photo(1).save(tmp_path / "p.png")
    path, data, calls = str(tmp_path / "p.png"), encoded(photo(2)), []

    def counted(source):
        calls.append(source)
        return hash_picture(source)

    monkeypatch.setattr(overlap, "hash_picture", counted)
    samples = [sample(str(n), "", path, bytes(bytearray(data))) for n in range(6)]
    result = fingerprint([samples[:3], samples[3:]], jobs=1)
    assert len(calls) == 2 and len(result.hashes) == 2
    assert result.pictures == [(0, 1)] * 6 and result.total == 6


@pytest.mark.parametrize("jobs", [1, 3])
def test_threads_keep_the_order(jobs):
    samples = [sample(str(n), f"question {n}", photo(n)) for n in range(12)]
    result = fingerprint([samples[:5], samples[5:]], jobs=jobs)
    assert result.ids == [str(n) for n in range(12)]
    assert [source[index].id for source, index in result.origins] == result.ids


def test_a_bad_sample_stops_or_is_listed(tmp_path):
    class Rows(list):
        def __getitem__(self, index):
            if index == 1:
                raise BadSample("row/1", "malformed", "no answer")
            return super().__getitem__(index)

    rows = Rows([sample("row/0", LONG, b"no image"), None, sample("row/2", "", photo(1))])
    with pytest.raises(BadSample, match="sample row/0: image cannot be decoded"):
        fingerprint([rows])
    result = fingerprint([rows], skip_bad=True)
    assert [(b.id, b.reason) for b in result.bad] == [("row/0", "broken_image"), ("row/1", "malformed")]
    assert (result.ids, result.total) == (["row/0", "row/2"], 3)
    benchmark = fingerprint([[sample("long", LONG)]])
    assert found(find_overlap(result, benchmark)) == [("long", "row/0", "text")]
    assert find_overlap(benchmark, result).summary()["kinds"]["any"]["share"] == 1 / 3


def test_nothing_against_something():
    assert find_overlap(Fingerprints(), fingerprint([[sample("b", LONG, photo(1))]])).matches == []


# Real data


@pytest.fixture(scope="module")
def printed():
    """Fingerprints of a source, taken once."""
    taken = {}

    def take(argument: str, **settings) -> Fingerprints:
        if argument not in taken:
            taken[argument] = fingerprint(opened_sources(argument, side="BENCHMARK"), **settings)
        return taken[argument]

    return take


def names(result) -> set[tuple[str, ...]]:
    return {tuple(sorted((r["benchmark"], r["train"]))) for r in result.records() if r["benchmark"] != r["train"]}


def test_no_false_match_between_photographs_and_problems(real_data, printed):
    arguments = [f"mmvp={real_data}/mmvp", f"mathvision={real_data}/mathvision@testmini", f"{real_data}/geometry3k/"]
    arguments[2] += "intergps_examples"
    for a, b in itertools.combinations(arguments, 2):
        assert find_overlap(printed(a), printed(b)).matches == []


def test_what_benchmarks_hold_twice(real_data, printed):
    mathvision = printed(f"mathvision={real_data}/mathvision@testmini")
    assert names(find_overlap(mathvision, mathvision)) == {("mathvision/1050", "mathvision/773")}
    mmvp = printed(f"mmvp={real_data}/mmvp")
    twice = [(11, 27), (30, 7), (66, 97), (176, 198), (178, 236), *itertools.combinations((112, 142, 52, 99), 2)]
    of_pictures = find_overlap(mmvp, mmvp)
    of_pictures.matches = [m for m in of_pictures.matches if m.distance is not None]
    assert names(of_pictures) == {tuple(sorted((f"mmvp/{a}", f"mmvp/{b}"))) for a, b in twice}


def test_rendering_again_leaves_the_text_alone(real_data, printed):
    """VisualSketchpad's problems are others than the ten of InterGPS; against themselves they are found by both."""
    originals = printed(f"{real_data}/geometry3k/intergps_examples")
    again = printed(f"{real_data}/geometry3k/visualsketchpad", skip_bad=True)
    assert [bad.reason for bad in again.bad] == ["missing_image"]
    assert find_overlap(originals, again).matches == []
    itself = find_overlap(again, again).summary()["kinds"]
    assert itself["image_exact"] == {"samples": 47, "share": 47 / 48, "pairs": 47}
    assert itself["image_perceptual"]["samples"] == 0


def test_mathvista_holds_none_of_the_training_problems_here(real_data, printed, tmp_path):
    """Its 62 rows of Geometry3K come from the test split; the three problem texts it shares are general."""
    file = tmp_path / "vista.yaml"
    file.write_text(
        f"vista: {{kind: mathvista, path: {real_data}/mathvista/testmini.json, columns: {{image: null}}}}\n"
    )
    vista = printed(str(file))
    result = find_overlap(printed(f"{real_data}/geometry3k/visualsketchpad", skip_bad=True), vista)
    assert result.matches == [] and len(result.general) == 3
    row = next(i for i, asked in enumerate(vista.texts) if any("hj 48 " in t for t in asked))  # one of the 62
    asked = r"<image>In \odot M, F L = 24, H J = 48, and m \widehat H P = 65. Find m \widehat H J. Think first."
    (match,) = find_overlap(fingerprint([[sample("t", asked)]]), vista).matches
    assert (match.benchmark, match.kinds) == (row, ("text",))
