"""The place of the KV offload engine: host store, device pool of block slots, residency and transfers.

The engine is not part of this version. Nothing is exported: caches keep every key and value on the model's device.
What lands here knows blocks and slots, never models.
"""
