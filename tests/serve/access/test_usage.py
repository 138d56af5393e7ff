"""Records of what sessions used."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from serve.access.config import UsageConfig
from serve.access.usage import UsageRecord, UsageWriter
from serve.messages import Progress

PROGRESS = Progress(
    chunk_count=3, frame_count=9, byte_count=1234, dropped_frame_count=4, prompt_count=2, held_s=12.34567, denoise_s=8.5
)
RECORD = UsageRecord("5f0c", "studio", "tiny", age_s=20.0, end="CLIENT", progress=PROGRESS)


def test_a_record_is_a_line_of_json() -> None:
    line = RECORD.line(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert "\n" not in line
    assert json.loads(line) == {
        "version": 1,
        "ended_at": "2026-01-02T03:04:05.000+00:00",
        "session_id": "5f0c",
        "tenant": "studio",
        "preset": "tiny",
        "age_s": 20.0,
        "end": "CLIENT",
        "complete": True,
        "chunk_count": 3,
        "frame_count": 9,
        "byte_count": 1234,
        "dropped_frame_count": 4,
        "prompt_count": 2,
        "held_s": 12.346,
        "device_s": {"text": 0.0, "denoise": 8.5, "decode": 0.0, "encode": 0.0},
    }


def test_records_are_appended_and_the_file_may_be_rotated(tmp_path: Path) -> None:
    writers = [UsageWriter(UsageConfig(file=f"{tmp_path}/new/usage.jsonl"), name) for name in ("one", "two")]
    path = tmp_path / "new" / "usage.jsonl"
    for writer in writers:
        writer.write(RECORD)
    assert [json.loads(line)["session_id"] for line in path.read_text().splitlines()] == ["5f0c", "5f0c"]
    path.rename(tmp_path / "old")
    writers[0].write(RECORD)
    assert len(path.read_text().splitlines()) == 1


def test_each_process_may_have_a_file_of_its_own(tmp_path: Path) -> None:
    UsageWriter(UsageConfig(file=f"{tmp_path}/usage-{{process}}.jsonl"), "gateway-1").write(RECORD)
    assert (tmp_path / "usage-gateway-1.jsonl").exists()


def test_records_go_to_the_standard_output_whatever_has_taken_its_place(capfd: pytest.CaptureFixture[str]) -> None:
    UsageWriter(UsageConfig(file="-"), "gateway-1").write(RECORD)
    assert json.loads(capfd.readouterr().out)["tenant"] == "studio"


def test_a_record_that_cannot_be_written_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    UsageWriter(UsageConfig(file=f"{tmp_path}/file/usage.jsonl"), "gateway-1").write(RECORD)
    assert '"session_id":"5f0c"' in caplog.text


def test_without_a_configuration_nothing_is_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    UsageWriter(None, "gateway-1").write(RECORD)
    assert capfd.readouterr().out == ""
