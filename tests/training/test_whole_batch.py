"""Several processes train as one with the whole batch."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from workers import Workers

import moment_ops as mo
from moment_ops.training import data, extractors, gfmn, molm, processes
from moment_ops.training.batch_norm import merge_batch_norm

STEPS = 20
SHARED = {"steps": STEPS, "seconds": math.inf, "latent_size": 8}
MOLM = {"width": 4, "first_moment_steps": 3, "moment_steps": 2, "generator_steps": 8, "real_images": 11}


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    workers = Workers(3, tmp_path_factory.mktemp("groups"))
    yield workers
    workers.stop()


@pytest.fixture(scope="module")
def extractor_file(pictures, extractor_path):
    extractors.load_or_train_classifier(data.load(str(pictures)), extractor_path, iterations=2, say=lambda line: None)
    return extractor_path


def state_after(trainer, steps=STEPS):
    """Weights, running statistics and the losses of a training."""
    trainer.distribute()
    losses = torch.stack([trainer.advance() for _ in range(steps)])
    averages = {name: value for name, value in trainer.matching.state_dict().items() if "average" in name}
    state = {**trainer.generator.state_dict(), **averages, "losses": losses}
    return {name: value.double().numpy() for name, value in state.items()}


def gfmn_state(folder, extractor_file, given):
    images, settings = data.load(folder), gfmn.Settings(**SHARED, **given)
    extractor = mo.MomentExtractor(extractors.load_or_train_classifier(images, extractor_file))
    target = gfmn.target_moments(images, extractor)
    covariances = gfmn.target_covariances(images.train, extractor, settings)
    return state_after(gfmn.new_trainer(images, extractor, target, settings, covariances))


def molm_state(folder, given):
    trainer = molm.new_trainer(data.load(folder), molm.Settings(**SHARED, **MOLM, **given))
    state = state_after(trainer)
    network = {name: value.numpy() for name, value in trainer.matching.net.f.state_dict().items()}
    return {**state, **network, **{name: value.numpy() for name, value in trainer.matching.parts.items()}}


def assert_equal_to_one(workers, size, function, *arguments):
    (expected,) = workers(1, function, *arguments)
    for state in workers(size, function, *arguments):
        assert_equal(state, expected)


def assert_equal(state, expected):
    for name, value in expected.items():
        scale = max(abs(value).max(), 1e-30)
        assert abs(state[name] - value).max() <= 1e-9 * scale, name


@pytest.mark.parametrize(
    ("size", "given"),
    [
        (3, {"average": "adam", "batch_size": 32}),
        (3, {"average": "moving", "batch_size": 8}),
        (3, {"average": "none", "batch_size": 8}),
        (2, {"average": "adam", "batch_size": 6, "covariance": "2"}),
        (3, {"average": "adam", "batch_size": 8, "covariance": "2", "micro_batches": 2}),
    ],
)
def test_gfmn_on_several_processes_is_gfmn_on_one(workers, pictures, extractor_file, size, given):
    assert_equal_to_one(workers, size, gfmn_state, str(pictures), extractor_file, given)


@pytest.mark.parametrize(
    ("size", "given"),
    [
        (2, {"average": "adam", "batch_size": 6, "penalty": "both"}),
        (3, {"average": "none", "batch_size": 8, "penalty": "alternating"}),
    ],
)
def test_molm_on_several_processes_is_molm_on_one_with_the_phases_of_its_network(workers, pictures, size, given):
    assert_equal_to_one(workers, size, molm_state, str(pictures), given)


@pytest.mark.parametrize("micro_batches", [2, 3, 8])
def test_a_step_in_micro_batches_is_that_of_the_whole_batch(workers, pictures, extractor_file, micro_batches):
    given = {"average": "adam", "batch_size": 8, "covariance": "2"}
    (expected,) = workers(1, gfmn_state, str(pictures), extractor_file, given)
    (state,) = workers(1, gfmn_state, str(pictures), extractor_file, {**given, "micro_batches": micro_batches})
    assert_equal(state, expected)


def test_a_batch_smaller_than_the_number_of_processes(workers, pictures, extractor_file):
    assert_equal_to_one(workers, 3, gfmn_state, str(pictures), extractor_file, {"batch_size": 2})


def normalized(rows, dtype):
    """Output, gradients and running statistics of a BatchNorm, with these rows on every process."""
    torch.manual_seed(0)
    x = torch.randn(sum(rows), 3, 4, 4) * 2 + 100
    weight = torch.randn(x.shape)
    net = nn.Sequential(nn.BatchNorm2d(3)).to(dtype)
    net[0].weight.data, net[0].bias.data = torch.rand(3).to(dtype), torch.rand(3).to(dtype)
    rank = dist.get_rank() if dist.is_initialized() else None
    own = slice(None) if rank is None else slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    merge_batch_norm(net) if rank is not None else None
    x = x[own].to(dtype).requires_grad_()
    for _ in range(2):
        x.grad = None
        net.zero_grad()
        y = net(x)
        (y * weight[own].to(dtype)).sum().backward()
    gradients = torch.cat([net[0].weight.grad, net[0].bias.grad])
    if rank is not None:
        dist.all_reduce(gradients)
    running = torch.cat([net[0].running_mean, net[0].running_var])
    own_results = [value.detach().double().numpy() for value in (y, x.grad)]
    return *own_results, gradients.double().numpy(), running.double().numpy(), int(net[0].num_batches_tracked)


@pytest.mark.parametrize("rows", [(3, 2, 4), (5, 0, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_batch_norm_over_processes_is_that_of_the_whole_batch(workers, rows, dtype, tolerance):
    ((output, grad, gradients, running, _),) = workers(1, normalized, rows, torch.float64)
    results = workers(3, normalized, rows, dtype)
    for rank, (own_output, own_grad, own_gradients, own_running, steps) in enumerate(results):
        own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        for ours, expected in (
            (own_output, output[own]),
            (own_grad, grad[own]),
            (own_gradients, gradients),
            (own_running, running),
        ):
            assert ours.shape == expected.shape
            assert (abs(ours - expected) <= tolerance * max(1, abs(expected).max(initial=0))).all()
        assert steps == 2


def rows_of_all():
    return [processes.own_rows(rows) for rows in (32, 2, 3)]


def test_rows_are_divided_without_gap_or_overlap(workers):
    for rows, parts in zip((32, 2, 3), zip(*workers(3, rows_of_all), strict=True), strict=True):
        assert [i for part in parts for i in range(rows)[part]] == list(range(rows))
        sizes = [part.stop - part.start for part in parts]
        assert max(sizes) - min(sizes) <= 1


def agreement():
    rank = dist.get_rank()
    return processes.agree(10.0 + rank, 15 if rank == 2 else None)


def test_all_processes_follow_the_clock_of_the_first_and_the_signal_of_any(workers):
    assert workers(3, agreement) == [(10.0, 15)] * 3


def error_of_the_first():
    def make():
        raise ValueError("no data")

    try:
        processes.from_first(make)
    except Exception as error:
        return type(error).__name__
    return None


def test_an_error_of_the_first_process_ends_the_others(workers):
    assert workers(3, error_of_the_first) == ["ValueError", "OnAnotherProcess", "OnAnotherProcess"]
