"""Triton kernels of the fused decode pipeline, one kernel and its launcher a file; no policy, no checks.

A *row* is one selection: query token t of KV head h of batch row b, ``row = (b * HKV + h) * T + t``. Several programs
work on a row; the last one to arrive does what needs all of them (choosing, merging), so that a step takes four
launches. Who is last is counted in ``arrivals``, which every launch leaves as it found it: zero.
"""
