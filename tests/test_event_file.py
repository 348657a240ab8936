"""TensorBoard's event files: in an order of their own, cut to a checkpoint, with errors that name the file."""

from __future__ import annotations

import os
import resource

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from mlframework.errors import UserError
from mlframework.training.event_file import EventFile, cut_events, event_files


def point(value: float) -> Summary:
    return Summary(value=[Summary.Value(tag="loss", simple_value=value)])


def written(folder, steps, start=None) -> EventFile:
    events = EventFile(folder, start=start)
    for step in steps:
        events.add(point(float(step)), step)
    events.close()
    return events


def steps_in(path) -> list[int]:
    """The steps of the points in a file, as TensorBoard reads them."""
    return [event.step for event in EventFileLoader(str(path)).Load() if event.HasField("summary")]


@pytest.mark.parametrize("killed", [0, 1, 7, 20])
def test_events_are_cut_to_the_checkpoint(tmp_path, killed):
    """The writer was killed some bytes before the end of its last record."""
    first = written(tmp_path, range(1, 8), start=0).path
    second = written(tmp_path, range(5, 10), start=4).path
    second.write_bytes(second.read_bytes()[: second.stat().st_size - killed])
    cut_events(tmp_path, 6)
    assert (steps_in(first), steps_in(second)) == ([1, 2, 3, 4, 5, 6], [5, 6])
    whole = second.read_bytes()
    written(tmp_path, range(7, 9), start=6)
    assert second.read_bytes() == whole
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [event.step for event in found] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_record_that_is_no_event_ends_a_file(tmp_path):
    path = written(tmp_path, range(3)).path
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(100))
    cut_events(tmp_path, 9)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, 100])
def test_a_record_that_claims_to_be_longer_than_its_file_ends_it(length, tmp_path):
    path = written(tmp_path, range(3)).path
    whole, claim = path.read_bytes(), length.to_bytes(8, "little")
    path.write_bytes(whole + claim + masked_crc32c(claim).to_bytes(4, "little") + bytes(50))
    cut_events(tmp_path, 9)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("make", [lambda path, other: path.symlink_to(other), lambda path, other: os.mkfifo(path)])
def test_what_is_no_plain_file_is_not_cut(make, tmp_path):
    other = tmp_path / "other"
    other.write_text("somebody else's")
    make(tmp_path / "events.out.tfevents.1.there", other)
    with pytest.raises(UserError, match=r"events\.out\.tfevents\.1\.there: is no plain file"):
        cut_events(tmp_path, 0)
    assert other.read_text() == "somebody else's"


def test_files_of_one_second_are_read_in_the_order_in_which_they_were_written(tmp_path):
    files = [written(tmp_path, [step]).path for step in range(5)]
    assert event_files(tmp_path) == files


def test_the_error_of_a_full_disk_names_the_file(tmp_path):
    events = EventFile(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (events.path.stat().st_size, before[1]))
    try:
        events.add(point(1.0), 1)
        with pytest.raises(OSError, match="File too large") as caught:
            events.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(events.path)
    events.close()
