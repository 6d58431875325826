"""Settings come from the table where it has them, from the rule elsewhere, and change no result."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import flex_tls as tls
from tests.cases import make
from tests.kernels.test_fused import CFG, DEVICE, check

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from bench.tune import COORDINATES, write_table
from flex_tls.fused_pool import choose
from flex_tls.kernels import tile_table
from flex_tls.kernels.tile_table import TABLE, Entry, find, forced, read_table, tiles_for, why_invalid
from flex_tls.kernels.tiles import INTERPRETED, Tiles, padded, rule

CUDA = torch.device("cuda")
BY_RULE = rule(132, head_bytes=256, rows=8)
HERE: dict[str, Any] = {"gpu": "a GPU", "processors": 132}
SHAPE: dict[str, Any] = {"head_bytes": 256, "group": 4, "kept_tokens": 8192}


def entry(rows: int, **changes: int) -> Entry:
    tiles = rule(132, head_bytes=256, rows=rows)._replace(**changes)
    return Entry(**HERE, **SHAPE, rows=rows, tiles=tiles)


@pytest.fixture
def ship(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Make the package's table that of a GPU which is not here."""
    monkeypatch.setattr(tile_table, "n_processors", lambda device: HERE["processors"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: HERE["gpu"])

    def shipping(*entries: Entry) -> None:
        tile_table._tiles_on.cache_clear()
        monkeypatch.setattr(tile_table, "_shipped", lambda: list(entries))

    yield shipping
    tile_table._tiles_on.cache_clear()


def test_the_shipped_table_is_valid_and_as_the_bench_writes_it(tmp_path: Path) -> None:
    entries = read_table(TABLE)
    write_table(tmp_path / "again.json", entries)
    assert (tmp_path / "again.json").read_bytes() == TABLE.read_bytes()


def test_a_table_comes_back_from_its_file_sorted(tmp_path: Path) -> None:
    path = tmp_path / "made" / "tiles.json"
    entries = [entry(128), entry(8), entry(32, warps=4)]
    write_table(path, entries)
    assert read_table(path) == sorted(entries)
    assert [json.loads(line.strip(",\n "))["rows"] for line in path.read_text().splitlines()[1:-1]] == [8, 32, 128]


def test_without_an_entry_the_rule_decides(ship: Callable[..., None]) -> None:
    ship()
    assert tiles_for(CUDA, rows=8, **SHAPE) == BY_RULE
    ship(entry(8, warps=4))
    for other in ({"head_bytes": 128}, {"group": 5}, {"kept_tokens": 4096}):
        assert tiles_for(CUDA, rows=8, **{**SHAPE, **other}) == rule(132, head_bytes=256, rows=8)
    assert find([entry(8)], **{**HERE, "gpu": "another"}, rows=8, **SHAPE) is None
    assert find([entry(8)], **{**HERE, "processors": 114}, rows=8, **SHAPE) is None


def test_a_measured_shape_has_its_own_settings_and_a_cpu_the_interpreters(ship: Callable[..., None]) -> None:
    ship(entry(8, warps=4), entry(32, score_words=4096))
    assert tiles_for(CUDA, rows=8, **SHAPE) == BY_RULE._replace(warps=4)
    assert tiles_for(CUDA, rows=32, **SHAPE).score_words == 4096
    # The kernel, too, rounds candidates up to a power of two
    assert tiles_for(CUDA, rows=8, **{**SHAPE, "kept_tokens": 4160}) == BY_RULE._replace(warps=4)
    assert tiles_for(torch.device("cpu"), rows=8, **SHAPE) == INTERPRETED


@pytest.mark.parametrize(
    ("rows", "serves", "programs"),
    [(4, None, 16), (5, 8, 16), (8, 8, 16), (9, 32, 14), (16, 32, 8), (32, 32, 4), (64, 128, 2), (100, 128, 1),
     (128, 128, 1), (129, None, 1)],
)  # fmt: skip
def test_other_rows_take_the_nearest_and_as_many_programs_in_all(
    rows: int, serves: int | None, programs: int, ship: Callable[..., None]
) -> None:
    # Told apart by their words
    words = {8: 1024, 32: 2048, 128: 4096}
    ship(*(entry(n, score_words=words[n]) for n in words))
    got = tiles_for(CUDA, rows=rows, **SHAPE)
    assert got.score_words == (8192 if serves is None else words[serves])
    assert got.programs == programs


@given(
    st.dictionaries(st.integers(1, 300), st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 400),
    st.sampled_from((78, 114, 132)),
)
def test_programs_that_wait_for_one_another_always_run_at_once(
    measured: dict[int, int], rows: int, processors: int
) -> None:
    entries = [
        Entry("a GPU", processors, **SHAPE, rows=n, tiles=BY_RULE._replace(programs=max(1, min(p, processors // n))))
        for n, p in measured.items()
    ]
    got = find(entries, gpu="a GPU", processors=processors, rows=rows, **SHAPE)
    inside = padded(min(measured)) <= padded(rows) <= padded(max(measured))
    assert (got is not None) == inside
    for tiles in (got or BY_RULE._replace(programs=1), rule(processors, head_bytes=256, rows=rows)):
        assert why_invalid(tiles, rows=rows, processors=processors) is None


GIVEN = json.loads(json.dumps(entry(32)._asdict() | {"tiles": entry(32).tiles._asdict()}))


@pytest.mark.parametrize(
    ("changes", "tiles", "text"),
    [
        ({"speed": 1}, {}, r"entry: missing \[\], unknown \['speed'\]"),
        ({}, {"cluster": 2}, r"tiles: missing \[\], unknown \['cluster'\]"),
        ({"rows": None}, {}, "rows: expected a positive integer, got None"),
        ({"gpu": 90}, {}, "gpu: expected a name, got 90"),
        ({"tiles": 3}, {}, "tiles: expected an object, got 3"),
        ({"kept_tokens": 8000}, {}, "kept_tokens: expected a power of two, got 8000"),
        ({}, {"warps": 6}, "warps: expected a power of two, got 6"),
        ({}, {"score_stages": 0}, "score_stages: expected a positive integer, got 0"),
        ({}, {"programs": True}, "programs: expected a positive integer, got True"),
        ({}, {"attend_tile": 8}, "attend_tile: expected at least 16, the least of a matrix product, got 8"),
        ({}, {"choose": 1024}, "choose: expected 2048, 8 a thread of 8 warps, to 16384, got 1024"),
        ({}, {"choose": 32768}, "choose: expected 2048, 8 a thread of 8 warps, to 16384, got 32768"),
        (
            {},
            {"programs": 9},
            "entry 2: programs: 9 for each of 16 rows wait for one another, and only 132 run at once, one a processor; "
            "expected at most 8",
        ),
    ],
)
def test_an_entry_that_cannot_be_is_refused(
    changes: dict[str, Any], tiles: dict[str, Any], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([GIVEN, {**GIVEN, "rows": 16, "tiles": {**GIVEN["tiles"], **tiles}, **changes}]))
    with pytest.raises(ValueError, match=text):
        read_table(path)


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text("[")
    with pytest.raises(ValueError, match=r"tiles\.json: expected JSON"):
        read_table(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tiles\.json: expected a list of entries, got dict"):
        read_table(path)
    path.write_text(json.dumps([GIVEN, GIVEN]))
    with pytest.raises(ValueError, match=r"entry 2: expected one a shape, got a second of \('a GPU', 132, 256, 4"):
        read_table(path)


def test_settings_are_forced_inside_a_context_alone() -> None:
    other = INTERPRETED._replace(warps=8)
    with forced(other):
        assert tiles_for(torch.device("cpu"), rows=8, **SHAPE) == other
    assert tiles_for(torch.device("cpu"), rows=8, **SHAPE) == INTERPRETED


def test_a_traced_launch_has_the_outputs_of_its_settings(ship: Callable[..., None]) -> None:
    """Scores have room for whole chunks, which depend on the settings: traced and launched must look up alike."""
    ship(entry(8, choose=4096))
    with FakeTensorMode():
        q = torch.empty(1, 32, 1, 128, dtype=torch.bfloat16, device="cuda")
        codes = torch.empty(1, 8, 4, 5000 * 64, dtype=torch.int32, device="cuda")
        columns = torch.empty(1, 8, 128, 32, device="cuda")
        low = torch.empty(1, 8, 32, device="cuda")
        counters = torch.zeros(3, 8, dtype=torch.int32, device="cuda")
        lens = torch.empty(1, dtype=torch.int64, device="cuda")
        scores = choose(
            q, lens, codes, columns, low, low, counters, [4] * 4, 64, 128, 64, 64, 0.1, 32, "max", "softmax_mean"
        )[3]
    # 5,000 blocks in three chunks of 2,048: the second of 4,096 would be less than half full; by the rule one of 8,192
    assert scores.shape == (8, 4, 6144)


@pytest.mark.skipif(DEVICE == "cuda", reason="settings of a few candidates are the interpreter's")
def test_the_op_of_level_1_is_registered_as_pytorch_wants_it_in_several_chunks() -> None:
    case = make(CFG, lens=[1100], s=1120, hkv=1, group=2, d=16)
    index = case.index()
    labels = index.labels
    with forced(INTERPRETED._replace(choose=32, programs=1)):
        torch.library.opcheck(
            choose,
            (case.q, index.seq_lens, labels.codes, labels.to_query, labels.low, labels.step, index.arrivals,
             labels.words, 32, 8, 16, 40, 0.25, 16, "max", "softmax_mean"),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@st.composite
def candidates(draw: st.DrawFn) -> Tiles:
    values = {name: draw(st.sampled_from(values or (1, 2, 3))) for name, values in COORDINATES.items()}
    return Tiles(**values)


# Interpreted kernels take a second a case: a failure is reported as drawn, not shrunk
@settings(max_examples=4, phases=(Phase.explicit, Phase.generate))
@given(candidates(), st.sampled_from((None, 100)))
def test_no_setting_that_tuning_tries_changes_the_result(tiles: Tiles, token_budget: int | None) -> None:
    cfg = dataclasses.replace(CFG, token_budget=token_budget)
    case = make(cfg, lens=[330, 65], s=330, hkv=1, group=2, d=16, device=DEVICE)
    # What does not fit a GPU's shared memory, tuning leaves out as well
    with forced(tiles), contextlib.suppress(OutOfResources):
        check(case)


@pytest.mark.cuda
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("block_reduce", ["max", "logsumexp"])
def test_every_setting_of_the_table_runs_in_other_configurations(block_size: int, block_reduce: Any) -> None:
    """What was measured with default budgets must also fit the shared memory and registers of what was not."""
    gpu = torch.cuda.get_device_name()
    entries = [entry for entry in read_table(TABLE) if entry.gpu == gpu]
    if not entries:
        pytest.skip(f"the table has no entry of {gpu}")
    for measured in entries:
        kept = measured.kept_tokens
        for tokens, dtype in ((1024, torch.bfloat16), (None, torch.bfloat16), (1024, torch.float32)):
            cfg = tls.TLSConfig(
                block_size=block_size, block_budget=kept, token_budget=tokens, block_reduce=block_reduce
            )
            d = measured.head_bytes // dtype.itemsize
            case = make(cfg, lens=[2 * kept], s=2 * kept, hkv=1, group=measured.group, d=d, dtype=dtype, device="cuda")
            with forced(measured.tiles):
                check(case)
