"""Run a function in a process of its own, so that one measurement's memory is not another's."""

import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def isolated(
    function: Callable[Parameters, Result], *arguments: Parameters.args, **keywords: Parameters.kwargs
) -> Result:
    """The function's result, computed in a fork where there is one: it has everything imported already.

    The process that calls this must not have computed with PyTorch: OpenMP's threads and CUDA do not survive a fork.
    """
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as executor:
        with warnings.catch_warnings():
            # Python 3.12 warns of every fork beside threads; those of BLAS libraries take care of themselves.
            warnings.simplefilter("ignore", DeprecationWarning)
            future = executor.submit(function, *arguments, **keywords)
        return future.result()
