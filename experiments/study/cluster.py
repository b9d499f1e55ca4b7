"""Making runs on Ray: on this machine, or on a cluster whose machines share the checkout, the data and the folder."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from experiments.core.errors import ExperimentError
from experiments.study.definition import Cluster
from experiments.study.jobs import Job, Running
from experiments.study.pool import run_here

try:
    import ray
except ImportError as error:
    raise ExperimentError('study: --cluster needs ray: pip install -c constraints.txt -e ".[cluster]"') from error


def connect(
    address: str,  # of a cluster, or "local"
    each: Cluster,
) -> tuple[Callable[[Job], Running], int]:
    """Join the cluster, or start one of this machine; return how a job is started there, and how many at once at most.

    Raises: ExperimentError where there is no cluster at the address, or where this machine has less than a run takes.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    os.environ.setdefault("RAY_worker_niceness", "0")  # else its workers give way to all other processes
    is_local = address == "local"
    on_termination = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, include_dashboard=False if is_local else None, log_to_driver=False, logging_level="WARNING")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ExperimentError(f"study: --cluster {address}: {str(error).partition(chr(10))[0]}") from error
    signal.signal(signal.SIGTERM, on_termination)  # Ray's own would end this process without a word to the runs
    has = ray.cluster_resources()
    needed = {"CPU": each.cpus} | ({"GPU": each.gpus} if each.gpus else {})
    at_once = min(int(has.get(name, 0) // amount) for name, amount in needed.items())
    if is_local and at_once < 1:
        raise ExperimentError(
            f"study: cluster: a run takes {each.cpus} CPUs and {each.gpus} GPUs, and this machine has "
            f"{has.get('CPU', 0):g} and {has.get('GPU', 0):g}."
        )
    # One call for each worker: a run has a process of its own, and what it holds is free afterwards.
    task = ray.remote(num_cpus=each.cpus, num_gpus=each.gpus, max_retries=each.retries, max_calls=1)(_run)
    # A cluster is given all runs at once: it may grow with what waits.
    return lambda job: _Task(job, task), at_once if is_local else sys.maxsize


def _run(job: Job, folder: str) -> int:
    """Make the run in this process, as `python -m experiments` would; return the exit code.

    In this process, and in none of its own: a run must not go on where its worker died and another repeats it.
    """
    if job.run.result is not None:  # its worker died too late to matter
        return 0
    os.chdir(folder)
    return run_here(job.argv(), job.run.log)


class _Task:
    """A job on the cluster."""

    def __init__(self, job: Job, task: "ray.remote_function.RemoteFunction") -> None:
        # Absolute: its worker has another working directory.
        job = job._replace(run=job.run._replace(root=job.run.root.absolute()))
        self._log = job.run.log
        self._reference = task.remote(job, str(Path.cwd()))

    def poll(self) -> int | None:
        ready, _ = ray.wait([self._reference], timeout=0)
        if not ready:
            return None
        try:
            return int(ray.get(self._reference))
        except ray.exceptions.TaskCancelledError:
            return 128 + signal.SIGINT
        except ray.exceptions.RayError as error:
            with self._log.open("a", encoding="utf-8") as log:
                log.write(f"\n{error}\n")
            return 1

    def stop(self, number: int) -> None:
        ray.cancel(self._reference, force=number == signal.SIGKILL)
