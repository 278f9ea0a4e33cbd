"""The benchmark: ``fastcontrast bench``, or ``python -m benchmarks.suite`` in a clone.

Each case is measured in processes of its own: one for every provider, which gives peak memory and
errors, then one in which all are timed in turn. The record is written after every case, and a run
with the same --out goes on where another was ended; the report is drawn from the record at the end.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import comparison, measure, record
from benchmarks.cases import UNTIMED, Case, all_cases, case_of
from benchmarks.limits import best_of, limit_of
from benchmarks.peers import OURS, PROVIDERS
from benchmarks.processes import CUT_SHORT, FREE_SHARE, Measurer

JOBS = ("losses", "patches", "triplet", "train", "memory")
# A call that takes longer in the process that measures its memory is not repeated.
ONCE = {"quick": 4.0, "full": 5.0}
# A peer whose call would take longer, by what it took with fewer rows or dimensions, is not run.
PREDICTED_LIMIT = {"quick": 4.0, "full": 48.0}
CALL_LIMIT = {"quick": 60.0, "full": 400.0}  # seconds until a measurement is ended
CASE_LIMIT = 900.0
LAST_CASE = 20.0  # seconds after --seconds at which the last case is ended
EPILOG = """\
jobs:
  losses   pairwise losses, forward and backward, over rows, dimensions, metrics, dtypes, kinds
  patches  random patches cut and resized, of maps, and gradients of images
  triplet  triplet losses, forward and backward
  train    one step of each recipe
  memory   peak memory over rows, until matrices no longer fit
  all      all of these

peers, timed where they are installed (pip install -e ".[bench]"; docs/performance.md):
{peers}

A run that was ended goes on with the same flags.

exit codes:
  0  done
  1  --compare found a row of fastcontrast that is slower, takes more memory or has a larger error
     beyond noise, is now skipped or failed, or is no longer measured
  2  wrong use, or nothing could be measured or written
"""
OUT = Path("build/bench")
FILE = "bench.json"


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(
        prog="fastcontrast bench",
        description="Time, memory and error of the project and of every peer that is installed.",
        epilog=EPILOG.format(peers=_wrapped(_names()[1:])),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("job", nargs="?", default="all", choices=[*JOBS, "all"], help="see below")
    flags.add_argument(
        "--peers", nargs="+", metavar="NAME", help="these alone, by any part of their names"
    )
    flags.add_argument("--quick", action="store_true", help="few cases, under five minutes")
    flags.add_argument("--out", type=Path, default=OUT, help=f"folder (default: {OUT})")
    flags.add_argument(
        "--compare", type=Path, metavar="OLD.json", help="what changed since, with the same flags"
    )
    flags.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    flags.add_argument("--threads", type=int, default=2, help="of torch on CPU (default: 2)")
    flags.add_argument("--seconds", type=float, help="begin no further case after so many")
    flags.add_argument(
        "--sizes", type=int, nargs="+", metavar="M", help="rows, images or batches, to try it out"
    )
    return flags


class Run:
    """A run: its flags, its record and its measuring processes."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        self.options, self.command = options, command
        self.started = time.monotonic()
        self.length = "quick" if options.quick else "full"
        pace = measure.QUICK if options.quick else measure.FULL
        self.pace = list(pace._replace(threads=options.threads))
        self.path = options.out / FILE
        self.measured = False
        self.record: dict[str, Any] = {}

    def measure(self) -> None:
        """Run what is not in the record yet."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        with Measurer(returning=True) as peaks, Measurer(returning=False) as clocks:
            self.peaks, self.clocks = peaks, clocks
            facts = self._machine()
            self.record = self._opened(facts["environment"])
            self.elapsed_before = self.record.get("elapsed_seconds", 0.0)
            jobs = JOBS if self.options.job == "all" else (self.options.job,)
            for job in jobs:
                for case in all_cases(job, self.options.quick, self.device, self.options.sizes):
                    if self._out_of_time():
                        print("the time is up; the same command without --seconds goes on")
                        return
                    self._case(case_of(case))
                if job == "losses":
                    self._numerics()
            if self.measured:  # the machine may have been busy before, or be so now
                self.record["rates"] = best_of(self.record["rates"], self._rates())
                self._save()

    def _save(self) -> None:
        seconds = time.monotonic() - self.started
        self.record["elapsed_seconds"] = round(self.elapsed_before + seconds, 1)
        record.save(self.record, self.path)

    def _within(self, limit: float) -> float:
        """A measurement's limit, so that the last case ends soon after --seconds."""
        if self.options.seconds is None:
            return limit
        left = self.options.seconds + LAST_CASE - (time.monotonic() - self.started)
        return min(limit, max(left, 1.0))

    def _out_of_time(self) -> bool:
        seconds = self.options.seconds
        return seconds is not None and time.monotonic() - self.started > seconds

    def _machine(self) -> dict[str, Any]:
        device = self.options.device
        if device != "cpu":
            answer = self.peaks.ask("machine", 120, device="cuda")
            if answer["status"] == "ok":
                self.device = "cuda"
                return answer["result"]
            if device == "cuda":
                raise ValueError(f"--device cuda: {answer['reason']}")
        self.device = "cpu"
        answer = self.peaks.ask("machine", 120, device="cpu")
        if answer["status"] != "ok":
            raise RuntimeError(answer["reason"])
        # The forked process has torch's own choice of threads.
        answer["result"]["environment"]["torch_threads"] = self.options.threads
        return answer["result"]

    def _opened(self, environment: dict[str, Any]) -> dict[str, Any]:
        """The record in the folder, or a fresh one with the machine's rates."""
        if self.path.exists():
            old = record.read(self.path)
            reason = record.continues(old, environment)
            if reason:
                raise ValueError(f"{self.path} is of another run ({reason}): give another --out")
            return old
        return {
            "schema": record.SCHEMA, "command": self.command, "environment": environment,
            "rates": self._rates(), "rows": [],
        }  # fmt: skip

    def _rates(self) -> dict[str, Any]:
        print("measuring the machine: products, copies", flush=True)
        answer = self.clocks.ask(
            "rates", CASE_LIMIT, device=self.device, quick=self.options.quick,
            threads=self.options.threads,
        )  # fmt: skip
        if answer["status"] != "ok":
            raise RuntimeError(answer["reason"])
        return answer["result"]

    def _numerics(self) -> None:
        """Errors over pair distance and temperature, once a record."""
        if "numerics" in self.record:
            return
        print("errors over pair distance and temperature", flush=True)
        answer = self.clocks.ask("numerics", self._within(CASE_LIMIT))
        if answer["status"] == "ok":
            self.record["numerics"] = answer["result"]
            self._save()
        else:
            print(f"  {answer['status']}: {answer['reason']}")

    def _case(self, case: Case) -> None:
        """Measure one case and write the record."""
        known = {record.key_of(row) for row in self.record["rows"]}
        wanted = [p for p in case.providers() if p == OURS or self._asked(p)]
        blank: dict[str, Any] = {"job": case.job_name, "name": case.name, "case": case.facts}
        rows = {p: blank | {"provider": p} for p in wanted}
        rows = {p: row for p, row in rows.items() if record.key_of(row) not in known}
        if not rows:
            return
        started = time.monotonic()
        free = self.peaks.ask("machine", 120, device=self.device)["result"]["free_bytes"]
        for provider, row in rows.items():
            row |= self._peak(case, provider, free)
        timed: list[str] = []
        if case.job_name not in UNTIMED:
            once = ONCE[self.length]
            timed = [p for p, r in rows.items() if r["status"] == "ok" and r["once"] <= once]
        self._times(case, rows, timed)
        if self._out_of_time():  # what was cut short is measured when the run goes on
            rows = {p: row for p, row in rows.items() if CUT_SHORT not in row.get("reason", "")}
        self.measured = True
        self.record["rows"] += rows.values()
        self._save()
        self._say(case, rows, time.monotonic() - started)

    def _asked(self, provider: str) -> bool:
        names = self.options.peers
        return names is None or any(n.lower() in provider.lower() for n in names)

    def _peak(self, case: Case, provider: str, free: int) -> dict[str, Any]:
        """One call in a process of its own: memory, errors, and whether it is the job."""
        version = case.version(provider)
        if version is None:
            return {"status": "skipped", "reason": record.NOT_INSTALLED}
        if case.job_name == "memory":
            known = self._measured_as("losses", case, provider)
            if known:
                return known
        fewer = self._smaller_case(case, provider)
        needs = fewer["peak_bytes"] * fewer["more"] if fewer else case.needs(provider)
        if free and needs > FREE_SHARE * free:
            reason = f"needs about {needs / 2**30:.1f} GiB of {free / 2**30:.1f} GiB that are free"
            return {"status": "skipped", "reason": reason}
        predicted = fewer["minimum"] * fewer["more"] if fewer and provider != OURS else 0.0
        if predicted > PREDICTED_LIMIT[self.length]:
            reason = f"a call would take about {predicted:.0f} s, by what a smaller case took"
            return {"status": "skipped", "reason": reason}
        answer = self.peaks.ask(
            "peak", self._within(CALL_LIMIT[self.length]), facts=case.facts, provider=provider,
            pace=self.pace,
        )  # fmt: skip
        if answer["status"] != "ok":
            return answer
        found = answer["result"]
        worst = max(found["errors"].values())
        allowed = case.allowed(provider)
        if not worst <= allowed:
            reason = f"error {worst:.1e} against float64, allowed {allowed:.0e}: another job"
            return {"status": "differs", "reason": reason, "error": found["errors"]}
        return {
            "status": "ok", "version": version, "peak_bytes": found["peak_bytes"],
            "error": found["errors"], "once": found["seconds"], "remark": case.remark(provider),
        }  # fmt: skip

    def _measured_as(self, job: str, case: Case, provider: str) -> dict[str, Any] | None:
        """What another job has found of the same case in a process of its own."""
        facts = case.facts | {"job": job}
        for row in self.record["rows"]:
            if row["case"] == facts and row["provider"] == provider and "once" in row:
                names = ("status", "version", "peak_bytes", "error", "once", "remark")
                return {name: row[name] for name in names}
        return None

    def _smaller_case(self, case: Case, provider: str) -> dict[str, Any] | None:
        """The largest measured case of fewer rows or dimensions; how much more there is to do."""

        def sizes(facts: dict[str, Any]) -> tuple[int, int]:
            return facts.get("rows", 0), facts.get("dim", 1)

        def other(facts: dict[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in facts.items() if k not in ("job", "rows", "dim")}

        rows, dim = sizes(case.facts)
        smaller = [
            (r * r * d, row)
            for row in self.record["rows"]
            for r, d in (sizes(row["case"]),)
            if row["provider"] == provider
            and row["status"] == "ok"
            and r <= rows
            and d <= dim
            and (r, d) != (rows, dim)
            and other(row["case"]) == other(case.facts)
        ]
        if not smaller:
            return None
        done, row = max(smaller, key=lambda pair: pair[0])
        return row | {"more": rows * rows * dim / done}

    def _times(self, case: Case, rows: dict[str, Any], timed: list[str]) -> None:
        """Times of those that are repeated, and of the others the one that there is."""
        control: dict[str, Any] = {}
        if timed:
            answer = self.clocks.ask(
                "times", self._within(CASE_LIMIT), facts=case.facts,
                providers={p: rows[p]["once"] for p in timed}, pace=self.pace,
            )  # fmt: skip
            found = answer.get("result", {"seconds": {}, "reasons": {}, "control": {}})
            control = found["control"]
            for provider in timed:
                if provider in found["seconds"]:
                    rows[provider] |= measure.figures(found["seconds"][provider])
                else:
                    reason = found["reasons"].get(provider, answer.get("reason", ""))
                    rows[provider] |= {"status": "failed", "reason": reason}
        for row in rows.values():
            if row["status"] == "ok":
                if "minimum" not in row:
                    row |= measure.figures([row["once"]])
                row["control"] = control

    def _say(self, case: Case, rows: dict[str, Any], seconds: float) -> None:
        drift = next((r["control"].get("drift") for r in rows.values() if "control" in r), None)
        busy = drift is not None and drift > measure.DRIFT
        note = f"; the control drifts {drift:.0%}: the machine is busy" if busy else ""
        print(f"{case.name} ({seconds:.0f} s{note})")
        limit = limit_of(case.work(), case.facts, self.record["rates"])["seconds"]
        for provider, r in rows.items():
            if r["status"] != "ok":
                print(f"  {provider:28}{r['status']}: {r['reason'][:100]}")
                continue
            error = max(r["error"].values())
            print(
                f"  {provider:28}{1e3 * r['minimum']:10.3f} ms, "
                f"limit x {limit / r['minimum']:4.2f}, "
                f"{r['peak_bytes'] / 2**20:8.1f} MiB, error {error:.0e}"
            )
        sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(arguments)
    try:
        report = _report()
        unknown = [
            n for n in options.peers or () if not any(n.lower() in p.lower() for p in _names())
        ]
        if unknown:
            raise ValueError(f"--peers: no peer {unknown[0]!r}; there are {', '.join(_names())}")
        if options.threads < 1 or any(m < 2 for m in options.sizes or ()):
            raise ValueError("--threads is 1 or more, --sizes are 2 or more")
        old = record.read(options.compare) if options.compare else None
        run = Run(options, shlex.join(["fastcontrast", "bench", *arguments]))
        changes, said, written = [], "", []
        try:
            run.measure()
        finally:  # a run that fails or is interrupted leaves a page of what it had
            found = run.record
            if found:
                jobs = None if options.job == "all" else (options.job,)
                changes = comparison.compare(old, found, jobs) if old else []
                said = comparison.text(changes) if old else ""
                written = report.write(found, options.out, said)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"fastcontrast: {error}", file=sys.stderr)
        return 2
    if report.warning(found["rows"]):
        print("\n" + report.warning(found["rows"]))
    print("\nWritten:\n" + "\n".join(f"  {path}" for path in written))
    if said:
        print("\n" + said)
    return int(comparison.is_worse(changes))


def _wrapped(names: list[str]) -> str:
    return textwrap.fill(
        "; ".join(names), 96, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def _report() -> ModuleType:
    """The part that draws, before anything is measured: its library is one that can be missing."""
    try:
        return import_module("benchmarks.report")
    except ImportError as error:
        wanted = 'the report needs matplotlib: pip install -e ".[bench]"'
        raise ImportError(f"{wanted} ({error})") from None


def _names() -> list[str]:
    others = {p for job in ("patches", "triplet", "train") for p in _providers(job)}
    return [*PROVIDERS, *sorted(others - set(PROVIDERS))]


def _providers(job: str) -> set[str]:
    found = [f for device in ("cpu", "cuda") for f in all_cases(job, True, device)]
    return {p for facts in found for p in case_of(facts).providers()}


if __name__ == "__main__":
    sys.exit(main())
