"""What the benchmarks compute from a run's journal, and how they are selected."""

from __future__ import annotations

import subprocess
import sys

import pytest

from services.stages.specs import JournalEvent
from services.training.worker.step_timer import peak_resident_bytes
from tests.bench import __main__ as bench
from tests.bench.cases import WARM_UP, pairs_per_s, step_seconds
from tests.bench.checkpoint_stall import EVERY, PERIODS, STEPS, counted, results, stall_fraction
from tests.bench.measure import ceiling


def journaled(seconds: list[float], stalled_s: list[float]) -> list[JournalEvent]:
    """The journal of a run whose steps took ``seconds``, of which checkpoints took ``stalled_s``."""
    ends = [sum(seconds[: number + 1]) for number in range(len(seconds))]
    return [
        JournalEvent(at=at, step=1, metrics={"checkpoint_stall_s": stalled})
        for at, stalled in zip(ends, stalled_s, strict=True)
    ]


def test_a_step_is_timed_from_one_journal_entry_to_the_next_after_the_warm_up():
    run = journaled([9.0, 5.0, 1.0, 2.0, 3.0], [0.0] * 5)
    assert WARM_UP == 2
    assert step_seconds(run) == [1.0, 2.0, 3.0]
    assert pairs_per_s(8, run) == 4.0


def test_the_stall_is_a_fraction_of_all_counted_steps():
    assert stall_fraction(journaled([9.0, 5.0, 1.0, 1.5, 7.5], [3.0, 2.0, 0.0, 0.5, 0.0])) == 0.05


def test_a_run_is_counted_over_whole_periods_whose_checkpoints_are_stored_in_them():
    checkpoints = [step for step in range(1, STEPS + 1) if step % EVERY == 0 or step == STEPS]
    run = journaled([1.0] * STEPS, [0.5 if step in checkpoints else 0.0 for step in range(1, STEPS + 1)])
    assert len(step_seconds(counted(run))) == PERIODS * EVERY == 40
    assert stall_fraction(counted(run)) == PERIODS * 0.5 / 40, "without the last one, which every run has"
    assert counted(run)[-1].at - run[checkpoints[-2] - 1].at == 10.0


def test_the_stall_and_the_time_that_a_whole_run_loses_are_separate_results():
    seconds = {"with": [44.0, 42.0, 48.0], "without": [40.0, 41.2, 40.0]}
    stall, run = results(", small", "steps of 2 pairs", [0.01, 0.02, 0.03], seconds).items()
    assert (stall[0], run[0]) == ("checkpoint_stall, small", "checkpoint_stall, small, whole run")
    assert stall[1]["ratio"] == 0.02
    assert stall[1]["value"] == pytest.approx(1000 * 0.02 * 44 / 40 * 20)
    assert run[1]["ratio"] == pytest.approx(0.1)
    assert run[1]["value"] == pytest.approx(1000 * 4 / 2)
    assert run[1]["against"].endswith("3 rounds, +1.9% to +20.0%")


def test_a_ratio_over_the_public_recipe_states_the_ratio_that_flops_predict():
    assert ceiling("train_vs_public_recipe, SD1.5-kind mid-size").endswith("the ratio is 1.667")
    on_a_gpu = (
        "sd15 at 512 px, bf16, micro 8, without gradient checkpointing, compiled, train_vs_public_recipe"
    )
    assert ceiling(on_a_gpu).endswith("the ratio is 1.795")
    assert ceiling(on_a_gpu.replace("sd15", "tiny")) == ceiling("train_vs_floor") == ""


def test_the_peak_of_a_process_does_not_include_its_parent():
    large = bytearray(2_000_000_000)
    code = "from services.training.worker.step_timer import peak_resident_bytes; print(peak_resident_bytes())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 50_000_000 < int(printed) < len(large) < peak_resident_bytes()


def test_every_benchmark_is_listed_and_an_unknown_one_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", "train_vs_nothing"])
    with pytest.raises(SystemExit) as refused:
        bench.main()
    assert refused.value.code == 2
    error = capsys.readouterr().err
    named = (
        "train_vs_public_recipe",
        "train_vs_floor",
        "train_memory_vs_floor",
        "two_workers_vs_one",
        "checkpoint_stall",
        "api_submit_p99_ms",
        "api_list_100k_p99_ms",
    )
    assert all(name in error for name in named)
