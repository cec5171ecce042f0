"""Scripts in processes of their own, to which signals are sent. As a program it is the Forker's process.

Importing torch and transformers takes longer than a few steps of the toy model. The Forker's process imports them once
and forks a copy of itself for each run: the copy is what `python SCRIPT ARGUMENTS` is after its imports.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "ACCELERATE_USE_CPU": "true"}


class Forker:
    """Starts scripts, each as the leader of a new process group."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, env=QUIET, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, task):
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, output, script, *arguments, **environment):
        """Start `python SCRIPT ARGUMENTS`, whose stdout and stderr go to the file `output`. Returns its process id."""
        return self.ask([str(output), script, list(map(str, arguments)), environment])

    def wait(self, pid, seconds=240):
        """The exit status of a run, which is killed if it has not ended after `seconds`."""
        end = time.time() + seconds
        while is_alive(pid) and time.time() < end:
            time.sleep(0.05)
        if is_alive(pid):
            os.killpg(pid, signal.SIGKILL)
        return self.ask(pid)

    def close(self):
        self.process.kill()
        self.process.wait()


def as_arguments(settings):
    """{"steps": 2} as ["--steps", "2"]."""
    arguments = []
    for name, value in settings.items():
        arguments += [f"--{name}", str(value)]
    return arguments


def free_port():
    """A port on which no program listens, as text: two suites may run on one machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def is_alive(pid):
    """Whether there is such a process; one that has ended, and whose parent has not asked for its status, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children(pid):
    """All processes below `pid`."""
    found = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    except OSError:
        return []
    below = []
    for child in found:
        below += children(child)
    return found + below


def main():
    sys.path.insert(0, str(ROOT))
    import evaluate  # noqa: F401
    import sft  # noqa: F401
    import tgrpo  # noqa: F401

    # a suite that runs in the background or under nohup ignores these, and so would its runs
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for line in sys.stdin:
        task = json.loads(line)
        if isinstance(task, int):
            _, status = os.waitpid(task, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child:
            print(child, flush=True)
            continue
        output, script, arguments, environment = task
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment)
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        return


if __name__ == "__main__":
    main()
