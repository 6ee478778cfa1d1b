import hashlib
import io
import json
import tarfile

import pytest

from smartdiff_jax.errors import InvalidConfig, SmartdiffError
from smartdiff_jax.training.data import sources


def tarball(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_every_package_is_pinned_to_a_version_a_checksum_and_a_licence():
    for package in sources.PACKAGES:
        assert len(package.sha256) == 64 and package.licence in {"MIT", "Apache-2.0"}
        assert package.version[0].isdigit()
    assert sources.FLUENT_3D.filename == "lobehub-fluent-emoji-3d-1.1.0.tgz"


@pytest.mark.parametrize("name", ["man technologist", "paperclip", "linked paperclips", "video game", "joystick", "window"])
def test_pictures_microsoft_did_not_open_are_refused(name):
    assert not sources.is_open_licensed(name, "Objects")


def test_flags_are_refused_and_ordinary_pictures_are_not():
    assert not sources.is_open_licensed("chequered flag", "Flags")
    assert sources.is_open_licensed("dog face", "Animals & Nature")


def test_slug_is_the_iconify_name():
    assert sources.slug("Woman’s hat") == "womans-hat"
    assert sources.slug("ice cream") == "ice-cream"
    assert sources.Subject("❤️", "red heart", "", ()).code_points == "2764-fe0f"


def test_fetch_accepts_the_pinned_tarball_and_refuses_another(tmp_path):
    path = tarball(tmp_path / "thing-1.0.0.tgz", {"a.json": b"{}"})
    good = sources.Package("thing", "1.0.0", hashlib.sha256(path.read_bytes()).hexdigest(), "MIT")
    assert sources.fetch(tmp_path, [good]) == {good: path}
    with pytest.raises(InvalidConfig, match="pinned SHA-256"):
        sources.fetch(tmp_path, [sources.Package("thing", "1.0.0", "0" * 64, "MIT")])


def test_missing_npm_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.shutil, "which", lambda _: None)
    with pytest.raises(SmartdiffError, match="npm was not found.*thing-1.0.0.tgz"):
        sources.fetch(tmp_path, [sources.Package("thing", "1.0.0", "0" * 64, "MIT")])


def test_subjects_are_named_drawn_and_open(tmp_path):
    emoji = {"🐶": ("dog face", "Animals & Nature"), "📎": ("paperclip", "Objects"), "🏁": ("chequered flag", "Flags")}
    emoji |= {"🐱": ("cat face", "Animals & Nature"), "🐭": ("mouse face", "Animals & Nature")}
    names = json.dumps({e: {"name": n, "group": g} for e, (n, g) in emoji.items()}).encode()
    flat = json.dumps({"icons": {sources.slug(n): {} for e, (n, _) in emoji.items() if e != "🐱"}}).encode()
    drawn = {f"assets/{sources.Subject(e, '', '', ()).code_points}.webp": b"" for e in emoji if e != "🐭"}
    tarballs = {
        sources.EMOJI_NAMES: tarball(tmp_path / "names.tgz", {"data-by-emoji.json": names}),
        sources.EMOJI_KEYWORDS: tarball(
            tmp_path / "words.tgz", {"dist/emoji-en-US.json": json.dumps({"🐶": ["woof"]}).encode()}
        ),
        sources.FLUENT_FLAT: tarball(tmp_path / "flat.tgz", {"icons.json": flat}),
        sources.FLUENT_3D: tarball(tmp_path / "3d.tgz", drawn),
    }
    assert sources.subjects(tarballs) == [sources.Subject("🐶", "dog face", "Animals & Nature", ("woof",))]
    with pytest.raises(InvalidConfig, match="no such file"):
        sources.read_json(tarballs[sources.FLUENT_FLAT], "missing.json")
