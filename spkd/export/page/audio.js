// Recordings at 16 kHz, from the microphone or from files.

import { RATE, moments, peak, resample } from "./speaker.js";

const MOST_SECONDS = 120; // of a file: longer ones take too much memory on a phone

/**
 * Record from the microphone.
 * `onLevel` is given the peak and the seconds so far, several times a second. `done` is a promise of the waveform, which is
 * kept after `seconds`, or when `stop` is called.
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
      resolve(resample(joined(chunks, Math.min(count, wanted)), context.sampleRate));
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

/** Waveform of a file, the mean of its channels. Throws an Error that says what is wrong with it. */
export async function read(file) {
  const context = new OfflineAudioContext(1, 1, RATE);
  const buffer = await context.decodeAudioData(await file.arrayBuffer()).catch(() => {
    throw new Error(`${file.name}: this browser does not read it as audio; choose a WAV, MP3 or FLAC file.`);
  });
  if (buffer.duration > MOST_SECONDS) {
    throw new Error(`${file.name}: ${buffer.duration.toFixed(0)} s; choose a file of at most ${MOST_SECONDS} s.`);
  }
  const channels = Array.from({ length: buffer.numberOfChannels }, (_, i) => buffer.getChannelData(i));
  const wave = channels[0].map((_, i) => channels.reduce((sum, each) => sum + each[i], 0) / channels.length);
  const loudest = Math.max(...channels.map((each) => moments(each).deviation));
  if (channels.length > 1 && loudest > 1e-4 && moments(wave).deviation < 0.05 * loudest) {
    throw new Error(`${file.name}: its channels cancel each other; choose a file of one channel.`);
  }
  return wave;
}
