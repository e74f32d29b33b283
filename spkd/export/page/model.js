// The model: its files, checked by their digests, and its embeddings in onnxruntime-web.

import * as ort from "./ort.js";
import { RATE } from "./speaker.js";

// SHA-256 of every file, by which the browser refuses other scripts, too.
const FILES = JSON.parse(document.querySelector("script[type=importmap]").textContent).integrity;

/**
 * Load what `spkd export` wrote.
 * Returns the record, and embed: a waveform (16 kHz) -> its embedding.
 */
export async function load() {
  const [about, model, packed] = await Promise.all(["export.json", "model.onnx", "ort.wasm.packed"].map(fetched));
  const record = JSON.parse(new TextDecoder().decode(about));
  // A single thread: several need headers that few static servers send.
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = await unpacked(packed);
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  const embed = async (wave) => {
    const { embs } = await session.run({ wave: new ort.Tensor("float32", wave, [1, wave.length]) });
    return embs.data;
  };
  await embed(new Float32Array(RATE)); // the first run compiles, and takes half a second
  return { record, embed };
}

/** Content of a file of the page. Throws an Error where it is not the one that was exported. */
export async function fetched(name) {
  const response = await fetch(name, { integrity: FILES[`./${name}`] }).catch(() => {
    throw new Error(
      `${name} cannot be loaded, is damaged, or is of another export: load the page again, or export the student again.`,
    );
  });
  return response.arrayBuffer();
}

// Packed by gzip under a name of its own: some servers and proxies unpack files that end with .gz.
async function unpacked(data) {
  return new Response(new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}
