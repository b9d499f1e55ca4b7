"""The project's own promises: what imports what, what is public, what the README says."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import multint
from experiments.__main__ import main

ROOT = Path(__file__).parent.parent
MODULES = sorted([*ROOT.glob("multint/**/*.py"), *ROOT.glob("models/**/*.py"), *ROOT.glob("experiments/**/*.py")])

# What a folder may import of the project. Within multint: integrators ← cells ← recurrent → engines, and ← conditional.
ALLOWED = {
    "multint/integrators": {"multint.errors", "multint.integrators"},
    "multint/conditional": {"multint.errors", "multint.integrators", "multint.conditional"},
    "multint/cells": {"multint.errors", "multint.integrators", "multint.cells"},
    "multint/engines": {"multint.errors", "multint.engines"},
    "multint/recurrent": {
        "multint.errors",
        "multint.integrators",
        "multint.cells",
        "multint.engines",
        "multint.recurrent",
    },
    "multint": {"multint"},
    "models": {"multint", "models"},
    # The core knows no task, no kind of data and no model.
    "experiments/core": {"multint", "experiments.core"},
    "experiments/study": {"experiments.core", "experiments.study"},  # nor does a study
    "experiments/data": {"multint", "experiments.core", "experiments.data"},
    "experiments/environments": {"experiments.core", "experiments.environments"},
    "experiments": {"multint", "models", "experiments"},
}
LIBRARIES = {"torch", "einops", "opt_einsum"}


def imports(path):
    """The dotted modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if (ROOT / inner.replace(".", "/")).with_suffix(".py").exists() else node.module


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    folder = path.relative_to(ROOT).parent.as_posix()
    allowed = next(ALLOWED[name] for name in ALLOWED if folder == name or folder.startswith(f"{name}/"))
    for module in imports(path):
        top = module.partition(".")[0]
        if top in {"multint", "models", "experiments"}:
            assert any(module == name or module.startswith(f"{name}.") for name in allowed), module
        elif folder.startswith("multint"):
            assert top in LIBRARIES or top in sys.stdlib_module_names, module


FOLDERS = [
    f"multint/{name}" for name in ("integrators", "conditional", "cells", "engines", "engines/native", "recurrent")
]
FOLDERS += [
    "experiments/core",
    "experiments/data",
    "experiments/environments",
    "experiments/tasks",
    "experiments/study",
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_within_a_folder_run_in_no_circle(folder):
    """Wherever in a file they stand: in a function and for the type checker alone too."""
    inside = [path for path in MODULES if ROOT / folder in path.parents]
    # Folders of data import each other.
    paths = inside if folder == "experiments/data" else [path for path in inside if path.parent == ROOT / folder]
    dotted = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
    graph = {name: dotted.keys() & set(imports(path)) for name, path in dotted.items()}
    assert any(graph.values())
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


LIGHT = ["core.inspection", "core.export", "sample"]


@pytest.mark.runs
@pytest.mark.parametrize(
    ("names", "heavy"),
    [
        (["core.curves"], {"torch", "matplotlib"}),
        (["tasks", "data", *LIGHT], {"lightning", "torchmetrics", "matplotlib", "scipy", "torch._dynamo"}),
    ],
)
def test_commands_that_train_nothing_import_nothing_heavy(names, heavy):
    """It takes seconds: in an interpreter of its own, with all that the commands import."""
    modules = ", ".join(f"experiments.{name}" for name in names)
    code = f"import sys, {modules}; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert not set(out.split()) & heavy


def test_a_summary_imports_no_compiler():
    config = ROOT / "experiments/configs/characters/quickstart.yaml"
    code = f"import sys, experiments.__main__ as of; of.main(['summary', '--config', '{config}']); print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert "multiply-adds" in out
    assert not set(out.split()) & {"lightning", "scipy", "sympy", "torch._dynamo"}


def test_the_version_is_that_of_the_package():
    assert multint.__version__ == version("multint")


def test_the_public_names_are_few_exist_and_say_what_they_are():
    assert len(multint.__all__) <= 33
    assert len(set(multint.__all__)) == len(multint.__all__)
    for name in multint.__all__:
        assert getattr(multint, name).__doc__, name


def test_every_class_and_function_without_an_underscore_has_a_docstring():
    bare = []
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                bare += [f"{path.relative_to(ROOT)}: {node.name}"] * (ast.get_docstring(node) is None)
    assert bare == []


@pytest.mark.runs
def test_importing_multint_brings_nothing_heavy():
    """In an interpreter of its own, without the libraries that only the experiments need."""
    code = "import sys, torch; before = set(sys.modules); import multint; print(*(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    brought = set(out.split())
    assert "multint" in brought
    assert not brought & {"torch._dynamo", "torch._inductor", "torch.fx.experimental.proxy_tensor", "sympy"}
    brought = {name.partition(".")[0] for name in brought}
    assert not brought & {"lightning", "torchmetrics", "jsonargparse", "pooch", "rich", "matplotlib", "triton"}


def blocks(path, language="python"):
    text = (ROOT / path).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.compiles
@pytest.mark.parametrize("path", ["README.md", "multint/engines/README.md"])
def test_the_readmes_code_runs(path):
    """One block after the other, as a reader would."""
    namespace = {"__name__": "readme"}
    found = blocks(path)
    assert found
    for code in found:
        exec(compile(code, path, "exec"), namespace)


def test_the_lstm_by_hand_is_the_librarys():
    code = next(code for code in blocks("README.md") if "class ByHand" in code)
    exec(compile(code, "README.md", "exec"), namespace := {"__name__": "readme"})
    by_hand, layer = namespace["ByHand"](3, 4), multint.LSTM(3, 4)
    cell = layer.directions[0].cell.gates
    with torch.no_grad():
        by_hand.W.weight.copy_(cell.x_projection.weight)
        by_hand.U.weight.copy_(cell.z_projection.weight)
        for name in ("alpha", "beta1", "beta2", "bias"):
            getattr(by_hand, name).copy_(getattr(cell, name))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(by_hand(x)[0], layer(x)[0])


@pytest.mark.runs
@pytest.mark.filterwarnings("ignore:The .* does not have many workers")
def test_the_example_of_ones_own_task_runs(tmp_path, monkeypatch, capsys):
    (code,), (config,) = blocks("CONTRIBUTING.md"), blocks("CONTRIBUTING.md", "yaml")
    (tmp_path / "products.py").write_text(code, encoding="utf-8")
    (tmp_path / "products.yaml").write_text(config, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", "products.yaml", "--trust", "products", "--trainer.accelerator=cpu"]
    assert main([*arguments, "--trainer.max_epochs=2"]) == 0
    assert "test loss" in capsys.readouterr().out


def test_the_readmes_custom_cell_is_short():
    (cell,) = [code for code in blocks("README.md") if "(Cell)" in code]
    definition = ast.parse(cell).body
    lines = sum(node.end_lineno - node.lineno + 1 for node in definition if isinstance(node, ast.ClassDef))
    assert 0 < lines <= 15
