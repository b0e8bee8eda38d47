"""Starts the commands of the tests as forks of one process that has imported everything.

A command is still a process of its own, with its own folder, environment, arguments, streams and
exit status; what it does not repeat is the import of torch, Hydra and scikit-learn, which takes
longer than most commands of the tests. As a script, this is that process: it reads one request in
a line of JSON, forks, and answers with the fork's number and then with its exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


class Starter:
    """The tests' side.

    Attributes:
        cpu_seconds: that the last command took (and the processes that it waited for).
    """

    cpu_seconds = 0.0

    def __init__(self, cwd: Path, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.starter"],
            cwd=cwd,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(
        self, words: list[str], cwd: Path, env: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """As subprocess.run([python, *words], capture_output=True, text=True)."""
        with tempfile.TemporaryDirectory() as folder:
            streams = [Path(folder, name) for name in ("stdout", "stderr")]
            request = {"words": words, "cwd": str(cwd), "env": env, "streams": streams}
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
            self.process.stdin.flush()
            (pid,) = self._answer(timeout)
            try:
                status, self.cpu_seconds = self._answer(timeout)
            except subprocess.TimeoutExpired:
                os.kill(int(pid), signal.SIGKILL)
                self._answer(timeout)
                raise
            said = [stream.read_text() for stream in streams]
        return subprocess.CompletedProcess(words, int(status), *said)

    def _answer(self, timeout: float) -> list[float]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a command of the tests", timeout)
        return [float(word) for word in self.process.stdout.readline().split()]


def next_request() -> dict[str, Any]:
    """Returns in a fork, with what it shall do; the process that forks ends with its input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            return dict(json.loads(line))
        print(pid, file=answers)
        _, status, used = os.wait4(pid, 0)
        print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, file=answers)
    sys.exit()


def become(request: dict[str, Any]) -> None:
    """Run a script as Python does; what it raises ends the process as ever."""
    for number, name in ((0, os.devnull), *enumerate(request["streams"], start=1)):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["words"]
    script = Path(sys.argv[0])
    sys.path[:0] = [str(script.parent.absolute()), *os.environ["PYTHONPATH"].split(os.pathsep)]
    runpy.run_path(str(script), run_name="__main__")


IMPORTED = (
    "train",
    "cutmix_exp.data.streaming",
    "cutmix_exp.experiment",
    "sklearn.datasets",
    "sklearn.model_selection",
    "torch.utils.tensorboard",
)

if __name__ == "__main__":
    for module in IMPORTED:
        importlib.import_module(module)
    become(next_request())
