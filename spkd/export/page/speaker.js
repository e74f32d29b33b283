// Scores and quality of recordings, as spkd computes them in Python. No function here touches the page.

export const RATE = 16000; // Hz
const ZEROS = 6; // zero crossings of the sinc on each side
const ROLLOFF = 0.99; // cut-off, of half of the lower rate

/**
 * A waveform at another rate, by a sinc under a Hann window, as `spkd.corpus.audio.resample`.
 * Output sample n is the sum over k of x[k] h(k / source - n / target).
 */
export function resample(wave, source, target = RATE) {
  if (source === target) return wave;
  const cutoff = Math.min(source, target) * ROLLOFF;
  const reach = Math.ceil((ZEROS * source) / cutoff);
  const out = new Float32Array(Math.ceil((wave.length * target) / source));
  const filters = new Map(); // by phase: few differ
  for (let n = 0; n < out.length; n++) {
    const phase = (n * source) % target;
    const centre = (n * source - phase) / target;
    if (!filters.has(phase)) filters.set(phase, filter(phase / target, reach, cutoff / source));
    const taps = filters.get(phase);
    let sum = 0;
    for (let i = 0; i < taps.length; i++) {
      const k = centre + i - reach;
      if (k >= 0 && k < wave.length) sum += wave[k] * taps[i];
    }
    out[n] = sum;
  }
  return out;
}

function filter(phase, reach, scale) {
  return Float64Array.from({ length: 2 * reach + 2 }, (_, i) => {
    const t = (i - reach - phase) * scale;
    if (Math.abs(t) >= ZEROS) return 0;
    const sinc = t === 0 ? 1 : Math.sin(Math.PI * t) / (Math.PI * t);
    return sinc * Math.cos((Math.PI * t) / ZEROS / 2) ** 2 * scale;
  });
}

/** Mean and standard deviation of numbers. */
export function moments(values) {
  let sum = 0;
  for (const value of values) sum += value;
  const mean = sum / values.length;
  let squares = 0;
  for (const value of values) squares += (value - mean) ** 2;
  return { mean, deviation: Math.sqrt(squares / values.length) };
}

/** Greatest magnitude of numbers. */
export function peak(values) {
  let most = 0;
  for (const value of values) most = Math.max(most, Math.abs(value));
  return most;
}

/**
 * Problems of a recording (16 kHz), with the rules of `spkd.model`, as {text, minor}: a decision is made in spite of minor ones.
 * `limits` are frame (samples), level (dB of full scale) and seconds.
 */
export function remarks(wave, limits) {
  const found = [];
  const remark = remarkOn(wave);
  if (remark) found.push({ text: `its samples ${remark}`, minor: remark.startsWith("are clipped") });
  let frames = 0;
  for (let start = 0; start + limits.frame <= wave.length; start += limits.frame) {
    const { deviation } = moments(wave.subarray(start, start + limits.frame));
    if (20 * Math.log10(Math.max(deviation, 1e-10)) >= limits.level) frames++;
  }
  const seconds = (frames * limits.frame) / RATE;
  if (seconds < limits.seconds) {
    const text = `only ${seconds.toFixed(2)} s are louder than ${limits.level} dB of full scale; a decision takes ${limits.seconds} s`;
    found.push({ text, minor: false });
  }
  return found;
}

function remarkOn(wave) {
  if (!wave.length) return "";
  const { mean, deviation } = moments(wave);
  const most = peak(wave);
  if (deviation < 1e-5) return "are digital silence";
  if (Math.abs(mean) > 3 * deviation) return "are mostly a constant offset";
  let clipped = 0;
  for (const value of wave) if (Math.abs(value) >= 0.999 * most) clipped++;
  return most >= 0.99 && clipped > 0.02 * wave.length ? "are clipped in more than 2 % of their samples" : "";
}

/** An embedding divided by its length. */
export function unit(embedding) {
  const length = Math.max(Math.hypot(...embedding), 1e-12);
  return Float64Array.from(embedding, (value) => value / length);
}

/** Mean of embeddings of length 1: its product with another is the mean of the cosines. */
export function mean(units) {
  return Float64Array.from(units[0], (_, i) => units.reduce((sum, each) => sum + each[i], 0) / units.length);
}

/** Product of two embeddings of length 1: their cosine. */
export function cosine(one, other) {
  return one.reduce((sum, value, i) => sum + value * other[i], 0);
}

/** Log-likelihood ratio of a cosine, natural logarithm. */
export function ratio(score, calibration) {
  return calibration.weight * score + calibration.offset;
}

/** Numbers, from 1, of the recordings that the threshold at equal error rates refuses when compared with the others. */
export function outliers(units, calibration) {
  if (!calibration || units.length < 3) return [];
  const isUnlike = (each, i) =>
    ratio(cosine(each, mean(units.filter((_, j) => j !== i))), calibration) < calibration.thresholds.eer;
  return units.flatMap((each, i) => (isUnlike(each, i) ? [i + 1] : []));
}

/** A log-likelihood ratio in words. */
export function inWords(score, likelihood) {
  const times = Math.exp(Math.min(Math.abs(likelihood), 700));
  const shown = times < 1e6 ? times.toLocaleString("en", { maximumSignificantDigits: 3 }) : times.toExponential(1);
  const whom = likelihood >= 0 ? "one person than from two" : "two people than from one";
  return `A cosine of ${score.toFixed(3)} is ${shown} times as likely from ${whom}.`;
}

const percent = (name) => `${Number((100 * Number(name.slice(name.lastIndexOf("_") + 1))).toPrecision(6))} %`;

/** A short text for a threshold of a calibration, by its name. */
export function label(name) {
  if (name === "eer") return "equal error rates";
  if (name.startsWith("false_alarm_")) return `${percent(name)} false alarms`;
  return `least cost where ${percent(name)} are one person`;
}

/** The meaning of a threshold of a calibration, by its name. */
export function meaning(name) {
  if (name === "eer") return "refuses as large a share of the pairs of one person as it accepts of the pairs of two";
  if (name.startsWith("false_alarm_")) return `accepts ${percent(name)} of the pairs of two people`;
  return `has the least detection cost where ${percent(name)} of the pairs are of one person`;
}
