"""Dependencies point one way, and no module reaches both pyspark and torch."""

import ast
from functools import cache
from pathlib import Path

import pytest

from recsys_dist.config import PACKAGE, REPOSITORY

MODULES = {
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): file
    for folder in (PACKAGE, REPOSITORY / "jobs")
    for file in folder.rglob("*.py")
}
LAYERS = (
    {"errors", "config", "java"},
    {"schema", "workspace"},
    {"job", "cluster", "datasets", "spark"},
    {"features", "als", "recall", "deepfm", "scoring", "evaluation", "nightly", "comparison"},
)


@cache
def imports(module: str) -> frozenset[str]:
    """All modules that a file imports anywhere in it, type-checking blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


@cache
def reaches(module: str) -> frozenset[str]:
    """Top-level third-party packages that a module imports, directly or through the project."""
    own = {name for name in imports(module) if name in MODULES and name != module}
    packages = {name.split(".")[0] for name in imports(module)}
    return frozenset(packages.union(*(reaches(name) for name in own)) if own else packages)


def layer(module: str) -> int:
    parts = module.split(".")
    if parts[0] == "jobs":
        return len(LAYERS)
    return next((i for i, names in enumerate(LAYERS) if parts[1:] and parts[1] in names), 0)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_no_module_reaches_both_pyspark_and_torch(module):
    assert not {"pyspark", "torch"} <= reaches(module)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_dependencies_point_one_way(module):
    above = [name for name in imports(module) if name in MODULES and layer(name) > layer(module)]
    assert above == []


def test_the_walk_sees_what_it_should():
    assert "torch" in reaches("recsys_dist.scoring.scorers")
    assert "torch" in reaches("jobs.score")
    assert "pyspark" in reaches("jobs.featurize")


def test_entry_points_stay_thin():
    long = {
        job.name: n
        for job in (REPOSITORY / "jobs").glob("*.py")
        if (n := len(job.read_text().splitlines())) > 60
    }
    assert long == {}


def test_jobs_open_with_the_command_that_starts_them():
    for job in Path(REPOSITORY / "jobs").glob("*.py"):
        assert f"jobs/{job.name}" in (ast.get_docstring(ast.parse(job.read_text())) or ""), job.name
