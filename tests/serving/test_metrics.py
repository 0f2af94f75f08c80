import math
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from lite_attention.serving.metrics import (
    FALLBACK_REASONS,
    THRESHOLD_BUCKETS,
    StepCounters,
    bucket_index,
    read_directory,
    register,
)


@pytest.mark.parametrize(
    ("threshold", "label"),
    [(0.0, "0"), (-6.4, "-6"), (-6.6, "-7"), (-32.0, "-32"), (-1000.0, "-32"), (-math.inf, "-32")],
)
def test_bucket_of_a_threshold(threshold: float, label: str) -> None:
    assert THRESHOLD_BUCKETS[bucket_index(threshold)] == label


def test_what_is_counted_is_read(tmp_path: Path) -> None:
    counters = StepCounters.create(tmp_path / "new" / "worker-0", slots=8)
    counters.add_rows(-7.0, 2, 30, 100)
    counters.add_rows(-7.2, 1, 5, 50)
    counters.add_fallback("dtype", 3)
    counters.set_active_slots(4)
    counters.set_active_slots(2)
    counters.set_state_bytes(700)
    counters.set_state_bytes(300)
    StepCounters.open(tmp_path / "new" / "worker-0").add_fallback("dtype", 1)
    read = counters.read()
    assert (read.slots, read.active_slots, read.state_bytes) == (8, 2, 300)
    bucket = bucket_index(-7)
    assert (read.rows[bucket], read.blocks_visited[bucket], read.blocks_total[bucket]) == (3, 35, 150)
    assert (read.rows.sum(), read.blocks_visited.sum(), read.blocks_total.sum()) == (3, 35, 150)
    assert read.fallback_rows[FALLBACK_REASONS.index("dtype")] == 4
    assert read.fallback_rows.sum() == 4


def test_errors_of_checked_rows_are_a_histogram(tmp_path: Path) -> None:
    counters = StepCounters.create(tmp_path / "worker-0", slots=8)
    for error in (0.004, 0.02, 0.03, 7.0, math.nan, math.inf):
        counters.add_error(-7.2, error)
    registry = CollectorRegistry()
    register(tmp_path, registry)
    lines = generate_latest(registry).decode().splitlines()
    assert 'lite_attn_output_error_bucket{le="0.01",threshold="-7"} 1.0' in lines
    assert 'lite_attn_output_error_bucket{le="0.02",threshold="-7"} 2.0' in lines
    assert 'lite_attn_output_error_bucket{le="0.5",threshold="-7"} 3.0' in lines
    assert 'lite_attn_output_error_bucket{le="+Inf",threshold="-7"} 6.0' in lines
    assert 'lite_attn_output_error_count{threshold="-7"} 6.0' in lines
    (total,) = (line for line in lines if line.startswith("lite_attn_output_error_sum"))
    assert math.isclose(float(total.split()[1]), 0.054 + 7 + 1000 + 1000)


def test_a_worker_that_is_gone_has_no_slots_and_no_memory(tmp_path: Path) -> None:
    counters = StepCounters.create(tmp_path / "worker-0", slots=8)
    counters.add_rows(-7.0, 2, 30, 100)
    counters.set_active_slots(1)
    counters.set_state_bytes(700)
    counters.end()
    read = read_directory(tmp_path)
    assert (read.slots, read.active_slots, read.state_bytes, read.rows.sum()) == (0, 0, 0, 2)


def test_a_reading_does_not_change_later(tmp_path: Path) -> None:
    counters = StepCounters.create(tmp_path / "worker-0", slots=1)
    before = counters.read()
    counters.add_rows(-1, 1, 1, 1)
    assert before.rows.sum() == 0


def test_directory_is_the_sum_and_tolerates_what_is_not_ours(tmp_path: Path) -> None:
    for rank in range(3):
        counters = StepCounters.create(tmp_path / f"worker-{rank}", slots=4)
        counters.add_rows(-7, 1, 10, 20)
        counters.set_active_slots(1)
        counters.set_state_bytes(3 << 40)
    whole = (tmp_path / "worker-0").read_bytes()
    (tmp_path / "partial").write_bytes(whole[:100])
    (tmp_path / "unfinished").write_bytes(bytes(len(whole)))
    (tmp_path / "of another version").write_bytes((0x4C495445_0001).to_bytes(8, "little") + whole[8:])
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    read = read_directory(tmp_path)
    assert (read.rows.sum(), read.blocks_visited.sum(), read.blocks_total.sum()) == (3, 30, 60)
    assert (read.slots, read.active_slots, read.state_bytes) == (12, 3, 9 << 40)
    assert read_directory(tmp_path / "missing").rows.sum() == 0
    with pytest.raises(ValueError, match="counter file"):
        StepCounters.open(tmp_path / "unfinished")


def test_scrape(tmp_path: Path) -> None:
    counters = StepCounters.create(tmp_path / "worker-0", slots=8)
    registry = CollectorRegistry(auto_describe=True)
    register(tmp_path / "elsewhere", registry)
    register(tmp_path, registry)
    counters.add_rows(-7.0, 2, 30, 100)
    counters.add_fallback("bad_options", 1)
    counters.set_active_slots(1)
    counters.set_state_bytes(4096)
    lines = generate_latest(registry).decode().splitlines()
    samples = [line for line in lines if not line.startswith("#") and not line.endswith(" 0.0")]
    assert samples == [
        'lite_attn_rows_total{threshold="-7"} 2.0',
        'lite_attn_blocks_visited_total{threshold="-7"} 30.0',
        'lite_attn_blocks_total{threshold="-7"} 100.0',
        'lite_attn_fallback_rows_total{reason="bad_options"} 1.0',
        "lite_attn_active_slots 1.0",
        "lite_attn_slots 8.0",
        "lite_attn_state_bytes 4096.0",
    ]
    assert "# TYPE lite_attn_blocks_total counter" in lines


SCRAPE = """
import sys
from pathlib import Path
from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest, multiprocess
from lite_attention.serving.metrics import register
Counter("other", "of the engine").inc()
for _ in range(2):
    register(Path(sys.argv[1]))
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_scrape_of_several_api_servers(tmp_path: Path) -> None:
    StepCounters.create(tmp_path / "counters" / "worker-0", slots=8).add_rows(-7.0, 2, 30, 100)
    (tmp_path / "multiproc").mkdir()
    # Prometheus reads the variable when it is imported.
    scraped = subprocess.run(
        [sys.executable, "-c", SCRAPE, str(tmp_path / "counters")],
        env={"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "multiproc"), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "other_total 1.0" in scraped
    assert scraped.count('lite_attn_rows_total{threshold="-7"} 2.0') == 1
