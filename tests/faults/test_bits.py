"""One bit turned over, a cut, a run of zeros, anywhere in any kind of file: found, or without effect."""
import gzip
import os
from dataclasses import replace

import numpy as np
import pytest
import toy
import torch

from medkd.data.files import cached
from medkd.data.stored import Stored
from medkd.data.volumes import nifti_bytes, read_volume
from medkd.files import Damaged
from medkd.trainers import fit
from medkd.trainers.checkpoint import read_checkpoint
from medkd.trainers.run import read_weights


def damages(data, count=40, seed=0):
    "The data with one bit turned over, cut, or with zeros in it, at places drawn from the seed."
    rng = np.random.default_rng(seed)
    for place in rng.integers(len(data), size=count).tolist():
        yield data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1:]
        yield data[:place]
        yield data[:place] + bytes(min(64, len(data) - place)) + data[place + 64:]
    yield bytes(len(data))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fit(replace(toy.everything, steps=2, epochs=None), tmp_path_factory.mktemp("bits")/"run").path


def test_checkpoint(run, tmp_path):
    data = (run/"last.pt").read_bytes()
    for damaged in damages(data):
        if damaged == data: continue # zeros where there were zeros
        (tmp_path/"last.pt").write_bytes(damaged)
        with pytest.raises(Damaged): read_checkpoint(tmp_path/"last.pt")


def test_weights(run, tmp_path):
    data, whole, found = (run/"best.safetensors").read_bytes(), read_weights(run/"best.safetensors"), 0
    for damaged in damages(data):
        (tmp_path/"best.safetensors").write_bytes(damaged)
        try: state = read_weights(tmp_path/"best.safetensors")
        except Damaged: found += 1
        else: assert list(state) == list(whole) and all(torch.equal(state[name], whole[name]) for name in whole)
    assert found > 80


def entry(tmp_path):
    "The one file of the cache."
    path, = (p for p in (tmp_path/"cache").rglob("*") if p.is_file())
    return path


@pytest.mark.parametrize("kind", ["cached", "stored"])
def test_caches_are_made_again(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setenv("MEDKD_CACHE", str(tmp_path/"cache"))
    arrays, made = dict(image=np.arange(200, dtype=np.float32), label=np.arange(99, dtype=np.uint8)), []
    def compute():
        made.append(1)
        return arrays
    def read(): return cached("key", compute) if kind == "cached" else Stored("key", compute).arrays()
    read()
    data = entry(tmp_path).read_bytes()
    for damaged in damages(data, 20):
        if damaged == data: continue
        entry(tmp_path).write_bytes(damaged)
        before = len(made)
        found = read()
        assert all(np.array_equal(found[name], arrays[name]) for name in arrays) and len(made) == before + 1
        assert entry(tmp_path).read_bytes() == data
    assert capsys.readouterr().out.count("computed again") == len(made) - 1


def test_volumes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 900, (9, 8, 7)).astype(np.int16)
    data, path, found = nifti_bytes(pixels, np.diag([1., 2, 3, 1])), tmp_path/"a.nii.gz", 0
    assert gzip.decompress(data)
    for damaged in damages(data):
        path.write_bytes(damaged)
        try: volume = read_volume(path)
        except ValueError: found += 1
        else: assert np.array_equal(volume.pixels[0], pixels) # the time in gzip's header, for one
    assert found > 80
    os.truncate(path, 0)
    with pytest.raises(ValueError): read_volume(path)
