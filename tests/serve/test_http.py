"""The service over HTTP: jobs, events, errors, limits, health, metrics."""

import io
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import numpy as np
import pytest
from PIL import Image
from running import CLIP, SMALL

ENDLESS = CLIP | dict(num_outputs=64)


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def test_a_job_from_submission_to_file(http):
    made = http.post("/v1/jobs", json={"prompt": "a red fox", **SMALL, "previews": 2})
    assert made.status_code == 202, made.text
    job = made.json()
    assert job["state"] in ("queued", "running") and job["params"]["seed"] == 3 and job["model"] == "tiny-wan"
    seen = list(events(http, job["id"]))
    last = seen[-1]
    assert last["state"] == "succeeded" and last["progress"] == 1.0 and last["report"]["steps"] == ["FFFF"]
    assert [state for state in dict.fromkeys(event["state"] for event in seen) if state != "queued"] == ["running", "succeeded"]
    assert decoded(http.get(last["files"][0]).content).shape == (32, 32, 3)
    assert decoded(http.get(last["preview"]).content).shape == decoded(http.get(last["thumbnail"]).content).shape == (32, 32, 3)
    again = http.post("/v1/jobs", json={"prompt": "a red fox", **SMALL}).json()
    same = list(events(http, again["id"]))[-1]
    assert http.get(same["files"][0]).content == http.get(last["files"][0]).content
    assert http.delete(f"/v1/jobs/{job['id']}").json() == {"id": job["id"], "object": "job.deleted", "deleted": True}
    error_of(http.get(f"/v1/jobs/{job['id']}"), 404), error_of(http.get(last["files"][0]), 404)


def events(http, job_id):
    with http.stream("GET", f"/v1/jobs/{job_id}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line.removeprefix("data: "))


def test_progress_is_told_while_it_is_made(http):
    """Steps arrive one after the other, with an ETA, and not all at the end."""
    job = http.post("/v1/jobs", json={"prompt": "a", **CLIP}).json()
    seen = list(events(http, job["id"]))
    done = [event["done"] for event in seen if event["stage"] == "denoise"]
    assert len(set(done)) > 5 and done == sorted(done) and seen[-1]["done"] == 200
    assert any(event["eta_seconds"] for event in seen)


def test_a_picture_overtakes_a_long_video_and_cancel_is_prompt(http):
    video = http.post("/v1/jobs", json={"prompt": "a", **ENDLESS}).json()["id"]
    picture = http.post("/v1/jobs", json={"prompt": "b", **SMALL}).json()["id"]
    assert list(events(http, picture))[-1]["state"] == "succeeded"
    assert http.get(f"/v1/jobs/{video}").json()["state"] == "running"
    assert [job["id"] for job in http.get("/v1/jobs", params={"state": "running"}).json()["data"]] == [video]
    began = time.monotonic()
    http.post(f"/v1/jobs/{video}/cancel")
    assert list(events(http, video))[-1]["state"] == "cancelled" and time.monotonic() - began < 2.0
    assert http.post(f"/v1/jobs/{video}/cancel").json()["state"] == "cancelled"


def test_deleting_a_running_job_stops_it(http):
    job = http.post("/v1/jobs", json={"prompt": "a", **ENDLESS}).json()["id"]
    assert http.delete(f"/v1/jobs/{job}").status_code == 200
    error_of(http.get(f"/v1/jobs/{job}"), 404)
    until = time.monotonic() + 10
    while 'smartdiff_running_jobs{model="tiny-wan"} 0.0' not in http.get("/metrics").text:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_unfinished_job_changes_its_priority_and_a_finished_one_does_not(http):
    long = http.post("/v1/jobs", json={"prompt": "a", **ENDLESS}).json()["id"]
    changed = http.patch(f"/v1/jobs/{long}", json={"priority": "low"}).json()
    assert changed["priority"] == "low"
    http.post(f"/v1/jobs/{long}/cancel")
    list(events(http, long))
    assert error_of(http.patch(f"/v1/jobs/{long}", json={"priority": "high"}), 409)["code"] == "job_ended"


def test_one_key_makes_one_job(http):
    body, headers = {"prompt": "a", **SMALL}, {"Idempotency-Key": "once"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: http.post("/v1/jobs", json=body, headers=headers), range(8)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [202]
    conflict = http.post("/v1/jobs", json=body | {"seed": 4}, headers=headers)
    assert error_of(conflict, 409)["code"] == "idempotency_conflict" and conflict.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    "path, body, param, words",
    [
        ("/v1/jobs", {"prompt": "a", "size": "33x32"}, "size", "32x32"),
        ("/v1/jobs", {"prompt": "a", "num_inference_steps": 0}, "num_inference_steps", "greater"),
        ("/v1/jobs", {"prompt": "a", "sede": 1}, "sede", "Extra"),
        ("/v1/jobs", {}, "prompt", "required"),
        ("/v1/jobs", {"prompt": "a" * 20_001}, "prompt", "20000"),
        ("/v1/jobs", {"prompt": "a", "model": "../../etc"}, "model", "tiny-wan"),
        ("/v1/jobs", {"prompt": "a", "size": "4096x4096", "num_outputs": 64}, "size", "megapixels"),
        ("/v1/jobs", {"prompt": "a", "size": "32x32", "num_frames": 5, "output_format": "jpg"}, "output_format", "mp4"),
        ("/v1/jobs", {"prompt": "a", "attention_sparsity": 0.5}, "attention_sparsity", "sparse_attention: true"),
        ("/v1/images/generations", {"prompt": "a", "n": 11}, "n", "10"),
        ("/v1/images/generations", {"prompt": "a", "n": 2, "stream": True}, "n", "one"),
        ("/v1/images/generations", {"prompt": "a", "partial_images": 1}, "partial_images", "stream"),
        ("/v1/images/generations", {"prompt": "a", "background": "transparent"}, "background", "opaque"),
        ("/v1/images/generations", {"prompt": "a", "sampler": "ddim"}, "sampler", "flow_euler"),
        ("/v1/images/generations", {"prompt": "a", "cache_ratio": 0.5}, "cache_ratio", 'cache="auto"'),
        ("/v1/videos", {"prompt": "a", "cache_ratio": "0.5"}, "cache_ratio", 'cache="auto"'),
        ("/v1/videos", {"prompt": "a", "seconds": "nan"}, "seconds", "finite"),
        ("/v1/videos", {"prompt": "a", "num_frames": 6}, "num_frames", "5 or 9"),
        ("/v1/videos", {"prompt": "a", "secnds": "4"}, "secnds", "seconds"),
        ("/v1/videos", [1], None, "object"),
    ],
)
def test_what_cannot_be_served_names_its_field(http, path, body, param, words):
    error = error_of(http.post(path, json=body), 400)
    assert error["param"] == param and words in error["message"] and error["type"] == "invalid_request_error", error


def test_every_error_has_the_envelope_and_every_answer_its_id(http):
    for response, status in [
        (http.get("/v1/nothing"), 404),
        (http.put("/v1/jobs"), 405),
        (http.post("/v1/jobs", content=b"{", headers={"content-type": "application/json"}), 400),
        (http.post("/v1/videos", content=b"{", headers={"content-type": "application/json"}), 400),
        (http.post("/v1/videos", content=b"x", headers={"content-type": "text/plain"}), 415),
        (http.post("/v1/jobs", content=b"x" * 2_000_000), 413),
        (http.post("/v1/jobs", content=iter([b"x" * 1_000_000] * 2)), 413),
        (http.get("/v1/jobs", params={"limit": 0}), 400),
        (http.get("/v1/jobs/job_none/files/..%2f..%2fjobs.db"), 404),
        (http.get("/..%2fjobs.db"), 404),
    ]:
        error_of(response, status)
        assert response.headers["x-request-id"].startswith("req_")
    assert http.put("/v1/jobs").headers["allow"] == "GET, POST"
    assert http.get("/healthz", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert http.get("/healthz", headers={"x-request-id": "a b"}).headers["x-request-id"].startswith("req_")


def test_only_a_jobs_own_files_are_given(http):
    job = http.post("/v1/jobs", json={"prompt": "a", **SMALL}).json()["id"]
    list(events(http, job))
    for name in ("checkpoint.safetensors", "%2e%2e%2fjobs.db", "output.png.part", "preview-1.webp"):
        error_of(http.get(f"/v1/jobs/{job}/files/{name}"), 404)


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_cancels(server, http, stream):
    """The call is slow, since a job of high priority takes most of the device."""
    busy = http.post("/v1/jobs", json={"prompt": "a", "priority": "high", **ENDLESS}).json()["id"]
    until = time.monotonic() + 60
    while http.get(f"/v1/jobs/{busy}").json()["done"] < 20:
        assert time.monotonic() < until
    body = json.dumps({"prompt": "a", "size": "32x32", "num_inference_steps": 200, "stream": stream}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection((httpx2.URL(server.url).host, httpx2.URL(server.url).port)) as caller:
        caller.sendall(head.encode() + b"\r\n\r\n" + body)
        while (job := http.get("/v1/jobs", params={"limit": 1}).json()["data"][0]["id"]) == busy:
            assert time.monotonic() < until
    assert list(events(http, job))[-1]["state"] == "cancelled"
    http.delete(f"/v1/jobs/{busy}")


def test_status_calls_stay_prompt_under_load(http):
    job = http.post("/v1/jobs", json={"prompt": "a", **ENDLESS}).json()["id"]
    times = []
    for _ in range(40):
        began = time.perf_counter()
        assert http.get(f"/v1/jobs/{job}").status_code == 200
        times.append(time.perf_counter() - began)
    http.delete(f"/v1/jobs/{job}")
    assert sorted(times)[35] < 0.5, times


def test_a_model_is_upgraded_while_it_serves(http, client):
    client.generate("a dog", **SMALL)
    before = http.get("/admin/models/tiny-wan").json()
    begun = http.post("/admin/models/tiny-wan")
    assert begun.status_code == 202 and begun.json()["model"] == "tiny-wan"
    while (now := http.get("/admin/models/tiny-wan").json())["state"] not in ("done", "failed"):
        assert now["weights"] and now["ended_at"] is None
        assert client.generate("a dog", **SMALL).state == "succeeded"
    assert now["state"] == "done" and now["weights"] == before["weights"] and now["began_at"] <= now["ended_at"], now
    assert client.generate("a dog", **SMALL).state == "succeeded"
    for ask in (http.get, http.post):
        error_of(ask("/admin/models/another"), 404)


def test_health_models_and_metrics(http, client):
    client.generate("a dog", **SMALL)  # steps are counted once there are any
    assert http.get("/healthz").json() == {"status": "alive"} and http.get("/readyz").json() == {"status": "ready"}
    (model,) = http.get("/v1/models").json()["data"]
    assert model["id"] == "tiny-wan" and model["task"] == "t2v" and http.get("/v1/models/tiny-wan").json() == model
    error_of(http.get("/v1/models/a/b"), 404)
    text = http.get("/metrics").text
    for name in ("jobs_total", "queue_jobs", "queue_oldest_seconds", "stage_seconds", "step_seconds", "steps_total"):
        assert re.search(rf'^smartdiff_{name}(_count)?{{.*model="tiny-wan".*}} ', text, re.MULTILINE), name
    page = http.get("/")
    assert page.status_code == 200 and "text/html" in page.headers["content-type"]
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert http.get("/app.js").status_code == http.get("/style.css").status_code == 200
