// Voices in the browser's storage, one entry for each person.

const PREFIX = "spkd.voice.";

/** Voices by name: {embedding, model, recordings, seconds, enrolled, remarks}; null where an entry cannot be read. */
export function voices() {
  const names = Object.keys(localStorage)
    .filter((key) => key.startsWith(PREFIX))
    .sort((a, b) => a.localeCompare(b));
  return new Map(names.map((key) => [key.slice(PREFIX.length), read(key, localStorage.getItem(key))]));
}

function read(key, text) {
  try {
    const { crc32, ...voice } = JSON.parse(text);
    if (crc32 !== checksum(key, voice)) return null;
    // The mean of embeddings of length 1 is no longer than they are, but for rounding; as `spkd.voiceprint`.
    const length = Math.hypot(...voice.embedding);
    const isWhole = typeof voice.model === "string" && length > 0 && length < 1.001;
    const isDescribed =
      Number.isFinite(voice.seconds) && Number.isInteger(voice.recordings) && typeof voice.enrolled === "string";
    const hasRemarks = voice.remarks === undefined || Array.isArray(voice.remarks); // earlier pages kept none
    return isWhole && isDescribed && hasRemarks ? { remarks: [], ...voice } : null;
  } catch {
    return null;
  }
}

export function save(name, voice) {
  const kept = { ...voice, embedding: Array.from(voice.embedding) };
  localStorage.setItem(PREFIX + name, JSON.stringify({ ...kept, crc32: checksum(PREFIX + name, kept) }));
}

/** CRC-32 of an entry and its key. Browsers compute digests on pages from https alone. */
function checksum(key, voice) {
  let rest = ~0;
  for (const byte of new TextEncoder().encode(key + JSON.stringify(voice))) {
    rest ^= byte;
    for (let bit = 0; bit < 8; bit++) rest = (rest >>> 1) ^ (rest & 1 ? 0xedb88320 : 0);
  }
  return ~rest >>> 0;
}

export function remove(name) {
  localStorage.removeItem(PREFIX + name);
}
