"""A study's runs on Ray, here: the same files as without it, also where a worker is killed."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from experiments.core.configs import CONFIGS
from experiments.core.run_folder import read_metrics

pytestmark = pytest.mark.runs

ROOT = Path(__file__).parent.parent
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is the extra `cluster`")


def start(*arguments):
    python = [sys.executable, "-W", "ignore", "-m", "experiments", "study", *map(str, arguments)]
    return subprocess.Popen(python, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_worker(folder, process):
    """Kill the process that makes the run, once it has left a checkpoint."""
    while not list(folder.rglob("last.ckpt")) and process.poll() is None:
        time.sleep(0.01)
    workers = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name, environment = path.read_text(), path.with_name("environ").read_text(errors="replace")
        except OSError:
            continue
        if name.startswith("ray::_run") and f"STUDY_TEST={folder}" in environment:
            workers.append(int(path.parent.name))
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    return len(workers)


@needs_ray
def test_a_worker_that_is_killed_is_replaced_and_its_run_goes_on(text, tmp_path, monkeypatch):
    study = {
        "base": str(CONFIGS / "characters/quickstart.yaml"),
        "settings": {
            "model.network.recurrent": {"hidden_size": 4, "engine": "loop"},
            "data": {"path": str(text), "batch_size": 4, "length": 20},
            "trainer": {"max_time": None, "max_epochs": -1, "max_steps": 150, "val_check_interval": 20},
            "trainer.accelerator": "cpu",
            "trainer.enable_model_summary": False,
            "trainer.log_every_n_steps": 10,
        },
        "arms": {"MI": None},
        "seeds": [0],
    }
    path, places = tmp_path / "study.yaml", [tmp_path / "cluster", tmp_path / "here"]
    path.write_text(yaml.safe_dump(study))
    monkeypatch.setenv("STUDY_TEST", str(places[0]))  # by which its workers are known
    process = start(path, "--cluster", "--output", places[0])
    assert kill_worker(places[0], process) == 1
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    [log] = places[0].rglob("seed_0.log")
    assert log.read_text().count("step 1 ") == 1, "it went on from its checkpoint"
    process = start(path, "--output", places[1])
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    runs = [next(place.rglob("metrics.csv")) for place in places]
    assert read_metrics(runs[0]) == read_metrics(runs[1])
    files = [{file.relative_to(place) for file in place.rglob("*")} for place in places]
    assert files[0] == files[1]
