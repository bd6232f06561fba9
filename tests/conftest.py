from collections.abc import Iterator

import pytest
import torch
from ranks import Ranks

import moment_ops as mo

# Every test of an operator runs on all of them.
BACKENDS = ("cpu", "reference")
# Files with tests of half a minute: first, so that no process waits for another at the end.
LONG = {"test_interpreter.py", "test_older_triton.py", "test_launched.py", "test_torchrun.py", "test_mutations.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialized memory holds NaN, so that what an operator forgets to write shows."""
    previous = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(previous[0])
    torch.utils.deterministic.fill_uninitialized_memory = previous[1]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, poisoned_memory: None) -> Iterator[str]:
    """Forces each backend in turn, on poisoned memory."""
    with mo.backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two processes that run the functions they are sent."""
    ranks = Ranks()
    yield ranks
    ranks.stop()
