"""The choice of device and dtype."""

import pytest
import torch

from marc_pipeline.config import EncodeSettings
from marc_pipeline.errors import UserError
from marc_pipeline.model.device import choose_device, choose_dtype
from marc_pipeline.resources import TaskResources

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cuda", "wanted", "gpu", "device"),
    [
        (True, "auto", None, "cpu"),
        (True, "auto", "3", "cuda:3"),
        (True, "cuda", None, "cuda:0"),
        (True, "cuda", "2", "cuda:2"),
        (True, "cpu", "1", "cpu"),
        (False, "auto", "0", "cpu"),
        (False, "cpu", None, "cpu"),
        (False, "cuda", None, None),
    ],
)
def test_the_device_is_the_assigned_or_the_configured_one(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, wanted: str, gpu: str | None, device: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    encode = EncodeSettings.model_validate({"device": wanted})
    if device is None:
        with pytest.raises(UserError, match=r"set encode\.device to auto or cpu"):
            choose_device(encode, TaskResources(gpu=gpu))
    else:
        assert choose_device(encode, TaskResources(gpu=gpu)) == torch.device(device)


@pytest.mark.parametrize(
    ("capabilities", "onednn", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, True, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False}, True, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": True}, False, torch.float32),
        ({}, False, torch.float32),
    ],
)
def test_the_cpu_runs_bfloat16_only_if_it_multiplies_it_natively(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], onednn: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert choose_dtype(EncodeSettings(), CPU) == dtype
    assert choose_dtype(EncodeSettings(dtype="float32"), CPU) == torch.float32
    assert choose_dtype(EncodeSettings(dtype="bfloat16"), CPU) == torch.bfloat16
