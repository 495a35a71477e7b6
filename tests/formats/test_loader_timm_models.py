"""Loading of every small model of timm, and without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from compressor.formats.file.writer import write
from compressor.formats.loader import load, load_state_dict
from tests.formats.test_loader import to_content
from tests.helpers.forging import small


@pytest.mark.parametrize("name", timm.list_models("test_*"))
def test_every_small_timm_model(tmp_path: Path, name: str) -> None:
    """Among them some keep relative positions in buffers that their state dict has not."""
    args = {"num_classes": 3, "in_chans": 1}
    model = timm.create_model(name, num_classes=3, in_chans=1).eval()
    write(tmp_path / "a", to_content(model, name, args=args), codec="bits")
    loaded = load(tmp_path / "a")
    model.load_state_dict(load_state_dict(tmp_path / "a"))
    assert list(loaded.state_dict()) == list(model.state_dict())
    image = torch.randn(1, *model.pretrained_cfg["input_size"])[:, :1]  # type: ignore[index]
    with torch.inference_mode():
        assert torch.equal(model(image), loaded(image))


def test_reading_needs_no_torch() -> None:
    code = (
        "import sys\nfrom compressor.formats.file.reader import PackedFile\n"
        "from compressor.formats.file.writer import write\n"
        f"PackedFile.from_bytes({small()!r}).tensor('fc.weight')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
