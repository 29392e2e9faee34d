import builtins
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtp.data import storage
from mmtp.data.errors import DataError
from mmtp.data.storage import DiskFullError, Journal, Share, locked, write_durable


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file written lands on /dev/full, whose writes the kernel refuses for want of room."""
    monkeypatch.setattr(storage, "open", lambda path, *args, **kw: builtins.open("/dev/full", *args, **kw), raising=False)  # noqa: SIM115
    monkeypatch.setattr(storage.os, "open", lambda path, flags, mode=0o777, real=os.open: real("/dev/full", flags & ~os.O_CREAT))


def test_files_are_written_whole(tmp_path: Path) -> None:
    write_durable(tmp_path / "a", b"one")
    write_durable(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_durable(tmp_path / "a", b"one")
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(DiskFullError) as caught:
            write_durable(tmp_path / "a", b"x" * 1234)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'a'}: the disk is full (1,234 bytes are to be written, ")
    assert text.endswith(" bytes are free); what is written so far is kept: make room and run the same command again")
    assert (tmp_path / "a").read_bytes() == b"one"


def test_other_write_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x: cannot be written \(No such file or directory\)"):
        write_durable(tmp_path / "gone" / "x", b"")


ENTRIES = [{"shard": i, "reasons": {"empty": i}} for i in range(5)]


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "journal.jsonl")
    for entry in ENTRIES:
        journal.append(entry)
    return journal


def test_journal_round_trip(journal: Journal) -> None:
    assert journal.read() == (ENTRIES, [])
    assert Journal(journal.path.with_name("none")).read() == ([], [])


@given(cut=st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_a_torn_line_is_no_line(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    journal = Journal(tmp_path_factory.mktemp("journal") / "j")
    for entry in ENTRIES:
        journal.append(entry)
    data = journal.path.read_bytes()[:cut]
    journal.path.write_bytes(data)
    whole = data.count(b"\n")
    torn = [] if data.endswith(b"\n") or not data else [whole + 1]
    assert journal.read() == (ENTRIES[:whole], torn)
    journal.repair()
    assert journal.read() == (ENTRIES[:whole], [])
    journal.append(ENTRIES[-1])
    assert journal.read()[0] == [*ENTRIES[:whole], ENTRIES[-1]]


def test_every_flipped_bit_of_a_journal_is_found(journal: Journal) -> None:
    data = journal.path.read_bytes()
    for bit in range(0, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        journal.path.write_bytes(flipped)
        entries, damaged = journal.read()
        assert damaged, bit
        assert all(entry in ENTRIES for entry in entries)


def test_full_disk_leaves_the_journal(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        full_disk(patch)
        with pytest.raises(DiskFullError, match=r"journal\.jsonl: the disk is full"):
            journal.append({"shard": 9})
    assert journal.read() == (ENTRIES, [])


def test_half_written_line_is_taken_back(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(storage.os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    with pytest.raises(DiskFullError):
        journal.append({"shard": 9})
    assert journal.read() == (ENTRIES, [])


def test_io_error_is_no_full_disk(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, data: bytes) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage.os, "write", broken)
    with pytest.raises(DataError, match=r"cannot be written \(Input/output error\)") as caught:
        journal.append({"shard": 9})
    assert not isinstance(caught.value, DiskFullError)


REFUSED = "another run is writing here; wait for it, or choose another --out"


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with locked(tmp_path, Share()), pytest.raises(DataError, match=REFUSED), locked(tmp_path, Share()):
        pass
    with locked(tmp_path, Share()):
        pass


def test_shares_go_together_but_not_with_a_whole_writer(tmp_path: Path) -> None:
    with locked(tmp_path, Share(0, 2)), locked(tmp_path, Share(1, 2)):
        for share in (Share(0, 2), Share()):
            with pytest.raises(DataError, match=REFUSED), locked(tmp_path, share):
                pass


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    program = "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX); print('locked', flush=True); sys.stdin.read()"
    (tmp_path / ".lock").touch()
    command = [sys.executable, "-c", program, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(DataError, match=REFUSED), locked(tmp_path, Share()):
            pass
        process.kill()
        process.wait()
    (tmp_path / ".shard.arrow.tmp").write_bytes(b"left behind")
    with locked(tmp_path, Share()):
        assert not (tmp_path / ".shard.arrow.tmp").exists()


def test_share_must_be_one_of_its_count() -> None:
    with pytest.raises(DataError, match="shard index 2 of 2: it must be from 0 to 1"):
        Share(2, 2)
