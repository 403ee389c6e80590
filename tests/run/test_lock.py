"""A folder, a lock or a piece on a disk that is full or may not be written to: a message, no traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from taught.errors import UserError
from taught.run import files
from taught.run.folder import RunFolder
from taught.run.pieces import PartialFolder

FULL = OSError(errno.ENOSPC, "No space left on device")
REFUSED = PermissionError(errno.EACCES, "Permission denied")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")
ERRORS = pytest.mark.parametrize(
    ("error", "message"), [(FULL, "no space left to write"), (REFUSED, "cannot be written"), (READ_ONLY, "Read-only")]
)


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.fixture
def pieces(tmp_path) -> PartialFolder:
    return PartialFolder(tmp_path / "run" / "partial" / "attribute-0123")


# The lock


@ERRORS
def test_a_stage_in_a_folder_that_cannot_be_written_ends_as_the_users_mistake(
    tmp_path, study, monkeypatch, error, message
):
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(os, "open", raising(error))
    with pytest.raises(UserError, match=message) as caught, run.stage("readings", study):
        pytest.fail("the stage began")
    assert caught.value.exit_code == 2


def test_an_error_of_what_the_lock_protects_is_not_taken_for_one_of_the_lock(tmp_path):
    with pytest.raises(OSError, match="broken disk"), RunFolder(tmp_path / "run").locked():
        raise OSError(errno.EIO, "broken disk")


def test_two_never_hold_it_and_afterwards_it_is_free(tmp_path):
    one, other = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    with one.locked(), pytest.raises(UserError, match="another command is writing"), other.locked():
        pytest.fail("two hold it")
    with other.locked():
        pass


# Pieces


@ERRORS
def test_a_folder_of_pieces_that_cannot_be_made_is_the_users_to_change(pieces, monkeypatch, error, message):
    monkeypatch.setattr(Path, "mkdir", raising(error))
    with pytest.raises(UserError, match=message) as caught:
        pieces.save("batch-0", {"x": np.ones(3)})
    assert str(pieces.path) in str(caught.value)


def test_a_full_disk_names_both_sizes_although_the_folder_is_not_there_yet(pieces, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", raising(FULL))
    with pytest.raises(UserError, match="no space left") as caught:
        pieces.save("batch-0", {"x": np.ones(3)})
    needed = len(files.tensors_bytes({"x": np.ones(3)}))
    assert f"{needed} bytes needed" in str(caught.value)
    assert "bytes free" in str(caught.value)


@ERRORS
def test_a_piece_that_cannot_be_written_is_the_users_to_change(pieces, monkeypatch, error, message):
    monkeypatch.setattr(os, "fsync", raising(error))
    with pytest.raises(UserError, match=message):
        pieces.save("batch-0", {"x": np.ones(3)})
    assert not list(pieces.path.glob("*.safetensors"))


# Files


def test_a_disk_that_refuses_the_clean_up_too_does_not_hide_the_reason(tmp_path, monkeypatch):
    """On a read-only disk, deleting a file that is not there is an error as well."""
    monkeypatch.setattr(os, "fsync", raising(FULL))
    monkeypatch.setattr(Path, "unlink", raising(READ_ONLY))
    with pytest.raises(UserError, match="no space left"):
        files.write_bytes(tmp_path / "table", b"x")
    files.remove_temporaries(tmp_path)
