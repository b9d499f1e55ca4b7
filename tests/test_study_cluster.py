"""A study's cells on Ray, here: the same files as without it, also where a worker is killed."""

import os
import signal
import threading
import time

import pytest
import yaml

from experiments.__main__ import main
from experiments.core.configs import CONFIGS
from experiments.core.metrics_file import read_metrics

ray = pytest.importorskip("ray", reason="Ray is an extra of its own: pip install -e '.[cluster]'")


def kill_worker(folder):
    """Kill the process that runs the cell, once it has left a checkpoint."""
    deadline = time.monotonic() + 120
    while not list(folder.rglob("last.ckpt")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in os.listdir("/proc"):
        if process.isdecimal():
            try:
                with open(f"/proc/{process}/cmdline") as file:
                    command = file.read()
            except OSError:
                continue
            if command.startswith("ray::_run"):
                os.kill(int(process), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_worker_that_is_killed_is_replaced_and_its_run_goes_on(text, tmp_path):
    study = {
        "base": str(CONFIGS / "characters/quickstart.yaml"),
        "settings": {
            "model.network.recurrent": {"hidden_size": 4, "engine": "loop"},
            "data": {"path": str(text), "batch_size": 4, "length": 20},
            "trainer": {"max_time": None, "max_epochs": -1, "max_steps": 300, "val_check_interval": 20},
            "trainer.accelerator": "cpu",
            "trainer.enable_model_summary": False,
            "trainer.log_every_n_steps": 10,
        },
        "arms": {"MI": None},
        "seeds": [0],
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    killer = threading.Thread(target=kill_worker, args=(tmp_path / "cluster",))
    killer.start()
    try:
        assert main(["study", str(path), "--cluster", "--output", str(tmp_path / "cluster")]) == 0
    finally:
        killer.join()
        ray.shutdown()
    [log] = (tmp_path / "cluster").rglob("seed_0.log")
    assert log.read_text().count("step 1 ") == 1, "it went on from its checkpoint"
    assert main(["study", str(path), "--output", str(tmp_path / "here")]) == 0
    places = [tmp_path / "cluster", tmp_path / "here"]
    runs = [next(place.rglob("metrics.csv")) for place in places]
    assert read_metrics(runs[0]) == read_metrics(runs[1])
    files = [{file.relative_to(place) for file in place.rglob("*")} for place in places]
    assert files[0] == files[1]
