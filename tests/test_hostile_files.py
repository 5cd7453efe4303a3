"""Data of anybody: HDF5, npz and JSON built to read elsewhere, take memory or hang."""

import json
import os
import re
import struct
import time
import zipfile

import h5py
import numpy as np
import pytest
from fuzz import _demos as demos
from fuzz import _make_minari as make_minari

from psec_jax import data, files
from psec_jax.data import d4rl, hdf5, npz
from psec_jax.errors import InputError


@pytest.fixture
def path(tmp_path):
    """A good file, written by another author."""
    made = tmp_path / "set.hdf5"
    d4rl.save(made, demos(), {"author": "somebody"})
    with h5py.File(made, "r+") as file:
        del file.attrs[d4rl.CHECKSUM]
    return made


def test_a_good_file_is_read(path):
    ds, attrs = d4rl.read(path)
    np.testing.assert_array_equal(ds.obs, demos().obs)
    assert attrs == {"author": "somebody"}
    assert d4rl.layout(path)[0]["obs"] == (24, 7)


def soft(file, outside):
    file["observations"] = h5py.SoftLink("/next_observations")


def external(file, outside):
    file["observations"] = h5py.ExternalLink(outside, "/secret")


def external_storage(file, outside):
    shape = (24, 7)
    file.create_dataset("observations", shape, "u1", external=[(outside, 0, 24 * 7)])


def virtual(file, outside):
    layout = h5py.VirtualLayout((24, 7), "f4")
    layout[...] = h5py.VirtualSource(outside, "secret", (24, 7))
    file.create_virtual_dataset("observations", layout)


def huge(file, outside):
    file.create_dataset("observations", (150_000_000, 7), "f4", chunks=(64, 7))


def huge_contiguous(file, outside):
    file.create_dataset("observations", (2**33, 7), "f4")


def words(file, outside):
    file.create_dataset("observations", data=["x"] * 24, dtype=h5py.string_dtype())


def references(file, outside):
    file.create_dataset("observations", (24, 7), h5py.ref_dtype)


def compound(file, outside):
    file["observations"] = np.zeros((24, 7), [("a", "f4"), ("b", "f4")])


def empty(file, outside):
    file["observations"] = h5py.Empty("f4")


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (soft, "observations is a link to elsewhere"),
        (external, "observations is a link to elsewhere"),
        (external_storage, "observations is stored in another file"),
        (virtual, "observations is stored in another file"),
        (huge, "observations claims 4,200,000,000 bytes, in a file of"),
        (huge_contiguous, "observations claims 240,518,168,576 bytes"),
        (words, "observations has type object, expected numbers"),
        (references, "observations has type object, expected numbers"),
        (compound, "observations has type .*, expected numbers"),
        (empty, "observations is empty"),
    ],
)
def test_arrays_that_are_not_numbers_of_this_file(path, tmp_path, build, words):
    outside = tmp_path / "outside.hdf5"
    with h5py.File(outside, "w") as file:
        file["secret"] = np.full((24, 7), 42.0, np.float32)
    with h5py.File(path, "r+") as file:
        del file["observations"]
        build(file, str(outside))
    began = time.monotonic()
    with pytest.raises(InputError, match=words) as caught:
        data.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("odd", h5py.Empty("f4"), "attribute 'odd' is empty"),
        ("odd", np.zeros(3, [("a", "f4")]), "attribute 'odd' has type"),
        ("odd", np.bytes_(b"\xff\xfe"), "not a readable HDF5 file"),
        ("environment", np.arange(3), "attribute 'environment' is no text"),
        ("task", 3, "attribute 'task' is no text"),
        ("made_by", np.array(["a", "b"], object), "attribute 'made_by' is no text"),
    ],
)
def test_attributes_of_odd_types(path, name, value, words):
    with h5py.File(path, "r+") as file:
        file.attrs[name] = value
    with pytest.raises(InputError, match=words):
        data.read(path)


def test_a_deflated_chunk_that_never_ends(path):
    import zlib

    bomb = zlib.compress(bytes(3 * 10**9), 9) if os.environ.get("BOMB") else None
    bomb = bomb or zlib.compress(bytes(6 * 10**8), 1)
    with h5py.File(path, "r+") as file:
        del file["costs"]
        costs = file.create_dataset(
            "costs", (24,), "f4", chunks=(24,), compression="gzip"
        )
        costs.id.write_direct_chunk((0,), bomb)
    with pytest.raises(InputError, match="not a readable HDF5 file"):
        data.read(path)


def test_the_library_that_runs_for_ever_or_dies(path, monkeypatch):
    """The process that reads is ended, and the next file is read by another one."""
    d4rl.read(path)
    hdf5._children[0]._process.kill()
    with pytest.raises(InputError, match="the HDF5 library is killed by it"):
        d4rl.read(path)
    ds, _ = d4rl.read(path)
    assert len(ds.obs) == 24


def test_flipped_bits_of_our_own_files_are_noticed(tmp_path):
    path = tmp_path / "set.hdf5"
    d4rl.save(path, demos(), {"seed": 3, "policy": "random", "sizes": [1, 2]})
    ds, attrs = d4rl.read(path)
    assert attrs.pop("sizes").tolist() == [1, 2]
    assert attrs == {"seed": 3, "policy": "random"}
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    start = content.index(ds.obs.tobytes()[:64])  # where the numbers are
    for at in generator.integers(start, start + ds.obs.nbytes, 20):
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(generator.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(InputError, match="do not match its checksum"):
            d4rl.read(path)
    path.write_bytes(content.replace(b"random", b"rondam"))
    with pytest.raises(InputError, match="do not match its checksum"):
        d4rl.read(path)


@pytest.mark.parametrize("suffix", [".hdf5", ".npz"])
def test_what_is_no_file(tmp_path, suffix):
    pipe, folder = tmp_path / f"pipe{suffix}", tmp_path / f"folder{suffix}"
    os.mkfifo(pipe)
    folder.mkdir()
    with pytest.raises(InputError, match="no such file"):
        data.read(pipe)
    with pytest.raises(InputError, match="no episode files|no such file"):
        data.read(folder)
    (tmp_path / "device.npz").symlink_to("/dev/zero")
    with pytest.raises(InputError, match="no such file"):
        data.read(tmp_path / "device.npz")


def episode(**arrays):
    good = {
        "observation": np.zeros((9, 4), np.float32),
        "action": np.zeros((9, 2), np.float32),
        "reward": np.ones(9),
        "discount": np.ones(9),
    }
    return good | arrays


def rezipped(path, change, kind=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, content in members.items():
            file.writestr(name, content)


def header(old, new):
    def change(members):
        content = members["reward.npy"]
        assert old in content
        members["reward.npy"] = content.replace(old, new.ljust(len(old)))

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (header(b"(9,), ", b"(-9,),"), "has 72 bytes, its shape"),
        (header(b"(9,), }           ", b"(9999999999,), }"), "has 72 bytes, its shape"),
        (header(b"'<f8'", b"'|O'"), "expected numbers"),
        (header(b"'descr'", b"'x'"), "not a readable .npz file"),
        (lambda m: m.update({"reward.npy": m["reward.npy"][:-1]}), "has 71 bytes"),
        (lambda m: m.update({"reward.npy": b"x"}), "not a readable .npz file"),
        (lambda m: m.update({"bomb.npy": bytes(10**8)}), "claims .* bytes, in a fi"),
    ],
)
def test_members_of_npz_files(tmp_path, change, words):
    path = tmp_path / "episode.npz"
    np.savez(path, **episode())
    rezipped(path, change)
    with pytest.raises(InputError, match=words) as caught:
        data.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_packing_of_npz_files(tmp_path, kind):
    path = tmp_path / "episode.npz"
    np.savez(path, **episode())
    rezipped(path, lambda members: None, kind)
    with pytest.raises(InputError, match="encrypted or packed otherwise"):
        data.read(path)


def test_encrypted_and_double_members(tmp_path):
    path = tmp_path / "episode.npz"
    np.savez(path, **episode())
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="encrypted or packed otherwise"):
        data.read(path)
    np.savez(path, **episode())
    with zipfile.ZipFile(path, "a") as file, pytest.warns(UserWarning):
        file.writestr("reward.npy", b"")
    with pytest.raises(InputError, match="two arrays of one name"):
        data.read(path)


def test_a_zip_file_that_claims_less_than_it_holds(tmp_path):
    path = tmp_path / "episode.npz"
    np.savez_compressed(path, **episode(reward=np.zeros(10**7)))
    content = bytearray(path.read_bytes())
    at = content.rindex(b"reward.npy") - 46  # its entry in the list at the end
    assert content[at : at + 4] == b"PK\x01\x02"
    struct.pack_into("<I", content, at + 24, 200)
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable .npz file"):
        npz.read(path)


def test_names_with_digits_that_are_not_decimal(tmp_path):
    for name in ("episode_²", "episode_10", "episode_2", "episode_٣"):
        np.savez(tmp_path / f"{name}.npz", **episode())
    assert len(data.load(tmp_path).obs) == 4 * 8


def minari(folder, **metadata):
    folder.mkdir()
    make_minari(folder)
    path = folder / "data" / "metadata.json"
    known = json.loads(path.read_text()) | metadata
    path.write_text(json.dumps({k: v for k, v in known.items() if v is not None}))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"observation_space": None}, "observation_space in its metadata is 'miss"),
        ({"action_space": None}, "action_space in its metadata is 'missing'"),
        ({"action_space": {"type": "Box"}}, "action_space in its metadata is {"),
        ({"action_space": "{}"}, "action_space is not one of Minari's .'type'"),
        ({"action_space": "[" * 100_000}, "action_space is not a JSON file"),
        ({"action_space": '{"type": "Text"}'}, "a space of type 'Text'"),
        (
            {"action_space": '{"type": "Box", "shape": [1e99], "dtype": "float32"}'},
            "a Box of shape",
        ),
        (
            {"action_space": '{"type": "Box", "shape": [99999999], "dtype": "f4"}'},
            "a Box of shape",
        ),
        ({"total_episodes": 10**9}, "no dataset 'episode_2/observations/a'"),
        ({"total_episodes": True}, "total_episodes in its metadata is True"),
        ({"total_episodes": 0}, "holds no episodes"),
        ({"minari_version": "9.0.0"}, "of version '9.0.0'"),
        ({"data_format": "arrow"}, "in 'arrow', expected"),
        ({"dataset_id": "../../x-v0"}, "expected minari:"),
        ({"dataset_id": None}, "dataset_id in its metadata is 'missing'"),
        ({"env_spec": 3}, "not of a Minari dataset"),
        ({"env_spec": "[]"}, "got list, expected a JSON object"),
        ({"env_spec": '{"id": "X\\u001b[2J"}'}, "env_spec has no usable id"),
        ({"env_spec": '{"id": "X-v0", "kwargs": [1]}'}, "no usable kwargs"),
        ({"env_spec": '{"id": "X-v0", "max_episode_steps": "9"}'}, "max_episode_steps"),
    ],
)
def test_metadata_of_minari(tmp_path, changes, words):
    pytest.importorskip("minari", reason="run: pip install 'psec_jax[minari]'")
    folder = minari(tmp_path / "set", **changes)
    with pytest.raises(InputError, match=words) as caught:
        data.read(folder)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


def test_a_good_set_of_minari_is_read(tmp_path):
    pytest.importorskip("minari", reason="run: pip install 'psec_jax[minari]'")
    ds, attrs = data.read(minari(tmp_path / "set"))
    assert ds.obs.shape == (6, 4) and np.abs(ds.action).max() <= 1
    assert ds.cost.tolist() == [1.0] * 6 and re.match("canary:", "canary:")
    assert attrs["environment"].startswith("gymnasium:canary:Walk-v0")


def test_json_files(tmp_path):
    path = tmp_path / "x.json"
    for text in ("[" * 100_000, '{"a": NaN}', '{"a": 1e999}', "", "\x00", "{]"):
        path.write_text(text)
        with pytest.raises(InputError, match="is not a JSON file"):
            files.read_json(path)
    path.write_bytes(b"{}" + bytes(10))
    with pytest.raises(InputError, match="is not a JSON file"):
        files.read_json(path)
    with open(path, "wb") as file:
        file.truncate(files.MAX_JSON + 1)
    with pytest.raises(InputError, match="67108865 bytes, expected 67108864 at most"):
        files.read_json(path)
