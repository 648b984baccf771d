from __future__ import annotations

from pathlib import Path

import torch
from places import SHAPES_CLIP
from references import quiet_trainer
from safetensors.torch import load_file

from sap_lightning.callbacks.epochs import KeepEpochs
from sap_lightning.data import DomainDataModule
from sap_lightning.modules import CLIPLoRAModule


def test_every_epoch_s_adapter_is_kept(world, tmp_path: Path) -> None:
    data = DomainDataModule(str(world / "domains"), "photo", base=SHAPES_CLIP, batch_size=16, cache=False)
    module = CLIPLoRAModule(SHAPES_CLIP, rank=2)
    quiet_trainer(KeepEpochs(tmp_path / "epochs"), max_epochs=2).fit(module, datamodule=data)
    assert sorted(file.name for file in (tmp_path / "epochs").iterdir()) == ["1.safetensors", "2.safetensors"]
    first, last = (load_file(tmp_path / "epochs" / f"{epoch}.safetensors") for epoch in (1, 2))
    expected = {f"{name}.{of}": getattr(x, of).half() for name, x in module.layers().items() for of in ("A", "B")}
    assert last.keys() == expected.keys() and all(torch.equal(last[key], expected[key]) for key in expected)
    assert any(not torch.equal(first[key], last[key]) for key in expected)


def test_only_clients_of_both_towers_keep_them(finished) -> None:
    assert not (finished / "clients" / "photo" / "epochs").exists()
