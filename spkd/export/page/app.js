// The page: enrolment of a voice from three recordings, and verification.

import { read, record as recordFrom } from "./audio.js";
import { load } from "./model.js";
import { RATE, cosine, inWords, label, mean, meaning, outliers, ratio, remarks, unit } from "./speaker.js";
import { remove, save, voices } from "./store.js";

const TAKES = 3; // recordings of an enrolment
const DECISIONS = { same: "The same speaker", different: "Different speakers", none: "No decision" };
const at = (id) => document.getElementById(id);
let record; // of the export
let embed;
let takes = []; // of the enrolment: {name, wave, embedding, seconds, remarks}
let person; // whose recordings these are

function say(id, text, isBad = false) {
  at(id).textContent = text;
  at(id).classList.toggle("bad", isBad);
}

function element(tag, text = "", name = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = name;
  return made;
}

/** A recording's embedding and remarks. Throws an Error where no decision could be made with it. */
async function measured({ wave, samples }, what) {
  const found = remarks(wave, samples, record.quality);
  const hindrance = found.find((each) => !each.minor);
  if (hindrance) throw new Error(`${what}: ${hindrance.text}. Record again: speak louder or longer.`);
  return { embedding: unit(await embed(wave)), seconds: wave.length / RATE, remarks: found.map((each) => each.text) };
}

/** Run a task of one side (enrol, verify) while its controls are off, and show what goes wrong. */
async function busy(side, task) {
  const controls = document.querySelectorAll("main button, main input, main select");
  controls.forEach((each) => (each.disabled = true));
  say(`${side}-message`, "");
  try {
    await task();
  } catch (error) {
    say(`${side}-message`, error.message, true);
  }
  controls.forEach((each) => (each.disabled = false));
}

/** A recording from the microphone, while the side's button stops the recording and its meter shows the level. */
async function recorded(side) {
  const [button, meter] = [at(`${side}-record`), at(`${side}-meter`)];
  const text = button.textContent;
  say(`${side}-message`, "Waiting for the microphone …");
  const { done, stop } = await recordFrom(record.seconds, (most, seconds) => {
    const level = 20 * Math.log10(Math.max(most, 1e-4));
    meter.firstElementChild.style.width = `${Math.max(0, 100 + (100 * level) / 60)}%`;
    meter.classList.toggle("quiet", level < -35);
    meter.classList.toggle("loud", most >= 0.99);
    button.textContent = `Stop (${Math.max(0, record.seconds - seconds).toFixed(1)} s)`;
  });
  say(`${side}-message`, "Speak now.");
  meter.hidden = false;
  button.disabled = false;
  button.onclick = stop;
  try {
    return await done;
  } finally {
    say(`${side}-message`, "");
    meter.hidden = true;
    button.textContent = text;
    button.onclick = handlers[side];
  }
}

/** Leave the recordings of one person behind where another's name was typed. */
function startOverIfRenamed() {
  const name = at("name").value.trim();
  if (!name || name === person) return;
  if (takes.length) {
    takes = [];
    showTakes();
    say("enrol-message", `The name was changed: the recordings of ${person} are dropped. Start with the first of ${name}.`);
  }
  person = name;
}

function showTakes() {
  const items = Array.from({ length: TAKES }, (_, i) => {
    const item = element("li", "", i < takes.length ? "done" : "");
    const text =
      i < takes.length ? [`${takes[i].seconds.toFixed(1)} s`, ...takes[i].remarks].join("; ") : "not recorded yet";
    item.append(element("b", `Recording ${i + 1}`), element("span", text));
    return item;
  });
  at("takes").replaceChildren(...items);
  at("enrol-record").textContent = `Record ${Math.min(takes.length + 1, TAKES)} of ${TAKES}`;
  at("enrol-again").hidden = takes.length === 0;
}

/** Whose recordings follow, by the name that was typed. Throws an Error where it cannot be one. */
function checkName() {
  const name = at("name").value.trim();
  if (!name) {
    at("name").focus();
    throw new Error("Write the name of the person first.");
  }
  if (voices().has(name)) throw new Error(`${name} is enrolled: delete that voice first, or write another name.`);
  startOverIfRenamed();
}

async function take(recording, file) {
  checkName();
  const name = file ?? `Recording ${takes.length + 1}`;
  const isSame = ({ wave }) => wave.length === recording.wave.length && wave.every((x, i) => x === recording.wave[i]);
  const twin = takes.find(isSame);
  if (twin) throw new Error(`${name} is the same as Recording ${takes.indexOf(twin) + 1}: each recording counts once.`);
  takes.push({ name, wave: recording.wave, ...(await measured(recording, name)) });
  showTakes();
  if (takes.length === TAKES) enrol();
}

/** Keep the voice of the recordings. Throws an Error where the browser does not store it. */
function enrol() {
  const units = takes.map((each) => each.embedding);
  const others = outliers(units, record.calibration).map((number) => takes[number - 1].name);
  const doubts = others.map((name) => `${name}: may be of another speaker`);
  const found = takes.flatMap(({ name, remarks }) => remarks.map((text) => `${name}: ${text}`)).concat(doubts);
  const seconds = takes.reduce((sum, each) => sum + each.seconds, 0);
  const enrolled = new Date().toISOString().slice(0, 10);
  const voice = { embedding: mean(units), model: record.model, recordings: TAKES, seconds, enrolled, remarks: found };
  takes = [];
  showTakes();
  try {
    save(person, voice);
  } catch (error) {
    throw new Error(`${person} is not enrolled: the browser stores nothing (${error.message}).`);
  }
  at("name").value = "";
  showVoices(person);
  // Without this, a browser may delete what it stores when space is short. It may say no.
  navigator.storage?.persist?.();
  const advice = doubts.length ? ["If so, delete the voice and enrol again."] : [];
  say("enrol-message", [`${person} is enrolled.`, ...found.map((each) => `${each}.`), ...advice].join("\n"));
}

/** Show the voices. A result on the page may be of another one, and is hidden. */
function showVoices(chosen = at("voices").querySelector("input:checked")?.value) {
  at("voices")
    .querySelectorAll(".voice")
    .forEach((each) => each.remove());
  at("result").hidden = true;
  const all = voices();
  for (const [name, voice] of all) {
    const row = element("div", "", "voice");
    const label = element("label");
    const radio = element("input");
    Object.assign(radio, { type: "radio", name: "voice", value: name });
    const text = element("span");
    const isUsable = voice !== null && voice.model === record.model && voice.embedding.length === record.dim;
    const about = isUsable
      ? `${voice.recordings} recordings, ${voice.seconds.toFixed(1)} s, ${voice.enrolled.replaceAll("-", "\u2011")}`
      : "";
    const reason =
      voice === null ? "damaged: delete it, and enrol the person again" : "of another model: enrol the person again";
    const lines = isUsable ? [about, ...voice.remarks] : [reason];
    text.append(element("b", name), ...lines.map((line) => element("small", line)));
    label.append(radio, text);
    radio.dataset.isUsable = isUsable;
    const button = element("button", "Delete");
    button.type = "button";
    button.setAttribute("aria-label", `Delete ${name}`);
    button.onclick = () => {
      if (!confirm(`Delete the voice of ${name}?`)) return;
      remove(name);
      showVoices();
    };
    row.append(label, button);
    at("voices").append(row);
  }
  const radios = [...at("voices").querySelectorAll("input")];
  const usable = radios.filter((each) => each.dataset.isUsable === "true");
  const marked = usable.find((each) => each.value === chosen) ?? usable[0];
  if (marked) marked.checked = true;
  at("nobody").hidden = all.size > 0;
  at("voices").hidden = all.size === 0;
}

/** The voice that is chosen. Throws an Error where there is none, or it is of another model. */
function voiceChosen() {
  const name = at("voices").querySelector("input:checked")?.value;
  const voice = voices().get(name);
  if (name === undefined) throw new Error("Enrol a voice first, and choose it.");
  if (!voice) throw new Error(`${name}: this voice is damaged or was deleted: enrol the person again.`);
  if (voice.model !== record.model || voice.embedding.length !== record.dim) {
    throw new Error(`${name} was enrolled with another model: enrol the person again.`);
  }
  return { name, embedding: voice.embedding };
}

async function verify({ wave, samples }, what) {
  const { name, embedding } = voiceChosen();
  const result = at("result");
  const show = (kind, title, ...lines) => {
    result.className = `result ${kind}`;
    result.replaceChildren(element("strong", title), ...lines.map((line) => element("p", line)));
    result.hidden = false;
  };
  const found = remarks(wave, samples, record.quality).map((each) => ({ ...each, text: `${what}: ${each.text}.` }));
  if (found.some((each) => !each.minor)) {
    show("none", DECISIONS.none, ...found.map((each) => each.text));
    return;
  }
  const score = cosine(embedding, unit(await embed(wave)));
  const notes = found.map((each) => each.text);
  if (!record.calibration) {
    const why =
      "The model has no calibration, without which a cosine says neither yes nor no: run spkd calibrate, and export it again.";
    show("none", DECISIONS.none, `Cosine with ${name}: ${score.toFixed(3)}.`, why, ...notes);
    return;
  }
  const likelihood = ratio(score, record.calibration);
  const threshold = at("threshold").value;
  const limit = record.calibration.thresholds[threshold];
  const kind = likelihood >= limit ? "same" : "different";
  const about = `Log-likelihood ratio ${likelihood.toFixed(2)}. ${inWords(score, likelihood)}`;
  show(
    kind,
    `${DECISIONS[kind]}: ${kind === "same" ? "" : "not "}${name}`,
    about,
    `The threshold, ${limit.toFixed(2)}, ${meaning(threshold)}.`,
    ...notes,
  );
}

const handlers = {
  enrol: () =>
    busy("enrol", async () => {
      checkName();
      await take(await recorded("enrol"));
    }),
  verify: () =>
    busy("verify", async () => {
      at("result").hidden = true;
      voiceChosen();
      await verify(await recorded("verify"), "The recording");
    }),
};

function start() {
  for (const side of ["enrol", "verify"]) at(`${side}-record`).onclick = handlers[side];
  at("enrol-files").onchange = ({ target }) =>
    busy("enrol", async () => {
      const files = [...target.files];
      target.value = "";
      checkName();
      if (takes.length + files.length > TAKES) {
        throw new Error(`An enrolment has ${TAKES} recordings: choose at most ${TAKES - takes.length} more.`);
      }
      for (const file of files) await take(await read(file), file.name);
    });
  at("verify-file").onchange = ({ target }) =>
    busy("verify", async () => {
      const [file] = target.files;
      target.value = "";
      at("result").hidden = true;
      if (file) await verify(await read(file), file.name);
    });
  at("name").onchange = startOverIfRenamed;
  at("enrol-again").onclick = () => {
    takes = [];
    say("enrol-message", "");
    showTakes();
  };
  window.addEventListener("storage", () => showVoices());
  const names = Object.keys(record.calibration?.thresholds ?? {});
  for (const name of names) at("threshold").append(new Option(label(name), name));
  at("threshold").value = "eer";
  for (const id of ["threshold", "voices"]) at(id).onchange = () => (at("result").hidden = true);
  at("threshold-row").hidden = names.length < 2;
  const { network, licence, url } = record.card;
  const parts = [`Model: ${network}, weights ${record.student.slice(0, 12)}`, licence && `licence ${licence}`, url];
  at("about").textContent =
    `${parts.filter(Boolean).join(", ")}. onnxruntime-web ${record.runtime}. Exported by spkd ${record.card.version}.`;
  showTakes();
  showVoices();
  say("state", record.calibration ? "" : "This model has no calibration: cosines are shown, and no decision is made.");
  document.querySelector("main").hidden = false;
}

try {
  ({ record, embed } = await load());
  start();
} catch (error) {
  say("state", `The model cannot be used: ${error.message}`, true);
}
// Keeps the page for use without a network.
navigator.serviceWorker?.register("sw.js");
