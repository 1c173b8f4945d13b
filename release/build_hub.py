"""The package in the layout of Hugging Face's kernels hub: `build/torch-{cuda,rocm,cpu}`, from the same sources.

`make hub`. What `kernels.get_kernel` and `kernels.get_local_kernel` load has no fixed name and may be there in several
versions at once. So imports are relative, operators have a namespace of their own (`_ops.py`), and nothing but torch is
asked for: the integrations and the native extension stay out. Backends are then "triton" on GPUs and "reference" on
CPUs.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mixce_kernels"
BACKENDS = ("cuda", "rocm", "cpu")
# The newest major version on the hub; users name it: get_kernel(..., version=1).
VERSION = 1
LEFT_OUT = ("integrations", "_C.pyi", "py.typed")

OPS = '''"""The namespace of this build's operators, so that several builds can be loaded in one process."""

import torch

NAMESPACE = "{identifier}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(name: str) -> str:
    """The operator's name with its namespace."""
    return f"{{NAMESPACE}}::{{name}}"
'''

CARD = """---
license: {license}
tags: [kernels]
---

# mixce-kernels

Fused losses over vocabulary-sized logits for training language models: cross-entropy, MixCE and other weightings, from
logits or from hidden states, and log-probabilities with entropies. Triton kernels for NVIDIA and AMD GPUs, plain
PyTorch on CPUs.

```python
from kernels import get_kernel

mixce = get_kernel("<owner>/mixce-kernels", version={version})
loss = mixce.fused_mixce_loss(logits, targets, eta=0.5)
loss = mixce.fused_linear_mixce_loss(hidden, weight, targets, eta=0.5)
```
"""


def relative(source: str, depth: int) -> str:
    """Python source whose imports of the package are relative; its file lies `depth` folders below the package.

    Raises:
        ValueError: an import of the package is left that cannot be made relative.
    """
    dots = "." * (depth + 1)
    source = re.sub(rf"^(\s*)from {PACKAGE}(?:\.([\w.]+))? import ", rf"\1from {dots}\2 import ", source, flags=re.M)
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        if any(name.split(".")[0] == PACKAGE for name in names):
            raise ValueError(f"expected relative imports of {PACKAGE}, found: {ast.unparse(node)}")
    return source


def replaced(source: str, old: str, new: str) -> str:
    """The source with `new` in the one place of `old`.

    Raises:
        ValueError: there is no such place, or more than one.
    """
    if source.count(old) != 1:
        raise ValueError(f"expected {old!r} once, found it {source.count(old)} times")
    return source.replace(old, new)


def sources(version: str) -> dict[str, str]:
    """The package's files by their paths, as the hub has them."""
    files = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        within = path.relative_to(ROOT / PACKAGE)
        if within.parts[0] not in LEFT_OUT:
            files[within.as_posix()] = relative(path.read_text(), len(within.parts) - 1)
    top = replaced(files["__init__.py"], "from importlib.metadata import version\n\n", "")
    files["__init__.py"] = replaced(top, f'version("{PACKAGE}")', f'"{version}"')
    operators = replaced(files["operators.py"], f'NAMESPACE = "{PACKAGE}"\n', "")
    first = "from .backends.layout import"
    files["operators.py"] = replaced(operators, first, f"from ._ops import NAMESPACE\n{first}")
    return files


def build(out: Path) -> None:
    """Writes the repository into `out`, whose `build` folder is replaced."""
    project = importlib.metadata.metadata(PACKAGE)
    license_name = project["License-Expression"]
    files = sources(project["Version"])
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]
    shutil.rmtree(out / "build", ignore_errors=True)
    for backend in BACKENDS:
        folder = out / "build" / f"torch-{backend}"
        identifier = f"_{PACKAGE}_{backend}_{digest}"
        for name, text in (files | {"_ops.py": OPS.format(identifier=identifier)}).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        metadata = {
            "name": PACKAGE.replace("_", "-"),
            "id": identifier,
            "version": VERSION,
            "license": license_name,
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    (out / "build.toml").write_text(
        f'[general]\nname = "{PACKAGE.replace("_", "-")}"\nversion = {VERSION}\nlicense = "{license_name}"\n'
        f"backends = [{backends}]\n\n[torch-noarch]\n"
    )
    (out / "README.md").write_text(CARD.format(license=license_name.lower(), version=VERSION))
    shutil.copy(ROOT / "LICENSE", out)


def main() -> None:
    """Writes the repository where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "hub", help="(default: dist/hub)")
    arguments = parser.parse_args()
    build(arguments.out)
    print(f"wrote {arguments.out}: kernels.get_local_kernel(Path(...)) loads it")


if __name__ == "__main__":
    main()
