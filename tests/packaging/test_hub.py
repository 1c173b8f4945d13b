"""The package as Hugging Face's kernels hub has it, loaded from a folder beside the installed package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from build_hub import BACKENDS, build, relative, replaced
from support.hub import FOLDER
from support.paths import python_path

pytest.importorskip("huggingface_hub", reason="needs the extra 'transformers'")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the package that `make test-rest` installs"),
]

# With the folder, and the backend of the loss, on the command line.
USE = textwrap.dedent("""
    import sys, time
    from pathlib import Path

    import torch
    import mixce_kernels
    from mixce_kernels import linear_mixce_loss_reference, mixce_loss_reference

    begin = time.perf_counter()
    from kernels import get_local_kernel

    hub = get_local_kernel(Path(sys.argv[1]), backend="cpu")
    seconds = time.perf_counter() - begin
    assert seconds < 5, seconds
    backend = sys.argv[2]

    torch.manual_seed(0)
    logits = torch.randn(7, 515, requires_grad=True)
    targets = torch.randint(515, (7,))
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(515, 16, requires_grad=True)
    wanted = mixce_loss_reference(logits, targets, 0.3), linear_mixce_loss_reference(hidden, weight, targets, 0.3)
    for module in (hub, mixce_kernels, hub):
        linear = {} if backend == "reference" else {"path": "tiles"}
        found = (
            module.fused_mixce_loss(logits, targets, 0.3, backend=backend),
            module.fused_linear_mixce_loss(hidden, weight, targets, 0.3, backend=backend, **linear),
        )
        for one, other, inputs in zip(found, wanted, ((logits,), (hidden, weight))):
            torch.testing.assert_close(one, other)
            grads = torch.autograd.grad(one, inputs), torch.autograd.grad(other, inputs, retain_graph=True)
            torch.testing.assert_close(*grads)
    logprobs = hub.fused_token_logprobs(logits, targets, backend=backend)
    torch.testing.assert_close(logprobs, torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0])
    compiled = torch.compile(hub.fused_mixce_loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, targets, 0.3, backend=backend), wanted[0])

    # Nothing of one is the other's.
    inside = {name for name in sys.modules if name.startswith(hub.__name__)}
    assert len(inside) > 20
    assert hub.__name__ != "mixce_kernels" and hub.fused_mixce_loss is not mixce_kernels.fused_mixce_loss
    assert {name for name in dir(getattr(torch.ops, hub.__name__)) if name == "forward"}
    print(hub.__version__ == mixce_kernels.__version__)
""")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as `make hub` writes it."""
    folder = tmp_path_factory.mktemp("hub")
    build(folder)
    return folder


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_losses_beside_the_installed_package(backend: str, hub: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MIXCE_CPU_TENSORS": "1", "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = python_path(FOLDER)
    if backend == "triton":
        pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", "-c", USE, str(hub), backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "True"


def test_layout(hub: Path) -> None:
    assert {path.name for path in (hub / "build").iterdir()} == {f"torch-{backend}" for backend in BACKENDS}
    identifiers = set()
    for backend in BACKENDS:
        folder = hub / "build" / f"torch-{backend}"
        metadata = json.loads((folder / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        assert metadata["python-depends"] == []
        identifiers.add(metadata["id"])
        for file in folder.rglob("*.py"):
            source = file.read_text()
            assert not re.search(r"^\s*(from|import) mixce_kernels", source, re.MULTILINE), file
            assert "importlib.metadata" not in source
        assert f'NAMESPACE = "{metadata["id"]}"' in (folder / "_ops.py").read_text()
        assert not list(folder.rglob("*.so"))
    assert len(identifiers) == len(BACKENDS)
    assert "torch-noarch" in (hub / "build.toml").read_text()


def test_another_build_replaces_the_folder(hub: Path, tmp_path: Path) -> None:
    build(tmp_path)
    stale = tmp_path / "build" / "torch-cpu" / "stale.py"
    stale.touch()
    build(tmp_path)
    assert not stale.exists()
    same = "build/torch-cpu/metadata.json"
    assert (tmp_path / same).read_text() == (hub / same).read_text()


def test_sources_that_cannot_be_made_relative() -> None:
    assert relative("from mixce_kernels.a.b import c\n", 1) == "from ..a.b import c\n"
    assert relative("from mixce_kernels import a\n", 0) == "from . import a\n"
    with pytest.raises(ValueError, match=r"expected relative imports of mixce_kernels, found: import mixce_kernels\.a"):
        relative("import mixce_kernels.a", 0)
    with pytest.raises(ValueError, match="expected 'x' once, found it 2 times"):
        replaced("xx", "x", "y")
