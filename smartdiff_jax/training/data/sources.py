"""The pinned npm packages that the training data is drawn from, and the licence filter over them.

Pictures: Fluent Emoji (Microsoft, MIT) in 3-D and flat, Noto Emoji (Google, Apache-2.0). Animations: Fluent animated
(Microsoft, MIT). Names and keywords: unicode-emoji-json and emojilib (MIT). Each tarball is fetched by the machine's own
`npm pack` at an exact version and must have the SHA-256 written here.

The LobeHub repackaging of Fluent 3-D contains pictures that Microsoft did not open (national flags, technologist, the
paperclip, video games, window). `is_open_licensed` drops them by group and name; `subjects` also keeps only names that are
in the MIT set published by Iconify.
"""

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from smartdiff_jax.errors import InvalidConfig, SmartdiffError


@dataclass(frozen=True)
class Package:
    """One npm package at one version; `sha256` is of the tarball that `npm pack` writes."""

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def filename(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "MIT"
)
FLUENT_FLAT = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    "MIT",
)
NOTO = Package("@iconify-json/noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad", "Apache-2.0")
EMOJI_NAMES = Package("unicode-emoji-json", "0.9.0", "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401", "MIT")
EMOJI_KEYWORDS = Package("emojilib", "4.0.3", "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303", "MIT")
FLUENT_ANIMATED = tuple(
    Package(f"@lobehub/fluent-emoji-anim-{number}", "1.0.0", sha256, "MIT")
    for number, sha256 in enumerate(
        (
            "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea",
            "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0",
            "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43",
            "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3",
        ),
        start=1,
    )
)
PACKAGES = (FLUENT_3D, FLUENT_FLAT, NOTO, EMOJI_NAMES, EMOJI_KEYWORDS, *FLUENT_ANIMATED)

NOT_OPENED = re.compile(r"technologist|paperclip|video game|joystick|window")


@dataclass(frozen=True)
class Subject:
    """One emoji of the open-licensed set: its characters, CLDR name, Unicode group and emojilib keywords."""

    emoji: str
    name: str
    group: str
    keywords: tuple[str, ...]

    @property
    def code_points(self) -> str:
        """The file stem in the raster packs, such as `2764-fe0f`."""
        return "-".join(f"{ord(character):04x}" for character in self.emoji)

    @property
    def slug(self) -> str:
        """The icon name in the Iconify packs, such as `dog-face`."""
        return slug(self.name)


def slug(name: str) -> str:
    """The Iconify icon name of a CLDR name: apostrophes vanish, everything else that is no letter or digit is a hyphen."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['’]", "", name.lower())).strip("-")


def is_open_licensed(name: str, group: str) -> bool:
    """Whether Microsoft opened this picture: no flags, technologists, paperclip, video games, joystick or window."""
    return group != "Flags" and NOT_OPENED.search(name.lower()) is None


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(cache_dir: Path, packages: Collection[Package] = PACKAGES) -> dict[Package, Path]:
    """Puts every tarball into `cache_dir` and checks it; one that is there already is only checked.

    Raises `SmartdiffError` if npm is missing or fails, `InvalidConfig` if a tarball is not the pinned one.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    paths = {}
    for package in packages:
        path = cache_dir / package.filename
        if not path.exists():
            _npm_pack(package, cache_dir)
        found = checksum(path)
        if found != package.sha256:
            raise InvalidConfig(str(path), found, f"the pinned SHA-256 is {package.sha256}; delete the file and try again")
        paths[package] = path
    return paths


def _npm_pack(package: Package, cache_dir: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise SmartdiffError(
            f"npm was not found, and {package.filename} is not in {cache_dir}: install Node.js, or put the tarball there"
        )
    wanted = f"{package.name}@{package.version}"
    done = subprocess.run([npm, "pack", wanted], cwd=cache_dir, capture_output=True, text=True)
    if done.returncode != 0:
        raise SmartdiffError(f"npm pack {wanted} failed with {done.returncode}: {done.stderr.strip()[-500:]}")


def members(tarball: Path, suffix: str = "") -> Iterator[tuple[str, bytes]]:
    """(path inside the package, content) of every file whose path ends in `suffix`, in the archive's order."""
    with tarfile.open(tarball) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(suffix):
                file = archive.extractfile(member)
                assert file is not None  # isfile() holds
                yield member.name.removeprefix("package/"), file.read()


def read_json(tarball: Path, path: str) -> dict:
    """One JSON file of a package."""
    for name, content in members(tarball, path):
        if name == path:
            return json.loads(content)
    raise InvalidConfig(tarball.name, path, "the package has no such file; is this the pinned version?")


def subjects(tarballs: dict[Package, Path]) -> list[Subject]:
    """Every base emoji that is open-licensed, named in the MIT flat set, and drawn in 3-D (1523 of them)."""
    names = read_json(tarballs[EMOJI_NAMES], "data-by-emoji.json")
    keywords = read_json(tarballs[EMOJI_KEYWORDS], "dist/emoji-en-US.json")
    flat = read_json(tarballs[FLUENT_FLAT], "icons.json")["icons"]
    drawn = {Path(name).stem for name, _ in members(tarballs[FLUENT_3D], ".webp")}
    everything = (
        Subject(emoji, entry["name"], entry["group"], tuple(keywords.get(emoji, ()))) for emoji, entry in names.items()
    )
    return [
        subject
        for subject in everything
        if is_open_licensed(subject.name, subject.group) and subject.slug in flat and subject.code_points in drawn
    ]
