"""Sizes of the pool, and what the host has: settings and refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from flex_tls.offload import OffloadConfig, check_host_bytes, host_bytes_available
from hypothesis import example, given
from hypothesis import strategies as st

LAYOUT = {"n_layers": 3, "n_heads": 4, "n_blocks": 100, "kept_blocks": 10, "least": 12, "block_bytes": 1024}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gpu_blocks": 4, "gpu_bytes": 5}, "gpu_bytes: expected one size for the pool, got gpu_blocks and gpu_bytes"),
        ({"gpu_blocks": 0}, "gpu_blocks: expected an integer of at least 1, got 0"),
        ({"gpu_blocks": (4, -1)}, "gpu_blocks: expected an integer of at least 1, got -1"),
        ({"gpu_blocks": ()}, r"gpu_blocks: expected a number of blocks for each layer, got \(\)"),
        ({"gpu_bytes": 1.5}, "gpu_bytes: expected an integer of at least 1, got 1.5"),
        ({"gpu_fraction": 1.5}, "gpu_fraction: expected a share above 0 and at most 1, got 1.5"),
        ({"policy": "lazy"}, "policy: expected one of 'async', 'exact', 'corrected', got 'lazy'"),
        ({"transfer": "dma"}, "transfer: expected one of 'kernel', 'copy', got 'dma'"),
        ({"store_dtype": "int4"}, "store_dtype: expected one of 'model', 'int8', got 'int4'"),
        ({"missing_mass_bound": -0.1}, "missing_mass_bound: expected a share between 0 and 1"),
        ({"transfer_programs": 0}, "transfer_programs: expected an integer of at least 1"),
        ({"policy": "exact", "attend_resident": True}, "attend_resident: expected False with policy='exact'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        OffloadConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, (20, 20, 20)),
        ({"gpu_blocks": 15}, (15, 15, 15)),
        ({"gpu_blocks": (12, 200, 30)}, (12, 100, 30)),
        ({"gpu_bytes": 3 * 4 * 1024 * 17 + 5}, (17, 17, 17)),
        ({"gpu_fraction": 0.5}, (50, 50, 50)),
    ],
)
def test_the_pool_s_size_by_blocks_bytes_or_share(settings: dict[str, Any], sizes: tuple[int, ...]) -> None:
    assert OffloadConfig(**settings).pool_blocks(**LAYOUT) == sizes


@given(st.integers(1, 50), st.integers(1, 20), st.sampled_from(("gpu_blocks", "gpu_bytes", "gpu_fraction")))
@example(49, 1, "gpu_fraction")
def test_a_pool_holds_a_step_or_is_refused_with_what_would_do(n_blocks: int, least: int, name: str) -> None:
    layout = {**LAYOUT, "n_blocks": n_blocks, "kept_blocks": least, "least": least}
    for size in range(1, 30):
        value = {"gpu_blocks": size, "gpu_bytes": size * 3 * 4 * 1024, "gpu_fraction": min(1.0, size / n_blocks)}[name]
        config = OffloadConfig(**{name: value})  # type: ignore[arg-type]
        if min(size, n_blocks) < min(least, n_blocks):
            with pytest.raises(ValueError, match=f"{name}: expected at least"):
                config.pool_blocks(**layout)
        else:
            assert all(min(least, n_blocks) <= x <= n_blocks for x in config.pool_blocks(**layout))


def test_what_is_resident_is_attended_to_unless_the_policy_is_exact() -> None:
    assert not OffloadConfig(policy="exact").attends_resident
    assert OffloadConfig().attends_resident
    assert OffloadConfig(policy="corrected").attends_resident
    assert not OffloadConfig(attend_resident=False).attends_resident


def test_policies_say_above_which_share_a_head_waits() -> None:
    assert OffloadConfig(policy="exact").waits_above < 0
    assert OffloadConfig(policy="async").waits_above == math.inf
    assert OffloadConfig(policy="corrected", missing_mass_bound=0.2).waits_above == 0.2


def files(root: Path, **contents: str) -> None:
    for name, text in contents.items():
        path = root / name.replace("__", "/").replace("_dot_", ".", 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_host_s_memory_is_the_least_of_machine_and_limits(tmp_path: Path) -> None:
    """cgroup v2 at two levels, v1 with the host's path of which only the root is mounted, and none."""
    assert host_bytes_available(tmp_path) is None
    files(tmp_path, proc__meminfo="MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 50 kB\n")
    assert host_bytes_available(tmp_path) == 50 * 1024
    two = tmp_path / "sys/fs/cgroup/a/b"
    files(tmp_path, proc__self__cgroup="0::/a/b\n")
    for folder, limit, used in ((two, "max", "9000"), (two.parent, "20000", "15000")):
        files(folder, memory_dot_max=limit, memory_dot_current=used, memory_dot_stat="inactive_file 2000\n")
    assert host_bytes_available(tmp_path) == 20000 - 15000 + 2000
    files(two, memory_dot_max="10000")
    assert host_bytes_available(tmp_path) == 10000 - 9000 + 2000
    files(tmp_path, proc__self__cgroup="5:cpu,memory:/not/mounted\n0::/\n")
    one = tmp_path / "sys/fs/cgroup/memory"
    files(one, memory_dot_limit_in_bytes="4000", memory_dot_usage_in_bytes="5000")
    assert host_bytes_available(tmp_path) == 0
    files(one, memory_dot_limit_in_bytes="9000", memory_dot_stat="total_inactive_file 300\ninactive_file 7\n")
    assert host_bytes_available(tmp_path) == 4300


def test_a_host_that_is_too_small_is_told_in_bytes() -> None:
    check_host_bytes(10, "it", 10)
    check_host_bytes(10, "it", None)
    with pytest.raises(MemoryError, match=r"offload: 2,000 bytes of host memory needed for it, 1,999 available"):
        check_host_bytes(2000, "it", 1999)
