"""Films: the right frames from every container, and one line for every broken one."""

from __future__ import annotations

import contextlib
import io
import struct
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vilau.processing.videos import VideoLimits, frame_indices, load_video, media_kind, save_video, to_frames

CONTAINERS = [("mp4", "libx264"), ("mov", "libx264"), ("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")]


def ramp(count: int, step: int = 4, size: tuple[int, int] = (48, 32)) -> list[Image.Image]:
    """Grey frames, each ``step`` brighter than the last."""
    return [Image.new("RGB", size, (index * step,) * 3) for index in range(count)]


def encode(name: str, codec: str, frames: list[Image.Image], **options: str) -> bytes:
    """The bytes of a film file; key frames every 10 frames, B frames where the codec has them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film"
        with av.open(str(path), "w", format=name, options=options) as container:
            stream = container.add_stream(codec, rate=8)
            stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
            stream.options = {"g": "10", "bf": "2"} if codec == "libx264" else {}
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode(None))
        return path.read_bytes()


def grey(frames: list[Image.Image]) -> list[int]:
    return [int(np.asarray(frame)[4, 4, 0]) for frame in frames]


def test_frame_rule() -> None:
    """One rule for training and inference: evenly spread, first and last included, short films repeat frames."""
    assert frame_indices(8, 8) == list(range(8))
    assert frame_indices(60, 4) == [0, 20, 39, 59]
    assert frame_indices(2, 4) == [0, 0, 1, 1]
    assert frame_indices(1, 3) == [0, 0, 0]
    assert frame_indices(9, 1) == [0]
    with pytest.raises(ValueError, match="num_frames is 0"):
        frame_indices(3, 0)


@pytest.mark.parametrize(("name", "codec"), CONTAINERS)
def test_containers_give_the_frames_of_the_rule(name: str, codec: str, tmp_path: Path) -> None:
    """Jumping to key frames must find exactly the frames that decoding everything would."""
    content = encode(name, codec, ramp(60))
    path = tmp_path / "film.bin"
    path.write_bytes(content)
    for source in (content, path):
        got = grey(load_video(source, 7))
        assert np.abs(np.array(got) - 4 * np.array(frame_indices(60, 7))).max() <= 4
    assert media_kind(path) == "video"


def test_portrait_films_stand_upright() -> None:
    """Telephones store portrait films lying down with a matrix that turns them: here, a quarter to the right."""
    lying = Image.new("RGB", (48, 32), (255, 0, 0))
    lying.paste((0, 0, 255), (24, 0, 48, 32))
    content = bytearray(encode("mp4", "libx264", [lying] * 4))
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    frame = load_video(bytes(content), 2)[1]
    assert frame.size == (32, 48)
    top, bottom = (np.asarray(frame)[row, 16].tolist() for row in (4, 44))
    assert top[0] > 200 > 60 > top[2] and bottom[2] > 200 > 60 > bottom[0]


def test_every_frame_of_a_film_can_be_asked_for() -> None:
    """Jumps and straight decoding agree at every distance between frames, across key frames and B frames."""
    content = encode("matroska", "libx264", ramp(45, step=5))
    for count in (1, 2, 3, 5, 11, 44, 45, 90):
        expected = 5 * np.array(frame_indices(45, count))
        assert np.abs(np.array(grey(load_video(content, count))) - expected).max() <= 2


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_saved_films_load_again(suffix: str, tmp_path: Path) -> None:
    """What is written is a film with these frames, whole, with odd sizes too, and nothing is left beside it."""
    path = save_video(ramp(6, 40, (33, 47)), tmp_path / f"film{suffix}", fps=4)
    got = load_video(path, 6)
    assert np.abs(np.array(grey(got)) - 40 * np.arange(6)).max() <= 5
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name] and media_kind(path) == "video"
    save_video([np.asarray(frame) for frame in ramp(2)], path)
    assert to_frames(path, 4, 16).shape == (4, 16, 16, 3)


def test_still_pictures_and_lists_as_films(tmp_path: Path) -> None:
    """A GIF of one frame repeats it; a list of pictures follows the same rule as a file."""
    still = tmp_path / "a.gif"
    ramp(2)[1].save(still)
    assert grey(load_video(still, 3)) == [4, 4, 4] and media_kind(still) == "image"
    assert grey(load_video(ramp(10), 3)) == [0, 16, 36]
    assert load_video(ramp(3), 3, size=16)[0].size == (16, 16)
    frame = np.full((16, 16, 3), 7, np.uint8)
    assert (to_frames([frame, frame], 4, 16) == 7).all()


def test_transparent_animations_lie_over_white(tmp_path: Path) -> None:
    """Animated stickers are transparent: they are seen on white as single pictures are, not on black."""
    path = tmp_path / "a.webp"
    clear = [Image.new("RGBA", (16, 16), (0, 0, 0, 0)) for _ in range(3)]
    clear[1].paste((255, 0, 0, 255), (0, 0, 8, 8))
    clear[0].save(path, save_all=True, append_images=clear[1:], lossless=True)
    frames = [np.asarray(frame) for frame in load_video(path, 3)]
    assert (frames[0] == 255).all() and frames[1][0, 0].tolist() == [255, 0, 0] and (frames[2][0, 0] == 255).all()


@pytest.mark.parametrize(("name", "codec"), [*CONTAINERS, ("webp", ""), ("gif", "")])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_truncated_films_are_refused(name: str, codec: str, share: float, tmp_path: Path) -> None:
    """A cut download is an error with the file's name, never a shorter film."""
    content = encode(name, codec, ramp(60)) if codec else save_video(ramp(20), tmp_path / f"a.{name}").read_bytes()
    path = tmp_path / "cut.film"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"cannot read .*cut\.film as a film"):
        load_video(path, 4)


def test_truncated_mp4_with_its_index_in_front_is_refused() -> None:
    """The index promises more frames than there are: the usual shape of a cut web video."""
    content = encode("mp4", "libx264", ramp(60), movflags="+faststart")
    with pytest.raises(ValueError, match="truncated"):
        load_video(content[: len(content) * 3 // 4], 4)


def test_sound_without_picture_and_foreign_files(tmp_path: Path) -> None:
    """No video stream, a still picture, a playlist, text: each refused; playlists are never followed."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16_000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 16_000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="no video stream"):
        load_video(file.getvalue(), 4)
    picture = io.BytesIO()
    ramp(1)[0].save(picture, "PNG")
    for content in (
        picture.getvalue(),
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile a.mp4\n",
        b"x",
    ):
        with pytest.raises(ValueError, match="none of mp4"):
            load_video(content, 4)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_video(tmp_path / "none.mp4", 4)
    with pytest.raises(ValueError, match="no frames"):
        load_video([], 4)


def test_limits_are_checked_before_decoding() -> None:
    """Too many frames, too long, too large: refused with the limit in the message."""
    film = encode("mp4", "libx264", ramp(40))
    for limits, words in [
        (VideoLimits(max_frames=39), "limit of 39"),
        (VideoLimits(max_seconds=4), "5 seconds long, more than the limit of 4"),
        (VideoLimits(max_pixels=1000), "48x32 pixels"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_video(film, 4, limits=limits)
    file = io.BytesIO()
    frames = ramp(40)
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    for limits, words in [
        (VideoLimits(max_frames=39), "limit of 39"),
        (VideoLimits(max_total_pixels=50_000), "40 frames of 48x32"),
    ]:
        with pytest.raises(ValueError, match=words):
            load_video(file.getvalue(), 4, limits=limits)


FILMS = {
    name: encode(name, codec, ramp(12)) for name, codec in (("mp4", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4"))
}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(FILMS)),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=12),
)
def test_damaged_films_never_raise_anything_else(name: str, damage: list[tuple[int, int]]) -> None:
    """Whatever bytes are flipped, frames or a ``ValueError`` come out."""
    content = bytearray(FILMS[name])
    for position, value in damage:
        content[position % len(content)] = value
    with contextlib.suppress(ValueError):
        assert len(load_video(bytes(content), 4)) == 4


def test_save_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    """Wrong suffix, no frames, mixed sizes, senseless fps: an error and no file."""
    for frames, name, fps, words in [
        (ramp(2), "a.avi", 8, "end it in .mp4"),
        ([], "a.mp4", 8, "no frames"),
        ([*ramp(1), *ramp(1, size=(8, 8))], "a.mp4", 8, "different sizes"),
        (ramp(2), "a.mp4", 0, "fps is 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            save_video(frames, tmp_path / name, fps)
    assert not list(tmp_path.iterdir())
