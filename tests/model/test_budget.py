"""Token budgets, measured on a simulated device, and the batches within a budget."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marc_pipeline.model.batches import next_batch, token_batches
from marc_pipeline.model.budget import CPU_TOKENS, budget_of, find_budget

FIRST, MOST = 1024, 1 << 20
CUDA = torch.device("cuda:0")
LENGTHS = st.lists(st.integers(0, 300), max_size=60).map(lambda lengths: sorted(lengths, reverse=True))


@settings(max_examples=300)
@given(lengths=LENGTHS.filter(len), budget=st.integers(1, 2000))
def test_a_packed_batch_takes_as_many_texts_as_fit_the_budget(lengths: list[int], budget: int) -> None:
    taken = next_batch(np.array(lengths, dtype=np.int64), budget, packed=True)
    assert 1 <= taken <= len(lengths)
    assert taken == 1 or sum(lengths[:taken]) <= budget
    # More texts than tokens are never added up.
    assert taken in (len(lengths), budget + 1) or sum(lengths[: taken + 1]) > budget


@settings(max_examples=300)
@given(lengths=LENGTHS, budget=st.integers(1, 2000))
def test_token_batches_cover_every_row_once_in_order_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(token_batches(np.array(lengths, dtype=np.int64), budget))
    assert [row for batch in batches for row in range(batch.start, batch.stop)] == list(range(len(lengths)))
    for batch in batches:
        size = batch.stop - batch.start
        assert size == 1 or (size > 1 and size * max(lengths[batch]) <= budget)
        # One more row would exceed the budget.
        assert batch.stop == len(lengths) or (size + 1) * max(1, *lengths[batch]) > budget


def device(*, saturated_at: int, memory: int, calls: list[int] | None = None) -> Callable[[int], float]:
    """Seconds of a batch on a device that is no faster beyond ``saturated_at`` tokens and fits ``memory`` tokens."""

    def seconds(tokens: int) -> float:
        if calls is not None:
            calls.append(tokens)
        if tokens > memory:
            raise torch.OutOfMemoryError("full")
        return max(1.0, tokens / saturated_at)

    return seconds


@given(saturated=st.integers(0, 10), memory=st.integers(0, 12))
def test_the_budget_saturates_the_device_and_never_fills_its_memory(saturated: int, memory: int) -> None:
    saturated_at, room = FIRST << saturated, FIRST << memory
    found, sure = find_budget(device(saturated_at=saturated_at, memory=room), first=FIRST, most=MOST)
    if room > saturated_at:
        assert (found, sure) == (saturated_at, True)
    else:
        assert found == max(FIRST, min(room, MOST) // (1 if room >= MOST else 2))
        assert sure == (room >= MOST)


def test_the_first_batch_is_returned_even_if_it_does_not_fit() -> None:
    assert find_budget(device(saturated_at=1, memory=10), first=FIRST) == (FIRST, False)


def test_results_of_a_full_or_broken_gpu_are_not_cached(gpu: Path) -> None:
    def broken(_: int) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert budget_of(CUDA, "small", device(saturated_at=65536, memory=1)) == 8192
    with pytest.raises(RuntimeError, match="illegal memory access"):
        budget_of(CUDA, "small", broken)
    assert not gpu.exists()
    assert budget_of(CUDA, "small", device(saturated_at=65536, memory=1 << 30)) == 65536


@pytest.mark.usefixtures("gpu")
def test_a_user_without_a_home_directory_gets_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert budget_of(CUDA, "small", device(saturated_at=16384, memory=1 << 30)) == 16384


def test_a_cpu_is_not_measured() -> None:
    calls: list[int] = []
    seconds = device(saturated_at=1, memory=1 << 30, calls=calls)
    assert budget_of(torch.device("cpu"), "model", seconds) == CPU_TOKENS
    assert calls == []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A simulated GPU, and the path of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tester 1000")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 << 30))
    return tmp_path / "marc-pipeline" / "token_budgets.json"


def test_a_gpu_is_measured_once_for_each_model(gpu: Path) -> None:
    calls: list[int] = []
    seconds = device(saturated_at=32768, memory=1 << 30, calls=calls)
    measured = []
    for model in ("small", "small", "large"):
        assert budget_of(CUDA, model, seconds) == 32768
        measured.append(len(calls))
    assert measured == [measured[0], measured[0], 2 * measured[0]] != [0, 0, 0]
    assert gpu.is_file()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": "b"}', '{"a": null}'])
def test_an_unreadable_cache_is_replaced(gpu: Path, content: str) -> None:
    gpu.parent.mkdir()
    gpu.write_text(content)
    assert budget_of(CUDA, "small", device(saturated_at=16384, memory=1 << 30)) == 16384
    assert "Tester 1000" in gpu.read_text()


def test_a_cache_that_cannot_be_written_is_ignored(gpu: Path) -> None:
    gpu.parent.write_text("a file where the folder should be")
    assert budget_of(CUDA, "small", device(saturated_at=16384, memory=1 << 30)) == 16384
