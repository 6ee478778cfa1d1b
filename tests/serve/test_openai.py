"""OpenAI's own client drives the service."""

import base64
import io
import warnings

import openai
import pytest
from PIL import Image
from running import CLIP

STEPS = {"num_inference_steps": 4, "seed": 3}


@pytest.fixture
def ai(server):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # OpenAI retired its own videos; the routes live on
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
            yield client


def size_of(data):
    return Image.open(io.BytesIO(data)).size


def test_models(ai):
    (model,) = ai.models.list()
    assert model.id == "tiny-wan" and ai.models.retrieve("tiny-wan") == model
    with pytest.raises(openai.NotFoundError) as raised:
        ai.models.retrieve("gpt-image-1")
    assert raised.value.code == "model_not_found"


def test_images_as_bytes_and_as_links(ai, http):
    made = ai.images.generate(prompt="a red fox", n=2, size="32x32", extra_body=STEPS)
    pictures = [base64.b64decode(item.b64_json) for item in made.data]
    assert [size_of(picture) for picture in pictures] == [(32, 32)] * 2 and made.size == "32x32"
    linked = ai.images.generate(prompt="a red fox", n=2, size="32x32", response_format="url", extra_body=STEPS)
    assert [http.get(item.url).content for item in linked.data] == pictures
    jpeg = ai.images.generate(prompt="a", size="32x32", output_format="jpeg", extra_body=STEPS)
    assert base64.b64decode(jpeg.data[0].b64_json).startswith(b"\xff\xd8") and jpeg.output_format == "jpeg"


def test_a_stream_shows_the_picture_as_it_comes(ai):
    extra = STEPS | {"num_inference_steps": 8}
    stream = ai.images.generate(prompt="a fox", size="32x32", stream=True, partial_images=3, extra_body=extra)
    seen = list(stream)
    assert [event.type for event in seen] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in seen[:-1]] == [0, 1, 2]
    assert len({event.b64_json for event in seen}) == 4
    assert all(size_of(base64.b64decode(event.b64_json)) == (32, 32) for event in seen)


def test_videos_from_create_to_delete(ai):
    extra = {"num_frames": "5", "num_inference_steps": "4", "seed": "3", "priority": "high"}
    video = ai.videos.create_and_poll(prompt="a fox", size="32x32", extra_body=extra)
    assert video.status == "completed" and video.progress == 100 and video.size == "32x32" and video.error is None
    assert ai.videos.download_content(video.id).read()[4:8] == b"ftyp"
    assert size_of(ai.videos.download_content(video.id, variant="thumbnail").read()) == (32, 32)
    others = [ai.videos.create(prompt="b", size="32x32", extra_body=extra).id for _ in range(3)]
    assert {video.id, *others} <= {item.id for item in ai.videos.list(limit=2)}  # the client turns the pages
    assert ai.videos.retrieve(video.id).id == video.id
    deleted = ai.videos.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        ai.videos.retrieve(video.id)


def test_seconds_become_frames_and_polling_is_told_when(ai, http):
    answer = http.post("/v1/videos", json={"prompt": "a", "size": "32x32", "seconds": "0.5", **STEPS})
    frames = {"num_frames": 9}  # half a second at 16 a second is 8, and the next that the model makes is 9
    assert answer.json()["seconds"] == f"{frames['num_frames'] / 16:g}"
    assert 200 <= int(answer.headers["openai-poll-after-ms"]) <= 5000
    http.delete(f"/v1/jobs/{answer.json()['id']}")


def test_unfinished_videos_have_no_content(ai, http):
    job = http.post("/v1/videos", json={"prompt": "a", **CLIP}).json()
    with pytest.raises(openai.NotFoundError) as raised:
        ai.videos.download_content(job["id"])
    assert raised.value.code == "no_content"
    http.delete(f"/v1/jobs/{job['id']}")


def test_errors_are_those_the_client_knows(ai):
    with pytest.raises(openai.BadRequestError) as raised:
        ai.images.generate(prompt="a", size="33x32")
    assert raised.value.param == "size" and raised.value.code == "invalid_value" and raised.value.request_id
    with pytest.raises(openai.BadRequestError):
        ai.videos.create(prompt="a", input_reference=("a.png", b"x", "image/png"))
    with pytest.raises(openai.NotFoundError):
        ai.videos.retrieve("video_none")
