"""Makes the archives that the zoo's recipes read, from public packages: ``python scripts/prepare_data.py OUT [--only emoji,clipart]``.

Packages come through the clients of their registries: ``npm pack`` for emoji, ``apt-get download`` and ``dpkg-deb -x`` (Debian, or a
system with its package sources) for the rest. The spoken prompts are G.722, which is decoded by PyAV (``pip install 'mmtp[video]'``).

| set | licence of what is in it |
|---|---|
| emoji | Noto: Apache-2.0; Twemoji: CC-BY 4.0 (Twitter and contributors); Fluent: MIT (Microsoft); labels: MIT (emojibase) |
| clipart | public domain (Open Clip Art Library) |
| photos | Scratch: CC-BY-SA 3.0; Lomiri wallpapers: CC0, CC-BY or CC-BY-SA, file by file in the packages' copyright files |
| prompts-en | CC-BY-SA 3.0 (Asterisk core sounds) |
| sentences-ru | BSD-like (festvox-ru) |

A sample is two files of one key, a medium and ``.json`` labels. It belongs to a split by the SHA-256 of what must not leak
(`split_of`): the code point of an emoji, the title of a drawing, the text of a recording. Train and val are written. The rest of a set
is left out, for tests whose samples no training has seen. The zoo's weights were trained on archives of the same packages and the same
form but another drawing of the splits: counts differ by some per cent from those of the cards, and what is val here may have been
train there.
"""

import argparse
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

NPM = {
    "emojibase-data": "17.0.0",
    "emoji-datasource-google": "16.0.0",
    "emoji-datasource-twitter": "16.0.0",
    "@lobehub/fluent-emoji-3d": "1.1.0",
}
RATE = 16000
CLIPART_SIDE = 128
PHOTO_SIDE = 1024
MAX_TAGS = 12
"""Drawings carry up to hundreds of tags, the last of them hardly about the picture."""


@dataclass(frozen=True)
class Sample:
    """A medium and its labels.

    Attributes:
        key: name of both files without their endings; no dot (a reader cuts the key there).
        ending: of the medium's file.
        medium: its bytes.
        labels: what the ``.json`` holds.
        concept: what must not stand in two splits.
    """

    key: str
    ending: str
    medium: bytes
    labels: dict[str, Any]
    concept: str


def split_of(concept: str, val: int, test: int) -> str:
    """The split of a concept: its SHA-256 modulo 100, the lowest for val, the next for test.

    Args:
        concept: the text that is hashed, as UTF-8.
        val: per cent of the concepts that are val.
        test: per cent that are test.
    """
    place = int.from_bytes(hashlib.sha256(concept.encode()).digest(), "big") % 100
    return "val" if place < val else "test" if place < val + test else "train"


def add_file(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file of which nothing but name and bytes is kept: equal samples make equal archives."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def add_sample(archive: tarfile.TarFile, sample: Sample) -> None:
    """Adds the medium and the labels."""
    add_file(archive, f"{sample.key}.{sample.ending}", sample.medium)
    add_file(archive, f"{sample.key}.json", json.dumps(sample.labels, ensure_ascii=False).encode())


def write_splits(out: Path, name: str, samples: Iterable[Sample], val: int, test: int) -> Counter[str]:
    """Writes ``NAME-train.tar`` and ``NAME-val.tar``; both get their names when both are whole.

    Returns:
        Samples by split, those left out for tests as well.
    """
    counts: Counter[str] = Counter()
    parts = {split: out / f"{name}-{split}.tar.part" for split in ("train", "val")}
    try:
        with ExitStack() as stack:
            archives = {split: stack.enter_context(tarfile.open(part, "w")) for split, part in parts.items()}
            for sample in samples:
                split = split_of(sample.concept, val, test)
                counts[split] += 1
                if split in archives:
                    add_sample(archives[split], sample)
        for part in parts.values():
            part.replace(part.with_suffix(""))
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    return counts


# --- packages ---


def run(command: list[str], folder: Path) -> str:
    """Output of a command; where it fails, a line that says which."""
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is not installed, and {' '.join(command)} needs it")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise SystemExit(f"{' '.join(command)}: {last}")
    return done.stdout


class Packages:
    """Folder of unpacked packages, which are downloaded when they are first asked for.

    Args:
        folder: where; packages that stand there are not downloaded again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)

    def npm(self, name: str) -> Path:
        """The files of an npm package."""
        return self._once(f"{name.replace('/', '-').lstrip('@')}-{NPM[name]}", lambda part: self._unpack_npm(name, part)) / "package"

    def debian(self, name: str) -> Path:
        """The files of a Debian package, from its root."""
        return self._once(name, lambda part: self._unpack_debian(name, part))

    def _once(self, name: str, unpack: Callable[[Path], None]) -> Path:
        done = self.folder / name
        if not done.exists():
            print(f"package {name}", flush=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as part:
                unpack(Path(part))
                (Path(part) / "files").replace(done)
        return done

    def _unpack_npm(self, name: str, part: Path) -> None:
        run(["npm", "pack", "--silent", f"{name}@{NPM[name]}"], part)
        with tarfile.open(next(part.glob("*.tgz"))) as archive:
            archive.extractall(part / "files", filter="data")

    def _unpack_debian(self, name: str, part: Path) -> None:
        run(["apt-get", "download", name], part)
        run(["dpkg-deb", "-x", next(part.glob("*.deb")).name, "files"], part)


# --- sets ---


def emoji_code(text: str) -> str:
    """A code point sequence as keys have it: small letters, no variation selectors (sources differ in where they put them)."""
    return "-".join(part for part in text.lower().split("-") if part != "fe0f")


def emoji(packages: Packages) -> Iterator[Sample]:
    """Every emoji without its skin tones, in up to three styles."""
    base = packages.npm("emojibase-data")
    groups = {int(number): name for number, name in json.loads((base / "meta/groups.json").read_text())["groups"].items()}
    labels = {entry["key"]: entry["message"] for entry in json.loads((base / "en/messages.json").read_text())["groups"]}
    styles: dict[str, dict[str, Path]] = {}
    for style, package, folder in (
        ("fluent", "@lobehub/fluent-emoji-3d", "assets"),
        ("noto", "emoji-datasource-google", "img/google/64"),
        ("twemoji", "emoji-datasource-twitter", "img/twitter/64"),
    ):
        files = sorted((packages.npm(package) / folder).iterdir())
        styles[style] = {emoji_code(file.stem): file for file in files if file.suffix in (".png", ".webp")}
    for entry in json.loads((base / "en/data.json").read_text()):
        code = emoji_code(entry["hexcode"])
        # The letters that flags are spelled with have pictures but belong to no group.
        if "group" not in entry:
            continue
        for style, files in styles.items():
            if code in files:
                about = {"caption": entry["label"], "tags": entry.get("tags", []), "group": labels[groups[entry["group"]]]}
                about |= {"style": style, "hexcode": code}
                yield Sample(f"{code}_{style}", files[code].suffix[1:], files[code].read_bytes(), about, code)


def svg_labels(data: bytes) -> tuple[str, list[str]]:
    """Title and subjects in the metadata of a drawing; nothing where it has none, or where it is not XML."""
    dublin = "{http://purl.org/dc/elements/1.1/}"
    try:
        work = next(ET.fromstring(data).iter("{http://web.resource.org/cc/}Work"), None)
    except (ET.ParseError, ValueError):
        return "", []
    if work is None:
        return "", []
    words = [" ".join((item.text or "").split()) for subject in work.iter(f"{dublin}subject") for item in subject.iter()]
    return " ".join((work.findtext(f"{dublin}title") or "").split()), list(dict.fromkeys(word for word in words if word))[:MAX_TAGS]


def on_white(picture: Image.Image, side: int) -> Image.Image:
    """A picture on a white square of that side, its transparent places white."""
    picture = picture.convert("RGBA")
    opaque = Image.new("RGBA", picture.size, "white")
    opaque.alpha_composite(picture)
    opaque = opaque.convert("RGB")
    opaque.thumbnail((side, side), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), "white")
    square.paste(opaque, ((side - opaque.width) // 2, (side - opaque.height) // 2))
    return square


def encoded(picture: Image.Image, kind: str, quality: int) -> bytes:
    """The bytes of a picture's file."""
    data = io.BytesIO()
    picture.save(data, kind, quality=quality)
    return data.getvalue()


def clipart(packages: Packages) -> Iterator[Sample]:
    """Drawings, rendered in the one package and labelled in the other; links to a drawing elsewhere are passed over."""
    pictures = packages.debian("openclipart-png") / "usr/share/openclipart/png"
    drawings = packages.debian("openclipart-svg") / "usr/share/openclipart/svg"
    for file in sorted(pictures.rglob("*.png")):
        if file.is_symlink():
            continue
        path = file.relative_to(pictures).with_suffix("").as_posix()
        drawing = drawings / f"{path}.svg"
        title, tags = svg_labels(drawing.read_bytes()) if drawing.is_file() else ("", [])
        with Image.open(file) as picture:
            medium = encoded(on_white(picture, CLIPART_SIDE), "WEBP", 90)
        key = hashlib.sha256(path.encode()).hexdigest()[:16]
        yield Sample(key, "webp", medium, {"caption": title, "tags": tags, "path": path}, title.lower() or path)


def photos(packages: Packages) -> Iterator[Sample]:
    """Photographs, captioned by the names of their files."""
    scratch = packages.debian("scratch") / "usr/share/scratch/Media/Backgrounds"
    files = [("scratch", file) for file in sorted(scratch.rglob("*")) if file.suffix in (".jpg", ".png")]
    for package in ("lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04"):
        files += [("lomiri", file) for file in sorted((packages.debian(package) / "usr/share/backgrounds").glob("*.jpg"))]
    for source, file in files:
        name = re.sub(r"[^0-9A-Za-z]+", "-", file.stem)
        with Image.open(file) as picture:
            picture = picture.convert("RGB")
            picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
            medium = encoded(picture, "JPEG", 95)
        key = f"{source}_png_{name}" if file.suffix == ".png" else f"{source}_{name}"
        # Pictures of a series differ in the number at their ends.
        yield Sample(key, "jpg", medium, {"caption": name.replace("-", " "), "source": source}, name.lower().rstrip("-0123456789"))


def flac(samples: np.ndarray) -> bytes:
    """Bytes of a FLAC file of int16 samples ``[n]`` at 16 kHz."""
    data = io.BytesIO()
    soundfile.write(data, samples, RATE, format="FLAC", subtype="PCM_16")
    return data.getvalue()


def spoken(key: str, samples: np.ndarray, text: str, speaker: str, language: str) -> Sample:
    """The sample of a recording; one text said twice stays in one split."""
    labels = {"text": text, "sample_rate": RATE, "speaker": speaker, "language": language}
    return Sample(key, "flac", flac(samples), labels, " ".join(re.findall(r"\w+", text.lower())))


def prompt_texts(transcript: str) -> dict[str, str]:
    """Name and text of the prompts that are speech: lines ``name: text``; tones stand in brackets, remarks after ``;``."""
    lines = (line.partition(":") for line in transcript.splitlines() if not line.startswith(";"))
    texts = {name.strip(): text.strip() for name, _, text in lines}
    return {name: text for name, text in texts.items() if text and not re.fullmatch(r"\[.*\]", text)}


def prompts_en(packages: Packages) -> Iterator[Sample]:
    """Prompts of a telephone exchange."""
    try:
        import av  # an extra, which only this set needs
    except ImportError:
        raise SystemExit("prompts-en: G.722 is decoded by PyAV, which is not installed; pip install 'mmtp[video]'") from None
    transcript = packages.debian("asterisk-core-sounds-en") / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    sounds = packages.debian("asterisk-core-sounds-en-g722") / "usr/share/asterisk/sounds/en_US_f_Allison"
    for name, text in sorted(prompt_texts(gzip.decompress(transcript.read_bytes()).decode("utf-8", "replace")).items()):
        file = sounds / f"{name}.g722"
        if file.is_file():
            with av.open(str(file), format="g722") as recording:
                frames = [frame.to_ndarray().ravel() for frame in recording.decode(audio=0)]
            yield spoken(name.replace("/", "__"), np.concatenate(frames), text, "allison", "en")


def festival_texts(prompts: str) -> dict[str, str]:
    """Name and text of Festival's prompts: lines ``( name "text" )``."""
    return dict(re.findall(r'^\(\s*(\S+)\s+"(.*)"\s*\)\s*$', prompts, re.MULTILINE))


def sentences_ru(packages: Packages) -> Iterator[Sample]:
    """Sentences of a novel, read aloud."""
    voice = packages.debian("festvox-ru") / "usr/share/festival/voices/russian/msu_ru_nsh_clunits"
    for name, text in sorted(festival_texts((voice / "etc/txt.done.data").read_text(encoding="utf-8")).items()):
        file = voice / f"wav/{name}.wav"
        if file.is_file():
            yield spoken(name, soundfile.read(file, dtype="int16")[0], text, "nsh", "ru")


SETS: dict[str, tuple[Callable[[Packages], Iterator[Sample]], int, int]] = {
    "emoji": (emoji, 6, 7),
    "clipart": (clipart, 8, 3),
    "photos": (photos, 22, 0),
    "prompts-en": (prompts_en, 6, 6),
    # Half an hour of one voice is what the recipes were made with: most of the recordings stay unseen.
    "sentences-ru": (sentences_ru, 2, 53),
}
"""What makes a set, and the per cent of its concepts that are val and test; the shares are those of the archives the zoo was trained on."""


def main() -> None:
    """Reads the command line and makes the archives."""
    parser = argparse.ArgumentParser(description="Makes the archives that the zoo's recipes read, from public packages.")
    parser.add_argument("out", type=Path, help="folder for the archives")
    parser.add_argument("--only", default=",".join(SETS), help="sets to make, with commas between (default: all of %(default)s)")
    parser.add_argument("--packages", type=Path, help="folder that keeps the packages for another run (default: removed at the end)")
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in SETS]:
        parser.error(f"--only: no set {unknown[0]!r}; there are {', '.join(SETS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as passing:
        packages = Packages(options.packages or Path(passing))
        for name in names:
            make, val, test = SETS[name]
            counts = write_splits(options.out, name, make(packages), val, test)
            print(f"{name}: {counts['train']} train, {counts['val']} val, {counts['test']} left out", flush=True)


if __name__ == "__main__":
    main()
