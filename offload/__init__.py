"""The KV offload engine: every key and value in host memory, a pool of block slots on the device, and what moves them.

Knows rows, KV heads, blocks and slots, never models.
"""

from . import ops
from .config import OffloadConfig
from .engine import LayerOffload, LayerStats, make_transfers, transfer_path
from .memory import check_host_bytes, host_bytes_available
from .pool import DevicePool
from .residency import open_blocks
from .sizing import balanced_slots
from .store import HostStore
from .stream import RowReader
from .transfers import Transfers

__all__ = [
    "DevicePool",
    "HostStore",
    "LayerOffload",
    "LayerStats",
    "OffloadConfig",
    "RowReader",
    "Transfers",
    "balanced_slots",
    "check_host_bytes",
    "host_bytes_available",
    "make_transfers",
    "open_blocks",
    "ops",
    "transfer_path",
]
