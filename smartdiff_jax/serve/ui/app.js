// The page: a form, the job in progress, the queue, the gallery. No library, no build, nothing fetched from elsewhere.

import { compareButton } from "./compare.js";

const $ = (id) => document.getElementById(id);
const sliders = ["num_frames", "num_inference_steps", "guidance_scale", "num_outputs", "cache_ratio"];
const state = { models: [], current: null, blobs: new Map() };

function headers(more = {}) {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}`, ...more } : more;
}

async function ask(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers) });
  if (response.status === 401) $("keybox").hidden = false;
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(body?.error?.message ?? `the service answered ${response.status}`);
  }
  return response;
}

// Files are fetched with the key, and kept, so that the gallery does not flicker.
async function blobUrl(url) {
  if (!state.blobs.has(url)) state.blobs.set(url, URL.createObjectURL(await (await ask(url)).blob()));
  return state.blobs.get(url);
}

async function* events(id) {
  const reader = (await ask(`/v1/jobs/${id}/events`)).body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

function showSlider(id) {
  document.querySelector(`output[for=${id}]`).value = $(id).value;
}

function setModel() {
  const model = state.models.find((entry) => entry.id === $("model").value);
  if (!model) return;
  const defaults = model.defaults;
  $("size").value = `${defaults.width}x${defaults.height}`;
  $("sizes").replaceChildren(...Object.keys(model.sizes).map((name) => Object.assign(document.createElement("option"), { value: name })));
  $("num_frames").max = Math.max(81, defaults.num_frames);
  $("num_frames").value = defaults.num_frames;
  $("num_frames").disabled = model.task === "t2i";
  $("num_inference_steps").value = defaults.num_inference_steps;
  $("guidance_scale").value = defaults.guidance_scale;
  $("guidance_scale").disabled = defaults.guidance === "none";
  $("negative_prompt").disabled = defaults.guidance !== "cfg";
  sliders.forEach(showSlider);
}

function readForm() {
  const body = { previews: 6, priority: $("priority").value, model: $("model").value, prompt: $("prompt").value, size: $("size").value };
  for (const id of sliders) if (!$(id).disabled) body[id] = Number($(id).value);
  if (body.cache_ratio > 0) body.cache = "auto";
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  if ($("negative_prompt").value && !$("negative_prompt").disabled) body.negative_prompt = $("negative_prompt").value;
  return body;
}

function describe(job) {
  if (job.state === "queued") return job.position === null ? "queued" : `queued, ${job.position} before it`;
  if (job.state !== "running") return job.state;
  const eta = job.eta_seconds === null ? "" : `, about ${Math.ceil(job.eta_seconds)} s left`;
  return `${job.stage} ${job.done}/${job.total}${eta}`;
}

async function follow(id) {
  state.current = id;
  $("now").hidden = false;
  $("preview").hidden = true;
  for await (const job of events(id)) {
    if (state.current !== id) return;
    $("bar").value = job.progress;
    $("where").textContent = describe(job);
    if (job.preview) {
      // The newest may still be being written.
      blobUrl(job.preview).then((url) => { $("preview").src = url; $("preview").hidden = false; }, () => {});
    }
    if (job.state === "failed") $("problem").textContent = job.error.message;
    if (!["queued", "running"].includes(job.state)) break;
  }
  $("now").hidden = true;
  state.current = null;
  await refresh();
}

function queueItem(job) {
  const item = document.createElement("li");
  item.textContent = `${job.params.prompt.slice(0, 60)} (${describe(job)}) `;
  const cancel = Object.assign(document.createElement("button"), { type: "button", textContent: "Cancel" });
  cancel.setAttribute("aria-label", `Cancel ${job.params.prompt.slice(0, 60)}`);
  cancel.onclick = () => ask(`/v1/jobs/${job.id}/cancel`, { method: "POST" }).then(refresh, problem);
  item.append(cancel);
  return item;
}

async function media(job) {
  const url = await blobUrl(job.files[0]);
  const film = job.files[0].endsWith(".mp4");
  const picture = document.createElement(film ? "video" : "img");
  picture.src = url;
  if (film) Object.assign(picture, { controls: true, loop: true, muted: true, autoplay: true });
  else picture.alt = job.params.prompt;
  return picture;
}

async function galleryItem(job) {
  const item = document.createElement("li");
  item.dataset.id = job.id;
  const picture = await media(job);
  const text = Object.assign(document.createElement("p"), { textContent: job.params.prompt, title: job.params.prompt });
  const again = Object.assign(document.createElement("button"), { type: "button", textContent: `Seed ${job.report.params.seed}` });
  again.title = "Fill the form with these settings";
  again.onclick = () => fill(job);
  item.append(picture, text, again, compareButton(job, media));
  return item;
}

function fill(job) {
  const params = job.report.params;
  $("model").value = job.model;
  setModel();
  for (const id of ["prompt", "negative_prompt", "seed", ...sliders]) $(id).value = params[id] ?? 0;
  $("size").value = `${params.width}x${params.height}`;
  sliders.forEach(showSlider);
  $("prompt").focus();
}

async function refresh() {
  const jobs = (await (await ask("/v1/jobs?limit=40")).json()).data;
  const active = jobs.filter((job) => ["queued", "running"].includes(job.state));
  active.sort((one, other) => (one.position ?? 0) - (other.position ?? 0));
  $("queue").replaceChildren(...active.map(queueItem));
  const made = jobs.filter((job) => job.state === "succeeded");
  const shown = [...$("gallery").children].map((item) => item.dataset.id);
  if (made.map((job) => job.id).join() !== shown.join()) $("gallery").replaceChildren(...(await Promise.all(made.map(galleryItem))));
}

function problem(error) {
  $("problem").textContent = error.message;
}

async function connect() {
  try {
    state.models = (await (await ask("/v1/models")).json()).data;
    $("model").replaceChildren(...state.models.map((model) => Object.assign(document.createElement("option"), { textContent: model.id })));
    setModel();
    $("status").textContent = "ready";
    $("keybox").hidden = sessionStorage.getItem("key") === null;
    await refresh();
    setInterval(() => refresh().catch(() => { $("status").textContent = "the service does not answer"; }), 2000);
  } catch (error) {
    $("status").textContent = error.message;
    setTimeout(connect, 1000);
  }
}

sliders.forEach((id) => $(id).addEventListener("input", () => showSlider(id)));
$("model").addEventListener("change", setModel);
$("key").addEventListener("change", () => sessionStorage.setItem("key", $("key").value));
$("cancel").addEventListener("click", () => ask(`/v1/jobs/${state.current}/cancel`, { method: "POST" }).catch(problem));
$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  $("problem").textContent = "";
  try {
    const job = await (await ask("/v1/jobs", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(readForm()) })).json();
    await follow(job.id);
  } catch (error) {
    problem(error);
  }
});
connect();
