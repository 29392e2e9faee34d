import io
import pickle
import tarfile
from pathlib import Path

import pytest

from mmtp.data.errors import DataError, DecodeError, Reason
from mmtp.data.sources import open_source


class Canary:
    def __reduce__(self):
        return (Path("/tmp/mmtp-canary").touch, ())


def archive(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


MEMBERS = {
    "one.png": b"png of one",
    "one.json": b'{"caption": "first"}',
    "two.jpg": b"jpg of two",
    "two.txt": b" second \n",
    "three.txt": b"no picture",
    "four.png": b"png",
    "four.json": b"{",
}


def test_members_that_share_a_stem_are_a_sample(tmp_path: Path) -> None:
    source = open_source(archive(tmp_path / "a.tar", MEMBERS))
    items = source.items()
    assert [item.key for item in items] == ["one", "two", "three", "four"]
    assert (source.read(items[0]).media, source.read(items[0]).labels) == (b"png of one", {"caption": "first"})
    assert (source.read(items[1]).media, source.read(items[1]).labels) == (b"jpg of two", {"caption": "second"})
    for item, reason, text in [(items[2], Reason.MISSING, "the sample has no image"), (items[3], Reason.BAD_LABELS, "four.json: no JSON")]:
        with pytest.raises(DecodeError) as caught:
            source.read(item)
        assert caught.value.reason is reason
        assert str(caught.value).startswith(text)


def test_patterns_and_folders_of_archives(tmp_path: Path) -> None:
    archive(tmp_path / "b.tar", {"x.png": b"2"})
    archive(tmp_path / "a.tar", {"x.png": b"1"})
    for spec in (tmp_path, tmp_path / "*.tar"):
        source = open_source(spec)
        assert [(i.key, i.file) for i in source.items()] == [("x", "a.tar"), ("x~2", "b.tar")]
        assert [source.read(i).media for i in source.items()] == [b"1", b"2"]


def test_hostile_members_are_never_followed_nor_run(tmp_path: Path) -> None:
    members = {"../up.png": b"up", "p.png": b"pic", "p.pyd": pickle.dumps(Canary()), "p.pkl": pickle.dumps(Canary())}
    source = open_source(archive(tmp_path / "a.tar", members, {"link.png": "/etc/passwd"}))
    items = source.items()
    assert [item.key for item in items] == ["../up", "p"]
    assert [source.read(item).media for item in items] == [b"up", b"pic"]
    assert not Path("/tmp/mmtp-canary").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


@pytest.mark.parametrize("keep", [700, 1100, 2600, 3700])
def test_cut_archive_is_refused(tmp_path: Path, keep: int) -> None:
    path = archive(tmp_path / "a.tar", MEMBERS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a\.tar: is cut off, damaged or compressed \(.+\); \d samples stand before that place"):
        open_source(path).items()


def test_damaged_header_is_no_end(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", MEMBERS)
    data = bytearray(path.read_bytes())
    data[1024 + 150] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"damaged header at byte 1024\); 1 samples stand before that place"):
        open_source(path).items()


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("x.png"))
    with pytest.raises(DataError, match="is cut off, damaged or compressed"):
        open_source(tmp_path / "a.tar").items()


def test_changed_archive_stops_the_run(tmp_path: Path) -> None:
    source = open_source(archive(tmp_path / "a.tar", MEMBERS))
    items = source.items()
    archive(tmp_path / "a.tar", {"zero.png": b"new", **MEMBERS})
    with pytest.raises(DataError, match=r"a\.tar: has changed or gone since the plan was made; choose another --out"):
        source.read(items[0])
