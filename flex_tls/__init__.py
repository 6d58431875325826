"""Two-level sparse attention with asynchronous KV offload, on torch.compile and FlexAttention."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_root = Path(__file__).resolve().parent.parent
if not (Path(__file__).parent / "masks").is_dir() and (_root / "masks" / "__init__.py").is_file():
    # A checkout on sys.path before the installed package: masks/ and offload/ lie beside this folder, not in it
    __path__.append(str(_root))

from .attention import BackendUnavailable, two_level_attention  # noqa: E402
from .config import TLSConfig  # noqa: E402
from .index import KVIndex  # noqa: E402
from .offload import OffloadConfig  # noqa: E402
from .sampling import Sampling  # noqa: E402
from .selection import BlockSelection, TokenSelection, select_blocks, select_tokens  # noqa: E402

if TYPE_CHECKING:
    from .cache import TLSCache
    from .decode import generate
    from .explanation import explain
    from .integrations.huggingface import disable, enable
    from .integrations.projections import fuse_projections, unfuse_projections
    from .shares import measure_block_shares

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailable",
    "BlockSelection",
    "KVIndex",
    "OffloadConfig",
    "Sampling",
    "TLSCache",
    "TLSConfig",
    "TokenSelection",
    "disable",
    "enable",
    "explain",
    "fuse_projections",
    "generate",
    "measure_block_shares",
    "select_blocks",
    "select_tokens",
    "two_level_attention",
    "unfuse_projections",
]


# Names that need transformers, and where they are
_LAZY = {
    "TLSCache": ".cache",
    "disable": ".integrations.huggingface",
    "enable": ".integrations.huggingface",
    "explain": ".explanation",
    "fuse_projections": ".integrations.projections",
    "generate": ".decode",
    "measure_block_shares": ".shares",
    "unfuse_projections": ".integrations.projections",
}


def __getattr__(name: str) -> Any:
    """Load what needs transformers only when asked for: ``import flex_tls`` needs torch alone."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
