// Scores and quality of recordings, as spkd computes them in Python. No function here touches the page.

export const RATE = 16000; // Hz
const ZEROS = 6; // zero crossings of the sinc on each side
const ROLLOFF = 0.99; // cut-off, of half of the lower rate
const FULL_SCALE = 16; // peak above which float samples are at the scale of integers
// Of the search for clipping, as in `spkd.corpus.audio`.
const CLIPPED_SHARE = 0.02;
const RESOLVED = 0.01;
const LOWEST = 0.7;
const STEP = 0.02;
const BAND = 10;
const FLATTENED = 1.8;
const FEWEST = 500;
const LOOKED_AT = 1 << 15;
// Of the search for voiced windows, as in `spkd.corpus.quality`: samples and lags at 4 kHz.
const DECIMATION = 4;
const WINDOW = 160;
const SHORTEST = 10;
const LONGEST = 65;

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

/** Mean of channels. */
export function mono(channels) {
  if (channels.length === 1) return channels[0];
  return channels[0].map((_, i) => channels.reduce((sum, each) => sum + each[i], 0) / channels.length);
}

/** What makes the samples of a recording unusable, at their own rate, with the rules of `spkd.corpus.audio`; "" of good ones. */
export function unusable(wave) {
  if (!wave.length) return "holds no samples";
  if (!wave.every(Number.isFinite)) return "holds samples that are not finite (NaN or infinite)";
  const most = peak(wave);
  return most > FULL_SCALE ? `holds float samples up to ${most.toPrecision(6)}: at integer scale; divide them by 32768` : "";
}

/**
 * What makes speech unlikely in samples, as words that follow "its samples"; "" where nothing does.
 * `wave` is the mean of `channels`, at their own rate, with the rules of `spkd.corpus.audio`: a resampler rounds what is clipped.
 * Browsers resample what some microphones give.
 */
export function remarkOn(wave, channels = [wave]) {
  const { mean, deviation } = moments(wave);
  if (channels.length > 1) {
    const parts = channels.map(moments);
    const middle = parts.reduce((sum, each) => sum + each.mean, 0) / parts.length;
    const power = parts.reduce((sum, each) => sum + each.deviation ** 2 + (each.mean - middle) ** 2, 0) / parts.length;
    if (Math.sqrt(power) > 1e-4 && deviation < 0.05 * Math.sqrt(power)) return "hold channels that cancel each other";
  }
  if (deviation < 1e-5) return "are digital silence";
  if (Math.abs(mean) > 3 * deviation) return "are mostly a constant offset";
  const most = peak(wave);
  if (most < RESOLVED) return "";
  let clipped = 0;
  for (const value of wave) if (Math.abs(value) >= 0.999 * most) clipped++;
  const isClipped = clipped > CLIPPED_SHARE * wave.length || isFlattened(wave, mean, deviation);
  return isClipped ? "are clipped in more than 2 % of their samples" : "";
}

/** Whether a waveform was clipped at some level before a coder, a resampler or a change of level. */
function isFlattened(wave, mean, deviation) {
  const lowest = LOWEST * deviation;
  const every = Math.ceil(wave.length / LOOKED_AT);
  const some = wave.filter((_, i) => i % every === 0);
  const least = Math.max(CLIPPED_SHARE * some.length, FEWEST / every);
  return [1, -1].some((sign) => {
    const counts = new Uint32Array(Math.ceil(Math.log(2 * peak(wave) / lowest) / STEP) + 2 * BAND); // of logarithmic steps
    for (const value of some) {
      const side = sign * (value - mean);
      if (side > lowest) counts[Math.floor(Math.log(side / lowest) / STEP)]++;
    }
    const total = (start, end) => counts.subarray(start, end).reduce((sum, count) => sum + count, 0);
    return counts.some((_, i) => {
      const [before, within, beyond] = [total(i - BAND, i), total(i, i + BAND), total(i + BAND)];
      return i >= BAND && within > least && within >= beyond && within > FLATTENED * before;
    });
  });
}

/**
 * Problems of a recording (16 kHz), with the rules of `spkd.corpus.quality`, as {text, minor}: a decision is made in spite of
 * minor ones. `samples` is what `remarkOn` says of it, `limits` are those of `export.json`.
 */
export function remarks(wave, samples, limits) {
  const found = samples ? [{ text: `its samples ${samples}`, minor: samples.startsWith("are clipped") }] : [];
  const levels = [];
  for (let start = 0; start + limits.frame <= wave.length; start += limits.frame) {
    const { deviation } = moments(wave.subarray(start, start + limits.frame));
    levels.push(20 * Math.log10(Math.max(deviation, 1e-10)));
  }
  const seconds = (levels.filter((level) => level >= limits.level).length * limits.frame) / RATE;
  if (seconds < limits.seconds) {
    const text = `only ${seconds.toFixed(2)} s are louder than ${limits.level} dB of full scale; a decision needs ${limits.seconds} s`;
    found.push({ text, minor: false });
  }
  if (found.some((each) => !each.minor)) return found;
  const { windows, voiced, variation } = voicing(wave, limits);
  const needed = Math.max(limits.voiced, limits.voiced_share * windows);
  const varying = voiced > limits.much_voiced * windows ? limits.less_variation : limits.variation;
  if (voiced < needed || variation < varying) {
    const [have, want] = [voiced, needed].map((count) => ((count * limits.frame) / RATE).toFixed(2));
    const text = `no speech found (${have} s are voiced, and the level varies by ${variation.toFixed(1)} dB; speech has at least ${want} s and ${varying} dB)`;
    found.push({ text, minor: false });
    return found;
  }
  for (const [limit, most] of limits.silence) {
    const share = levels.filter((level) => level < limit).length / levels.length;
    if (share <= most) continue;
    const text = `${Math.floor(100 * share)} % of it is silence below ${limit} dB of full scale, with which one speaker can score like two; cut it off`;
    found.push({ text, minor: true });
    break;
  }
  return found;
}

/** Windows that are not faint, those of them that are voiced, and the standard deviation of their level (dB). */
function voicing(wave, limits) {
  const slow = Float64Array.from({ length: Math.floor(wave.length / DECIMATION) }, (_, i) => {
    let sum = 0;
    for (let k = 0; k < DECIMATION; k++) sum += wave[i * DECIMATION + k];
    return sum / DECIMATION;
  });
  const span = WINDOW + LONGEST + 1;
  const levels = [];
  let voiced = 0;
  for (let start = 0; start + span <= slow.length; start += limits.frame / DECIMATION) {
    const part = slow.subarray(start, start + span);
    const { mean } = moments(part);
    const x = part.map((value) => value - mean);
    const power = product(x, 0, 0);
    const level = 10 * Math.log10(Math.max(power / WINDOW, 1e-20));
    if (level <= limits.faint) continue;
    levels.push(level);
    if (correlation(x, power) > limits.correlation) voiced++;
  }
  return { windows: levels.length, voiced, variation: levels.length ? moments(levels).deviation : 0 };
}

/** Correlation of a window with the signal some lag later, at its highest local maximum; 0 without one. */
function correlation(x, power) {
  const values = [];
  for (let lag = SHORTEST - 1; lag <= LONGEST + 1; lag++) {
    values.push(product(x, 0, lag) / Math.sqrt(Math.max(power * product(x, lag, lag), 1e-30)));
  }
  const isPeak = (value, i) => value > values[i - 1] && value >= values[i + 1];
  return values.reduce((most, value, i) => (isPeak(value, i) ? Math.max(most, value) : most), 0);
}

/** Product of two windows of a signal, by their first samples. */
function product(x, one, other) {
  let sum = 0;
  for (let i = 0; i < WINDOW; i++) sum += x[one + i] * x[other + i];
  return sum;
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
  const whom = likelihood >= 0 ? "one person as from two" : "two people as from one";
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
