"""The allow-list unpickler: dataset pickles in, code out."""

from __future__ import annotations

import copyreg
import os
import pickle

import numpy as np
import pytest

from puat_fast.data import DataError, load_dataset
from puat_fast.data.formats.unpickle import load_pickle


class Runs:
    """A pickle of this calls `function(*arguments)` when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(write, tmp_path, protocol):
    witness = tmp_path / "witness"
    raw = pickle.dumps({b"data": Runs(os.system, f"touch {witness}")}, protocol)
    pickle.loads(raw)
    assert witness.exists()  # the attack works where pickles are trusted
    witness.unlink()
    data_dir = write("cifar10", raw={"data_batch_1": raw})
    with pytest.raises(DataError) as caught:
        load_dataset("cifar10", data_dir)
    file = data_dir / "cifar-10-batches-py" / "data_batch_1"
    assert str(caught.value) == f"{file}: refuses to run code: the pickle names {os.name}.system"
    assert not witness.exists()


@pytest.mark.parametrize(
    "function, arguments, named",
    [
        (eval, ("1",), "builtins.eval|__builtin__.eval"),
        (getattr, ("", "join"), "builtins.getattr|__builtin__.getattr"),
        (np.load, ("file",), "numpy.load"),
        (copyreg._reconstructor, (object, object, None), "copyreg._reconstructor|copy_reg._reconstructor"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_anything_outside_the_list_is_refused_by_name(function, arguments, named, protocol):
    with pytest.raises(DataError, match=f"file: refuses to run code: the pickle names ({named})"):
        load_pickle(pickle.dumps({b"x": Runs(function, *arguments)}, protocol), "file")


def test_dotted_names_do_not_reach_through_an_allowed_module():
    raw = b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93."
    with pytest.raises(DataError, match=r"refuses to run code: the pickle names numpy\.ndarray\.tofile"):
        load_pickle(raw, "file")


def test_encode_is_latin1_only():
    raw = b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R."
    with pytest.raises(DataError, match=r"refuses to run code: the pickle names _codecs\.encode with 'rot13'"):
        load_pickle(raw, "file")


@pytest.mark.parametrize("array", [np.array([{}]), np.zeros(2, "f2"), np.zeros(2, "S4"), np.zeros(2, [("a", "u1")])])
@pytest.mark.parametrize("protocol", [2, 5])
def test_only_plain_numbers_are_rebuilt(array, protocol):
    with pytest.raises(DataError, match=r"file: (truncated or not a dataset pickle|refuses to run code)"):
        load_pickle(pickle.dumps({b"data": array}, protocol), "file")


def test_shape_that_the_bytes_do_not_fill(pickled):
    raw = pickled({b"data": np.zeros((2, 3), np.uint8)})
    assert raw.count(b"K\x02K\x03\x86") == 1
    with pytest.raises(DataError, match="file: truncated or not a dataset pickle"):
        load_pickle(raw.replace(b"K\x02K\x03\x86", b"K\x02K\x09\x86"), "file")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("python2", [False, True])
def test_arrays_come_back_as_they_were(pickled, protocol, python2):
    content = {
        b"c": np.arange(12, dtype=np.uint8).reshape(3, 4),
        b"fortran": np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(3, 4)),
        b"big": np.array([1, -2, 300], ">i4"),
        b"wide": np.array([2**40, -1]),
        b"list": [1, 2],
    }
    raw = pickled(content) if python2 else pickle.dumps(content, protocol)
    back = load_pickle(raw, "file")
    assert back.keys() == content.keys() and back[b"list"] == [1, 2]
    for key in (b"c", b"fortran", b"big", b"wide"):
        assert type(back[key]) is np.ndarray and back[key].dtype == content[key].dtype
        np.testing.assert_array_equal(back[key], content[key])


def test_text_keys_become_bytes():
    assert load_pickle(pickle.dumps({"labels": [1]}), "file") == {b"labels": [1]}
