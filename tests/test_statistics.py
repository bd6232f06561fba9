"""`Moments`: layers, merging, files, pytree and the checks of its constructor."""

import copy
import dataclasses
import os
import pickle
import stat

import numpy as np
import pytest
import torch
from helpers import (
    assert_close,
    assert_moments,
    assert_same_bits,
    leaves,
    make_features,
    mean_bound,
    mean_error,
    var_bound,
    var_error,
)
from torch.utils import _pytree as pytree

import moment_ops as mo

SHAPES = ((5,), (3, 2, 2), (2, 3))


def assert_same(first, second):
    assert_same_bits(
        [first.mean, first.var, first.cov, first.count], [second.mean, second.var, second.cov, second.count]
    )
    assert (first.correction, first.shapes, first.names) == (second.correction, second.shapes, second.names)


def test_layers_are_views_in_the_shape_of_each_layer():
    features = make_features(6, SHAPES)
    m = mo.moments(features)
    assert len(m.layers()) == 3
    for (mean, var), x in zip(m.layers(), features, strict=True):
        assert mean.shape == var.shape == x.shape[1:]
        assert_close(mean, x.double().mean(0), rows=6)
        assert_close(var, x.double().var(0), rows=6)
        assert mean.untyped_storage().data_ptr() == m.mean.untyped_storage().data_ptr()


def test_layers_without_variances_say_none():
    assert [var for _, var in mo.moments(make_features(6, SHAPES), var=False).layers()] == [None] * 3


def test_by_default_there_is_one_layer_of_all_columns():
    assert mo.Moments(torch.zeros(4)).shapes == ((4,),)
    assert mo.Moments(torch.zeros(4), correction=0).sizes == (4,)


def test_one_count_serves_all_layers():
    m = mo.Moments(torch.zeros(5), count=7, shapes=((2,), (3,)))
    assert m.count.tolist() == [7, 7]
    assert m.count.dtype == torch.int64
    assert mo.Moments(torch.zeros(5), count=[7, 8], shapes=((2,), (3,))).count.tolist() == [7, 8]


def test_a_single_covariance_is_that_of_the_only_layer():
    assert len(mo.Moments(torch.zeros(2), cov=torch.eye(2)).cov) == 1


def test_a_field_can_be_replaced():
    m = mo.moments(make_features(6, SHAPES))
    assert dataclasses.replace(m, correction=0).correction == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        m.correction = 2


# Merging


@pytest.mark.parametrize("sizes", [(7, 5), (1, 11), (11, 1), (4, 1, 1, 6), (1,) * 12, (12,)])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_parts_are_the_moments_of_all_rows(sizes, correction, dtype):
    features = make_features(12, SHAPES, dtype)
    parts = [
        mo.moments(list(rows), correction=correction)
        for rows in zip(*(x.split(list(sizes)) for x in features), strict=True)
    ]
    merged = mo.Moments.merge(*parts)
    assert_moments(merged, features, correction)
    assert merged.count.tolist() == [12] * 3
    assert (merged.correction, merged.shapes) == (correction, SHAPES)


def test_merged_means_alone_have_no_variances():
    first, second = make_features(3, SHAPES), make_features(9, SHAPES, seed=2)
    merged = mo.Moments.merge(mo.moments(first, var=False), mo.moments(second, var=False))
    assert merged.var is None
    assert_moments(merged, [torch.cat(pair) for pair in zip(first, second, strict=True)])


def test_layers_of_different_counts_are_merged_each_by_its_own():
    parts = [
        mo.Moments(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]), count=[2, 10], shapes=((1,), (1,))),
        mo.Moments(torch.tensor([4.0, 4.0]), torch.tensor([1.0, 1.0]), count=[6, 10], shapes=((1,), (1,))),
    ]
    merged = mo.Moments.merge(*parts)
    assert merged.count.tolist() == [8, 20]
    assert merged.mean.tolist() == [3.0, 2.0]
    assert_close(merged.var, torch.tensor([(1 + 5 + 1.5 * 16) / 7, (9 + 9 + 5 * 16) / 19]))


def test_one_row_altogether_has_no_variance():
    x = make_features(1, SHAPES)
    assert mo.Moments.merge(mo.moments(x)).var.isnan().all()


def test_merging_a_constant_keeps_its_variance_at_zero():
    parts = [mo.moments(torch.full((rows, 3), 0.1)) for rows in (3, 8, 1, 5)]
    merged = mo.Moments.merge(*parts)
    assert merged.var.tolist() == [0.0] * 3
    assert torch.equal(merged.mean, parts[0].mean)


def test_merging_is_differentiable():
    rows = leaves(make_features(12, [(4,)], torch.float64))[0]
    weight = torch.randn(2, 4, dtype=torch.float64)
    parts = [mo.moments(part) for part in rows.split([7, 1, 4])]
    merged = mo.Moments.merge(*parts)
    ours = torch.autograd.grad((weight[0] * merged.mean + weight[1] * merged.var).sum(), rows)[0]
    theirs = torch.autograd.grad((weight[0] * rows.mean(0) + weight[1] * rows.var(0)).sum(), rows)[0]
    assert_close(ours, theirs, rows=12)


def test_merging_keeps_the_names():
    m = mo.Moments(torch.zeros(2), torch.ones(2), count=3, names=("relu",))
    assert mo.Moments.merge(m, m).names == ("relu",)


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_saved_file_loads_to_the_same_moments(tmp_path, dtype):
    mean, var = torch.randn(5).to(dtype), torch.rand(5).to(dtype)
    covariances = (torch.eye(2).to(dtype), torch.ones(3, 3).to(dtype))
    m = mo.Moments(mean, var, covariances, [7, 9], 0, ((2,), (1, 3)), ("conv", "relu:1"))
    m.save(tmp_path / "m.npz")
    assert_same(mo.Moments.load(tmp_path / "m.npz"), m)


def test_means_alone_survive_a_file(tmp_path):
    m = mo.moments(make_features(6, SHAPES), var=False)
    m.save(str(tmp_path / "m.npz"))
    assert_same(mo.Moments.load(str(tmp_path / "m.npz")), m)


def test_the_path_is_taken_as_it_is(tmp_path):
    m = mo.moments(make_features(6, SHAPES))
    m.save(tmp_path / "moments")
    assert os.listdir(tmp_path) == ["moments"]
    assert_same(mo.Moments.load(tmp_path / "moments"), m)


def test_differentiable_moments_can_be_saved(tmp_path):
    mo.moments(leaves(make_features(6, SHAPES))).save(tmp_path / "m.npz")
    assert not mo.Moments.load(tmp_path / "m.npz").mean.requires_grad


def test_numpy_reads_the_file_without_pickle(tmp_path):
    m = mo.moments(make_features(6, SHAPES))
    m.save(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz", allow_pickle=False) as file:
        assert np.array_equal(file["mean"], m.mean.numpy())


def test_a_file_of_ours_is_replaced(tmp_path):
    mo.moments(make_features(6, SHAPES)).save(tmp_path / "m.npz")
    other = mo.moments(make_features(8, [(2,)]))
    other.save(tmp_path / "m.npz")
    assert_same(mo.Moments.load(tmp_path / "m.npz"), other)


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    mo.moments(make_features(6, SHAPES)).save(tmp_path / "m.npz")
    assert stat.S_IMODE(os.stat(tmp_path / "m.npz").st_mode) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)


def moments_with_covariance(num_layers=1):
    x = torch.randn(50, 4, dtype=torch.float64)
    cov = (torch.cov(x.mT),) * num_layers
    mean, var = x.mean(0).repeat(num_layers), x.var(0).repeat(num_layers)
    return mo.Moments(mean.float(), var.float(), tuple(c.float() for c in cov), 50, shapes=((4,),) * num_layers)


def test_a_single_covariance_is_exported_as_the_fid_tools_read_it(tmp_path):
    m = moments_with_covariance()
    m.save(tmp_path / "stats.npz", format="fid")
    with np.load(tmp_path / "stats.npz") as file:
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        assert np.array_equal(file["mu"], m.mean)
        assert np.array_equal(file["sigma"], m.cov[0])
    loaded = mo.Moments.load(tmp_path / "stats.npz")
    assert torch.equal(loaded.cov[0], m.cov[0].double())
    assert (loaded.count.tolist(), loaded.correction) == ([50], 1)
    # A file of ours may be written again.
    m.save(tmp_path / "stats.npz", format="fid")


@pytest.mark.parametrize("num_layers", [0, 2])
def test_the_fid_format_holds_exactly_one_covariance(tmp_path, num_layers):
    m = moments_with_covariance(num_layers) if num_layers else mo.Moments(torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"format: got 'fid' for moments with (none|2) covariances, expected exactly one"
    ):
        m.save(tmp_path / "stats.npz", format="fid")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mu_and_sigma_of_the_fid_tools_load(tmp_path, dtype):
    data = np.random.default_rng(0).normal(size=(50, 4))
    mu, sigma = data.mean(0).astype(dtype), np.cov(data, rowvar=False).astype(dtype)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    m = mo.Moments.load(tmp_path / "stats.npz")
    assert np.array_equal(m.mean, mu)
    assert np.array_equal(m.var, np.diag(sigma))
    assert np.array_equal(m.cov[0], sigma)
    assert (m.count, m.correction, m.shapes) == (None, 1, ((4,),))


def other_files():
    rng = np.random.default_rng(0)
    return {
        "text": lambda path: path.write_text("mean: 0"),
        "empty": lambda path: path.write_bytes(b""),
        "array": lambda path: np.save(path.open("wb"), rng.normal(size=3)),
        "other arrays": lambda path: np.savez(path.open("wb"), weights=rng.normal(size=3)),
        "objects": lambda path: np.savez(path.open("wb"), mean=np.array([{}], dtype=object)),
        "torch": lambda path: torch.save({"mean": torch.zeros(3)}, path),
        "pickle": lambda path: path.write_bytes(pickle.dumps({"mean": [0.0]})),
        "truncated": lambda path: truncated(path),
        "folder": lambda path: path.mkdir(),
    }


def truncated(path):
    mo.moments(torch.randn(4, 100)).save(path)
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("kind", other_files())
def test_a_file_that_is_not_ours_is_refused(tmp_path, kind):
    path = tmp_path / "file.npz"
    other_files()[kind](path)
    with pytest.raises(ValueError, match=r"file\.npz is not a moments file: .*; expected a file of Moments") as caught:
        mo.Moments.load(path)
    assert "pickle" not in str(caught.value)


@pytest.mark.parametrize("kind", other_files())
def test_a_file_that_is_not_ours_is_not_overwritten(tmp_path, kind):
    path = tmp_path / "file.npz"
    other_files()[kind](path)
    before = None if path.is_dir() else path.read_bytes()
    with pytest.raises(ValueError, match="not overwritten"):
        mo.moments(torch.randn(4, 3)).save(path)
    assert path.is_dir() or path.read_bytes() == before
    assert os.listdir(tmp_path) == ["file.npz"]


@pytest.mark.parametrize(
    "damage",
    [
        {"mean": np.array([np.nan, 0, 0])},
        {"var": np.array([-1.0, 0, 0])},
        {"var": np.zeros(4)},
        {"shapes": np.array("[[7]]")},
        {"shapes": np.array("3")},
        {"shapes": np.array("[")},
        {"correction": np.array("one")},
        {"count": np.array([3, 4])},
    ],
)
def test_a_damaged_file_is_refused_with_its_path(tmp_path, damage):
    mo.moments(torch.randn(4, 3)).save(tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz") as file:
        arrays = dict(file) | damage
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(ValueError, match=r"m\.npz"):
        mo.Moments.load(tmp_path / "m.npz")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"m\.npz"):
        mo.Moments.load(tmp_path / "m.npz")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    m = mo.moments(make_features(6, SHAPES))
    m.save(tmp_path / "m.npz")

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space"):
        mo.moments(torch.randn(4, 3)).save(tmp_path / "m.npz")
    assert os.listdir(tmp_path) == ["m.npz"]
    assert_same(mo.Moments.load(tmp_path / "m.npz"), m)


# Pytree


def test_moments_are_a_pytree():
    m = mo.Moments(torch.randn(5), torch.rand(5), (torch.eye(2), torch.eye(3)), 4, 0, ((2,), (3,)), ("a", "b"))
    assert_same(pytree.tree_map(lambda tensor: tensor, m), m)
    doubled = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor * 2, m)
    assert_same_bits(doubled.mean, m.mean * 2)
    assert_same_bits(doubled.cov[1], m.cov[1] * 2)
    assert doubled.count.tolist() == [8, 8]


def test_the_structure_of_the_pytree_can_be_written_down():
    m = mo.Moments(torch.randn(5), count=4, correction=0, shapes=((2,), (1, 3)), names=("a", "b"))
    values, structure = pytree.tree_flatten(m)
    restored = pytree.treespec_loads(pytree.treespec_dumps(structure))
    assert_same(pytree.tree_unflatten(values, restored), m)


def test_results_that_are_not_finite_pass_through_the_pytree():
    m = mo.moments(torch.randn(1, 3))
    assert pytree.tree_map(lambda tensor: tensor, m).var.isnan().all()


def test_moments_can_be_copied():
    m = mo.moments(make_features(6, SHAPES))
    assert_same(copy.deepcopy(m), m)


# Accuracy


@pytest.mark.parametrize("ratio", [1.0, 1e2])
@pytest.mark.parametrize("sizes", [(64, 64), (500, 3, 1, 496)])
def test_merging_keeps_the_digits_that_the_parts_have(ratio, sizes):
    x = (torch.randn(sum(sizes), 6, dtype=torch.float64) + ratio).float()
    merged = mo.Moments.merge(*[mo.moments(part) for part in x.split(list(sizes))])
    mean, var = x.double().mean(0), x.double().var(0)
    # The parts' means come rounded to float32: an error of up to half an epsilon of the ratio, in units of std.
    rounding = 2 * ratio * torch.finfo(torch.float32).eps
    assert mean_error(merged.mean, mean, var) <= mean_bound(torch.float32)
    assert var_error(merged.var, var) <= var_bound(torch.float32) + rounding
