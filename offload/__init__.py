"""The KV offload engine: every key and value in host memory, a pool of block slots on the device, and what moves them.

Knows rows, KV heads, blocks and slots, never models.
"""

from .config import OffloadConfig
from .engine import LayerOffload, LayerStats, make_transfers
from .pool import DevicePool
from .store import HostStore

__all__ = ["DevicePool", "HostStore", "LayerOffload", "LayerStats", "OffloadConfig", "make_transfers"]
