"""What an installed wheel must be. Run it with the Python that has it, outside any checkout, with the wheel's path."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import PurePosixPath

# Each runs in a process of its own, with every warning an error
PLAIN_IMPORT = """
import sys
import torch

with_torch = set(sys.modules)
attention = torch.nn.functional.scaled_dot_product_attention
import flex_tls, flex_tls.masks, flex_tls.offload

wanted = {"triton", "transformers", "typer", "rich", "matplotlib"} & (set(sys.modules) - with_torch)
assert not wanted, f"import flex_tls also imported {sorted(wanted)}"
assert torch.nn.functional.scaled_dot_product_attention is attention, "import flex_tls patched torch"
eager = set(flex_tls.__all__) - {"TLSCache", "enable", "disable"}
missing = [name for name in sorted(eager) if not hasattr(flex_tls, name)]
assert not missing, f"__all__ names what is not there: {missing}"
"""

# None in sys.modules makes an import of that name fail, as on a machine that has torch alone
TORCH_ALONE = """
import sys

for name in ("numpy", "triton", "transformers", "accelerate", "typer", "rich", "matplotlib"):
    sys.modules[name] = None
import warnings

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch
import flex_tls as tls

k = torch.randn(1, 2, 200, 64)
cfg = tls.TLSConfig(block_budget=192, token_budget=150)
index = tls.KVIndex.build(k, cfg)
out = tls.two_level_attention(torch.randn(1, 6, 1, 64), k, k, index, cfg, backend="reference")
assert out.shape == (1, 6, 1, 64) and bool(out.isfinite().all())
"""


def main(wheel: str) -> None:
    """Check what the wheel holds, and that it imports and works on its own."""
    names = [PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()]
    top = {name.parts[0] for name in names if not name.parts[0].endswith(".dist-info")}
    assert top == {"flex_tls"}, f"the wheel installs {sorted(top)} at top level"
    held = {str(name) for name in names}
    data = ("flex_tls/py.typed", "flex_tls/kernels/tiles.json")
    for needed in (*data, "flex_tls/masks/__init__.py", "flex_tls/offload/__init__.py"):
        assert needed in held, f"the wheel lacks {needed}"
    for name in ("masks", "offload"):
        assert importlib.util.find_spec(name) is None, f"something called {name!r} is importable at top level"
    spec = importlib.util.find_spec("flex_tls")
    assert "site-packages" in str(spec and spec.origin), f"flex_tls was found at {spec and spec.origin}"
    for script in (PLAIN_IMPORT, TORCH_ALONE):
        # -I: nothing of the current folder or the caller's environment
        subprocess.run([sys.executable, "-I", "-W", "error", "-c", script], check=True)
    print(f"wheel: {len(held)} files, imports with torch alone")


if __name__ == "__main__":
    main(sys.argv[1])
