"""Two trainers do not write into one folder."""

import os
import socket
import subprocess
import sys
import textwrap

import pytest

from moment_ops.training.errors import TrainingError
from moment_ops.training.locks import locked

HOLD = textwrap.dedent("""
    import sys
    from pathlib import Path
    from moment_ops.training.locks import locked
    with locked(Path(sys.argv[1])):
        print("locked", flush=True)
        sys.stdin.read()
""")


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the folder ``run``."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_trainer_is_told_the_process_and_the_host_of_the_first(holder, train, tmp_path):
    expected = f"in use by another trainer, process {holder.pid} on {socket.gethostname()}; choose another --run-dir"
    with pytest.raises(TrainingError, match=expected):
        train("run")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_name_for_it_is_locked_too(holder, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(TrainingError, match="in use"), locked(tmp_path / "link"):
        pass


def test_a_killed_trainer_leaves_no_lock(holder, tmp_path):
    holder.kill()
    holder.wait()
    with locked(tmp_path / "run"):
        pass


def test_a_lock_is_free_after_the_training_and_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "run"):
        raise ZeroDivisionError
    with locked(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / ".run.lock").read_text()
