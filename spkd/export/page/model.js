// The model: its files, checked by their digests, and its embeddings in onnxruntime-web.

import * as ort from "./ort.js";
import { RATE } from "./speaker.js";

/**
 * Load what `spkd export` wrote.
 * Returns the record, and embed: a waveform (16 kHz) -> its embedding.
 */
export async function load() {
  const record = JSON.parse(new TextDecoder().decode(await fetched("export.json")));
  const [model, packed] = await Promise.all(
    ["model.onnx", "ort.wasm.packed"].map((name) => checked(name, record.sha256[name])),
  );
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

async function fetched(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} cannot be loaded (${response.status} ${response.statusText})`);
  return response.arrayBuffer();
}

async function checked(name, expected) {
  const data = await fetched(name);
  if (!crypto.subtle) return data; // without https, browsers compute no digests
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  const found = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (found !== expected)
    throw new Error(`${name} is damaged, or of another export: load the page again, or export the student again`);
  return data;
}

// Packed by gzip under a name of its own: some servers and proxies unpack files that end with .gz.
async function unpacked(data) {
  return new Response(new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}
