// Two results side by side: the pictures, clips in step, what was asked of them where that differs, and what they cost.

const chosen = new Map();
const $ = (id) => document.getElementById(id);

// A button that chooses a job for comparison, or lets it go. media(job) gives its picture or clip as an element.
export function compareButton(job, media) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Compare" });
  button.dataset.compare = job.id;
  button.setAttribute("aria-pressed", chosen.has(job.id));
  button.setAttribute("aria-label", `Compare ${job.params.prompt.slice(0, 60)}, seed ${job.report.params.seed}`);
  button.onclick = async () => {
    if (!chosen.delete(job.id)) {
      if (chosen.size === 2) chosen.delete(chosen.keys().next().value); // the one that was chosen first
      chosen.set(job.id, job);
    }
    for (const other of document.querySelectorAll("[data-compare]")) other.setAttribute("aria-pressed", chosen.has(other.dataset.compare));
    await show(media);
  };
  return button;
}

async function show(media) {
  const jobs = [...chosen.values()];
  $("comparison").hidden = jobs.length < 2;
  if (jobs.length < 2) return;
  const elements = await Promise.all(jobs.map(media));
  if (jobs.some((job) => !chosen.has(job.id))) return; // another choice was made meanwhile
  $("pair").replaceChildren(...elements);
  keepInStep(elements.filter((element) => element instanceof HTMLVideoElement));
  const row = ([name, one, other]) => {
    const cells = [Object.assign(document.createElement("th"), { scope: "row", textContent: name.replaceAll("_", " ") })];
    for (const value of [one, other]) cells.push(Object.assign(document.createElement("td"), { textContent: value }));
    const line = document.createElement("tr");
    line.append(...cells);
    return line;
  };
  $("differences").replaceChildren(...[...differences(...jobs), ...costs(...jobs)].map(row));
}

function differences(one, other) {
  const [left, right] = [one, other].map((job) => ({ model: job.model, ...job.report.params }));
  const told = (value) => (typeof value === "string" ? value : value === undefined ? "" : JSON.stringify(value));
  const names = [...new Set([...Object.keys(left), ...Object.keys(right)])];
  return names.map((name) => [name, told(left[name]), told(right[name])]).filter(([, a, b]) => a !== b);
}

function costs(...jobs) {
  const skipped = (job) => `${Math.round(100 * (job.report.cache.ratio ?? 0))} %`;
  return [
    ["denoising", ...jobs.map((job) => `${job.report.seconds.denoise.toFixed(1)} s`)],
    ["steps skipped", ...jobs.map(skipped)],
  ];
}

function keepInStep(clips) {
  if (clips.length < 2) return;
  const [first, second] = clips;
  first.ontimeupdate = () => {
    if (Math.abs(first.currentTime - second.currentTime) > 0.15) second.currentTime = first.currentTime;
  };
}
