import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from smartdiff_jax.errors import CheckpointError
from smartdiff_jax.weights.tensor_file import ArrayTensor, read_header, write


@pytest.fixture
def arrays():
    draw = np.random.default_rng(0).standard_normal
    return {
        "a": draw((3, 5)).astype(np.float32),
        "b": draw(7).astype(ml_dtypes.bfloat16),
        "c": draw((2, 2)).astype(ml_dtypes.float8_e4m3fn),
        "d": np.arange(-3, 3, dtype=np.int8),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.array(2.5, np.float32),
        "transposed": draw((4, 3)).astype(np.float16).T,
    }


def same(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def test_round_trip_of_every_kind(tmp_path, arrays):
    file = tmp_path / "x.safetensors"
    write(file, {**arrays, "a": ArrayTensor(arrays["a"])}, metadata={"format": "pt"})
    tensors, metadata = read_header(file)
    assert metadata == {"format": "pt"}
    assert all(same(tensors[name].read(), array) for name, array in arrays.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors"]


def test_reads_what_the_safetensors_package_writes_and_the_reverse(tmp_path, arrays):
    arrays = {name: np.ascontiguousarray(a) for name, a in arrays.items() if name not in ("c", "scalar")}
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors")
    theirs, _ = read_header(tmp_path / "theirs.safetensors")
    assert all(same(theirs[name].read(), array) for name, array in arrays.items())
    write(tmp_path / "ours.safetensors", arrays)
    ours = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    assert all(same(ours[name], array) for name, array in arrays.items())


def test_reading_copies_nothing(tmp_path, arrays):
    write(tmp_path / "x.safetensors", arrays)
    read = read_header(tmp_path / "x.safetensors")[0]["a"].read()
    assert not read.flags.owndata and not read.flags.writeable


@pytest.mark.parametrize("keep", [0, 4, 20, 100, -1])
def test_truncated(tmp_path, arrays, keep):
    file = tmp_path / "x.safetensors"
    write(file, arrays)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .*download it again"):
        read_header(file)


def test_too_long(tmp_path, arrays):
    file = tmp_path / "x.safetensors"
    write(file, arrays)
    file.write_bytes(file.read_bytes() + b"1")
    with pytest.raises(CheckpointError, match="download it again"):
        read_header(file)


@pytest.mark.parametrize("byte", range(8))
def test_no_flipped_header_length_is_believed(tmp_path, arrays, byte):
    file = tmp_path / "x.safetensors"
    write(file, arrays)
    content = bytearray(file.read_bytes())
    content[byte] ^= 0b1000
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="download it again"):
        read_header(file)


def test_no_flipped_header_byte_gives_other_shapes(tmp_path, arrays):
    """A flip either is refused, or changes nothing but a name or the metadata (unknown names are the loader's business)."""
    file = tmp_path / "x.safetensors"
    del arrays["empty"]  # its bytes, none, fit any other width as well
    write(file, arrays)
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    kept = 0
    for position in range(8, 8 + length):
        flipped = bytearray(content)
        flipped[position] ^= 1
        file.write_bytes(flipped)
        try:
            tensors, _ = read_header(file)
        except CheckpointError as error:
            assert str(file) in str(error)
            continue
        kept += 1
        assert all(tensors[name].shape == arrays[name].shape for name in tensors.keys() & arrays.keys())
    assert kept < length / 2


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": "F32"},
        {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        3,
    ],
)
def test_a_wrong_header_entry(tmp_path, entry):
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    with pytest.raises(CheckpointError, match="x.safetensors"):
        read_header(tmp_path / "x.safetensors")


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors.*check the path"):
        read_header(tmp_path / "nothing.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path, arrays):
    class Broken:
        shape, dtype = (2,), np.dtype(np.float32)

        def read(self):
            raise KeyboardInterrupt

    write(tmp_path / "x.safetensors", arrays)
    before = (tmp_path / "x.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x.safetensors", {"a": Broken()})
    assert (tmp_path / "x.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
