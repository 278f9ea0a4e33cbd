"""The cases of the benchmark, and that every adapter does the job of its case."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import peers, processes
from benchmarks.cases import MODULES, PRECISIONS, all_cases, case_of
from fastcontrast import cli

ROWS = 24
LOSSES = [
    (kind, metric, name)
    for name, peer in peers.PROVIDERS.items()
    for kind, metrics in peer.jobs.items()
    for metric in metrics
    if not peer.needs_cuda and not peer.compiles  # compiling takes seconds for each
]


@pytest.mark.parametrize(("kind", "metric", "provider"), LOSSES)
def test_adapters_compute_the_same_loss(kind, metric, provider):
    facts = {
        "job": "losses", "kind": kind, "metric": metric, "rows": ROWS, "dim": 16,
        "dtype": "float32", "precision": "auto", "device": "cpu",
    }  # fmt: skip
    case = case_of(facts)
    if case.version(provider) is None:
        pytest.skip(f"{provider} is not installed")
    assert max(case.errors(provider).values()) < case.allowed(provider)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("metric", peers.ALL)
def test_our_precisions_are_the_same_job(metric, precision):
    facts = {
        "job": "losses", "kind": "one direction", "metric": metric, "rows": 512, "dim": 128,
        "dtype": "float32", "precision": precision, "device": "cpu",
    }  # fmt: skip
    case = case_of(facts)
    assert max(case.errors(peers.OURS).values()) < case.allowed(peers.OURS)
    assert case.allowed("torch eager") == 1e-3


# In a process of its own: peers load libraries that a process of the suite may hold otherwise.
SAME_JOB = """
import sys
from benchmarks.cases import all_cases, case_of

for facts in all_cases(sys.argv[1], quick=True, device="cpu", sizes=[4]):
    case = case_of(facts)
    for provider in case.providers():
        if case.version(provider) is not None and not case.compiles(provider):
            errors = case.errors(provider)
            assert max(errors.values()) < case.allowed(provider), (case.name, provider, errors)
"""


@pytest.mark.parametrize("job", ["patches", "triplet", "train"])
def test_adapters_compute_the_same_job(job):
    done = subprocess.run(
        [sys.executable, "-c", SAME_JOB, job],
        capture_output=True, text=True, cwd=processes.ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_losses_are_run_under_the_headline_metric():
    found = [f for f in all_cases("losses", False, "cpu") if f["metric"] == "l2"]
    kinds = set(peers.KINDS) - set(peers.FORWARD)
    assert {f["kind"] for f in found} == kinds
    assert {f["dtype"] for f in found} == {"float32", "bfloat16", "float16"}
    for rows in (1024, 4096):  # dimensions at more than one size
        assert {f["dim"] for f in found if f["rows"] == rows} >= {64, 128, 1024}
    forward = {f["kind"] for f in all_cases("patches", False, "cpu")}
    assert {"of maps", "backward"} <= forward


def test_every_recipe_has_its_step():
    kinds = {facts["kind"] for facts in all_cases("train", True, "cpu")}
    assert kinds == set(cli.RECIPES)


@pytest.mark.parametrize("job", MODULES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_are_what_their_facts_say(job, device):
    for quick in (True, False):
        found = all_cases(job, quick, device)
        assert len({json.dumps(facts) for facts in found}) == len(found)
        for facts in found:
            case = case_of(json.loads(json.dumps(facts)))
            assert case.providers()[0] == peers.OURS
            if job != "train":  # whose operations are counted by running it
                assert max(case.work()[:2]) > 0
    assert len({case_of(facts).name for facts in found}) == len(found)
