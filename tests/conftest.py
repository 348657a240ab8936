"""What all tests share: one thread, a cache of their own, a seed, and float64 for those that ask for it."""

import os

import pytest
import torch

#: Each of two workers begins with one half of the list. When it is done, it takes tests from the end of the other half.
#: Tests at the front of a half therefore run in one worker, which makes their common fixtures once. Long tests stand at
#: the front as well: a long test at the end would keep one worker busy while the other has nothing left to do.
FIRST = ("test_tensorboard_browser.py", "test_sweep_killed.py")
SECOND = ("test_processes.py", "test_rank_failures.py", "test_rank_launchers.py")


@pytest.hookimpl(trylast=True)  # what is not run is out of the list by then
def pytest_collection_modifyitems(items):
    first, second = ([item for item in items if item.path.name in names] for names in (FIRST, SECOND))
    others = [item for item in items if item.path.name not in (*FIRST, *SECOND)]
    half = max(len(items) // 2 - len(first), 0)
    items[:] = [*first, *others[:half], *second, *others[half:]]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """Nothing is read from or left in the user's cache, nor signed by the user's key; what one test or worker computes,
    the others find."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFRAMEWORK_CACHE", str(folder))
        patch.setenv("MLFRAMEWORK_KEY", str(folder.with_name("key")))
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """Everything that is made within the test is made in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
