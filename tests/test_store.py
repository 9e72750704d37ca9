"""The store: keys by content, arrays that survive their writers, refusals in one line."""

import errno
import json
import multiprocessing
import os
import pickle
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_vlm.store import Store, content_key, default_root

FACTS = {"weights": "abc", "dtype": "bfloat16", "layers": 3, "scale": 0.5}
fork = multiprocessing.get_context("fork")


def _store(root: Path) -> Store:
    return Store(root, "features", FACTS)


def _only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


DIFFERENT = [
    ("ab", "c"),
    ("a", "bc"),
    ("abc",),
    (("ab", "c"),),
    (b"ab", "c"),
    (),
    ("",),
    (None,),
    ("None",),
    (0,),
    (0.0,),
    (-0.0,),
    (False,),
    ("0",),
    ([],),
    ({},),
    ([1, 2], 3),
    (1, [2, 3]),
    ([2, 1], 3),
    ({"a": 1, "b": 2},),
    ({"a": 2, "b": 1},),
    (np.zeros(4, np.float32),),
    (np.zeros(4, np.int32),),
    (np.zeros((2, 2), np.float32),),
    (np.zeros(2, np.float64),),
    (np.zeros(0, np.float32),),
    (np.zeros((), np.float32),),
    (torch.zeros(4),),
    (torch.zeros(4, dtype=torch.int32),),
    (torch.zeros(2, 2),),
    (torch.zeros(8, dtype=torch.bfloat16),),
    (torch.zeros(8, dtype=torch.float16),),
    (torch.zeros(16, dtype=torch.bool),),
    (torch.zeros(16, dtype=torch.uint8),),
    (torch.tensor([True, False]),),
    (torch.tensor([False, True]),),
    (torch.tensor(1 + 2j),),
    (torch.tensor(1 - 2j),),
]


def test_different_contents_have_different_keys():
    keys = [content_key(*parts) for parts in DIFFERENT]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 32 and int(key, 16) >= 0 for key in keys)


def test_equal_contents_share_a_key():
    grid = torch.arange(6.0).reshape(2, 3)
    assert content_key(grid.t()) == content_key(grid.t().contiguous())  # strides are no content
    assert content_key(torch.tensor([1 + 2j]).conj()) == content_key(torch.tensor([1 - 2j]))  # a lazy view
    assert content_key(grid.bfloat16()) == content_key(grid.clone().bfloat16().requires_grad_())
    assert content_key(np.arange(6)[::2]) == content_key(np.array([0, 2, 4]))
    assert content_key({"a": 1, "b": [2]}) == content_key({"b": (2,), "a": 1})
    # The key of files written by earlier versions must be found by later ones.
    assert content_key("a", 1, [None, 2.5], {"k": b"v"}) == "072da275aef00af86f5a6af1a89f987e"


def test_what_has_no_content_is_refused():
    for part in (object(), {1, 2}, np.array([object()]), Path("a")):
        with pytest.raises(TypeError, match=r"content_key|not an array"):
            content_key(part)


def test_default_root(monkeypatch):
    monkeypatch.setenv("LVLM_CACHE", "~/elsewhere")
    assert default_root() == Path.home() / "elsewhere"
    monkeypatch.setenv("LVLM_CACHE", "")
    assert default_root() == Path.home() / ".cache" / "lightning_vlm"


ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "columns": np.arange(12, dtype=np.int64).reshape(3, 4).T,
    "flags": np.array([True, False, True]),
    "half": np.array([0.5, -0.0, np.inf], np.float16),
    "scalar": np.array(7, np.int8),
    "nothing": np.zeros((0, 5), np.float64),
}


def test_round_trip(tmp_path):
    with _store(tmp_path) as store:
        store.put(ARRAYS)
        assert len(store) == len(ARRAYS) and "matrix" in store and "other" not in store
        assert store.get("other") is None and store.get_tensor("other") is None
    for again in (store, _store(tmp_path), pickle.loads(pickle.dumps(store))):
        for key, array in ARRAYS.items():
            found = again.get(key)
            assert found.dtype == array.dtype and found.shape == array.shape
            np.testing.assert_array_equal(found, array)
            assert torch.equal(again.get_tensor(key), torch.from_numpy(array))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.bool, torch.complex64])
def test_tensors_of_any_dtype(tmp_path, dtype):
    tensor = torch.linspace(-3, 3, 15).reshape(5, 3).to(dtype).t()
    _store(tmp_path).put({"a": tensor, "one": tensor[0, 0], "none": tensor[:0]})
    store = _store(tmp_path)
    for key, value in {"a": tensor, "one": tensor[0, 0], "none": tensor[:0]}.items():
        found = store.get_tensor(key)
        assert found.dtype == dtype and found.shape == value.shape
        assert torch.equal(found.to(torch.complex64), value.to(torch.complex64))


def test_numpy_lacks_bfloat16(tmp_path):
    store = _store(tmp_path)
    store.put({"a": torch.ones(2, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match="get_tensor"):
        store.get("a")


def test_arrays_are_mapped_not_copied_and_read_only(tmp_path):
    store = _store(tmp_path)
    store.put({"a": np.arange(5, dtype=np.int32), "b": np.ones(3)})
    array = store.get("b")
    assert isinstance(array.base, np.memmap) and not array.flags.writeable and not array.flags.owndata
    assert np.shares_memory(array, store.get("b"))
    assert array.ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 2
    tensor = store.get_tensor("b")
    tensor[0] = 2  # its own memory
    assert store.get("b")[0] == 1


def test_a_key_that_exists_is_left(tmp_path):
    store = _store(tmp_path)
    store.put({"a": np.zeros(2)})
    size = _only(store.folder, "*.bin").stat().st_size
    store.put({"a": np.ones(2)})
    assert _only(store.folder, "*.bin").stat().st_size == size
    np.testing.assert_array_equal(store.get("a"), np.zeros(2))


def test_what_is_no_array_is_refused_and_the_store_goes_on(tmp_path):
    store = _store(tmp_path)
    store.put({"a": np.zeros(2)})
    with pytest.raises(TypeError, match="list"):
        store.put({"b": np.ones(1000), "c": [1, 2]})
    assert "b" not in store and _only(store.folder, "*.bin").stat().st_size == 16
    store.put({"b": np.ones(3)})
    assert len(_store(tmp_path)) == 2


# Manifests


def test_other_facts_lie_elsewhere(tmp_path):
    one, other = Store(tmp_path, "features", FACTS), Store(tmp_path, "features", FACTS | {"layers": 4})
    assert one.folder != other.folder and one.folder.parent == other.folder.parent == tmp_path / "features"
    assert json.loads((one.folder / "manifest.json").read_text())["facts"] == FACTS


@pytest.mark.parametrize(
    ("kind", "facts", "message"),
    [
        ("features", FACTS | {"layers": 4}, "layers 3, here it is 4"),
        ("features", FACTS | {"layers": 3.0}, "layers 3, here it is 3.0"),
        ("features", FACTS | {"more": "x"}, "more absent, here it is 'x'"),
        ("features", {"weights": "abc"}, "dtype 'bfloat16', here it is absent"),
        ("logprobs", FACTS, "kind of entries 'features', here it is 'logprobs'"),
    ],
)
def test_a_store_of_other_facts_is_refused(tmp_path, kind, facts, message):
    folder = _store(tmp_path).folder
    assert len(Store.at(folder, "features", FACTS)) == 0
    with pytest.raises(ValueError) as error:
        Store.at(folder, kind, facts)
    assert message in str(error.value) and "delete the folder" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"facts": {}}', '{"kind": "features", "facts": 3}', "\xff"])
def test_an_unreadable_manifest_is_refused(tmp_path, text):
    folder = _store(tmp_path).folder
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    for make in (lambda: _store(tmp_path), lambda: Store.at(folder, "features", FACTS)):
        with pytest.raises(ValueError, match="cannot be read"):
            make()


def test_a_missing_manifest_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        Store.at(tmp_path / "absent", "features", FACTS)
    store = _store(tmp_path)
    store.put({"a": np.zeros(1)})
    (store.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):  # entries of unknown facts
        _store(tmp_path)


def test_facts_must_be_text_or_finite_numbers(tmp_path):
    for value in (float("nan"), None, [1]):
        with pytest.raises(ValueError, match="fact bad"):
            Store(tmp_path, "features", {"bad": value})


# Several processes


def _value(key: int, size: int = 3000) -> np.ndarray:
    return np.arange(size, dtype=np.int64) * key


def _write(store: Store, keys: range) -> None:
    for key in keys:
        store.put({str(key): _value(key)})


def test_two_writers_and_a_reader(tmp_path):
    store = _store(tmp_path)
    store.put({"0": _value(0)})
    # The second process inherits the first one's open shard, and must leave it alone.
    workers = [fork.Process(target=_write, args=(store, keys)) for keys in (range(1, 21), range(11, 31))]
    for worker in workers:
        worker.start()
    _write(store, range(31, 41))
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    store.refresh()
    for reader in (store, _store(tmp_path)):
        assert len(reader) == 41
        for key in range(41):
            np.testing.assert_array_equal(reader.get(str(key)), _value(key))
    assert len(list(store.folder.glob("*.bin"))) == 3


def test_a_reader_sees_a_growing_file_after_refresh(tmp_path):
    writer, reader = _store(tmp_path), _store(tmp_path)
    writer.put({"1": _value(1)})
    assert "1" not in reader
    reader.refresh()
    first = reader.get("1")
    writer.put({"2": _value(2)})  # beyond what the reader has mapped
    assert reader.get("2") is None
    reader.refresh()
    np.testing.assert_array_equal(reader.get("2"), _value(2))
    reader.close()
    np.testing.assert_array_equal(first, _value(1))
    np.testing.assert_array_equal(reader.get("1"), _value(1))


def _write_for_ever(root: Path) -> None:
    store, key = _store(root), 0
    while True:
        store.put({f"{key}/{part}": _value(key, 20_000) for part in range(3)})
        key += 1


@pytest.mark.parametrize("enough", [1, 5, 12])
def test_a_killed_writer_leaves_a_readable_store(tmp_path, enough):
    worker = fork.Process(target=_write_for_ever, args=(tmp_path,))
    worker.start()
    store, limit = _store(tmp_path), time.monotonic() + 60
    while len(store) < enough:
        assert time.monotonic() < limit, "the writer wrote nothing"
        store.refresh()
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    store = _store(tmp_path)
    assert len(store) >= enough
    keys = [f"{key}/{part}" for key in range(len(store)) for part in range(3)]
    found = [key for key in keys if key in store]
    assert len(found) == len(store)
    for key in found:
        np.testing.assert_array_equal(store.get(key), _value(int(key.split("/")[0]), 20_000))
    store.put({"after": np.ones(1)})
    assert "after" in _store(tmp_path)


def test_a_torn_end_is_ignored_until_it_is_whole(tmp_path):
    writer = _store(tmp_path)
    writer.put({"a": np.ones(4), "b": np.ones(4)})
    index, data = _only(writer.folder, "*.idx"), _only(writer.folder, "*.bin")
    lines, values = index.read_bytes(), data.read_bytes()
    for cut in range(len(lines)):  # killed while it wrote the index
        index.write_bytes(lines[:cut])
        assert len(_store(tmp_path)) == lines[:cut].count(b"\n")
    index.write_bytes(lines)
    data.write_bytes(values[:-1])  # the data lag behind, as on a shared file system
    reader = _store(tmp_path)
    assert "a" in reader and "b" not in reader
    data.write_bytes(values)
    reader.refresh()
    np.testing.assert_array_equal(reader.get("b"), np.ones(4))


# Damage


def test_a_damaged_byte_is_found(tmp_path):
    writer = _store(tmp_path)
    writer.put({"a": np.ones(8), "b": np.ones(8)})
    data = _only(writer.folder, "*.bin")
    values = bytearray(data.read_bytes())
    values[-1] ^= 1
    data.write_bytes(values)
    store = _store(tmp_path)
    np.testing.assert_array_equal(store.get("a"), np.ones(8))
    for read in (store.get, store.get_tensor, store.get):
        with pytest.raises(ValueError, match="delete it") as error:
            read("b")
        assert str(data) in str(error.value)
    data.unlink()  # as told
    store = _store(tmp_path)
    assert len(store) == 0
    store.put({"b": np.ones(8)})
    np.testing.assert_array_equal(_store(tmp_path).get("b"), np.ones(8))


@pytest.mark.parametrize("line", ["nonsense", "[]", '["a", 0]', '["a", 0, "<q9", [1], 0]', '{"a": 1}', "3"])
def test_a_damaged_index_is_named(tmp_path, line):
    writer = _store(tmp_path)
    writer.put({"a": np.ones(8)})
    index = _only(writer.folder, "*.idx")
    with index.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="damaged at byte") as error:
        _store(tmp_path)
    assert str(index) in str(error.value)


def _fill(root: Path, answers) -> None:
    store = _store(root)
    store.put({"1": _value(1)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # the kernel refuses as on a full disk
    for _ in range(2):
        try:
            store.put({"2": _value(2), "3": _value(3)})
        except OSError as error:
            answers.put((error.errno, str(error), len(store), int(store.get("1")[1])))
    store.put({"4": _value(4)})  # fits in the shard that it opens anew
    answers.put(len(store))


def test_a_full_disk_leaves_what_was_written(tmp_path):
    answers = fork.Queue()
    worker = fork.Process(target=_fill, args=(tmp_path, answers))
    worker.start()
    for _ in range(2):
        code, text, entries, value = answers.get(timeout=60)
        assert code == errno.EFBIG and "stay readable" in text and str(tmp_path) in text
        assert (entries, value) == (1, 1)
    assert answers.get(timeout=60) == 2
    worker.join(60)
    store = _store(tmp_path)
    assert len(store) == 2
    np.testing.assert_array_equal(store.get("4"), _value(4))
    # The space that failed attempts took is given back.
    assert sum(path.stat().st_size for path in store.folder.glob("*.bin")) == 2 * 24_000
