"""`dataset_moments`: the moments of a whole data set, batch by batch."""

import pytest
import torch
from helpers import assert_moments, assert_same_bits, exact_moments, make_features, mean_error, var_error
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import moment_ops as mo

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = ((5,), (3, 2, 2))


def batches(features, sizes):
    """Batches of the features of all layers, of the given sizes: what the extractor is given and gives back."""
    return [{"features": list(parts)} for parts in zip(*(x.split(list(sizes)) for x in features), strict=True)]


def extractor(batch):
    return batch["features"]


@pytest.mark.parametrize("sizes", [(100,), (64, 36), (1, 99), (99, 1), (3, 1, 1, 40, 55), (1,) * 100, (7,) * 14 + (2,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_batch_sizes_give_the_moments_of_all_rows(sizes, dtype):
    features = make_features(100, SHAPES, dtype)
    m = mo.dataset_moments(extractor, batches(features, sizes))
    assert_moments(m, features)
    assert m.count.tolist() == [100, 100]
    assert (m.correction, m.shapes) == (1, SHAPES)


def test_hundreds_of_batches_far_from_zero_keep_their_digits():
    """Batches come with means in float32; what merging adds stays below that."""
    x = make_features(20_000, [(4,)])[0] * 0.1 + 10
    m = mo.dataset_moments(lambda batch: batch, x.split(37))
    mean, var = exact_moments([x])
    assert mean_error(m.mean, mean, var) <= 1e-6
    assert var_error(m.var, var) <= 1e-5


def test_the_extractor_may_give_moments():
    features = make_features(20, SHAPES)
    m = mo.dataset_moments(lambda batch: mo.moments(batch["features"]), batches(features, (12, 8)))
    assert_moments(m, features)


def test_means_alone_stay_means_alone():
    features = make_features(20, SHAPES)
    m = mo.dataset_moments(lambda batch: mo.moments(batch["features"], var=False), batches(features, (12, 8)))
    assert m.var is None
    assert_moments(m, features)


def test_a_data_loader_gives_inputs_first():
    x = torch.randn(30, 4)
    loader = DataLoader(TensorDataset(x, torch.arange(30)), batch_size=8)
    assert_moments(mo.dataset_moments(lambda inputs: inputs * 1, loader), [x])


def test_batches_may_come_from_a_generator():
    x = torch.randn(30, 4)
    assert_moments(mo.dataset_moments(lambda inputs: inputs, (part for part in x.split(7))), [x])


@pytest.mark.parametrize("progress", [True, False])
def test_progress_does_not_change_the_result(progress):
    pytest.importorskip("tqdm")
    x = torch.randn(30, 4)
    assert_moments(mo.dataset_moments(lambda inputs: inputs, x.split(7), progress=progress), [x])


def test_no_graph_is_recorded():
    net = nn.Linear(4, 3)
    m = mo.dataset_moments(net, torch.randn(30, 4).split(7))
    assert not m.mean.requires_grad
    assert not m.var.requires_grad


def network():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.5)))


def test_a_module_runs_in_evaluation_mode():
    net = network()
    x = torch.randn(30, 4)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    m = mo.dataset_moments(net, x.split(7))
    assert_same_bits(dict(net.named_buffers()), before)
    with torch.no_grad():
        assert_moments(m, [net.eval()(x)])


def modes(net):
    return [module.training for module in net.modules()]


@pytest.mark.parametrize("training", [True, False])
def test_every_part_of_a_module_gets_its_mode_back(training):
    net = network().train(training)
    net[1].train(not training)
    before = modes(net)
    mo.dataset_moments(net, torch.randn(30, 4).split(7))
    assert modes(net) == before


def test_a_module_gets_its_mode_back_after_an_error():
    net = network()
    before = modes(net)
    with pytest.raises(RuntimeError):
        mo.dataset_moments(net, [torch.randn(3, 4), torch.randn(3, 9)])
    assert modes(net) == before


def test_the_result_serves_as_a_target(tmp_path):
    features = make_features(20, SHAPES)
    m = mo.dataset_moments(extractor, batches(features, (12, 8)))
    m.save(tmp_path / "target.npz")
    loss = mo.MomentLoss(mo.Moments.load(tmp_path / "target.npz"))
    assert loss(features) < 1e-9


# Covariances


def exact_covariances(features):
    return [torch.cov(x.flatten(1).double().mT) for x in features]


@pytest.mark.parametrize("sizes", [(60,), (7, 20, 33), (1, 59), (30, 1, 29)])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_the_covariance_of_a_data_set_is_that_of_all_rows_at_once(sizes, offset):
    features = [x + offset for x in make_features(sum(sizes), [(5,), (2, 3, 2)], torch.float32)]
    m = mo.dataset_moments(extractor, batches(features, sizes), cov=True)
    for ours, exact in zip(m.cov, exact_covariances(features), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, ours.mT)
        assert (ours - exact).norm() <= 1e-6 * exact.norm()
    torch.testing.assert_close(torch.cat([c.diagonal() for c in m.cov]), m.var, rtol=1e-5, atol=1e-7)
    assert (m.count.tolist(), m.correction) == ([60, 60], 1)


def test_an_extractor_of_moments_is_asked_for_its_features():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4), torch.nn.ReLU())
    extractor, images = mo.MomentExtractor(net), torch.randn(50, 6)
    m = mo.dataset_moments(extractor, images.split(16), cov=True)
    assert m.names == extractor.names
    for ours, exact in zip(m.cov, exact_covariances(extractor.features(images)), strict=True):
        assert (ours - exact).norm() <= 1e-5 * exact.norm()
    assert mo.dataset_moments(extractor, images.split(16)).cov is None


def test_moments_without_covariances_and_without_features_are_an_error():
    with pytest.raises(TypeError, match="extractor: got Moments without covariances, expected features with cov=True"):
        mo.dataset_moments(mo.moments, [torch.randn(5, 3)], cov=True)


def test_covariances_given_as_moments_are_merged():
    x = torch.randn(40, 3, dtype=torch.float64)

    def with_covariance(rows):
        m = mo.moments(rows)
        return mo.Moments(m.mean, m.var, torch.cov(rows.mT), m.count)

    m = mo.dataset_moments(with_covariance, x.split(16), cov=True)
    torch.testing.assert_close(m.cov[0], torch.cov(x.mT))
    assert mo.dataset_moments(with_covariance, x.split(16)).cov is None
