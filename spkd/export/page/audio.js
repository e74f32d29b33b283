// Recordings at 16 kHz, from the microphone or from files.

import { fetched } from "./model.js";
import { RATE, mono, peak, remarkOn, resample, unusable } from "./speaker.js";

const MOST_SECONDS = 120; // of a file: longer ones take too much memory on a phone

/**
 * Record from the microphone.
 * `onLevel` is given the peak and the seconds so far, several times a second. `done` is a promise of the recording, as `read`
 * gives it, which is kept after `seconds`, or when `stop` is called.
 */
export async function record(seconds, onLevel) {
  if (!navigator.mediaDevices) {
    throw new Error(
      "This browser gives no microphone to pages without https (localhost is allowed): choose a file instead.",
    );
  }
  // What makes calls pleasant changes the voice: the model was trained on speech without it, and the level is measured.
  const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
  const stream = await navigator.mediaDevices.getUserMedia({ audio }).catch((error) => {
    throw new Error(explained(error));
  });
  // At the rate of the device: browsers differ in how they change it, and some refuse to.
  const { sampleRate } = stream.getAudioTracks()[0].getSettings();
  const context = new AudioContext(sampleRate ? { sampleRate } : {});
  const chunks = [];
  let count = 0;
  let skipped = 0;
  let node;
  const close = () => {
    stream.getTracks().forEach((track) => track.stop());
    return context.close();
  };
  try {
    await fetched("capture.js"); // browsers check no digest of a worklet
    await context.audioWorklet.addModule("capture.js");
    node = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
  } catch (error) {
    await close();
    throw error;
  }
  const wanted = Math.round(seconds * context.sampleRate);
  let stop;
  const done = new Promise((resolve, reject) => {
    let reported = 0;
    stop = async () => {
      node.port.onmessage = null;
      await close();
      const wave = joined(chunks, Math.min(count, wanted));
      const problem = unusable(wave);
      if (problem) reject(new Error(`The microphone gives what ${problem}: record again, or choose a file.`));
      else resolve({ wave: resample(wave, context.sampleRate), samples: remarkOn(wave) });
    };
    stream.getAudioTracks()[0].onended = async () => {
      await close();
      reject(new Error("The microphone was switched off during the recording: record again."));
    };
    node.port.onmessage = ({ data }) => {
      // A device gives zeros until it runs, which would count as the quietest of all sounds.
      if (!count && !peak(data)) {
        skipped += data.length;
        if (skipped >= wanted) stop();
        return;
      }
      chunks.push(data);
      count += data.length;
      if (count - reported > context.sampleRate / 15) {
        reported = count;
        onLevel(Math.max(...chunks.slice(-8).map(peak)), count / context.sampleRate);
      }
      if (count >= wanted) stop();
    };
  });
  context.createMediaStreamSource(stream).connect(node);
  await context.resume();
  return { done, stop };
}

function joined(chunks, length) {
  const wave = new Float32Array(length);
  let place = 0;
  for (const chunk of chunks) {
    const part = chunk.subarray(0, length - place);
    wave.set(part, place);
    place += part.length;
  }
  return wave;
}

function explained(error) {
  if (error.name === "NotAllowedError") {
    return "The microphone is not allowed: allow it for this page in the browser's settings, or choose a file.";
  }
  if (error.name === "NotFoundError") return "There is no microphone: connect one, or choose a file.";
  return `The microphone cannot be used (${error.message}): close other programs that use it, or choose a file.`;
}

/**
 * Recording of a file, the mean of its channels: {wave, samples}, the waveform at 16 kHz and what `remarkOn` says of its samples.
 * Throws an Error that says what is wrong with it.
 */
export async function read(file) {
  const content = await file.arrayBuffer();
  const rate = rateOf(new DataView(content)) ?? RATE;
  // In a context of another rate the browser would resample it by a filter of its own.
  const isOffered = rate >= 8000 && rate <= 96000;
  const context = new OfflineAudioContext(1, 1, isOffered ? rate : RATE);
  const buffer = await context.decodeAudioData(content).catch(() => {
    throw new Error(`${file.name}: this browser does not read it as audio; choose a WAV, MP3 or FLAC file.`);
  });
  if (buffer.duration > MOST_SECONDS) {
    throw new Error(`${file.name}: ${buffer.duration.toFixed(0)} s; choose a file of at most ${MOST_SECONDS} s.`);
  }
  const channels = Array.from({ length: buffer.numberOfChannels }, (_, i) => buffer.getChannelData(i));
  const wave = mono(channels);
  const problem = unusable(wave);
  if (problem) throw new Error(`${file.name}: ${problem}.`);
  return { wave: resample(wave, buffer.sampleRate), samples: remarkOn(wave, channels) };
}

/** Sampling rate of a file (Hz) in its header: WAV, FLAC, Ogg (Opus and Vorbis) or MP3; undefined of others. */
export function rateOf(view) {
  const text = (at, length) =>
    at + length <= view.byteLength ? String.fromCharCode(...new Uint8Array(view.buffer, at, length)) : "";
  if (text(0, 4) === "RIFF" && text(8, 4) === "WAVE") {
    for (let at = 12; at + 16 <= view.byteLength; ) {
      if (text(at, 4) === "fmt ") return view.getUint32(at + 12, true);
      at += 8 + view.getUint32(at + 4, true);
    }
    return undefined;
  }
  if (text(0, 4) === "fLaC" && view.byteLength >= 22) return view.getUint32(18) >>> 12; // in STREAMINFO
  if (text(0, 4) === "OggS") {
    if (text(28, 8) === "OpusHead") return 48000; // which Opus is decoded at
    return text(28, 7) === "\x01vorbis" && view.byteLength >= 44 ? view.getUint32(40, true) : undefined;
  }
  return rateOfMP3(view, text);
}

// The header of the first frame: ISO/IEC 11172-3, section 2.4.2.3. Tags in front say their length in 7 bits of each byte.
function rateOfMP3(view, text) {
  let at = 0;
  if (text(0, 3) === "ID3" && view.byteLength >= 10) {
    at = 10;
    for (let i = 0; i < 4; i++) at += view.getUint8(6 + i) << (7 * (3 - i));
  }
  if (at + 4 > view.byteLength) return undefined;
  const header = view.getUint32(at);
  const [version, layer, index] = [(header >>> 19) & 3, (header >>> 17) & 3, (header >>> 10) & 3];
  if (header >>> 21 !== 0x7ff || version === 1 || layer === 0 || index === 3) return undefined;
  return [44100, 48000, 32000][index] / { 3: 1, 2: 2, 0: 4 }[version];
}
