"""How large batches become: on a make-believe device, for a real one says something else every time."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marc_pipeline.model.budget import CPU_TOKENS, budget_of, find_budget

FIRST, MOST = 1024, 1 << 20


def device(*, saturated_at: int, memory: int, calls: list[int] | None = None) -> Callable[[int], float]:
    """Seconds of a batch on a device that is no faster beyond ``saturated_at`` tokens and holds ``memory`` of them."""

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
        # Half of what just fitted: the texts of a night are longer than those that were tried.
        assert found == max(FIRST, min(room, MOST) // (1 if room >= MOST else 2))
        assert sure == (room >= MOST)


def test_a_device_too_small_for_the_first_batch_gets_it_all_the_same() -> None:
    assert find_budget(device(saturated_at=1, memory=10), first=FIRST) == (FIRST, False)


def test_what_a_full_gpu_said_is_not_remembered(gpu: Path) -> None:
    cuda = torch.device("cuda:0")
    assert budget_of(cuda, "small", device(saturated_at=65536, memory=1)) == 8192
    assert not gpu.exists()
    assert budget_of(cuda, "small", device(saturated_at=65536, memory=1 << 30)) == 65536


def test_a_broken_gpu_is_no_small_one(gpu: Path) -> None:
    def broken(_: int) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        budget_of(torch.device("cuda:0"), "small", broken)
    assert not gpu.exists()


@pytest.mark.usefixtures("gpu")
def test_a_user_without_a_home_is_served_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert budget_of(torch.device("cuda:0"), "small", device(saturated_at=16384, memory=1 << 30)) == 16384


def test_a_cpu_is_not_measured() -> None:
    calls: list[int] = []
    seconds = device(saturated_at=1, memory=1 << 30, calls=calls)
    assert budget_of(torch.device("cpu"), "model", seconds) == CPU_TOKENS
    assert calls == []


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU by name alone, and a cache of its own; what is asked of it is not asked of CUDA."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tester 1000")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 << 30))
    return tmp_path / "marc-pipeline" / "token_budgets.json"


def test_a_gpu_is_measured_once_for_each_model(gpu: Path) -> None:
    calls: list[int] = []
    seconds = device(saturated_at=32768, memory=1 << 30, calls=calls)
    cuda = torch.device("cuda:0")
    assert budget_of(cuda, "small", seconds) == 32768
    measured = len(calls)
    assert measured > 0
    assert budget_of(cuda, "small", seconds) == 32768
    assert len(calls) == measured
    assert budget_of(cuda, "large", seconds) == 32768
    assert len(calls) == 2 * measured
    assert gpu.is_file()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": "b"}', '{"a": null}'])
def test_a_memory_that_cannot_be_read_is_made_anew(gpu: Path, content: str) -> None:
    gpu.parent.mkdir()
    gpu.write_text(content)
    seconds = device(saturated_at=16384, memory=1 << 30)
    assert budget_of(torch.device("cuda:0"), "small", seconds) == 16384
    assert "Tester 1000" in gpu.read_text()


def test_a_home_that_cannot_be_written_only_costs_the_memory(gpu: Path) -> None:
    gpu.parent.write_text("a file where the folder should be")
    assert budget_of(torch.device("cuda:0"), "small", device(saturated_at=16384, memory=1 << 30)) == 16384
