// Voices in the browser's storage, one entry for each person.

const PREFIX = "spkd.voice.";

/** Voices by name: {embedding, model, recordings, seconds, enrolled}; null where an entry cannot be read. */
export function voices() {
  const names = Object.keys(localStorage)
    .filter((key) => key.startsWith(PREFIX))
    .sort((a, b) => a.localeCompare(b));
  return new Map(names.map((key) => [key.slice(PREFIX.length), read(localStorage.getItem(key))]));
}

function read(text) {
  try {
    const voice = JSON.parse(text);
    // The mean of embeddings of length 1 is no longer than they are, but for rounding; as `spkd.voiceprint`.
    const length = Math.hypot(...voice.embedding);
    const isWhole = typeof voice.model === "string" && length > 0 && length < 1.001;
    const isDescribed =
      Number.isFinite(voice.seconds) && Number.isInteger(voice.recordings) && typeof voice.enrolled === "string";
    return isWhole && isDescribed ? voice : null;
  } catch {
    return null;
  }
}

export function save(name, voice) {
  localStorage.setItem(PREFIX + name, JSON.stringify({ ...voice, embedding: Array.from(voice.embedding) }));
}

export function remove(name) {
  localStorage.removeItem(PREFIX + name);
}
